"""Speed and memory of the zoo's models beside their rivals, on the machine at hand."""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import logging
import platform
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from ...variants import VARIANTS
from ..progress import Track
from .cases import WORK, Case, gmacs, rival_of
from .measure import matmul_peak_gmacs_per_s, peak_memory_bytes, time_rounds
from .models import PEERS, ModelName
from .plots import save_plots
from .report import Results, Row, latency_quantiles_ms
from .runtimes import RUNTIMES

__all__ = ['FULL', 'QUICK', 'RUNTIMES', 'WORK', 'Results', 'plan', 'run_benchmark', 'write_results']

_PAPER = [name for name, variant in VARIANTS.items() if variant.se is None and variant.total_stride == 32]


class Settings(NamedTuple):
    """What is measured where nothing else is asked for."""

    models: list[str]
    runtimes: list[str]
    rounds: int
    memory: bool


FULL = Settings(models=[*_PAPER, *PEERS], runtimes=['eager'], rounds=10, memory=True)
QUICK = Settings(
    models=['repvgg_a0', 'repvgg_b0', 'torchvision:resnet18', 'torchvision:resnet50'],
    runtimes=['eager', 'torchscript', 'onnxruntime', 'openvino', 'ncnn'],
    rounds=3,
    memory=False,
)


def plan(
    models: Sequence[str],
    *,
    forms: Sequence[str] = ('training', 'deploy'),
    work: Sequence[str] = ('infer',),
    runtimes: Sequence[str] = ('eager',),
    batches: Sequence[int] = (1,),
    dtypes: Sequence[str] = ('float32',),
    layouts: Sequence[str] = ('contiguous',),
) -> list[Case]:
    """Every combination that there is: models of one form have that one, runtimes infer, and loading has no batch.

    Raises `ValueError` for an unknown name, and where there is none.
    """
    cases = []
    for name, kind in itertools.product(map(ModelName.parse, dict.fromkeys(models)), work):
        own_forms = forms if name.has_forms else ['plain']
        if kind == 'infer':
            for batch, dtype, layout, runtime, form in itertools.product(batches, dtypes, layouts, runtimes, own_forms):
                if RUNTIMES[runtime].takes(batch=batch, dtype=dtype, layout=layout):
                    setting = dict(runtime=runtime, batch=batch, dtype=dtype, layout=layout)
                    cases.append(Case(model=name, form=form, **setting))
        elif kind == 'train':
            form = 'training' if name.has_forms else 'plain'
            for batch, layout in itertools.product(batches, layouts):
                cases.append(Case(model=name, form=form, work=kind, batch=batch, layout=layout))
        elif name.has_forms:
            kept = [form for form in own_forms if kind == 'load' or form == 'training']
            cases += [Case(model=name, form=form, work=kind) for form in kept]
    if not cases:
        raise ValueError(
            f'there is nothing to measure: none of the runtimes {", ".join(runtimes)} takes batch sizes '
            f'{", ".join(map(str, batches))} in {", ".join(dtypes)}, {", ".join(layouts)}, and loading and folding '
            'are for models of two forms'
        )
    return cases


def run_benchmark(
    cases: Sequence[Case], *, rival: str = 'timm', rounds: int = 10, memory: bool = True, track: Track
) -> Results:
    """Measure cases and their rivals; cases of one kind of work, batch, dtype and layout are timed in turn.

    Args:
        rival: What `ratio` compares with, see `rival_of`.
        rounds: Turns of each case.
        memory: Measure the peak memory, too, in a process for each case.
    """
    torch.manual_seed(0)
    rivals = {case: rival_of(case, rival) for case in cases}
    everything = list(dict.fromkeys((*cases, *filter(None, rivals.values()))))
    peaks = {dtype: matmul_peak_gmacs_per_s(dtype) for dtype in dict.fromkeys(case.dtype for case in everything)}
    skipped: list[str] = []
    rows: dict[Case, Row] = {}
    with tempfile.TemporaryDirectory() as folder, _warnings_silenced():
        for group in _groups(everything):
            seconds = _time(group, Path(folder), rounds, skipped, track)
            for case in track(seconds, description=f'counting {group[0].work}'):
                against = rivals.get(case)
                rival_ms = latency_quantiles_ms(seconds[against])[0] if against in seconds else None
                peak = _peak_memory_bytes(case, Path(folder), skipped) if memory else None
                rows[case] = _row(case, seconds[case], peaks[case.dtype], peak, against, rival_ms)
    return Results(machine=_machine(peaks), rows=[rows[case] for case in everything if case in rows], skipped=skipped)


