"""Folders and files that are written whole or not at all, even if the process is killed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows cannot lock a folder
    fcntl = None  # type: ignore[assignment]

__all__ = ['locked', 'new_folder', 'write_text']


@contextmanager
def new_folder(path: str | Path, *, overwrite: bool = False, owned: Collection[str] = ()) -> Iterator[Path]:
    """Yield an empty folder that takes the name `path` when the block ends, and is removed if the block fails.

    The next call for the same path clears away what a killed process left behind.

    Args:
        path: The folder to write.
        overwrite: Replace the folder if it exists and holds owned files only.
        owned: Paths of the files, relative to the folder, that the caller writes and so may replace.

    Yields:
        The empty folder.

    Raises:
        FileExistsError: The path exists, and `overwrite` is off or it holds something else. Nothing is written.
        BlockingIOError: Another process is writing the same path.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / 'model'
        >>> with new_folder(target) as folder:
        ...     _ = (folder / 'config.json').write_text('{}')
        >>> [path.name for path in target.iterdir()]
        ['config.json']
    """
    path = Path(path)
    _check_free(path, overwrite, owned)
    partial = _partial(path)
    partial.mkdir(parents=True, exist_ok=True)
    with locked(partial, busy=f'another process is writing {str(path)!r}; try again when it has ended'):
        new, old = partial / 'new', partial / 'old'
        _restore(old, path)
        _check_free(path, overwrite, owned)
        for leftover in partial.iterdir():
            shutil.rmtree(leftover)
        try:
            new.mkdir()
            yield new
            if path.exists():
                path.rename(old)
            new.rename(path)
        finally:
            _restore(old, path)
            shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file. Readers see the old text or the new one, never a part.

    Args:
        path: The file.
        text: Its content, written in UTF-8.

    Example:
        >>> import tempfile
        >>> page = Path(tempfile.mkdtemp()) / 'page.md'
        >>> write_text(page, 'text')
        >>> page.read_text()
        'text'
    """
    partial = _partial(path)
    partial.write_text(text, 'utf-8')
    os.replace(partial, path)


@contextmanager
def locked(folder: Path, *, busy: str | None = None) -> Iterator[None]:
    """Let one process at a time work on a folder. The lock ends with the process.

    Args:
        folder: An existing folder.
        busy: Error message if another process has the lock. Without it, wait for that process.

    Yields:
        Nothing.

    Raises:
        BlockingIOError: Another process has the lock, or has just removed the folder.

    Example:
        >>> import tempfile
        >>> with locked(Path(tempfile.mkdtemp())):
        ...     pass
    """
    if fcntl is None:
        yield
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        raise BlockingIOError(busy) from None
    try:
        if not _lock(descriptor, folder, wait=busy is None):
            raise BlockingIOError(busy)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path, *, wait: bool) -> bool:
    """Whether the lock was free and the folder is still the one that was opened."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return os.path.samestat(os.fstat(descriptor), os.stat(folder))
    except (BlockingIOError, FileNotFoundError):
        return False


def _partial(path: Path) -> Path:
    path = path.absolute()
    return path.with_name(f'.{path.name}.partial')


def _restore(old: Path, path: Path) -> None:
    """Restore the old folder if a run died between the two renames."""
    if old.exists() and not os.path.lexists(path):
        old.rename(path)


def _check_free(path: Path, overwrite: bool, owned: Collection[str]) -> None:
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise FileExistsError(f'{str(path)!r} exists; choose another path or pass overwrite (--overwrite)')
    if path.is_symlink() or not path.is_dir():
        raise FileExistsError(f'{str(path)!r} is no folder, so it is not overwritten; choose another path')
    files = (entry for entry in path.rglob('*') if entry.is_symlink() or not entry.is_dir())
    names = (entry.relative_to(path).as_posix() for entry in files)
    if foreign := next((name for name in names if name not in owned), None):
        raise FileExistsError(
            f'{str(path)!r} holds {foreign!r}, which is not one of the files to replace, so it is not overwritten; '
            'remove it or choose another path'
        )
