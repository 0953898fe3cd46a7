"""What the training-time blocks are sums of: branches that are linear in eval mode, each equal to one 3x3 convolution.

A branch is a module from `(N, C_in, H, W)` to `(N, C_out, H / stride, W / stride)`, rounded up, with two more methods:

- `equivalent_kernel_bias()`: the kernel `(C_out, C_in / groups, 3, 3)` and the bias `(C_out,)` that compute what the
  branch computes in eval mode, as differentiable functions of its parameters and statistics.
- `set_kernel(kernel)`: sets parameters so that this kernel is `kernel`, or as near to it as the branch's structure
  comes.

Kernels are computed in the dtype of the parameters, in float32 at least.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..reparam.fold import BNStats
from .fast_sum import subsample

__all__ = [
    'Average',
    'Conv',
    'DOConv',
    'Dirac',
    'Expand',
    'Identity',
    'KernelBias',
    'Scaled',
    'Shape',
    'SqueezeConv',
    'after',
    'divided',
]

KernelBias: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The convolution that a block stands for, and what its branches are made with."""

    in_chs: int
    out_chs: int
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    padding_mode: str = 'zeros'
    identity: bool = False
    """Whether the block may have an identity branch."""
    norm_layer: Any = nn.BatchNorm2d
    dd: dict[str, Any] = field(default_factory=dict)
    """Device and dtype."""

    def norm(self, chs: int | None = None) -> nn.Module:
        return self.norm_layer(self.out_chs if chs is None else chs, **self.dd)

    def conv(self, kernel_size: int | tuple[int, int] = 3, **kwargs: Any) -> nn.Conv2d:
        """Without bias, padded so that the centre tap lies on the pixels that stride leaves."""
        height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        options: dict[str, Any] = dict(
            stride=self.stride,
            padding=(self.dilation * (height // 2), self.dilation * (width // 2)),
            dilation=self.dilation,
            groups=self.groups,
            padding_mode=self.padding_mode,
            bias=False,
        )
        return nn.Conv2d(self.in_chs, self.out_chs, (height, width), **(options | kwargs), **self.dd)

    def parameter(self, *size: int) -> nn.Parameter:
        return nn.Parameter(torch.zeros(*size, **self.dd))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def after(kernel: Tensor, norm: nn.Module | None, bias: Tensor | None = None) -> KernelBias:
    """A convolution and the normalisation behind it as one: W' = W · scale, b' = b · scale + shift."""
    if norm is None:
        return kernel, kernel.new_zeros(len(kernel)) if bias is None else bias
    scale, shift = (t.to(kernel.device) for t in BNStats.of(norm).scale_shift(kernel.dtype))
    return kernel * scale.view(-1, 1, 1, 1), shift if bias is None else bias * scale + shift


def _scale(norm: nn.Module | None, like: Tensor) -> Tensor:
    """What normalisation multiplies a kernel by, in eval mode, in the kernel's shape."""
    if norm is None:
        return torch.ones((), dtype=like.dtype, device=like.device)
    return BNStats.of(norm).scale_shift(like.dtype)[0].to(like.device).view(-1, 1, 1, 1)


def _centred(kernel: Tensor) -> Tensor:
    """A smaller kernel as a 3x3 kernel."""
    rows, columns = (3 - kernel.shape[2]) // 2, (3 - kernel.shape[3]) // 2
    return F.pad(kernel, [columns, columns, rows, rows])


def _eye(out_chs: int, in_chs: int, groups: int, like: Tensor) -> Tensor:
    """The 1x1 kernel of the identity, `(C_out, C_in / groups, 1, 1)`: rows beyond the identity are zero."""
    eye = torch.eye(out_chs // groups, in_chs // groups, dtype=like.dtype, device=like.device)
    return eye.repeat(groups, 1)[:, :, None, None]


def _diagonal(kernel: Tensor, groups: int) -> Tensor:
    """What a 3x3 kernel multiplies each output channel's own input channel by, `(C_out,)`."""
    eye = _eye(kernel.shape[0], kernel.shape[1] * groups, groups, kernel)
    return (kernel[:, :, 1:2, 1:2] * eye).sum((1, 2, 3))


def _per_group(kernel: Tensor, groups: int) -> Tensor:
    """`(C_out, …)` as `(groups, C_out / groups, …)`."""
    return kernel.view(groups, kernel.shape[0] // groups, *kernel.shape[1:])


def divided(kernel: Tensor, divisor: Tensor) -> Tensor:
    """0 where the divisor is: what a scale of zero multiplies is of no consequence."""
    return torch.where(divisor == 0, torch.zeros_like(kernel), kernel / torch.where(divisor == 0, 1, divisor))


class Conv(nn.Module):
    """A convolution of 3x3 or less without bias, then normalisation unless `bn` is None."""

    def __init__(self, conv: nn.Conv2d, bn: nn.Module | None, *, stride: int = 1) -> None:
        """`stride` is taken in front of the convolution; see `subsample`."""
        super().__init__()
        self.stride = stride
        self.conv = conv
        self.bn = bn

    @classmethod
    def of(cls, shape: Shape, kernel_size: int | tuple[int, int] = 3, *, norm: bool = True) -> Conv:
        bn = shape.norm() if norm else None
        if kernel_size == 1:
            return cls(shape.conv(1, stride=1), bn, stride=shape.stride)
        return cls(shape.conv(kernel_size), bn)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(subsample(x, self.stride))
        return y if self.bn is None else self.bn(y)

    @torch.jit.unused
    def equivalent_kernel_bias(self) -> KernelBias:
        return after(_centred(_wide(self.conv.weight)), self.bn)

    @torch.jit.unused
    def set_kernel(self, kernel: Tensor) -> None:
        height, width = self.conv.kernel_size
        rows, columns = (3 - height) // 2, (3 - width) // 2
        part = kernel[:, :, rows : rows + height, columns : columns + width]
        self.conv.weight.copy_(divided(part, _scale(self.bn, kernel)))


class Identity(nn.Module):
    """The block's input, then normalisation unless `bn` is None."""

    def __init__(self, chs: int, groups: int, bn: nn.Module | None) -> None:
        super().__init__()
        self.chs, self.groups = chs, groups
        self.bn = bn
        if bn is None:  # which would leave no trace in a state dict, so that one without it would load
            self.register_buffer('is_there', torch.ones((), dtype=torch.int64))

    @classmethod
    def of(cls, shape: Shape, *, norm: bool = True) -> Identity:
        return cls(shape.in_chs, shape.groups, shape.norm() if norm else None)

    def forward(self, x: Tensor) -> Tensor:
        return x if self.bn is None else self.bn(x)

    @torch.jit.unused
    def equivalent_kernel_bias(self, chs: int | None = None) -> KernelBias:
        """`chs`: how many channels there are, where the block was made with more."""
        chs = self.chs if chs is None else chs
        like = torch.ones((), dtype=torch.float32) if self.bn is None else _wide(self.bn.running_var)
        return after(_centred(_eye(chs, chs, self.groups, like)), self.bn)

    @torch.jit.unused
    def set_kernel(self, kernel: Tensor) -> None:
        if self.bn is not None and self.bn.weight is not None:
            diagonal = _diagonal(kernel, self.groups)
            self.bn.weight.copy_(diagonal * (self.bn.running_var.to(diagonal) + self.bn.eps).sqrt())


class Scaled(nn.Module):
    """A convolution without normalisation, or with `kernel_size` 0 the identity, times a scale for each channel.

    The operator of the constant-scale blocks of RepOptimizer (arXiv 2205.15242, section 3.1). The scale requires no
    gradient; to search for scales, let it.
    """

    def __init__(self, shape: Shape, kernel_size: int) -> None:
        super().__init__()
        self.branch = Conv.of(shape, kernel_size, norm=False) if kernel_size else Identity.of(shape, norm=False)
        self.scale = nn.Parameter(torch.ones(shape.out_chs, **shape.dd), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) * self.scale.view(-1, 1, 1)

    @torch.jit.unused
    def equivalent_kernel_bias(self, *chs: int) -> KernelBias:
        """`chs` is for the identity."""
        kernel, bias = self.branch.equivalent_kernel_bias(*chs)
        scale = _wide(self.scale)
        return kernel.to(scale) * scale.view(-1, 1, 1, 1), bias.to(scale)

    @torch.jit.unused
    def set_kernel(self, kernel: Tensor) -> None:
        self.branch.set_kernel(divided(kernel, self.scale.to(kernel).view(-1, 1, 1, 1)))


# ------------------------------------------------------------------------- one kernel with more parameters than it has


class _Overparameterised(nn.Module):
    """A 3x3 convolution whose kernel is a function of the parameters, then normalisation."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.stride, self.dilation, self.groups = shape.stride, shape.dilation, shape.groups
        self.padding_mode = shape.padding_mode
        self.bn = shape.norm()

    def kernel(self) -> Tensor:
        """`(C_out, C_in / groups, 3, 3)`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        d = self.dilation
        if self.padding_mode == 'zeros':
            y = F.conv2d(x, self.kernel(), None, self.stride, d, d, self.groups)
        else:
            y = F.conv2d(F.pad(x, [d, d, d, d], self.padding_mode), self.kernel(), None, self.stride, 0, d, self.groups)
        return self.bn(y)

    @torch.jit.unused
    def equivalent_kernel_bias(self) -> KernelBias:
        return after(_wide(self.kernel()), self.bn)

    @torch.jit.unused
    def set_kernel(self, kernel: Tensor) -> None:
        self.set_bare_kernel(divided(kernel, _scale(self.bn, kernel)))

    @torch.jit.unused
    def set_bare_kernel(self, kernel: Tensor) -> None:
        """The parameters so that `kernel()` is `kernel`."""
        raise NotImplementedError


class Dirac(_Overparameterised):
    """diag(a) · I + diag(b) · W / ‖W‖, the norm over each output channel (arXiv 1706.00388, section 3.1).

    Initially a = 1 and b = 0.1, as in the authors' code.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.weight = shape.conv().weight
        self.a = nn.Parameter(torch.ones(shape.out_chs, **shape.dd))
        self.b = nn.Parameter(torch.full((shape.out_chs,), 0.1, **shape.dd))

    def kernel(self) -> Tensor:
        norm = torch.linalg.vector_norm(self.weight, dim=(1, 2, 3), keepdim=True)
        norm = torch.where(norm == 0, torch.ones_like(norm), norm)
        eye = _eye(self.weight.shape[0], self.weight.shape[1] * self.groups, self.groups, self.weight)
        return _centred(self.a.view(-1, 1, 1, 1) * eye) + self.b.view(-1, 1, 1, 1) * (self.weight / norm)

    @torch.jit.unused
    def set_bare_kernel(self, kernel: Tensor) -> None:
        eye = _eye(kernel.shape[0], kernel.shape[1] * self.groups, self.groups, kernel)
        self.a.copy_(_diagonal(kernel, self.groups))
        rest = kernel - _centred(self.a.to(kernel).view(-1, 1, 1, 1) * eye)
        norm = rest.flatten(1).norm(dim=1)
        self.b.copy_(norm)
        self.weight.copy_(torch.where(norm.view(-1, 1, 1, 1) == 0, self.weight.to(rest), rest))


class DOConv(_Overparameterised):
    """Depthwise over-parameterised convolution, kernel = W ∘ (I + D) (arXiv 2006.12030, section 3).

    D is a 9x9 matrix for each input channel, initially 0; W is a kernel. `(I + D)` takes the place of the paper's
    D, whose initial value is the identity, so that weight decay leads there.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.weight = shape.conv().weight
        self.depthwise = shape.parameter(shape.in_chs, 9, 9)

    def kernel(self) -> Tensor:
        out_chs, in_chs = self.weight.shape[:2]
        weight = self.weight.reshape(self.groups, out_chs // self.groups, in_chs, 9)
        depthwise = self.depthwise.view(self.groups, in_chs, 9, 9)
        added = torch.einsum('gois,gits->goit', weight, depthwise)
        return (weight + added).reshape(out_chs, in_chs, 3, 3)

    @torch.jit.unused
    def set_bare_kernel(self, kernel: Tensor) -> None:
        self.depthwise.zero_()
        self.weight.copy_(kernel)


class Expand(_Overparameterised):
    """The kernel of a linear chain 1x1 · 3x3 · 1x1, wider inside by `rate` (ExpandNets, arXiv 1811.10495, section 3).

    The chain has no biases and pads with zeros, which its first 1x1 convolution keeps zero, so padding in its
    middle is padding in front of it, and it equals the convolution by the product of its kernels at the border too.
    That convolution is what is computed: a chain over feature maps costs `rate`² times as much.
    """

    def __init__(self, shape: Shape, *, rate: int = 4) -> None:
        super().__init__(shape)
        g = shape.groups
        inner_in, inner_out = rate * shape.in_chs, rate * shape.out_chs
        self.first = nn.Conv2d(shape.in_chs, inner_in, 1, groups=g, bias=False, **shape.dd).weight
        self.weight = nn.Conv2d(inner_in, inner_out, 3, groups=g, bias=False, **shape.dd).weight
        self.last = nn.Conv2d(inner_out, shape.out_chs, 1, groups=g, bias=False, **shape.dd).weight

    def _matrices(self) -> tuple[Tensor, Tensor]:
        """The 1x1 kernels by group: `(g, rate · C_in / g, C_in / g)` and `(g, C_out / g, rate · C_out / g)`."""
        first, last = self.first.flatten(1), self.last.flatten(1)
        g = self.groups
        return first.view(g, -1, first.shape[1]), last.view(g, -1, last.shape[1])

    def kernel(self) -> Tensor:
        first, last = self._matrices()
        g, width = self.groups, self.weight.shape[1]
        middle = self.weight.reshape(g, -1, width * 9)
        left = (last @ middle).view(g, -1, width, 9).transpose(2, 3)  # (g, C_out / g, 9, width)
        kernel = (left @ first[:, None]).transpose(2, 3)
        return kernel.reshape(-1, first.shape[2], 3, 3)

    @torch.jit.unused
    def set_bare_kernel(self, kernel: Tensor) -> None:
        first, last = (torch.linalg.pinv(matrix.to(kernel)) for matrix in self._matrices())
        g = self.groups
        middle = torch.einsum('gxo,goihw,giy->gxyhw', last, kernel.view(g, -1, *kernel.shape[1:]), first)
        self.weight.copy_(middle.reshape(self.weight.shape))


# -------------------------------------------------------------------- the two chains of the Diverse Branch Block


class _Chain(nn.Module):
    """A 1x1 convolution with normalisation, something over 3x3 pixels, and normalisation again.

    What stands behind the first normalisation sees its image of zero around the feature map, so that the sum of
    both is one convolution at the border too (arXiv 2103.13425, section 3.2, transform III).
    """

    def __init__(self, shape: Shape, inner_chs: int) -> None:
        super().__init__()
        self.stride, self.dilation, self.groups = shape.stride, shape.dilation, shape.groups
        self.padding_mode = shape.padding_mode
        self.inner_bn = shape.norm(inner_chs)
        if getattr(self.inner_bn, 'running_mean', None) is None:
            raise ValueError(
                'the chains of the Diverse Branch Block pad with what normalisation makes of zero, and so need its '
                'running statistics; take a norm_layer with track_running_stats=True'
            )
        self.bn = shape.norm()

    def point(self) -> Tensor:
        """The 1x1 kernel, `(C_inner, C_in / groups, 1, 1)`."""
        raise NotImplementedError

    def spread(self, y: Tensor) -> Tensor:
        """What is done over 3x3 pixels of the padded feature map."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        d = self.dilation
        if self.padding_mode != 'zeros':
            x = F.pad(x, [d, d, d, d], self.padding_mode)
        y = self.inner_bn(F.conv2d(x, self.point(), groups=self.groups))
        if self.padding_mode == 'zeros':
            inside = F.pad(torch.ones_like(y[:1, :1]), [d, d, d, d])
            y = F.pad(y, [d, d, d, d]) + (1 - inside) * self._image_of_zero().to(y.dtype)
        return self.bn(self.spread(y))

    def _image_of_zero(self) -> Tensor:
        bn = self.inner_bn
        image = -bn.running_mean * (bn.running_var + bn.eps).rsqrt()
        if bn.weight is not None:
            image = image * bn.weight.detach() + bn.bias.detach()
        return image.view(1, -1, 1, 1)


class SqueezeConv(_Chain):
    """1x1, then 3x3: the branch 1x1-KxK of the Diverse Branch Block.

    The 1x1 kernel is I + `delta`, and `delta` initially 0.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, shape.in_chs)
        self.delta = shape.parameter(shape.in_chs, shape.in_chs // shape.groups, 1, 1)
        self.conv = shape.conv(padding=0, padding_mode='zeros')

    def point(self) -> Tensor:
        return _eye(self.delta.shape[0], self.delta.shape[0], self.groups, self.delta) + self.delta

    def spread(self, y: Tensor) -> Tensor:
        return self.conv(y)

    @torch.jit.unused
    def equivalent_kernel_bias(self) -> KernelBias:
        first, first_bias = after(_wide(self.point()), self.inner_bn)
        first, second = _per_group(first[:, :, 0, 0], self.groups), _per_group(_wide(self.conv.weight), self.groups)
        kernel = torch.einsum('gomhw,gmi->goihw', second, first).flatten(0, 1)
        bias = torch.einsum('gomhw,gm->go', second, _per_group(first_bias, self.groups)).flatten()
        return after(kernel, self.bn, bias)

    @torch.jit.unused
    def set_kernel(self, kernel: Tensor) -> None:
        self.delta.zero_()
        inner = _scale(self.inner_bn, kernel).view(self.groups, 1, -1, 1, 1)
        wanted = _per_group(divided(kernel, _scale(self.bn, kernel)), self.groups)
        self.conv.weight.copy_(divided(wanted, inner).flatten(0, 1))


class Average(_Chain):
    """1x1, then the average over 3x3 pixels: the branch 1x1-AVG of the Diverse Branch Block."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, shape.out_chs)
        self.weight = shape.conv(1).weight

    def point(self) -> Tensor:
        return self.weight

    def spread(self, y: Tensor) -> Tensor:
        if self.dilation == 1:
            return F.avg_pool2d(y, 3, self.stride)
        chs = y.shape[1]
        mean = torch.full((chs, 1, 3, 3), 1 / 9, dtype=y.dtype, device=y.device)
        return F.conv2d(y, mean, None, self.stride, 0, self.dilation, chs)

    @torch.jit.unused
    def equivalent_kernel_bias(self) -> KernelBias:
        kernel, bias = after(_wide(self.weight), self.inner_bn)
        return after(kernel.expand(-1, -1, 3, 3) / 9, self.bn, bias)

    @torch.jit.unused
    def set_kernel(self, kernel: Tensor) -> None:
        wanted = kernel.sum((2, 3), keepdim=True)
        self.weight.copy_(divided(divided(wanted, _scale(self.bn, kernel)), _scale(self.inner_bn, kernel)))
