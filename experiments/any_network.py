"""Give every network of timm branches, and fold it back: which convolutions can be replaced, and why others cannot.

Each network begins with random weights. With some of them, outputs grow over the layers until rounding decides about
them: those are repeated in float64, with statistics of batch normalisation of random pixels. `acb` stands for the block
types that need a norm behind the convolution, and `doconv` for those that need none. `overparameterize` compares the
outputs before and after, and `switch_to_deploy` those of both forms. A run that was stopped goes on where it was.

    python -m experiments.any_network --out experiments/any_network.csv
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import repvgg_zoo
from repvgg_zoo.overparam.candidates import candidates, refusal
from repvgg_zoo.reparam.evaluation import eval_outputs
from repvgg_zoo.reparam.pairs import sample_of

MAX_PARAMS_M = 60
BLOCKS = ('acb', 'doconv')
DTYPES = (torch.float32, torch.float64)
ROUNDING = 'rounding decides about the outputs'
SMALL_PX = 64
MAX_SECONDS = 240
COLUMNS = ('model', 'params_m', 'px', 'dtype', 'convolutions', *BLOCKS, 'refused', 'seconds', 'result')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, required=True, metavar='CSV', help='the table')
    parser.add_argument('--filter', default='', metavar='PATTERN', help="only these models, such as 'resnet*'")
    args = parser.parse_args()
    done = {row['model'] for row in csv.DictReader(args.out.open())} if args.out.exists() else set()
    names = [name for name in timm.list_models(args.filter) if not is_ours(name)]
    with args.out.open('a', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
        if not done:
            writer.writeheader()
        for name in names:
            if name not in done and (row := examine(name)) is not None:
                writer.writerow(row)
                file.flush()


def is_ours(name: str) -> bool:
    return name in repvgg_zoo.VARIANTS


def examine(name: str) -> dict[str, Any] | None:
    """Return the row of a model, or None if it is larger than what is looked at."""
    params_m = count_params_m(name)
    if params_m > MAX_PARAMS_M:
        return None
    row: dict[str, Any] = dict.fromkeys(COLUMNS, '') | {'model': name, 'params_m': f'{params_m:.1f}'}
    start = time.monotonic()
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(MAX_SECONDS)
    try:
        for dtype in DTYPES:
            row['dtype'] = str(dtype).removeprefix('torch.')
            row['result'] = try_blocks(name, dtype, row)
            if row['result'] != ROUNDING:
                break
    except TimeoutError:
        row['result'] = f'not done in {MAX_SECONDS} s'
    except Exception as error:  # code of others may raise errors of any class
        row['result'] = f'{type(error).__name__}: {error}'[:200]
    finally:
        signal.alarm(0)
    return row | {'seconds': f'{time.monotonic() - start:.1f}'}


def count_params_m(name: str) -> float:
    try:
        with torch.device('meta'):
            model = timm.create_model(name)
    except Exception:  # it computes with values when it is made
        model = timm.create_model(name)
    return sum(p.numel() for p in model.parameters()) / 1e6


def smallest_sample(model: nn.Module) -> torch.Tensor:
    """Make an input of 64 x 64 pixels if the model takes that, else of its own size."""
    sample = sample_of(model)
    small = sample[..., :SMALL_PX, :SMALL_PX].contiguous()
    try:
        eval_outputs(model, small)
    except Exception:  # a model of a fixed size
        return sample
    return small


@torch.no_grad()
def set_statistics(model: nn.Module, sample: torch.Tensor) -> None:
    """Let each norm take the statistics of a batch of 16 images, where the model runs in train mode."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    with contextlib.suppress(ValueError):  # one value a channel has no variance
        model(torch.randn(16, *sample.shape[1:]).to(sample))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def try_blocks(name: str, dtype: torch.dtype, row: dict[str, Any]) -> str:
    """Fill the counts of a row; return `equal`, or what went wrong."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval().to(dtype)
    sample = smallest_sample(model)
    row['px'] = sample.shape[-1]
    if dtype is torch.float64:
        set_statistics(model, sample)
    keys = list(model.state_dict())
    found = candidates(model, sample)
    row['convolutions'] = len(found)
    reasons = {block: [refusal(candidate, block) for candidate in found] for block in BLOCKS}
    row |= {block: refused.count(None) for block, refused in reasons.items()}
    counted = Counter(reason for reason in reasons['acb'] if reason is not None)
    row['refused'] = '; '.join(f'{count} x {reason}' for reason, count in counted.most_common())
    for block in BLOCKS:
        if not row[block]:
            continue
        try:
            repvgg_zoo.overparameterize(model, block, sample=sample)
            repvgg_zoo.switch_to_deploy(model, verify=sample)
        except ValueError as error:  # a FoldError is one
            if 'rounding explains' not in str(error) or dtype is torch.float64:
                raise
            return ROUNDING
        if list(model.state_dict()) != keys:
            return f'{block}: other keys after the fold'
    return 'equal' if row['acb'] or row['doconv'] else 'nothing to replace'


def _stop(*_: Any) -> None:
    raise TimeoutError


if __name__ == '__main__':
    main()
