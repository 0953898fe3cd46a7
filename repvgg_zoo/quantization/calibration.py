"""The images that give a model its first ranges."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

__all__ = ['checked']


def checked(calibration: Iterable[Tensor]) -> Iterator[Tensor]:
    """Return the batches of a calibration one by one, and refuse what gives no ranges.

    Raises:
        ValueError: There is no batch, or one has values that are not finite.
    """
    index = -1
    for index, batch in enumerate(calibration):
        if not bool(batch.isfinite().all()):
            raise ValueError(f'batch {index} of the calibration has values that are not finite')
        yield batch
    if index < 0:
        raise ValueError('the calibration has no batches; give a few batches of training images')
