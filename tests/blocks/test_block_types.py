"""Every block type: its fold, its keys and kernels, training and export."""

from __future__ import annotations

import copy
import threading
from functools import partial

import pytest
import timm
import torch
import torch.nn.utils.parametrizations
import torch.nn.utils.parametrize
import torch.nn.utils.prune
from helpers import CONFIGURATIONS, block_params, create_model, images, randomise, rel_diff, to_device
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import LayerNorm2d, SEModule, convert_splitbn_model
from torch import nn
from torch.nn.utils import weight_norm

import repvgg_zoo
from repvgg_zoo import BLOCKS, CheckpointError, FoldError, load_checkpoint
from repvgg_zoo.blocks import branches
from repvgg_zoo.blocks.block_types import BLOCK_TYPES
from repvgg_zoo.blocks.branches import AvgPoolBranch, PointConvBranch
from repvgg_zoo.blocks.factory import block_type, blocks_with_keys
from repvgg_zoo.blocks.multi_branch import MultiBranchBlock
from repvgg_zoo.tools.convert import convert, open_model
from repvgg_zoo.tools.model_folder import save_model
from repvgg_zoo.tools.verify import verify

pytestmark = pytest.mark.device
F64 = torch.float64
BLOCK = pytest.mark.parametrize('name', block_params(BLOCK_TYPES))
EXACT = 1e-12
"""Some hundred terms, each rounded a few times in float64."""


def block(name: str, in_chs: int = 8, out_chs: int = 8, **kwargs) -> MultiBranchBlock:
    made = to_device(block_type(name)(in_chs, out_chs, **kwargs).double())
    scatter(made)
    return randomise(made, px=11, in_chans=in_chs)


@torch.no_grad()
def scatter(module: nn.Module) -> None:
    """Give parameters that are the same for all channels at first, or zero, values of their own."""
    for name, parameter in module.named_parameters():
        if name.rpartition('.')[2] in ('a', 'b', 'scale', 'delta', 'depthwise'):
            parameter += 0.3 * torch.randn_like(parameter)


# ------------------------------------------------------------------------------------------------- the fold


@BLOCK
@pytest.mark.parametrize('kwargs', CONFIGURATIONS, ids=str)
def test_switch_each_block_type_keeps_the_outputs(name, kwargs):
    module, x = block(name, **kwargs), images(px=10, in_chans=8, dtype=F64)
    before = module(x)
    keys = {key for key in module.state_dict() if not key.startswith('attn')}
    assert module.switch_to_deploy() is module
    assert rel_diff(module(x), before) < EXACT
    assert {key for key in module.state_dict() if not key.startswith('attn')} == {
        'reparam_conv.weight',
        'reparam_conv.bias',
    }
    assert not keys & module.state_dict().keys()


@BLOCK
def test_switch_more_or_fewer_channels_keeps_the_outputs(name):
    for in_chs, out_chs in ((4, 12), (12, 4), (3, 8)):
        module, x = block(name, in_chs, out_chs, stride=2), images(px=9, in_chans=in_chs, dtype=F64)
        module.act = nn.Identity()
        before = module(x)
        assert rel_diff(module.switch_to_deploy()(x), before) < EXACT


@given(
    name=st.sampled_from(list(BLOCK_TYPES)),
    groups=st.sampled_from([1, 2, 3]),
    ins=st.integers(1, 4),
    outs=st.integers(1, 4),
    stride=st.sampled_from([1, 2]),
    dilation=st.integers(1, 3),
    padding_mode=st.sampled_from(['zeros', 'reflect', 'replicate', 'circular']),
    affine=st.booleans(),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    seed=st.integers(0, 2**32 - 1),
    px=st.integers(4, 9),
)
def test_fold_random_shapes_is_exact(name, groups, ins, outs, stride, dilation, padding_mode, affine, layout, seed, px):
    torch.manual_seed(seed)
    module = block_type(name)(
        groups * ins,
        groups * outs,
        stride=stride,
        dilation=dilation,
        groups=groups,
        padding_mode=padding_mode,
        norm_layer=lambda chs, **dd: nn.BatchNorm2d(chs, eps=1e-3, affine=affine, **dd),
    ).double()
    to_device(module)
    scatter(module)
    with torch.no_grad():
        for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0, 4)
            if affine:
                norm.weight.normal_()
                norm.bias.normal_()
    module.act = nn.Identity()
    module.to(memory_format=layout).eval()
    x = to_device(torch.randn(2, groups * ins, px, px, dtype=F64))
    with torch.no_grad():
        before = module(x)
        kernel, bias = module.equivalent_kernel_bias()
        after = module.switch_to_deploy()(x)
    # statistics near zero make terms thirty times as large, which may cancel
    assert ((after - before).abs() <= 1e-9 * (1 + before.abs())).all()
    assert torch.equal(kernel, module.reparam_conv.weight)
    assert torch.equal(bias, module.reparam_conv.bias)


