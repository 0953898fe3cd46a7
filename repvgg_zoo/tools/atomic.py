"""Folders and files that are written whole or not at all, even if the process is killed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no lock that a folder could carry
    fcntl = None

__all__ = ['locked', 'new_folder', 'write_text']

_OURS = {'README.md', 'config.json', 'model.safetensors', 'model.onnx', 'training', 'deploy'} | {
    *(f'results.{suffix}' for suffix in ('csv', 'json', 'md')),
    'report.json',
    'report.md',
    *(f'{plot}.{suffix}' for plot in ('speed_accuracy', 'forms', 'runtimes') for suffix in ('png', 'svg')),
}


@contextmanager
def new_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder that takes the name `path` when the block ends, and is removed if it fails.

    Raises `FileExistsError`, before anything is written, if there is something at `path`. With
    `overwrite`, a folder that holds nothing but what this package writes is replaced at the end.
    What a killed process left behind is cleared away by the next one that writes to the same path; a second
    process that writes there at the same time gets a `BlockingIOError`.
    """
    path = Path(path)
    _check_free(path, overwrite)
    partial = _partial(path)
    partial.parent.mkdir(parents=True, exist_ok=True)
    with _owned(partial, path):
        new, old = partial / 'new', partial / 'old'
        _put_back(old, path)
        _check_free(path, overwrite)
        _empty(partial)
        try:
            new.mkdir()
            yield new
            if path.exists():
                path.rename(old)
            new.rename(path)
        finally:
            _put_back(old, path)
            shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file; whoever reads it meanwhile sees the old one or the new one, whole."""
    partial = _partial(path)
    partial.write_text(text, 'utf-8')
    os.replace(partial, path)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time do something to a folder; the others wait. The lock ends with the process."""
    descriptor = _lock(folder, wait=True)
    try:
        yield
    finally:
        _unlock(descriptor)


@contextmanager
def _owned(partial: Path, path: Path) -> Iterator[None]:
    """Make a folder, or take over one whose maker has ended, and keep others from doing so."""
    while True:
        partial.mkdir(exist_ok=True)
        try:
            descriptor = _lock(partial, wait=False)
        except BlockingIOError:
            raise BlockingIOError(f'another process is writing {str(path)!r}; try again when it has ended') from None
        except FileNotFoundError:  # its maker has just removed it
            continue
        if descriptor is None or _is_at(descriptor, partial):
            break
        _unlock(descriptor)
    try:
        yield
    finally:
        _unlock(descriptor)


def _lock(folder: Path, *, wait: bool) -> int | None:
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _unlock(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _partial(path: Path) -> Path:
    path = path.absolute()
    return path.with_name(f'.{path.name}.partial')


def _put_back(old: Path, path: Path) -> None:
    """After an end between the two renames, which left nothing at `path`."""
    if old.exists() and not os.path.lexists(path):
        old.rename(path)


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        shutil.rmtree(entry)


def _check_free(path: Path, overwrite: bool) -> None:
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise FileExistsError(f'{str(path)!r} exists; choose another path or pass overwrite (--overwrite)')
    if path.is_symlink() or not path.is_dir():
        raise FileExistsError(f'{str(path)!r} is no folder, so it is not overwritten; choose another path')
    if strangers := sorted({entry.name for entry in path.iterdir()} - _OURS):
        raise FileExistsError(
            f'{str(path)!r} holds {strangers[0]!r}, which no model folder does, so it is not overwritten; remove it or '
            'choose another path'
        )
