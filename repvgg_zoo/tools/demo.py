"""The whole way on real images: load, evaluate, fine-tune, switch to the deploy form, save, reload."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_dataset, create_loader, resolve_model_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor

from ..model import RepVGG
from ..pretrained.manifest import weights_dir
from .atomic import new_folder
from .convert import save_model
from .progress import Track

__all__ = ['DemoRow', 'run_demo']

_MODEL, _EPOCHS, _BATCH_SIZE, _LEARNING_RATE, _LATENCY_RUNS = 'test_repvgg', 3, 50, 1e-3, 50


@dataclass(frozen=True, kw_only=True)
class DemoRow:
    """One line of the table at the end."""

    form: str
    params: int
    latency_ms: float
    """Median time of one image."""
    top1_pct: float
    max_logit_diff: float | None
    """Largest difference to the logits of the fine-tuned training form."""


def run_demo(out: str | Path, *, track: Track, overwrite: bool = False) -> list[DemoRow]:
    """Run the demo on the bundled images and write both forms of the fine-tuned model below `out`."""
    torch.manual_seed(0)
    with new_folder(out, overwrite=overwrite) as folder:
        model = timm.create_model(_MODEL, pretrained=True)
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

        reloaded = timm.create_model(f'local-dir:{folder / "deploy"}', pretrained=True)
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
    logits, labels = [], []
    for images, targets in track(_loader(model, 'validation'), description=f'evaluating: {form}'):
        logits.append(model(images))
        labels.append(targets)
    logits, labels = torch.cat(logits), torch.cat(labels)
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
