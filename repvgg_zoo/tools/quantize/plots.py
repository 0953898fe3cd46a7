"""The plot of the ranges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ...quantization.ranges import LayerRanges

__all__ = ['save_ranges_plot']


def save_ranges_plot(ranges: Mapping[str, Sequence[LayerRanges]], path: Path) -> None:
    """Draw, for each layer, from the smallest to the largest range of its input channels.

    Args:
        ranges: Of the same layers, by when they were measured.
        path: The PNG file.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> save_ranges_plot({'before': ranges, 'after': others}, Path('ranges.png'))  # doctest: +SKIP
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout='constrained')
    upper, lower = figure.subplots(2, sharex=True)
    for index, (name, layers) in enumerate(ranges.items()):
        places = [place + 0.25 * index for place in range(len(layers))]
        for axes, spreads in ((upper, [r.inputs for r in layers]), (lower, [r.weights for r in layers])):
            smallest, median, largest = zip(*spreads, strict=True)
            axes.vlines(places, smallest, largest, color=f'C{index}', label=name)
            axes.scatter(places, median, color=f'C{index}', marker='_')
    upper.set(ylabel='largest input', title='Input channels of each layer: smallest, median and largest range')
    lower.set(ylabel='largest weight')
    for axes in (upper, lower):
        axes.set_yscale('log')
        axes.grid(axis='y', alpha=0.3)
    upper.legend()
    names = [r.layer.removesuffix('.reparam_conv') for r in next(iter(ranges.values()))]
    lower.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    figure.savefig(path, dpi=120)
