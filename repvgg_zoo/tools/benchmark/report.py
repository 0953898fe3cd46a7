"""Results of a benchmark, as a table, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from statistics import median, quantiles
from typing import Any

from ..markdown import markdown_table

__all__ = ['Results', 'Row', 'latency_quantiles_ms']


@dataclass(frozen=True, kw_only=True)
class Row:
    """The figures of one case."""

    model: str
    form: str
    work: str
    runtime: str
    batch: int
    dtype: str
    layout: str
    px: int
    latency_ms: float
    """Median over the interleaved rounds."""
    latency_p10_ms: float
    """Tenth percentile."""
    latency_p90_ms: float
    """Ninetieth percentile."""
    images_per_s: float | None
    gmacs: float | None
    """Multiply-adds of one image in this form, in 1e9."""
    gmacs_per_s: float | None
    pct_of_matmul_peak: float | None
    """`gmacs_per_s` in per cent of the rate of matrix products in this dtype. Winograd's algorithm may exceed 100."""
    peak_memory_mb: float | None
    saved_mb: float | None
    """Megabytes that autograd keeps of one image for the backward pass."""
    top1_pct: float | None
    baseline: str | None
    ratio: float | None
    """Median latency of the baseline over that of this case: above 1, this case is faster."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """All rows of one run, with the machine and the date."""

    machine: dict[str, Any]
    rows: list[Row]
    skipped: list[str] = field(default_factory=list)

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Header and rows for reading, without empty columns and without settings that are the same in all rows."""
        columns = [f.name for f in fields(Row) if f.name not in ('latency_p10_ms', 'latency_p90_ms', 'gmacs')]
        cells = {name: [_cell(name, getattr(row, name)) for row in self.rows] for name in columns}
        cells['latency_ms'] = [
            f'{row.latency_ms:.1f} ({row.latency_p10_ms:.1f} to {row.latency_p90_ms:.1f})' for row in self.rows
        ]
        constant = self._constants()
        kept = [name for name in columns if any(cells[name]) and name not in constant]
        return tuple(_TITLES.get(name, name) for name in kept), list(zip(*(cells[name] for name in kept), strict=True))

    def constants(self) -> str:
        """Settings that are the same in all rows."""
        return ', '.join(f'{name} {value}' for name, value in self._constants().items())

    def _constants(self) -> dict[str, Any]:
        values = {name: {getattr(row, name) for row in self.rows} for name in _SETTING}
        return {name: found.pop() for name, found in values.items() if len(found) == 1}

    def markdown(self) -> str:
        """The table, the machine and what was not measured, in Markdown."""
        header, rows = self.table()
        machine = '; '.join(f'{key} {value}' for key, value in self.machine.items())
        skipped = ''.join(f'\n- not measured: {line}' for line in self.skipped)
        table = markdown_table(rows, header, text_columns=_TEXT_COLUMNS)
        return f'{table}\n\nIn all rows: {self.constants()}. {machine}.\n{skipped}'

    def csv(self) -> str:
        """All fields of all rows."""
        text = io.StringIO()
        writer = csv.DictWriter(text, [f.name for f in fields(Row)], lineterminator='\n')
        writer.writeheader()
        writer.writerows(asdict(row) for row in self.rows)
        return text.getvalue()

    def json(self) -> str:
        """Everything."""
        return json.dumps(asdict(self), indent=2) + '\n'


_SETTING = ('form', 'work', 'runtime', 'batch', 'dtype', 'layout', 'px')
_TEXT_COLUMNS = ('model', 'form', 'work', 'runtime', 'dtype', 'layout', 'baseline')
_TITLES = {
    'latency_ms': 'latency_ms (p10 to p90)',
    'pct_of_matmul_peak': '% of matmul peak',
    'peak_memory_mb': 'peak memory MB',
    'saved_mb': 'saved MB',
    'top1_pct': 'top-1 %',
}


def latency_quantiles_ms(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Compute the median, the tenth and the ninetieth percentile.

    Args:
        seconds: One or more times.

    Returns:
        The three in milliseconds.

    Example:
        >>> latency_quantiles_ms([0.25])
        (250.0, 250.0, 250.0)
    """
    if len(seconds) == 1:
        return (1e3 * seconds[0],) * 3
    deciles = quantiles(seconds, n=10, method='inclusive')
    return 1e3 * median(seconds), 1e3 * deciles[0], 1e3 * deciles[-1]


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ''
    if isinstance(value, float):
        return f'{value:.2f}' if name in ('ratio', 'top1_pct') else f'{value:.1f}'
    return str(value)
