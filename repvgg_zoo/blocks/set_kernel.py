"""The inverse of the fold: the parameters of branches from one kernel and one bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reparam.fold import BATCH_NORMS, centred_kernel, exact_dtype, norm_scale, safe_divide
from .branch_sum import BranchSum
from .fast_paths import full_precision

__all__ = ['set_equivalent_kernel_bias']

_NOISE = 0.1
"""Size of the random part of each branch, relative to the kernel that the branches share."""

_GAIN = 3.0
"""Size of a kernel in front of its normalisation, relative to its size behind.

The larger a normalised kernel, the less a step of training turns it: by 1 / gain². With a gain of 1, fine-tuning the
bundled weights for four epochs ended a point below the same from their training form; with 3 and with 10 it was on a
par.
"""


@torch.no_grad()
def set_equivalent_kernel_bias(
    block: BranchSum, kernel: Tensor, bias: Tensor | None, *, generator: torch.Generator | None = None
) -> None:
    """Set the parameters of the branches so that `equivalent_kernel_bias()` is as given: the inverse of the fold.

    The normalisation layers are reset. The branches share the kernel in equal parts, as far as their structure allows.
    The first branch can have any kernel, and so takes the rest.

    Args:
        block: A sum of branches.
        kernel: `(C_out, C_in / groups, k_h, k_w)`, on any device.
        bias: `(C_out,)`, or None for branches without normalisation, which have no bias.
        generator: See `unfold`.
    """
    main, *others = block.named_branches().values()
    last_norms: list[Any] = [block.norm] if block.norm is not None else [branch.bn for branch in (main, *others)]
    bias_holder = last_norms[0]
    if bias is not None and bias_holder.bias is None:
        raise ValueError(
            f'the bias of a folded block goes into {bias_holder}, which has none; take one with affine=True'
        )
    for module in block.modules():
        if isinstance(module, BATCH_NORMS):
            module.reset_parameters()
    for norm in last_norms:
        if norm is not None:
            norm.weight /= _GAIN
    own = next(p for p in block.parameters() if p.ndim == 4)  # the weights of a file are on the CPU
    dtype = exact_dtype(own)
    kernel = kernel.to(own.device, dtype)
    with full_precision(block):
        rest = safe_divide(kernel, norm_scale(block.norm, kernel))
        share = rest / (1 + len(others))
        # of each pair of channels, because their ranges may differ much
        size = share.square().mean((2, 3), keepdim=True).sqrt()
        for branch in others:
            noise = torch.randn(share.shape, dtype=dtype, generator=generator, device='cpu').to(share.device)
            branch.set_kernel(share + _NOISE * size * noise)
        for branch in others:
            rest = rest - _padded(branch.equivalent_kernel_bias(dtype, like=rest)[0], rest)
        main.set_kernel(rest)
        if bias is not None:
            bias = bias.to(own.device, dtype)
            bias_holder.bias += (bias - block.equivalent_kernel_bias(dtype)[1]).to(bias_holder.bias)


def _padded(kernel: Tensor, like: Tensor) -> Tensor:
    return centred_kernel(kernel, like.shape[2], like.shape[3])
