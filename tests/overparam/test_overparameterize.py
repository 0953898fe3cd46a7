from __future__ import annotations

import copy
import dataclasses
import io
import logging
import subprocess
import sys

import pytest
import timm
import torch
from helpers import images, randomise, rel_diff
from timm.layers import BatchNormAct2d, Conv2dSame, StdConv2d, freeze_batch_norm_2d
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from repvgg_zoo import BLOCKS, FoldError, overparameterize, switch_to_deploy
from repvgg_zoo.blocks.block_types import BRANCH_TYPES
from repvgg_zoo.overparam.conv import NormTail, OverparameterizedConv2d
from repvgg_zoo.reparam.stale_optimizers import forget_replaced

F64 = torch.float64
PAIR_TYPES = [name for name in BLOCKS if not BRANCH_TYPES[name].is_kernel_type]


def shapes_net() -> nn.Module:
    """One convolution of each geometry that networks have, each with a norm of its own."""

    def pair(*args, conv=nn.Conv2d, norm=nn.BatchNorm2d, **kwargs) -> list[nn.Module]:
        layer = conv(*args, **kwargs)
        return [layer, norm(layer.out_channels, eps=1e-3)]

    return nn.Sequential(
        *pair(3, 8, 3, stride=2, padding=1, bias=False),
        *pair(8, 8, 5, padding=2, groups=8, bias=False, norm=BatchNormAct2d),
        *pair(8, 8, (1, 7), padding=(0, 3)),
        *pair(8, 12, 3, padding=2, dilation=2, groups=2, padding_mode='reflect'),
        *pair(12, 12, 3, padding=0, bias=False),
        *pair(12, 8, (5, 3), stride=(2, 1), padding=(1, 1), dilation=(1, 2)),
        *pair(8, 8, 3, stride=2, conv=Conv2dSame, bias=False),
        *pair(8, 8, 3, conv=Conv2dSame, bias=False),
        *pair(8, 8, 3, padding='same', padding_mode='circular'),
        nn.PReLU(8),
        nn.Conv2d(8, 4, 1),
    )


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return randomise(shapes_net().double(), px=32)


def train_two_steps(module: nn.Module, x: Tensor) -> None:
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        module(x).square().mean().backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1)  # large steps make networks that amplify rounding
        optimizer.step()
    module.eval()


def blocks_of(module: nn.Module) -> list[OverparameterizedConv2d]:
    return [m for m in module.modules() if isinstance(m, OverparameterizedConv2d)]


def _pickled(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.device
@pytest.mark.parametrize('block', BLOCKS)
def test_overparameterize_every_geometry_trains_and_folds_back_to_the_same_keys(net, block):
    x, plain = images(2, px=32, dtype=F64), copy.deepcopy(net)
    expected = net(x)
    assert overparameterize(net, block, sample=x) is net
    assert len(blocks_of(net)) == 9 - (block == 'acb')  # 1x7 has neither 1x1 nor 7x1 beside it
    assert rel_diff(net(x), expected) < 1e-12
    train_two_steps(net, x)
    trained = net(x)
    assert rel_diff(trained, expected) > 1e-3
    assert switch_to_deploy(net) is net
    assert rel_diff(net(x), trained) < 1e-12
    assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    assert list(net.state_dict()) == list(plain.state_dict())
    assert [type(m) for m in net.modules()] == [type(m) for m in plain.modules()]
    plain.load_state_dict(net.state_dict())
    assert rel_diff(plain(x), trained) < 1e-12


@pytest.mark.parametrize('block', ['acb', 'dbb', 'doconv', 'qarepvgg'])
def test_overparameterize_each_branch_learns_something_of_its_own(net, block):
    overparameterize(net, block)
    net.train()(images(2, px=32, dtype=F64)).square().mean().backward()
    gradients = {name: p.grad for name, p in net.named_parameters() if '.branches.' in f'.{name}'}
    silent = [name for name, grad in gradients.items() if grad is None or not grad.any()]
    assert not [name for name in silent if 'inner_bn' not in name and not name.endswith('bias')]


def test_overparameterize_norm_with_scale_zero_keeps_kernels_that_learn():
    torch.manual_seed(0)
    net = timm.create_model('resnet10t', num_classes=2).eval()  # its residual branches begin with a scale of 0
    assert not net.layer1[0].bn2.weight.any()
    x = images(2, px=32)
    expected = net(x)
    overparameterize(net, 'acb')
    block = net.layer1[0].conv2
    assert torch.allclose(net(x), expected, atol=1e-5)
    assert all(branch.conv.weight.abs().max() > 1e-3 for branch in block.branches.values())
    net.train()(x).sum().backward()
    assert all(branch.bn.weight.grad.abs().max() > 1e-6 for branch in block.branches.values())


@pytest.mark.parametrize('block', ['acb', 'doconv'])
def test_overparameterize_norm_that_is_removed_keeps_its_activation_and_keys(block):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), BatchNormAct2d(4, act_layer=nn.PReLU)).eval()
    keys = set(net.state_dict())
    x = images(1, px=8)
    expected = net(x)
    overparameterize(net, block)
    assert isinstance(net[1], NormTail if block == 'acb' else BatchNormAct2d)
    assert (net(x) < 0).any()
    assert torch.allclose(net(x), expected, atol=1e-6)
    assert '1.act.weight' in net.state_dict()
    switch_to_deploy(net)
    assert set(net.state_dict()) == keys


