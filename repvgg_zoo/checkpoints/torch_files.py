"""Read torch files without running code from them, and say why others are refused."""

from __future__ import annotations

import pickle
import re
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch

from .containers import weights_of
from .errors import CheckpointError, abbreviate
from .stand_ins import stand_ins

__all__ = ['read_torch']

_SHARDS = 'torch.distributed.tensor'


def read_torch(path: Path, *, mmap: bool = False) -> Any:
    """Read a torch file with `weights_only=True`; objects of classes that torch refuses are read as empty.

    Classes that the user allows by `torch.serialization.add_safe_globals` are read as themselves.

    Args:
        path: A file that `torch.save` wrote.
        mmap: Read tensors from the file when they are used. It must be a zip file then.

    Raises:
        CheckpointError: The file is truncated or no torch file, or holds a whole module instead of its weights, or
            something that cannot be left out.
    """
    others = _other_classes(path)
    try:
        content = _load(path, others, mmap=mmap)
    except Exception as error:  # bad bytes make the unpickler raise errors of any class
        raise CheckpointError(f'{str(path)!r} {_why_not(path, others, error)}') from error
    if weights_of(content, use_ema=False) is None and _hold_module(others):
        raise CheckpointError(f'{str(path)!r} {_how_to_save_weights(path, others)}')
    return content


def _other_classes(path: Path) -> set[str]:
    """List the classes and functions in a file that torch refuses; old formats do not tell theirs."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # of any class, as in reading
        return set()
    return {name for name in names if not name.startswith(_SHARDS)}


def _load(path: Path, others: set[str], *, mmap: bool) -> Any:
    """Load a file with stand-ins; add what torch refuses next to `others`, and load again."""
    while True:
        try:
            with torch.serialization.safe_globals([*stand_ins(others)]):
                return torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            match = re.search(r'Unsupported global: GLOBAL (\S+) was', str(error))
            refused = match and (match[1] if '.' in match[1] else f'builtins.{match[1]}')
            if refused is None or refused in others:
                raise
            others.add(refused)


def _why_not(path: Path, others: Set[str], error: Exception) -> str:
    text = str(error)
    if 'TorchScript' in text:
        return (
            'is a TorchScript archive; save its weights, by '
            f"torch.save(torch.jit.load({str(path)!r}).state_dict(), 'weights.pth')"
        )
    if 'DTensor' in text or _SHARDS in text:
        return 'holds shards of tensors (DTensor); gather the full state dict before you save it'
    if _hold_module(others):
        return _how_to_save_weights(path, others)
    if match := re.search(r'unsupported GLOBAL (\S+) whose module', text):
        return (
            f'calls {match[1]}, which runs programs or changes files, and which torch never allows; do not trust this '
            'file, and get its weights from elsewhere'
        )
    if others:
        names = ', '.join(sorted(others))
        return (
            f'holds objects of {names}, which torch.load(weights_only=True) refuses. If you trust the file, allow them '
            f'around this call with `with torch.serialization.safe_globals([{names}]):`, or save only its state dict'
        )
    if isinstance(error, pickle.UnpicklingError):
        return (
            'is no torch checkpoint, or holds more than tensors. Nothing else is read, because unpickling can run any '
            'code; save only its state dict, or save it as safetensors'
        )
    return 'is truncated, or no torch checkpoint of tensors; get it again, or save only its state dict'


def _hold_module(names: Set[str]) -> bool:
    return any(name.startswith('torch.nn.modules.') for name in names)


def _how_to_save_weights(path: Path, names: Set[str]) -> str:
    layers = ('torch.', 'collections.', 'builtins.', 'functools.', 'timm.layers.')
    classes = sorted(n for n in names if n.rpartition('.')[2][:1].isupper() and not n.startswith(layers))
    model = 'learner.model' if 'fastai.learner.Learner' in names else 'model'
    return (
        f'holds a whole module ({abbreviate(classes or sorted(names))}), and loading one runs code from the file. If '
        'you trust it, save its weights, where its classes are installed:\n'
        f'    {model.split(".")[0]} = torch.load({str(path)!r}, weights_only=False)\n'
        f"    torch.save({model}.state_dict(), 'weights.pth')"
    )
