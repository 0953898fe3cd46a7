"""What each training-time block is worth on CIFAR-10: `train` runs timm's train.py, `report` writes family.csv.

    python -m experiments.family train --script train.py --data cifar10 --runs runs
    python -m experiments.family report --data cifar10 --runs runs

`--data` holds the folders `train` and `test`, with a folder of images for each class. A run that was stopped goes on
where it was; one that is complete, or has its line in family.csv, is left alone: to repeat it, take the line out.
`report` takes the runs that are complete.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import timm
import torch
import yaml
from timm.data import create_dataset, create_transform, resolve_model_data_config

from repvgg_zoo import BLOCKS
from repvgg_zoo.tools.benchmark.cases import saved_bytes
from repvgg_zoo.tools.benchmark.measure import time_rounds
from repvgg_zoo.tools.convert import convert
from repvgg_zoo.tools.markdown import markdown_table
from repvgg_zoo.tools.quantize.quantize import quantize

EPOCHS = 10
NETWORK = dict(depths=(4, 4, 1, 1), width=(0.75, 0.75, 0.5, 0.1875), strides=(1, 2, 2, 2, 2))
"""Half the work of `test_repvgg` itself."""
RECIPE = """
    --dataset= --train-split train --val-split test --num-classes 10 --warmup-epochs 1
    --batch-size 128 --validation-batch-size 500 --opt sgd --momentum 0.9 --weight-decay 5e-4 --lr 0.1 --min-lr 0
    --sched-on-updates --scale 0.7 1.0 --ratio 0.9 1.1 --hflip 0.5 --train-interpolation bilinear --color-jitter 0
    --smoothing 0.1 --channels-last --device cpu --workers 1 --checkpoint-hist 1
