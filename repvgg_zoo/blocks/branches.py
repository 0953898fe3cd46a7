"""The branches whose sum is a training-time block. In eval mode each is linear and equal to one convolution.

A branch maps `(N, C_in, H, W)` to `(N, C_out, H / stride, W / stride)`, rounded up. Stride and dilation are read off
its modules, so users can change them by hand, as segmentation recipes do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..reparam.fold import (
    BNStats,
    ConvBN,
    KernelBias,
    centred_kernel,
    fold_branches,
    identity_kernel,
    norm_scale,
    safe_divide,
)
from ..reparam.geometry import Geometry, as_pair, check_is_plain_conv, geometry_of
from ..reparam.kernel_hooks import compute_kernel
from .fast_paths import is_plain, normalise_and_recompute, recomputes

__all__ = [
    'BRANCHES',
    'AvgPoolBranch',
    'Branch',
    'ConvBranch',
    'ConvSpec',
    'DOConvBranch',
    'DiracBranch',
    'ExpandBranch',
    'IdentityBranch',
    'PointConvBranch',
    'ScaledBranch',
    'SubsampledConv2d',
]

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


def _point_conv(
    x: Tensor, kernel: Tensor, bias: Tensor | None, *, kind: type[nn.Module], stride: tuple[int, int], groups: int
) -> Tensor:
    """A 1x1 convolution as one of `CONVOLUTIONS` computes it."""
    if kind is SubsampledConv2d:
        x, stride = x[:, :, :: stride[0], :: stride[1]], (1, 1)
    return F.conv2d(x, kernel, bias, stride, groups=groups)


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


class Branch(nn.Module):
    """The interface of branches. The methods are differentiable, and change nothing."""

    if TYPE_CHECKING:  # TorchScript does not take the annotation
        bn: nn.Module | None

    def geometry(self) -> Geometry:
        """Return the geometry of the branch; raise `FoldError` if it is no convolution."""
        raise NotImplementedError

    def conv_bn(self, dtype: torch.dtype, like: Tensor | None = None) -> ConvBN:
        """Describe the branch in eval mode as one convolution and the normalisation behind it.

        Args:
            dtype: Dtype of a kernel that is computed; one that is a parameter stays as it is.
            like: Kernel of another branch. Without normalisation an identity has no device of its own, and pruning
                changes its width, so it takes both from this kernel.

        Returns:
            A kernel no larger than that of the block, a bias or None, and the normalisation or None.
        """
        raise NotImplementedError

    @torch.jit.unused
    def equivalent_kernel_bias(self, dtype: torch.dtype, like: Tensor | None = None) -> KernelBias:
        """Compute the convolution that the branch is in eval mode; the arguments are those of `conv_bn`."""
        return fold_branches([self.conv_bn(dtype, like)], dtype)

    def set_kernel(self, kernel: Tensor) -> None:
        """Set the parameters so that the equivalent kernel is `kernel`, or as near as the structure allows."""
        raise NotImplementedError

    def norms(self) -> list[nn.Module]:
        """Return the normalisation layers of the branch."""
        return [] if self.bn is None else [self.bn]

    def input_convs(self) -> list[str]:
        """Return paths of the convolution modules that read the input and hold their kernel."""
        return []


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
            diagonal = _diagonal(kernel, self.groups)
            stats.weight.copy_(diagonal * (stats.var.to(diagonal) + stats.eps).sqrt())


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
        self.a.copy_(_diagonal(kernel, self.conv.groups))
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
        first, second = (_per_group(kernel, self.groups) for kernel in (first[:, :, 0, 0], self.conv.weight.to(dtype)))
        kernel = torch.einsum('gomhw,gmi->goihw', second, first).flatten(0, 1)
        bias = torch.einsum('gomhw,gm->go', second, _per_group(first_bias, self.groups)).flatten()
        bias = bias if self.conv.bias is None else bias + self.conv.bias.to(dtype)
        return ConvBN(kernel, bias, self.bn)

    @torch.jit.unused
    def set_kernel(self, kernel: Tensor) -> None:
        self.delta.zero_()
        inner = norm_scale(self.inner_bn, kernel).view(self.groups, 1, -1, 1, 1)
        wanted = _per_group(safe_divide(kernel, norm_scale(self.bn, kernel)), self.groups)
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


def _diagonal(kernel: Tensor, groups: int) -> Tensor:
    """Return the centre tap of each output channel for its own input channel, `(C_out,)`."""
    eye = identity_kernel(kernel.shape[0], kernel.shape[1] * groups, groups, kernel.dtype, kernel.device)
    row, column = kernel.shape[2] // 2, kernel.shape[3] // 2
    return (kernel[:, :, row, column] * eye[:, :, 0, 0]).sum(1)


def _cropped(x: Tensor, crop: tuple[int, int]) -> Tensor:
    """A view without the rows and columns at the border that a smaller kernel does not see."""
    rows, columns = crop
    if rows == 0 and columns == 0:
        return x
    return x[:, :, rows : x.shape[2] - rows, columns : x.shape[3] - columns]


def _per_group(kernel: Tensor, groups: int) -> Tensor:
    """View `(C_out, …)` as `(groups, C_out / groups, …)`."""
    return kernel.view(groups, kernel.shape[0] // groups, *kernel.shape[1:])


BRANCHES = (
    ConvBranch,
    IdentityBranch,
    ScaledBranch,
    DiracBranch,
    DOConvBranch,
    ExpandBranch,
    PointConvBranch,
    AvgPoolBranch,
)
"""The classes whose word is taken for what they compute; a subclass has to be proven, and has no fast path."""
