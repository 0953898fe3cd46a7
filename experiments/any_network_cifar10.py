"""What branches are worth to a plain network on CIFAR-10: `train` runs timm's train.py, `report` writes the table.

    python -m experiments.any_network_cifar10 train --script train.py --data cifar10 --runs runs
    python -m experiments.any_network_cifar10 report --data cifar10 --runs runs

The network is timm's `test_resnet`, alone (`none`) and with branches by the launcher's `--overparameterize`. `--data`
holds the folders `train` and `test`, with a folder of images for each class. A run that was stopped goes on where it
was; one that is complete, or has its line in the table, is left alone.
"""

import argparse
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import timm
from torch import nn

import repvgg_zoo
from experiments.family import (
    PRECISIONS,
    is_complete,
    mean_and_spread,
    precision_of,
    read_rows,
    run_training,
    top1_pct,
    training_costs,
    write_rows,
)
from repvgg_zoo.tools.convert import convert
from repvgg_zoo.tools.markdown import markdown_table

EPOCHS = 15
NETWORK = 'test_resnet'
NETWORK_KWARGS = dict(output_stride=8)
"""For images of 32 pixels: feature maps of 8 x 8 and 4 x 4."""
NONE = 'none'
JOBS = [(block, seed) for seed in range(3) for block in (NONE, 'doconv', 'acb', 'mobileone', 'dbb')]
RESULTS = Path(__file__).with_suffix('.csv')
TOP1 = ('training_top1_pct', 'folded_top1_pct')
COLUMNS = ('block', 'seed', 'precision', *TOP1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('step', choices=('train', 'report'))
    parser.add_argument('--script', help="timm's train.py")
    parser.add_argument('--data', type=Path, required=True)
    parser.add_argument('--runs', type=Path, required=True)
    parser.add_argument('--parallel', type=int, default=2, help='runs at a time, which share the cores (%(default)s)')
    parser.add_argument('--precision', choices=PRECISIONS, default='bfloat16', help='of training (%(default)s)')
    args = parser.parse_args()
    if args.step == 'train':
        args.runs.mkdir(parents=True, exist_ok=True)
        jobs = [job for job in JOBS if job not in read_rows(RESULTS)]
        with ThreadPoolExecutor(args.parallel) as pool:
            list(pool.map(lambda job: train(*job, args), jobs))
    else:
        report(args)


def train(block: str, seed: int, args: argparse.Namespace) -> None:
    launcher = [] if block == NONE else ['--overparameterize', f'{NETWORK}:{block}']
    model = NETWORK if block == NONE else f'{NETWORK}_{block}'
    kwargs = [f'{key}={value}' for key, value in NETWORK_KWARGS.items()]
    options = ['--model', model, '--model-kwargs', *kwargs, '--input-size', '3', '32', '32']
    run_training(f'{block}-{seed}', options, seed, args, epochs=EPOCHS, launcher=launcher)


def report(args: argparse.Namespace) -> None:
    rows = read_rows(RESULTS)
    for block, seed in JOBS:
        run = args.runs / f'{block}-{seed}'
        if (block, seed) not in rows and is_complete(run, EPOCHS):
            top1 = accuracies(run, block, args.data)
            rows[block, seed] = dict(block=block, seed=str(seed), precision=precision_of(run)) | top1
            write_rows(rows, COLUMNS, RESULTS)
    blocks = list(dict.fromkeys(block for block, _ in JOBS))
    costs = training_costs({block: create(block) for block in blocks}, args.precision)
    table = []
    for block in blocks:
        runs = [row for key, row in rows.items() if key[0] == block]
        top1_cells = [mean_and_spread([float(run[column]) for run in runs]) for column in TOP1]
        table.append((block, *top1_cells, str(len(runs)), *costs[block]))
    header = ('block', 'training %', 'folded %', 'seeds', 'step', 'kept', 'parameters k')
    print(markdown_table(table, header, text_columns=('block',)))


def create(block: str) -> nn.Module:
    model = timm.create_model(NETWORK, num_classes=10, **NETWORK_KWARGS)
    return model if block == NONE else repvgg_zoo.overparameterize(model, block)


def accuracies(run: Path, block: str, data: Path) -> dict[str, str]:
    """Of the last epoch, in float32: with branches, and of what `convert` makes of them, as plain timm loads it."""
    last = run / 'last.pth.tar'
    if block == NONE:
        model = timm.create_model(NETWORK, num_classes=10, checkpoint_path=str(last), **NETWORK_KWARGS)
        model.pretrained_cfg['input_size'] = (3, 32, 32)
        top1 = [top1_pct(model.eval(), data / 'test')] * 2
    else:
        with tempfile.TemporaryDirectory() as folder:
            convert(last, Path(folder) / 'plain')
            folded = timm.create_model(f'local-dir:{folder}/plain', pretrained=True).eval()
            name = repvgg_zoo.register_overparameterized(NETWORK, block)
            model = timm.create_model(name, num_classes=10, checkpoint_path=str(last), **NETWORK_KWARGS).eval()
            model.pretrained_cfg.update(folded.pretrained_cfg)  # the preprocessing of the training
            top1 = [top1_pct(m, data / 'test') for m in (model, folded)]
    return {column: f'{value:.2f}' for column, value in zip(TOP1, top1, strict=True)}


if __name__ == '__main__':
    main()
