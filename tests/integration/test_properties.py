"""The fold and the translation of checkpoints over random configurations, against float64."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from helpers import LAYOUTS, device_of_tests, rel_diff, rename, to_device
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from repvgg_zoo import VARIANTS, CheckpointError, RepVGG, RepVGGBlock, load_checkpoint
from repvgg_zoo.checkpoints.layouts import to_timm_layout
from repvgg_zoo.variants import SqueezeExcite

pytestmark = pytest.mark.device
ULP = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
"""Distance from 1 to the next number of a dtype: two roundings are off by at most as much, relative."""


@st.composite
def blocks(draw, dtypes=tuple(ULP)):
    """A block with random parameters and statistics: variances from 0 to 1e8, scales of either sign and zero."""
    groups = draw(st.sampled_from([1, 2, 3]))
    in_chs = groups * draw(st.integers(1, 4))
    out_chs = draw(st.sampled_from([in_chs, groups * draw(st.integers(1, 4))]))
    affine = draw(st.booleans())
    block = RepVGGBlock(
        in_chs,
        out_chs,
        stride=draw(st.sampled_from([1, 2])),
        dilation=draw(st.integers(1, 3)),
        groups=groups,
        padding_mode=draw(st.sampled_from(['zeros', 'reflect', 'replicate', 'circular'])),
        norm_layer=lambda chs, **dd: nn.BatchNorm2d(chs, eps=1e-5, affine=affine, **dd),
        device=device_of_tests(),
    )
    dtype = draw(st.sampled_from(dtypes))
    seed = draw(st.integers(0, 2**32 - 1))
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    largest = draw(st.sampled_from([-12.0, 0.0, 8.0]))
    with torch.no_grad():
        for norm in (m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
            shape = norm.running_var.shape
            norm.running_mean.copy_(torch.randn(shape, generator=generator))
            norm.running_var.copy_(10 ** (torch.rand(shape, generator=generator) * 6 - 6 + largest))
            norm.running_var.clamp_(max=min(1e8, torch.finfo(dtype).max))
            norm.running_var[torch.rand(shape, generator=generator) < 0.2] = 0
            if affine:
                norm.weight.copy_(torch.randn(shape, generator=generator))
                norm.weight[torch.rand(shape, generator=generator) < 0.2] = 0
                norm.bias.copy_(torch.randn(shape, generator=generator))
    block.to(dtype)
    block.to(memory_format=draw(st.sampled_from([torch.contiguous_format, torch.channels_last])))
    block.act = nn.Identity()  # which would hide half of the values
    return block.eval()


def conv_norm_pairs(block: RepVGGBlock) -> list[tuple[nn.Conv2d | None, nn.BatchNorm2d]]:
    pairs = [(block.conv_kxk.conv, block.conv_kxk.bn), (block.conv_1x1.conv, block.conv_1x1.bn)]
    return pairs + ([(None, block.identity)] if block.identity is not None else [])


@torch.no_grad()
def size_of_terms(block: RepVGGBlock, x: Tensor) -> Tensor:
    """The sum of the absolute values of everything that is added up for an output: what rounding is relative to."""
    total = x.new_zeros(())
    for conv, norm in conv_norm_pairs(block):
        y = x.abs()
        if conv is None:
            total = total + y * _scale(norm).abs()[:, None, None]
        else:
            conv = copy.deepcopy(conv)
            conv.weight.copy_(conv.weight.abs())
            total = total + conv(y) * _scale(norm).abs()[:, None, None]
        bias = 0 if norm.bias is None else norm.bias.abs()
        total = total + (bias + (norm.running_mean * _scale(norm)).abs()).view(-1, 1, 1)
    return total


def _scale(norm: nn.BatchNorm2d) -> Tensor:
    scale = (norm.running_var + norm.eps).rsqrt()
    return scale if norm.weight is None else scale * norm.weight


@given(blocks(dtypes=(torch.float64,)), st.integers(4, 9))
def test_folded_block_computes_what_branches_compute(block, px):
    x = to_device(torch.randn(2, block.conv_kxk.conv.in_channels, px, px, dtype=torch.float64))
    with torch.no_grad():
        expected, terms = block(x), size_of_terms(block, x)
        folded = block.switch_to_deploy()(x)
    # some 40 terms at most, each rounded a few times
    assert ((folded - expected).abs() <= 200 * ULP[torch.float64] * terms).all()


@given(blocks())
def test_folded_kernel_is_exact_one_rounded(block):
    """Each value of the folded kernel is off by at most two roundings in its own dtype."""
    dtype = block.conv_kxk.conv.weight.dtype
    strides = block.conv_kxk.conv.weight.stride()
    exact = copy.deepcopy(block).double().switch_to_deploy().reparam_conv
    # float64 itself sums up to three terms; float16 has no numbers below 6e-8 and none above 65504
    wide = conv_norm_pairs(copy.deepcopy(block).double())
    sums = sum(_scale(n).abs().max() * (1 if conv is None else conv.weight.abs().max()) for conv, n in wide)
    shifts = sum((_scale(n) * n.running_mean).abs().max() for _, n in wide)
    shifts += sum(n.bias.abs().max() for _, n in wide if n.bias is not None)
    folded = block.switch_to_deploy().reparam_conv
    assert folded.weight.dtype == folded.bias.dtype == dtype
    assert folded.weight.stride() == strides
    for value, reference, size in ((folded.weight, exact.weight, sums), (folded.bias, exact.bias, shifts)):
        bound = ULP[dtype] * reference.abs() + 4 * ULP[torch.float64] * size + torch.finfo(dtype).smallest_normal
        off = (value.double() - reference).abs()
        overflows = reference.abs() > torch.finfo(dtype).max
        assert ((off <= bound) | (overflows & value.isinf())).all()


@given(blocks(), st.sampled_from(['', 'stages.0.1.', 'module.encoder.0.']))
def test_fold_state_dict_equals_switch(block, prefix):
    folded = {prefix + key: value for key, value in block.state_dict().items()}
    block.fold_state_dict(folded, prefix)
    expected = {prefix + key: value for key, value in block.switch_to_deploy().state_dict().items()}
    assert folded.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in folded.items())


@st.composite
def models(draw):
    """A small network of random depths, widths, groups and squeeze-excites."""
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    variant = replace(
        VARIANTS['test_repvgg'],
        depths=tuple(draw(st.integers(1, 3)) for _ in range(4)),
        width=(*(draw(st.sampled_from([0.125, 0.25])) for _ in range(3)), 0.03125),
        groups=draw(st.sampled_from([1, 2])),
        se=draw(st.sampled_from([None, SqueezeExcite(rd_ratio=0.25, position='before_act')])),
    )
    model = RepVGG(variant, num_classes=draw(st.integers(2, 5)))
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.dtype.is_floating_point:
                tensor.copy_(torch.rand(tensor.shape) + 0.1 if 'var' in name else torch.randn(tensor.shape))
    return to_device(model).eval()


PREFIXES = st.lists(st.sampled_from(['module.', '_orig_mod.']), max_size=3).map(''.join)


@settings(max_examples=40)
@given(
    model=models(),
    layout=st.sampled_from(list(LAYOUTS)),
    prefix=PREFIXES,
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    deploy_file=st.booleans(),
    deploy_model=st.booleans(),
    with_counters=st.booleans(),
)
def test_load_translated_checkpoint_restores_model(
    model, layout, prefix, dtype, deploy_file, deploy_model, with_counters, tmp_path
):
    model.to(dtype)
    source = copy.deepcopy(model).switch_to_deploy() if deploy_file else model
    # a file is read and folded on the CPU, and another device may round the last bit of float64 otherwise
    expected = to_device(copy.deepcopy(source).cpu().switch_to_deploy()) if deploy_model else source
    state_dict = {prefix + key: value for key, value in rename(source.state_dict(), LAYOUTS[layout]).items()}
    if not with_counters:
        state_dict = {key: value for key, value in state_dict.items() if 'num_batches' not in key}
    torch.save(state_dict, tmp_path / 'file.pth')
    target = to_device(RepVGG(model.variant, num_classes=model.num_classes, deploy=deploy_model).to(dtype))
    if deploy_file and not deploy_model:
        with pytest.raises(CheckpointError, match='deploy=True'):
            load_checkpoint(target, tmp_path / 'file.pth')
        return
    load_checkpoint(target, tmp_path / 'file.pth')
    for key, value in target.state_dict().items():
        assert torch.equal(value, expected.state_dict()[key]), key
    if not deploy_file and dtype == torch.float64:
        x = to_device(torch.randn(1, 3, 32, 32, dtype=dtype))
        assert rel_diff(target.eval()(x), model(x)) < 1e-9  # float64, amplified by some ten layers


@settings(max_examples=40)
@given(model=models(), layout=st.sampled_from(list(LAYOUTS)), data=st.data())
def test_load_damaged_checkpoint_raises_and_changes_nothing(model, layout, data, tmp_path):
    state_dict = rename(model.state_dict(), LAYOUTS[layout])
    needed = sorted(key for key in state_dict if 'num_batches' not in key)
    victim = data.draw(st.sampled_from(needed))
    damage = data.draw(st.sampled_from(['missing', 'extra', 'reshaped']))
    if damage == 'missing':
        del state_dict[victim]
    elif damage == 'extra':
        state_dict[f'{victim}_too'] = torch.zeros(1)
    else:
        state_dict[victim] = torch.zeros(*state_dict[victim].shape, 2)
    torch.save(state_dict, tmp_path / 'file.pth')
    target = to_device(RepVGG(model.variant, num_classes=model.num_classes))
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(CheckpointError):
        load_checkpoint(target, tmp_path / 'file.pth')
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


@pytest.mark.cpu
@given(st.dictionaries(st.text(max_size=20), st.just(torch.zeros(1)), max_size=5))
def test_to_timm_layout_unknown_keys_raises(state_dict):
    with pytest.raises(CheckpointError, match='of none of the known layouts'):
        to_timm_layout(state_dict)
