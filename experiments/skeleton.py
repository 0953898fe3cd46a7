"""Does the skeleton of the kernel grow? Mean magnitude of the nine taps of the equivalent kernels, by stage.

ACNet (arXiv 1908.03930, section 4.4) finds that the middle row and column of a kernel matter most. The networks are
those of the study `depth`, seed 0, before and after the training; what is not trained yet is trained first.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments import depth
from experiments.arguments import add_training_arguments, image_arguments, train
from experiments.cifar10 import normalise
from experiments.pool import trained
from experiments.records import RESULTS, append, read, read_settings, settle
from experiments.training import Images, Job
from repvgg_zoo.blocks.base import ReparamBlock
from repvgg_zoo.tools.markdown import markdown_table

BLOCKS = ('plain', 'acb', 'repvgg', 'dbb')
IMAGES = 2000
TAPS = [(row, column) for row in range(3) for column in range(3)]

add_arguments = add_training_arguments


def run(args: argparse.Namespace) -> None:
    """Write `results.csv`, a line for each tap of each stage, before and after the training."""
    jobs = [depth.job(block, depth.SKELETON_STEP, 0) for block in BLOCKS]
    jobs = train(args, jobs, depth.RECIPE, args.out / 'depth')
    out = args.out / 'skeleton'
    data, split, count, _ = image_arguments(args, 'cpu')
    images = Images(data, split, count or IMAGES, 'cpu')
    settle(out, read_settings(args.out / 'depth') | {'images': len(images.test)})
    done = {row['network'] for row in read(out / RESULTS)}
    for job in jobs:
        if job.network not in done:
            lines = [
                (job.network, when, stage, row, column, f'{taps[row, column]:.4f}')
                for when, network in (('before', untrained(job, images)), ('after', trained(job, args.out / 'depth')))
                for stage, taps in enumerate(magnitudes(network))
                for row, column in TAPS
            ]
            append(out / RESULTS, ('network', 'training', 'stage', 'row', 'column', 'magnitude'), lines)


@torch.no_grad()
def untrained(job: Job, images: Images) -> nn.Module:
    """Return the network with which the training begins, with the statistics of all images in its norms."""
    torch.manual_seed(job.seed)
    network = job.create().train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # so that one batch counts
    network(normalise(images.test, images.mean, images.std))
    return network.eval()


@torch.no_grad()
def magnitudes(network: nn.Module) -> list[Tensor]:
    """Return the mean absolute tap `(3, 3)` of each stage, relative to the mean of all nine.

    Every layer of a stage counts the same, whatever the size of its weights.
    """
    stages = []
    for stage in network.stages:
        blocks = [block for block in stage.children() if isinstance(block, ReparamBlock)]
        taps = [block.equivalent_kernel_bias()[0].abs().mean((0, 1)) for block in blocks]
        stages.append(torch.stack([tap / tap.mean() for tap in taps]).mean(0))
    return stages


def report(folder: Path) -> None:
    """Print the magnitudes of centre, edges and corners."""
    rows = read(folder / RESULTS)
    table = []
    for name, when, stage in dict.fromkeys((row['network'], row['training'], int(row['stage'])) for row in rows):
        taps = taps_of(rows, name, when, stage)
        corners = taps[::2, ::2].mean().item()
        edges = ((taps[1].sum() + taps[:, 1].sum() - 2 * taps[1, 1]) / 4).item()
        cells = (f'{value:.2f}' for value in (taps[1, 1].item(), edges, corners))
        table.append((name, when, str(stage + 1), *cells))
    header = ('network', 'training', 'stage', 'centre', 'edges', 'corners')
    print(markdown_table(table, header, text_columns=header[:2]))


def taps_of(rows: list[dict[str, str]], network: str, when: str, stage: int) -> Tensor:
    """Return the magnitudes `(3, 3)` of a stage, before or after the training."""
    taps = torch.zeros(3, 3)
    for row in rows:
        if (row['network'], row['training'], row['stage']) == (network, when, str(stage)):
            taps[int(row['row']), int(row['column'])] = float(row['magnitude'])
    return taps
