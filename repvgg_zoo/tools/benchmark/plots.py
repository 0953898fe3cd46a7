"""Plots of the results, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ...variants import VARIANTS
from .report import Results, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ['save_plots']

_NAMES, _SUFFIXES = ('speed_accuracy', 'forms', 'runtimes'), ('png', 'svg')
_COLOURS = [f'C{index}' for index in range(10)] + ['#1a3d5c', '#7a3b00', '#145214', '#5c1414']


def save_plots(results: Results, folder: Path) -> list[str]:
    """Plot results. A plot with fewer than two things to compare is left out.

    Args:
        results: What was measured.
        folder: An existing folder.

    Returns:
        Names of the files written.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> save_plots(Results(machine={}, rows=[]), Path('.'))
        []
    """
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams['svg.hashsalt'] = ''  # the same bytes each time
    inferred = [row for row in results.rows if row.work == 'infer' and (row.form == 'single' or row.model in VARIANTS)]
    accuracy = _of_first_setting([row for row in inferred if row.top1_pct and row.form != 'training'])
    forms = _of_first_setting([row for row in inferred if row.form != 'single'])
    runtimes = [row for row in inferred if row.form == 'deploy']
    plots = [
        (_speed_accuracy, accuracy, {row.model for row in accuracy}),
        (_forms, forms, {row.form for row in forms}),
        (_runtimes, runtimes, {row.runtime for row in runtimes}),
    ]
    names = []
    for name, (draw, rows, compared) in zip(_NAMES, plots, strict=True):
        if len(compared) < 2:
            continue
        figure = Figure(figsize=(8, 5), layout='constrained')
        draw(figure.add_subplot(), rows)
        for suffix in _SUFFIXES:
            figure.savefig(folder / f'{name}.{suffix}', dpi=120, metadata={'Date': None} if suffix == 'svg' else None)
            names.append(f'{name}.{suffix}')
    return names


def _setting(row: Row) -> tuple[str, int, str, str]:
    return row.runtime, row.batch, row.dtype, row.layout


def _of_first_setting(rows: list[Row]) -> list[Row]:
    """Rows that differ from the first one in model and form only."""
    return [row for row in rows if _setting(row) == _setting(rows[0])]


def _name(row: Row) -> str:
    return row.model.rpartition(':')[2].partition('.')[0]


def _speed_accuracy(axes: Axes, rows: list[Row]) -> None:
    family = [row for row in rows if row.form == 'deploy']
    peers = [row for row in rows if row.form == 'single']
    dense = sorted(_speed_and_top1(row) for row in family if VARIANTS[row.model].groups == 1)
    axes.plot([speed for speed, _ in dense], [top1 for _, top1 in dense], color='C3', zorder=1)
    for label, group, color, above in (('RepVGG, deploy form', family, 'C3', 4), ('others', peers, 'C0', -9)):
        points = [_speed_and_top1(row) for row in group]
        axes.scatter([speed for speed, _ in points], [top1 for _, top1 in points], color=color, label=label, zorder=2)
        for row, point in zip(group, points, strict=True):
            axes.annotate(_name(row), point, xytext=(4, above), textcoords='offset points', fontsize=7)
    axes.margins(x=0.12)
    axes.set(xscale='log', xlabel='images per second', ylabel='published ImageNet top-1 (%)')
    axes.set_title(f'Speed and accuracy: {_setting_text(rows[0])}')
    axes.legend()
    axes.grid(alpha=0.3, which='both')


def _speed_and_top1(row: Row) -> tuple[float, float]:
    return row.images_per_s or 0.0, row.top1_pct or 0.0


def _forms(axes: Axes, rows: list[Row]) -> None:
    _bars(axes, rows, series=lambda row: row.form, group=_name, value=lambda row: row.latency_ms)
    axes.set(ylabel='latency (ms)', title=f'Time of the two forms: {_setting_text(rows[0])}')


def _runtimes(axes: Axes, rows: list[Row]) -> None:
    def label(row: Row) -> str:
        return row.runtime if row.dtype == 'float32' else f'{row.runtime}, {row.dtype}'

    first = [row for row in rows if (row.batch, row.layout) == (rows[0].batch, rows[0].layout)]
    _bars(axes, first, series=label, group=_name, value=lambda row: row.pct_of_matmul_peak or 0.0)
    axes.set(
        ylabel='% of the peak rate of matrix products',
        title=f'Deploy form by runtime: batch {first[0].batch}, {first[0].layout}',
    )


def _bars(
    axes: Axes,
    rows: list[Row],
    *,
    series: Callable[[Row], str],
    group: Callable[[Row], str],
    value: Callable[[Row], float],
) -> None:
    groups, names = _in_order(map(group, rows)), _in_order(map(series, rows))
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        found = {group(row): value(row) for row in rows if series(row) == name}
        places = [groups.index(key) + (index - (len(names) - 1) / 2) * width for key in found]
        axes.bar(places, list(found.values()), width, label=name, color=_COLOURS[index % len(_COLOURS)])
    axes.set_xticks(range(len(groups)), groups, rotation=30 if len(groups) > 6 else 0)
    axes.legend(loc='upper left', bbox_to_anchor=(1, 1), fontsize=8)
    axes.grid(axis='y', alpha=0.3)


def _in_order(items: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(items))


def _setting_text(row: Row) -> str:
    return f'{row.runtime}, batch {row.batch}, {row.dtype}, {row.layout}'
