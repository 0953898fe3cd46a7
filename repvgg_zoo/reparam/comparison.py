"""The outputs of a module before and after a change that should keep them."""

from __future__ import annotations

import logging

from torch import Tensor

from .fold import FoldError, exact_dtype
from .tolerance import max_rel_diff

__all__ = ['check_equal', 'largest_difference']

_logger = logging.getLogger(__name__)


def check_equal(before: list[Tensor], after: list[Tensor], *, names: tuple[str, str]) -> None:
    """Log the largest difference of outputs; raise `FoldError` if rounding does not explain it.

    Args:
        before: Outputs before the change.
        after: Outputs after it.
        names: What the messages call the module before and after.
    """
    old, new = names
    if [t.shape for t in before] != [t.shape for t in after]:
        raise FoldError(
            f'the {new} has outputs of shapes {[tuple(t.shape) for t in after]}, the {old} of '
            f'{[tuple(t.shape) for t in before]}. The module is left as it was'
        )
    for expected, actual in zip(before, after, strict=True):
        diff, largest = largest_difference([expected], [actual])
        bound = max_rel_diff(expected.dtype, expected.device) * largest
        _logger.info('%s: largest difference %.3g, largest output %.3g', new, diff, largest)
        if not diff <= bound:
            raise FoldError(
                f'the {new} differs by {diff:.3g} from the {old}, of outputs up to {largest:.3g}; in '
                f'{expected.dtype} rounding explains {bound:.3g}. The module is left as it was'
            )


def largest_difference(before: list[Tensor], after: list[Tensor]) -> tuple[float, float]:
    """Return the largest difference, and the largest output before."""
    pairs = [[t.to(exact_dtype(t)) for t in pair] for pair in zip(before, after, strict=True)]
    diffs = [(new - old).abs().max().item() for old, new in pairs]
    return max(diffs), max(old.abs().max().item() for old, _ in pairs)
