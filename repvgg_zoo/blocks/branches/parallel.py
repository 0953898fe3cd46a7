"""Branches of one convolution or none: k x k, smaller kernels, the identity."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...reparam.fold import (
    BNStats,
    ConvBN,
    identity_kernel,
    norm_scale,
    safe_divide,
)
from ...reparam.geometry import Geometry, as_pair, check_is_plain_conv, geometry_of
from ..fast_paths import is_plain, normalise_and_recompute, recomputes
from .base import Branch, diagonal
from .spec import CONVOLUTIONS, ConvSpec, SubsampledConv2d

__all__ = ['ConvBranch', 'IdentityBranch', 'ScaledBranch']


class ConvBranch(Branch):
    """A convolution without bias, then normalisation unless `bn` is None.

    A kernel that is smaller than that of the block may have to leave out pixels at the border, which `crop` counts.
    """

    def __init__(self, conv: nn.Conv2d, bn: nn.Module | None, crop: tuple[int, int] = (0, 0)) -> None:
        super().__init__()
        self.conv = conv
        self.bn = bn
        self.crop = crop

    @classmethod
    def of(cls, spec: ConvSpec, kernel_size: tuple[int, int] | None = None, *, norm: bool = True) -> ConvBranch:
        """Make the branch, by default with the whole kernel."""
        size = spec.kernel_size if kernel_size is None else kernel_size
        return cls(spec.conv(size), spec.norm() if norm else None, spec.crop(size))

    def forward(self, x: Tensor) -> Tensor:
        x = _cropped(x, self.crop)
        y = self.conv(x)
        if self.bn is None:
            return y
        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript takes this condition only by itself
            if self._is_point() and recomputes(self.bn, x, y):
                conv = self.conv  # as it is now, whatever happens to it before the backward pass
                stride, kind = as_pair(conv.stride), type(conv)
                compute = functools.partial(_point_conv, bias=conv.bias, kind=kind, stride=stride, groups=conv.groups)
                return normalise_and_recompute(self.bn, y, compute, x, conv.weight)
        return self.bn(y)

    @torch.jit.unused
    def _is_point(self) -> bool:
        """Tell whether the convolution is 1x1 and nothing more."""
        conv = self.conv
        is_point = conv.kernel_size == (1, 1) and conv.padding in ((0, 0), 0, 'same', 'valid')
        return is_plain(conv, CONVOLUTIONS) and is_point and type(conv.weight) is nn.Parameter

    @torch.jit.unused
    def geometry(self) -> Geometry:
        check_is_plain_conv(self.conv, 'convolution', known=CONVOLUTIONS)
        return geometry_of(self.conv, self.crop)

    @torch.jit.unused
    def conv_bn(self, dtype: torch.dtype, like: Tensor | None = None) -> ConvBN:
        return ConvBN(self.conv.weight, self.conv.bias, self.bn)

    @torch.jit.unused
    def set_kernel(self, kernel: Tensor) -> None:
        height, width = self.conv.kernel_size
        rows, columns = (kernel.shape[2] - height) // 2, (kernel.shape[3] - width) // 2
        part = kernel[:, :, rows : rows + height, columns : columns + width]
        self.conv.weight.copy_(safe_divide(part, norm_scale(self.bn, kernel)))

    @torch.jit.unused
    def input_convs(self) -> list[str]:
        return ['conv']


class IdentityBranch(Branch):
    """The block's input, then normalisation unless `bn` is None."""

    def __init__(
        self, chs: int, groups: int, bn: nn.Module | None, *, crop: tuple[int, int] = (0, 0), device: Any = None
    ) -> None:
        super().__init__()
        self.chs, self.groups = chs, groups
        self.bn = bn
        self.crop = crop
        if bn is None:  # a buffer, so that a state dict without an identity branch does not load silently
            self.register_buffer('has_identity', torch.ones((), dtype=torch.int64, device=device))

    @classmethod
    def of(cls, spec: ConvSpec, *, norm: bool = True) -> IdentityBranch:
        bn = spec.norm() if norm else None
        return cls(spec.in_chs, spec.groups, bn, crop=spec.crop((1, 1)), device=spec.dd.get('device'))

    def forward(self, x: Tensor) -> Tensor:
        x = _cropped(x, self.crop)
        return x if self.bn is None else self.bn(x)

    @torch.jit.unused
    def geometry(self) -> Geometry:
        if self.bn is None or isinstance(self.bn, nn.Identity):  # as wide as the other branches
            return Geometry(stride=(1, 1), inset=self.crop)
        chs = len(BNStats.of(self.bn).mean)
        return Geometry(in_chs=chs, out_chs=chs, stride=(1, 1), inset=self.crop)

    @torch.jit.unused
    def conv_bn(self, dtype: torch.dtype, like: Tensor | None = None) -> ConvBN:
        chs = self.chs if like is None else len(like)
        device = like.device if like is not None else next(self.buffers()).device
        eye = identity_kernel(chs, chs, self.groups, dtype, device)
        return ConvBN(eye, None, self.bn)

    @torch.jit.unused
    def set_kernel(self, kernel: Tensor) -> None:
        if self.bn is None:
            return
        stats = BNStats.of(self.bn)
        if stats.weight is not None:
            own = diagonal(kernel, self.groups)
            stats.weight.copy_(own * (stats.var.to(own) + stats.eps).sqrt())


class ScaledBranch(Branch):
    """A convolution or the identity without normalisation, times a scale for each channel.

    This is the operator of the constant-scale blocks of RepOptimizer (arXiv 2205.15242, section 3.1). The scale
    requires no gradient. To search for scales, let it require one.
    """

    bn = None

    def __init__(self, spec: ConvSpec, branch: ConvBranch | IdentityBranch) -> None:
        super().__init__()
        self.branch = branch
        self.scale = nn.Parameter(torch.ones(spec.out_chs, **spec.dd), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        return y * self.scale.view(-1, 1, 1).to(y.dtype)  # or autocast would end here

    @torch.jit.unused
    def geometry(self) -> Geometry:
        return self.branch.geometry()._replace(out_chs=len(self.scale))

    @torch.jit.unused
    def conv_bn(self, dtype: torch.dtype, like: Tensor | None = None) -> ConvBN:
        branch = self.branch.conv_bn(dtype, like)
        scale = self.scale.to(dtype)
        bias = None if branch.bias is None else branch.bias.to(dtype) * scale
        return ConvBN(branch.kernel.to(dtype) * scale.view(-1, 1, 1, 1), bias)

    @torch.jit.unused
    def set_kernel(self, kernel: Tensor) -> None:
        self.branch.set_kernel(safe_divide(kernel, self.scale.to(kernel).view(-1, 1, 1, 1)))

    @torch.jit.unused
    def input_convs(self) -> list[str]:
        return [f'branch.{path}' for path in self.branch.input_convs()]


def _point_conv(
    x: Tensor, kernel: Tensor, bias: Tensor | None, *, kind: type[nn.Module], stride: tuple[int, int], groups: int
) -> Tensor:
    """A 1x1 convolution as one of `CONVOLUTIONS` computes it."""
    if kind is SubsampledConv2d:
        x, stride = x[:, :, :: stride[0], :: stride[1]], (1, 1)
    return F.conv2d(x, kernel, bias, stride, groups=groups)


def _cropped(x: Tensor, crop: tuple[int, int]) -> Tensor:
    """A view without the rows and columns at the border that a smaller kernel does not see."""
    rows, columns = crop
    if rows == 0 and columns == 0:
        return x
    return x[:, :, rows : x.shape[2] - rows, columns : x.shape[3] - columns]
