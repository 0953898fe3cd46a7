"""Channels that training rescales, so that rounding costs less: a measure of the noise, and steps of scales."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from .layers import QuantizedLinear
from .qat import quantized_layers

__all__ = ['ChannelScales', 'folded_layers', 'rounding_noise']

FoldedLayers: TypeAlias = Mapping[nn.Module, 'nn.Conv2d | QuantizedLinear']
_EPS = 1e-12
_BETAS = 0.9, 0.99
"""Of Adam. The second is that of a hundred steps, because a training may have only some hundreds."""


def folded_layers(model: nn.Module) -> FoldedLayers:
    """Return what holds the weights that a model of `prepare_qat` rounds, by the module that rounds.

    A block with branches has no such weights, and makes the result empty.
    """
    found: dict[nn.Module, nn.Conv2d | QuantizedLinear] = {}
    for layer in quantized_layers(model).values():
        if isinstance(layer, QuantizedLinear):
            found[layer] = layer
        elif layer.reparam_conv is None:
            return {}
        else:
            found[cast('nn.Module', layer.quantizer)] = layer.reparam_conv
    return found


@contextmanager
def rounding_noise(layers: FoldedLayers) -> Iterator[list[Tensor]]:
    """Measure how much noise rounding adds to each layer's output, while the model runs.

    Steps of rounding are as large as the root mean squares of what is rounded, up to a factor. So noise of the inputs x
    reaches an output o with the energy ‖w_o‖² · Σ E[x_i²], and noise of the weights w_o does, too. Relative to the
    output, in the mean over outputs, that is log mean_o (‖w_o‖² · Σ E[x_i²] / E[y_o²]). It is large where channels are
    large on one side of a layer and small on the other.

    Args:
        layers: Of `folded_layers`.

    Yields:
        A list that gets a scalar for each layer in each forward pass. Gradients go through.
    """
    noises: list[Tensor] = []

    def measure(module: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> None:
        with torch.autocast(y.device.type, enabled=False):
            layer = layers[module]
            reached = layer.weight.flatten(1).square().sum(1) * _energies(inputs[0], layer).sum()
            noises.append((reached / (_energies(y, layer) + _EPS)).mean().log())

    handles = [module.register_forward_hook(measure) for module in layers]
    try:
        yield noises
    finally:
        for handle in handles:
            handle.remove()


class ChannelScales:
    """Steps of a scale for each output channel and each input channel of the layers: w_oi ← w_oi · exp(a_o + b_i).

    Adam takes the steps. The gradients of a and b are sums over the weights and biases that they scale. So a network
    rescales its channels much faster than its single weights could, and what one layer does to its outputs, the next
    one undoes at its inputs: a loss of the network's answers sees only the sum of both.
    """

    def __init__(self, layers: FoldedLayers, *, lr: float, steps: int) -> None:
        """Make it.

        Args:
            layers: Of `folded_layers`.
            lr: The first step, as a logarithm of a scale; it falls to 0 with a cosine.
            steps: Number of calls of `step`.
        """
        self.layers = [layer for layer in layers.values() if layer.weight.requires_grad]
        self.scales = [
            (weight.new_zeros(len(weight)), weight.new_zeros(_groups(layer), weight.shape[1]))
            for layer, weight in ((layer, layer.weight.detach()) for layer in self.layers)
        ]
        parameters = [scale for pair in self.scales for scale in pair]
        self.optimizer = torch.optim.Adam(parameters, lr=lr, betas=_BETAS, eps=_EPS)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    @torch.no_grad()
    def step(self) -> None:
        """Rescale weights and biases by the gradients that they have."""
        for layer, (a, b) in zip(self.layers, self.scales, strict=True):
            by_weight = (layer.weight * cast('Tensor', layer.weight.grad)).reshape(len(a), b.shape[1], -1).sum(2)
            a.grad, b.grad = by_weight.sum(1), by_weight.view(len(b), -1, b.shape[1]).sum(1)
            if layer.bias is not None:
                a.grad += layer.bias * cast('Tensor', layer.bias.grad)
        self.optimizer.step()
        self.schedule.step()
        for layer, (a, b) in zip(self.layers, self.scales, strict=True):
            factor = a.exp()[:, None] * b.exp().repeat_interleave(len(a) // len(b), 0)
            layer.weight *= factor.view(*factor.shape, *[1] * (layer.weight.ndim - 2))
            if layer.bias is not None:
                layer.bias *= a.exp()
            a.zero_()
            b.zero_()


def _groups(layer: nn.Module) -> int:
    return layer.groups if isinstance(layer, nn.Conv2d) else 1


def _energies(x: Tensor, layer: nn.Module) -> Tensor:
    """Return the mean square of each channel."""
    return x.float().movedim(1 if isinstance(layer, nn.Conv2d) else -1, 0).flatten(1).square().mean(1)
