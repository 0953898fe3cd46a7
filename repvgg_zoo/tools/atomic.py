"""Folders and files that are written whole or not at all, even if the process is killed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .own_files import check_replaceable, write_marker

try:
    import fcntl
except ImportError:  # Windows cannot lock a folder
    fcntl = None  # type: ignore[assignment]

__all__ = ['locked', 'new_folder', 'put_in_place', 'workspace', 'write_text']

_NEW, _OLD, _SUFFIX = 'new', 'old', '.partial'


@contextmanager
def new_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder that takes the name `path` when the block ends, and is removed if the block fails.

    Args:
        path: The folder to write.
        overwrite: Replace the folder if it exists and holds nothing but unchanged files of an earlier run.

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
        >>> sorted(path.name for path in target.iterdir())
        ['.repvgg-zoo.sha256', 'config.json']
    """
    check_replaceable(path, overwrite=overwrite)
    with workspace(path) as new:
        yield new
        put_in_place(new, path, overwrite=overwrite)


@contextmanager
def workspace(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside a path, for `put_in_place`; what is left of it at the end is removed.

    What killed processes left in the same folder is cleared away first.

    Args:
        path: The folder to write.

    Yields:
        The empty folder.

    Raises:
        BlockingIOError: Another process is writing the same path.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / 'model'
        >>> with workspace(target) as folder:
        ...     (folder / 'config.json').touch()
        >>> target.exists()
        False
    """
    partial = _partial(Path(path))
    partial.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with locked(partial.parent):  # so that nobody clears the new folder away before it is locked
            _clear_leftovers(partial)
            partial.mkdir(exist_ok=True)
            busy = f'another process is writing {str(path)!r}; try again when it has ended'
            stack.enter_context(locked(partial, busy=busy))
        try:
            (partial / _NEW).mkdir()
            yield partial / _NEW
        finally:
            _restore(partial)
            shutil.rmtree(partial, ignore_errors=True)


def put_in_place(new: Path, path: str | Path, *, overwrite: bool) -> None:
    """Let a folder take its name, with the marker in it.

    Args:
        new: The folder that `workspace` gave.
        path: Its name.
        overwrite: Replace the folder of that name if it holds nothing but unchanged files of an earlier run.

    Raises:
        FileExistsError: The path exists, and `overwrite` is off or it holds something else.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / 'model'
        >>> with workspace(target) as folder:
        ...     put_in_place(folder, target, overwrite=False)
        >>> [path.name for path in target.iterdir()]
        ['.repvgg-zoo.sha256']
    """
    path = Path(path)
    check_replaceable(path, overwrite=overwrite)
    write_marker(new)
    if path.exists():
        path.rename(new.with_name(_OLD))
    new.rename(path)


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
    return path.with_name(f'.{path.name}{_SUFFIX}')


def _clear_leftovers(own: Path) -> None:
    """Remove the work of killed processes in a folder. That of a running process is locked."""
    # without locks, only who writes the same path may be taken for dead
    leftovers = own.parent.glob(f'.?*{_SUFFIX}') if fcntl is not None else filter(Path.exists, [own])
    for partial in leftovers:
        with contextlib.suppress(OSError):
            if partial.is_symlink() or not {entry.name for entry in partial.iterdir()} <= {_NEW, _OLD}:
                continue  # somebody else's
            with locked(partial, busy='being written'):
                _restore(partial)
                shutil.rmtree(partial)


def _restore(partial: Path) -> None:
    """Restore the old folder if a run died between the two renames."""
    old, path = partial / _OLD, partial.with_name(partial.name[1 : -len(_SUFFIX)])
    if old.exists() and not os.path.lexists(path):
        old.rename(path)
