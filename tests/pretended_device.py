"""A device that this machine lacks, with values: its tensors are of the CPU and say that they are of `cuda`.

An operator that gets tensors of both devices raises an error, as on the device. So code that makes a tensor without
`device=`, or forgets to move one, fails. Optionally the device has no float64, as MPS. The backward pass does not run,
because autograd asks the device for a stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from safetensors import safe_open
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ['DEVICE', 'pretended_device']

CPU, DEVICE = torch.device('cpu'), torch.device('cuda', 0)


class _Pretended(Tensor):
    """Wraps a tensor of the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> _Pretended:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {}, float64=True)


class _Device(TorchDispatchMode):
    """Makes tensors where `device=` says."""

    _mode_key = torch._C._TorchDispatchModeKey.FAKE  # or `.to("cuda")` looks for a driver

    def __init__(self, *, float64: bool) -> None:
        super().__init__()
        self.float64 = float64

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {}, float64=self.float64)


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, float64: bool) -> Any:
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    inside = [t for t in tensors if isinstance(t, _Pretended)]
    outside = [t for t in tensors if not isinstance(t, _Pretended) and t.dim()]
    copies = func.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten._to_copy)
    if inside and outside and func.overloadpacket is torch.ops.aten._has_compatible_shallow_copy_type:
        return False  # so that a module that is moved gets new parameters
    if inside and outside and not copies:
        raise RuntimeError(f'{func} got tensors of two devices, {DEVICE} and {outside[0].device}')
    asked = next((d for d in tree_leaves((args, kwargs)) if isinstance(d, torch.device)), None)
    is_here = bool(inside) if asked is None else asked.type == DEVICE.type
    given, options = tree_map_only(_Pretended, lambda t: t.held, (args, kwargs))
    given, options = tree_map_only(torch.device, lambda d: CPU if d.type == DEVICE.type else d, (given, options))
    result = func(*given, **options)
    converts_here = copies and inside and (result.dtype != inside[0].dtype)
    made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
    if not float64 and (is_here or converts_here) and any(t.dtype == torch.float64 for t in made):
        raise TypeError(f'{func}: this device has no float64')
    if func._schema.is_mutable:
        return args[0] if isinstance(result, Tensor) else result
    return tree_map_only(Tensor, _Pretended, result) if is_here else result


@contextmanager
def _safe_open(path: Path, framework: str, device: str = 'cpu') -> Iterator[SimpleNamespace]:
    """Read as safetensors, which fills the memory of a device by itself."""
    with safe_open(path, framework) as file:
        yield SimpleNamespace(keys=file.keys, get_tensor=lambda key: file.get_tensor(key).to(device))


@contextmanager
def pretended_device(*, float64: bool = True) -> Iterator[torch.device]:
    """Inside `with`, there is the device."""
    with FakeTensorMode():  # it lets a build for CPUs name devices of CUDA
        pass
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=…) moves what it made by an operator
    try:
        with (
            patch('safetensors.safe_open', _safe_open),
            _Device(float64=float64),
            torch.backends.cudnn.flags(enabled=False),
        ):  # whose operators the CPU lacks
            yield DEVICE
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
