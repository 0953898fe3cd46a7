"""A case of the benchmark: one kind of work on one model in one setting, and the baseline's case beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

from ...reparam.switch import switch_to_deploy
from ...reparam.tolerance import max_rel_diff, rel_diff
from ..console import silenced
from .models import BenchmarkForm, ModelName, timms_own
from .runtimes import COMPILE_OPTIONS, RUNTIMES, autocast, cast

__all__ = [
    'LAYOUTS',
    'WORK',
    'Case',
    'WrongOutputError',
    'baseline_of',
    'forward_gmacs',
    'gmacs',
    'saved_bytes',
]

Work: TypeAlias = Literal['infer', 'train', 'load', 'fold']
WORK = get_args(Work)
"""Inference; one training step (forward, loss, backward); a model from a file of training weights; the switch."""
LAYOUTS = ('contiguous', 'channels_last')


class WrongOutputError(RuntimeError):
    """A runtime gives other outputs than eager PyTorch."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What one line of the results is about."""

    model: ModelName
    form: BenchmarkForm
    work: Work = 'infer'
    runtime: str = 'eager'
    batch: int = 1
    dtype: str = 'float32'
    layout: str = 'contiguous'
    device: str = 'cpu'

    def __str__(self) -> str:
        parts = [str(self.model), self.form, self.work, self.runtime, f'batch {self.batch}', self.dtype, self.layout]
        kept = parts if self.work in ('infer', 'train') else parts[:3]
        return ', '.join(kept if self.device == 'cpu' else [*kept, self.device])

    def batch_of_images(self) -> Tensor:
        """Random images, `(N, 3, H, W)`, in float32 and the case's layout, on its device."""
        px = self.model.input_px
        generator = torch.Generator(self.device).manual_seed(0)
        x = torch.randn(self.batch, 3, px, px, generator=generator, device=self.device)
        return x.to(memory_format=getattr(torch, 'contiguous_format' if self.layout == 'contiguous' else self.layout))

    def prepare(self, weights: Path) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
        """Build the model, and check the outputs of its runtime.

        Args:
            weights: File of training-form weights, for the work `load`.

        Returns:
            A function to call before each run, untimed, and the run, which takes its result.

        Raises:
            WrongOutputError: The runtime gives other outputs than eager PyTorch.
            Exception: Any error of a runtime that cannot take the model.
        """
        if self.work == 'load':
            return _nothing, lambda _: self.model.build(self.form, device=self.device, weights=str(weights))
        if self.work == 'fold':
            return lambda: self.model.build('training', device=self.device), _fold_of(self.model)
        model = self.model.build(self.form, device=self.device)
        x = self.batch_of_images()
        if self.work == 'train':
            return _nothing, _training_step(model, x, self.dtype, self.runtime)
        with torch.no_grad():
            expected = model(x)
            run = RUNTIMES[self.runtime].prepare(model, x, self.dtype)
            self._check(run(), expected)
        return _nothing, torch.no_grad()(lambda _: run())

    def _check(self, output: Any, expected: Tensor) -> None:
        diff = rel_diff(torch.as_tensor(output), expected)
        if not diff <= max_rel_diff(getattr(torch, self.dtype.removeprefix('amp_')), expected.device):
            raise WrongOutputError(f'{self.runtime} is off by {diff:.1e} of the largest output')

    def saved_bytes(self) -> int:
        """Bytes that autograd keeps of one image for the backward pass, see `saved_bytes`."""
        batch = 1 if self.device == 'cpu' else self.batch
        model = self.model.build(self.form, device=self.device)
        return saved_bytes(*cast(model, replace(self, batch=batch).batch_of_images(), self.dtype), self.dtype) // batch


