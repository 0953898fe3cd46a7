"""The plan of a benchmark: which cases are measured."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ...variants import VARIANTS
from .cases import Case, Work
from .models import PEERS, BenchmarkForm, ModelName
from .runtimes import COMPILE_OPTIONS, RUNTIMES

__all__ = ['FULL', 'QUICK', 'Settings', 'plan']

_logger = logging.getLogger(__name__)
_TRAINERS = {'eager', *COMPILE_OPTIONS} - {'compile-freezing'}
"""Runtimes with a backward pass."""
_PAPER = [name for name, variant in VARIANTS.items() if variant.se is None and variant.total_stride == 32]


class Settings(NamedTuple):
    """Defaults of a run."""

    models: list[str]
    runtimes: list[str]
    rounds: int
    memory: bool


FULL = Settings(models=[*_PAPER, *PEERS], runtimes=['eager'], rounds=10, memory=True)
QUICK = Settings(
    models=['repvgg_a0', 'repvgg_b0', 'torchvision:resnet18', 'torchvision:resnet50'],
    runtimes=[name for name, runtime in RUNTIMES.items() if runtime.is_quick],
    rounds=3,
    memory=False,
)


def plan(
    models: Sequence[str],
    *,
    forms: Sequence[BenchmarkForm] = ('training', 'deploy'),
    work: Sequence[Work] = ('infer',),
    runtimes: Sequence[str] = ('eager',),
    batches: Sequence[int] = (1,),
    dtypes: Sequence[str] = ('float32',),
    layouts: Sequence[str] = ('contiguous',),
    device: str = 'cpu',
) -> list[Case]:
    """List every combination of the settings that exists, and log a line for each setting that is left out.

    Models with a single form have that form only, and loading and folding have no batch.

    Args:
        models: Names, see `ModelName`.
        forms: Forms of the models that have two.
        work: Some of `WORK`.
        runtimes: Some of `RUNTIMES`. A model trains in those of PyTorch that can.
        batches: Batch sizes.
        dtypes: Some of `DTYPES`. A model trains in those that are not pure float16.
        layouts: `contiguous` or `channels_last`.
        device: Where to compute, as PyTorch names it.

    Returns:
        The cases.

    Raises:
        ValueError: A name is unknown, or no case is left.

    Example:
        >>> [str(case) for case in plan(['test_repvgg'], forms=['deploy'])]
        ['test_repvgg, deploy, infer, eager, batch 1, float32, contiguous']
    """
    left_out = list(_left_out(work, runtimes, batches=batches, dtypes=dtypes, layouts=layouts, device=device))
    cases = []
    for name, kind in itertools.product(map(ModelName.parse, dict.fromkeys(models)), work):
        own_forms: Sequence[BenchmarkForm] = forms if name.has_forms else ['single']
        if kind == 'infer':
            for batch, dtype, layout, runtime, form in itertools.product(batches, dtypes, layouts, runtimes, own_forms):
                one: dict[str, Any] = dict(batches=[batch], dtypes=[dtype], layouts=[layout], device=device)
                if not RUNTIMES[runtime].refusals(**one):
                    setting: dict[str, Any] = dict(batch=batch, dtype=dtype, layout=layout, device=device)
                    cases.append(Case(model=name, form=form, runtime=runtime, **setting))
        elif kind == 'train':
            trained: BenchmarkForm = 'training' if name.has_forms else 'single'
            able = [runtime for runtime in runtimes if runtime in _TRAINERS]
            stable = [dtype for dtype in dtypes if dtype != 'float16']
            for batch, dtype, layout, runtime in itertools.product(batches, stable, layouts, able):
                setting = dict(batch=batch, dtype=dtype, layout=layout, device=device)
                cases.append(Case(model=name, form=trained, work=kind, runtime=runtime, **setting))
        elif name.has_forms:
            kept: Sequence[BenchmarkForm] = own_forms if kind == 'load' else ['training']
            cases += [Case(model=name, form=form, work=kind, device=device) for form in kept]
    if not cases:
        raise ValueError(
            f'there is nothing to measure: {"; ".join(left_out) or "loading and folding need models with two forms"}'
        )
    for line in left_out:
        _logger.warning('left out: %s', line)
    if 'amp_float16' in dtypes and 'train' in work and torch.device(device).type == 'cpu':
        _logger.warning('training in amp_float16 may take a hundred times as long as in amp_bfloat16 on a CPU')
    return cases


def _left_out(work: Sequence[Work], runtimes: Sequence[str], **settings: Any) -> Iterator[str]:
    """Say in a line each which of the settings some kind of work or runtime does not take."""
    dtypes = settings['dtypes']
    if 'infer' in work:
        for name in runtimes:
            if reasons := RUNTIMES[name].refusals(**settings):
                yield f'inference by {name}, which {", ".join(reasons)}'
    if 'train' in work:
        if unable := [name for name in runtimes if name not in _TRAINERS]:
            yield f'training by {", ".join(unable)}; those that train are {", ".join(sorted(_TRAINERS))}'
        if 'float16' in dtypes:
            yield 'training in pure float16, whose gradients vanish; amp_float16 scales them'
    untyped = [kind for kind in ('load', 'fold') if kind in work]
    if untyped and (others := [dtype for dtype in dtypes if dtype != 'float32']):
        yield f'{" and ".join(untyped)} in {", ".join(others)}, because they are measured in float32 only'
