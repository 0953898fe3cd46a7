"""The deploy form with a normalisation behind each convolution, as the official `insert_bn.py` makes it."""

from __future__ import annotations

import torch

from ..reparam.fold import BNStats
from ..reparam.foreign import TIMM
from .errors import CheckpointError
from .state_dicts import StateDict

__all__ = ['fold_inserted_bn']

_EPS = 1e-5
"""The official script makes its layers with PyTorch's default."""


def fold_inserted_bn(state_dict: StateDict) -> None:
    """W' = W · scale, b' = shift: fold the normalisation behind each deploy-form convolution into it, in place.

    The official `insert_bn.py` replaces the convolution of a block by one without bias and a normalisation, for
    quantization-aware training.

    Args:
        state_dict: Weights in timm's layout.

    Raises:
        CheckpointError: A part of a block is missing.
        FoldError: The statistics are not finite, or a variance is negative.
    """
    end = f'{TIMM.reparam_conv}.bn.running_var'
    for block in [key.removesuffix(end) for key in state_dict if key.endswith(end)]:
        conv = f'{block}{TIMM.reparam_conv}.'
        try:
            kernel = state_dict.pop(f'{conv}conv.weight')
            mean, var, weight, bias = (
                state_dict.pop(f'{conv}bn.{name}') for name in ('running_mean', 'running_var', 'weight', 'bias')
            )
        except KeyError as error:
            raise CheckpointError(f'{conv}bn is incomplete: {error.args[0]} is missing') from None
        state_dict.pop(f'{conv}bn.num_batches_tracked', None)
        stats = BNStats(mean, var, weight, bias, _EPS)
        stats.check()
        scale, shift = stats.scale_shift()
        dtype = torch.promote_types(kernel.dtype, torch.float32)
        state_dict[f'{conv}weight'] = (kernel * scale.view(-1, 1, 1, 1)).to(dtype)
        state_dict[f'{conv}bias'] = shift.to(dtype)
