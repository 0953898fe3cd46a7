"""Which files in a folder this package wrote, so that it replaces these and nothing of the user's."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from ..pretrained.hub import sha256_of

__all__ = ['MARKER', 'check_replaceable', 'foreign_entries', 'write_marker']

MARKER = '.repvgg-zoo.sha256'
"""File in each folder that this package writes: the sha256 of its other files, as `sha256sum` writes them.

What it lists, and is unchanged, may be replaced. Everything else is the user's.
"""


def write_marker(folder: Path) -> None:
    """Record the files of a folder as this package's.

    Args:
        folder: The folder, with all its files.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / 'config.json').touch()
        >>> write_marker(folder)
        >>> (folder / MARKER).read_text().split()[1]
        'config.json'
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file())
    (folder / MARKER).write_text(''.join(f'{sha256_of(folder / name)}  {name}\n' for name in names), 'utf-8')


def check_replaceable(path: str | Path, *, overwrite: bool, ignore: Collection[str] = ()) -> None:
    """Raise an error if writing a folder would lose something.

    Args:
        path: The folder to write.
        overwrite: The folder may be replaced if it holds nothing but unchanged files of an earlier run.
        ignore: Names of files that the caller keeps if they are the user's.

    Raises:
        FileExistsError: The path exists, and `overwrite` is off or it holds something else.

    Example:
        >>> check_replaceable('nowhere', overwrite=False)
    """
    path = Path(path)
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise FileExistsError(f'{str(path)!r} exists; choose another path or pass overwrite (--overwrite)')
    if path.is_symlink() or not path.is_dir():
        raise FileExistsError(f'{str(path)!r} is no folder, so it is not overwritten; choose another path')
    if foreign := next((name for name in foreign_entries(path) if name not in ignore), None):
        raise FileExistsError(
            f'{str(path)!r} holds {foreign!r}, which is not one of the files to replace: those that an earlier run '
            'wrote, unchanged. So it is not overwritten; remove it or choose another path'
        )


def foreign_entries(folder: Path) -> Iterator[str]:
    """Find what is in a folder that this package did not write, or that has changed since.

    Args:
        folder: An existing folder.

    Yields:
        Paths relative to the folder.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / 'thesis.txt').touch()
        >>> list(foreign_entries(folder))
        ['thesis.txt']
    """
    marker = folder / MARKER
    text = marker.read_text('utf-8') if marker.is_file() else ''
    written = {name: sha256 for sha256, name in re.findall(r'^([0-9a-f]{64})  (.+)$', text, re.MULTILINE)}
    for entry in sorted(folder.rglob('*')):
        name = entry.relative_to(folder).as_posix()
        if entry.is_symlink() or not (entry.is_dir() or entry.is_file()):
            yield name
        elif entry.is_dir():
            if not any(entry.iterdir()):
                yield name
        elif name != MARKER and (name not in written or sha256_of(entry) != written[name]):
            yield name
