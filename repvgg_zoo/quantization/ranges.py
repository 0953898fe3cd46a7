"""How much the input channels of each layer differ in range: what INT8 suffers from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .deploy_form import refuse_other_forms

__all__ = ['LayerRanges', 'Spread', 'layer_ranges']


class Spread(NamedTuple):
    """Largest absolute values, over channels."""

    smallest: float
    median: float
    largest: float


@dataclass(frozen=True, kw_only=True)
class LayerRanges:
    """What the channels that one layer reads differ in. They share the codes of INT8."""

    layer: str
    inputs: Spread
    """Of the values of each input channel. All of them share one scale."""
    weights: Spread
    """Of the weights that read each input channel. Those of an output channel share one scale."""


@torch.no_grad()
def layer_ranges(model: nn.Module, images: Tensor) -> list[LayerRanges]:
    """Measure the ranges of each convolution and linear layer.

    Args:
        model: In the deploy form and eval mode.
        images: `(N, C, H, W)`.

    Returns:
        The ranges of each layer, in the order of the forward pass.

    Raises:
        ValueError: The model has branches or is of `prepare_qat`.

    Example:
        >>> import timm
        >>> model = timm.create_model('test_repvgg.cifar10_deploy').eval()
        >>> ranges = layer_ranges(model, torch.randn(2, 3, 32, 32))
        >>> len(ranges), ranges[0].layer
        (12, 'stem.reparam_conv')
    """
    refuse_other_forms(model)
    layers = (nn.Conv2d, nn.Linear)
    names: dict[nn.Module, str] = {m: name for name, m in model.named_modules() if isinstance(m, layers)}
    found: dict[nn.Module, LayerRanges] = {}

    def look(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found[layer] = LayerRanges(
            layer=names[layer], inputs=_spread(_of_inputs(layer, inputs[0])), weights=_spread(_of_weights(layer))
        )

    handles = [layer.register_forward_pre_hook(look) for layer in names]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return list(found.values())


def _of_inputs(layer: nn.Module, x: Tensor) -> Tensor:
    return x.abs().transpose(0, 1 if isinstance(layer, nn.Conv2d) else -1).flatten(1).amax(1)


def _of_weights(layer: nn.Module) -> Tensor:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    groups: int = getattr(layer, 'groups', 1)
    return weight.abs().view(groups, -1, weight.shape[1], weight[0, 0].numel()).amax((1, 3)).flatten()


def _spread(values: Tensor) -> Spread:
    return Spread(values.min().item(), values.median().item(), values.max().item())
