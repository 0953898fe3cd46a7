"""Markdown tables."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

__all__ = ['markdown_table']


def markdown_table(rows: Iterable[Sequence[str]], header: Sequence[str], *, text_columns: Collection[str] = ()) -> str:
    """Write rows under a header as a Markdown table, figures to the right.

    Args:
        rows: Cells, as many in each row as there are titles.
        header: Titles of the columns.
        text_columns: Titles of the columns that hold text, which goes to the left.

    Returns:
        The table, without a newline at the end.

    Example:
        >>> print(markdown_table([('test_repvgg', '32')], ('name', 'px'), text_columns=('name',)))
        | name | px |
        | --- | ---: |
        | test_repvgg | 32 |
    """
    lines = [header, ['---' if title in text_columns else '---:' for title in header], *rows]
    return '\n'.join('| ' + ' | '.join(cell.replace('|', r'\|') for cell in line) + ' |' for line in lines)
