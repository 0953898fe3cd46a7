"""The faster ways to sum the branches: where they are taken, and that they give what the branches give."""

import contextlib
import copy
import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import block_params, create_model, device_of_tests, images, randomise, rel_diff, run_branches, to_device
from timm.layers import DropBlock2d, FrozenBatchNormAct2d, freeze_batch_norm_2d
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import FrozenBatchNorm2d

import repvgg_zoo
from repvgg_zoo import FoldError, RepVGGBlock
from repvgg_zoo.blocks import branch_sum
from repvgg_zoo.blocks.factory import block_type
from repvgg_zoo.reparam import fold
from repvgg_zoo.reparam.evaluation import disable_fast_path
from repvgg_zoo.tools.verify import compare, float64_rel_diff

pytestmark = pytest.mark.device

BLOCKS = {
    'identity': dict(in_chs=8, out_chs=8),
    'no identity': dict(in_chs=8, out_chs=8, identity=False),
    'stride': dict(in_chs=6, out_chs=10, stride=2),
    'groups': dict(in_chs=8, out_chs=8, groups=4),
    'groups and stride': dict(in_chs=8, out_chs=12, groups=2, stride=2),
    'dilation': dict(in_chs=8, out_chs=8, dilation=2),
    'reflect': dict(in_chs=8, out_chs=8, padding_mode='reflect'),
    'without affine': dict(in_chs=8, out_chs=8, norm_layer=lambda c, **dd: nn.BatchNorm2d(c, affine=False, **dd)),
    'synchronised': dict(in_chs=8, out_chs=8, norm_layer=nn.SyncBatchNorm),
}
MODES = pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])