def test_switch_restored_norm_has_the_bias_and_nothing_else(net):
    overparameterize(net, 'acb', where='0')
    count = net[0].branches['kxk'].bn.num_batches_tracked
    count.fill_(7)
    switch_to_deploy(net)
    norm = net[1]
    assert torch.equal(norm.weight, torch.ones_like(norm.weight))
    assert torch.equal(norm.running_mean, torch.zeros_like(norm.weight))
    assert torch.equal(norm.running_var, torch.ones_like(norm.weight) - norm.eps)
    assert norm.num_batches_tracked == 7


def test_switch_own_norm_behind_a_sum_takes_the_bias_into_its_mean(net):
    mean = net[1].running_mean.clone()
    overparameterize(net, 'qarepvgg', where='0')
    with torch.no_grad():
        net[0].branches['kxk'].bn.bias += 1.0
    norm = net[1]
    switch_to_deploy(net)
    assert net[1] is norm
    assert torch.allclose(norm.running_mean, mean - 1.0)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_overparameterize_keeps_dtype_layout_mode_and_requires_grad(net, dtype):
    net.to(dtype).to(memory_format=torch.channels_last).train()
    net[0].weight.requires_grad_(False)
    net[9].requires_grad_(False)
    overparameterize(net, 'acb', sample=images(1, px=32, dtype=dtype))
    assert {p.dtype for p in net.parameters()} == {dtype}
    assert net[0].training
    assert not any(p.requires_grad for p in net[0].parameters() if p.ndim == 4)
    assert all(norm.weight.requires_grad for norm in net[0].branch_norms())
    assert net[8].branches['kxk'].conv.weight.is_contiguous(memory_format=torch.channels_last)
    switch_to_deploy(net)
    assert not net[0].weight.requires_grad
    assert net[8].weight.requires_grad
    assert net[1].weight.requires_grad
    assert not net[9].weight.requires_grad
    assert net[8].weight.is_contiguous(memory_format=torch.channels_last)
    assert net[0].training
    assert net[1].training
    assert {p.dtype for p in net.parameters()} == {dtype}


def test_overparameterize_norms_wider_than_kernels_stay_so(net):
    net.float()
    for layer in net:
        if isinstance(layer, nn.Conv2d):
            layer.bfloat16()
    dtypes = {key: value.dtype for key, value in net.state_dict().items()}
    made = OverparameterizedConv2d(net[0], net[1], 'dbb')
    made.put_in(net)
    made.release_original()
    assert {norm.weight.dtype for norm in made.branch_norms()} == {torch.float32}
    assert {p.dtype for p in made.parameters() if p.ndim == 4} == {torch.bfloat16}
    switch_to_deploy(net)
    assert {key: value.dtype for key, value in net.state_dict().items()} == dtypes


def test_overparameterize_where_takes_a_pattern_a_function_or_a_mapping(net):
    assert len(blocks_of(overparameterize(copy.deepcopy(net), where='[01]*'))) == 5
    assert len(blocks_of(overparameterize(copy.deepcopy(net), where=['0', '1?']))) == 5
    chosen = overparameterize(copy.deepcopy(net), where=lambda path, conv: conv.groups == conv.in_channels)
    assert [b.kernel_size for b in blocks_of(chosen)] == [(5, 5)]
    mixed = overparameterize(copy.deepcopy(net), where={'0': 'dbb', '2': 'doconv', '[0-4]': 'mobileone'})
    assert [b.block for b in blocks_of(mixed)] == ['dbb', 'doconv', 'mobileone']


