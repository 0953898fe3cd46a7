"""The studies of `python -m experiments`: depth, lesions, skeletons, multiplications, and both forms over depth."""

import sys
from collections import Counter
from math import isnan
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from style import ROOT, SMALL_POINTS, TEXT_POINTS, Theme, bars, label, legend, new_figure

sys.path.append(str(ROOT))

from experiments import depth, lesion, multiplications, skeleton
from experiments.pool import LOSSES
from experiments.records import RESULTS, read, read_settings, values


def draw_depth(theme: Theme, results: Path) -> Figure:
    """Draw top-1 against depth, and the training loss of each epoch."""
    title = 'Depth ruins what folds into plain: RepVGG less, dirac least'
    rows, losses = read(results / RESULTS), read(results / LOSSES)
    figure = new_figure(theme, title, f'CIFAR-10, {read_settings(results)["epochs"]} epochs; {seeds_of(rows)}')
    top1 = figure.add_axes((0.07, 0.12, 0.36, 0.66))
    top1.set_title('top-1 by number of layers, %', fontsize=TEXT_POINTS, loc='left')
    curves = figure.add_axes((0.5, 0.12, 0.3, 0.66))
    deep = depth.layers(depth.STEPS[-1])
    curves.set_title(f'training loss by epoch, {deep} layers', fontsize=TEXT_POINTS, loc='left')
    steps = (*depth.STEPS, depth.DEEPEST)
    epochs = sorted({int(row['epoch']) for row in losses})
    looks = {
        'repvgg': (theme.first, '-', 'o'),
        'residual': (theme.third, '-', 'o'),
        'plain': (theme.second, '-', 'o'),
        'plain_delta': (theme.second, '--', 's'),
        'dirac': (theme.second, ':', '^'),
        'leaky': (theme.second, '-.', 'v'),
    }
    for network, (color, style, marker) in looks.items():
        look: dict[str, Any] = dict(color=color, linestyle=style, linewidth=1.8)
        found = {depth.layers(n): values(rows, 'top1_pct', network=depth.name(network, n)) for n in steps}
        found = {layers: tops for layers, tops in found.items() if tops}
        spreads = [stdev(tops) if len(tops) > 1 else 0 for tops in found.values()]
        means = [mean(tops) for tops in found.values()]
        top1.errorbar(list(found), means, spreads, capsize=3, marker=marker, markersize=5, label=network, **look)
        of_epoch = [values(losses, 'train_loss', network=f'{network}-{deep}', epoch=str(e)) for e in epochs]
        curves.plot([e + 1 for e in epochs if of_epoch[e]], [mean(found) for found in of_epoch if found], **look)
    top1.set_xticks([depth.layers(n) for n in steps])
    for axes in (top1, curves):
        axes.grid(axis='y')
    figure.legend(*top1.get_legend_handles_labels(), loc='center left', bbox_to_anchor=(0.82, 0.45), frameon=False)
    return figure


def seeds_of(rows: list[dict[str, str]]) -> str:
    """Tell how many seeds the points of `draw_depth` have."""
    shown = {depth.name(network, n) for network in depth.NETWORKS for n in (*depth.STEPS, depth.DEEPEST)}
    counts = sorted(set(Counter(row['network'] for row in rows if row['network'] in shown).values()))
    if counts == [1]:
        return 'one seed'
    several = [count for count in counts if count > 1]
    text = ' to '.join(map(str, dict.fromkeys((several[0], several[-1]))))
    return f'{text} seeds and their spread' + ('; without a bar one seed' if counts[0] == 1 else '')


