"""Cross-layer equalisation: equal ranges of neighbouring layers, and the same function."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from ..blocks.base import ReparamBlock
from ..model import RepVGG

__all__ = ['equalize']

_DEAD_RANGE = 1e-3
"""Channels whose range is below this fraction of the median are not equalized: their bias would become huge."""


@torch.no_grad()
def equalize(model: RepVGG, *, sweeps: int = 10) -> RepVGG:
    """Equalise the ranges of neighbouring layers of the deploy form, in place (arXiv 1906.04721, section 4.1).

    ReLU lets a positive scale through. So each output channel of a convolution is divided by s = sqrt(r1 / r2), and
    the same input channel of the next one is multiplied by s, where r1 and r2 are their largest absolute weights. Then
    both ranges are equal, and the model computes the same. Blocks with squeeze-excite or without ReLU stay as they
    are, because scaling would change what they compute.

    Args:
        model: A RepVGG in the deploy form.
        sweeps: Passes over all pairs of layers.

    Returns:
        The model.

    Raises:
        TypeError: The model is no RepVGG of this package.
        ValueError: The model is in the training form.

    Example:
        >>> import timm
        >>> equalize(timm.create_model('test_repvgg.cifar10_deploy')).deploy
        True
    """
    if not isinstance(model, RepVGG):
        raise TypeError(f'equalisation is for a RepVGG of this package; here is a {type(model).__name__}')
    blocks = [model.stem, *(block for stage in model.stages for block in stage.children())]
    if not all(isinstance(block, ReparamBlock) and block.reparam_conv is not None for block in blocks):
        raise ValueError('equalisation is for the deploy form; call switch_to_deploy() first')
    for _ in range(sweeps):
        for block, following in pairwise(cast('list[ReparamBlock]', blocks)):
            if isinstance(block.attn, nn.Identity) and type(block.act) is nn.ReLU:
                _equalize_pair(cast('nn.Conv2d', block.reparam_conv), cast('nn.Conv2d', following.reparam_conv))
    return model


def _equalize_pair(first: nn.Conv2d, second: nn.Conv2d) -> None:
    # (groups, C_out / groups, C_in / groups, k, k)
    by_input = second.weight.view(second.groups, -1, *second.weight.shape[1:])
    range_1, range_2 = first.weight.abs().amax((1, 2, 3)), by_input.abs().amax((1, 3, 4)).flatten()
    dead = (range_1 < _DEAD_RANGE * range_1.median()) | (range_2 < _DEAD_RANGE * range_2.median())
    scale = torch.where(dead | (range_1 == 0) | (range_2 == 0), 1.0, (range_1 / range_2).sqrt())
    first.weight /= scale.view(-1, 1, 1, 1)
    cast('Tensor', first.bias).div_(scale)
    by_input *= scale.view(second.groups, 1, -1, 1, 1)
