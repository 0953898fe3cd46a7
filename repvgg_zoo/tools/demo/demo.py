"""The demo on real images: load, evaluate, fine-tune, switch to the deploy form, save, reload, and draw.

The bundled model knows photographs. It learns to read negatives, whose colours are inverted.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from timm.data import ImageDataset, create_dataset, create_loader, resolve_model_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor
from torchvision.transforms import Compose

from ...model import RepVGG
from ...pretrained.manifest import weights_dir
from ..atomic import new_folder
from ..benchmark.measure import time_rounds
from ..console import Track, print_table, progress
from ..convert import open_model
from ..devices import add_device_argument
from ..model_folder import save_model
from .picture import Answers, draw_picture

__all__ = ['DemoRow', 'add_arguments', 'main', 'run_demo']

_MODEL, _EPOCHS, _BATCH_SIZE, _LEARNING_RATE, _LATENCY_ROUNDS = 'test_repvgg', 8, 50, 1e-2, 10
_TRAINING, _DEPLOY, _PICTURE = 'training', 'deploy', 'demo.png'


@dataclass(frozen=True, kw_only=True)
class DemoRow:
    """Figures of a model on the test images."""

    model: str
    params: int
    top1_pct: float
    latency_ms: float | None = None
    """Median time of one image."""
    max_logit_diff: float | None = None
    """Largest difference from the logits of the fine-tuned training form."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `repvgg-zoo demo`."""
    parser.epilog = 'Needs no network and less than a minute.'
    parser.add_argument('--out', default='repvgg-demo', help='folder for both forms and the picture (%(default)s)')
    parser.add_argument('--overwrite', action='store_true', help='replace it if an earlier run wrote it as it is')
    add_device_argument(parser, what='the model learns and runs')


def main(args: argparse.Namespace) -> int:
    """Run `repvgg-zoo demo`."""
    with progress(transient=False) as track:
        rows = run_demo(args.out, track=track, overwrite=args.overwrite, device=args.device)
    place = '' if args.device == 'cpu' else f', {args.device}'
    print_table(
        ('model', 'parameters', 'top1_pct', f'latency_ms\nper image{place}', 'largest logit\ndifference'),
        [
            (
                row.model,
                f'{row.params:,}',
                f'{row.top1_pct:.1f}',
                '' if row.latency_ms is None else f'{row.latency_ms:.2f}',
                '' if row.max_logit_diff is None else f'{row.max_logit_diff:.1e}',
            )
            for row in rows
        ],
    )
    print(f'both forms of the fine-tuned model and a picture, {_PICTURE}, are in {args.out}')
    return 0


def run_demo(out: str | Path, *, track: Track, overwrite: bool = False, device: str = 'cpu') -> list[DemoRow]:
    """Fine-tune the bundled model on negatives of the bundled images, write both forms of it, and draw a picture.

    Args:
        out: Folder to write. It gets the model folders `training` and `deploy`, and `demo.png`.
        track: Shows the progress, see `repvgg_zoo.tools.console`.
        overwrite: Replace the folder if an earlier demo wrote it.
        device: Where the model learns and runs.

    Returns:
        Figures of the pretrained model on photographs, and on negatives those of the pretrained model, of both forms of
        the fine-tuned one, and of the deploy form read again.

    Raises:
        FileExistsError: The folder exists, and `overwrite` is off or it holds other files.

    Example:
        >>> from repvgg_zoo.tools.console import no_progress
        >>> rows = run_demo('repvgg-demo', track=no_progress)  # doctest: +SKIP
    """
    torch.manual_seed(0)
    with new_folder(out, overwrite=overwrite) as folder:
        model = open_model(_MODEL).to(device)
        on_photographs = _evaluate(model, track, negatives=False)
        before = _evaluate(model, track)

        _finetune(model, track)
        after = _evaluate(model, track)
        (folder / _TRAINING).mkdir()
        save_model(model, folder / _TRAINING)

        deployed = copy.deepcopy(model).switch_to_deploy()
        switched = _evaluate(deployed, track)
        (folder / _DEPLOY).mkdir()
        save_model(deployed, folder / _DEPLOY)
        reloaded = _evaluate(open_model(folder / _DEPLOY).to(device), track)

        training_ms, deploy_ms = _latencies_ms([model, deployed], track)
        place = '' if device == 'cpu' else f', {device}'
        latencies_ms = {f'training form{place}': training_ms, f'deploy form{place}': deploy_ms}
        _draw(before, after, switched, latencies_ms).save(folder / _PICTURE)
    return [
        on_photographs.row('pretrained, photographs'),
        before.row('pretrained, negatives'),
        after.row('fine-tuned, training form', latency_ms=training_ms),
        switched.row('fine-tuned, deploy form', latency_ms=deploy_ms, reference=after),
        reloaded.row('deploy form, reloaded', reference=after),
    ]


