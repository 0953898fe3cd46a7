"""Is a network with branches an ensemble of paths? Top-1 after some branches are removed, as Veit et al. (2016) did.

A branch is removed by a scale and a shift of 0 in the norm at its end; a shortcut without a norm gets one that changes
nothing. Nothing is trained afterwards, and no running statistic moves. The networks are those of the study `depth`,
seed 0; what is not trained yet is trained first.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from timm.models.resnet import BasicBlock
from torch import nn

import repvgg_zoo
from experiments import depth
from experiments.arguments import add_training_arguments, image_arguments, train
from experiments.pool import trained
from experiments.records import RESULTS, append, read, read_settings, settle, values
from experiments.training import Images, top1_pct
from repvgg_zoo.tools.markdown import markdown_table

NETWORKS = ('repvgg', depth.RESIDUAL)
STEPS = (4, 9)
IMAGES = 2000
COUNTS = (1, 2, 4, 8, 16, 32)
DRAWS = 5
ANY = 'any'
SINGLE = 'single.csv'

add_arguments = add_training_arguments


def run(args: argparse.Namespace) -> None:
    """Write `results.csv`, a line for each draw of branches, and `single.csv`, a line for each branch."""
    jobs = [depth.job(network, n, 0) for n in STEPS for network in NETWORKS]
    jobs = train(args, jobs, depth.RECIPE, args.out / 'depth')
    data, split, count, _ = image_arguments(args, 'cpu')
    images = Images(data, split, count or IMAGES, 'cpu')
    out = args.out / 'lesion'
    settle(out, read_settings(args.out / 'depth') | {'images': len(images.test)})
    for job in jobs:
        cut(job.network, trained(job, args.out / 'depth'), images, out)


def cut(name: str, network: nn.Module, images: Images, out: Path) -> None:
    """Measure one network without branches, except for what has its line already."""
    kinds = branches(network)
    done = {(row['network'], row['kind'], row['block']) for row in read(out / SINGLE)}
    for kind, norms in kinds.items():
        for block, norm in norms.items():
            if (name, kind, str(block)) not in done:
                top1 = top1_without(network, [norm], images)
                append(out / SINGLE, ('network', 'kind', 'block', 'top1_pct'), [(name, kind, block, f'{top1:.2f}')])
    pools = {kind: list(norms.values()) for kind, norms in kinds.items()}
    if len(kinds) > 1:
        pools[ANY] = [norm for norms in pools.values() for norm in norms]
    done = {(row['network'], row['kind'], row['removed'], row['draw']) for row in read(out / RESULTS)}
    for kind, norms in pools.items():
        for removed in (0, *COUNTS):
            for draw in range(DRAWS if removed else 1):
                if removed <= len(norms) and (name, kind, str(removed), str(draw)) not in done:
                    top1 = top1_without(network, drawn(norms, removed, draw), images)
                    columns = ('network', 'kind', 'removed', 'of', 'draw', 'top1_pct')
                    append(out / RESULTS, columns, [(name, kind, removed, len(norms), draw, f'{top1:.2f}')])


def branches(network: nn.Module) -> dict[str, dict[int, nn.BatchNorm2d]]:
    """Return the norm at the end of each branch, by kind and by the number of its block.

    A shortcut of the residual network that has none gets one.
    """
    found: dict[str, dict[int, nn.BatchNorm2d]] = {}
    blocks = [m for m in network.modules() if isinstance(m, (repvgg_zoo.RepVGGBlock, BasicBlock))]
    for index, block in enumerate(blocks):
        if isinstance(block, BasicBlock):
            if block.downsample is None:
                block.downsample = nn.Sequential(nn.BatchNorm2d(block.bn2.num_features, eps=0).eval())
            ends = {'residual': block.bn2, 'shortcut': block.downsample[-1]}
        else:
            ends = {'3x3': block.conv_kxk.bn, '1x1': block.conv_1x1.bn, 'identity': block.identity}
        for kind, norm in ends.items():
            if norm is not None:
                found.setdefault(kind, {})[index] = norm
    return found


def drawn(norms: Sequence[nn.BatchNorm2d], count: int, draw: int) -> list[nn.BatchNorm2d]:
    order = torch.randperm(len(norms), generator=torch.Generator().manual_seed(draw)).tolist()
    return [norms[index] for index in order[:count]]


def top1_without(network: nn.Module, norms: Sequence[nn.BatchNorm2d], images: Images) -> float:
    with without(norms):
        network = copy.deepcopy(network)
    if isinstance(network, repvgg_zoo.RepVGG):
        network.switch_to_deploy()  # which is faster, and the same
    return top1_pct(network, images)


@contextmanager
@torch.no_grad()
def without(norms: Sequence[nn.BatchNorm2d]) -> Iterator[None]:
    kept = [(norm.weight.clone(), norm.bias.clone()) for norm in norms]
    try:
        for norm in norms:
            norm.weight.zero_()
            norm.bias.zero_()
        yield
    finally:
        for norm, (weight, bias) in zip(norms, kept, strict=True):
            norm.weight.copy_(weight)
            norm.bias.copy_(bias)


def report(folder: Path) -> None:
    """Print the median top-1 by the number of branches removed, and the three that matter most of each kind."""
    rows, single = read(folder / RESULTS), read(folder / SINGLE)
    table = []
    for network, kind in dict.fromkeys((row['network'], row['kind']) for row in rows):
        wanted = dict(network=network, kind=kind)
        tops = (without_some(rows, single, wanted, n) for n in (0, *COUNTS))
        alone = sorted(zip(values(single, 'top1_pct', **wanted), values(single, 'block', **wanted), strict=True))
        worst = ', '.join(f'{block:.0f} ({top1:.0f})' for top1, block in alone[:3])
        table.append((network, kind, *('' if top1 is None else f'{top1:.1f}' for top1 in tops), worst))
    header = ('network', 'branches', *map(str, (0, *COUNTS)), 'worst blocks alone')
    print(markdown_table(table, header, text_columns=('network', 'branches', header[-1])))


def without_some(
    rows: list[dict[str, str]], single: list[dict[str, str]], wanted: dict[str, str], count: int
) -> float | None:
    """Return the median top-1 without that many branches: of the draws, and for one branch of all branches."""
    if count != 1:
        tops = values(rows, 'top1_pct', removed=str(count), **wanted)
    elif wanted['kind'] == ANY:
        tops = values(single, 'top1_pct', network=wanted['network'])
    else:
        tops = values(single, 'top1_pct', **wanted)
    return median(tops) if tops else None