def block(kind: str = 'identity', *, dtype: torch.dtype = torch.float64, **kwargs) -> RepVGGBlock:
    """In eval mode, with statistics, affine parameters and ε of each normalisation's own."""
    torch.manual_seed(0)
    made = RepVGGBlock(**(BLOCKS[kind] | kwargs))
    for i, norm in enumerate(m for m in made.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        norm.eps = 0.01 * (i + 1)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        if norm.affine:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    return made.to(device_of_tests(), dtype).eval()


def batch(made: RepVGGBlock, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Of odd size; in eval mode large enough for a fold with stride 2."""
    return images(3, 9 if made.training else 41, in_chans=made.conv_kxk.conv.in_channels, dtype=dtype)


def run(made: nn.Module, x: Tensor) -> list[Tensor]:
    """The output; in training mode, also gradients of the input and of all parameters."""
    torch.manual_seed(1)  # of what is dropped
    if not made.training:
        with torch.no_grad():
            return [made(x)]
    x = x.detach().clone().requires_grad_()
    y = made(x)
    y.square().mean().backward()
    return [y.detach(), *(t.grad for t in (x, *made.parameters()) if t.grad is not None)]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    """In float64; gradients of kernels before a normalisation cancel, so that they are measured in absolute terms."""
    differences = [((a - b).abs().max() / (1 + b.abs().max())).item() for a, b in zip(found, expected, strict=True)]
    assert max(differences) < 1e-12


# ------------------------------------------------------------------------------------ folded for one call


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=['contiguous', 'channels_last'])
@pytest.mark.parametrize('kind', block_params(BLOCKS))
def test_fold_for_call_without_gradients_keeps_the_outputs(kind, layout, fast_path_calls):
    made = block(kind).to(memory_format=layout)
    x = batch(made).to(memory_format=layout)
    for without_gradients in (torch.no_grad, torch.inference_mode):
        with without_gradients():
            y, expected = made(x), run_branches(lambda: made(x))
        assert rel_diff(y, expected) < 1e-13  # float64
        assert y.stride() == expected.stride()
    assert fast_path_calls == [True, True]


@pytest.mark.parametrize('kind', block_params(BLOCKS))
def test_fold_for_call_float32_is_near_the_exact_outputs(kind, fast_path_calls):
    made = block(kind, dtype=torch.float32)
    x = batch(made, dtype=torch.float32)
    with torch.no_grad():
        y, expected = made(x), run_branches(lambda: made(x))
        exact = run_branches(lambda: made.double()(x.double()))
    assert fast_path_calls == [True]
    for found in (y, expected):
        assert rel_diff(found, exact) < 1e-6  # some ten roundings of 6e-8


def test_fold_for_call_deep_model_is_as_exact_as_the_branches(fast_path_calls):
    model = randomise(create_model('repvgg_a0'))
    x = images(4, 128)
    fast_path_calls.clear()
    with torch.inference_mode():
        y, reference = model(x), run_branches(lambda: model(x))
        exact = run_branches(lambda: model.double()(x.double()))
    assert sum(fast_path_calls) == 1 + 2 + 4  # those behind have fewer pixels than a fold is worth
    assert rel_diff(y, exact) < 2 * rel_diff(reference, exact)
    assert rel_diff(y, exact) < 1e-5  # some twenty layers of float32


@pytest.mark.parametrize('kind', ['identity', 'stride'])
def test_fold_for_call_block_in_eval_equals_the_formula_of_the_paper(kind, fast_path_calls):
    """PyTorch's own fusion of each branch, each kernel padded to 3x3, added up."""
    made = block(kind)
    x = batch(made)
    identity = to_device(torch.eye(8, dtype=torch.float64)[:, :, None, None])
    fused = [
        fuse_conv_bn_weights(kernel, None, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        for kernel, norm in [
            (made.conv_kxk.conv.weight, made.conv_kxk.bn),
            (made.conv_1x1.conv.weight, made.conv_1x1.bn),
            (identity, made.identity),
        ]
        if norm is not None
    ]
    kernel = fused[0][0] + sum(nn.functional.pad(k, (1, 1, 1, 1)) for k, _ in fused[1:])
    with torch.no_grad():
        expected = nn.functional.conv2d(
            x, kernel, sum(b for _, b in fused), stride=made.conv_kxk.conv.stride, padding=1
        )
        assert rel_diff(made(x), expected.relu()) < 1e-13  # float64
    assert fast_path_calls == [True]


def test_fold_for_call_under_autocast_is_near_the_float32_outputs(fast_path_calls):
    made = block(dtype=torch.float32)
    x = batch(made, dtype=torch.float32)
    with torch.no_grad():
        expected = made(x)
        with torch.autocast(x.device.type, torch.bfloat16):
            y = made(x)
        branches = run_branches(lambda: made(x))
    assert y.dtype == branches.dtype == torch.float32  # that of the identity; without one it is bfloat16
    assert rel_diff(y, expected) < 2e-2  # bfloat16 has eight bits
    assert fast_path_calls == [True, True]


@pytest.mark.parametrize('name', block_params(repvgg_zoo.BLOCKS))
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('px', [8, 40])
def test_fold_for_call_under_autocast_keeps_the_dtype(name, dtype, px):
    made = randomise(block_type(name)(8, 8), px=11, in_chans=8)
    x = images(2, px, in_chans=8).to(dtype)
    with torch.autocast(x.device.type, torch.bfloat16):
        assert made(x).dtype == run_branches(lambda: made(x)).dtype


def test_fold_for_call_after_a_change_uses_new_values(fast_path_calls):
    made = block()
    x = batch(made)

    def change_data() -> None:
        made.conv_kxk.conv.weight.data *= 2

    def replace_data() -> None:
        made.conv_1x1.conv.weight.data = made.conv_1x1.conv.weight.data.flip(0)

    def change_parameter() -> None:
        made.conv_1x1.bn.bias.add_(1)

    def change_statistics() -> None:
        made.identity.running_var.add_(1)

    def load() -> None:
        made.load_state_dict({key: value + 1 for key, value in made.state_dict().items()})

    def load_by_assignment() -> None:
        made.load_state_dict({key: value + 1 for key, value in made.state_dict().items()}, assign=True)

    def train() -> None:
        made.train()(x)
        made.eval()

    def replace_eps() -> None:
        made.conv_1x1.bn.eps = 0.5

    changes = (change_data, replace_data, change_parameter, change_statistics, load, load_by_assignment, train)
    with torch.no_grad():
        before = made(x)
        for change in (*changes, replace_eps):
            change()
            after = made(x)
            assert rel_diff(after, run_branches(lambda: made(x))) < 1e-13, change  # float64
            assert rel_diff(after, before) > 1e-3, change
            before = after
    assert fast_path_calls == [True] * 7 + [False] + [True] * 2  # the training pass


def test_fold_for_call_in_evaluation_leaves_the_block_unchanged(fast_path_calls):
    made = block()
    before, names = copy.deepcopy(made.state_dict()), set(vars(made))
    versions = [t._version for t in (*made.parameters(), *made.buffers())]
    with torch.no_grad():
        made(batch(made))
    assert fast_path_calls == [True]
    assert set(vars(made)) == names
    assert [t._version for t in (*made.parameters(), *made.buffers())] == versions
    assert all(torch.equal(value, before[key]) for key, value in made.state_dict().items())


def test_fold_for_call_after_copying_keeps_copies_independent():
    made = block()
    x = batch(made)
    other = copy.deepcopy(made)
    with torch.no_grad():
        other.conv_kxk.conv.weight.mul_(2)
        assert rel_diff(made(x), run_branches(lambda: made(x))) < 1e-13  # float64
        assert rel_diff(other(x), run_branches(lambda: other(x))) < 1e-13


# ------------------------------------------------------------------------------ where the branches are run


FROZEN = {'gradients of all': lambda _: True, 'of kernels': lambda name: 'conv.weight' in name}


def with_frozen_norms(made: nn.Module, wanted: Callable[[str], bool]) -> nn.Module:
    """In train mode, as detectors fine-tune: the norms alone are in eval mode."""
    made.train()
    for module in made.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(wanted(name) and parameter.is_floating_point())
    return made


@pytest.mark.parametrize('wanted', FROZEN)
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=['contiguous', 'channels_last'])
@pytest.mark.parametrize('name', block_params(repvgg_zoo.BLOCKS))
def test_fold_for_call_frozen_norms_gives_equal_gradients(name, layout, wanted, fast_path_calls):
    made = with_frozen_norms(randomise(block_type(name)(8, 8).double(), px=11, in_chans=8), FROZEN[wanted])
    made.to(memory_format=layout)
    plain = copy.deepcopy(made)
    x, x_plain = (images(3, 33, in_chans=8, dtype=torch.float64).requires_grad_() for _ in range(2))
    statistics = copy.deepcopy(dict(made.named_buffers()))
    fast_path_calls.clear()  # of the call that randomised it
    y, expected = made(x), run_branches(lambda: plain(x_plain))
    assert fast_path_calls == [True]
    assert rel_diff(y, expected) < 1e-12  # float64
    y.square().mean().backward()
    expected.square().mean().backward()
    assert rel_diff(x.grad, x_plain.grad) < 1e-10
    trained = dict(made.named_parameters())
    for key, p in plain.named_parameters():
        if not p.requires_grad:
            assert trained[key].grad is None, key
        elif not p.grad.any():  # γ of what nothing depends on
            assert not trained[key].grad.any(), key
        else:
            assert rel_diff(trained[key].grad, p.grad) < 1e-10, key
    assert all(torch.equal(value, statistics[key]) for key, value in made.named_buffers())


@pytest.mark.parametrize('norm', ['torchvision', 'timm'])
def test_fold_for_call_frozen_norms_of_other_libraries_is_used(norm, fast_path_calls):
    made = block()
    plain = copy.deepcopy(made)
    if norm == 'timm':
        for branch in ('conv_kxk', 'conv_1x1'):
            made.get_submodule(branch).bn = freeze_batch_norm_2d(made.get_submodule(branch).bn)
        made.identity = freeze_batch_norm_2d(made.identity)
    else:
        for parent, name in ((made.conv_kxk, 'bn'), (made.conv_1x1, 'bn'), (made, 'identity')):
            old = getattr(parent, name)
            frozen = FrozenBatchNorm2d(8, eps=old.eps)
            frozen.load_state_dict(old.state_dict())
            setattr(parent, name, to_device(frozen.double()))
    x = batch(made)
    y, expected = made.train()(x), run_branches(lambda: plain(x))
    assert fast_path_calls == [True]
    assert y.requires_grad
    assert rel_diff(y, expected) < 1e-12  # float64


def test_fold_for_call_frozen_norms_saves_memory():
    model = with_frozen_norms(create_model('repvgg_a0'), lambda _: True)
    x = images(4, 224)
    assert saved_bytes(model, x) < 0.6 * run_branches(lambda: saved_bytes(model, x))


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """What autograd keeps beside parameters, buffers and the input: activations, and folded kernels."""
    saved = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    given = {t.untyped_storage().data_ptr() for t in (x, *model.parameters(), *model.buffers())}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(t.untyped_storage().nbytes() for address, t in saved.items() if address not in given)


@pytest.mark.parametrize('name', ['csla', 'bn_after'])
def test_fold_for_call_training_with_one_norm_gives_equal_gradients(name, fast_path_calls):
    made = randomise(block_type(name)(8, 8).double(), px=11, in_chans=8).train()
    plain = copy.deepcopy(made)
    x, x_plain = (images(3, 33, in_chans=8, dtype=torch.float64).requires_grad_() for _ in range(2))
    fast_path_calls.clear()  # of the call that randomised it
    y, expected = made(x), run_branches(lambda: plain(x_plain))
    assert fast_path_calls == [True]
    assert rel_diff(y, expected) < 1e-12  # float64
    y.square().mean().backward()
    expected.square().mean().backward()
    for (key, p), q in zip(made.named_parameters(), plain.parameters(), strict=True):
        # gradients of kernels before a normalisation cancel, hence the absolute term
        assert q.grad is None or (p.grad - q.grad).abs().max() <= 1e-10 * q.grad.abs().max() + 1e-12, key
    for (key, a), b in zip(made.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13, msg=key)


def test_fold_for_call_with_or_without_gradients_is_used(fast_path_calls):
    made = block()
    x = batch(made)
    assert made(x).requires_grad
    assert not made.requires_grad_(False)(x).requires_grad
    assert made(x.requires_grad_()).requires_grad
    assert fast_path_calls == [True] * 3


def test_fold_for_call_one_trained_parameter_gets_its_gradient(fast_path_calls):
    x = batch(block())
    for name, _ in block().named_parameters():
        made, plain = block().requires_grad_(False), block().requires_grad_(False)
        found, expected = (m.get_parameter(name).requires_grad_() for m in (made, plain))
        made(x).square().sum().backward()
        run_branches(lambda: plain(x).square().sum().backward())  # noqa: B023
        assert rel_diff(found.grad, expected.grad) < 1e-10, name  # float64
    assert fast_path_calls == [True] * 8


def test_fold_for_call_few_pixels_runs_the_branches(fast_path_calls):
    made = block()
    with torch.no_grad():
        for px in (31, 32):
            made(images(1, px, in_chans=8, dtype=torch.float64))
        for count in (3, 4):  # over the batch, of the output
            block('stride')(images(count, 32, in_chans=6, dtype=torch.float64))
    assert fast_path_calls == [False, True, False, True]


@MODES
def test_block_empty_batch_gives_empty_outputs(training, fast_path_calls):
    assert block().train(training)(to_device(torch.empty(0, 8, 41, 41, dtype=torch.float64))).shape == (0, 8, 41, 41)
    assert fast_path_calls == [training]


HOOKS = {
    'register_forward_hook': lambda module, args, y: 2 * y,
    'register_forward_pre_hook': lambda module, args: (2 * args[0],),
    'register_full_backward_hook': lambda module, grads_in, grads_out: (2 * grads_in[0],),
    'register_full_backward_pre_hook': lambda module, grads_out: (2 * grads_out[0],),
}
HOOKED = [
    *(f'{branch}{part}' for branch in ('conv_kxk', 'conv_1x1') for part in ('', '.conv', '.bn')),
    *('identity', 'drop_path', 'drop_block'),
]


def counted(hook: Callable[..., Any], fired: list[nn.Module]) -> Callable[..., Any]:
    def counting(module: nn.Module, *args: Any) -> Any:
        fired.append(module)
        return hook(module, *args)

    return counting


@MODES
@pytest.mark.parametrize('register', HOOKS)
def test_fold_for_call_hooks_on_branches_fire(register, training, fast_path_calls):
    x = batch(block().train(training))
    for name in HOOKED:
        made, plain, fired = block().train(training), block().train(training), []
        getattr(made.get_submodule(name), register)(counted(HOOKS[register], fired))
        getattr(plain.get_submodule(name), register)(HOOKS[register])
        assert_equal(run(made, x), run_branches(lambda: run(plain, x)))  # noqa: B023
        assert len(fired) == (training or 'backward' not in register), name
        # in training the 1x1 branch is recomputed, except where its own parts are hooked
        assert fast_path_calls.pop() == (training and name not in ('conv_1x1.conv', 'conv_1x1.bn')), name


@MODES
@pytest.mark.parametrize('register', HOOKS)
def test_fold_for_call_hooks_on_all_modules_fire(register, training, fast_path_calls):
    made, fired = block().train(training), []
    made.act = nn.ReLU()  # PyTorch lets no hook on gradients stand before an activation in place
    register_for_all = getattr(nn_module, register.replace('register_', 'register_module_'))
    handle = register_for_all(counted(lambda *_: None, fired))
    try:
        run(made, batch(made))
    finally:
        handle.remove()
    assert ({made.conv_1x1.conv, made.identity} <= set(fired)) == (training or 'backward' not in register)
    assert fast_path_calls == [False]
    run(made, batch(made))
    assert fast_path_calls == [False, True]


@MODES
def test_fold_for_call_hook_on_the_block_keeps_the_fast_path(training, fast_path_calls):
    made, fired = block().train(training), []
    made.register_forward_hook(counted(lambda *_: None, fired))
    run(made, batch(made))
    assert fired == [made]
    assert fast_path_calls == [True]


def patch_forward_of_conv(made: RepVGGBlock) -> None:
    made.conv_kxk.conv.forward = lambda x: nn.functional.conv2d(x, made.conv_kxk.conv.weight, padding=1).sigmoid()


def patch_conv_forward(made: RepVGGBlock) -> None:
    made.conv_kxk.conv._conv_forward = lambda x, weight, bias: nn.functional.conv2d(x, weight, padding=1).sigmoid()


def patch_forward_of_norm(made: RepVGGBlock) -> None:
    made.identity.forward = lambda x: x


def patch_forward_of_branch(made: RepVGGBlock) -> None:
    made.conv_1x1.forward = lambda x: x


def weight_norm(made: RepVGGBlock) -> None:
    parametrizations.weight_norm(made.conv_1x1.conv)
    with torch.no_grad():
        made.conv_1x1.conv.parametrizations.weight.original0.mul_(2)


def pruned(made: RepVGGBlock) -> None:
    prune.l1_unstructured(made.conv_kxk.conv, 'weight', 0.5)


def subclass_of_conv(made: RepVGGBlock) -> None:
    class Sigmoid(nn.Conv2d):
        def forward(self, x):
            return super().forward(x).sigmoid()

    made.conv_kxk.conv.__class__ = Sigmoid


def subclass_of_branch(made: RepVGGBlock) -> None:
    class Sigmoid(type(made.conv_kxk)):
        def forward(self, x):
            return super().forward(x).sigmoid()

    made.conv_kxk.__class__ = Sigmoid


def subclass_of_norm(made: RepVGGBlock) -> None:
    class Sigmoid(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).sigmoid()

    made.conv_1x1.bn.__class__ = Sigmoid


def other_norm(made: RepVGGBlock) -> None:
    made.identity = to_device(nn.GroupNorm(2, 8).double())


def no_statistics(made: RepVGGBlock) -> None:
    made.conv_kxk.bn = to_device(nn.BatchNorm2d(8, track_running_stats=False).double())


def bias_of_conv(made: RepVGGBlock) -> None:
    made.conv_1x1.conv.bias = nn.Parameter(to_device(torch.ones(8, dtype=torch.float64)))


def more_layers(made: RepVGGBlock) -> None:
    made.conv_1x1 = nn.Sequential(made.conv_1x1, nn.Sigmoid())


def other_mode_of_identity(made: RepVGGBlock) -> None:
    made.identity.train(not made.training)


def other_mode_of_conv_1x1(made: RepVGGBlock) -> None:
    made.conv_1x1.train(not made.training)


POINT_IS_CHANGED = (
    patch_forward_of_branch,
    weight_norm,
    subclass_of_norm,
    other_mode_of_conv_1x1,
)


@MODES
@pytest.mark.parametrize(
    'change',
    [
        patch_forward_of_conv,
        patch_conv_forward,
        patch_forward_of_norm,
        patch_forward_of_branch,
        weight_norm,
        pruned,
        subclass_of_conv,
        subclass_of_branch,
        subclass_of_norm,
        other_norm,
        no_statistics,
        more_layers,
        other_mode_of_identity,
        other_mode_of_conv_1x1,
    ],
)
def test_fold_for_call_changed_branches_are_run_as_they_are(change, training, fast_path_calls):
    made, plain = block().train(training), block().train(training)
    x = batch(made)
    before = run(block().train(training), x)
    change(made), change(plain)
    found = run(made, x)
    assert_equal(found, run_branches(lambda: run(plain, x)))
    assert fast_path_calls == [True, training and change not in POINT_IS_CHANGED]
    assert rel_diff(found[0], before[0]) > 1e-3


@MODES
def test_fold_for_call_convolution_with_bias_keeps_the_outputs(training, fast_path_calls):
    made, plain = block().train(training), block().train(training)
    x = batch(made)
    before = run(block().train(training), x)
    bias_of_conv(made), bias_of_conv(plain)
    found = run(made, x)
    assert_close(found, run_branches(lambda: run(plain, x)))
    assert fast_path_calls == [True, True]
    assert training or rel_diff(found[0], before[0]) > 1e-3  # normalisation takes it off again in training


def append_to_branch(made: RepVGGBlock) -> None:
    made.conv_kxk = nn.Sequential(made.conv_kxk, nn.Sigmoid())


def other_drop_block(made: RepVGGBlock) -> None:
    made.drop_block = nn.Sigmoid()


def no_running_tensors(made: RepVGGBlock) -> None:
    made.identity.running_mean = made.identity.running_var = None


def no_count_of_batches(made: RepVGGBlock) -> None:
    made.identity.num_batches_tracked = None


def norm_without_shift(made: RepVGGBlock) -> None:
    made.identity.register_parameter('bias', None)


def norm_without_scale(made: RepVGGBlock) -> None:
    made.identity.register_parameter('weight', None)


def padding_by_name(made: RepVGGBlock) -> None:
    made.conv_kxk.conv.padding = 'same'


def larger_second_kernel(made: RepVGGBlock) -> None:
    torch.manual_seed(2)
    made.conv_1x1.conv = to_device(nn.Conv2d(8, 8, 3, padding=1, bias=False).double())


def larger_first_kernel(made: RepVGGBlock) -> None:
    torch.manual_seed(2)
    made.conv_kxk.conv = to_device(nn.Conv2d(8, 8, 5, padding=2, bias=False).double())


def one_branch_in_groups(made: RepVGGBlock) -> None:
    torch.manual_seed(2)
    made.conv_kxk.conv = to_device(nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False).double())


@pytest.mark.parametrize(
    ('change', 'training'),
    [
        (append_to_branch, False),
        (append_to_branch, True),
        (other_drop_block, False),
        (other_drop_block, True),
        (no_running_tensors, False),
        (no_running_tensors, True),
        (no_count_of_batches, False),
        (no_count_of_batches, True),
        (norm_without_shift, False),
        (norm_without_shift, True),
        (norm_without_scale, False),
        (norm_without_scale, True),
        (padding_by_name, False),
        (padding_by_name, True),
        (larger_second_kernel, False),
        (larger_second_kernel, True),
        (larger_first_kernel, False),
        (larger_first_kernel, True),
        (one_branch_in_groups, False),
        (one_branch_in_groups, True),
    ],
)
def test_fold_for_call_changed_branches_keeps_the_outputs(change, training):
    """Whichever way is taken."""
    if change is norm_without_scale and training and device_of_tests().type == 'cuda':
        pytest.skip('the backward pass of a norm with a shift and no scale ends in an error inside PyTorch on CUDA')
    made, plain = block().train(training), block().train(training)
    x = batch(made)
    change(made), change(plain)
    assert_close(run(made, x), run_branches(lambda: run(plain, x)))


@pytest.mark.parametrize(
    'kwargs', [dict(drop_path_rate=0.5), dict(drop_block=lambda: DropBlock2d(0.5, 3))], ids=['path', 'block']
)
def test_fold_for_call_active_drop_path_runs_the_branches(kwargs, fast_path_calls):
    """Several outputs of one image, whose spread tells how sure the model is."""
    made = block(**kwargs)
    x = batch(made)
    expected = run(made, x)
    made.drop_path.train(), made.drop_block.train()
    found = run(made, x)
    assert_equal(found, run_branches(lambda: run(made, x)))
    assert rel_diff(found[0], expected[0]) > 1e-3
    assert fast_path_calls == [True, False]


def test_fold_for_call_tensor_subclass_or_meta_runs_the_branches(fast_path_calls):
    class Marked(Tensor):
        pass

    made = block()
    x = batch(made)
    expected = run_branches(lambda: run(made, x))[0]
    assert rel_diff(run(made, x.as_subclass(Marked))[0].as_subclass(Tensor), expected) == 0
    assert isinstance(run(made, x.as_subclass(Marked))[0], Marked)
    assert run(made.to('meta'), x.to('meta'))[0].shape == expected.shape
    assert not any(fast_path_calls)


@pytest.mark.cpu
def test_block_wrong_input_raises_the_error_of_pytorch():
    for made in (block(), block().train()):
        with torch.no_grad(), pytest.raises(ValueError, match='expected 4D input'):
            made(torch.randn(8, 41, 41, dtype=torch.float64))
        with torch.no_grad(), pytest.raises(RuntimeError, match='to have 8 channels, but got 4 channels'):
            made(torch.randn(1, 4, 41, 41, dtype=torch.float64))


@MODES
def test_disable_fast_path_nested_or_in_threads_runs_the_branches(training, fast_path_calls):
    made = block().train(training)
    x, in_thread = batch(made), []
    with disable_fast_path():
        with contextlib.suppress(KeyError), disable_fast_path():
            run(made, x)
            raise KeyError
        run(made, x)
        thread = threading.Thread(target=lambda: in_thread.append(run(made, x)))
        thread.start()
        thread.join()
    run(made, x)
    assert len(in_thread) == 1
    assert fast_path_calls == [False, False, True, True]


# ------------------------------------------------------------------------------------ graphs and transforms


@pytest.mark.cpu
def test_fold_for_call_in_a_graph_runs_the_branches(fast_path_calls):
    made = block(dtype=torch.float32)
    x = batch(made, dtype=torch.float32)
    with torch.no_grad():
        traced = torch.jit.trace(made, x, check_trace=False)
        exported = torch.export.export(made, (x,))
        symbolic = torch.fx.symbolic_trace(made)
        compiled = torch.compile(made, backend='eager', fullgraph=True)
        aot_compiled = torch.compile(made, backend='aot_eager', fullgraph=True)
        scripted = torch.jit.script(made)
        expected = run_branches(lambda: made(x))
        for module in (traced, exported.module(), symbolic, compiled, aot_compiled, scripted):
            assert torch.equal(module(x), expected)
    assert str(traced.inlined_graph).count('aten::_convolution(') == 2
    assert sum(node.target == torch.ops.aten.conv2d.default for node in exported.graph.nodes) == 2
    assert not any(fast_path_calls)


@pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
def test_fold_for_call_compiled_training_runs_the_branches(backend, fast_path_calls):
    torch.compiler.reset()  # all blocks share the code whose versions are limited
    made, plain = block().train(), block().train()
    x = batch(made)
    assert_close(run(torch.compile(made, backend=backend, fullgraph=True), x), run_branches(lambda: run(plain, x)))
    for a, b in zip(made.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)  # float64
    assert not any(fast_path_calls)


def test_fold_for_call_function_transforms_run_the_branches(fast_path_calls):
    made = block()
    x = batch(made)
    loss = lambda x: made(x).square().sum()  # noqa: E731
    expected = torch.autograd.grad(run_branches(lambda: loss(x.requires_grad_())), x)[0]
    x = x.detach()
    with torch.no_grad():
        assert rel_diff(torch.vmap(made)(x[None])[0], run_branches(lambda: made(x))) < 1e-13  # float64
    assert rel_diff(torch.func.grad(loss)(x), expected) < 1e-12  # float64
    _, derivative = torch.func.jvp(loss, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(derivative, expected.sum(), rtol=1e-10, atol=1e-10)  # float64, a long sum
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.unpack_dual(loss(forward_ad.make_dual(x, torch.ones_like(x))))
    torch.testing.assert_close(dual.tangent, expected.sum(), rtol=1e-10, atol=1e-10)
    assert not any(fast_path_calls)


@MODES
def test_fold_for_call_functional_call_gives_equal_gradients(training, fast_path_calls):
    """Gradients arrive at tensors that take the parameters' places."""
    made = block().train(training).requires_grad_(False)
    x = batch(made)
    names = ['conv_kxk.conv.weight', 'conv_1x1.bn.bias', 'identity.weight']

    def loss(values: tuple[Tensor, ...]) -> Tensor:
        return torch.func.functional_call(made, dict(zip(names, values, strict=True)), (x,)).square().sum()

    values = tuple(2 * made.get_parameter(name) for name in names)
    leaves = [value.clone().requires_grad_() for value in values]
    expected = torch.autograd.grad(run_branches(lambda: loss(leaves)), leaves)
    assert_equal(torch.autograd.grad(loss(leaves), leaves), expected)
    if not training:  # PyTorch lets no statistics move inside a transform
        assert_close(torch.func.grad(loss)(values), expected)
    with torch.no_grad():
        torch.testing.assert_close(loss(values), run_branches(lambda: loss(values)), rtol=1e-12, atol=0)  # float64
    assert not any(fast_path_calls)


# --------------------------------------------------------------------------------- comparisons of the forms


def test_verify_wrong_fold_is_compared_with_the_branches(monkeypatch):
    """Or a wrong fold would be compared with itself."""
    model, x = randomise(create_model('test_repvgg'), px=32), images(64, 64)  # enough pixels to fold every block
    with torch.no_grad():
        assert rel_diff(model(x), run_branches(lambda: model(x))) < 1e-4  # float32
    real = fold.fold_branches

    def doubled(*args, **kwargs):
        return tuple(2 * t for t in real(*args, **kwargs))

    monkeypatch.setattr(branch_sum, 'fold_branches', doubled)
    monkeypatch.setattr(fold, 'fold_branches', doubled)
    with torch.no_grad():
        assert rel_diff(model(x), run_branches(lambda: model(x))) > 0.1
    with pytest.raises(FoldError, match='differs'):
        model.switch_to_deploy(verify=x)
    deployed = copy.deepcopy(model).switch_to_deploy()
    assert not compare(model, deployed, iter([x]), dtype=torch.float32).same
    assert float64_rel_diff(model, x) > 0.1


# ---------------------------------------------------------------------------------- modes that watch the operators


class WatchFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.called.append(func)
        return func(*args, **(kwargs or {}))


class WatchOperators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called.append(func)
        return func(*args, **(kwargs or {}))


@MODES
@pytest.mark.parametrize('name', block_params(repvgg_zoo.BLOCKS))
@pytest.mark.parametrize('watch', [WatchFunctions, WatchOperators])
def test_fold_for_call_watching_mode_sees_the_branches(watch, name, training, fast_path_calls):
    made = randomise(block_type(name)(8, 8).double(), px=11, in_chans=8).train(training)
    plain, x = copy.deepcopy(made), images(2, 33, in_chans=8, dtype=torch.float64)
    fast_path_calls.clear()
    with watch() as watched:
        y = made(x)
    assert fast_path_calls == [False]
    assert torch.equal(y, run_branches(lambda: plain(x)))
    convolutions = [f for f in watched.called if f in (torch.conv2d, torch.ops.aten.convolution.default)]
    assert len(convolutions) == sum(len(list(convs_of(branch))) for branch in made.named_branches().values())


def convs_of(branch: nn.Module):
    """The convolutions that a branch runs."""
    kinds = {'PointConvBranch': 2, 'IdentityBranch': 0, 'ScaledBranch': len(getattr(branch, 'input_convs', list)())}
    return range(kinds.get(type(branch).__name__, 1))


def test_fold_for_call_default_device_keeps_the_fast_path(fast_path_calls, device):
    made = block()
    x = batch(made)
    with device, torch.no_grad():
        made(x)
    assert fast_path_calls == [True]


@pytest.mark.parametrize('name', ['repvgg', 'dbb', 'csla'])
def test_fold_for_call_selective_checkpointing_gives_equal_gradients(name, fast_path_calls):
    made = create_model('test_repvgg', block=name).double().train()
    plain, x = copy.deepcopy(made), images(4, 32, dtype=torch.float64)
    contexts = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.convolution.default])
    checkpoint(made, x, use_reentrant=False, context_fn=contexts).square().mean().backward()
    run_branches(lambda: plain(x).square().mean().backward())
    assert not any(fast_path_calls)
    for (key, p), q in zip(made.named_parameters(), plain.parameters(), strict=True):
        if name != 'dbb' and q.grad is not None:  # whose chains use running statistics, which the second pass moves
            assert (p.grad - q.grad).abs().max() <= 1e-9 * q.grad.abs().max() + 1e-12, key


