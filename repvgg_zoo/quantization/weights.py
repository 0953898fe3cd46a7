"""Weights as integers: per output channel, symmetric about 0."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ['FULL_RANGE', 'HALF_RANGE', 'Codes', 'codes_of', 'fake_quantize']

FULL_RANGE, HALF_RANGE = 127, 63
"""The largest code of 8 and of 7 bits."""


_SMALLEST = 1e-30
"""Channels of smaller weights are all zeros: their scale would not be a normal number."""


class Codes(NamedTuple):
    """Weights as integers. A weight is its code times the scale of its output channel."""

    values: Tensor
    """`(C_out, …)`, int8."""
    scale: Tensor
    """`(C_out,)`, of the dtype of the weights."""


def fake_quantize(weight: Tensor, largest_code: int) -> Tensor:
    """Round weights `(C_out, …)` to what integers can hold, so that the largest of each channel has the largest code.

    The gradient goes straight through.

    Raises:
        TypeError: The weights are not in float32.
    """
    if weight.dtype != torch.float32:
        raise TypeError(f'weights of {weight.dtype} are not rounded; keep the model in float32, in autocast for speed')
    scale = _scale(weight, largest_code)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -largest_code, largest_code)


def codes_of(weight: Tensor, largest_code: int) -> Codes:
    """Return the integers to which `fake_quantize` rounds."""
    scale = _scale(weight, largest_code)
    rounded = fake_quantize(weight.detach(), largest_code) / scale.view(-1, *[1] * (weight.ndim - 1))
    return Codes(rounded.round().to(torch.int8), scale)


def _scale(weight: Tensor, largest_code: int) -> Tensor:
    largest = weight.detach().flatten(1).abs().amax(1)
    return torch.where(largest < _SMALLEST, 1.0, largest / largest_code)  # NaN stays