"""
PRECISIONS = {'bfloat16': ['--amp', '--amp-dtype', 'bfloat16'], 'float32': []}
THREE_SEEDS = ('repvgg', 'plain', 'qarepvgg', 'mobileone')
JOBS = [(block, seed) for seed in range(3) for block in BLOCKS if seed == 0 or block in THREE_SEEDS]
RESULTS = Path(__file__).with_name('family.csv')
TOP1 = ('training_top1_pct', 'deploy_top1_pct', 'int8_top1_pct')
COLUMNS = ('block', 'seed', 'precision', *TOP1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('step', choices=('train', 'report'))
    parser.add_argument('--script', help="timm's train.py")
    parser.add_argument('--data', type=Path, required=True)
    parser.add_argument('--runs', type=Path, required=True)
    parser.add_argument('--parallel', type=int, default=2, help='runs at a time, which share the cores (%(default)s)')
    parser.add_argument('--blocks', nargs='+', choices=BLOCKS, default=BLOCKS, metavar='BLOCK', help='of these alone')
    parser.add_argument(
        '--precision',
        choices=PRECISIONS,
        default='bfloat16',
        help='of training, and of the steps that `report` times (%(default)s, which takes ten times as long on CPUs '
        'that cannot compute in it)',
    )
    args = parser.parse_args()
    if args.step == 'train':
        args.runs.mkdir(parents=True, exist_ok=True)
        jobs = [job for job in JOBS if job[0] in args.blocks and job not in read_rows()]
        with ThreadPoolExecutor(args.parallel) as pool:
            list(pool.map(lambda job: train(*job, args), jobs))
    else:
        report(args)


def is_complete(run: Path, epochs: int = EPOCHS) -> bool:
    summary = run / 'summary.csv'
    return summary.is_file() and any(row['epoch'] == str(epochs - 1) for row in csv.DictReader(summary.open()))


def train(block: str, seed: int, args: argparse.Namespace) -> None:
    kwargs = [f'{key}={str(value).replace(" ", "")}' for key, value in NETWORK.items()]
    options = ['--model', 'test_repvgg', '--model-kwargs', *kwargs, f'block={block}']
    run_training(f'{block}-{seed}', options, seed, args)


def run_training(
    name: str,
    options: Sequence[str],
    seed: int,
    args: argparse.Namespace,
    *,
    epochs: int = EPOCHS,
    launcher: Sequence[str] = (),
) -> None:
    """Run timm's train.py, or go on with a run that was stopped."""
    if is_complete(args.runs / name, epochs):
        return
    command = [sys.executable, '-m', 'repvgg_zoo', 'run', *launcher, args.script, '--data-dir', args.data]
    command += [*RECIPE.split(), '--epochs', str(epochs), *PRECISIONS[args.precision], *options]
    command += ['--seed', str(seed), '--output', args.runs, '--experiment', name]
    if (last := args.runs / name / 'last.pth.tar').is_file():
        command += ['--resume', last]
    threads = max(1, (os.cpu_count() or 1) // args.parallel)
    env = os.environ | {'OMP_NUM_THREADS': str(threads)}
    with (args.runs / f'{name}.log').open('ab') as log:
        subprocess.run(command, env=env, stdout=log, stderr=log, check=True)


def read_rows(results: Path = RESULTS) -> dict[tuple[str, int], dict[str, str]]:
    if not results.is_file():
        return {}
    with results.open(newline='') as file:
        return {(row['block'], int(row['seed'])): row for row in csv.DictReader(file)}


def write_rows(rows: Mapping[tuple[str, int], dict[str, str]], columns: Sequence[str], results: Path = RESULTS) -> None:
    with results.open('w', newline='') as file:
        writer = csv.DictWriter(file, columns, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows.values())


def report(args: argparse.Namespace) -> None:
    rows = read_rows()
    for block, seed in JOBS:
        run = args.runs / f'{block}-{seed}'
        if (block, seed) not in rows and is_complete(run):
            measured = dict(precision=precision_of(run)) | accuracies(run, block, args.data)
            rows[block, seed] = dict(block=block, seed=str(seed)) | measured
            write_rows(rows, COLUMNS)
    models = {block: timm.create_model('test_repvgg', num_classes=10, block=block, **NETWORK) for block in BLOCKS}
    costs = training_costs(models, args.precision)
    table = []
    for block in BLOCKS:
        runs = [row for key, row in rows.items() if key[0] == block]
        top1 = [mean_and_spread([float(run[column]) for run in runs]) for column in TOP1]
        table.append((block, *top1, str(len(runs)), *costs[block]))
    header = ('block', 'training %', 'deploy %', 'INT8 %', 'seeds', 'step', 'saved', 'parameters k')
    print(markdown_table(table, header, text_columns=('block',)))


def precision_of(run: Path) -> str:
    """What timm's train.py wrote down of a run."""
    return 'bfloat16' if yaml.safe_load((run / 'args.yaml').read_text())['amp'] else 'float32'


def accuracies(run: Path, block: str, data: Path) -> dict[str, str]:
    """Of the last epoch, not of the best one, which was chosen on the images that it is measured on."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, last = Path(temporary), run / 'last.pth.tar'
        model = convert(last, folder / 'model', variant='test_repvgg', block=block, model_kwargs=NETWORK).eval()
        training_top1_pct = top1_pct(model, data / 'test')
        measured = quantize(
            folder / 'model', folder / 'int8', images=data / 'test', calibration=data / 'train', track=lambda x, **_: x
        )
    top1 = (training_top1_pct, *(precision.top1_pct for precision in measured.precisions))
    return {column: f'{value:.2f}' for column, value in zip(TOP1, top1, strict=True)}


def top1_pct(model: torch.nn.Module, folder: Path) -> float:
    dataset = create_dataset('', root=str(folder))
    dataset.transform = create_transform(**resolve_model_data_config(model))
    right = 0
    with torch.inference_mode():
        for images, labels in torch.utils.data.DataLoader(dataset, batch_size=500):
            right += int((model(images).argmax(1) == labels).sum())
    return 100 * right / len(dataset)


def mean_and_spread(values: list[float]) -> str:
    """With the standard deviation over seeds, where there are more; nothing of no run."""
    if not values:
        return ''
    mean = f'{statistics.mean(values):.2f}'
    return mean if len(values) == 1 else f'{mean} ± {statistics.stdev(values):.2f}'


def training_costs(models: Mapping[str, torch.nn.Module], precision: str) -> dict[str, tuple[str, ...]]:
    """Time of a training step and bytes saved for it, relative to the first model, and parameters in thousands."""
    x = torch.randn(128, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (128,))
    autocast = torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bfloat16')

    def step(model: torch.nn.Module) -> None:
        with autocast:
            loss = torch.nn.functional.cross_entropy(model(x), labels)
        loss.backward()

    runs = [(partial(model.to, memory_format=torch.channels_last), step) for model in models.values()]
    seconds = [statistics.median(times) for times in time_rounds(runs, rounds=5, track=lambda items, **_: items)]
    with autocast:
        kept = [saved_bytes(model, x) for model in models.values()]
    return {
        block: (
            f'{seconds[index] / seconds[0]:.2f}',
            f'{kept[index] / kept[0]:.2f}',
            f'{sum(p.numel() for p in model.parameters()) / 1e3:.0f}',
        )
        for index, (block, model) in enumerate(models.items())
    }


if __name__ == '__main__':
    main()
