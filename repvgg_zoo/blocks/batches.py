"""The images that a user gives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

__all__ = ['images_of']


def images_of(batches: Iterable[Any]) -> Iterator[Tensor]:
    """Return the images batch by batch, and refuse what gives no ranges and no statistics.

    Args:
        batches: Tensors `(N, C, H, W)`, or tuples that begin with one, as loaders give them. Empty ones are left out.

    Raises:
        TypeError: `batches` is a tensor, or a batch is something else.
        ValueError: There are no images; or a batch has another shape, integers, or values that are not finite.
    """
    if isinstance(batches, Tensor):
        raise TypeError('the batches are one tensor; give an iterable of batches, a single batch in a list')
    is_empty = True
    for index, given in enumerate(batches):
        batch = given[0] if isinstance(given, (tuple, list)) and given else given
        if not isinstance(batch, Tensor):
            raise TypeError(f'batch {index} is a {type(batch).__name__}; give tensors, or tuples that begin with one')
        if batch.dim() != 4:
            raise ValueError(
                f'batch {index} is of shape {tuple(batch.shape)}, which is no (N, C, H, W); a single batch goes in a '
                'list'
            )
        if not batch.is_floating_point():
            raise ValueError(f'batch {index} is of {batch.dtype}; give images as the model takes them')
        if not bool(batch.isfinite().all()):
            raise ValueError(f'batch {index} has values that are not finite')
        if len(batch):
            is_empty = False
            yield batch
    if is_empty:
        raise ValueError('the batches have no images; give some of the training data')
