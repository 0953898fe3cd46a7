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
    'ConvBN',
    'FoldError',
    'KernelBias',
    'centred_kernel',
    'check_finite',
    'check_norm',
    'check_result',
    'exact_dtype',
    'fold_branches',
    'fold_exactly',
    'identity_kernel',
    'norm_scale',
    'safe_divide',
]

KernelBias: TypeAlias = tuple[Tensor, Tensor]
"""A kernel `(C_out, C_in / groups, k, k)` and a bias `(C_out,)`."""

BatchNorm: TypeAlias = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""The classes of batch normalisation. timm's classes derive from them."""

_WITHOUT_FLOAT64 = ('mps',)
"""Types of devices on which no tensor can be of float64."""


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
        if not isinstance(getattr(norm, 'running_mean', None), Tensor):
            raise FoldError(
                f'{norm} keeps no running statistics; only layers with running_mean, running_var and eps are folded'
            )
        if not hasattr(norm, 'eps'):
            raise FoldError(f'its {name} does not tell its eps; set it as an attribute')
        act = getattr(norm, 'act', None)
        if act is not None and not isinstance(act, nn.Identity):
            raise FoldError(f'{norm} has an activation, which is not linear')
        return cls.read(norm)

    @classmethod
    def read(cls, norm: nn.Module) -> BNStats:
        """Read a normalisation layer, whatever it does beside.

        The frozen layers of transformers do not tell their eps, which is PyTorch's.
        """
        layer: Any = norm  # of any class that has the attributes
        weight, bias = getattr(norm, 'weight', None), getattr(norm, 'bias', None)
        return cls(layer.running_mean, layer.running_var, weight, bias, getattr(norm, 'eps', 1e-5))

    def scale_shift(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """BN(y) = y · scale + shift, both `(C,)`: scale = γ / sqrt(σ² + ε), shift = β - μ · scale."""
        device = self.mean.device
        if dtype == torch.float64 and device.type in _WITHOUT_FLOAT64:
            device = torch.device('cpu')

        def converted(tensor: Tensor) -> Tensor:
            return tensor.to(device).to(dtype)  # moved first: MPS converts before it moves

        scale = (converted(self.var) + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * converted(self.weight)
        shift = -converted(self.mean) * scale
        if self.bias is not None:
            shift = shift + converted(self.bias)
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


def check_norm(norm: nn.Module | None) -> None:
    """Raise `FoldError` if a norm is not linear in eval mode, or holds values out of range; None and Identity pass."""
    if norm is not None and not isinstance(norm, nn.Identity):
        BNStats.of(norm).check()


class ConvBN(NamedTuple):
    """A convolution, and the normalisation behind it."""

    kernel: Tensor
    """`(C_out, C_in / groups, k_h, k_w)` with odd k_h and k_w."""
    bias: Tensor | None = None
    """`(C_out,)`, or None for zeros."""
    norm: nn.Module | None = None
    """None or `nn.Identity` for none."""

    def scale_shift(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
        """scale = γ / sqrt(σ² + ε), shift = β + (b - μ) · scale, both `(C_out,)`; a scale of None is 1."""
        if self.norm is None or isinstance(self.norm, nn.Identity):
            zeros = torch.zeros(len(self.kernel), dtype=dtype, device=self.kernel.device)
            return None, zeros if self.bias is None else self.bias.to(dtype)
        scale, shift = BNStats.of(self.norm).scale_shift(dtype)
        return scale, shift if self.bias is None else shift + self.bias.to(dtype) * scale


def fold_branches(
    branches: Sequence[ConvBN], dtype: torch.dtype, *, sum_dtype: torch.dtype | None = None
) -> KernelBias:
    """W' = Σ pad(W_i · scale_i), b' = Σ shift_i: parallel branches as one convolution (section 3.3).

    A smaller kernel acts on the taps around the centre of the largest. There branches may cancel, so these taps are
    summed in `sum_dtype`. Every other tap is one product in `dtype`, of a scale computed in `sum_dtype`.

    Args:
        branches: One or more, of the same C_out, C_in and groups.
        dtype: Dtype of the result.
        sum_dtype: Dtype of scales and sums; by default `dtype`.

    Returns:
        A new kernel of the largest height and width, and a bias in `sum_dtype`.

    Raises:
        FoldError: A normalisation is not linear in eval mode.

    Example:
        >>> conv, norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8).eval()
        >>> kernel, bias = fold_branches([ConvBN(conv.weight, conv.bias, norm)], torch.float32)
        >>> x = torch.ones(1, 3, 5, 5)
        >>> torch.allclose(F.conv2d(x, kernel, bias), norm(conv(x)), atol=1e-6)
        True
    """
    sum_dtype = sum_dtype or dtype
    scales, shifts = zip(*(branch.scale_shift(sum_dtype) for branch in branches), strict=True)
    kernels = [branch.kernel for branch in branches]
    height, width = (max(kernel.shape[axis] for kernel in kernels) for axis in (2, 3))
    first = next((i for i, k in enumerate(kernels) if k.shape[2:] == (height, width)), None)
    if first is None:  # 3x1 and 1x3: no kernel has all taps
        first, kernels[0] = 0, centred_kernel(kernels[0], height, width)
    others = [i for i in range(len(kernels)) if i != first]
    rows, columns = (max((kernels[i].shape[axis] for i in others), default=0) for axis in (2, 3))
    is_whole = (rows, columns) == (height, width)
    total = _product(kernels[first], scales[first], sum_dtype if is_whole else dtype)
    taps = window = _centre(total, rows, columns)
    if total.dtype != sum_dtype:  # too narrow to sum in
        taps = _product(_centre(kernels[first], rows, columns), scales[first], sum_dtype)
    for i in others:
        part = _centre(taps, kernels[i].shape[2], kernels[i].shape[3])
        part += _product(kernels[i], scales[i], sum_dtype)
    if taps is not window:
        window.copy_(taps)
    return total.to(dtype), sum(shifts[1:], shifts[0])


def fold_exactly(branches: Sequence[ConvBN], norm: nn.Module | None = None) -> KernelBias:
    """Fold branches for good: in float64, except taps of float32 kernels that only one branch has.

    These are a product in float32, which rounds twice and takes a fraction of the memory and the time.

    Args:
        branches: As for `fold_branches`; computed kernels are in float64.
        norm: The normalisation of their sum.

    Returns:
        A kernel and a bias, which the caller rounds to the dtype of its parameters.
    """
    like = branches[0].kernel
    exact = exact_dtype(like)
    dtype = like.dtype if norm is None and like.dtype == torch.float32 else exact
    kernel, bias = fold_branches(branches, dtype, sum_dtype=exact)
    if norm is not None:
        kernel, bias = fold_branches([ConvBN(kernel, bias, norm)], exact)
    return kernel, bias


def check_result(branches: Sequence[ConvBN], dtype: torch.dtype, norm: nn.Module | None = None) -> None:
    """Raise `FoldError` if the fold would hold values that are not finite in a dtype.

    The largest values of kernels and scales bound those of the fold, and nearly always tell that it fits.

    Args:
        branches: As for `fold_exactly`.
        dtype: What the caller rounds the fold to.
        norm: The normalisation of their sum.
    """
    exact, limit = exact_dtype(branches[0].kernel), torch.finfo(dtype).max
    largest_kernel = largest_bias = torch.zeros((), dtype=torch.float64, device='cpu')
    for branch in branches:
        scale, shift = branch.scale_shift(exact)
        kernel = _largest(branch.kernel)
        largest_kernel = largest_kernel + (kernel if scale is None else kernel * _largest(scale))
        largest_bias = largest_bias + _largest(shift)
    if norm is not None:
        factor, offset = map(_largest, BNStats.of(norm).scale_shift(exact))
        largest_kernel, largest_bias = largest_kernel * factor, largest_bias * factor + offset
    if bool((largest_kernel <= limit) & (largest_bias <= limit)):  # false for NaN
        return
    for name, values in zip(('kernel', 'bias'), fold_exactly(branches, norm), strict=True):
        check_finite(name, values.to(dtype))


def check_finite(name: str, values: Tensor) -> None:
    """Raise `FoldError` if folded values are not finite in their dtype."""
    if not bool((finite := values.isfinite()).all()):
        channel = int((~finite).nonzero()[0, 0])
        raise FoldError(
            f'the folded {name} of channel {channel} is not finite in {values.dtype}, whose largest number is '
            f'{torch.finfo(values.dtype).max:.4g}; if the weights are finite, fold in a wider dtype, by model.float()'
        )


def _largest(values: Tensor) -> Tensor:
    """Return the largest absolute value as float64, on the CPU: no temporary of the tensor's size is made."""
    if not values.numel():
        return torch.zeros((), dtype=torch.float64, device='cpu')
    low, high = values.detach().aminmax()
    return torch.maximum(-low, high).cpu().double()


def exact_dtype(kernel: Tensor) -> torch.dtype:
    """float64, or float32 on a device that has no float64."""
    return torch.float32 if kernel.device.type in _WITHOUT_FLOAT64 else torch.float64


def _product(kernel: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """W · scale, in new memory."""
    if scale is None:
        return kernel.to(dtype, copy=True)
    return kernel.to(dtype) * scale.to(dtype).view(-1, 1, 1, 1)


def _centre(kernel: Tensor, height: int, width: int) -> Tensor:
    """A view of the taps around the centre."""
    rows, columns = (kernel.shape[2] - height) // 2, (kernel.shape[3] - width) // 2
    return kernel[:, :, rows : rows + height, columns : columns + width]


def norm_scale(norm: nn.Module | None, like: Tensor) -> Tensor:
    """scale = γ / sqrt(σ² + ε) as `(C, 1, 1, 1)`, in the dtype and on the device of `like`; 1 without a norm."""
    scale, _ = ConvBN(like, None, norm).scale_shift(like.dtype)
    return like.new_ones(()) if scale is None else scale.view(-1, 1, 1, 1)


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
