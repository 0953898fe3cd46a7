"""Accuracy and speed, forms, runtimes and memory, from the tables of the benchmark."""

from typing import Any

from matplotlib.figure import Figure
from style import SMALL_POINTS, XEON, Theme, bars, label, legend, new_figure, read_csv

RESNETS = ('resnet18', 'resnet34', 'resnet50', 'resnet101')
PEERS = {
    'torchvision:resnet18': ('ResNet-18', (-8, -16, 'right')),
    'torchvision:resnet50': ('ResNet-50', (-8, -14, 'right')),
    'torchvision:resnet101': ('ResNet-101', (-9, -9, 'right')),
    'timm:mobilenetv1_100.ra4_e3600_r224_in1k': ('MobileNetV1', (0, 10, 'center')),
    'torchvision:efficientnet_b0': ('EfficientNet-B0', (0, 10, 'center')),
    'torchvision:regnet_x_3_2gf': ('RegNetX-3.2GF', (0, 10, 'center')),
}
"""Name and place of the label: horizontal and vertical distance in points, alignment."""
FAMILY = {
    'a0': (9, 3, 'left'),
    'a1': (9, 3, 'left'),
    'a2': (9, 3, 'left'),
    'b0': (9, 3, 'left'),
    'b1': (-10, -9, 'right'),
    'b1g2': (0, 9, 'center'),
    'b1g4': (9, 4, 'left'),
    'b2': (-8, -14, 'center'),
    'b2g4': (10, 3, 'left'),
    'b3': (0, 9, 'center'),
    'b3g4': (10, 3, 'left'),
}


def draw_speed_accuracy(theme: Theme) -> Figure:
    """Draw published top-1 against images per second of a CPU."""
    figure = new_figure(
        theme,
        'RepVGG beats ResNets of its speed, but not three others',
        f'Deploy form, one image, eager PyTorch, float32: {XEON}',
    )
    axes = figure.add_axes((0.085, 0.135, 0.89, 0.68))
    rows = {row['model']: row for row in read_csv('benchmarks/cpu/speed.csv')}
    points = {
        name: (float(row['images_per_s']), float(row['top1_pct'])) for name, row in rows.items() if row['top1_pct']
    }

    dense = sorted(points[f'repvgg_{name}'] for name in FAMILY if 'g' not in name)
    axes.plot(*zip(*dense, strict=True), color=theme.first, linewidth=2.2, zorder=2)
    for name, place in FAMILY.items():
        face = theme.background if 'g' in name else theme.first
        point = points[f'repvgg_{name}']
        axes.plot(*point, 'o', markersize=8, color=theme.first, markerfacecolor=face, markeredgewidth=1.8, zorder=3)
        label(axes, name.replace('a', 'A').replace('b', 'B'), point, place, color=theme.first)
    resnets = sorted(points[f'torchvision:{name}'] for name in RESNETS)
    axes.plot(*zip(*resnets, strict=True), color=theme.third, linewidth=1.5, zorder=1)
    axes.plot(*points['torchvision:resnet34'], 's', markersize=7, color=theme.third)
    for name, (title, place) in PEERS.items():
        axes.plot(*points[name], 's', markersize=7, color=theme.third)
        label(axes, title, points[name], place)

    axes.set_xscale('log')
    axes.set_xlim(3.9, 108)
    axes.set_ylim(68.7, 81.8)
    axes.set_xticks(ticks := [5, 10, 20, 50, 100], [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel('images per second, more is better')
    axes.set_ylabel('published ImageNet top-1, %')
    axes.grid()
    note: dict[str, Any] = dict(transform=axes.transAxes, fontsize=SMALL_POINTS)
    better = 'better: up and to the right \N{NORTH EAST ARROW}'
    axes.text(0.985, 0.97, better, ha='right', va='top', color=theme.second, **note)
    colors = 'blue: RepVGG, hollow with groups\ngrey: others'
    axes.text(0.015, 0.04, colors, va='bottom', color=theme.muted, **note)
    return figure


def draw_forms(theme: Theme) -> Figure:
    """Draw milliseconds per image of timm's training form, the zoo's training form and the deploy form."""
    figure = new_figure(
        theme,
        'The deploy form is fastest; in batches the training form comes near',
        f'Milliseconds per image in eval(), float32: {XEON}',
    )
    colors = {'timm, training form': theme.third, 'repvgg_zoo, training form': theme.second, 'deploy form': theme.first}
    kinds = (('timm:', 'training'), ('', 'training'), ('', 'deploy'))
    batches = ('1', '16')
    for index, model in enumerate(('a0', 'b1')):
        axes = figure.add_axes((0.115 + 0.47 * index, 0.13, 0.39, 0.59))
        series = {}
        for (name, color), (prefix, form) in zip(colors.items(), kinds, strict=True):
            values = [_ms_per_image(f'{prefix}repvgg_{model}', form, batch) for batch in batches]
            series[name] = color, values
        bars(axes, [f'batch {batch}' for batch in batches], series, heading=f'RepVGG-{model.upper()}')
    legend(figure, colors)
    return figure


def _ms_per_image(model: str, form: str, batch: str) -> float:
    setting = dict(form=form, batch=batch, dtype='float32', layout='contiguous')
    (row,) = read_csv('benchmarks/cpu/forms.csv', model=model, **setting)
    return float(row['latency_ms']) / int(batch)


RUNTIMES = {
    'eager': 'PyTorch, eager',
    'compile': 'torch.compile',
    'torchscript': 'TorchScript',
    'onnxruntime': 'ONNX Runtime',
    'openvino': 'OpenVINO',
    'ncnn': 'ncnn',
}


def draw_runtimes(theme: Theme) -> Figure:
    """Draw milliseconds of the deploy form by runtime."""
    figure = new_figure(
        theme,
        'In bfloat16 OpenVINO is fastest; in float32 ONNX Runtime equals it',
        f'Milliseconds for one image, deploy form: {XEON}',
    )
    colors = {'float32': theme.third, 'bfloat16': theme.first}
    for index, model in enumerate(('a0', 'b1')):
        axes = figure.add_axes((0.2 + 0.415 * index, 0.12, 0.36, 0.62))
        series = {
            name: (color, [_ms(f'repvgg_{model}', runtime, name) for runtime in RUNTIMES])
            for name, color in colors.items()
        }
        bars(
            axes,
            list(RUNTIMES.values()) if index == 0 else [''] * len(RUNTIMES),
            series,
            heading=f'RepVGG-{model.upper()}',
        )
    legend(figure, colors)
    return figure


def _ms(model: str, runtime: str, dtype: str) -> float | None:
    rows = read_csv('benchmarks/cpu/runtimes.csv', model=model, runtime=runtime, dtype=dtype)
    return float(rows[0]['latency_ms']) if rows else None


def draw_memory(theme: Theme) -> Figure:
    """Draw what a training step keeps for the backward pass."""
    figure = new_figure(
        theme,
        "A training step keeps a third fewer bytes than timm's",
        'MB per image of 224 pixels, kept for the backward pass, float32, PyTorch 2.14.1, timm 1.0.31',
    )
    colors = {'timm': theme.third, 'repvgg_zoo': theme.first}
    series = {}
    for code, color in colors.items():
        rows = {row['model']: float(row['kept_mb_per_image']) for row in read_csv('benchmarks/cpu/kept.csv', code=code)}
        series[code] = color, [rows['repvgg_a0'], rows['repvgg_b1']]
    bars(figure.add_axes((0.16, 0.14, 0.79, 0.66)), ['RepVGG-A0', 'RepVGG-B1'], series, numbers='{:.2f}')
    legend(figure, colors)
    return figure