@BLOCK
def test_fold_half_precision_is_rounded_once_at_the_end(name):
    module = block(name).to(torch.bfloat16)
    exact = copy.deepcopy(module).double().switch_to_deploy().reparam_conv
    folded = module.switch_to_deploy().reparam_conv
    assert folded.weight.dtype == torch.bfloat16
    assert torch.equal(folded.weight, exact.weight.to(torch.bfloat16))
    assert torch.equal(folded.bias, exact.bias.to(torch.bfloat16))


@BLOCK
def test_switch_frozen_channels_last_block_keeps_both(name):
    module = block(name).to(memory_format=torch.channels_last).train()
    module.requires_grad_(False)
    conv = module.switch_to_deploy().reparam_conv
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not conv.weight.requires_grad
    assert not conv.bias.requires_grad
    assert conv.training
    assert [module.branches, module.identity, module.norm] == [None] * 3


@BLOCK
def test_switch_block_with_lock_and_hook_folds_without_copying_them(name):
    """Locks cannot be copied, nor can tensors with a graph."""
    module, x = block(name), images(2, 8, in_chans=8, dtype=F64)
    module.lock, module.seen = threading.Lock(), []
    module.register_forward_hook(lambda self, _, y: self.seen.append(y))
    before = module(x)
    kernels = {key: value.clone() for key, value in module.state_dict().items()}
    module.folded_conv()
    assert all(torch.equal(value, kernels[key]) for key, value in module.state_dict().items())
    assert rel_diff(module.switch_to_deploy()(x), before) < EXACT
    assert len(module.seen) == 2


@pytest.mark.parametrize(
    'norm', [torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.parametrizations.spectral_norm]
)
def test_switch_parametrized_kernel_keeps_the_outputs(norm):
    module, x = block('acb'), images(2, 8, in_chans=8, dtype=F64)
    norm(module.branches['kxk'].conv)
    module.eval()
    before = module(x)
    assert rel_diff(module.switch_to_deploy()(x), before) < EXACT


