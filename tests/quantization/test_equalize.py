"""Cross-layer equalisation."""

from __future__ import annotations

import pytest
import timm
import torch
from helpers import deployed_with_weights, images, randomise, rel_diff, unbalanced_ranges
from timm.layers import get_attn

from repvgg_zoo import prepare_qat
from repvgg_zoo.quantization.equalize import equalize, neighbours, rescale
from repvgg_zoo.quantization.sensitivity import layer_errors


def test_equalize_computes_same_with_equal_ranges():
    model, x = unbalanced_ranges().double(), images(4, 32, dtype=torch.float64)
    expected = model(x)
    assert equalize(model) is model
    assert rel_diff(model(x), expected) < 1e-9
    first, second = model.stages[1][1].reparam_conv.weight, model.stages[1][2].reparam_conv.weight
    ranges = first.abs().amax((1, 2, 3)) / second.abs().amax((0, 2, 3))
    assert ((ranges > 0.5) & (ranges < 2)).all()  # the sweeps come near it


def test_equalize_groups_computes_same():
    torch.manual_seed(0)
    model = timm.create_model('repvgg_b1g4', deploy=True, num_classes=2).double().eval()
    model.stages = model.stages[:1]
    x = images(1, 32, dtype=torch.float64)
    with torch.no_grad():
        for block in (model.stem, *model.stages[0]):
            scale = torch.rand(block.reparam_conv.out_channels, dtype=x.dtype)
            block.reparam_conv.weight *= scale.view(-1, 1, 1, 1)
        expected, before = model.forward_features(x), model.stem.reparam_conv.weight.clone()
        equalize(model)
        assert rel_diff(model.forward_features(x), expected) < 1e-9
    assert not torch.equal(before, model.stem.reparam_conv.weight)


@pytest.mark.parametrize('name', ['repvgg_d2se', 'repvggplus_l2pse'])
def test_equalize_squeeze_excite_computes_same(name):
    """Before the activation, and behind it."""
    model = timm.create_model(name, deploy=True, depths=(1, 1, 2, 1), width=(0.25, 0.25, 0.25, 0.25), num_classes=2)
    model, x = randomise(model).double().eval(), images(2, 32, dtype=torch.float64)
    with torch.no_grad():
        for index, (block, following) in enumerate(neighbours(model)):
            block.attn.fc1.weight.mul_(3)  # so that it counts
            generator = torch.Generator().manual_seed(index)
            channels = block.reparam_conv.out_channels
            expected = model(x)
            rescale(block, following, 10 ** (2 * torch.rand(channels, generator=generator, dtype=x.dtype) - 1))
            assert rel_diff(model(x), expected) < 1e-9
        before = model.stages[0][0].attn.fc1.weight.clone()
        expected = model(x)
        assert rel_diff(equalize(model)(x), expected) < 1e-9
    assert not torch.equal(model.stages[0][0].attn.fc1.weight, before)


@pytest.mark.parametrize(('act', 'attn'), [('silu', None), ('relu6', None), ('relu', 'eca'), ('relu', 'ese')])
def test_equalize_without_a_pair_raises(act, attn):
    sizes = dict(depths=(1, 1, 1, 1), width=(0.25, 0.25, 0.25, 0.25))
    model = timm.create_model('repvgg_a0', deploy=True, act_layer=act, **sizes)
    for block, _ in neighbours(model):
        if attn is not None:
            block.attn = get_attn(attn)(block.reparam_conv.out_channels)
    before = model.stem.reparam_conv.weight.clone()
    with pytest.raises(ValueError, match='nothing to equalise'):
        equalize(model)
    assert torch.equal(before, model.stem.reparam_conv.weight)


def test_equalize_other_forms_raise():
    with pytest.raises(ValueError, match=r"'stem' has branches, and this is for the deploy form"):
        equalize(timm.create_model('test_repvgg'))
    model = prepare_qat(deployed_with_weights(), [images(2, 32)])
    before = model.stem.reparam_conv.weight.clone()
    with pytest.raises(ValueError, match=r"'stem\.quantizer' is of prepare_qat; do this before it"):
        equalize(model)
    assert torch.equal(model.stem.reparam_conv.weight, before)


def test_equalize_channels_of_zeros_stay():
    model, x = deployed_with_weights(), images(4, 32)
    with torch.no_grad():
        model.stages[1][1].reparam_conv.weight[1:] = 0  # so that the median is 0
        expected = model(x)
    assert rel_diff(equalize(model)(x), expected) < 1e-4


def test_equalize_dead_channels_stay():
    model = deployed_with_weights()
    with torch.no_grad():
        conv = model.stages[1][1].reparam_conv
        conv.weight[5] *= 1e-12
        conv.bias[5] = 0.5
    x = images(8, 32)
    before = layer_errors(model, x)[0].rel_error
    assert layer_errors(equalize(model), x)[0].rel_error < 2 * before


def test_equalize_unread_channels_stay():
    model = deployed_with_weights()
    with torch.no_grad():
        model.stages[1][2].reparam_conv.weight[:, 5] *= 1e-12
    bias = model.stages[1][1].reparam_conv.bias[5].item()
    equalize(model, sweeps=1)
    assert model.stages[1][1].reparam_conv.bias[5].item() == bias


def test_equalize_other_modules_raise():
    model = deployed_with_weights()
    model.stages[1][0] = torch.nn.Identity()
    with pytest.raises(ValueError, match='is for a chain of RepVGG blocks; here is a Identity'):
        equalize(model)
    with pytest.raises(TypeError, match='here is a Linear'):
        equalize(torch.nn.Linear(1, 1))
