"""What branches are worth to VGG-16 on CIFAR-10: a network of ACNet's and DBB's papers, with `overparameterize`."""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path

import timm
from torch import nn

import repvgg_zoo
from experiments.arguments import add_training_arguments, train
from experiments.family import mean_and_spread
from experiments.records import RESULTS, read
from experiments.training import Job, Recipe
from repvgg_zoo.tools.markdown import markdown_table

RECIPE = Recipe(epochs=15)
NONE = 'none'
BLOCKS = (NONE, 'doconv', 'acb', 'dbb')
SEEDS = (0, 1, 2)


add_arguments = add_training_arguments


def run(args: argparse.Namespace) -> None:
    train(args, jobs(), RECIPE, args.out / 'vgg')


def jobs() -> list[Job]:
    return [Job(block, seed, partial(vgg, block), folds=block != NONE) for seed in SEEDS for block in BLOCKS]


def vgg(block: str) -> nn.Module:
    """Return timm's VGG-16 with BN, without its two hidden linear layers of 4096 channels."""
    features = timm.create_model('vgg16_bn').features
    network = nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    return network if block == NONE else repvgg_zoo.overparameterize(network, block)


def report(folder: Path) -> None:
    """Print the table."""
    table = []
    for block in BLOCKS:
        rows = [row for row in read(folder / RESULTS) if row['network'] == block]
        if not rows:
            continue
        loss, *top1 = ([float(row[column]) for row in rows] for column in ('train_loss', 'top1_pct', 'folded_top1_pct'))
        table.append((block, f'{statistics.mean(loss):.3f}', *map(mean_and_spread, top1), str(len(rows))))
    header = ('block', 'loss in training', 'top-1 %', 'folded %', 'seeds')
    print(markdown_table(table, header, text_columns=('block',)))
