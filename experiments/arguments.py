"""What studies ask of the command line."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from experiments.errors import StudyError
from experiments.pool import Pool
from experiments.training import Job, Recipe
from repvgg_zoo.tools.console import positive
from repvgg_zoo.tools.devices import add_device_argument


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--data', required=True, help='folder of the images')
    parser.add_argument('--val-split', default='test', help='name of the folder of the test images (%(default)s)')
    parser.add_argument('--images', type=positive, help='take that many images of each folder only')


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    add_image_arguments(parser)
    parser.add_argument('--at-once', type=positive, help='networks at a time (4 on a GPU, else 1)')
    parser.add_argument('--minutes', type=float, default=float('inf'), help='begin no network after that')
    parser.add_argument('--only', metavar='NETWORK', help='this network alone')
    parser.add_argument('--epochs', type=positive, help="other than the study's")
    add_device_argument(parser, what='it trains')


def image_arguments(args: argparse.Namespace, device: str) -> tuple[str, str, int | None, str]:
    """Return the arguments of `Images`.

    Raises:
        StudyError: A folder of images is missing.
    """
    for split in ('train', args.val_split):
        if not Path(args.data, split).is_dir():
            raise StudyError(f'{args.data!r} has no folder {split!r}')
    return args.data, args.val_split, args.images, device


def train(args: argparse.Namespace, jobs: Sequence[Job], recipe: Recipe, out: Path) -> list[Job]:
    """Train what is missing of a study.

    Returns:
        The jobs that are done: without those that `--only` and `--minutes` left out.

    Raises:
        StudyError: No job has the name of `--only`, or a folder of images is missing.
    """
    chosen = [job for job in jobs if args.only in (None, job.network)]
    if not chosen:
        names = ', '.join(dict.fromkeys(job.network for job in jobs))
        raise StudyError(f'--only: no network {args.only!r}; there are {names}')
    torch.backends.cudnn.benchmark = True
    pool = Pool(
        images=image_arguments(args, args.device),
        recipe=replace(recipe, epochs=args.epochs or recipe.epochs),
        out=out,
        at_once=args.at_once or (4 if torch.device(args.device).type == 'cuda' else 1),
        end=time.time() + 60 * args.minutes,
    )
    pool.train(chosen)
    return pool.done(chosen)
