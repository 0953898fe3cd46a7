"""How deep can a network without shortcuts be? Top-1 and training loss against depth, for one width and one recipe.

Images are halved by the first convolution. A network of step n has 6 n + 2 layers, as the ResNets for CIFAR-10 of arXiv
1512.03385, section 4.2.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import timm
from timm.models.resnet import BasicBlock, downsample_conv
from torch import nn

from experiments.arguments import add_training_arguments, train
from experiments.family import mean_and_spread
from experiments.records import RESULTS, read
from experiments.training import Job, Recipe
from repvgg_zoo.tools.markdown import markdown_table

RECIPE = Recipe(epochs=10)
WIDTHS = (16, 32, 64)
STEPS, DEEPEST = (1, 4, 9), 16
LEAKY, RESIDUAL = 'leaky', 'residual'
NETWORKS = ('plain', RESIDUAL, 'repvgg', 'plain_delta', 'dirac', LEAKY)
LEAKY_SLOPE, MAX_NORM = 0.1, 1.0
OF_SKELETONS = ('acb', 'dbb')
SKELETON_STEP = 4
SEEDS = (0, 1, 2)


add_arguments = add_training_arguments


def run(args: argparse.Namespace) -> None:
    train(args, jobs(), RECIPE, args.out / 'depth')


def jobs() -> list[Job]:
    """Return seed after seed, the slowest before the last seed. The weights of seed 0 are kept for other studies."""
    first, second, third = ([(network, n, seed) for n in STEPS for network in NETWORKS] for seed in SEEDS)
    skeletons = [(block, SKELETON_STEP, 0) for block in OF_SKELETONS]
    deepest = [(network, DEEPEST, 0) for network in NETWORKS]
    return [job(*settings) for settings in (*first, *skeletons, *second, *deepest, *third)]


def job(network: str, n: int, seed: int) -> Job:
    return Job(
        name(network, n),
        seed,
        partial(create, network, n),
        folds=network != RESIDUAL,
        keeps=seed == 0,
        max_norm=MAX_NORM if network == LEAKY else None,
    )


def layers(n: int) -> int:
    return 6 * n + 2


def name(network: str, n: int) -> str:
    return f'{network}-{layers(n)}'


def create(network: str, n: int) -> nn.Module:
    if network == RESIDUAL:
        return residual(n)
    if network == LEAKY:
        return repvgg('plain', n, act_layer=partial(nn.LeakyReLU, LEAKY_SLOPE))
    return repvgg(network, n)


def repvgg(block: str, n: int, **options: object) -> nn.Module:
    """Return a RepVGG network of 6 n + 1 convolutions: the first two of its four stages have one width."""
    widths = tuple(width / base for width, base in zip((WIDTHS[0], *WIDTHS), (64, 128, 256, 512), strict=True))
    depths = (n, n, 2 * n, 2 * n)
    return timm.create_model(
        'test_repvgg', num_classes=10, block=block, depths=depths, width=widths, strides=(2, 1, 1, 2, 2), **options
    )


def residual(n: int) -> nn.Module:
    """Return a residual network of 6 n + 1 convolutions and two projections, of timm's blocks."""
    first = WIDTHS[0]
    layers = [nn.Conv2d(3, first, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(first), nn.ReLU()]
    before = first
    for width in WIDTHS:
        for index in range(n):
            is_new = index == 0 and width != before
            stride = 2 if is_new else 1
            projection = downsample_conv(before, width, 1, stride=stride) if is_new else None
            layers.append(BasicBlock(before, width, stride=stride, downsample=projection))
            before = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10)]
    network = nn.Sequential(*layers)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode='fan_out', nonlinearity='relu')
    return network


def report(folder: Path) -> None:
    """Print top-1 of each network at each depth, with the loss of the last epoch of the training."""
    rows = read(folder / RESULTS)
    steps = (*STEPS, DEEPEST)
    table = [(network, *(cell(rows, name(network, n)) for n in steps)) for network in NETWORKS]
    print(markdown_table(table, ('network', *(str(layers(n)) for n in steps)), text_columns=('network',)))


def cell(rows: list[dict[str, str]], network: str) -> str:
    """Tell the mean top-1 over the seeds, its spread, and the loss."""
    rows = [row for row in rows if row['network'] == network]
    if not rows:
        return ''
    loss = sum(float(row['train_loss']) for row in rows) / len(rows)
    return f'{mean_and_spread([float(row["top1_pct"]) for row in rows])} ({loss:.2f})'
