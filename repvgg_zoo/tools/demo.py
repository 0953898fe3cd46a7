"""The demo on real images: load, evaluate, fine-tune, switch to the deploy form, save, reload."""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset, create_loader, resolve_model_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor

from ..model import RepVGG
from ..pretrained.manifest import weights_dir
from .atomic import new_folder
from .console import Track, print_table, progress
from .convert import open_model, save_model

__all__ = ['DemoRow', 'add_arguments', 'main', 'run_demo']

_MODEL, _EPOCHS, _BATCH_SIZE, _LEARNING_RATE, _LATENCY_RUNS = 'test_repvgg', 3, 50, 1e-3, 50


@dataclass(frozen=True, kw_only=True)
class DemoRow:
    """Figures of one form of the model."""

    form: str
    params: int
    latency_ms: float
    """Median time of one image."""
    top1_pct: float
    max_logit_diff: float | None
    """Largest difference from the logits of the fine-tuned training form."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `repvgg-zoo demo`."""
    parser.epilog = 'Needs no network and less than a minute.'
    parser.add_argument('--out', default='repvgg-demo', help='folder for both forms of the model (%(default)s)')
    parser.add_argument(
        '--overwrite',
        action='store_true',
        help='replace it if an earlier run wrote it as it is',
    )


def main(args: argparse.Namespace) -> int:
    """Run `repvgg-zoo demo`."""
    with progress(transient=False) as track:
        rows = run_demo(args.out, track=track, overwrite=args.overwrite)
    print_table(
        ('form', 'parameters', 'latency_ms\nper image', 'top1_pct', 'largest logit\ndifference'),
        [
            (
                row.form,
                f'{row.params:,}',
                f'{row.latency_ms:.2f}',
                f'{row.top1_pct:.1f}',
                '' if row.max_logit_diff is None else f'{row.max_logit_diff:.1e}',
            )
            for row in rows
        ],
    )
    print(f'both forms of the fine-tuned model are in {args.out}')
    return 0


def run_demo(out: str | Path, *, track: Track, overwrite: bool = False) -> list[DemoRow]:
    """Fine-tune the bundled model on the bundled images, and write both forms of it.

    Args:
        out: Folder to write. It gets the model folders `training` and `deploy`.
        track: Shows the progress, see `repvgg_zoo.tools.console`.
        overwrite: Replace the folder if an earlier demo wrote it.

    Returns:
        Figures of the pretrained model, of both forms of the fine-tuned one, and of the deploy form read again.

    Raises:
        FileExistsError: The folder exists, and `overwrite` is off or it holds other files.

    Example:
        >>> from repvgg_zoo.tools.console import no_progress
        >>> rows = run_demo('repvgg-demo', track=no_progress)  # doctest: +SKIP
    """
    torch.manual_seed(0)
    with new_folder(out, overwrite=overwrite) as folder:
        model = open_model(_MODEL)
        rows = [_evaluate('pretrained, training form', model, None, track)[0]]

        _finetune(model, track)
        row, logits = _evaluate('fine-tuned, training form', model, None, track)
        rows.append(row)
        (folder / 'training').mkdir()
        save_model(model, folder / 'training')

        deployed = copy.deepcopy(model).switch_to_deploy()
        rows.append(_evaluate('fine-tuned, deploy form', deployed, logits, track)[0])
        (folder / 'deploy').mkdir()
        save_model(deployed, folder / 'deploy')

        reloaded = open_model(folder / 'deploy')
        rows.append(_evaluate('deploy form, reloaded', reloaded, logits, track)[0])
    return rows


def _loader(model: RepVGG, split: str, **kwargs: Any) -> Iterable[tuple[Tensor, Tensor]]:
    dataset = create_dataset('', root=str(weights_dir() / 'cifar10'), split=split)
    config = resolve_model_data_config(model)
    return create_loader(
        dataset,
        batch_size=_BATCH_SIZE,
        use_prefetcher=False,
        num_workers=0,
        persistent_workers=False,
        **config,
        **kwargs,
    )


def _finetune(model: RepVGG, track: Track) -> None:
    loader = _loader(model, 'train', is_training=True, scale=(0.6, 1.0), ratio=(0.9, 1.1))
    optimizer = create_optimizer_v2(model, opt='sgd', lr=_LEARNING_RATE, momentum=0.9, weight_decay=5e-4)
    scheduler = CosineLRScheduler(optimizer, t_initial=_EPOCHS)
    criterion = LabelSmoothingCrossEntropy(0.1)
    model.train()
    for epoch in range(_EPOCHS):
        scheduler.step(epoch)
        for images, labels in track(loader, description=f'fine-tuning, epoch {epoch + 1} of {_EPOCHS}'):
            optimizer.zero_grad()
            criterion(model(images), labels).backward()
            optimizer.step()


@torch.inference_mode()
def _evaluate(form: str, model: RepVGG, reference: Tensor | None, track: Track) -> tuple[DemoRow, Tensor]:
    model.eval()
    outputs, targets = [], []
    for images, target in track(_loader(model, 'validation'), description=f'evaluating: {form}'):
        outputs.append(model(images))
        targets.append(target)
    logits, labels = torch.cat(outputs), torch.cat(targets)
    row = DemoRow(
        form=form,
        params=sum(parameter.numel() for parameter in model.parameters()),
        latency_ms=_latency_ms(model, images[:1]),
        top1_pct=100 * (logits.argmax(1) == labels).float().mean().item(),
        max_logit_diff=None if reference is None else (logits - reference).abs().max().item(),
    )
    return row, logits


def _latency_ms(model: RepVGG, image: Tensor) -> float:
    times = []
    for _ in range(_LATENCY_RUNS):
        start = time.perf_counter()
        model(image)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)
