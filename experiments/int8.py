"""What INT8 costs a network whose channels differ much in range, and what brings it back.

    python -m experiments.int8 --data cifar10 --out runs/int8

The network is the bundled model, as it is (`balanced`) and with channels scaled at random by 0.1 to 10 (`unbalanced`),
which leaves its function as it is. `--data` holds the folders `train` and `test`, with a folder of images for a class.
Ways that have their line in int8.csv beside this file are left alone.
"""

import argparse
import csv
from pathlib import Path
from typing import Any

import timm
import torch

from repvgg_zoo import RepVGG
from repvgg_zoo.quantization.equalize import neighbours, rescale
from repvgg_zoo.tools.console import progress
from repvgg_zoo.tools.markdown import markdown_table
from repvgg_zoo.tools.model_folder import save_model
from repvgg_zoo.tools.quantize.quantize import quantize

RESULTS = Path(__file__).with_suffix('.csv')
WAYS: dict[str, dict[str, Any]] = {
    '7 bits': dict(),
    '8 bits': dict(full_range=True),
    '8 bits, equalised': dict(full_range=True, equalize_layers=True),
    '8 bits, two layers in float32': dict(full_range=True, keep_float=2),
    '8 bits, trained': dict(full_range=True, finetune_on='train'),
}
"""Options of `quantize`."""
COLUMNS = ('network', 'way', 'epochs', 'float32_top1_pct', 'int8_top1_pct', 'same_top_class_pct')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, required=True, help='folder of the images')
    parser.add_argument('--out', type=Path, required=True, help='folder for the models')
    parser.add_argument('--ways', nargs='+', choices=WAYS, default=WAYS, metavar='WAY', help='only these')
    parser.add_argument('--epochs', type=int, default=3, help='of each training (%(default)s)')
    args = parser.parse_args()
    rows = list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []
    for network, make in {'balanced': balanced, 'unbalanced': unbalanced}.items():
        source = args.out / network
        if not source.exists():
            source.mkdir(parents=True)
            save_model(make(), source)
        for way in args.ways:
            options = WAYS[way]
            if network == 'balanced' and 'finetune_on' in options:
                continue  # there is nothing to win back
            if (network, way) in {(row['network'], row['way']) for row in rows}:
                continue
            rows.append(measure(network, way, options, source, args))
            with RESULTS.open('w', newline='') as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
                writer.writeheader()
                writer.writerows(rows)
    cells = [tuple(row[column] for column in COLUMNS) for row in rows]
    print(markdown_table(cells, COLUMNS, text_columns=COLUMNS[:2]))


def measure(network: str, way: str, options: dict[str, Any], source: Path, args: argparse.Namespace) -> dict[str, str]:
    if 'finetune_on' in options:
        options = options | dict(finetune_on=args.data / 'train', epochs=args.epochs)
    torch.manual_seed(0)
    with progress() as track:
        report = quantize(
            source,
            args.out / f'{network}, {way}',
            images=args.data / 'test',
            calibration=args.data / 'train',
            overwrite=True,
            track=track,
            **options,
        )
    exact, last = report.precisions[0], report.precisions[-1]
    figures = (exact.top1_pct, last.top1_pct, last.same_top_class_pct)
    return dict(zip(COLUMNS, (network, way, str(report.epochs), *(f'{value:.2f}' for value in figures)), strict=True))


def balanced() -> RepVGG:
    return timm.create_model('test_repvgg.cifar10_deploy', pretrained=True).eval()


def unbalanced() -> RepVGG:
    model, generator = balanced(), torch.Generator().manual_seed(0)
    for first, second in neighbours(model):
        scale = 10 ** (2 * torch.rand(first.reparam_conv.out_channels, generator=generator) - 1)
        rescale(first.reparam_conv, second.reparam_conv, scale)
    return model


if __name__ == '__main__':
    main()
