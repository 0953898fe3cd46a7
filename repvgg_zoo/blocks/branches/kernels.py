"""Branches whose kernel is a function of more parameters than it has."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...reparam.fold import (
    ConvBN,
    centred_kernel,
    identity_kernel,
    norm_scale,
    safe_divide,
)
from ...reparam.geometry import Geometry, check_is_plain_conv, geometry_of
from ...reparam.kernel_hooks import compute_kernel
from .base import Branch, diagonal, per_group
from .spec import ConvSpec

__all__ = ['DOConvBranch', 'DiracBranch', 'ExpandBranch', 'OREPABranch']


class _OverparameterisedBranch(Branch):
    """A convolution whose kernel is a function of the parameters, then normalisation unless `bn` is None.

    `conv` is not called. It holds one of the parameters, and stride, padding, dilation and groups.
    """

    if TYPE_CHECKING:
        conv: Any  # `nn.Conv2d`, whose padding is a pair here

    def __init__(self, spec: ConvSpec, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.bn = spec.norm()

    def kernel(self, dtype: torch.dtype) -> Tensor:
        """Compute the kernel `(C_out, C_in / groups, k_h, k_w)` in `dtype`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        if not torch.jit.is_scripting():
            compute_kernel(conv, x)
        kernel = self.kernel(conv.weight.dtype)
        if conv.padding_mode == 'zeros':
            y = F.conv2d(x, kernel, None, conv.stride, conv.padding, conv.dilation, conv.groups)
        else:
            rows, columns = conv.padding
            x = F.pad(x, [columns, columns, rows, rows], conv.padding_mode)
            y = F.conv2d(x, kernel, None, conv.stride, 0, conv.dilation, conv.groups)
        return y if self.bn is None else self.bn(y)

    @torch.jit.unused
    def geometry(self) -> Geometry:
        check_is_plain_conv(self.conv, 'convolution')
        return geometry_of(self.conv)

    @torch.jit.unused
    def conv_bn(self, dtype: torch.dtype, like: Tensor | None = None) -> ConvBN:
        return ConvBN(self.kernel(dtype), None, self.bn)

    @torch.jit.unused
    def set_kernel(self, kernel: Tensor) -> None:
        self.set_kernel_before_bn(safe_divide(kernel, norm_scale(self.bn, kernel)))

    @torch.jit.unused
    def set_kernel_before_bn(self, kernel: Tensor) -> None:
        """Set the parameters so that `kernel(…)` is `kernel`."""
        raise NotImplementedError


class DiracBranch(_OverparameterisedBranch):
    """W' = diag(a) · I + diag(b) · W / ‖W‖, the norm over each output channel (arXiv 1706.00388, section 3.1).

    Initially a = 1 and b = 0.1, as in the authors' code.
    """

    def __init__(self, spec: ConvSpec) -> None:
        super().__init__(spec, spec.conv())
        self.a = nn.Parameter(torch.ones(spec.out_chs, **spec.dd))
        self.b = nn.Parameter(torch.full((spec.out_chs,), 0.1, **spec.dd))

    def kernel(self, dtype: torch.dtype) -> Tensor:
        weight, a, b = self.conv.weight.to(dtype), self.a.to(dtype), self.b.to(dtype)
        norm = torch.linalg.vector_norm(weight, dim=(1, 2, 3), keepdim=True)
        norm = torch.where(norm == 0, torch.ones_like(norm), norm)
        eye = identity_kernel(
            weight.shape[0], weight.shape[1] * self.conv.groups, self.conv.groups, dtype, weight.device
        )
        height, width = self.conv.kernel_size
        return centred_kernel(a.view(-1, 1, 1, 1) * eye, height, width) + b.view(-1, 1, 1, 1) * (weight / norm)

    @torch.jit.unused
    def set_kernel_before_bn(self, kernel: Tensor) -> None:
        out_chs, in_chs = kernel.shape[0], kernel.shape[1] * self.conv.groups
        eye = identity_kernel(out_chs, in_chs, self.conv.groups, kernel.dtype, kernel.device)
        self.a.copy_(diagonal(kernel, self.conv.groups))
        rest = kernel - centred_kernel(self.a.to(kernel).view(-1, 1, 1, 1) * eye, *kernel.shape[2:])
        norm = rest.flatten(1).norm(dim=1)
        self.b.copy_(norm)
        self.conv.weight.copy_(torch.where(norm.view(-1, 1, 1, 1) == 0, self.conv.weight.to(rest), rest))


