"""Weights as integers."""

from __future__ import annotations

import pytest
import torch

from repvgg_zoo.quantization.weights import FULL_RANGE, HALF_RANGE, codes_of, fake_quantize


def test_fake_quantized_values_have_eight_bits():
    weight = torch.randn(4, 3, 3, 3) * torch.tensor([1e-3, 1, 1e3, 0]).view(-1, 1, 1, 1)
    rounded = fake_quantize(weight, FULL_RANGE)
    for channel in range(3):
        step = weight[channel].abs().max() / 127
        assert ((rounded[channel] - weight[channel]).abs() <= 0.501 * step).all()
        steps = rounded[channel] / step
        assert torch.allclose(steps, steps.round(), atol=1e-3)
    assert not rounded[3].any()


@pytest.mark.parametrize('largest', [FULL_RANGE, HALF_RANGE])
def test_codes_are_what_fake_quantize_rounds_to(largest):
    torch.manual_seed(0)
    weight = torch.randn(16, 5, 3, 3, requires_grad=True)
    values, scale = codes_of(weight, largest)
    assert values.dtype == torch.int8
    assert values.flatten(1).abs().amax(1).eq(largest).all()
    rounded = fake_quantize(weight, largest)
    torch.testing.assert_close(values * scale.view(-1, 1, 1, 1), rounded, rtol=1e-6, atol=0)  # one product in float32
    rounded.square().sum().backward()
    torch.testing.assert_close(weight.grad, 2 * rounded)  # straight through


def test_fake_quantize_does_not_hide_nan():
    weight = torch.tensor([[1.0, torch.nan], [1.0, 2.0]])
    assert fake_quantize(weight, FULL_RANGE).isnan().any(1).tolist() == [True, False]


def test_fake_quantize_of_tiny_weights_is_zero():
    weight = torch.full((1, 4), 1e-44)
    assert not fake_quantize(weight, FULL_RANGE).any()
    assert codes_of(weight, FULL_RANGE).scale.item() == 1
