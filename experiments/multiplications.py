"""What predicts latency? Multiplications, memory access and other counts, beside the time in ncnn.

Multiplications are counted with and without Winograd's algorithm. The others follow the guidelines of ShuffleNetV2
(arXiv 1807.11164, section 2): values that layers read and write, number of layers, outputs of all other operators.

ncnn computes 3x3 convolutions of stride 1 by Winograd's algorithm, and can be told not to. It takes it for groups, too,
of more than 8 channels. Both times are of one image, in float32, of the folded network, in interleaved rounds.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import correlation, median
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import repvgg_zoo
from experiments.errors import StudyError
from experiments.records import RESULTS, append, processor, read, settle
from repvgg_zoo.tools.benchmark.measure import time_rounds
from repvgg_zoo.tools.benchmark.runtimes import RUNTIMES
from repvgg_zoo.tools.console import no_progress, positive
from repvgg_zoo.tools.markdown import markdown_table

REPVGG = tuple(f'repvgg_{name}' for name in ('a0', 'a1', 'a2', 'b0', 'b1', 'b1g4', 'b2', 'b3'))
OTHERS = (
    'resnet18',
    'resnet34',
    'resnet50',
    'resnext50_32x4d',
    'vgg11_bn',
    'densenet121',
    'mobilenetv2_100',
    'mobileone_s1',
    'efficientnet_b0',
    'regnety_016',
)
MODELS = (*REPVGG, *OTHERS)
PX, ROUNDS = 224, 15
MIN_CHANNELS = 8
"""Of a group, which ncnn does not compute by Winograd's algorithm."""
MACS = 'gmacs'
WITH, WITHOUT = 'ncnn_ms', 'ncnn_no_winograd_ms'
PREDICTORS = {
    'multiplications': MACS,
    'Winograd F(2x2, 3x3)': 'winograd2_gmuls',
    'Winograd F(4x4, 3x3)': 'winograd4_gmuls',
    'parameters': 'params_m',
    'values read and written': 'accessed_m',
    'outputs of non-layers': 'others_m',
    'layers': 'layers',
}
COLUMNS = ('model', *PREDICTORS.values(), WITH, WITHOUT)


class Counts(NamedTuple):
    """Of one image, in units; a layer is a convolution or a linear layer."""

    macs: int
    winograd2: int
    winograd4: int
    params: int
    accessed: int
    """Inputs, outputs and parameters of all layers."""
    others: int
    """Outputs of the operators that are no layers: activations, sums, pooling. Views do not count."""
    layers: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--data', help='not read; taken so that one command line runs all studies')
    parser.add_argument('--models', nargs='+', default=MODELS, metavar='MODEL', help='names in timm')
    parser.add_argument('--px', type=positive, default=PX, help='side of the image (%(default)s)')
    parser.add_argument('--rounds', type=positive, default=ROUNDS, help='turns of each timing (%(default)s)')


def run(args: argparse.Namespace) -> None:
    """Write `results.csv`, a line a model."""
    out = args.out / 'multiplications'
    if unknown := [name for name in args.models if not timm.is_model(name)]:
        raise StudyError(f'timm has no model {", ".join(unknown)}')
    settle(out, {'px': args.px, 'rounds': args.rounds} | processor())
    done = {row['model'] for row in read(out / RESULTS)}
    for name in args.models:
        if name in done:
            continue
        torch.manual_seed(0)
        model = folded(name)
        x = torch.randn(1, 3, args.px, args.px)
        counts = count(model, x)
        with torch.no_grad():
            runs = [RUNTIMES[runtime].prepare(model, x, 'float32') for runtime in ('ncnn', 'ncnn-no-winograd')]
        turns = [(lambda: None, partial(lambda run, _: run(), run)) for run in runs]
        times_ms = [1e3 * median(times) for times in time_rounds(turns, rounds=args.rounds, track=no_progress)]
        macs, winograd2, winograd4, params, accessed, others, layers = counts
        giga = (f'{value / 1e9:.4f}' for value in (macs, winograd2, winograd4))
        mega = (f'{value / 1e6:.3f}' for value in (params, accessed, others))
        line = (name, *giga, *mega, layers, *(f'{ms:.2f}' for ms in times_ms))
        append(out / RESULTS, COLUMNS, [line])
        print(*line, flush=True)


