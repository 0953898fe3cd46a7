"""What the commands show: tables, progress bars and errors."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ['Track', 'no_progress', 'positive', 'print_error', 'print_table', 'progress', 'silenced']

Track: TypeAlias = Callable[..., Iterable[Any]]
"""Wraps an iterable with a progress bar: `track(iterable, description=…, total=…)`."""


def no_progress(items: Iterable[Any], **_: Any) -> Iterable[Any]:
    """Iterate without a progress bar: a `Track` for library code.

    Args:
        items: What to iterate over.
        _: Description and total of a progress bar, not used.

    Returns:
        `items`.

    Example:
        >>> list(no_progress('ab', description='letters'))
        ['a', 'b']
    """
    return items


@contextmanager
def progress(*, transient: bool = True) -> Iterator[Track]:
    """Show progress bars on stderr.

    Args:
        transient: Remove the bars at the end.

    Yields:
        The `Track` that adds a bar.

    Example:
        >>> with progress() as track:
        ...     list(track('ab', description='letters'))
        ['a', 'b']
    """
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=transient) as bars:
        yield bars.track


def print_error(error: Exception) -> None:
    """Print an error on stderr, in one line except for lines of code.

    Args:
        error: The error. Lines of code in it are indented by four columns.

    Example:
        >>> print_error(ValueError('no such name'))  # on stderr
    """
    code = r' {4}\S'
    message = re.sub(rf'\s*\n(?!{code})\s*', ' ', str(error).strip()) or type(error).__name__
    print(f'repvgg-zoo: {message}', file=sys.stderr)


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table whose cells are never cut, however narrow the terminal is.

    Args:
        header: Titles of the columns.
        rows: Cells, as many in each row as there are titles.

    Example:
        >>> print_table(('name', 'px'), [('test_repvgg', '32')])  # doctest: +NORMALIZE_WHITESPACE +ELLIPSIS
        <BLANKLINE>
         name         px
         ─...─
         test_repvgg  32
        <BLANKLINE>
    """
    from rich.console import Console

    console, table = Console(), _table(header, rows)
    console.width = max(console.width, Console(width=1000).measure(table).maximum)
    console.print(table)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for index, title in enumerate(header):
        table.add_column(title, justify='right' if index else 'left', no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def positive(text: str) -> int:
    """Parse an integer from 1 on: a `type` for argparse.

    Args:
        text: The argument.

    Returns:
        The integer.

    Raises:
        argparse.ArgumentTypeError: It is no such integer.

    Example:
        >>> positive('3')
        3
    """
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f'{text!r} is no number from 1 on')
    return int(text)


@contextmanager
def silenced() -> Iterator[None]:
    """Silence all output, even that of programs that a library starts.

    Example:
        >>> import os
        >>> with silenced():
        ...     status = os.system('echo not seen')
        >>> status
        0
    """
    sys.stdout.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    kept = {stream: os.dup(stream) for stream in (1, 2)}
    for stream in kept:
        os.dup2(nowhere, stream)
    try:
        yield
    finally:
        for stream, copy in kept.items():
            os.dup2(copy, stream)
            os.close(copy)
        os.close(nowhere)
