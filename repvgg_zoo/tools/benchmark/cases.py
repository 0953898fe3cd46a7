"""What is measured: a case is a kind of work on one model; the rival's cases are made beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..verify import rel_diff
from .models import Form, ModelName, own_rival
from .runtimes import RUNTIMES

__all__ = ['WORK', 'Case', 'WrongOutputError', 'forward_gmacs', 'gmacs', 'rival_of', 'saved_bytes']

Work: TypeAlias = Literal['infer', 'train', 'load', 'fold']
WORK = ('infer', 'train', 'load', 'fold')
"""Inference; a step of training (forward, loss, backward); a model from a file of training weights; the switch."""

# Rounding of the outputs relative to the largest: a wrong export is off by as much as the outputs.
_MAX_REL_DIFF = {'float32': 1e-3, 'bfloat16': 0.2}


class WrongOutputError(RuntimeError):
    """A runtime gave other outputs than eager PyTorch."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of the results."""

    model: ModelName
    form: Form
    work: Work = 'infer'
    runtime: str = 'eager'
    batch: int = 1
    dtype: str = 'float32'
    layout: str = 'contiguous'

    def __str__(self) -> str:
        parts = [str(self.model), self.form, self.work, self.runtime, f'batch {self.batch}', self.dtype, self.layout]
        return ', '.join(parts if self.work in ('infer', 'train') else parts[:3])

    def batch_of_images(self) -> Tensor:
        """Random, `(N, 3, H, W)` in float32 and the case's layout."""
        px = self.model.input_px
        x = torch.randn(self.batch, 3, px, px, generator=torch.Generator().manual_seed(0))
        return x.to(memory_format=getattr(torch, 'contiguous_format' if self.layout == 'contiguous' else self.layout))

    def prepare(self, weights: Path) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
        """What comes before each run, untimed, and the run, which takes the result; `weights` is for `load`.

        Raises `WrongOutputError`, or what a runtime raises that cannot take the model.
        """
        if self.work == 'load':
            return _nothing, lambda _: self.model.build(self.form, weights=str(weights))
        if self.work == 'fold':
            return lambda: self.model.build('training'), _fold_of(self.model)
        model = self.model.build(self.form)
        x = self.batch_of_images()
        if self.work == 'train':
            return _nothing, _training_step(model, x)
        with torch.no_grad():
            expected = model(x)
            run = RUNTIMES[self.runtime].prepare(model, x, self.dtype)
            self._check(run(), expected)
        return _nothing, torch.no_grad()(lambda _: run())

    def _check(self, output: Any, expected: Tensor) -> None:
        diff = rel_diff(expected, torch.as_tensor(output))
        if not diff <= _MAX_REL_DIFF[self.dtype]:
            raise WrongOutputError(f'{self.runtime} is off by {diff:.1e} of the largest output')

    def saved_bytes(self) -> int:
        """What autograd keeps of one image for the backward pass, see `saved_bytes`."""
        return saved_bytes(self.model.build(self.form), replace(self, batch=1).batch_of_images())


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """What autograd keeps for the backward pass of a model in train mode, beside parameters, buffers and the input."""
    given = {t.untyped_storage().data_ptr() for t in (x, *model.parameters(), *model.buffers())}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(x)
    return sum(t.untyped_storage().nbytes() for address, t in saved.items() if address not in given)


@cache
def gmacs(model: ModelName, form: Form) -> float:
    """Multiply-adds of one image, in 1e9; of the training form, those of its branches one by one."""
    return forward_gmacs(model.build(form).to('meta'), Case(model=model, form=form).batch_of_images().to('meta'))


def forward_gmacs(model: nn.Module, x: Tensor) -> float:
    """Multiply-adds of the convolutions and matrix products of a forward pass, in 1e9; the meta device will do."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() / 2e9


def rival_of(case: Case, rival: str) -> Case | None:
    """The case that a case is compared with, if any.

    `timm` stands for timm's own RepVGG in eager PyTorch, in the same form, folded where another runtime than
    eager is compared. Any other name is that of a model, in eager PyTorch too, and for inference in the deploy form.
    timm's RepVGG trains contiguous, since its channels_last crashes on some CPUs.
    """
    if rival == 'timm':
        model = own_rival(case.model)
        if model is None:
            return None
        form = case.form if case.runtime == 'eager' else 'deploy'
    else:
        model = ModelName.parse(rival)
        if case.work not in ('infer', 'train'):
            return None
        form = 'plain' if not model.has_forms else 'training' if case.work == 'train' else 'deploy'
    layout = 'contiguous' if case.work == 'train' and model.is_timms_repvgg else case.layout
    found = replace(case, model=model, form=form, runtime='eager', layout=layout)
    return None if found == case else found


def _nothing() -> None:
    return None


def _fold_of(name: ModelName) -> Callable[[nn.Module], nn.Module]:
    if name.source == 'zoo':
        return lambda model: model.switch_to_deploy()
    return lambda model: reparameterize_model(model, inplace=True)


def _training_step(model: nn.Module, x: Tensor) -> Callable[[Any], None]:
    model.train().to(memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last)
    labels = torch.arange(len(x))

    def step(_: Any) -> None:
        model.zero_grad()
        F.cross_entropy(model(x), labels).backward()

    return step
