"""What does INT8 cost networks whose channels differ in range, and what brings it back?

`balanced` is the bundled model. `unbalanced` is the same with channels scaled at random by 0.1 to 10, which leaves its
function as it is. The others are trained as the study `depth` does, in its folder: with the weight decay of this
package, with weight decay on every parameter as the early official code had it, and as `qarepvgg`, made for INT8.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch

from experiments import depth
from experiments.arguments import add_training_arguments, image_arguments, train
from experiments.pool import trained
from experiments.records import append, read, settle
from experiments.training import MEAN, STD, Job, image_settings
from repvgg_zoo import RepVGG
from repvgg_zoo.quantization.equalize import neighbours, rescale
from repvgg_zoo.tools.console import positive, progress
from repvgg_zoo.tools.markdown import markdown_table
from repvgg_zoo.tools.model_folder import save_model
from repvgg_zoo.tools.quantize.quantize import quantize

STEP = 4
RESULTS_OF_WAYS = 'ways.csv'
WAYS: dict[str, dict[str, Any]] = {
    '7 bits': dict(),
    '8 bits': dict(full_range=True),
    '8 bits, equalised': dict(full_range=True, equalize_layers=True),
    '8 bits, two layers in float32': dict(full_range=True, keep_float=2),
    '8 bits, trained': dict(full_range=True, finetune_on='train'),
}
"""Options of `quantize`."""
COLUMNS = ('network', 'way', 'epochs', 'float32_top1_pct', 'int8_top1_pct', 'same_top_class_pct')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_training_arguments(parser)
    parser.add_argument('--ways', nargs='+', choices=WAYS, default=WAYS, metavar='WAY', help='only these')
    parser.add_argument('--qat-epochs', type=positive, default=3, help='of each training in INT8 (%(default)s)')


def run(args: argparse.Namespace) -> None:
    """Write `ways.csv`, a line for each way of each network, and train what is missing."""
    out = args.out / 'int8'
    makers = {'balanced': balanced, 'unbalanced': unbalanced}
    if args.only not in makers:
        trained_jobs = train(args, jobs(), depth.RECIPE, args.out / 'depth')
        makers |= {job.network: partial(normalised, job, args.out / 'depth') for job in trained_jobs}
    data, split, *_ = image_arguments(args, 'cpu')
    settle(out, image_settings(data, split, None) | {'qat_epochs': args.qat_epochs})
    for network, make in makers.items():
        if args.only not in (None, network):
            continue
        source = out / 'models' / network
        if not source.exists():
            model = make()
            source.mkdir(parents=True)
            save_model(model, source)
        done = {row['way'] for row in read(out / RESULTS_OF_WAYS) if row['network'] == network}
        for way in args.ways:
            if way in done or (network, way) == ('balanced', '8 bits, trained'):  # there is nothing to win back
                continue
            options = dict(WAYS[way])
            if 'finetune_on' in options:
                options |= dict(finetune_on=Path(data, 'train'), epochs=args.qat_epochs)
            with progress() as track:
                report_ = quantize(
                    source,
                    out / 'models' / f'{network}, {way}',
                    images=Path(data, split),
                    calibration=Path(data, 'train'),
                    overwrite=True,
                    track=track,
                    **options,
                )
            by_name = {precision.name: precision for precision in report_.precisions}
            exact, int8 = by_name['float32'], by_name['int8 trained' if 'finetune_on' in options else 'int8']
            figures = (exact.top1_pct, int8.top1_pct, int8.same_top_class_pct)
            line = (network, way, report_.epochs, *(f'{value:.2f}' for value in figures))
            append(out / RESULTS_OF_WAYS, COLUMNS, [line])
            print(*line, flush=True)


def jobs() -> list[Job]:
    repvgg = depth.job('repvgg', STEP, 0)
    all_decayed = replace(repvgg, network=f'{repvgg.network}-all-decayed', decays_all=True)
    return [repvgg, all_decayed, depth.job('qarepvgg', STEP, 0)]


def normalised(job: Job, out: Path) -> RepVGG:
    """Return a trained network that tells how its images are prepared."""
    model: Any = trained(job, out)
    model.pretrained_cfg.update(mean=tuple(m / 255 for m in MEAN), std=tuple(s / 255 for s in STD))
    return model


def balanced() -> RepVGG:
    return timm.create_model('test_repvgg.cifar10_deploy', pretrained=True).eval()


def unbalanced() -> RepVGG:
    model, generator = balanced(), torch.Generator().manual_seed(0)
    for first, second in neighbours(model):
        scale = 10 ** (2 * torch.rand(first.reparam_conv.out_channels, generator=generator) - 1)
        rescale(first, second, scale)
    return model


def report(folder: Path) -> None:
    """Print top-1 of each network, by the way to INT8."""
    rows = read(folder / RESULTS_OF_WAYS)
    networks = list(dict.fromkeys(row['network'] for row in rows))
    found = {(row['network'], row['way']): row for row in rows}
    exact = {row['network']: row['float32_top1_pct'] for row in rows}
    table = [('float32', *(exact[network] for network in networks))]
    for way in WAYS:
        cells = (found.get((network, way), {}).get('int8_top1_pct', '') for network in networks)
        table.append((way, *cells))
    print(markdown_table(table, ('way', *networks), text_columns=('way',)))
