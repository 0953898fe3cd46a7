"""Folders that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ['new_folder']

_OURS = {'config.json', 'model.safetensors', 'training', 'deploy'}


@contextmanager
def new_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder that takes the name `path` when the block ends, and is removed if it fails.

    Raises `FileExistsError`, before anything is written, if there is something at `path`. With
    `overwrite`, a folder that holds nothing but what this package writes is replaced at the end.
    """
    path = Path(path)
    if os.path.lexists(path):
        if not overwrite:
            raise FileExistsError(f'{str(path)!r} exists; choose another path or pass overwrite (--overwrite)')
        if path.is_symlink() or not path.is_dir():
            raise FileExistsError(f'{str(path)!r} is no folder, so it is not overwritten; choose another path')
        if strangers := sorted({entry.name for entry in path.iterdir()} - _OURS):
            raise FileExistsError(
                f'{str(path)!r} holds {strangers[0]!r}, which no model folder does, so it is not overwritten; choose '
                'another path'
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f'.{path.name}.') as scratch:
        partial = Path(scratch) / 'new'
        partial.mkdir()
        yield partial
        if path.exists():
            path.rename(Path(scratch) / 'old')
        partial.rename(path)
