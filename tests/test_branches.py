"""The faster ways to sum the branches: where they are taken, and that they give what the branches give."""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from conftest import images, randomise, rel_diff
from torch import Tensor, nn
from torch.autograd import forward_ad

from repvgg_zoo import FoldError, RepVGGBlock, blocks, deploy, reparam
from repvgg_zoo.branches import _one_by_one, one_by_one
from repvgg_zoo.compare import compare, float64_rel_diff

BLOCKS = {
    'identity': dict(in_chs=8, out_chs=8),
    'stride': dict(in_chs=6, out_chs=10, stride=2),
    'groups': dict(in_chs=8, out_chs=8, groups=4),
    'dilation': dict(in_chs=8, out_chs=8, dilation=2),
    'reflect': dict(in_chs=8, out_chs=8, padding_mode='reflect'),
    'without affine': dict(in_chs=8, out_chs=8, norm_layer=lambda c, **dd: nn.BatchNorm2d(c, affine=False, **dd)),
    'synchronised': dict(in_chs=8, out_chs=8, norm_layer=nn.SyncBatchNorm),
}


def block(kind: str = 'identity', *, dtype: torch.dtype = torch.float64) -> RepVGGBlock:
    torch.manual_seed(0)
    made = RepVGGBlock(**BLOCKS[kind])
    for norm in made.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            if norm.affine:
                nn.init.normal_(norm.weight)
                nn.init.normal_(norm.bias)
    return made.to(dtype).eval()


def batch(made: RepVGGBlock, **kwargs) -> Tensor:
    return images(3, 41, in_chans=made.conv_kxk.conv.weight.shape[1] * made.conv_kxk.conv.groups, **kwargs)


@pytest.fixture
def taken(monkeypatch) -> list[bool]:
    """Of each block that ran, but for the reference, whether a faster way was taken."""
    taken, real = [], blocks.sum_branches

    def spy(*args, **kwargs):
        y = real(*args, **kwargs)
        if not _one_by_one.get():
            taken.append(y is not None)
        return y

    monkeypatch.setattr(blocks, 'sum_branches', spy)
    return taken


def branches(run: Callable[[], Tensor]) -> Tensor:
    """What the branches give, run one after the other."""
    with one_by_one():
        return run()


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=['contiguous', 'channels_last'])
@pytest.mark.parametrize('kind', BLOCKS)
def test_folded_for_one_call(kind, layout, taken):
    made = block(kind).to(memory_format=layout)
    x = batch(made, dtype=torch.float64).to(memory_format=layout)
    with torch.no_grad():
        y, expected = made(x), branches(lambda: made(x))
    assert taken == [True]
    assert rel_diff(y, expected) < 1e-13  # float64
    assert y.stride() == expected.stride()


def test_folded_for_one_call_to_float32_rounding(taken):
    model = randomise(timm.create_model('repvgg_a0'))
    x = images(8, 128)
    with torch.inference_mode():
        y, reference = model(x), branches(lambda: model(x))
        exact = model.double()(x.double())
    assert sum(taken[:22]) > 10
    assert rel_diff(y, exact) < 2 * rel_diff(reference, exact)
    assert rel_diff(y, exact) < 1e-5  # some twenty layers of float32


def test_nothing_is_remembered(taken):
    made = block()
    x = batch(made, dtype=torch.float64)

    def change_data() -> None:
        made.conv_kxk.conv.weight.data *= 2

    def change_statistics() -> None:
        made.identity.running_var.add_(1)

    def load() -> None:
        made.load_state_dict({key: value + 1 for key, value in made.state_dict().items()})

    def replace_eps() -> None:
        made.conv_1x1.bn.eps = 0.5

    with torch.no_grad():
        outputs = [made(x)]
        for change in (change_data, change_statistics, load, replace_eps):
            change()
            outputs.append(made(x))
            assert rel_diff(outputs[-1], branches(lambda: made(x))) < 1e-13
            assert rel_diff(outputs[-1], outputs[-2]) > 1e-3
    assert all(taken)


def test_frozen_blocks_are_folded_and_others_are_not(taken):
    made = block()
    x = batch(made, dtype=torch.float64)
    assert made(x).requires_grad
    assert not made.requires_grad_(False)(x).requires_grad
    assert made(x.requires_grad_()).requires_grad
    assert taken == [False, True, False]


def test_few_pixels_are_not_worth_a_fold(taken):
    made = block()
    with torch.no_grad():
        for px in (31, 32):
            made(images(1, px, in_chans=8, dtype=torch.float64))
    assert taken == [False, True]


def test_hooks_on_branches_fire(taken):
    x = batch(block(), dtype=torch.float64)
    for name in ('conv_kxk', 'conv_kxk.conv', 'conv_1x1.bn', 'identity', 'drop_path', 'drop_block'):
        for register in ('register_forward_hook', 'register_forward_pre_hook', 'register_full_backward_hook'):
            made, fired = block(), []
            getattr(made.get_submodule(name), register)(lambda *_, fired=fired: fired.append(1) and None)
            with torch.set_grad_enabled('backward' in register):
                y = made.train('backward' in register)(x.clone().requires_grad_('backward' in register))
            if 'backward' in register:
                y.sum().backward()
            assert fired, (name, register)
    assert not any(taken)


