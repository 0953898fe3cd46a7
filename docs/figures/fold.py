"""The fold, with the numbers of one kernel of the bundled model."""

from typing import Any

import timm
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from style import SMALL_POINTS, Theme, new_figure

import repvgg_zoo  # noqa: F401, registers the models

STAGE, BLOCK, CHANNEL = 2, 2, 99


def kernels() -> dict[str, torch.Tensor]:
    """Compute what each branch of a block adds to one 3x3 kernel, and their sum."""
    model: Any = timm.create_model('test_repvgg', pretrained=True).eval()
    block = model.stages[STAGE][BLOCK]
    parts = {}
    with torch.no_grad():
        for name, branch in block.named_branches().items():
            kernel, _ = branch.equivalent_kernel_bias(torch.float64, block.conv_kxk.conv.weight)
            one = kernel[CHANNEL, CHANNEL]
            margin = (3 - one.shape[-1]) // 2
            parts[name] = torch.nn.functional.pad(one, (margin,) * 4)
        folded, _ = block.equivalent_kernel_bias(torch.float64)
    parts['folded'] = folded[CHANNEL, CHANNEL]
    return parts


def draw_fold(theme: Theme) -> Figure:
    """Draw both forms of a block, and the sum of kernels."""
    figure = new_figure(
        theme, 'Three branches fold into one 3x3 convolution', 'A RepVGG block, with the same outputs in both forms'
    )
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 800), ylim=(450, 0))
    axes.axis('off')
    _draw_forms(axes, theme)
    _draw_kernels(figure, axes, theme)
    return figure


def _draw_forms(axes: Axes, theme: Theme) -> None:
    top, middle, bottom = 124, 163, 202
    axes.text(20, 96, 'training form', color=theme.second, fontweight='bold', va='center')
    axes.text(495, 96, 'deploy form', color=theme.first, fontweight='bold', va='center')

    _box(axes, theme, 46, middle, 'input', theme.muted, width=60)
    for y, text in ((top, '3x3 convolution + BN'), (middle, '1x1 convolution + BN'), (bottom, 'identity + BN')):
        _box(axes, theme, 206, y, text, theme.second, width=190)
        _arrow(axes, theme, (77, middle), (110, y))
        _arrow(axes, theme, (302, y), (341, middle))
    _circle(axes, theme, 353, middle, '+')
    _arrow(axes, theme, (366, middle), (386, middle))
    _box(axes, theme, 416, middle, 'ReLU', theme.muted, width=58)

    axes.text(470, middle, '=', fontsize=20, ha='center', va='center', color=theme.muted)
    _box(axes, theme, 525, middle, 'input', theme.muted, width=60)
    _arrow(axes, theme, (556, middle), (573, middle))
    _box(axes, theme, 645, middle, '3x3 convolution', theme.first, width=142)
    _arrow(axes, theme, (717, middle), (734, middle))
    _box(axes, theme, 763, middle, 'ReLU', theme.muted, width=56)


def _box(axes: Axes, theme: Theme, x: float, y: float, text: str, color: str, *, width: float) -> None:
    height = 31
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle='round,pad=0,rounding_size=6',
            facecolor=theme.background,
            edgecolor=color,
            linewidth=1.6,
        )
    )
    axes.text(x, y, text, ha='center', va='center', fontsize=SMALL_POINTS)


def _circle(axes: Axes, theme: Theme, x: float, y: float, text: str) -> None:
    axes.plot([x], [y], 'o', markersize=18, markerfacecolor=theme.background, markeredgecolor=theme.muted)
    axes.text(x, y, text, ha='center', va='center')


def _arrow(axes: Axes, theme: Theme, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle='-|>', mutation_scale=9, color=theme.muted, shrinkA=0, shrinkB=0)
    )


def _draw_kernels(figure: Figure, axes: Axes, theme: Theme) -> None:
    parts = kernels()
    largest = max(float(kernel.abs().max()) for kernel in parts.values())
    colors = LinearSegmentedColormap.from_list('', [theme.second, theme.background, theme.first])
    size, y = 138, 277  # pixels
    names = {'conv_kxk': '3x3 + BN', 'conv_1x1': '1x1 + BN', 'identity': 'identity + BN', 'folded': 'folded 3x3'}
    signs = ('+', '+', '=')
    axes.text(
        20,
        238,
        f'A kernel of the bundled model test_repvgg (stages.{STAGE}.{BLOCK}, channel {CHANNEL} to channel {CHANNEL}):',
        fontsize=SMALL_POINTS,
        color=theme.muted,
        va='center',
    )
    for index, (name, label) in enumerate(names.items()):
        x = 20 + index * 207
        color = theme.first if name == 'folded' else theme.second
        axes.text(x + size / 2, y - 13, label, ha='center', va='center', color=color, fontweight='bold')
        small = figure.add_axes((x / 800, 1 - (y + size) / 450, size / 800, size / 450))
        kernel = parts[name]
        small.pcolormesh(kernel, cmap=colors, vmin=-largest, vmax=largest, edgecolors=theme.grid, linewidth=1)
        small.set(xticks=[], yticks=[], ylim=(3, 0))
        small.spines[:].set_visible(False)
        for (row, column), value in ((p, float(kernel[p])) for p in ((r, c) for r in range(3) for c in range(3))):
            red, green, blue, _ = colors((value / largest + 1) / 2)
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            text = '0' if value == 0 else f'{value:.2f}'.replace('-', '\N{MINUS SIGN}')
            small.text(
                column + 0.5,
                row + 0.5,
                text,
                ha='center',
                va='center',
                fontsize=SMALL_POINTS - 0.6,
                color='#ffffff' if dark else '#1b1f27',
            )
        if index < 3:
            axes.text(x + size + 34.5, y + size / 2, signs[index], ha='center', va='center', fontsize=22)
    axes.text(
        20,
        433,
        'BN is batch normalisation with its running statistics. Biases add up in the same way.',
        fontsize=SMALL_POINTS,
        color=theme.muted,
        va='center',
    )
