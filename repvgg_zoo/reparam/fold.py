"""The fold: batch normalisation and parallel branches into one convolution, on tensors.

A re-parameterized block is linear up to its activation: branches of convolutions, each followed by batch normalisation
with fixed statistics, added up. Such a sum equals one convolution with a bias (arXiv 2101.03697, section 3.3). Every
function opens with its equation, and every function is differentiable. Kernels are `(C_out, C_in / groups, k, k)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    'BATCH_NORMS',
    'BNStats',
    'BatchNorm',
    'FoldError',
    'KernelBias',
    'centred_kernel',
    'fuse_conv_bn',
    'identity_kernel',
    'norm_scale',
    'safe_divide',
    'sum_kernels',
]

KernelBias: TypeAlias = tuple[Tensor, Tensor]
"""A kernel `(C_out, C_in / groups, k, k)` and a bias `(C_out,)`."""

BatchNorm: TypeAlias = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""The classes of batch normalisation. timm's classes derive from them."""


class FoldError(ValueError):
    """The branches cannot be folded; the message says which value stands in the way.

    Example:
        >>> raise FoldError('running variance -1.0 in channel 3')
        Traceback (most recent call last):
        ...
        repvgg_zoo.reparam.fold.FoldError: running variance -1.0 in channel 3
    """


class BNStats(NamedTuple):
    """Statistics and affine parameters of batch normalisation over C channels; each tensor is `(C,)`."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5

    @classmethod
    def of(cls, norm: nn.Module) -> BNStats:
        """Read a normalisation layer; raise `FoldError` if its eval mode is not linear and fixed."""
        name = type(norm).__name__
        layer: Any = norm  # of any class that has the attributes
        if not isinstance(getattr(norm, 'running_mean', None), Tensor):
            raise FoldError(
                f'{norm} keeps no running statistics; only layers with running_mean, running_var and eps are folded'
            )
        if not hasattr(norm, 'eps'):
            raise FoldError(f'its {name} does not tell its eps; set it as an attribute')
        act = getattr(norm, 'act', None)
        if act is not None and not isinstance(act, nn.Identity):
            raise FoldError(f'{norm} has an activation, which is not linear')
        weight, bias = getattr(norm, 'weight', None), getattr(norm, 'bias', None)
        return cls(layer.running_mean, layer.running_var, weight, bias, layer.eps)

    def scale_shift(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """BN(y) = y · scale + shift, both `(C,)`: scale = γ / sqrt(σ² + ε), shift = β - μ · scale."""
        device = self.mean.device
        if device.type == 'mps' and dtype == torch.float64:  # MPS has no float64
            device = torch.device('cpu')
        scale = (self.var.to(device, dtype) + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight.to(device, dtype)
        shift = -self.mean.to(device, dtype) * scale
        if self.bias is not None:
            shift = shift + self.bias.to(device, dtype)
        return scale, shift

    def check(self) -> None:
        """Raise `FoldError` if a variance is negative, or any value is infinite or NaN."""
        if not bool((good := (self.var >= 0) & self.var.isfinite()).all()):
            bad = int((~good).nonzero()[0])
            raise FoldError(
                f'running variance {self.var[bad].item()} in channel {bad}; it must be finite and not negative'
            )
        scale, shift = self.scale_shift()
        if not bool((finite := scale.isfinite() & shift.isfinite()).all()):
            bad = int((~finite).nonzero()[0])
            raise FoldError(f'running mean, weight or bias of channel {bad} is not finite')


def fuse_conv_bn(kernel: Tensor, bias: Tensor | None, norm: nn.Module | None, dtype: torch.dtype) -> KernelBias:
    """W' = W · scale, b' = b · scale + shift, with the scale and shift of `norm`.

    Args:
        kernel: `(C_out, C_in / groups, k, k)`.
        bias: `(C_out,)`, or None for zeros.
        norm: The normalisation behind the convolution; None or `nn.Identity` for none.
        dtype: Dtype of the computation and of the result.

    Returns:
        A new kernel, which the caller may change in place, and a bias.

    Raises:
        FoldError: The normalisation is not linear in eval mode.

    Example:
        >>> conv, norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8).eval()
        >>> kernel, bias = fuse_conv_bn(conv.weight, conv.bias, norm, torch.float32)
        >>> x = torch.ones(1, 3, 5, 5)
        >>> torch.allclose(F.conv2d(x, kernel, bias), norm(conv(x)), atol=1e-6)
        True
    """
    if norm is None or isinstance(norm, nn.Identity):
        kernel = kernel.to(dtype, copy=True)
        return kernel, kernel.new_zeros(len(kernel)) if bias is None else bias.to(dtype)
    scale, shift = (t.to(kernel.device) for t in BNStats.of(norm).scale_shift(dtype))
    shift = shift if bias is None else shift + bias.to(dtype) * scale
    return kernel.to(dtype) * scale.view(-1, 1, 1, 1), shift


def norm_scale(norm: nn.Module | None, like: Tensor) -> Tensor:
    """scale = γ / sqrt(σ² + ε) as `(C, 1, 1, 1)`, in the dtype and on the device of `like`; 1 without a norm."""
    if norm is None or isinstance(norm, nn.Identity):
        return like.new_ones(())
    return BNStats.of(norm).scale_shift(like.dtype)[0].to(like.device).view(-1, 1, 1, 1)


def sum_kernels(kernels: Sequence[Tensor]) -> Tensor:
    """W = Σ pad(W_i): a smaller kernel acts on the taps around the centre of the largest.

    The kernels are used up: the sum takes the memory of the largest one.

    Args:
        kernels: One or more, each `(C_out, C_in / groups, k_h, k_w)` with odd k_h and k_w.

    Returns:
        A kernel of the largest height and width.
    """
    height, width = (max(kernel.shape[axis] for kernel in kernels) for axis in (2, 3))
    # the first of full size takes the others, so that none is copied or padded
    full = next((i for i, kernel in enumerate(kernels) if kernel.shape[2:] == (height, width)), None)
    total = centred_kernel(kernels[0], height, width) if full is None else kernels[full]
    for index, kernel in enumerate(kernels):
        if index != (full or 0):
            rows, columns = (height - kernel.shape[2]) // 2, (width - kernel.shape[3]) // 2
            centre = total[:, :, rows : rows + kernel.shape[2], columns : columns + kernel.shape[3]]
            centre += kernel
    return total


def centred_kernel(kernel: Tensor, height: int, width: int) -> Tensor:
    """Pad a kernel with zeros to `(C_out, C_in / groups, height, width)`."""
    rows, columns = (height - kernel.shape[2]) // 2, (width - kernel.shape[3]) // 2
    return F.pad(kernel, [columns, columns, rows, rows])


def identity_kernel(out_chs: int, in_chs: int, groups: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """I[o, i] = 1 where output channel o is input channel i: the 1x1 kernel `(C_out, C_in / groups, 1, 1)`.

    Channel o reads input channel `o mod (C_in / groups)` of its group. Rows beyond the identity are zero.
    """
    eye = torch.eye(out_chs // groups, in_chs // groups, dtype=dtype, device=device)
    return eye.repeat(groups, 1)[:, :, None, None]


def safe_divide(kernel: Tensor, divisor: Tensor) -> Tensor:
    """W / d, and 0 where d is 0, because a kernel has no effect behind a scale of 0."""
    return torch.where(divisor == 0, torch.zeros_like(kernel), kernel / torch.where(divisor == 0, 1, divisor))
