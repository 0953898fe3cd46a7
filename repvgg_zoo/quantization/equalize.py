"""Cross-layer equalisation: equal ranges of neighbouring layers, and the same function."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import cast

import torch
from timm.layers import SEModule
from torch import Tensor, nn

from ..blocks.base import ReparamBlock
from ..model import RepVGG
from .deploy_form import refuse_other_forms

__all__ = ['equalize', 'neighbours', 'rescale']

_DEAD_RANGE = 1e-3
"""Channels whose range is below this fraction of the median are not equalized: their bias would become huge."""


@torch.no_grad()
def equalize(model: RepVGG, *, sweeps: int = 10) -> RepVGG:
    """Equalise the ranges of neighbouring layers of the deploy form, in place (arXiv 1906.04721, section 4.1).

    ReLU lets a positive scale through. So each output channel of a convolution is divided by s = sqrt(r1 / r2), and
    the same input channel of the next one is multiplied by s, where r1 and r2 are their largest absolute weights. Then
    both ranges are equal, and the model computes the same. Squeeze-excite multiplies each channel by what it makes of
    the means of all, so its first layer's input channels are multiplied by s too. Blocks of other activations and other
    attention stay as they are, because scaling would change what they compute.

    Only what reads the last stage sees no change: features between the stages are scaled.

    Args:
        model: A RepVGG in the deploy form.
        sweeps: Passes over all pairs of layers.

    Returns:
        The model.

    Raises:
        TypeError: The model is no RepVGG of this package.
        ValueError: The model has branches or is of `prepare_qat`, or no block lets a scale through.

    Example:
        >>> import timm
        >>> equalize(timm.create_model('test_repvgg.cifar10_deploy')).deploy
        True
    """
    pairs = [
        (block, following)
        for block, following in neighbours(model)
        if type(block.act) is nn.ReLU and isinstance(block.attn, (nn.Identity, SEModule))
    ]
    if not pairs:
        raise ValueError('nothing to equalise: no block has ReLU and no other attention than squeeze-excite')
    for _ in range(sweeps):
        for first, second in pairs:
            rescale(first, second, _equal_ranges(first, second))
    return model


def neighbours(model: RepVGG) -> Iterator[tuple[ReparamBlock, ReparamBlock]]:
    """Return each block of the deploy form with the one that follows.

    Raises:
        TypeError: The model is no RepVGG of this package.
        ValueError: The model has branches, is of `prepare_qat`, or has other blocks.
    """
    if not isinstance(model, RepVGG):
        raise TypeError(f'equalisation is for a RepVGG of this package; here is a {type(model).__name__}')
    refuse_other_forms(model)
    blocks = [model.stem, *(block for stage in model.stages for block in stage.children())]
    if others := [type(block).__name__ for block in blocks if not isinstance(block, ReparamBlock)]:
        raise ValueError(f'equalisation is for a chain of RepVGG blocks; here is a {others[0]}')
    return pairwise(cast('list[ReparamBlock]', blocks))


@torch.no_grad()
def rescale(block: ReparamBlock, following: ReparamBlock, scale: Tensor) -> None:
    """Divide a block's output channels by `scale`, and multiply the input channels of what reads them by it."""
    conv = _conv_of(block)
    conv.weight /= scale.view(-1, 1, 1, 1)
    cast('Tensor', conv.bias).div_(scale)
    readers = [_conv_of(following)]
    if isinstance(block.attn, SEModule):
        readers.append(block.attn.fc1)
    for reader in readers:
        by_input = _by_input(reader)
        by_input *= scale.view(reader.groups, 1, -1, 1, 1)


def _conv_of(block: ReparamBlock) -> nn.Conv2d:
    return cast('nn.Conv2d', block.reparam_conv)


def _by_input(conv: nn.Conv2d) -> Tensor:
    """Return the weights as `(groups, C_out / groups, C_in / groups, k, k)`."""
    return conv.weight.view(conv.groups, -1, *conv.weight.shape[1:])


def _equal_ranges(block: ReparamBlock, following: ReparamBlock) -> Tensor:
    """Return the scale of each channel between two blocks, for `rescale`."""
    range_1 = _conv_of(block).weight.abs().amax((1, 2, 3))
    range_2 = _by_input(_conv_of(following)).abs().amax((1, 3, 4)).flatten()
    dead = (range_1 < _DEAD_RANGE * range_1.median()) | (range_2 < _DEAD_RANGE * range_2.median())
    return torch.where(dead | (range_1 == 0) | (range_2 == 0), 1.0, (range_1 / range_2).sqrt())