@dataclass(frozen=True, kw_only=True)
class _Evaluation:
    """What a model says about the test images, in their order."""

    params: int
    logits: Tensor
    labels: Tensor

    @property
    def top1_pct(self) -> float:
        return 100 * (self.logits.argmax(1) == self.labels).float().mean().item()

    def row(self, model: str, *, latency_ms: float | None = None, reference: _Evaluation | None = None) -> DemoRow:
        diff = None if reference is None else (self.logits - reference.logits).abs().max().item()
        return DemoRow(
            model=model, params=self.params, top1_pct=self.top1_pct, latency_ms=latency_ms, max_logit_diff=diff
        )


def _dataset(split: str) -> ImageDataset:
    return create_dataset('', root=str(weights_dir() / 'cifar10'), split=split)


def _loader(model: RepVGG, split: str, *, negatives: bool = True, **kwargs: Any) -> Iterable[tuple[Tensor, Tensor]]:
    dataset = _dataset(split)
    loader = create_loader(
        dataset,
        batch_size=_BATCH_SIZE,
        use_prefetcher=False,
        num_workers=0,
        persistent_workers=False,
        **resolve_model_data_config(model),
        **kwargs,
    )
    if negatives:
        dataset.transform = Compose([ImageOps.invert, dataset.transform])
    return loader


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
            criterion(model(images.to(model.device)), labels.to(model.device)).backward()
            optimizer.step()


@torch.inference_mode()
def _evaluate(model: RepVGG, track: Track, *, negatives: bool = True) -> _Evaluation:
    model.eval()
    outputs, targets = [], []
    for images, target in track(_loader(model, 'validation', negatives=negatives), description='evaluating'):
        outputs.append(model(images.to(model.device)).cpu())
        targets.append(target)
    return _Evaluation(
        params=sum(parameter.numel() for parameter in model.parameters()),
        logits=torch.cat(outputs),
        labels=torch.cat(targets),
    )


@torch.inference_mode()
def _latencies_ms(models: list[RepVGG], track: Track) -> list[float]:
    device = models[0].device
    image = next(iter(_loader(models[0], 'validation')))[0][:1].to(device)
    runs: list[Any] = [(lambda: image, model) for model in models]
    seconds = time_rounds(runs, rounds=_LATENCY_ROUNDS, device=device, track=track)
    return [1e3 * statistics.median(times) for times in seconds]


def _draw(
    before: _Evaluation, after: _Evaluation, switched: _Evaluation, latencies_ms: dict[str, float]
) -> Image.Image:
    dataset = _dataset('validation')
    names = sorted(dataset.reader.class_to_idx, key=dataset.reader.class_to_idx.__getitem__)
    # the first image of each class
    chosen = [before.labels.tolist().index(label) for label in range(len(names))]
    answers = [
        Answers(
            model=model,
            classes=[names[label] for label in evaluation.logits.argmax(1)[chosen]],
            top1_pct=evaluation.top1_pct,
        )
        for model, evaluation in (('pretrained', before), ('training form', after), ('deploy form', switched))
    ]
    return draw_picture(
        f'{_MODEL} learns to read negatives (wrong answers are red)',
        [ImageOps.invert(dataset[index][0]) for index in chosen],
        names,
        answers,
        latencies_ms,
    )