def test_overparameterize_with_batches_sets_statistics_of_the_data(net):
    x = images(4, px=32, dtype=F64)
    expected = net(x)
    overparameterize(net, 'acb', batches=[x])
    assert rel_diff(net(x), expected) < 1e-12
    assert bool(net[0].branches['kxk'].bn.running_mean.any())


def test_overparameterize_module_can_be_copied_pickled_averaged_and_folded(net):
    x = images(2, px=32, dtype=F64)
    overparameterize(net, 'dbb')
    train_two_steps(net, x)
    expected = net(x)
    for twin in (copy.deepcopy(net), _pickled(net), torch.optim.swa_utils.AveragedModel(net).eval()):
        assert rel_diff(switch_to_deploy(twin)(x), expected) < 1e-12
    assert blocks_of(net)
    twin = overparameterize(shapes_net().double(), 'dbb').eval()
    twin.load_state_dict(net.state_dict())
    assert rel_diff(twin(x), expected) < 1e-12


def test_overparameterize_scripted_and_exported_give_equal_outputs(net):
    overparameterize(net, 'dbb')
    net.float()
    x = images(1, px=32)
    assert torch.allclose(torch.jit.script(net)(x), net(x), atol=1e-5)
    assert torch.allclose(torch.export.export(net, (x,)).module()(x), net(x), atol=1e-5)


def test_switch_that_does_not_verify_leaves_the_branches(net, monkeypatch):
    x = images(1, px=32, dtype=F64)
    overparameterize(net, 'acb')
    state, expected = net.state_dict(), net(x)
    from repvgg_zoo.overparam import conv

    real = conv.fold_exactly
    monkeypatch.setattr(conv, 'fold_exactly', lambda branches: (real(branches)[0] * 1.01, real(branches)[1]))
    with pytest.raises(FoldError, match='differs by'):
        switch_to_deploy(net, verify=x)
    assert list(net.state_dict()) == list(state)
    assert torch.equal(net(x), expected)
    assert blocks_of(net)


def test_switch_restores_the_network_around_blocks_of_its_own():
    net = timm.create_model('repvit_m0_9').eval()
    keys = list(net.state_dict())
    overparameterize(net, 'acb', where='stages.0.*')
    switch_to_deploy(net)
    assert list(net.state_dict()) == keys


def test_overparameterize_old_optimizer_raises(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    kernels = [net[0].weight]
    overparameterize(net, 'acb', where='0')
    with pytest.raises(RuntimeError, match='were replaced'):
        optimizer.step()
    forget_replaced(kernels)


class _Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.conv(x)))


class _Tied(_Shared):
    def __init__(self) -> None:
        super().__init__()
        self.other = self.conv

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class _ReadsKernel(_Shared):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.conv.weight.square().sum()


def _hooked() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    net[0].register_forward_hook(lambda *_: None)
    return net