def draw_lesion(theme: Theme, results: Path) -> Figure:
    """Draw top-1 after branches are removed: some at random, and each alone."""
    deep = depth.layers(lesion.STEPS[-1])
    draws = f'medians of {lesion.DRAWS} draws, for one branch of all'
    subtitle = f'Blue: RepVGG; grey: residual network. {deep} layers, CIFAR-10; {draws}'
    figure = new_figure(theme, 'Deep networks can lose a branch with weights, but no shortcut', subtitle)
    rows, single = read(results / RESULTS), read(results / lesion.SINGLE)
    looks = {
        ('repvgg', '3x3'): (theme.first, '-', '3x3'),
        ('repvgg', '1x1'): (theme.first, '--', '1x1'),
        ('repvgg', 'identity'): (theme.first, ':', 'identity'),
        ('residual', 'residual'): (theme.third, '-', 'residual branch'),
        ('residual', 'shortcut'): (theme.third, ':', 'shortcut'),
    }
    removed = figure.add_axes((0.07, 0.2, 0.4, 0.58))
    removed.set_title('top-1 by number of branches removed, %', fontsize=TEXT_POINTS, loc='left')
    alone = figure.add_axes((0.56, 0.2, 0.41, 0.58))
    alone.set_title('top-1 without one branch, by its place, %', fontsize=TEXT_POINTS, loc='left')
    for (network, kind), (color, style, name) in looks.items():
        look: dict[str, Any] = dict(color=color, linestyle=style)
        wanted = dict(network=f'{network}-{deep}', kind=kind)
        tops = [lesion.without_some(rows, single, wanted, n) for n in (0, *lesion.COUNTS)]
        places = [index for index, top1 in enumerate(tops) if top1 is not None]
        removed.plot(places, [tops[i] for i in places], marker='o', markersize=4, linewidth=1.8, label=name, **look)
        blocks = values(single, 'block', **wanted)
        places_pct = [100 * block / max(*blocks, 1) for block in blocks]
        alone.plot(places_pct, values(single, 'top1_pct', **wanted), linewidth=1.4, **look)
    removed.set_xticks(range(1 + len(lesion.COUNTS)), map(str, (0, *lesion.COUNTS)))
    alone.set_xticks([0, 50, 100], ['first block', 'middle', 'last block'])
    for axes in (removed, alone):
        axes.set_ylim(0, 90)
        axes.grid(axis='y')
    handles, names = removed.get_legend_handles_labels()
    figure.legend(handles, names, loc='center', bbox_to_anchor=(0.5, 0.06), ncols=len(names), frameon=False)
    return figure


def draw_skeleton(theme: Theme, results: Path) -> Figure:
    """Draw the mean magnitude of the nine taps by network: before the training, and of each stage after it."""
    layers = depth.layers(depth.SKELETON_STEP)
    subtitle = f'Mean magnitude of each tap, 1 is the mean of all nine; CIFAR-10, {layers} layers'
    figure = new_figure(theme, 'A skeleton is where branches overlap, and training deepens it', subtitle)
    rows = read(results / RESULTS)
    largest = max(values(rows, 'magnitude'))
    colors = LinearSegmentedColormap.from_list('magnitude', (theme.background, theme.first))
    stages = sorted({int(row['stage']) for row in rows})
    for line, network in enumerate(dict.fromkeys(row['network'] for row in rows)):
        figure.text(0.02, 0.68 - 0.19 * line, network.removesuffix(f'-{layers}'), va='center')
        before = sum(skeleton.taps_of(rows, network, 'before', stage) for stage in stages) / len(stages)
        after = {f'stage {stage + 1}': skeleton.taps_of(rows, network, 'after', stage) for stage in stages}
        for column, (heading, taps) in enumerate({'before training': before, **after}.items()):
            axes = figure.add_axes((0.1 + 0.18 * column, 0.6 - 0.19 * line, 0.165, 0.17))
            axes.pcolormesh(taps.tolist(), cmap=colors, vmin=0, vmax=largest, edgecolors=theme.grid, linewidth=0.8)
            axes.invert_yaxis()
            axes.set_axis_off()
            for y, x in skeleton.TAPS:
                value = taps[y, x].item()
                ink = theme.background if value > 0.6 * largest else theme.text
                font: dict[str, Any] = dict(ha='center', va='center', fontsize=9, color=ink)
                axes.text(x + 0.5, y + 0.5, f'{value:.2f}', **font)
            if line == 0:
                axes.set_title(heading, fontsize=TEXT_POINTS)
    return figure


