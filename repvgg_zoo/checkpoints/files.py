"""Read checkpoint files."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError
from .state_dicts import StateDict

__all__ = ['FILE_SUFFIXES', 'read_checkpoint']

FILE_SUFFIXES = ('.safetensors', '.pth', '.pt', '.tar', '.bin')
"""Suffixes of checkpoint files."""

_CONTAINERS = ('state_dict', 'model')
_EMA_CONTAINERS = ('state_dict_ema', 'model_ema')


def read_checkpoint(path: str | Path, *, use_ema: bool = True) -> StateDict:
    """Read the state dict of a `.safetensors` or torch file, with its keys as they are.

    A training checkpoint holds its state dict under `state_dict` or `model`, and an exponential moving average of the
    weights under `state_dict_ema` or `model_ema`. Torch files are read with `weights_only=True`, which runs no code
    from the file.

    Args:
        path: A file in either format, with any name.
        use_ema: Take the average if the file has one.

    Returns:
        Tensors on the CPU that own their memory.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file cannot be read, or holds no state dict.

    Example:
        >>> from repvgg_zoo.pretrained.manifest import weights_dir
        >>> state_dict = read_checkpoint(weights_dir() / 'test_repvgg.cifar10.safetensors')
        >>> state_dict['head.fc.weight'].shape
        torch.Size([10, 96])
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
            f'{str(path)!r} holds no state dict, neither by itself nor under one of: {", ".join(containers)}'
        )
    return dict(checkpoint)


_TENSORS_AT_A_TIME = 16
"""Number of tensors copied before the file is mapped anew, so that few of its pages are in memory at a time."""


def _is_safetensors(path: Path) -> bool:
    """Tell by the suffix or by the format, which is the length of a header in eight bytes, then the header in JSON."""
    with path.open('rb') as file:
        header_size, first = int.from_bytes(file.read(8), 'little'), file.read(1)
    return path.suffix == '.safetensors' or (first == b'{' and header_size < path.stat().st_size)


def _read_safetensors(path: Path) -> StateDict:
    """Read tensors into memory of their own, because tensors that map the file would change with it."""
    from safetensors import SafetensorError, safe_open

    tensors: StateDict = {}
    try:
        with safe_open(path, 'pt') as file:
            keys = list(file.keys())
        for first in range(0, len(keys), _TENSORS_AT_A_TIME):
            with safe_open(path, 'pt') as file:
                for key in keys[first : first + _TENSORS_AT_A_TIME]:
                    tensors[key] = file.get_tensor(key).clone()
    except SafetensorError as error:
        raise CheckpointError(f'{str(path)!r} is truncated or no safetensors file ({error}); get it again') from error
    return tensors


def _read_torch(path: Path) -> Any:
    from argparse import Namespace

    try:
        with torch.serialization.safe_globals([Namespace]):  # timm's training checkpoints hold their arguments
            return torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f'{str(path)!r} is no torch checkpoint, or holds more than tensors. Nothing else is read, because '
            'unpickling can run any code; save only its state dict, or save it as safetensors'
        ) from error
    except Exception as error:  # bad bytes make the unpickler raise errors of any class
        raise CheckpointError(
            f'{str(path)!r} is truncated, or no torch checkpoint of tensors; get it again, or save only its state dict'
        ) from error
