"""The convolutions of a network that can become sums of branches, and the reason why each other one cannot."""

from __future__ import annotations

from typing import Any, NamedTuple

from timm.layers import BatchNormAct2d, Conv2dSame, SyncBatchNormAct
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .._compat import has_hooks
from ..blocks.block_types import BRANCH_TYPES
from ..blocks.branch_sum import BranchSum
from ..reparam.fold import FoldError
from ..reparam.foreign import ForeignBlock
from ..reparam.geometry import as_pair, check_has_values, geometry_of
from ..reparam.pairs import ConvUse, uses_of_convs

__all__ = ['Candidate', 'candidates', 'refusal']

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d, SyncBatchNormAct)


class Candidate(NamedTuple):
    """A convolution with a kernel of more than one pixel."""

    path: str
    use: ConvUse
    norm: nn.Module | None
    """The norm that reads its output, if nothing else does."""
    reason: str | None
    """Why no type of block can take its place; None if there is no such reason."""


def candidates(module: nn.Module, sample: Any) -> list[Candidate]:
    """Find all convolutions with a kernel of more than one pixel.

    Args:
        module: Any module. It runs once, in eval mode.
        sample: An input, as for `reparam.pairs.conv_norm_pairs`.
    """
    in_blocks = {
        m
        for block in module.modules()
        if isinstance(block, BranchSum) or ForeignBlock.of(block) is not None
        for m in block.modules()
    }
    found = []
    for use in uses_of_convs(module, sample):
        if max(as_pair(use.conv.kernel_size)) > 1:
            norm = None if use.norm is None else module.get_submodule(use.norm)
            reason = 'it is a part of a block that has its own branches' if use.conv in in_blocks else _reason(use)
            found.append(Candidate(use.path, use, norm, reason))
    return found


def refusal(candidate: Candidate, block: str) -> str | None:
    """Tell why a block type cannot take the place of a convolution; return None if it can.

    Args:
        candidate: The convolution.
        block: A name of `BLOCKS`.
    """
    if candidate.reason is not None:
        return candidate.reason
    kind, norm = BRANCH_TYPES[block], candidate.norm
    if kind.needs_rows_and_columns and min(as_pair(candidate.use.conv.kernel_size)) == 1:
        return f'a kernel of one row or one column has no branches of {block!r}'
    if kind.is_kernel_type:
        return None
    if norm is None:
        return f'no batch normalisation reads its output and nothing else does, which {block!r} needs'
    if type(norm) not in _NORMS:
        return f'{type(norm).__name__} behind it is not known; block types that need no norm fit'
    if has_hooks(norm):
        return f'{type(norm).__name__} behind it has hooks'
    layer: Any = norm
    if layer.running_mean is None or layer.weight is None or layer.bias is None:
        return f'{type(norm).__name__} behind it has no running statistics or no affine parameters'
    return None


def _reason(use: ConvUse) -> str | None:
    conv = use.conv
    if type(conv) not in (nn.Conv2d, Conv2dSame):
        return f'{type(conv).__name__} computes more than a convolution'
    if is_parametrized(conv) or has_hooks(conv) or not isinstance(conv.weight, Tensor):
        return 'it has hooks or a parametrization'
    own = [n for n, _ in (*conv.named_parameters(recurse=False), *conv.named_buffers(recurse=False))]
    if others := [name for name in own if name not in ('weight', 'bias')]:
        return f'it has {", ".join(others)} beside a kernel'
    if use.shared_with is not None:
        return f'it shares its kernel with {use.shared_with!r}'
    if use.calls != 1:
        return f'it is called {use.calls} times for this input'
    if use.kernel_reader is not None:
        return f'{use.kernel_reader} reads its kernel'
    size = as_pair(conv.kernel_size)
    if not all(k % 2 for k in size):
        return f'a kernel of {size[0]}x{size[1]} has no centre'
    try:
        check_has_values(conv.weight, 'convolution')
        if not isinstance(conv, Conv2dSame):  # which pads as much as its input needs
            geometry_of(conv)
    except FoldError as error:
        return str(error)
    return None