def _pair(conv: nn.Module, norm: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(conv, nn.BatchNorm2d(4) if norm is None else norm)


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), 'no convolution with a kernel of more than one'),
        (lambda: nn.Sequential(nn.Linear(3, 4)), 'no convolution in Sequential'),
        (lambda: nn.Conv2d(3, 4, 3), 'put it into nn.Sequential'),
        (_Shared, 'called 2 times'),
        (_Tied, "shares its kernel with 'other'"),
        (_ReadsKernel, 'reads its kernel'),
        (_hooked, 'hooks or a parametrization'),
        (lambda: _pair(parametrizations.weight_norm(nn.Conv2d(3, 4, 3))), 'ParametrizedConv2d|parametrization'),
        (lambda: _pair(StdConv2d(3, 4, 3)), 'StdConv2d computes more than a convolution'),
        (lambda: _pair(nn.Conv2d(3, 4, 2)), 'a kernel of 2x2 has no centre'),
        (lambda: _pair(nn.Conv2d(3, 4, 3, padding=2)), 'does not centre'),
        (lambda: _pair(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)), 'no batch normalisation reads its output'),
        (lambda: _pair(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)), 'no affine parameters'),
        (lambda: torch.jit.script(_pair(nn.Conv2d(3, 4, 3))), 'before scripting'),
        (lambda: torch.fx.symbolic_trace(_pair(nn.Conv2d(3, 4, 3))), 'graph is fixed'),
        (lambda: torch.compile(_pair(nn.Conv2d(3, 4, 3))), 'then compile'),
        (lambda: nn.DataParallel(_pair(nn.Conv2d(3, 4, 3))), 'then wrap'),
        (lambda: timm.create_model('test_repvgg'), 'part of a block that has its own branches'),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(7, 2)), 'give an input that it takes by sample='),
    ],
)
def test_overparameterize_what_cannot_be_replaced_raises_and_changes_nothing(make, message):
    module = make()
    before = list(module.modules())
    with pytest.raises(ValueError, match=message):
        overparameterize(module, 'acb')
    assert list(module.modules()) == before


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(block='acbb'), "unknown block 'acbb'; did you mean 'acb'"),
        (dict(where='layer9.*'), r"that where='layer9\.\*' selects; there are 9, from '0' to '16'"),
        (dict(where={'0': 'acb', 'nothing': 'dbb'}), "that where='nothing' selects"),
        (dict(where={'0': 'nonsense'}), "unknown block 'nonsense'"),
        (dict(where='4'), "'4' stays: a kernel of one row or one column has no branches of 'acb'"),
        (dict(where=lambda path, conv: False), 'has no convolution that where='),
        (dict(where=[]), 'where= is empty'),
        (dict(where={'*': 'acb', '0': 'dbb'}), 'selected by an earlier pattern'),
        (dict(batches=[]), 'no images'),
        (dict(sample=torch.ones(1, 5, 8, 8)), 'give an input that it takes by sample='),
    ],
)
def test_overparameterize_bad_option_raises_and_changes_nothing(net, options, message):
    state, before = net.state_dict(), list(net.modules())
    with pytest.raises(ValueError, match=message):
        overparameterize(net, **options)
    assert list(net.modules()) == before
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize('where', [5, ['0', 3]])
def test_overparameterize_where_of_another_type_raises(net, where):
    with pytest.raises(TypeError, match='where='):
        overparameterize(net, where=where)


class _HoldsAList(_Shared):
    def __init__(self) -> None:
        super().__init__()
        self.layers = (self.conv, self.norm)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class _ReadsWeight(_Shared):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.to(self.conv.weight.dtype)))


@dataclasses.dataclass
class _Output:
    before: Tensor
    after: Tensor


class _ReturnsADataclass(_Shared):
    def forward(self, x: Tensor) -> _Output:
        y = self.conv(x)
        return _Output(y, self.norm(y))


class _ReturnsLabels(_Shared):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).argmax(1)


class _DropsBetween(_Shared):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout2d(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.drop(self.conv(x)))


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (_HoldsAList, "does not call what takes the place of 'conv'"),
        (_ReadsWeight, "does not run with branches .*no attribute 'weight'"),
        (_ReturnsADataclass, 'no batch normalisation reads its output'),
        (_ReturnsLabels, 'returns no floating-point tensors'),
        (_DropsBetween, 'no batch normalisation reads its output'),
    ],
)
def test_overparameterize_network_that_holds_or_reads_layers_elsewhere_raises(make, message):
    net = make()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        overparameterize(net, 'acb')
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    net(images(1, px=8))


def test_overparameterize_leaves_the_sample_as_it_is():
    class InPlace(_Shared):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x.mul_(2).sub_(1)))

    x = images(1, px=8)
    before = x.clone()
    net = overparameterize(InPlace(), 'acb', sample=x)
    switch_to_deploy(net, verify=x)
    assert torch.equal(x, before)


def test_overparameterize_norms_in_eval_mode_stay_so(net):
    net.train()
    net[1].eval()
    net[1].bias.requires_grad_(False)
    net[4].bias.requires_grad_(False)
    counts = {key: value.clone() for key, value in net.state_dict().items() if 'tracked' in key}
    flags = {key: p.requires_grad for key, p in net.named_parameters()}
    overparameterize(net, 'repvgg')
    assert not any(norm.training for norm in net[0].branch_norms())
    assert all(norm.training for norm in net[2].branch_norms())
    switch_to_deploy(net)
    assert not net[1].training
    assert net[3].training
    assert {key: p.requires_grad for key, p in net.named_parameters()} == flags
    assert all(torch.equal(net.state_dict()[key], value) for key, value in counts.items())


