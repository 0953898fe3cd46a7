"""Two ways to run branches for less, with the same function, gradients and running statistics.

- Folded for one call: branches whose norms are in eval mode, or that have none, run as one convolution with the
  equivalent kernel (arXiv 2101.03697, section 3.3), whether gradients are recorded or not. Nothing is remembered, so
  nothing can be out of date.
- Recomputed: in training the output of a 1x1 convolution is not kept for its norm's backward pass, but computed again.

In every other case the branches run one by one: if they have hooks or other classes, in tracing, scripting, export and
compilation, inside functional transforms, and under modes that watch operators. Monkey-patches of torch classes (rather
than of module instances) are not detected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from timm.layers import BatchNormAct2d, DropBlock2d, DropPath, FrozenBatchNormAct2d, SplitBatchNorm2d, SyncBatchNormAct
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from .._compat import has_hooks, has_saved_tensor_hooks, is_plain_eager, version_of
from ..reparam.evaluation import fast_path_is_disabled

__all__ = [
    'DROPS',
    'MIN_OUTPUT_PIXELS',
    'NORMS',
    'can_fold',
    'full_precision',
    'is_fixed_norm',
    'is_plain',
    'is_stochastic',
    'moves_statistics',
    'normalise_and_recompute',
    'recomputes',
    'runs_plainly',
]

MIN_OUTPUT_PIXELS = 1024
"""Minimum number of output pixels in the batch for which folding pays off, as measured on CPUs.

Both the cost and the gain grow with the product of input and output channels, so one number holds for every block.
"""

DROPS = (nn.Identity, DropPath, DropBlock2d)
"""Classes of stochastic depth and DropBlock that do nothing in eval mode."""

_FROZEN_NORMS = (FrozenBatchNorm2d, FrozenBatchNormAct2d)
_TRAINED_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
NORMS = (*_FROZEN_NORMS, *_TRAINED_NORMS, BatchNormAct2d, SyncBatchNormAct, SplitBatchNorm2d)
"""Classes of norms whose eval mode is known; their activation is checked where they are folded."""


def full_precision(module: nn.Module) -> Any:
    """Turn autocast off on a module's device inside `with`, so that kernels are as precise as their parameters."""
    kind = next(module.parameters()).device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def is_plain(module: nn.Module, classes: Iterable[type[nn.Module]]) -> bool:
    """Tell whether a module is exactly of one of these classes and has no hooks."""
    return type(module) in classes and not has_hooks(module)


def is_fixed_norm(norm: nn.Module) -> bool:
    """Tell whether a norm is linear now: it normalises with running statistics that it does not move."""
    if is_plain(norm, _FROZEN_NORMS):
        return all(is_plain(child, (nn.Identity,)) for child in norm.children())  # activation and dropout
    return is_plain(norm, _TRAINED_NORMS) and not norm.training and norm.running_mean is not None


def moves_statistics(norm: nn.Module) -> bool:
    """Tell whether a norm normalises with the statistics of the batch. Frozen norms never do, even in train mode."""
    return norm.training and type(norm) not in _FROZEN_NORMS


def runs_plainly(x: Tensor) -> bool:
    """Tell whether operators on a tensor run as they are called, and the fast paths are on."""
    is_dense = type(x) is Tensor and x.layout is torch.strided and not x.is_meta
    return is_dense and is_plain_eager() and not fast_path_is_disabled()


def can_fold(branches: Iterable[nn.Module], classes: Iterable[type[nn.Module]]) -> bool:
    """Tell whether branches compute what their classes say, and their norms are linear now.

    Args:
        branches: The branches.
        classes: Classes of modules that a fold knows, except norms.
    """
    for module in (m for branch in branches for m in branch.modules()):
        if not (is_plain(module, classes) or is_fixed_norm(module)):
            return False
        if isinstance(module, nn.Conv2d) and type(module.weight) is not nn.Parameter:
            return False  # another tensor takes its place for this call
    return True


def is_stochastic(module: nn.Module) -> bool:
    """Tell whether stochastic depth or DropBlock may do anything now."""
    idle = type(module) is nn.Identity or (type(module) in DROPS and not module.training)
    return not idle or has_hooks(module)


def recomputes(norm: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Tell whether autograd may keep `x` in place of its 1x1 convolution `y` for the backward pass of a norm."""
    return (
        norm.training
        and y.requires_grad
        and is_plain(norm, _TRAINED_NORMS)
        and runs_plainly(x)
        and not has_saved_tensor_hooks()  # only the innermost hooks see a tensor, so the others would keep x
    )


def normalise_and_recompute(
    norm: nn.Module, y: Tensor, compute: Callable[[Tensor, Tensor], Tensor], x: Tensor, kernel: Tensor
) -> Tensor:
    """Return `norm(y)` for `y = compute(x, kernel)`, and let autograd keep `x` in place of `y`.

    Args:
        norm: A batch normalisation in train mode.
        y: `(N, C, H, W)`. Memory is saved only if the caller releases it.
        compute: A 1x1 convolution, which costs a ninth of the 3x3 convolution beside it.
        x: Its input, which the convolution keeps for its own backward pass anyway.
        kernel: Its kernel.
    """
    address, shape, kind = y.data_ptr(), y.shape, y.device.type
    has_autocast = torch.amp.is_autocast_available(kind)
    dtype = torch.get_autocast_dtype(kind) if has_autocast and torch.is_autocast_enabled(kind) else None
    used = [t for t in (x, kernel, norm.weight) if isinstance(t, Tensor)]
    versions = [version_of(t) for t in used]

    def pack(saved: Tensor) -> Tensor | None:
        return None if saved.data_ptr() == address and saved.shape == shape else saved

    def unpack(saved: Tensor | None) -> Tensor:
        if [version_of(t) for t in used] != versions:  # autograd does not check what hooks keep
            raise RuntimeError(
                'the input, the kernel or the normalisation of a 1x1 branch has been modified by an inplace operation '
                'since the forward pass; change parameters after the backward pass'
            )
        if saved is not None:
            return saved
        autocast = torch.autocast(kind, dtype, enabled=dtype is not None) if has_autocast else nullcontext()
        with torch.no_grad(), autocast:
            return compute(x, kernel)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return norm(y)