NAMED = {
    'repvgg_a0': (9, -7, 'left'),
    'repvgg_b3': (-8, 0, 'right'),
    'resnet50': (7, -3, 'left'),
    'resnext50_32x4d': (0, 9, 'center'),
    'vgg11_bn': (7, -4, 'left'),
    'densenet121': (-8, 0, 'right'),
    'efficientnet_b0': (-4, 9, 'left'),
    'mobilenetv2_100': (7, -8, 'left'),
    'regnety_016': (-8, 4, 'right'),
}


def draw_multiplications(theme: Theme, results: Path) -> Figure:
    """Draw latency against multiplications, and the rank correlation of each count with it."""
    figure = new_figure(
        theme,
        'Multiplications predict time; reading and writing predicts the rest',
        f'ncnn, one image of {read_settings(results)["px"]} pixels, float32, folded networks; {machine_of(results)}',
    )
    rows = read(results / RESULTS)
    axes = figure.add_axes((0.06, 0.2, 0.37, 0.58))
    for row in rows:
        color = theme.first if row['model'] in multiplications.REPVGG else theme.third
        point = float(row[multiplications.MACS]), float(row[multiplications.WITH])
        axes.plot(*point, 'o', color=color, markersize=7)
        if row['model'] in NAMED:
            label(axes, row['model'], point, NAMED[row['model']], fontsize=SMALL_POINTS)
    axes.set_xscale('log')
    axes.set_yscale('log')
    axes.set_xticks(ticks := [0.3, 1, 3, 10], [str(tick) for tick in ticks])
    axes.set_yticks(ticks := [5, 10, 20, 50, 100], [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid()
    axes.set_title('ms by multiplications in 1e9; blue: RepVGG', fontsize=TEXT_POINTS, loc='left')
    colors = {'time': theme.first, 'both per multiplication': theme.second}
    series = {}
    for (name, color), per in zip(colors.items(), (None, multiplications.MACS), strict=True):
        found = [
            multiplications.rank_correlation(rows, column, multiplications.WITH, per)
            for column in multiplications.PREDICTORS.values()
        ]
        series[name] = color, [None if isnan(value) else value for value in found]
    ranks = figure.add_axes((0.71, 0.14, 0.27, 0.64))
    bars(ranks, list(multiplications.PREDICTORS), series, numbers='{:.2f}', heading='rank correlation with')
    ranks.set_xlim(-0.25, None)
    legend(figure, colors)
    return figure


def draw_forms(theme: Theme, results: Path) -> Figure:
    """Draw time and memory of both forms against depth."""
    figure = new_figure(
        theme,
        'On small images branches cost 2.5 times the time, at any depth',
        f'Widths 16, 32, 64, 32 images of 32 pixels, float32, eager PyTorch; {machine_of(results)}',
    )
    rows = read(results / RESULTS)
    headings = {
        'batch_32_ms': 'inference, ms',
        'step_32_ms': 'training step, ms',
        'kept_kb': 'kept for backward, kB/image',
    }
    colors = {'training': theme.second, 'deploy': theme.first}
    for index, (column, heading) in enumerate(headings.items()):
        axes = figure.add_axes((0.07 + 0.325 * index, 0.2, 0.26, 0.58))
        for form, color in colors.items():
            axes.plot(
                values(rows, 'depth', form=form), values(rows, column, form=form), 'o-', color=color, linewidth=1.8
            )
        axes.set_xticks(values(rows, 'depth', form='deploy'))
        axes.set_ylim(0, None)
        axes.grid(axis='y')
        axes.set_title(heading, fontsize=TEXT_POINTS, loc='left')
    legend(figure, {f'{form} form': color for form, color in colors.items()})
    return figure


def machine_of(results: Path) -> str:
    """Tell on what the times of a study were measured."""
    settings = read_settings(results)
    return f'{settings["processor"]}, {settings["threads"]} threads'


STUDIES = {
    'depth': draw_depth,
    'lesion': draw_lesion,
    'skeleton': draw_skeleton,
    'multiplications': draw_multiplications,
    'forms': draw_forms,
}
