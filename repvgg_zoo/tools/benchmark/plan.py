"""The plan of a benchmark: which cases are measured."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from ...variants import VARIANTS
from .cases import Case, Work
from .models import PEERS, BenchmarkForm, ModelName
from .runtimes import COMPILE_OPTIONS, RUNTIMES

__all__ = ['FULL', 'QUICK', 'Settings', 'plan']

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
    """List every combination of the settings that exists.

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
    cases = []
    for name, kind in itertools.product(map(ModelName.parse, dict.fromkeys(models)), work):
        own_forms: Sequence[BenchmarkForm] = forms if name.has_forms else ['single']
        if kind == 'infer':
            for batch, dtype, layout, runtime, form in itertools.product(batches, dtypes, layouts, runtimes, own_forms):
                setting: dict[str, Any] = dict(batch=batch, dtype=dtype, layout=layout, device=device)
                if RUNTIMES[runtime].takes(**setting):
                    cases.append(Case(model=name, form=form, runtime=runtime, **setting))
        elif kind == 'train':
            trained: BenchmarkForm = 'training' if name.has_forms else 'single'
            able = [runtime for runtime in runtimes if runtime in _TRAINERS]
            stable = [dtype for dtype in dtypes if dtype != 'float16']
            for batch, dtype, layout, runtime in itertools.product(batches, stable, layouts, able):
                setting = dict(batch=batch, dtype=dtype, layout=layout, device=device)
                cases.append(Case(model=name, form=trained, work=kind, runtime=runtime, **setting))
        elif name.has_forms:
            kept = [form for form in own_forms if kind == 'load' or form == 'training']
            cases += [Case(model=name, form=form, work=kind, device=device) for form in kept]
    if not cases:
        raise ValueError(
            f'there is nothing to measure: none of the runtimes {", ".join(runtimes)} takes batch sizes '
            f'{", ".join(map(str, batches))} in {", ".join(dtypes)}, {", ".join(layouts)} on {device}, and loading and '
            'folding need models with two forms'
        )
    return cases
