"""Kernels that hooks compute before each forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .._compat import forward_pre_hooks

__all__ = ['computes_kernel', 'refresh_kernels']


def computes_kernel(hook: Callable[..., Any]) -> bool:
    """Whether a hook computes a kernel: torch's pruning, `weight_norm` and `spectral_norm`."""
    if isinstance(hook, (SpectralNorm, WeightNorm)):
        return True
    from torch.nn.utils.prune import BasePruningMethod  # 20 ms, which only pruned models need

    return isinstance(hook, BasePruningMethod)


def refresh_kernels(module: nn.Module) -> None:
    """Compute the kernels inside a module anew, as eval mode has them.

    An optimizer step since the last forward pass has changed what they are computed from.
    """
    for submodule in module.modules():
        for hook in forward_pre_hooks(submodule):
            if computes_kernel(hook):
                training, submodule.training = submodule.training, False  # where spectral_norm moves its vectors
                try:
                    hook(submodule, ())
                finally:
                    submodule.training = training
