"""The geometry of a convolution: everything that it computes by, except its kernel and bias."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from .fold import FoldError

__all__ = [
    'GATHER',
    'Geometry',
    'agreed',
    'as_pair',
    'build_conv',
    'check_has_values',
    'check_is_plain_conv',
    'geometry_of',
    'is_channels_last',
    'padding_of',
]

GATHER = (
    'gather the full state dict (torch.distributed.checkpoint.state_dict.get_model_state_dict, with '
    'StateDictOptions(full_state_dict=True, cpu_offload=True)), load it into a model that is not sharded, and switch '
    'that one'
)
"""Remedy of the errors about sharded parameters."""


class Geometry(NamedTuple):
    """Geometry of a convolution with a kernel of odd size. A value that has no effect is None."""

    in_chs: int | None = None
    out_chs: int | None = None
    groups: int | None = None
    stride: tuple[int, ...] | None = None
    dilation_rows: int | None = None
    dilation_columns: int | None = None
    padding_mode: str | None = None
    inset: tuple[int, int] | None = None
    """Rows and columns of pixels at each border that the centre of the kernel leaves out: 0 if the padding is half of
    the kernel."""

    def dilation_and_padding(self, kernel: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the dilation and the padding of a kernel `(C_out, C_in / groups, k_h, k_w)`."""
        dilation = self.dilation_rows or 1, self.dilation_columns or 1
        rows, columns = (
            d * (k // 2) - i for d, k, i in zip(dilation, kernel.shape[2:], self.inset or (0, 0), strict=True)
        )
        return dilation, (rows, columns)


def geometry_of(conv: nn.Conv2d, crop: tuple[int, int] = (0, 0)) -> Geometry:
    """Read a convolution; raise `FoldError` if no padding could put its centre tap on its output pixels.

    Args:
        conv: The convolution.
        crop: Rows and columns of pixels at each border that are cut off its input.
    """
    size, dilation, stride = (as_pair(value) for value in (conv.kernel_size, conv.dilation, conv.stride))
    rows, columns = (d * (k // 2) + c - p for d, k, c, p in zip(dilation, size, crop, padding_of(conv), strict=True))
    if min(rows, columns) < 0 or not all(k % 2 for k in size):
        raise FoldError(
            f'its padding {conv.padding} does not centre a {size} kernel of dilation {dilation}; possible are odd '
            'kernels, and paddings up to half of them'
        )
    return Geometry(
        in_chs=conv.weight.shape[1] * conv.groups,
        out_chs=conv.weight.shape[0],
        groups=conv.groups,
        stride=stride,
        dilation_rows=dilation[0] if size[0] > 1 else None,
        dilation_columns=dilation[1] if size[1] > 1 else None,
        padding_mode=conv.padding_mode if any(k > 1 for k in size) else None,
        inset=(rows, columns),
    )


def padding_of(conv: nn.Conv2d) -> tuple[int, int]:
    """Return the rows and columns of padding at each border, also where the convolution has it as a word."""
    if conv.padding == 'valid':
        return 0, 0
    if isinstance(conv.padding, str):  # 'same'
        size, dilation = as_pair(conv.kernel_size), as_pair(conv.dilation)
        return dilation[0] * (size[0] // 2), dilation[1] * (size[1] // 2)
    return as_pair(conv.padding)


def as_pair(value: int | Sequence[int]) -> tuple[int, int]:
    """Two numbers, where a convolution that was changed by hand may have one, or a list."""
    rows, columns = (value, value) if isinstance(value, int) else value
    return rows, columns


def agreed(geometries: Mapping[str, Geometry]) -> Geometry:
    """Return the geometry that all branches share; raise `FoldError` that names two branches if they differ.

    Args:
        geometries: Geometry of each branch, by the branch's name.
    """
    common: dict[str, Any] = {}
    for field in Geometry._fields:
        told = {name: value for name, geometry in geometries.items() if (value := getattr(geometry, field)) is not None}
        if len(set(told.values())) > 1:
            first = next(iter(told))
            other = next(name for name, value in told.items() if value != told[first])
            raise FoldError(
                f'its branches do not fit together: the {field} of {first} is {told[first]}, that of {other} is '
                f'{told[other]}; change all convolutions of a block alike'
            )
        common[field] = next(iter(told.values()), None)
    return Geometry(**common)


def check_is_plain_conv(conv: nn.Module, name: str, *, known: tuple[type[nn.Module], ...] = (nn.Conv2d,)) -> None:
    """Raise `FoldError` if a module is more than a convolution, or if its kernel has no values here.

    Args:
        conv: The module.
        name: What the error calls it.
        known: Classes that compute exactly a convolution. A subclass is accepted too if it has no modules, parameters
            or buffers of its own. The caller then has to prove what it computes.
    """
    kind = type_before_parametrizations(conv)
    if not isinstance(conv, nn.Conv2d):
        raise FoldError(
            f'its {name} is a {kind.__module__}.{kind.__qualname__}, which is no convolution; merge or remove '
            'adapters, quantizers and other wrappers first'
        )
    extra = [] if is_parametrized(conv) else [n for n, _ in conv.named_children()]
    own = {n for n, _ in conv.named_parameters(recurse=False)} | {n for n, _ in conv.named_buffers(recurse=False)}
    extra += sorted(n for n in own if n not in ('weight', 'bias') and not n.startswith(('weight_', 'bias_')))
    if kind not in known and extra:
        raise FoldError(
            f'its {name} is a {kind.__module__}.{kind.__qualname__}, which has {", ".join(extra)} beside a kernel; '
            'merge or remove adapters and fake quantizers first'
        )
    check_has_values(conv.weight, name)


def check_has_values(kernel: Tensor, name: str) -> None:
    """Raise `FoldError` if a kernel is elsewhere: on the meta device, offloaded, or sharded over processes."""
    is_freed = kernel.numel() and not kernel.untyped_storage().nbytes()  # between calls; to read it ends the process
    if hasattr(kernel, 'full_tensor') or kernel.ndim != 4 or is_freed:
        raise FoldError(f'the kernel of its {name} is sharded over processes; {GATHER}')
    if kernel.is_meta:
        raise FoldError(
            f"the kernel of its {name} is on device 'meta' and has no values; load the weights first, or bring "
            'offloaded ones back (accelerate.hooks.remove_hook_from_submodules)'
        )


def is_channels_last(kernels: Iterable[Tensor]) -> bool:
    """Tell whether all kernels whose strides can tell are in channels_last."""
    large = [k for k in kernels if k.ndim == 4 and k.shape[1] > 1 and k.shape[2:] != (1, 1)]
    return bool(large) and all(k.is_contiguous(memory_format=torch.channels_last) for k in large)


def build_conv(
    kernel: Tensor, bias: Tensor, geometry: Geometry, *, replaced: Iterable[nn.Module], training: bool
) -> nn.Conv2d:
    """Make the convolution of a kernel, without copying it.

    Args:
        kernel: `(C_out, C_in / groups, k, k)`.
        bias: `(C_out,)`.
        geometry: Geometry of the convolution.
        replaced: The branches. The convolution requires gradients if one of their kernels does.
        training: Mode of the block.
    """
    dilation, padding = geometry.dilation_and_padding(kernel)
    size = kernel.shape[2], kernel.shape[3]
    groups = geometry.groups or 1
    options: dict[str, Any] = dict(
        stride=geometry.stride or 1,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=geometry.padding_mode or 'zeros',
    )
    conv = nn.Conv2d(kernel.shape[1] * groups, kernel.shape[0], size, device='meta', **options)
    requires_grad = any(p.requires_grad for branch in replaced for p in branch.parameters() if p.ndim > 2)
    conv.weight = nn.Parameter(kernel, requires_grad=requires_grad)
    conv.bias = nn.Parameter(bias, requires_grad=requires_grad)
    return conv.train(training)
