"""What all figures share: two backgrounds, sizes, titles, bars with numbers, and the reading of CSV."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.patches
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
INCHES = 800 / 96, 450 / 96  # of CSS pixels
TITLE_POINTS, TEXT_POINTS, SMALL_POINTS = 14, 11.5, 10.5  # readable in half the width
XEON = 'two cores of an Intel Xeon with AMX, PyTorch 2.14.1'


@dataclass(frozen=True)
class Theme:
    """The colours of a background."""

    suffix: str
    background: str
    text: str
    muted: str
    grid: str
    first: str
    """Of what the figure is about."""
    second: str
    third: str


THEMES = (
    Theme('', '#ffffff', '#1b1f27', '#5b6472', '#dfe3e8', '#1d5fd1', '#d9730d', '#8d97a5'),
    Theme('.dark', '#1b1f27', '#edf0f5', '#a3adbb', '#39404c', '#6aa5ff', '#ffa94d', '#77818f'),
)


def use(theme: Theme) -> None:
    """Set matplotlib's defaults for a background; the bytes of a figure are the same each time."""
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(
        {
            'svg.hashsalt': 'repvgg_zoo',
            'svg.fonttype': 'path',
            'font.family': 'DejaVu Sans',  # comes with matplotlib
            'font.size': TEXT_POINTS,
            'figure.facecolor': theme.background,
            'axes.facecolor': theme.background,
            'axes.edgecolor': theme.grid,
            'axes.labelcolor': theme.muted,
            'axes.spines.top': False,
            'axes.spines.right': False,
            'text.color': theme.text,
            'xtick.color': theme.muted,
            'ytick.color': theme.muted,
            'xtick.labelsize': TEXT_POINTS,
            'ytick.labelsize': TEXT_POINTS,
            'grid.color': theme.grid,
        }
    )


def new_figure(theme: Theme, title: str, subtitle: str) -> Figure:
    """Make a figure with the finding as its title and the machine in the line below."""
    use(theme)
    figure = Figure(figsize=INCHES)
    figure.text(0.025, 0.955, title, fontsize=TITLE_POINTS, fontweight='bold', va='top')
    figure.text(0.025, 0.875, subtitle, fontsize=SMALL_POINTS, color=theme.muted, va='top')
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as SVG."""
    figure.savefig(path, format='svg', metadata={'Date': None, 'Creator': None})


def read_csv(path: str, **wanted: str) -> list[dict[str, str]]:
    """Read the rows of a committed file that have the wanted values."""
    with (ROOT / path).open(newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def bars(
    axes: Axes,
    groups: Sequence[str],
    series: Mapping[str, tuple[str, Sequence[float | None]]],
    *,
    numbers: str = '{:.1f}',
    heading: str = '',
) -> None:
    """Draw horizontal bars with their numbers, from the top downwards.

    Args:
        axes: Where to draw.
        groups: A label of each group.
        series: Colour and one value of each group, or None, by name.
        numbers: Format of the numbers.
        heading: What the bars are of, above them.
    """
    found: list[list[tuple[str, float]]] = [[] for _ in groups]
    for color, values in series.values():
        for group, value in zip(found, values, strict=True):
            if value is not None:
                group.append((color, value))
    height = 0.8 / max(map(len, found))
    largest = max(value for group in found for _, value in group)
    for index, group in enumerate(found):
        for position, (color, value) in enumerate(group):
            place = index + (position - (len(group) - 1) / 2) * height
            axes.barh(place, value, height * 0.9, color=color)
            axes.text(max(value, 0) + 0.015 * largest, place, numbers.format(value), va='center', fontsize=SMALL_POINTS)
    axes.set_yticks(range(len(groups)), groups)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlim(0, 1.16 * largest)
    axes.set_xticks([])
    axes.tick_params(axis='y', length=0, labelcolor=matplotlib.rcParams['text.color'])
    axes.spines['bottom'].set_visible(False)
    axes.set_title(heading, fontsize=TEXT_POINTS, loc='left')


def label(axes: Axes, text: str, point: tuple[float, float], place: tuple[float, float, str], **font: Any) -> None:
    """Name a point; the place is a horizontal and a vertical distance in points, and the alignment."""
    x, y, align = place
    axes.annotate(text, point, (x, y), textcoords='offset points', ha=align, **font)


def legend(figure: Figure, colors: Mapping[str, str]) -> None:
    """Put the names of the colours below the figure."""
    handles = [matplotlib.patches.Patch(color=color, label=name) for name, color in colors.items()]
    figure.legend(
        handles=handles,
        loc='center',
        bbox_to_anchor=(0.5, 0.06),
        ncols=len(handles),
        frameon=False,
        fontsize=TEXT_POINTS,
        handlelength=1,
        handleheight=1,
    )
