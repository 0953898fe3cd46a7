"""What do branches cost over depth? Time and memory of both forms of the repvgg networks of the study `depth`.

Times are medians of interleaved rounds in float32, on the CPU. Memory is what a forward pass keeps of one image for the
backward pass.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from experiments import depth
from experiments.records import RESULTS, append, processor, read, settle
from repvgg_zoo.tools.benchmark.cases import saved_bytes
from repvgg_zoo.tools.benchmark.measure import time_rounds
from repvgg_zoo.tools.console import no_progress, positive
from repvgg_zoo.tools.markdown import markdown_table

PX, ROUNDS = 32, 40
BATCH_SIZES = (1, 32)
COLUMNS = ('depth', 'form', 'params_k', 'batch_1_ms', 'batch_32_ms', 'step_32_ms', 'kept_kb')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--data', help='not read; taken so that one command line runs all studies')
    parser.add_argument('--rounds', type=positive, default=ROUNDS, help='turns of each timing (%(default)s)')


def run(args: argparse.Namespace) -> None:
    """Write `results.csv`, two lines a depth."""
    out = args.out / 'forms'
    settle(out, {'rounds': args.rounds} | processor())
    done = {row['depth'] for row in read(out / RESULTS)}
    for n in (*depth.STEPS, depth.DEEPEST):
        layers = depth.layers(n)
        if str(layers) not in done:
            append(out / RESULTS, COLUMNS, measure(n, layers, args.rounds))
            print(f'{layers} layers', flush=True)


def measure(n: int, layers: int, rounds: int) -> list[tuple[object, ...]]:
    torch.manual_seed(0)
    training = depth.create('repvgg', n).eval()
    forms = {'training': training, 'deploy': copy.deepcopy(training).switch_to_deploy()}
    images = [torch.randn(size, 3, PX, PX) for size in BATCH_SIZES]
    runs = [partial(infer, model, x) for model in forms.values() for x in images]
    runs += [partial(step, copy.deepcopy(model).train(), images[-1]) for model in forms.values()]
    times = time_rounds([(lambda: None, lambda _, run=run: run()) for run in runs], rounds=rounds, track=no_progress)
    first, second, third, fourth, *steps = (f'{1e3 * median(seconds):.2f}' for seconds in times)
    lines = []
    for (form, model), inference, trained in zip(forms.items(), ((first, second), (third, fourth)), steps, strict=True):
        params = sum(p.numel() for p in model.parameters()) / 1e3
        kept = saved_bytes(copy.deepcopy(model), images[0]) / 1e3
        lines.append((layers, form, f'{params:.1f}', *inference, trained, f'{kept:.0f}'))
    return lines


@torch.inference_mode()
def infer(model: nn.Module, x: Tensor) -> None:
    model(x)


def step(model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    model(x).square().mean().backward()


def report(folder: Path) -> None:
    """Print the lines, and how many times as much the training form takes."""
    rows = read(folder / RESULTS)
    print(markdown_table([tuple(row.values()) for row in rows], COLUMNS, text_columns=('form',)))
    print()
    costs = COLUMNS[3:]
    table = []
    for training, deploy in zip(rows[::2], rows[1::2], strict=True):
        table.append((training['depth'], *(f'{float(training[c]) / float(deploy[c]):.2f}' for c in costs)))
    print(markdown_table(table, ('training form / deploy form, layers', *costs)))
