"""Kernels that hooks compute before each forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .._compat import forward_pre_hooks

__all__ = ['compute_kernel', 'computes_kernel', 'refresh_kernels']


def computes_kernel(hook: Callable[..., Any]) -> bool:
    """Tell whether a hook computes a kernel, as torch's pruning, `weight_norm` and `spectral_norm` do."""
    if isinstance(hook, (SpectralNorm, WeightNorm)):
        return True
    from torch.nn.utils.prune import BasePruningMethod  # takes 20 ms, and only modules with hooks need it

    return isinstance(hook, BasePruningMethod)


def refresh_kernels(module: nn.Module) -> None:
    """Compute the kernels inside a module anew, as eval mode does.

    An optimizer step after the last forward pass changes the parameters that they are computed from.
    """
    for submodule in module.modules():
        for hook in forward_pre_hooks(submodule):
            if computes_kernel(hook):
                training, submodule.training = submodule.training, False  # or spectral_norm moves its vectors
                try:
                    hook(submodule, ())
                finally:
                    submodule.training = training


def compute_kernel(conv: nn.Conv2d, x: Tensor) -> None:
    """Run the hooks that compute a kernel, for a convolution whose kernel is read without a call.

    Hooks that bring a kernel from elsewhere cannot run so. Without it, raises `RuntimeError`: a kernel without values
    gives arbitrary outputs.
    """
    for hook in forward_pre_hooks(conv):
        if computes_kernel(hook):
            hook(conv, ())
    is_sharded = hasattr(conv.weight, 'full_tensor') and not hasattr(x, 'full_tensor')
    if is_sharded or conv.weight.device != x.device:
        place = 'sharded over processes' if is_sharded else f'on {conv.weight.device}'
        raise RuntimeError(
            f'the kernel of a branch is {place}, and its input on {x.device}. The branch reads the kernel without '
            'calling its convolution, so offload or shard blocks, not the layers inside them: '
            "preload_module_classes=['MultiBranchBlock'] of accelerate, fully_shard(block)"
        )
