"""The error of one quantized layer."""

from __future__ import annotations

import pytest
import torch
from helpers import create_model, deployed_with_weights, images
from torch import nn

from repvgg_zoo import prepare_qat
from repvgg_zoo.quantization.ranges import layer_ranges
from repvgg_zoo.quantization.sensitivity import _fake_quantized_input, layer_errors


def test_layer_errors_quantize_one_layer_at_a_time():
    model, x = deployed_with_weights(), images(8, 32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    errors = layer_errors(model, x)
    assert [error.rel_error for error in errors] == sorted((e.rel_error for e in errors), reverse=True)
    assert all(0 < error.rel_error < 0.2 for error in errors)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not model.stem.reparam_conv._forward_pre_hooks
    with torch.no_grad():  # one channel with a range that leaves nothing to the others, and of no consequence itself
        model.stages[1][2].reparam_conv.weight[5] *= 1000
        model.stages[1][3].reparam_conv.weight[:, 5] = 0
    assert layer_errors(model, x)[0].layer == 'stages.1.3.reparam_conv'


def test_layer_errors_of_eight_bits_are_smaller_than_those_of_seven():
    model, x = deployed_with_weights(), images(8, 32)
    seven, eight = (
        {error.layer: error.rel_error for error in layer_errors(model, x, full_range=full_range)}
        for full_range in (False, True)
    )
    assert all(eight[layer] < error for layer, error in seven.items())  # the input has 8 bits in both
    assert sum(eight.values()) < 0.8 * sum(seven.values())


def test_fake_quantized_input_has_eight_bits():
    x = torch.linspace(-1, 3, 1001)
    assert len(_fake_quantized_input(x).unique()) == 256
    assert not _fake_quantized_input(torch.zeros(5)).any()


def test_layer_errors_are_relative_to_all_outputs():
    class TwoOutputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.first(x), self.second(x)

    torch.manual_seed(0)
    model, x = TwoOutputs(), images(2, 32)
    errors = {error.layer: error.rel_error for error in layer_errors(model, x)}
    assert min(errors.values()) > 1e-4
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 10
    assert {error.layer: error.rel_error for error in layer_errors(model, x)} == pytest.approx(errors, rel=1e-3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with pytest.raises(ValueError, match='output of the model is 0 everywhere'):
        layer_errors(model, x)


@pytest.mark.parametrize('measure', [layer_errors, layer_ranges])
def test_other_forms_are_refused(measure):
    x = images(2, 32)
    with pytest.raises(ValueError, match=r"'stem' has branches, .* call switch_to_deploy\(\) first"):
        measure(create_model('test_repvgg').eval(), x)
    with pytest.raises(ValueError, match=r"'stem\.quantizer' is of prepare_qat; .* without_quantizers\(\) returns"):
        measure(prepare_qat(deployed_with_weights(), [x]), x)
