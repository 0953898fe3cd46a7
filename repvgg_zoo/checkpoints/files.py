"""Read checkpoint files: safetensors, torch files, and the index of weights in several files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .containers import AVERAGES, PLAIN, weights_of
from .errors import CheckpointError, abbreviate
from .state_dicts import StateDict
from .torch_files import read_torch

__all__ = ['FILE_SUFFIXES', 'INDEX_SUFFIX', 'read_checkpoint']

INDEX_SUFFIX = '.index.json'
"""Suffix of a file that tells which of several files holds which tensor."""

FILE_SUFFIXES = ('.safetensors', '.pth', '.pt', '.tar', '.bin', '.ckpt', INDEX_SUFFIX)
"""Suffixes of checkpoint files."""


def read_checkpoint(path: str | Path, *, use_ema: bool = True, device: str = 'cpu') -> dict[Any, Any]:
    """Read the state dict of a `.safetensors` or torch file, with its keys and values as they are.

    A trainer's checkpoint holds its state dict under a name like `state_dict` or `model`, and possibly an average of
    the weights under one like `state_dict_ema`. Torch files are read with `weights_only=True`, which runs no code from
    the file.

    Args:
        path: A file in either format, with any name, or an index like `model.safetensors.index.json`.
        use_ema: Take the average if the file has one.
        device: Device to read safetensors to. Those of torch files are on the CPU.

    Returns:
        Tensors that own their memory.

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
    if path.name.endswith(INDEX_SUFFIX):
        return _read_shards(path, device)
    content = _read_safetensors(path, device) if _is_safetensors(path) else read_torch(path)
    weights = weights_of(content, use_ema=use_ema)
    if weights is None:
        held = f'; it holds {abbreviate(map(str, content))}' if isinstance(content, Mapping) and content else ''
        raise CheckpointError(
            f'{str(path)!r} holds no state dict, neither by itself nor under one of: '
            f'{", ".join((*AVERAGES, *PLAIN) if use_ema else PLAIN)}{held}'
        )
    return dict(weights)


def _read_shards(path: Path, device: str) -> StateDict:
    """Read weights in several files, as huggingface_hub and accelerate split them."""
    try:
        places = json.loads(path.read_text('utf-8'))['weight_map']
        names = sorted(set(places.values()))
        outside = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f'{str(path)!r} is no index of weights ({error!r}); get it again') from error
    if outside:
        raise CheckpointError(f'{str(path)!r} names files that are not in its folder: {abbreviate(outside)}')
    if missing := [name for name in names if not (path.parent / name).is_file()]:
        raise CheckpointError(f'{str(path)!r} names files that are not there: {abbreviate(missing)}; get them too')
    state_dict: StateDict = {}
    for name in names:
        state_dict |= read_checkpoint(path.parent / name, device=device)
    if lost := [key for key in places if key not in state_dict]:
        raise CheckpointError(f'the files of {str(path)!r} lack {abbreviate(lost)}; get them again')
    return state_dict


_TENSORS_AT_A_TIME = 16
"""Number of tensors copied before the file is mapped anew, so that few of its pages are in memory at a time."""


def _is_safetensors(path: Path) -> bool:
    """Tell by the suffix or by the format, which is the length of a header in eight bytes, then the header in JSON."""
    with path.open('rb') as file:
        header_size, first = int.from_bytes(file.read(8), 'little'), file.read(1)
    return path.suffix == '.safetensors' or (first == b'{' and header_size < path.stat().st_size)


def _read_safetensors(path: Path, device: str) -> StateDict:
    """Read tensors into memory of their own, because tensors that map the file would change with it."""
    from safetensors import safe_open

    tensors: StateDict = {}
    try:
        with safe_open(path, 'pt') as file:
            keys = list(file.keys())
        for first in range(0, len(keys), _TENSORS_AT_A_TIME):
            with safe_open(path, 'pt', device=device) as file:
                for key in keys[first : first + _TENSORS_AT_A_TIME]:
                    tensor = file.get_tensor(key)
                    tensors[key] = tensor.clone() if device == 'cpu' else tensor
    except Exception as error:  # a bad header makes the reader raise errors of any class
        if device != 'cpu':
            _read_safetensors(path, 'cpu')  # raises if the fault is the file's, and else it is the device's
            raise
        raise CheckpointError(f'{str(path)!r} is truncated or no safetensors file ({error}); get it again') from error
    return tensors
