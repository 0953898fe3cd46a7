"""The convolution that a block stands for, and the modules that compute it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...reparam.geometry import Geometry, as_pair

__all__ = ['CONVOLUTIONS', 'ConvSpec', 'SubsampledConv2d']

_SAFE_CHS = 16
"""Smallest number of input channels for which strided 1x1 convolutions are safe; see `SubsampledConv2d`."""


class SubsampledConv2d(nn.Conv2d):
    """A strided 1x1 convolution that reads every stride-th pixel first, then convolves with stride 1.

    The function is the same. In PyTorch 2.14 the backward pass of a strided 1x1 convolution over fewer than 16
    channels_last channels, in float32, corrupts memory on some x86 CPUs; the stem is one.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102  TorchScript takes this condition only by itself
            if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
                rows, columns = as_pair(self.stride)
                x = x[:, :, ::rows, ::columns]  # a view, so that autograd keeps no copy
                return F.conv2d(x, self.weight, self.bias, groups=self.groups)
        # a pool of one pixel, unlike a slice, gets its size from the convolution's formula, by which torch.export can
        # tell that the branches fit together
        return F.conv2d(F.avg_pool2d(x, 1, self.stride), self.weight, self.bias, groups=self.groups)


CONVOLUTIONS = (nn.Conv2d, SubsampledConv2d)
"""The classes of the convolutions in branches."""


@dataclass(frozen=True, kw_only=True)
class ConvSpec:
    """The convolution that a block stands for, and the options that its branches are made with."""

    in_chs: int
    out_chs: int
    kernel_size: tuple[int, int] = (3, 3)
    """Two odd numbers."""
    stride: int | tuple[int, int] = 1
    dilation: int | tuple[int, int] = 1
    groups: int = 1
    padding: tuple[int, int] | None = None
    """At most half of the kernel; None for half."""
    padding_mode: str = 'zeros'
    has_identity: bool = False
    """True if the block may have an identity branch."""
    norm_layer: Callable[..., nn.Module] | None = nn.BatchNorm2d
    """None for branches without normalisation."""
    dd: dict[str, Any] = field(default_factory=dict)
    """Device and dtype."""

    def norm(self, chs: int | None = None) -> nn.Module | None:
        """Make a normalisation layer, by default of the output channels."""
        return None if self.norm_layer is None else self.norm_layer(self.out_chs if chs is None else chs, **self.dd)

    def conv(self, kernel_size: tuple[int, int] | None = None, **kwargs: Any) -> nn.Conv2d:
        """Make a convolution without bias, by default of the whole kernel.

        Its padding puts the centre tap where the whole kernel has it, if `crop` is cut off the input.
        """
        size = self.kernel_size if kernel_size is None else kernel_size
        options: dict[str, Any] = dict(
            stride=self.stride,
            padding=tuple(max(p, 0) for p in self._padding(size)),
            dilation=self.dilation,
            groups=self.groups,
            padding_mode=self.padding_mode,
            bias=False,
        )
        if size == (1, 1):
            options |= dict(dilation=1, padding_mode='zeros')
        options |= kwargs
        is_unsafe = size == (1, 1) and as_pair(options['stride']) != (1, 1) and self.in_chs < _SAFE_CHS
        layer = SubsampledConv2d if is_unsafe else nn.Conv2d
        return layer(self.in_chs, self.out_chs, size, **options, **self.dd)

    def crop(self, kernel_size: tuple[int, int]) -> tuple[int, int]:
        """Return how many rows and columns a smaller kernel leaves out at each border."""
        rows, columns = self._padding(kernel_size)
        return max(-rows, 0), max(-columns, 0)

    def _padding(self, kernel_size: tuple[int, int]) -> tuple[int, int]:
        """Return the padding of a kernel; negative where pixels at the border are left out."""
        half = [d * (k // 2) for d, k in zip(as_pair(self.dilation), self.kernel_size, strict=True)]
        padding = half if self.padding is None else self.padding
        own = [d * (k // 2) for d, k in zip(as_pair(self.dilation), kernel_size, strict=True)]
        rows, columns = (o + p - h for o, p, h in zip(own, padding, half, strict=True))
        return rows, columns

    def parameter(self, *size: int) -> nn.Parameter:
        """Make a parameter of zeros."""
        return nn.Parameter(torch.zeros(*size, **self.dd))

    def geometry(self) -> Geometry:
        """Return the geometry of a branch that has no convolution module of its own."""
        rows, columns = as_pair(self.dilation)
        return Geometry(
            self.in_chs,
            self.out_chs,
            self.groups,
            as_pair(self.stride),
            rows,
            columns,
            self.padding_mode,
            inset=self.crop((1, 1)),
        )