def saved_bytes(model: nn.Module, x: Tensor, dtype: str = 'float32') -> int:
    """Count the bytes that autograd keeps for the backward pass, besides parameters, buffers and the input.

    Args:
        model: The model. It is put into train mode.
        x: Its input.
        dtype: One of `DTYPES`, for autocast.

    Returns:
        Bytes that the forward pass allocates and does not free, the output among them.

    Example:
        >>> saved_bytes(nn.Sequential(nn.Sigmoid(), nn.Sigmoid()), torch.ones(1, 8, requires_grad=True))
        64
    """
    model.train()
    if x.is_cuda:
        before = torch.cuda.memory_allocated(x.device)
        with autocast(x.device.type, dtype):
            y = model(x)
        return torch.cuda.memory_allocated(x.device) - before
    # not by hooks on saved tensors, under which blocks keep all outputs
    profile = torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with silenced(), profile as profiler, autocast(x.device.type, dtype):
        y = model(x)
    del y
    return sum(event.self_cpu_memory_usage for event in profiler.events())


@cache
def gmacs(model: ModelName, form: BenchmarkForm) -> float:
    """Count the multiply-adds of one image.

    Args:
        model: The model.
        form: Its form. The training form runs branch by branch.

    Returns:
        Multiply-adds in 1e9.

    Example:
        >>> round(gmacs(ModelName.parse('test_repvgg'), 'deploy'), 3)
        0.078
    """
    built = model.build(form, device='meta' if model.source == 'zoo' else 'cpu')  # timm's fold needs values
    return forward_gmacs(built.to('meta'), Case(model=model, form=form).batch_of_images().to('meta'))


def forward_gmacs(model: nn.Module, x: Tensor) -> float:
    """Count the multiply-adds of the convolutions and matrix products of a forward pass.

    Args:
        model: The model. The meta device suffices.
        x: Its input, on the same device.

    Returns:
        Multiply-adds in 1e9.

    Example:
        >>> forward_gmacs(nn.Linear(1000, 1000), torch.ones(1, 1000))
        0.001
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() / 2e9


def baseline_of(case: Case, baseline: str) -> Case | None:
    """Choose the case that a case is compared with: inference in eager PyTorch, training in the same runtime.

    Args:
        case: The case.
        baseline: `timm` for timm's own RepVGG, in the same form, or in the deploy form if the case is of another
            runtime. Any other name is that of a model; one with two forms infers in the deploy form.

    Returns:
        The baseline's case. None if timm does not have the variant, if the case is its own baseline, or if a named
        model would have to load or fold. timm's RepVGG trains contiguous on a CPU, because its channels_last crashes on
        some.

    Example:
        >>> case = Case(model=ModelName.parse('repvgg_a0'), form='deploy', runtime='openvino')
        >>> str(baseline_of(case, 'timm'))
        'timm:repvgg_a0, deploy, infer, eager, batch 1, float32, contiguous'
    """
    if baseline == 'timm':
        model = timms_own(case.model)
        if model is None:
            return None
        form = case.form if case.work == 'train' or case.runtime == 'eager' else 'deploy'
    else:
        model = ModelName.parse(baseline)
        if case.work not in ('infer', 'train'):
            return None
        form = 'single' if not model.has_forms else 'training' if case.work == 'train' else 'deploy'
    crashes = case.work == 'train' and model.is_timms_repvgg and case.device == 'cpu'
    layout = 'contiguous' if crashes else case.layout
    runtime = case.runtime if case.work == 'train' else 'eager'
    found = replace(case, model=model, form=form, runtime=runtime, layout=layout)
    return None if found == case else found


def _nothing() -> None:
    return None


def _fold_of(name: ModelName) -> Callable[[nn.Module], nn.Module]:
    if name.source == 'zoo':
        return switch_to_deploy
    return lambda model: reparameterize_model(model, inplace=True)


def _training_step(model: nn.Module, x: Tensor, dtype: str, runtime: str) -> Callable[[Any], None]:
    model, x = cast(model.train(), x, dtype)
    if runtime != 'eager':
        model.compile(**COMPILE_OPTIONS[runtime])
    labels = torch.arange(len(x), device=x.device) % 10
    scaler = torch.amp.GradScaler(x.device.type, enabled=dtype == 'amp_float16')

    def step(_: Any) -> None:
        model.zero_grad()
        with autocast(x.device.type, dtype):
            loss = F.cross_entropy(model(x), labels)
        scaler.scale(loss).backward()

    return step