def folded(name: str) -> nn.Module:
    model = timm.create_model(name).eval()
    if isinstance(model, repvgg_zoo.RepVGG):
        return model.switch_to_deploy()
    return repvgg_zoo.switch_to_deploy(model, conv_bn=True, sample=torch.randn(1, 3, PX, PX))


@torch.no_grad()
def count(model: nn.Module, x: Tensor) -> Counts:
    """Count what one image costs."""
    found: Counter[str] = Counter(params=sum(p.numel() for p in model.parameters()))

    def add(layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        macs = y.numel() * layer.weight[0].numel()
        saved2, saved4 = (winograd(layer, y, tile) for tile in (2, 4))
        params = sum(p.numel() for p in layer.parameters())
        found.update(macs=macs, winograd2=saved2 or macs, winograd4=saved4 or macs, layers=1)
        found.update(accessed=inputs[0].numel() + y.numel() + params, others=-y.numel())

    handles = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    try:
        with _Outputs() as outputs:
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    found['others'] += outputs.values
    return Counts(**found)


class _Outputs(TorchDispatchMode):
    """Counts the values that operators write, in place or not."""

    values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        written = output[0] if isinstance(output, tuple) else output  # of a norm, without its statistics
        if not func.is_view:
            self.values += written.numel()
        return output


def winograd(layer: nn.Module, y: Tensor, tile: int) -> int | None:
    """Count the multiplications of F(tile x tile, 3x3), or return None where the algorithm does not apply.

    Each tile of tile² outputs takes (tile + 2)² multiplications for each pair of channels (Lavin and Gray, arXiv
    1509.09308, section 4.1). Tiles at the border are whole ones. The transforms do not count.
    """
    if not isinstance(layer, nn.Conv2d):
        return None
    inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    is_plain = layer.kernel_size == (3, 3) and layer.stride == layer.dilation == (1, 1)
    if not is_plain or max(inputs, outputs) <= MIN_CHANNELS:
        return None
    tiles = math.prod(math.ceil(size / tile) for size in y.shape[2:])
    return len(y) * layer.out_channels * inputs * tiles * (tile + 2) ** 2


def report(folder: Path) -> None:
    """Print the counts and times, and the rank correlation of each count with each time."""
    rows = read(folder / RESULTS)
    print(markdown_table([tuple(row.values()) for row in rows], COLUMNS, text_columns=('model',)))
    print()
    times = {'time with Winograd': (WITH, None), 'without': (WITHOUT, None), 'time per multiplication': (WITH, MACS)}
    table = [
        (name, *(f'{rank_correlation(rows, column, time, per):.2f}' for time, per in times.values()))
        for name, column in PREDICTORS.items()
    ]
    header = ('rank correlation', *times)
    print(markdown_table(table, header, text_columns=header[:1]))


def rank_correlation(rows: list[dict[str, str]], column: str, time: str, per: str | None = None) -> float:
    """Return Spearman's correlation of a count and a time, or of both divided by another count.

    It is NaN where either is the same for all.
    """
    pairs = [tuple(float(row[key]) / (float(row[per]) if per else 1) for key in (column, time)) for row in rows]
    counts, times = (ranks([pair[index] for pair in pairs]) for index in (0, 1))
    if min(len(set(counts)), len(set(times))) < 2:
        return math.nan
    return correlation(counts, times)


def ranks(values: list[float]) -> list[float]:
    """Return the place of each value; equal ones share the mean of theirs."""
    return [sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values]