class DOConvBranch(_OverparameterisedBranch):
    """W' = W ∘ (I + D), depthwise over-parameterised convolution (arXiv 2006.12030, section 3).

    W is a kernel, and D is a matrix over its taps for each input channel, of 9x9 for a 3x3 kernel. The paper's D is
    initially I, and here `I + D` takes its place. So D is initially 0, and weight decay leads there.
    """

    def __init__(self, spec: ConvSpec) -> None:
        super().__init__(spec, spec.conv())
        taps = spec.kernel_size[0] * spec.kernel_size[1]
        self.depthwise = spec.parameter(spec.in_chs, taps, taps)

    def kernel(self, dtype: torch.dtype) -> Tensor:
        out_chs, in_chs, height, width = self.conv.weight.shape
        taps, groups = height * width, self.conv.groups
        weight = self.conv.weight.to(dtype).reshape(groups, out_chs // groups, in_chs, taps)
        depthwise = self.depthwise.to(dtype).view(groups, in_chs, taps, taps)
        added = torch.einsum('gois,gits->goit', weight, depthwise)
        return (weight + added).reshape(out_chs, in_chs, height, width)

    @torch.jit.unused
    def set_kernel_before_bn(self, kernel: Tensor) -> None:
        self.depthwise.zero_()
        self.conv.weight.copy_(kernel)


class ExpandBranch(_OverparameterisedBranch):
    """The kernel of a linear chain 1x1 · k x k · 1x1, wider inside by `rate` (ExpandNets, arXiv 1811.10495, section 3).

    The chain has no biases, so its first 1x1 convolution keeps the zeros of the padding. At the border too, the chain
    equals one convolution by the product of its kernels. `forward` runs this convolution, because a chain over feature
    maps costs `rate`² times as much.
    """

    def __init__(self, spec: ConvSpec, *, rate: int = 4) -> None:
        inner = replace(spec, in_chs=rate * spec.in_chs, out_chs=rate * spec.out_chs)
        first = nn.Conv2d(spec.in_chs, inner.in_chs, 1, groups=spec.groups, bias=False, **spec.dd)
        super().__init__(spec, inner.conv())
        self.first = first.weight
        self.last = nn.Conv2d(inner.out_chs, spec.out_chs, 1, groups=spec.groups, bias=False, **spec.dd).weight

    @torch.jit.unused
    def geometry(self) -> Geometry:
        in_chs = self.first.shape[1] * self.conv.groups
        return super().geometry()._replace(in_chs=in_chs, out_chs=self.last.shape[0])

    def _matrices(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return both 1x1 kernels by group.

        Their shapes are `(g, rate · C_in / g, C_in / g)` and `(g, C_out / g, rate · C_out / g)`.
        """
        first, last = self.first.to(dtype).flatten(1), self.last.to(dtype).flatten(1)
        g = self.conv.groups
        return first.view(g, -1, first.shape[1]), last.view(g, -1, last.shape[1])

    def kernel(self, dtype: torch.dtype) -> Tensor:
        first, last = self._matrices(dtype)
        g, (_, chs, height, width) = self.conv.groups, self.conv.weight.shape
        middle = self.conv.weight.to(dtype).reshape(g, -1, chs * height * width)
        left = (last @ middle).view(g, -1, chs, height * width).transpose(2, 3)  # (g, C_out / g, taps, chs)
        kernel = (left @ first[:, None]).transpose(2, 3)
        return kernel.reshape(-1, first.shape[2], height, width)

    @torch.jit.unused
    def set_kernel_before_bn(self, kernel: Tensor) -> None:
        first, last = (torch.linalg.pinv(matrix) for matrix in self._matrices(kernel.dtype))
        g = self.conv.groups
        middle = torch.einsum('gxo,goihw,giy->gxyhw', last, kernel.view(g, -1, *kernel.shape[1:]), first)
        self.conv.weight.copy_(middle.reshape(self.conv.weight.shape))


class OREPABranch(_OverparameterisedBranch):
    """W' = Σ v_i · W_i, online convolutional re-parameterisation (arXiv 2204.00826, section 3.2).

    Each W_i is a kernel, and each v_i has a scale for each output channel: the kernel itself, a 1x1 kernel spread
    evenly over all taps, one spread by cosines (the frequency prior), 1x1 · k x k, 1x1, and a depthwise separable
    kernel that is eight times as wide inside. The first scales are those of the authors' code. So the branches cost
    nothing on feature maps, and little in memory.
    """

    _RATE = 8
    _SCALES = (0.25, 0.25, 0.0, 0.5, 1.0, 0.5)

    def __init__(self, spec: ConvSpec) -> None:
        super().__init__(spec, spec.conv())
        in_chs, (height, width) = spec.in_chs // spec.groups, spec.kernel_size
        self.average = spec.parameter(spec.out_chs, in_chs)
        self.cosine = spec.parameter(spec.out_chs, in_chs)
        self.delta = spec.parameter(spec.in_chs, in_chs)
        self.chain = spec.parameter(spec.out_chs, in_chs, height * width)
        self.point = spec.parameter(spec.out_chs, in_chs)
        self.depthwise = spec.parameter(spec.in_chs, self._RATE, height * width)
        self.separable = spec.parameter(spec.out_chs, in_chs, self._RATE)
        for parameter in (self.average, self.cosine, self.chain, self.point, self.depthwise, self.separable):
            nn.init.kaiming_uniform_(parameter)
        self.scales = nn.Parameter(torch.tensor(self._SCALES, **spec.dd)[:, None].repeat(1, spec.out_chs))

    def kernel(self, dtype: torch.dtype) -> Tensor:
        return self._scaled(dtype).sum(0)

    def _scaled(self, dtype: torch.dtype) -> Tensor:
        """Return the kernels times their scales, `(6, C_out, C_in / groups, k_h, k_w)`."""
        weight, g = self.conv.weight.to(dtype), self.conv.groups
        out_chs, in_chs, height, width = weight.shape
        eye = identity_kernel(g * in_chs, g * in_chs, g, dtype, weight.device)[:, :, 0, 0]
        middle = per_group(self.delta.to(dtype) + eye, g)
        chain = torch.einsum('gomt,gmi->goit', per_group(self.chain.to(dtype), g), middle)
        depthwise = per_group(self.depthwise.to(dtype), g)
        separable = torch.einsum('goir,girt->goit', per_group(self.separable.to(dtype), g), depthwise)
        ones = weight.new_ones(height, width)
        kernels = [
            weight,
            self.average.to(dtype)[:, :, None, None] * ones / ones.numel(),
            self.cosine.to(dtype)[:, :, None, None] * _cosines(out_chs, ones)[:, None],
            chain.reshape(weight.shape),
            centred_kernel(self.point.to(dtype)[:, :, None, None], height, width),
            separable.reshape(weight.shape),
        ]
        return torch.stack(kernels) * self.scales.to(dtype)[:, :, None, None, None]

    @torch.jit.unused
    def set_kernel_before_bn(self, kernel: Tensor) -> None:
        size = kernel.square().mean().sqrt()
        others = (self.average, self.cosine, self.chain, self.point, self.separable)
        for parameter, part in zip(others, self._scaled(kernel.dtype)[1:], strict=True):
            # a tenth of the kernel each, so that the rest is no difference of large numbers
            parameter.mul_(torch.nan_to_num(0.1 * size / part.square().mean().sqrt(), posinf=1.0))
        rest = kernel - self._scaled(kernel.dtype)[1:].sum(0)
        self.conv.weight.copy_(safe_divide(rest, self.scales[0].to(rest).view(-1, 1, 1, 1)))


def _cosines(out_chs: int, like: Tensor) -> Tensor:
    """Cosines over the rows for the first half of the channels, over the columns for the others, `(C_out, k_h, k_w)`.

    The frequency grows by half a period over the kernel from channel to channel.
    """
    height, width = like.shape
    half = (out_chs + 1) // 2
    rows = _waves(half, height, like)[:, :, None].expand(-1, height, width)
    columns = _waves(out_chs - half, width, like)[:, None, :].expand(-1, height, width)
    return torch.cat([rows, columns])


def _waves(count: int, size: int, like: Tensor) -> Tensor:
    """Cosines of 1, 2, … half periods over `size` places, `(count, size)`."""
    place = (torch.arange(size, device=like.device, dtype=like.dtype) + 0.5) / size
    frequency = torch.arange(1, count + 1, device=like.device, dtype=like.dtype)
    return torch.cos(torch.pi * frequency[:, None] * place)
