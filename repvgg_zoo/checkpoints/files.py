"""Reading checkpoint files."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .errors import CheckpointError, abbreviate
from .state_dicts import StateDict

__all__ = ['FILE_SUFFIXES', 'read_checkpoint', 'read_safetensors_header']

FILE_SUFFIXES = ('.safetensors', '.pth', '.pt', '.tar', '.bin')
"""What the names of checkpoint files end in."""

_CONTAINERS = ('state_dict', 'model')
_EMA_CONTAINERS = ('state_dict_ema', 'model_ema')


def read_checkpoint(path: str | Path, *, use_ema: bool = True) -> StateDict:
    """Read the state dict of a `.safetensors` or torch file, as its keys stand.

    A state dict inside a training checkpoint (`state_dict`, `model`) is found; where the file holds an
    exponential moving average too (`state_dict_ema`, `model_ema`), that one is taken unless `use_ema` is
    false. Torch files are read with `weights_only=True`, so no code in them is run. Raises
    `FileNotFoundError`, or `CheckpointError` for a file that cannot be read or holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'no checkpoint file at {str(path)!r}')
    checkpoint = _read_safetensors(path) if _is_safetensors(path) else _read_torch(path)
    containers = (_EMA_CONTAINERS if use_ema else ()) + _CONTAINERS
    if isinstance(checkpoint, Mapping):
        checkpoint = next((checkpoint[name] for name in containers if checkpoint.get(name) is not None), checkpoint)
    if not isinstance(checkpoint, Mapping) or not checkpoint or not all(map(torch.is_tensor, checkpoint.values())):
        raise CheckpointError(
            f'{str(path)!r} holds no state dict, neither bare nor under one of: {", ".join(containers)}'
        )
    return dict(checkpoint)


_SAFETENSORS_DTYPES = {
    'F64': torch.float64,
    'F32': torch.float32,
    'F16': torch.float16,
    'BF16': torch.bfloat16,
    'I64': torch.int64,
    'I32': torch.int32,
    'I16': torch.int16,
    'I8': torch.int8,
    'U8': torch.uint8,
    'BOOL': torch.bool,
}


def _is_safetensors(path: Path) -> bool:
    """By the suffix, or by the format: the length of a header in eight bytes, then the header in JSON."""
    with path.open('rb') as file:
        header_size, first = int.from_bytes(file.read(8), 'little'), file.read(1)
    return path.suffix == '.safetensors' or (first == b'{' and header_size < path.stat().st_size)


def _read_safetensors(path: Path) -> StateDict:
    """Read into memory that the tensors own: the library's reader maps the file, and needs as much again to copy it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, 'pt'):  # the library checks the header
            pass
        with path.open('rb') as file:
            header = read_safetensors_header(file)
            data_start = file.tell()
        header.pop('__metadata__', None)
        if unread := [f'{n} is {e["dtype"]}' for n, e in header.items() if e['dtype'] not in _SAFETENSORS_DTYPES]:
            raise CheckpointError(
                f'{str(path)!r} has tensors of dtypes that are not read: {abbreviate(unread)}; these are: '
                f'{", ".join(_SAFETENSORS_DTYPES)}'
            )
        tensors = {
            name: torch.empty(entry['shape'], dtype=_SAFETENSORS_DTYPES[entry['dtype']], device='cpu')
            for name, entry in sorted(header.items(), key=lambda item: item[1]['data_offsets'])
        }
        by_size = sorted(tensors, key=lambda name: tensors[name].nbytes)
        workers = torch.get_num_threads()  # a thread spends its time with the kernel's copies and page faults
        shares = [
            [(data_start + header[name]['data_offsets'][0], tensors[name]) for name in by_size[worker::workers]]
            for worker in range(workers)
        ]
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(_read_into, repeat(path), shares))
        return tensors
    except SafetensorError as error:
        raise CheckpointError(f'{str(path)!r} is truncated or no safetensors file ({error}); get it again') from error


def read_safetensors_header(file: BinaryIO) -> dict[str, Any]:
    """The header of an open safetensors file, which is then at the end of it: its length in eight bytes, and JSON."""
    return json.loads(file.read(int.from_bytes(file.read(8), 'little')))


def _read_into(path: Path, tensors: Iterable[tuple[int, Tensor]]) -> None:
    """Fill each tensor with the bytes that begin at its offset in a file."""
    with path.open('rb') as file:
        for offset, tensor in tensors:
            file.seek(offset)
            if file.readinto(tensor.view(-1).view(torch.uint8).numpy()) != tensor.nbytes:
                raise CheckpointError(f'{str(path)!r} became shorter while it was read; get it again')


def _read_torch(path: Path) -> Any:
    from argparse import Namespace

    try:
        with torch.serialization.safe_globals([Namespace]):  # timm's training checkpoints hold their arguments
            return torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f'{str(path)!r} is no torch checkpoint or holds more than tensors, and nothing else is read, since '
            'unpickling it can run any code; save its state dict alone, or as safetensors'
        ) from error
    except Exception as error:  # the unpickler raises whatever the bytes lead it to
        raise CheckpointError(
            f'{str(path)!r} is truncated or no torch checkpoint of tensors alone; get it again, or save its state dict'
        ) from error
