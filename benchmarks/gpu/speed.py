"""Speed and memory: what is measured on a GPU, and in a rehearsal."""

import itertools
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from repvgg_zoo import VARIANTS
from repvgg_zoo.reparam.evaluation import disable_fast_path
from repvgg_zoo.tools.benchmark.benchmark import run_benchmark
from repvgg_zoo.tools.benchmark.cases import Case
from repvgg_zoo.tools.benchmark.models import ModelName, timms_own
from repvgg_zoo.tools.benchmark.plan import plan
from repvgg_zoo.tools.console import no_progress


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    agreeing: Sequence[str]
    agreement_px: int
    inferring: Sequence[str]
    training: Sequence[str]
    compiled: Sequence[str]
    peers: Sequence[str]
    trained_peer: str
    loaded: str
    batch: int
    rounds: int


FULL = Settings(
    agreeing=tuple(VARIANTS),
    agreement_px=128,
    inferring=('repvgg_a0', 'repvgg_a2', 'repvgg_b1', 'repvgg_b1g4', 'repvgg_b3', 'repvgg_d2se'),
    training=('repvgg_a0', 'repvgg_b1', 'repvgg_b1g4'),
    compiled=('repvgg_a0', 'repvgg_b1'),
    peers=('timm:resnet18', 'timm:resnet50', 'timm:resnet101'),
    trained_peer='timm:resnet50',
    loaded='repvgg_b3',
    batch=256,
    rounds=5,
)
REHEARSAL = Settings(
    agreeing=('test_repvgg',),
    agreement_px=64,
    inferring=('test_repvgg',),
    training=('test_repvgg',),
    compiled=(),
    peers=('timm:test_resnet',),
    trained_peer='timm:test_resnet',
    loaded='repvgg_a0',
    batch=2,
    rounds=1,
)


def plans(settings: Settings, device: str) -> dict[str, list[Case]]:
    """The cases of each part, the most important part first."""
    inferring = [*with_timms(settings.inferring), *settings.peers]
    training = [*with_timms(settings.training), settings.trained_peer]
    compiled = [*with_timms(settings.compiled), settings.trained_peer]
    infer: dict[str, Any] = dict(forms=['deploy'], dtypes=['bfloat16'], layouts=['channels_last'], device=device)
    train: dict[str, Any] = dict(work=['train'], batches=[settings.batch], dtypes=['amp_bfloat16'], device=device)
    return {
        'training_eager_channels_last': plan(training, layouts=['channels_last'], **train),
        'inference_eager': plan(inferring, batches=[1, settings.batch], **infer),
        'inference_compiled': [
            *plan(compiled, batches=[1], runtimes=['compile-reduce-overhead'], **infer),
            *plan(compiled, batches=[settings.batch], runtimes=['compile'], **infer),
        ],
        'training_compiled': plan(compiled, layouts=['channels_last'], runtimes=['compile'], **train),
        'training_eager_contiguous': plan(training, layouts=['contiguous'], **train),
    }


def with_timms(names: Sequence[str]) -> list[str]:
    """Models of the zoo, each followed by timm's own of the same name."""
    parsed = [ModelName.parse(name) for name in names]
    return [str(model) for ours in parsed for model in (ours, timms_own(ours)) if model is not None]


def measure(cases: Sequence[Case], settings: Settings, *, by_branches: bool = False) -> dict[str, Any]:
    """Rows of the benchmark, and why cases were skipped; with `by_branches` of the zoo's models without fast paths."""
    if by_branches:
        with disable_fast_path():
            return measure([case for case in cases if case.model.source == 'zoo'], settings)
    # the page compares rows of the same setting itself
    results = run_benchmark(
        cases, baseline=settings.trained_peer, rounds=settings.rounds, memory=False, track=no_progress
    )
    return {'rows': [asdict(row) for row in results.rows], 'skipped': results.skipped, 'peaks': results.machine}


def loading(settings: Settings, device: str) -> dict[str, Any]:
    """From a file of training weights to a model on the device, in both forms, and the switch."""
    cases = plan([settings.loaded], work=['load', 'fold'], device=device)
    cases += [replace(case, model=timms_own(case.model)) for case in cases]
    return measure(cases, settings)


def warm_up(cases: Sequence[Case], *, seconds: float, workers: int) -> dict[str, Any]:
    """Compile in several processes at once, so that the timed process finds all in the compiler's cache."""
    inferring, training = ([case for case in cases if case.work == work] for work in ('infer', 'train'))
    # few trainings at a time, for the device's memory
    mixed = [c for group in itertools.zip_longest(training, inferring[::2], inferring[1::2]) for c in group if c]
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context('spawn'))
    jobs = [pool.submit(_prepare, case) for case in mixed]
    done, late = wait(jobs, timeout=seconds)
    pool.shutdown(wait=False, cancel_futures=True)
    for process in multiprocessing.active_children():
        process.kill()
    return {'compiled': len(done), 'late': len(late), 'failed': [line for job in done if (line := job.result())]}


def _prepare(case: Case) -> str:
    try:
        set_up, run = case.prepare(Path())
        run(set_up())
        torch.cuda.empty_cache()
    except Exception as error:  # the timed process meets it again, and says so
        return f'{case}: {type(error).__name__}: {str(error)[:200]}'
    return ''
