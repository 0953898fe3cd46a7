"""Folders that are written whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ['new_folder']


@contextmanager
def new_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder that takes the name `path` when the block ends, and is removed if it fails.

    Raises `FileExistsError`, before anything is written, if there is something at `path`, unless
    `overwrite` is true; it is then replaced at the end.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f'{str(path)!r} exists; choose another path or pass overwrite (--overwrite)')
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f'.{path.name}.') as scratch:
        partial = Path(scratch) / 'new'
        partial.mkdir()
        yield partial
        if path.exists():
            path.rename(Path(scratch) / 'old')
        partial.rename(path)