def test_switch_activation_that_was_replaced_stays():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).eval()
    overparameterize(net, 'acb')
    net[1].act = nn.Tanh()
    seen = []
    net[1].register_forward_hook(lambda *_: seen.append(1))
    x = images(1, px=8)
    expected = net(x)
    switch_to_deploy(net)
    assert torch.allclose(net(x), expected, atol=1e-6)
    assert len(seen) == 2
    overparameterize(net, 'acb', where='2')
    net[3].act = nn.Tanh()
    with pytest.raises(FoldError, match='for which BatchNorm2d has no place'):
        switch_to_deploy(net)


@pytest.mark.parametrize('change', ['hook', 'forward'])
def test_switch_branch_sum_that_computes_more_raises(net, change):
    overparameterize(net, 'acb')
    if change == 'hook':
        net[0].register_forward_hook(lambda module, args, output: 2 * output)
    else:
        net[0].forward = lambda x: 2 * OverparameterizedConv2d.forward(net[0], x)
    with pytest.raises(FoldError, match='it or its branches have hooks, another forward'):
        switch_to_deploy(net)


def test_overparameterize_outputs_that_would_change_raise_and_change_nothing(net, monkeypatch):
    before = list(net.modules())
    monkeypatch.setattr(OverparameterizedConv2d, '_set_kernel', lambda *_, **__: None)
    with pytest.raises(ValueError, match='network with branches differs by'):
        overparameterize(net, 'acb')
    assert list(net.modules()) == before


def test_overparameterize_what_stays_is_logged(net, caplog):
    with caplog.at_level(logging.INFO, logger='repvgg_zoo'):
        overparameterize(net, 'acb')
    assert '4 stays as it is: a kernel of one row' in caplog.text
    assert '8 of 9 convolutions of Sequential have branches' in caplog.text


def test_switch_branches_that_were_changed_raise(net):
    overparameterize(net, 'acb')
    net[0].branches['kxk'].conv.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(FoldError, match="cannot fold block '0': it or its branches have hooks"):
        switch_to_deploy(net)
    assert blocks_of(net)


def test_switch_norm_behind_a_sum_that_was_replaced_raises(net):
    overparameterize(net, 'qarepvgg')
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    with pytest.raises(FoldError, match='BatchNorm2d behind it has lost its place'):
        switch_to_deploy(synchronised)
    assert blocks_of(synchronised)


@pytest.mark.parametrize('convert', [nn.SyncBatchNorm.convert_sync_batchnorm, freeze_batch_norm_2d])
def test_switch_branches_whose_norms_were_converted_fold(net, convert):
    x, keys = images(1, px=32, dtype=F64), list(net.state_dict())
    overparameterize(net, 'repvgg')  # of which every norm is one
    converted = convert(net).eval()
    expected = converted(x)
    switch_to_deploy(converted)
    assert rel_diff(converted(x), expected) < 1e-12
    assert list(converted.state_dict()) == keys


def test_switch_branch_sum_at_the_root_raises():
    net = overparameterize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), 'doconv')
    with pytest.raises(FoldError, match='wrap it'):
        switch_to_deploy(net[0])


