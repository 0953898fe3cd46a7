"""The fold: batch normalisation and parallel branches into one convolution, on tensors alone.

A RepVGG block is linear up to its activation: a 3x3 convolution, a 1x1 convolution and an identity,
each followed by batch normalisation with fixed statistics, added up. It equals one 3x3 convolution with
a bias (arXiv 2101.03697, section 3.3). With the running statistics μ, σ² and the affine parameters γ, β:

    scale = γ / sqrt(σ² + ε)        W' = W · scale        b' = β + (b - μ) · scale

The 1x1 kernel and the identity act on the centre tap of the 3x3 kernel only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ['BNStats', 'FoldError', 'fold_block']


_CHUNK = 2**16
"""Kernels of one tap that are folded at a time: their nine taps stay in a core's cache, and temporaries small."""


class FoldError(ValueError):
    """The branches cannot be folded; the message says which value stands in the way."""


class BNStats(NamedTuple):
    """What batch normalisation over C channels computes in eval mode; each tensor is `(C,)`."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5

    @classmethod
    def of(cls, norm: nn.Module) -> BNStats:
        """What a normalisation layer computes in eval mode; raises `FoldError` if that is not linear and fixed."""
        mean = getattr(norm, 'running_mean', None)
        if mean is None:
            raise FoldError(f'{norm} keeps no running statistics, so its output depends on the batch')
        if not hasattr(norm, 'eps'):
            raise FoldError(f'its {type(norm).__name__} does not tell its eps; set it as an attribute')
        act = getattr(norm, 'act', None)
        if act is not None and not isinstance(act, nn.Identity):
            raise FoldError(f'{norm} has an activation, which is not linear')
        return cls(mean, norm.running_var, getattr(norm, 'weight', None), getattr(norm, 'bias', None), norm.eps)

    def scale_shift(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """BN(y) = y · scale + shift, both `(C,)`: scale = γ / sqrt(σ² + ε), shift = β - μ · scale."""
        device = self.mean.device
        if device.type == 'mps' and dtype == torch.float64:  # it has none
            device = torch.device('cpu')
        scale = (self.var.to(device, dtype) + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight.to(device, dtype)
        shift = -self.mean.to(device, dtype) * scale
        if self.bias is not None:
            shift = shift + self.bias.to(device, dtype)
        return scale, shift

    def check(self) -> None:
        """Raise `FoldError` if a variance is negative, or anything infinite or NaN."""
        if not bool((good := (self.var >= 0) & self.var.isfinite()).all()):
            bad = int((~good).nonzero()[0])
            raise FoldError(
                f'running variance {self.var[bad].item()} in channel {bad}; it must be finite and not negative'
            )
        scale, shift = self.scale_shift()
        if not bool((finite := scale.isfinite() & shift.isfinite()).all()):
            bad = int((~finite).nonzero()[0])
            raise FoldError(f'running mean, weight or bias of channel {bad} is not finite')


def fold_block(
    kernel_kxk: Tensor,
    bn_kxk: BNStats,
    kernel_1x1: Tensor,
    bn_1x1: BNStats,
    bn_identity: BNStats | None = None,
    *,
    bias_kxk: Tensor | None = None,
    bias_1x1: Tensor | None = None,
    out: Tensor | None = None,
    sum_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """W' = W_kxk · s_kxk + pad(W_1x1 · s_1x1 + I · s_id), b' = the sum of the three shifts.

    With s = γ / sqrt(σ² + ε) of each branch, and I the identity of a grouped convolution: output channel
    i reads input channel `i mod (C_in / groups)` of its group.

    Shapes: `kernel_kxk` `(C_out, C_in / groups, k, k)` with k odd, `kernel_1x1`
    `(C_out, C_in / groups, 1, 1)`; returns a kernel like `kernel_kxk` (its dtype, device and memory
    format) and a bias `(C_out,)`.

    Scales are computed in `sum_dtype`. Away from the centre tap the kernel is one product, rounded twice; the
    centre tap sums three terms that may cancel, and is summed in `sum_dtype`. Half-precision kernels are
    folded in float32 and rounded last. `out` takes the kernel; it may be `kernel_kxk` itself.
    """
    dtype = kernel_kxk.dtype
    scale, shift = bn_kxk.scale_shift(sum_dtype)
    if bias_kxk is not None:
        shift = shift + bias_kxk.to(scale) * scale
    scale_1x1, shift_1x1 = bn_1x1.scale_shift(sum_dtype)
    if bias_1x1 is not None:
        shift_1x1 = shift_1x1 + bias_1x1.to(scale) * scale_1x1
    shift = shift + shift_1x1

    if bn_identity is not None:
        scale_identity, shift_identity = bn_identity.scale_shift(sum_dtype)
        shift = shift + shift_identity

    c_out, c_in = kernel_kxk.shape[:2]
    row, column = kernel_kxk.shape[2] // 2, kernel_kxk.shape[3] // 2
    wide_scale = scale.to(kernel_kxk.device, torch.promote_types(dtype, torch.float32)).view(-1, 1, 1, 1)
    kernel = torch.empty_like(kernel_kxk) if out is None else out
    for first in range(0, c_out, rows := max(1, _CHUNK // c_in)):
        chunk = slice(first, first + rows)
        centre = kernel_kxk[chunk, :, row, column].to(scale) * scale[chunk, None]
        centre.addcmul_(kernel_1x1[chunk, :, 0, 0].to(scale), scale_1x1[chunk, None])
        if bn_identity is not None:
            channels = torch.arange(first, first + len(centre), device=centre.device)
            centre[channels - first, channels % c_in] += scale_identity[chunk]
        kernel[chunk].copy_(kernel_kxk[chunk]).mul_(wide_scale[chunk])
        kernel[chunk, :, row, column] = centre.to(kernel.device)
    return kernel, shift.to(kernel)
