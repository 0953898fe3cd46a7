"""Ranges of the input channels of each layer."""

from __future__ import annotations

import torch
from helpers import unbalanced_ranges
from torch import nn

from repvgg_zoo.quantization.ranges import layer_ranges


def test_layer_ranges_are_those_of_input_channels():
    net = nn.Sequential(nn.Conv2d(4, 2, 1, groups=2, bias=False), nn.Flatten(), nn.Linear(2, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, -2], [3, 4]]).view(2, 2, 1, 1))
        net[2].weight.copy_(torch.tensor([[-5.0, 6]]))
    x = torch.tensor([[1.0, -1, 2, 0], [0, 3, 0, -4]]).view(2, 4, 1, 1)
    first, second = layer_ranges(net, x)
    assert (first.layer, first.inputs, first.weights) == ('0', (1, 2, 4), (1, 2, 4))
    # outputs of the first: [3, 6] and [-6, -16]
    assert (second.layer, second.inputs, second.weights) == ('2', (6, 6, 16), (5, 5, 6))
    assert not net[0]._forward_pre_hooks


def test_layer_ranges_show_what_is_unbalanced():
    for layer in layer_ranges(unbalanced_ranges(), torch.randn(2, 3, 32, 32))[1:-1]:
        assert layer.weights.largest / layer.weights.smallest > 50
