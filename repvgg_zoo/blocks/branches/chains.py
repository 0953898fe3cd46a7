"""Branches of two convolutions with a normalisation between them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...reparam.fold import (
    ConvBN,
    fold_branches,
    identity_kernel,
    norm_scale,
    safe_divide,
)
from ...reparam.geometry import Geometry, check_is_plain_conv
from ...reparam.kernel_hooks import compute_kernel
from ..fast_paths import normalise_and_recompute, recomputes
from .base import Branch, per_group
from .spec import CONVOLUTIONS, ConvSpec

__all__ = ['AvgPoolBranch', 'PointConvBranch']


class _ChainBranch(Branch):
    """A 1x1 convolution with normalisation, an operator over the pixels of the kernel, and normalisation again.

    The feature map is padded with the value that the first normalisation makes of zero. So the chain is one convolution
    at the border too (arXiv 2103.13425, section 3.2, transform III).
    """

    if TYPE_CHECKING:
        bn: Any  # of any class
        inner_bn: Any  # of any class with running statistics

    def __init__(self, spec: ConvSpec, conv: nn.Conv2d, inner_chs: int) -> None:
        """`conv` has the stride and the dilation of the chain."""
        super().__init__()
        self.groups, self.padding_mode = spec.groups, spec.padding_mode
        self.kernel_size, self.inset = spec.kernel_size, spec.crop((1, 1))
        self.made_as = spec.geometry()
        self.conv = conv
        self.inner_bn = spec.norm(inner_chs)
        if getattr(self.inner_bn, 'running_mean', None) is None:
            raise ValueError(
                'the Diverse Branch Block pads with the value that normalisation makes of zero, and so needs running '
                'statistics; take a norm_layer with track_running_stats=True'
            )
        self.bn = spec.norm()

    def point(self) -> Tensor:
        """Return the 1x1 kernel `(C_inner, C_in / groups, 1, 1)`."""
        raise NotImplementedError

    def spread(self, y: Tensor) -> Tensor:
        """Apply the operator over the pixels of the kernel to the padded feature map."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        rows = self.conv.dilation[0] * (self.kernel_size[0] // 2) - self.inset[0]
        columns = self.conv.dilation[1] * (self.kernel_size[1] // 2) - self.inset[1]
        border = [columns, columns, rows, rows]
        if self.padding_mode != 'zeros':
            x = F.pad(x, border, self.padding_mode)
        y = self._normalised_point(x)
        if self.padding_mode == 'zeros':
            inside = F.pad(torch.ones_like(y[:1, :1]), border)
            y = F.pad(y, border) + (1 - inside) * self._image_of_zero().to(y.dtype)
        return self.bn(self.spread(y))

    def _normalised_point(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            compute_kernel(self.conv, x)
        kernel = self.point()
        y = F.conv2d(x, kernel, groups=self.groups)
        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript takes this condition only by itself
            if recomputes(self.inner_bn, x, y):
                compute = functools.partial(F.conv2d, groups=self.groups)
                return normalise_and_recompute(self.inner_bn, y, compute, x, kernel)
        return self.inner_bn(y)

    def _image_of_zero(self) -> Tensor:
        bn = self.inner_bn
        image = -bn.running_mean * (bn.running_var + bn.eps).rsqrt()
        if bn.weight is not None:
            image = image * bn.weight + bn.bias
        return image.view(1, -1, 1, 1)

    @torch.jit.unused
    def norms(self) -> list[nn.Module]:
        return [self.inner_bn, self.bn]

    @torch.jit.unused
    def geometry(self) -> Geometry:
        check_is_plain_conv(self.conv, 'convolution', known=CONVOLUTIONS)
        rows, columns = self.conv.dilation
        return self.made_as._replace(stride=self.conv.stride, dilation_rows=rows, dilation_columns=columns)


class PointConvBranch(_ChainBranch):
    """1x1, then k x k: the branch 1x1-KxK of the Diverse Branch Block (arXiv 2103.13425, section 3.3).

    The 1x1 kernel is I + `delta`. Initially `delta` is 0.
    """

    def __init__(self, spec: ConvSpec) -> None:
        super().__init__(spec, spec.conv(padding=0, padding_mode='zeros'), spec.in_chs)
        self.delta = spec.parameter(spec.in_chs, spec.in_chs // spec.groups, 1, 1)

    def point(self) -> Tensor:
        return self._identity_plus(self.delta)

    def _identity_plus(self, delta: Tensor) -> Tensor:
        chs = delta.shape[0]
        return identity_kernel(chs, chs, self.groups, delta.dtype, delta.device) + delta

    def spread(self, y: Tensor) -> Tensor:
        return self.conv(y)

    @torch.jit.unused
    def conv_bn(self, dtype: torch.dtype, like: Tensor | None = None) -> ConvBN:
        point = ConvBN(self._identity_plus(self.delta.to(dtype)), None, self.inner_bn)
        first, first_bias = fold_branches([point], dtype)
        first, second = (per_group(kernel, self.groups) for kernel in (first[:, :, 0, 0], self.conv.weight.to(dtype)))
        kernel = torch.einsum('gomhw,gmi->goihw', second, first).flatten(0, 1)
        bias = torch.einsum('gomhw,gm->go', second, per_group(first_bias, self.groups)).flatten()
        bias = bias if self.conv.bias is None else bias + self.conv.bias.to(dtype)
        return ConvBN(kernel, bias, self.bn)

    @torch.jit.unused
    def set_kernel(self, kernel: Tensor) -> None:
        self.delta.zero_()
        inner = norm_scale(self.inner_bn, kernel).view(self.groups, 1, -1, 1, 1)
        wanted = per_group(safe_divide(kernel, norm_scale(self.bn, kernel)), self.groups)
        self.conv.weight.copy_(safe_divide(wanted, inner).flatten(0, 1))


class AvgPoolBranch(_ChainBranch):
    """1x1, then the average over k x k pixels: the branch 1x1-AVG of the Diverse Branch Block (section 3.3).

    `conv` is not called. It holds the 1x1 kernel, and the stride and dilation of the average.
    """

    def __init__(self, spec: ConvSpec) -> None:
        super().__init__(spec, spec.conv((1, 1), dilation=spec.dilation), spec.out_chs)

    def point(self) -> Tensor:
        return self.conv.weight

    def spread(self, y: Tensor) -> Tensor:
        height, width = self.kernel_size
        if self.conv.dilation == (1, 1):
            return F.avg_pool2d(y, (height, width), self.conv.stride)
        chs = y.shape[1]
        mean = torch.full((chs, 1, height, width), 1 / (height * width), dtype=y.dtype, device=y.device)
        return F.conv2d(y, mean, None, self.conv.stride, 0, self.conv.dilation, chs)

    @torch.jit.unused
    def conv_bn(self, dtype: torch.dtype, like: Tensor | None = None) -> ConvBN:
        kernel, bias = fold_branches([ConvBN(self.conv.weight, None, self.inner_bn)], dtype)
        height, width = self.kernel_size
        return ConvBN(kernel.expand(-1, -1, height, width) / (height * width), bias, self.bn)

    @torch.jit.unused
    def set_kernel(self, kernel: Tensor) -> None:
        wanted = kernel.sum((2, 3), keepdim=True)
        wanted = safe_divide(wanted, norm_scale(self.bn, kernel))
        self.conv.weight.copy_(safe_divide(wanted, norm_scale(self.inner_bn, kernel)))
