"""Folders and files that are written whole or not at all, even if the process is killed."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ['locked', 'new_folder', 'write_text']

_OURS = {'README.md', 'config.json', 'model.safetensors', 'training', 'deploy'}


@contextmanager
def new_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder that takes the name `path` when the block ends, and is removed if it fails.

    Raises `FileExistsError`, before anything is written, if there is something at `path`. With
    `overwrite`, a folder that holds nothing but what this package writes is replaced at the end.
    What a killed process left behind is cleared away by the next one that writes to the same path.
    """
    path = Path(path)
    with locked(path):
        _check_free(path, overwrite)
        partial = _partial(path)
        shutil.rmtree(partial, ignore_errors=True)
        new, old = partial / 'new', partial / 'old'
        try:
            new.mkdir(parents=True)
            yield new
            if path.exists():
                path.rename(old)
            new.rename(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file; whoever reads it meanwhile sees the old one or the new one, whole."""
    partial = _partial(path)
    partial.write_text(text, 'utf-8')
    os.replace(partial, path)


@contextmanager
def locked(path: Path, *, wait_s: float = 0) -> Iterator[None]:
    """Keep other processes of this machine from writing to a path; raises `BlockingIOError` if one is at it for
    longer than `wait_s`.

    The lock ends with the process, however that ends.
    """
    from filelock import FileLock, Timeout

    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    try:
        with FileLock(Path(tempfile.gettempdir()) / f'repvgg-zoo-{name}.lock', timeout=wait_s):
            yield
    except Timeout:
        raise BlockingIOError(f'another process is writing {str(path)!r}; try again when it has ended') from None


def _partial(path: Path) -> Path:
    path = path.absolute()
    return path.with_name(f'.{path.name}.partial')


def _check_free(path: Path, overwrite: bool) -> None:
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise FileExistsError(f'{str(path)!r} exists; choose another path or pass overwrite (--overwrite)')
    if path.is_symlink() or not path.is_dir():
        raise FileExistsError(f'{str(path)!r} is no folder, so it is not overwritten; choose another path')
    if strangers := sorted({entry.name for entry in path.iterdir()} - _OURS):
        raise FileExistsError(
            f'{str(path)!r} holds {strangers[0]!r}, which no model folder does, so it is not overwritten; choose '
            'another path'
        )
