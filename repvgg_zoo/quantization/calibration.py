"""The images that give a model its first ranges."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

__all__ = ['calibration_images']


def calibration_images(calibration: Iterable[Any]) -> Iterator[Tensor]:
    """Return the images of a calibration batch by batch, and refuse what gives no ranges.

    Args:
        calibration: Batches of images as tensors, or as tuples that begin with one, as loaders give them.

    Raises:
        TypeError: A batch is something else.
        ValueError: There is no batch, or one is empty, has integers, or has values that are not finite.
    """
    if isinstance(calibration, Tensor):
        raise TypeError('the calibration is a tensor; give an iterable of batches, a single batch in a list')
    index = -1
    for index, batch in enumerate(calibration):
        images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(images, Tensor):
            raise TypeError(
                f'batch {index} of the calibration is a {type(batch).__name__}; give tensors, or tuples that begin '
                'with one'
            )
        if not images.numel():
            raise ValueError(f'batch {index} of the calibration has no images')
        if not images.is_floating_point():
            raise ValueError(
                f'batch {index} of the calibration is of {images.dtype}; give images as the model takes them'
            )
        if not bool(images.isfinite().all()):
            raise ValueError(f'batch {index} of the calibration has values that are not finite')
        yield images
    if index < 0:
        raise ValueError('the calibration has no batches; give a few batches of training images')