def test_fold_for_call_flop_counter_counts_the_branches():
    made, x = block(), batch(block())
    with FlopCounterMode(display=False) as counter:
        made(x)
    assert counter.get_total_flops() == 2 * x.shape[0] * x.shape[2] * x.shape[3] * 8 * 8 * (9 + 1)


# ------------------------------------------------------------------------------------- what is not what it looks like


class DoubledNorm(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class DoubledBlock(RepVGGBlock):
    def run_branches(self, x):
        return 2 * super().run_branches(x)


class Tripled(nn.Module):
    def forward(self, x):
        return 3 * x


def doubled_norm():
    return RepVGGBlock(8, 8, norm_layer=DoubledNorm)


def doubled_block():
    return DoubledBlock(8, 8)


def patched_block():
    made = RepVGGBlock(8, 8)
    original = made.run_branches
    made.run_branches = lambda x: 2 * original(x)
    return made


def hooked_norm():
    made = block_type('bn_after')(8, 8)
    made.norm.register_forward_hook(lambda module, args, y: 3 * y)
    return made


def deterministic_drop():
    made = RepVGGBlock(8, 8)
    made.drop_path = Tripled()
    return made


def hooked_activation():
    made = block_type('bn_after')(8, 8)
    made.norm = FrozenBatchNormAct2d(8, apply_act=False)
    made.norm.act.register_forward_hook(lambda module, args, y: 3 * y)
    return made


@pytest.mark.parametrize(
    'make', [doubled_norm, doubled_block, patched_block, hooked_norm, deterministic_drop, hooked_activation]
)
def test_switch_own_block_that_computes_something_else_raises(make):
    made, x = to_device(make().double()).eval(), images(2, 33, in_chans=8, dtype=torch.float64)
    y = made(x)
    assert rel_diff(y, run_branches(lambda: made(x))) < 1e-12
    with pytest.raises(FoldError):
        made.switch_to_deploy()
    assert torch.equal(made(x), y)


def test_fold_for_call_frozen_norm_with_dropout_drops(fast_path_calls):
    made = block_type('csla')(8, 8)
    made.norm = FrozenBatchNormAct2d(8, apply_act=False, drop_layer=nn.Dropout)
    made.act = nn.Identity()
    y = to_device(made).train()(images(2, 33, in_chans=8))
    assert (y == 0).float().mean() > 0.4


def test_fold_bias_inside_a_chain_keeps_the_outputs():
    made, x = to_device(block_type('dbb')(8, 8).double()).eval(), images(2, 33, in_chans=8, dtype=torch.float64)
    made.branches['1x1_kxk'].conv.bias = nn.Parameter(to_device(torch.ones(8, dtype=torch.float64)))
    expected = run_branches(lambda: made(x))
    assert rel_diff(made(x), expected) < 1e-12
    assert rel_diff(made.switch_to_deploy()(x), expected) < 1e-12


@pytest.mark.parametrize('make', [lambda: 1, lambda: [1, 1], lambda: (1, 1)], ids=['int', 'list', 'tuple'])
@pytest.mark.parametrize('in_chs', [8, 16])
def test_fold_strides_as_numbers_or_lists_keeps_the_outputs(make, in_chs):
    made, x = to_device(RepVGGBlock(in_chs, 16, stride=2).double()), images(2, 33, in_chans=in_chs, dtype=torch.float64)
    for conv in (m for m in made.modules() if isinstance(m, nn.Conv2d)):
        conv.stride = make()
    if make() == 1:  # PyTorch itself takes no int with a padding of two numbers
        for conv in (m for m in made.modules() if isinstance(m, nn.Conv2d)):
            conv.stride = (1, 1)
    assert made.train()(x).shape == (2, 16, 33, 33)
    expected = run_branches(lambda: made.eval()(x))
    assert rel_diff(made(x), expected) < 1e-12
    assert rel_diff(made.switch_to_deploy()(x), expected) < 1e-12


def test_fold_for_call_derived_class_with_the_same_forward_folds(fast_path_calls):
    """As `fully_shard` makes them."""

    class Derived(RepVGGBlock):
        pass

    class Scaled(RepVGGBlock):
        def run_branches(self, x):
            return 2 * super().run_branches(x)

    class Shifted(RepVGGBlock):
        def forward(self, x):
            return super().forward(x + 1)

    for kind in (Derived, Scaled, Shifted):
        to_device(kind(8, 8)).eval()(images(2, 33, in_chans=8))
    assert fast_path_calls == [True, False, False]
