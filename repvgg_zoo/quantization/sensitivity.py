"""How much each layer suffers from rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..reparam.evaluation import tensors_in
from .deploy_form import refuse_other_forms
from .weights import FULL_RANGE, HALF_RANGE, fake_quantize

__all__ = ['LayerError', 'layer_errors']


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """Error of the output if only one layer is quantized."""

    layer: str
    rel_error: float
    """Root mean square of the error, relative to that of the output."""


@torch.no_grad()
def layer_errors(
    model: nn.Module,
    images: Tensor,
    *,
    full_range: bool = False,
    track: Callable[..., Iterable[Any]] = lambda items, **_: items,
) -> list[LayerError]:
    """Measure the error of the output if only one convolution, or only one linear layer, is quantized.

    Weights are rounded for each output channel, symmetric about 0, and the layer's input to 8 bits between its
    extremes.

    Args:
        model: In the deploy form and eval mode. Of several outputs, all count.
        images: `(N, C, H, W)`.
        full_range: Let weights use all 8 bits instead of 7, see `prepare_qat`.
        track: Shows the progress, see `repvgg_zoo.tools.console`.

    Returns:
        One error for each layer, the largest first.

    Raises:
        ValueError: The output is 0 everywhere, or not finite; or the model has branches or is of `prepare_qat`.

    Example:
        >>> import timm
        >>> model = timm.create_model('test_repvgg.cifar10_deploy').eval()
        >>> len(layer_errors(model, torch.randn(2, 3, 32, 32)))
        12
    """
    refuse_other_forms(model)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    reference = _output(model, images)
    size = reference.square().mean().sqrt()
    if not 0 < size < torch.inf:
        raise ValueError('the output of the model is 0 everywhere or not finite, so no error is relative to it')
    errors, largest_code = [], FULL_RANGE if full_range else HALF_RANGE
    for name, layer in track(list(layers.items()), description='sensitivity'):
        handle = layer.register_forward_pre_hook(lambda _, inputs: (_fake_quantized_input(inputs[0]),))
        weight = layer.weight.clone()
        try:
            layer.weight.copy_(fake_quantize(weight, largest_code))
            error = (_output(model, images) - reference).square().mean().sqrt() / size
        finally:
            layer.weight.copy_(weight)
            handle.remove()
        errors.append(LayerError(layer=name, rel_error=error.item()))
    return sorted(errors, key=lambda error: -error.rel_error)


def _output(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([output.flatten() for output in tensors_in(model(images))])


def _fake_quantized_input(x: Tensor) -> Tensor:
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    scale = (high - low) / 255 or 1.0
    return torch.fake_quantize_per_tensor_affine(x, scale, round(-low / scale), 0, 255)