def test_hooks_on_all_modules_fire(taken):
    made, seen = block(), []
    with torch.no_grad():
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
        try:
            made(batch(made, dtype=torch.float64))
        finally:
            handle.remove()
    assert made.conv_1x1.conv in seen
    assert taken == [False]


def patch_forward(made: RepVGGBlock) -> None:
    made.conv_kxk.conv.forward = lambda x: nn.functional.conv2d(x, made.conv_kxk.conv.weight, padding=1) * 2


def weight_norm(made: RepVGGBlock) -> None:
    nn.utils.parametrizations.weight_norm(made.conv_1x1.conv)


def subclass(made: RepVGGBlock) -> None:
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    made.conv_kxk.conv.__class__ = Doubled


def other_norm(made: RepVGGBlock) -> None:
    made.identity = nn.InstanceNorm2d(8).double()


def no_statistics(made: RepVGGBlock) -> None:
    made.conv_kxk.bn = nn.BatchNorm2d(8, track_running_stats=False).double()


def bias(made: RepVGGBlock) -> None:
    made.conv_1x1.conv.bias = nn.Parameter(torch.ones(8, dtype=torch.float64))


def replaced_branch(made: RepVGGBlock) -> None:
    made.conv_1x1 = nn.Sequential(made.conv_1x1, nn.Sigmoid())


def partly_training(made: RepVGGBlock) -> None:
    made.identity.train()
    made.identity.momentum = 0.0


@pytest.mark.parametrize(
    'change', [patch_forward, weight_norm, subclass, other_norm, no_statistics, bias, replaced_branch, partly_training]
)
def test_changed_branches_are_run_as_they_are(change, taken):
    made = block()
    x = batch(made, dtype=torch.float64)
    with torch.no_grad():
        before = made(x)
        change(made)
        assert torch.equal(made(x), branches(lambda: made(x)))
    assert taken == [True, False]
    assert change is weight_norm or rel_diff(made(x), before) > 1e-3


def test_graphs_hold_the_branches(taken):
    made = block(dtype=torch.float32)
    x = batch(made)
    with torch.no_grad():
        traced = torch.jit.trace(made, x, check_trace=False)
        exported = torch.export.export(made, (x,))
        symbolic = torch.fx.symbolic_trace(made)
        compiled = torch.compile(made, backend='eager', fullgraph=True)
        scripted = torch.jit.script(made)
        expected = branches(lambda: made(x))
        for module in (traced, exported.module(), symbolic, compiled, scripted):
            assert torch.equal(module(x), expected)
    assert str(traced.inlined_graph).count('aten::_convolution(') == 2
    assert sum(node.target == torch.ops.aten.conv2d.default for node in exported.graph.nodes) == 2
    assert not any(taken)


def test_transforms_of_functions_take_the_branches(taken):
    made = block()
    x = batch(made, dtype=torch.float64)
    with torch.no_grad():
        mapped = torch.vmap(made)(x[None])[0]
        assert rel_diff(mapped, branches(lambda: made(x))) < 1e-13
    loss = lambda x: made(x).sum()  # noqa: E731
    expected = torch.autograd.grad(branches(lambda: loss(x.requires_grad_())), x)[0]
    assert rel_diff(torch.func.grad(loss)(x.detach()), expected) < 1e-12
    with torch.no_grad(), forward_ad.dual_level():
        dual = made(forward_ad.make_dual(x.detach(), torch.ones_like(x)))
        assert forward_ad.unpack_dual(dual).tangent is not None
    assert not any(taken)


def test_mixed_precision_in_evaluation(taken):
    made = block(dtype=torch.float32)
    x = batch(made)
    with torch.no_grad():
        expected = made(x)
        with torch.autocast('cpu', torch.bfloat16):
            y = made(x)
    assert y.dtype == torch.bfloat16
    assert rel_diff(y, expected) < 2e-2  # bfloat16 has eight bits
    assert taken == [True, True]


def test_comparisons_of_the_forms_run_the_branches(monkeypatch):
    """Or a wrong fold would be compared with itself."""
    model, x = randomise(timm.create_model('test_repvgg'), px=32), images(2, 64)
    with torch.no_grad():
        assert rel_diff(model(x), branches(lambda: model(x))) < 1e-4  # float32
    real = reparam.fold_block
    for module in (deploy, blocks.sum_branches.__globals__):
        patch = monkeypatch.setattr if module is deploy else monkeypatch.setitem
        patch(module, 'fold_block', lambda *args, **kwargs: tuple(2 * t for t in real(*args, **kwargs)))
    with torch.no_grad():
        assert rel_diff(model(x), branches(lambda: model(x))) > 0.1
    with pytest.raises(FoldError, match='differs'):
        model.switch_to_deploy(verify=x)
    deployed = copy.deepcopy(model).switch_to_deploy()
    assert not compare(model, deployed, iter([x]), dtype=torch.float32).same
    assert float64_rel_diff(model, x[:1]) > 0.1


def test_copies_are_independent(taken):
    made = block()
    x = batch(made, dtype=torch.float64)
    other = copy.deepcopy(made)
    with torch.no_grad():
        other.conv_kxk.conv.weight.mul_(2)
        assert rel_diff(made(x), branches(lambda: made(x))) < 1e-13
        assert rel_diff(other(x), branches(lambda: other(x))) < 1e-13
