"""Experiments on CIFAR-10.

    python -m experiments vgg --data cifar10 --out runs/vgg     # goes on with what it has not trained yet
    python -m experiments vgg --report experiments/results/vgg        # table of a folder of results

`--data` holds the folders `train` and `test`, with a folder of images for each class.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from experiments import vgg
from experiments.pool import RESULTS, Images, train_all
from repvgg_zoo.tools.console import positive
from repvgg_zoo.tools.devices import add_device_argument

STUDIES = {'vgg': vgg}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog='python -m experiments', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('study', choices=STUDIES)
    parser.add_argument('--report', type=Path, metavar='FOLDER', help='write the table of these results, train nothing')
    parser.add_argument('--data', help='folder of the images')
    parser.add_argument('--val-split', default='test', help='name of the folder of the test images (%(default)s)')
    parser.add_argument('--out', type=Path, help='folder for the results')
    parser.add_argument('--at-once', type=positive, help='networks at a time (4 on a GPU, else 1)')
    parser.add_argument('--minutes', type=float, default=float('inf'), help='begin no network after that')
    parser.add_argument('--only', metavar='NETWORK', help='this network alone')
    parser.add_argument('--epochs', type=positive, help="other than the study's")
    parser.add_argument('--images', type=positive, help='train and test on that many images only')
    add_device_argument(parser, what='it trains')
    args = parser.parse_args()
    study = STUDIES[args.study]
    if args.report:
        if not (args.report / RESULTS).is_file():
            parser.error(f'argument --report: {str(args.report)!r} has no {RESULTS}')
        study.report(args.report)
        return
    if not (args.data and args.out):
        parser.error('training needs --data and --out')
    for split in ('train', args.val_split):
        if not Path(args.data, split).is_dir():
            parser.error(f'{args.data!r} has no folder {split!r}')
    jobs = [job for job in study.jobs() if args.only in (None, job.network)]
    if not jobs:
        names = ', '.join(dict.fromkeys(job.network for job in study.jobs()))
        parser.error(f'argument --only: no network {args.only!r}; there are {names}')
    torch.backends.cudnn.benchmark = True
    recipe = replace(study.RECIPE, epochs=args.epochs or study.RECIPE.epochs)
    images = Images(args.data, args.val_split, args.images, args.device)
    at_once = args.at_once or (4 if images.device.type == 'cuda' else 1)
    train_all(jobs, images, recipe, args.out, at_once=at_once, minutes=args.minutes)


if __name__ == '__main__':
    main()
