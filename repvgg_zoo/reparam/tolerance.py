"""The difference of two outputs, and the largest difference that rounding explains."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor

__all__ = ['MAX_REL_DIFF', 'max_rel_diff', 'rel_diff']

MAX_REL_DIFF = MappingProxyType({torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1})
"""The largest difference between the outputs of both forms that rounding explains, relative to the largest output.

The fold moves each weight by an ulp or two, and some fifty layers amplify that a few hundred times. Half precision also
rounds every activation. A wrong fold is off by the size of the outputs.
"""


def max_rel_diff(dtype: torch.dtype, device: torch.device) -> float:
    """Look up `MAX_REL_DIFF`, with that of float16 for float32 on CUDA.

    PyTorch lets cuDNN round the float32 inputs of convolutions to TF32, which has the mantissa of float16.

    Example:
        >>> max_rel_diff(torch.float32, torch.device('cpu'))
        0.001
    """
    return MAX_REL_DIFF[torch.float16 if dtype == torch.float32 and device.type == 'cuda' else dtype]


def rel_diff(actual: Tensor, expected: Tensor) -> float:
    """max |actual - expected| / max |expected|, in float64; 0 if both are equal, NaN if either holds a NaN.

    Example:
        >>> rel_diff(torch.tensor([1.0, 2.2]), torch.tensor([1.0, 2.0]))  # doctest: +ELLIPSIS
        0.1...
    """
    actual, expected = (t.detach().cpu().double() for t in (actual, expected))
    diff = (actual - expected).abs().max()
    return 0.0 if diff == 0 else (diff / expected.abs().max()).item()