class Turned(nn.Module):
    """Parametrizes a kernel by a matrix that is neither moved nor converted with the module."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.matrix = [to_device(torch.eye(8, dtype=dtype).flip(0))]

    def forward(self, kernel: torch.Tensor) -> torch.Tensor:
        return (self.matrix[0] @ kernel.flatten(1)).view_as(kernel)


def test_switch_parametrization_with_own_tensors_keeps_the_outputs():
    module, x = block('acb'), images(2, 8, in_chans=8, dtype=F64)
    torch.nn.utils.parametrize.register_parametrization(module.branches['kxk'].conv, 'weight', Turned(F64))
    before = module(x)
    assert rel_diff(module.switch_to_deploy()(x), before) < EXACT


def test_switch_float32_parametrization_is_computed_in_float32():
    made = block('acb').float()
    torch.nn.utils.parametrize.register_parametrization(made.branches['kxk'].conv, 'weight', Turned(torch.float32))
    x = images(2, 8, in_chans=8)
    before = made(x)
    assert rel_diff(made.switch_to_deploy()(x), before) < 1e-5  # float32


@pytest.mark.parametrize('name', block_params(BLOCKS))
@pytest.mark.parametrize('norm', [torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.spectral_norm])
def test_switch_computed_kernels_gives_a_trainable_convolution(name, norm):
    made = to_device(block_type(name)(4, 4)).eval()
    convs = [m for m in made.modules() if isinstance(m, nn.Conv2d)]
    for conv in convs:
        norm(conv)
    with torch.no_grad():
        conv = made.switch_to_deploy().reparam_conv
    assert conv.weight.requires_grad
    assert conv.bias.requires_grad


@pytest.mark.parametrize('name', block_params(BLOCKS))
@pytest.mark.parametrize('trainable', ['kernels', 'statistics'])
def test_switch_frozen_kernels_gives_a_frozen_convolution(name, trainable):
    module = to_device(block_type(name)(4, 4))
    for parameter in module.parameters():
        parameter.requires_grad_((parameter.ndim > 2) == (trainable == 'kernels'))
    conv = module.eval().switch_to_deploy().reparam_conv
    assert conv.weight.requires_grad == conv.bias.requires_grad == (trainable == 'kernels')


def test_switch_partly_frozen_block_gives_a_trainable_convolution():
    module = block('acb')
    module.branches['kx1'].requires_grad_(False)
    assert module.switch_to_deploy().reparam_conv.weight.requires_grad


@pytest.mark.parametrize('name', block_params(BLOCKS))
def test_fold_split_batch_norm_uses_its_first_part(name):
    torch.manual_seed(0)
    model = convert_splitbn_model(create_model('test_repvgg', block=name, num_classes=3), 2)
    model(images(8, px=32))
    x, deploy = images(px=32), create_model('test_repvgg', block=name, num_classes=3, deploy=True).eval()
    expected = model.eval()(x)
    assert name in blocks_with_keys(model.state_dict())
    deploy.load_state_dict(model.state_dict())
    # float32, ten blocks deep; with the statistics of the second part, outputs are 1 to 15 % off
    assert rel_diff(deploy(x), expected) < 1e-4
    assert rel_diff(model.switch_to_deploy()(x), expected) < 1e-4


@pytest.mark.cpu
@BLOCK
def test_switch_blocks_in_a_graph_raises(name):
    model, x = create_model('test_repvgg', block=name).eval(), images(1, 32)
    live = create_model('test_repvgg', block=name)
    for graph in (torch.jit.trace(model, x), torch.export.export(model, (x,)).module()):
        both = nn.ModuleDict({'live': live, 'graph': graph})
        with pytest.raises(ValueError, match=r'graph is a \w+, whose branches are fixed'):
            repvgg_zoo.switch_to_deploy(both)
        assert not live.deploy


@pytest.mark.cpu
def test_switch_foreign_branches_in_a_graph_folds_the_rest():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.branches = nn.ModuleList([nn.Conv2d(3, 3, 1)])

        def forward(self, x):
            return self.branches[0](x)

    both = nn.ModuleDict({'live': block('acb'), 'graph': torch.jit.trace(Branches(), images(1, 8))})
    assert repvgg_zoo.switch_to_deploy(both)['live'].reparam_conv is not None


@pytest.mark.parametrize('name', block_params(BLOCKS))
def test_equivalent_kernel_under_autocast_is_not_rounded(name, device):
    made = to_device(block_type(name)(8, 8)).eval()
    exact = copy.deepcopy(made).double().equivalent_kernel_bias()[0]
    with torch.autocast(device.type, torch.bfloat16):
        kernel = made.equivalent_kernel_bias()[0]
    assert rel_diff(kernel, exact) < 1e-6  # a few roundings in float32, where bfloat16 has 4e-3


def test_dirac_kernel_row_of_zeros_in_half_precision_is_finite():
    made = to_device(block_type('dirac')(4, 4).to(torch.float16))
    with torch.no_grad():
        made.branches['dirac'].conv.weight[1] = 0
    assert made.equivalent_kernel_bias()[0].isfinite().all()


@pytest.mark.cpu
def test_dbb_norm_without_running_statistics_raises():
    with pytest.raises(ValueError, match='track_running_stats=True'):
        block_type('dbb')(4, 4, norm_layer=partial(nn.BatchNorm2d, track_running_stats=False))
    with pytest.raises(ValueError, match='track_running_stats=True'):
        block_type('dbb')(4, 4, norm_layer=LayerNorm2d)


@BLOCK
def test_switch_negative_variance_raises_and_changes_nothing(name):
    good, bad = block(name), block(name)
    for norm in (m for m in bad.modules() if isinstance(m, nn.BatchNorm2d)):
        variance = norm.running_var[3].item()
        norm.running_var[3] = -1
        with pytest.raises(FoldError, match=r"cannot fold block '1'.*running variance -1.* channel 3"):
            repvgg_zoo.switch_to_deploy(nn.Sequential(good, bad))
        assert good.reparam_conv is None
        assert bad.reparam_conv is None
        norm.running_var[3] = variance


def dilate(conv: nn.Conv2d) -> None:
    conv.padding, conv.dilation = (2, 0), (2, 2)


def wrap_around(conv: nn.Conv2d) -> None:
    conv.padding_mode = 'circular'


def group(conv: nn.Conv2d) -> None:
    conv.groups, conv.weight = 2, nn.Parameter(conv.weight[:, :4])


def stride(conv: nn.Conv2d) -> None:
    conv.stride = (2, 2)


def leave_three_channels(conv: nn.Conv2d) -> None:
    conv.weight = nn.Parameter(conv.weight[:3])


def shift(conv: nn.Conv2d) -> None:
    conv.padding = (0, 0)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dilate, 'the dilation_rows of kxk is 1, that of kx1 is 2'),
        (wrap_around, 'the padding_mode of kxk is zeros, that of kx1 is circular'),
        (group, 'the groups of kxk is 1, that of kx1 is 2'),
        (stride, r'the stride of kxk is \(1, 1\), that of kx1 is \(2, 2\)'),
        (leave_three_channels, 'the out_chs of kxk is 8, that of kx1 is 3'),
        (shift, r'the inset of kxk is \(0, 0\), that of kx1 is \(1, 0\)'),
    ],
)
def test_fold_one_convolution_changed_raises(change, message):
    good, bad = block('acb'), block('acb')
    change(bad.branches['kx1'].conv)
    with pytest.raises(FoldError, match=message):
        repvgg_zoo.switch_to_deploy(nn.Sequential(good, bad))
    assert good.reparam_conv is None
    assert bad.reparam_conv is None


def test_fold_convolution_with_bias_keeps_the_outputs():
    made, x = block('acb'), images(2, 8, in_chans=8, dtype=F64)
    made.branches['kx1'].conv.bias = nn.Parameter(to_device(torch.arange(8, dtype=F64)))
    before = made(x)
    assert rel_diff(made.switch_to_deploy()(x), before) < EXACT


@pytest.mark.parametrize('name', block_params(BLOCKS))
@pytest.mark.parametrize('px', [8, 9])
def test_switch_strides_set_by_hand_keeps_the_outputs(name, px):
    """All convolutions alike, as segmentation recipes do it."""
    made, x = block(name, stride=2), images(2, px, in_chans=8, dtype=F64)
    for conv in (m for m in made.modules() if isinstance(m, nn.Conv2d)):
        conv.stride = (1, 1)
    before = made(x)
    assert before.shape[2:] == made.train()(x).shape[2:] == (px, px)
    made.eval()
    before = made(x)
    assert rel_diff(made.switch_to_deploy()(x), before) < EXACT


def test_switch_replaced_convolution_raises_with_its_class():
    module = block('plain')
    module.branches['kxk'].conv = nn.Sequential(module.branches['kxk'].conv)
    with pytest.raises(FoldError, match=r'in its kxk, its convolution is a torch\.nn\.modules\.container\.Sequential'):
        module.switch_to_deploy()


@pytest.mark.parametrize('branch', [PointConvBranch, AvgPoolBranch])
def test_chain_padded_border_equals_its_folded_kernel(branch):
    """With a shift between its two convolutions, padding with zeros in the middle is another function."""
    torch.manual_seed(0)
    module = block('dbb')
    chain = next(m for m in module.modules() if isinstance(m, branch))
    assert chain._image_of_zero().abs().min() > 1e-3
    x = images(px=7, in_chans=8, dtype=F64)
    kernel, bias = chain.equivalent_kernel_bias(F64)
    assert rel_diff(torch.nn.functional.conv2d(x, kernel, bias, padding=1), chain(x)) < EXACT


def test_expand_kernel_equals_its_chain():
    made = block('expand').branches['expand']
    x = images(px=7, in_chans=8, dtype=F64)
    conv = torch.nn.functional.conv2d
    chain = conv(conv(conv(x, made.first), made.conv.weight, padding=1), made.last)
    assert rel_diff(conv(x, made.kernel(F64), padding=1), chain) < EXACT


def test_dirac_kernel_equals_the_formula_of_its_paper():
    made = block('dirac', 4, 4).branches['dirac']
    for out in range(4):
        expected = made.b[out] * made.conv.weight[out] / made.conv.weight[out].norm()
        expected[out, 1, 1] += made.a[out]
        assert rel_diff(made.kernel(F64)[out], expected) < EXACT


def test_doconv_kernel_equals_the_formula_of_its_paper():
    made = block('doconv', 4, 6).branches['doconv']
    for out, into in ((0, 0), (5, 3)):
        d = to_device(torch.eye(9, dtype=F64)) + made.depthwise[into]
        assert rel_diff(made.kernel(F64)[out, into].flatten(), d @ made.conv.weight[out, into].flatten()) < EXACT


def test_plain_delta_new_kernel_is_orthogonal_in_its_centre():
    conv = to_device(block_type('plain_delta')(8, 8)).branches['kxk'].conv
    kernel = conv.weight.detach()
    assert torch.count_nonzero(kernel) == torch.count_nonzero(kernel[:, :, 1, 1])
    assert torch.allclose(kernel[:, :, 1, 1] @ kernel[:, :, 1, 1].T, to_device(torch.eye(8)), atol=1e-5)


# --------------------------------------------------------------------------------------------- public kernels


@pytest.mark.parametrize('name', block_params(BLOCKS))
def test_equivalent_kernel_each_block_type_passes_gradcheck(name):
    module = to_device(block_type(name)(2, 2).double()).eval()
    scatter(module)
    parameters = {f'block.{key}': parameter for key, parameter in module.named_parameters()}

    def kernel_and_bias(*values):
        return torch.func.functional_call(_Kernel(module), dict(zip(parameters, values, strict=True)), ())

    assert torch.autograd.gradcheck(kernel_and_bias, tuple(parameters.values()))


class _Kernel(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self):
        return self.block.equivalent_kernel_bias()


@pytest.mark.parametrize('name', block_params(BLOCKS))
def test_equivalent_kernel_after_switch_is_the_same(name):
    model = randomise(create_model('test_repvgg', block=name).double(), px=32)
    block = model.stages[0][1]
    kernel, bias = block.equivalent_kernel_bias()
    assert kernel.requires_grad
    model.switch_to_deploy()
    assert rel_diff(block.equivalent_kernel_bias()[0], kernel) < EXACT
    assert rel_diff(block.equivalent_kernel_bias()[1], bias) < EXACT


# --------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize('name', block_params(BLOCKS))
def test_load_checkpoint_each_block_type_fits_both_forms(name, tmp_path):
    model = randomise(create_model('test_repvgg', block=name, num_classes=10).double(), px=32)
    x = images(2, 32, dtype=F64)
    expected = model(x)
    torch.save(model.state_dict(), tmp_path / 'training.pth')
    deployed = create_model('test_repvgg', block=name, num_classes=10, deploy=True).double().eval()
    load_checkpoint(deployed, tmp_path / 'training.pth')
    assert rel_diff(deployed(x), expected) < 1e-9
    again = create_model('test_repvgg', block=name, num_classes=10).double().eval()
    load_checkpoint(again, tmp_path / 'training.pth')
    assert torch.equal(again(x), expected)
    assert model.switch_to_deploy(verify=x).deploy
    assert rel_diff(model(x), expected) < 1e-9
    plain = create_model('test_repvgg', num_classes=10, deploy=True)
    assert model.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.cpu
@BLOCK
def test_save_model_each_block_type_loads_as_that_block(name, tmp_path):
    from repvgg_zoo.tools.model_folder import save_model

    model = randomise(create_model('test_repvgg', block=name, num_classes=10), px=32)
    (tmp_path / 'model').mkdir()
    save_model(model, tmp_path / 'model')
    loaded = create_model(f'local-dir:{tmp_path / "model"}', pretrained=True).eval()
    assert loaded.stem.block == name
    assert torch.equal(loaded(images(1, 32)), model(images(1, 32)))


@BLOCK
def test_switch_dilation_drop_path_or_one_channel_keeps_the_outputs(name):
    """Dilation, stochastic depth and other input channels of the whole network fold too."""
    for variant, kwargs in (
        ('test_repvgg', dict(output_stride=8, drop_path_rate=0.1)),
        ('test_repvgg', dict(in_chans=1)),
    ):
        model = create_model(variant, block=name, num_classes=3, **kwargs)
        x = images(1, 32, in_chans=kwargs.get('in_chans', 3))
        randomise(model, px=32, in_chans=kwargs.get('in_chans', 3))
        with torch.no_grad():
            before = model(x)
            assert rel_diff(model.switch_to_deploy()(x), before) < 1e-3  # float32 over some twenty layers


@BLOCK
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=['contiguous', 'channels_last'])
def test_model_each_block_type_lowers_the_loss(name, layout):
    torch.manual_seed(0)
    model = create_model('test_repvgg', block=name, num_classes=4).to(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, labels = images(16, 32).to(memory_format=layout), to_device(torch.arange(16) % 4)
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.cpu
@BLOCK
def test_block_scripted_traced_or_exported_keeps_the_outputs(name):
    module, x = block(name).float(), images(2, 12, in_chans=8)
    expected = module(x)
    assert torch.allclose(torch.jit.script(module)(x), expected, atol=1e-5)
    assert torch.allclose(torch.jit.trace(module, x)(x), expected, atol=1e-5)
    shapes = {0: torch.export.Dim('n'), 2: torch.export.Dim('h', min=4), 3: torch.export.Dim('w', min=4)}
    exported = torch.export.export(module, (x,), dynamic_shapes=(shapes,)).module()
    assert torch.allclose(exported(images(3, 9, in_chans=8)), module(images(3, 9, in_chans=8)), atol=1e-5)


@pytest.mark.cpu
def test_block_type_unknown_name_raises_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown block 'qarepvg'; did you mean 'qarepvgg'\? it can be: repvgg, "):
        create_model('test_repvgg', block='qarepvg')


@pytest.mark.cpu
def test_block_type_by_default_is_repvgg_block():
    assert type(create_model('test_repvgg', block='repvgg').stem) is repvgg_zoo.RepVGGBlock
    assert type(create_model('test_repvgg').stem) is repvgg_zoo.RepVGGBlock


@pytest.mark.cpu
def test_load_state_dict_weights_of_another_block_raises():
    state_dict = create_model('test_repvgg', block='acb').state_dict()
    with pytest.raises(CheckpointError, match="block 'stem': no dbb block"):
        create_model('test_repvgg', block='dbb', deploy=True).load_state_dict(state_dict)


@pytest.mark.cpu
@pytest.mark.parametrize(
    'damage', [lambda kernel: None, lambda kernel: kernel[:, :3]], ids=['missing', 'fewer channels']
)
@pytest.mark.parametrize('path', ['stem', 'stages.1.1'])
def test_load_state_dict_damaged_branches_raises(path, damage):
    state_dict = create_model('test_repvgg', block='plain').state_dict()
    key = f'{path}.branches.kxk.conv.weight'
    state_dict[key] = damage(state_dict[key])
    if state_dict[key] is None:
        del state_dict[key]
    elif path == 'stem':
        state_dict[key] = state_dict[key][:5]
    with pytest.raises(CheckpointError, match=f"block '{path}': no plain block"):
        create_model('test_repvgg', block='plain', deploy=True).load_state_dict(state_dict)


@pytest.mark.cpu
def test_first_conv_after_switch_and_unfold_is_updated():
    model = create_model('test_repvgg', block='acb')
    assert model.pretrained_cfg['first_conv'] == tuple(f'stem.branches.{name}.conv' for name in ('kxk', 'kx1', '1xk'))
    model.switch_to_deploy()
    assert model.pretrained_cfg['first_conv'] == 'stem.reparam_conv'
    repvgg_zoo.unfold(model, block='repvgg')
    assert model.pretrained_cfg['first_conv'] == ('stem.conv_kxk.conv', 'stem.conv_1x1.conv')
    assert 'block' not in model._model_args  # timm's own RepVGG builds it too
    assert create_model('test_repvgg', block='dirac').pretrained_cfg['first_conv'] is None


@BLOCK
def test_block_drop_path_or_drop_block_spares_the_identity(name):
    class Nothing(nn.Module):
        def forward(self, x):
            return torch.zeros_like(x)

    module, x = block(name, drop_block=Nothing), images(2, 8, in_chans=8, dtype=F64)
    module.act = nn.Identity()
    identity = torch.zeros_like(x) if module.identity is None else module.identity(x)
    assert torch.equal(module(x), identity if module.norm is None else module.norm(identity))
    module = block_type(name)(8, 8, drop_path_rate=0.5)
    assert isinstance(module.drop_path, nn.Identity) == (module.identity is None)
    module.switch_to_deploy()
    assert to_device(block_type(name)(8, 8, drop_path_rate=0.5, drop_block=Nothing, deploy=True))(x.float()).any()


STRUCTURE = {
    'plain': [((3, 3), True)],
    'plain_delta': [((3, 3), True)],
    'acb': [((3, 3), True), ((3, 1), True), ((1, 3), True)],
    'mobileone': [((3, 3), True)] * 4 + [((1, 1), True), ('identity', True)],
    'qarepvgg': [((3, 3), True), ((1, 1), False), ('identity', False), 'norm after'],
    'no_identity': [((3, 3), True), ((1, 1), True)],
    'no_1x1': [((3, 3), True), ('identity', True)],
    'no_identity_bn': [((3, 3), True), ((1, 1), True), ('identity', False)],
    'bn_after': [((3, 3), False), ((1, 1), False), ('identity', False), 'norm after'],
}


@pytest.mark.cpu
@pytest.mark.parametrize('name', STRUCTURE)
def test_block_type_branches_match_the_paper(name):
    module = block_type(name)(4, 4)
    found = [(branch.conv.kernel_size, branch.bn is not None) for branch in module.branches.values()]
    if module.identity is not None:
        found.append(('identity', module.identity.bn is not None))
    if module.norm is not None:
        found.append('norm after')
    assert found == STRUCTURE[name]
    assert block_type(name)(4, 4, stride=2).identity is None
    assert block_type(name)(4, 8).identity is None


@pytest.mark.cpu
def test_block_type_new_parts_have_the_expected_values():
    dbb = block_type('dbb')(4, 4)
    assert list(dbb.branches) == ['kxk', '1x1', '1x1_kxk', '1x1_avg']
    assert not dbb.branches['1x1_kxk'].delta.any()
    dirac = block_type('dirac')(4, 4).branches['dirac']
    assert dirac.a.tolist() == [1] * 4
    assert dirac.b.tolist() == pytest.approx([0.1] * 4)
    expand = block_type('expand')(4, 6).branches['expand']
    assert [tuple(w.shape) for w in (expand.first, expand.conv.weight, expand.last)] == [
        (16, 4, 1, 1),
        (24, 16, 3, 3),
        (6, 24, 1, 1),
    ]
    csla = block_type('csla')(4, 4)
    assert csla.norm is not None
    assert all(not p.requires_grad for key, p in csla.named_parameters() if key.endswith('scale'))


@pytest.mark.parametrize('name', ['repvgg', 'acb'])
@pytest.mark.parametrize('reparametrize', [partial(torch.nn.utils.prune.l1_unstructured, amount=0.5), weight_norm])
def test_fold_kernels_that_hooks_compute_uses_new_values(name, reparametrize):
    """After a step, the kernel of the last forward pass is out of date."""
    x = images(2, 8, in_chans=8, dtype=F64)

    def stepped() -> nn.Module:
        torch.manual_seed(0)
        module = randomise(block_type(name)(8, 8).double(), px=11, in_chans=8)
        reparametrize(module.get_submodule('conv_kxk' if name == 'repvgg' else 'branches.kxk').conv, 'weight')
        module(x)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.5)
        return module

    expected = stepped()(x)
    assert rel_diff(stepped().switch_to_deploy()(x), expected) < EXACT
    module = stepped()
    kernel = module.equivalent_kernel_bias()[0]
    torch.testing.assert_close(module.switch_to_deploy().reparam_conv.weight, kernel)


def test_load_state_dict_negative_variance_raises():
    state_dict = create_model('test_repvgg', block='acb').state_dict()
    state_dict['stem.branches.kxk.bn.running_var'][1] = -1
    with pytest.raises(FoldError, match=r"block 'stem': .*channel 1"):
        create_model('test_repvgg', block='acb', deploy=True).load_state_dict(state_dict)


@pytest.mark.cpu
@pytest.mark.parametrize('name', ['acb', 'dirac', 'expand', 'mobileone', 'csla', 'dbb'])
def test_open_model_file_of_a_block_finds_its_channels(name, tmp_path):
    torch.save(create_model('test_repvgg', block=name, in_chans=1).state_dict(), tmp_path / 'file.pth')
    assert open_model(tmp_path / 'file.pth', variant='test_repvgg', block=name).in_chans == 1
    with pytest.raises(ValueError, match="unknown block 'acbb'"):
        open_model(tmp_path / 'file.pth', block='acbb')
    assert verify(tmp_path / 'file.pth', variant='test_repvgg', block=name)['float64'].same


@pytest.mark.cpu
def test_convert_folder_of_another_block_or_variant_raises(tmp_path):
    convert('test_repvgg', tmp_path / 'acb', unfold=True, block='acb')
    for source in ('test_repvgg', tmp_path / 'acb'):
        with pytest.raises(CheckpointError, match='not of dbb; to make those, unfold it'):
            convert(source, tmp_path / 'out', block='dbb')
        with pytest.raises(CheckpointError, match='is of test_repvgg, not of repvgg_a0'):
            convert(source, tmp_path / 'out', variant='repvgg_a0')
    convert(tmp_path / 'acb', tmp_path / 'deploy', block='acb', form='deploy')
    convert(tmp_path / 'acb', tmp_path / 'dbb', block='dbb', unfold=True)
    assert verify(tmp_path / 'deploy', tmp_path / 'dbb')['float64'].max_rel_diff < 1e-4  # rounded to float32 twice


@pytest.mark.cpu
@pytest.mark.parametrize('name', block_params(BLOCKS))
def test_blocks_with_keys_each_block_type_finds_it(name):
    found = blocks_with_keys(timm.create_model('test_repvgg', block=name, device='meta').state_dict())
    assert found == (['plain', 'plain_delta'] if name in ('plain', 'plain_delta') else [name])


@pytest.mark.cpu
@pytest.mark.parametrize('deploy', [False, True], ids=['training', 'deploy'])
def test_load_checkpoint_weights_of_another_block_raises_with_both_names(deploy, tmp_path):
    torch.save(create_model('test_repvgg', block='acb').state_dict(), tmp_path / 'acb.pth')
    for other in ('repvgg', 'dbb'):
        model = create_model('test_repvgg', block=other, deploy=deploy)
        with pytest.raises(CheckpointError, match=f"of block='acb', and the model has those of block='{other}'"):
            load_checkpoint(model, tmp_path / 'acb.pth')
    assert open_model(tmp_path / 'acb.pth', variant='test_repvgg').block == 'acb'


@BLOCK
def test_load_deploy_from_training_weights_adapts_to_one_channel(name, tmp_path):
    """Training weights for three channels, folded and then adapted as timm does it."""
    model = randomise(create_model('test_repvgg', block=name).double(), px=32)
    save_model(model, tmp_path)
    again = create_model(f'local-dir:{tmp_path}', pretrained=True, in_chans=1, num_classes=3, deploy=True).double()
    x = images(2, px=32, in_chans=1, dtype=F64)
    expected = model.switch_to_deploy().eval().forward_features(x.expand(-1, 3, -1, -1))
    assert rel_diff(again.eval().forward_features(x), expected) < 1e-5  # weights in float32


@pytest.mark.cpu
def test_load_checkpoint_other_kind_of_identity_raises(tmp_path):
    for saved, loaded in (('no_identity', 'no_identity_bn'), ('no_identity_bn', 'no_identity')):
        torch.save(create_model('test_repvgg', block=saved).state_dict(), tmp_path / 'file.pth')
        with pytest.raises(CheckpointError, match=r'those of block='):
            load_checkpoint(create_model('test_repvgg', block=loaded), tmp_path / 'file.pth')


@pytest.mark.cpu
@pytest.mark.parametrize('name', ['dbb', 'dirac', 'doconv', 'expand'])
def test_load_stem_that_cannot_be_adapted_raises(name, tmp_path):
    torch.save(create_model('test_repvgg', block=name, num_classes=10).state_dict(), tmp_path / 'file.pth')
    overlay = dict(file=str(tmp_path / 'file.pth'))
    with pytest.raises(CheckpointError, match='another structure for 1 channels than for 3'):
        create_model('test_repvgg', pretrained=True, block=name, in_chans=1, pretrained_cfg_overlay=overlay)


@pytest.mark.parametrize('name', ['dirac', 'doconv', 'expand', 'dbb'])
@pytest.mark.parametrize('reparametrize', [partial(torch.nn.utils.prune.l1_unstructured, amount=0.5), weight_norm])
def test_fold_kernels_that_hooks_compute_follows_each_change(name, reparametrize):
    """Also of a convolution that holds a parameter of the kernel, and is not called."""
    made, x = block(name), images(2, 8, in_chans=8, dtype=F64)
    convs = [m for m in made.modules() if isinstance(m, nn.Conv2d)]
    for conv in convs:
        reparametrize(conv, 'weight')
    before = made(x).detach()
    with torch.no_grad():
        for parameter in (p for conv in convs for p in conv.parameters()):
            parameter += torch.randn_like(parameter)
    after = made(x)
    assert rel_diff(after, before) > 1e-3
    assert rel_diff(made.switch_to_deploy()(x), after) < EXACT


@pytest.mark.cpu
def test_fold_every_branch_class_is_known():
    """Without that, the fold has to prove it, and it has no fast path."""

    def below(kind: type) -> set[type]:
        return {kind}.union(*map(below, kind.__subclasses__()))

    ours = {kind for kind in below(branches.Branch) if kind.__module__.startswith(branches.__name__)}
    public = {kind for kind in ours if not kind.__name__.startswith('_')} - {branches.Branch}
    assert set(branches.BRANCHES) == public


def test_switch_frozen_kernels_beside_trained_attention_stay_frozen():
    made = to_device(repvgg_zoo.RepVGGBlock(16, 16, attn_layer=SEModule))
    for part in made.branch_names:
        getattr(made, part).requires_grad_(False)
    conv = made.eval().switch_to_deploy().reparam_conv
    assert not conv.weight.requires_grad
    assert next(made.attn.parameters()).requires_grad
