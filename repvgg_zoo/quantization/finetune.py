"""A short training of a quantized model by what the float model answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sized
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .qat import fix_ranges

__all__ = ['Batches', 'finetune']

_FIXED_PART = 0.2
"""The last part of the steps, in which ranges stay."""


class Batches(Sized, Protocol):
    """What `DataLoader` is: batches, again in each epoch."""

    def __iter__(self) -> Any: ...


def finetune(
    model: nn.Module,
    teacher: nn.Module,
    batches: Batches,
    *,
    epochs: int,
    lr: float = 1e-4,
    track: Callable[..., Iterable[Any]] = lambda items, **_: items,
) -> None:
    """Train a model of `prepare_qat` to answer as its float model does, in place.

    The loss is the divergence of both answers, so labels are not needed and are not read. Adam takes the steps; the
    learning rate falls to 0 with a cosine. Over the last fifth of the steps, ranges stay as they are.

    Gradients go straight through the rounding, so they do not tell what unequal ranges of channels cost. `equalize` a
    network with such ranges first.

    Args:
        model: A classifier of `prepare_qat`, in either form. It is in eval mode afterwards.
        teacher: The float model. It is in eval mode afterwards.
        batches: A loader of images, or of tuples that begin with them, with the augmentation of a training.
        epochs: Passes over the loader, from 1 on.
        lr: The first learning rate.
        track: Shows the progress, see `repvgg_zoo.tools.console`.

    Raises:
        ValueError: The model has no quantizers or is its own teacher, `epochs` or `lr` is not positive, the loader is
            empty, or the loss is not finite.

    Example:
        >>> finetune(model, teacher, loader, epochs=2)  # doctest: +SKIP
    """
    if epochs < 1 or not 0 < lr < math.inf:
        raise ValueError(f'epochs is {epochs} and lr {lr}; they take an integer from 1 on and a number above 0')
    if teacher is model:
        raise ValueError('the model is its own teacher; give a copy that was made before prepare_qat')
    steps = epochs * len(batches)
    if not steps:
        raise ValueError('there are no batches to train on')
    fix_ranges(model, are_fixed=False)
    device = next(model.parameters()).device
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    teacher.eval()
    model.train()
    done = 0
    for epoch in range(epochs):
        for batch in track(batches, description=f'epoch {epoch + 1} of {epochs}'):
            fix_ranges(model, are_fixed=done >= (1 - _FIXED_PART) * steps)
            images = batch[0] if isinstance(batch, (tuple, list)) else batch
            loss = _divergence(model, teacher, images.to(device))
            if not bool(loss.isfinite()):
                remedy = f'take a lower lr than {lr}' if done else 'look for NaN in the images and in the weights'
                raise ValueError(f'the loss is not finite after {done} steps; {remedy}')
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
    model.eval()


def _divergence(model: nn.Module, teacher: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        expected = teacher(images).log_softmax(1)
    return F.kl_div(model(images).log_softmax(1), expected, reduction='batchmean', log_target=True)