def write_results(results: Results, folder: Path) -> list[str]:
    """Write `results.csv`, `results.json`, `results.md` and the plots into a folder; returns what is left out."""
    for suffix, text in (('csv', results.csv()), ('json', results.json()), ('md', results.markdown())):
        (folder / f'results.{suffix}').write_text(text, 'utf-8')
    try:
        save_plots(results, folder)
    except ImportError:
        return ["no plots: matplotlib is missing; pip install 'repvgg-zoo[benchmark]'"]
    return []


def _groups(cases: Iterable[Case]) -> list[list[Case]]:
    groups: dict[tuple[Any, ...], list[Case]] = {}
    for case in cases:
        # a rival in training may have another layout, and loading and folding concern one model at a time
        apart = {'infer': case.layout, 'train': None}.get(case.work, case.model.name)
        key = (case.work, case.batch, case.dtype, apart)
        groups.setdefault(key, []).append(case)
    return list(groups.values())


def _time(
    group: Sequence[Case], folder: Path, rounds: int, skipped: list[str], track: Track
) -> dict[Case, list[float]]:
    prepared = {}
    for case in track(group, description=f'preparing {group[0].work}'):
        if missing := RUNTIMES[case.runtime].missing:
            line = f'{case.runtime}: {", ".join(missing)} missing; pip install ' + (
                f"'repvgg-zoo[{RUNTIMES[case.runtime].extra}]'"
            )
            if line not in skipped:
                skipped.append(line)
            continue
        try:
            set_up, run = case.prepare(_weights(case, folder))
            run(set_up())
        except Exception as error:  # whatever a runtime raises for a model that it cannot take
            skipped.append(f'{case}: {type(error).__name__}: {" ".join(str(error).split())[:200]}')
        else:
            prepared[case] = set_up, run
    seconds = time_rounds(list(prepared.values()), rounds=rounds, track=track)
    return dict(zip(prepared, seconds, strict=True))


def _peak_memory_bytes(case: Case, folder: Path, skipped: list[str]) -> int | None:
    try:
        return peak_memory_bytes(case, _weights(case, folder), torch.get_num_threads())
    except BrokenProcessPool:
        skipped.append(f'{case}: its peak memory, since the process ended early, as those do that take too much')
        return None


def _weights(case: Case, folder: Path) -> Path:
    """A file of training-form weights to load; made once for each model."""
    path = folder / f'{case.model.name}.safetensors'
    if case.work == 'load' and not path.exists():
        save_file(ModelName('zoo', case.model.name).build('training').state_dict(), path)
    return path


def _row(
    case: Case, seconds: list[float], matmul: float, memory: int | None, rival: Case | None, rival_ms: float | None
) -> Row:
    latency_ms, p10, p90 = latency_quantiles_ms(seconds)
    runs_images = case.work in ('infer', 'train')
    products = gmacs(case.model, case.form) if case.work == 'infer' else None
    rate = products and products * case.batch / latency_ms * 1e3
    return Row(
        model=str(case.model),
        form=case.form,
        work=case.work,
        runtime=case.runtime,
        batch=case.batch,
        dtype=case.dtype,
        layout=case.layout,
        px=case.model.input_px,
        latency_ms=latency_ms,
        latency_p10_ms=p10,
        latency_p90_ms=p90,
        images_per_s=1e3 * case.batch / latency_ms if runs_images else None,
        gmacs=products,
        gmacs_per_s=rate,
        peak_share_pct=rate and 100 * rate / matmul,
        peak_memory_mb=None if memory is None else memory / 1e6,
        saved_mb=case.saved_bytes() / 1e6 if case.work == 'train' else None,
        top1_pct=case.model.top1_pct,
        rival=f'{rival.model} {rival.form} {rival.runtime}' if rival_ms else None,
        ratio=rival_ms and rival_ms / latency_ms,
    )


def _machine(peaks: dict[str, float]) -> dict[str, Any]:
    versions = {}
    for package in ('torch', 'timm', 'torchvision', 'onnxruntime', 'openvino', 'ncnn'):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        'processor': _processor(),
        'threads': torch.get_num_threads(),
        **{f'matrix product {dtype} GMAC/s': round(peak, 1) for dtype, peak in peaks.items()},
        'Python': platform.python_version(),
        **versions,
        'date': datetime.now(UTC).date().isoformat(),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    return platform.processor() or platform.machine()


@contextlib.contextmanager
def _warnings_silenced() -> Iterator[None]:
    """Exporters and timm log what does not concern a benchmark."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
