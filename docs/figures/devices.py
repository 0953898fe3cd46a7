"""INT8 by processor, and the speed on a GPU."""

from matplotlib.figure import Figure
from style import Theme, bars, legend, new_figure, read_csv


def draw_int8(theme: Theme) -> Figure:
    """Draw milliseconds in float32 and in INT8."""
    figure = new_figure(
        theme,
        'OpenVINO runs INT8 10 to 12 times as fast with AMX, 2.2 with AVX2',
        'Milliseconds for one image, RepVGG-B1. Another run of OpenVINO float32 with AMX: 69.5',
    )
    rows = read_csv('benchmarks/cpu/int8.csv')
    colors = {'float32': theme.third, 'INT8': theme.first}
    series = {name: (color, [float(row[f'{name.lower()}_ms']) for row in rows]) for name, color in colors.items()}
    groups = [f'{row["runtime"]}\n{row["processor"]}' for row in rows]
    bars(figure.add_axes((0.245, 0.13, 0.72, 0.68)), groups, series)
    legend(figure, colors)
    return figure


NETWORKS = {
    'repvgg_a0': 'RepVGG-A0',
    'repvgg_a2': 'RepVGG-A2',
    'repvgg_b1': 'RepVGG-B1',
    'repvgg_b3': 'RepVGG-B3',
    'timm:resnet18': 'ResNet-18',
    'timm:resnet50': 'ResNet-50',
    'timm:resnet101': 'ResNet-101',
}


def draw_gpu(theme: Theme) -> Figure:
    """Draw images per second of an H100."""
    figure = new_figure(
        theme,
        'In eager mode, B1 runs 1.4 times as many images as ResNet-50',
        'Images per second of an H100, batch 256, bfloat16, channels_last, eager PyTorch 2.11.0, CUDA 13.0',
    )
    setting = dict(work='infer', runtime='eager', batch='256', part='inference_eager')
    speeds = {row['model']: float(row['images_per_s']) for row in read_csv('benchmarks/gpu/h100/speed.csv', **setting)}
    colors = {'RepVGG, deploy form': theme.first, 'ResNet': theme.third}
    series = {
        name: (
            color,
            [speeds[model] if name.startswith(label.partition('-')[0]) else None for model, label in NETWORKS.items()],
        )
        for name, color in colors.items()
    }
    axes = figure.add_axes((0.15, 0.05, 0.82, 0.77))
    bars(axes, list(NETWORKS.values()), series, numbers='{:,.0f}')
    return figure
