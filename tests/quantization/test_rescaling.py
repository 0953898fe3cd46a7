"""Rounding noise, and channels that a training rescales."""

from __future__ import annotations

import pytest
import torch
from helpers import create_model, deployed_with_weights, images, unbalanced_ranges

from repvgg_zoo import prepare_qat
from repvgg_zoo.quantization.qat import quantized_layers
from repvgg_zoo.quantization.rescaling import ChannelScales, folded_layers, rounding_noise


def noise_of(model, x):
    with rounding_noise(folded_layers(prepare_qat(model, [x]))) as noises:
        model.eval()(x)
    return torch.stack(noises)


def test_noise_is_what_it_says():
    model = prepare_qat(create_model('test_repvgg', deploy=True), [images(4, 32)])
    seen = {}
    layer = model.stages[1][0]
    layer.quantizer.register_forward_hook(lambda _, inputs, y: seen.update(x=inputs[0], y=y.clone()))
    with rounding_noise(folded_layers(model)) as noises:
        model.eval()(images(4, 32))
    assert len(noises) == 12
    energy = seen['x'].square().mean((0, 2, 3)).sum()
    expected = layer.reparam_conv.weight.square().sum((1, 2, 3)) * energy / seen['y'].square().mean((0, 2, 3))
    index = list(quantized_layers(model)).index('stages.1.0')
    assert noises[index].item() == pytest.approx(expected.mean().log().item(), rel=1e-5)


def test_noise_grows_with_ranges_that_differ_and_not_with_size():
    x = images(8, 32)
    balanced, unbalanced = noise_of(deployed_with_weights(), x), noise_of(unbalanced_ranges(), x)
    assert (unbalanced[1:-1] > balanced[1:-1] + 1).all()
    larger = deployed_with_weights()
    with torch.no_grad():
        larger.stem.reparam_conv.weight *= 100
        larger.stem.reparam_conv.bias *= 100
        larger.stages[0][0].reparam_conv.weight /= 100
    torch.testing.assert_close(noise_of(larger, x), balanced, rtol=1e-3, atol=1e-3)  # codes differ in the last bits


def test_hooks_go_and_branches_have_no_layers():
    model = prepare_qat(create_model('test_repvgg'), [images(2, 32)])
    assert folded_layers(model) == {}
    model = prepare_qat(create_model('test_repvgg', deploy=True), [images(2, 32)])
    with rounding_noise(folded_layers(model)) as noises:
        pass
    model(images(2, 32))
    assert not noises


@pytest.mark.parametrize('groups', [1, 2])
def test_scale_steps_have_the_gradients_of_scales(groups):
    """One step of Adam is as large as the learning rate, against the sign of the gradient."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(4, 6, 3, groups=groups)
    torch.nn.init.normal_(conv.bias, std=5)  # so that it counts
    a, b = torch.zeros(6, requires_grad=True), torch.zeros(4, requires_grad=True)
    x, target = torch.randn(2, 4, 5, 5), torch.randn(2, 6, 3, 3)
    # scaling inputs is scaling the weights that read them
    scaled = torch.nn.functional.conv2d(x * b.exp().view(1, -1, 1, 1), conv.weight, conv.bias, groups=groups)
    bias = conv.bias.view(1, -1, 1, 1)
    loss = (((scaled - bias) * a.exp().view(1, -1, 1, 1) + bias * a.exp().view(1, -1, 1, 1)) - target).square().sum()
    loss.backward()
    before, bias = conv.weight.detach().clone(), conv.bias.detach().clone()
    ChannelScales({conv: conv}, lr=0.1, steps=9).step()
    expected_a, expected_b = (torch.exp(-0.1 * scale.grad.sign()) for scale in (a, b))
    by_input = expected_b.view(groups, 1, -1).expand(-1, 6 // groups, -1).reshape(6, -1)
    torch.testing.assert_close(conv.weight.detach(), before * (expected_a[:, None] * by_input)[:, :, None, None])
    torch.testing.assert_close(conv.bias.detach(), bias * expected_a)


def test_scale_steps_leave_what_is_frozen():
    frozen, trained = (torch.nn.Conv2d(4, 4, 3) for _ in range(2))
    frozen.weight.requires_grad_(False)
    before = frozen.weight.clone(), trained.weight.detach().clone()
    trained(frozen(torch.randn(2, 4, 9, 9))).square().sum().backward()
    ChannelScales({frozen: frozen, trained: trained}, lr=0.1, steps=9).step()
    assert torch.equal(frozen.weight, before[0])
    assert not torch.equal(trained.weight, before[1])