def test_overparameterize_several_inputs_by_sample():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))

        def forward(self, pixels: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
            return {'features': self.body(pixels) * scale}

    sample = {'pixels': images(1, px=8), 'scale': torch.tensor(2.0)}
    net = overparameterize(Scaled(), 'dbb', sample=sample)
    assert len(blocks_of(net)) == 1
    switch_to_deploy(net.eval(), verify=sample)
    assert not blocks_of(net)


def torchvision_resnet() -> nn.Module:
    return pytest.importorskip('torchvision').models.resnet18(num_classes=3)


def segmentation_network() -> nn.Module:
    return pytest.importorskip('segmentation_models_pytorch').Unet('resnet18', encoder_weights=None, classes=2)


@pytest.mark.parametrize(('make', 'convs'), [(torchvision_resnet, 17), (segmentation_network, 27)])
def test_overparameterize_downstream_network_folds_into_a_new_one(make, convs):
    net, x = make(), images(2, px=64)
    overparameterize(net, 'acb')
    assert len(blocks_of(net)) == convs
    train_two_steps(net, x)
    expected = net(x)
    switch_to_deploy(net)
    fresh = make().eval()
    fresh.load_state_dict(net.state_dict())
    assert rel_diff(fresh(x), expected) < 1e-5  # float32


FAMILIES = [
    'resnet10t', 'resnext26ts', 'seresnet18', 'resnest14d', 'res2net50_26w_4s',
    'regnety_002', 'mobilenetv3_small_050', 'efficientnet_lite0', 'tf_efficientnet_b0', 'mnasnet_small',
    'fbnetc_100', 'ghostnet_050', 'hardcorenas_a', 'densenet121', 'inception_v3',
    'vgg11_bn', 'dla46_c', 'hrnet_w18_small', 'cspresnet50', 'darknet17',
    'ese_vovnet19b_dw', 'selecsls42b', 'xception41p', 'lcnet_050', 'rexnet_100',
    'repvit_m0_9', 'edgenext_xx_small', 'mobilevit_xxs', 'pit_ti_224', 'levit_128s',
]  # fmt: skip


SMALLER = {'vgg11_bn': dict(mlp_ratio=1 / 64)}  # its classifier holds 120 million numbers


def _outputs_in_plain_timm(name: str, blocks: list[str], x: Tensor, folder) -> list[Tensor]:
    """Load state dicts strictly into timm's own network, in a process without this package."""
    torch.save(x, folder / 'x.pt')
    script = (
        'import sys, timm, torch\n'
        "x = torch.load('x.pt')\n"
        'outputs = []\n'
        f'for block in {blocks}:\n'
        f"    model = timm.create_model('{name}', num_classes=5, **{SMALLER.get(name, {})}).double().eval()\n"
        "    model.load_state_dict(torch.load(f'{block}.pt'))\n"
        '    outputs.append(model(x).detach())\n'
        "torch.save(outputs, 'outputs.pt')\n"
        "assert not any(name.startswith('repvgg_zoo') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, '-c', script], cwd=folder, check=True)
    return torch.load(folder / 'outputs.pt')


@pytest.mark.parametrize(
    ('name', 'blocks'),
    [
        ('test_resnet', ['dbb', 'doconv']),
        ('test_efficientnet', ['acb', 'qarepvgg']),
        *(pytest.param(name, BLOCKS, marks=pytest.mark.exhaustive) for name in FAMILIES),
    ],
)
def test_overparameterize_timm_network_trained_loads_in_plain_timm(name, blocks, tmp_path):
    torch.manual_seed(0)
    px = {'pit_ti_224': 224, 'levit_128s': 224, 'inception_v3': 75}.get(name, 64)
    plain = randomise(timm.create_model(name, num_classes=5, **SMALLER.get(name, {})).double(), px=px)
    x = images(2, px=px, dtype=F64)
    with torch.no_grad():  # LeViT keeps what it computes
        expected = plain(x)
    shapes = {key: value.shape for key, value in plain.state_dict().items()}
    outputs, refused = {}, []
    for block in blocks:
        # the kernels of `expand` are made of some 80 times as many numbers
        small = (lambda path, conv: conv.weight.numel() < 40_000) if block == 'expand' else None
        net = copy.deepcopy(plain)
        try:
            overparameterize(net, block, sample=x, where=small)
        except ValueError as error:
            assert block in PAIR_TYPES
            refused.append(f'{block}: {error}')
            continue
        assert rel_diff(net(x), expected) < 1e-9
        train_two_steps(net, x)
        trained = net(x)
        assert rel_diff(trained, expected) > 1e-6
        switch_to_deploy(net)
        assert rel_diff(net(x), trained) < 1e-9
        assert {key: value.shape for key, value in net.state_dict().items()} == shapes
        torch.save(net.state_dict(), tmp_path / f'{block}.pt')
        outputs[block] = trained.detach()
        del net, trained
    assert len(outputs) >= len(set(blocks) - set(PAIR_TYPES)), refused
    loaded = _outputs_in_plain_timm(name, list(outputs), x, tmp_path)
    assert all(rel_diff(actual, trained) < 1e-9 for actual, trained in zip(loaded, outputs.values(), strict=True))
