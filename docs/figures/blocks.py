"""Block types by accuracy and by the time of a training step."""

from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure
from style import SMALL_POINTS, Theme, label, new_figure, read_csv

BELOW = ('dirac', 'expand')
LABELS = {
    'repvgg': (0, -26, 'center'),
    'plain': (0, 39, 'center'),
    'plain_delta': (-9, -4, 'right'),
    'acb': (0, 9, 'center'),
    'dbb': (0, 9, 'center'),
    'doconv': (9, 2, 'left'),
    'mobileone': (10, 3, 'left'),
    'qarepvgg': (8, 10, 'left'),
    'csla': (0, -17, 'center'),
    'no_identity': (2, -20, 'right'),
    'no_1x1': (9, -4, 'left'),
    'no_identity_bn': (9, -4, 'left'),
    'bn_after': (0, 9, 'center'),
}
"""Place of the label: horizontal and vertical distance in points, alignment."""


def draw_blocks(theme: Theme) -> Figure:
    """Draw top-1 on CIFAR-10 against the time of a training step."""
    figure = new_figure(
        theme,
        'mobileone is a point better than repvgg, at 2.6 times the training step',
        'CIFAR-10, 0.6 M parameters, 10 epochs. Bars: standard deviation of 3 seeds. Hollow: one seed.',
    )
    axes = figure.add_axes((0.095, 0.135, 0.88, 0.68))
    costs = read_csv('experiments/family_costs.csv', precision='bfloat16', measured_with='all')
    low, high = 81.6, 84.5
    for row in costs:
        block, step = row['block'], float(row['step'])
        runs = [float(run['deploy_top1_pct']) for run in read_csv('experiments/family.csv', block=block)]
        color = theme.first if block in ('repvgg', 'mobileone') else theme.muted
        text = theme.first if color == theme.first else theme.text
        if block in BELOW:
            axes.plot([step], [low + 0.12], 'v', markersize=7, color=theme.muted)
            name = f'{block}: {runs[0]:.2f} %'
            label(axes, name, (step, low + 0.12), (9, -4, 'left'), fontsize=SMALL_POINTS, color=theme.muted)
            continue
        spread = stdev(runs) if len(runs) > 1 else None
        face = color if spread else theme.background
        marker: dict[str, Any] = dict(fmt='o', markersize=8, markerfacecolor=face, markeredgewidth=1.8)
        axes.errorbar([step], [mean(runs)], yerr=spread, color=color, elinewidth=1.8, capsize=4, **marker)
        label(axes, block, (step, mean(runs)), LABELS[block], color=text)
    axes.set_xscale('log')
    axes.set_xlim(0.37, 4.1)
    axes.set_ylim(low, high)
    axes.set_xticks(ticks := [0.4, 0.5, 0.7, 1, 1.5, 2, 3, 4], [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel('time of a training step, repvgg = 1 (bfloat16, Xeon with AMX)')
    axes.set_ylabel('top-1, %')
    axes.grid()
    better = '\N{NORTH WEST ARROW} better: up and to the left'
    axes.text(0.015, 0.97, better, transform=axes.transAxes, va='top', color=theme.second)
    return figure
