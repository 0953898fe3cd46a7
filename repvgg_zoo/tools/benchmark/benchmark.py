"""The command `benchmark`: speed and memory of models, on this machine."""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import logging
import platform
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..atomic import new_folder
from ..console import Track, positive, print_table, progress
from ..devices import add_device_argument
from .cases import LAYOUTS, WORK, Case, baseline_of, gmacs
from .measure import matmul_peak_gmacs_per_s, peak_device_bytes, peak_memory_bytes, time_rounds
from .models import ModelName
from .plan import FULL, QUICK, plan
from .plots import save_plots
from .report import Results, Row, latency_quantiles_ms
from .runtimes import DTYPES, RUNTIMES

__all__ = ['add_arguments', 'machine_facts', 'main', 'run_benchmark', 'write_results']

_TABLES = ('results.csv', 'results.json', 'results.md')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `repvgg-zoo benchmark`."""
    parser.epilog = (
        'Everything is timed in interleaved rounds in one process. Models are those of the zoo, timm:NAME or '
        'torchvision:NAME. The default models are those of the paper and of its related work.'
    )
    parser.add_argument('models', metavar='MODEL', nargs='*', help='models to measure (default: those of the paper)')
    parser.add_argument(
        '--quick', action='store_true', help='few models and rounds, the runtimes that start fast: three minutes'
    )
    parser.add_argument('--work', nargs='+', choices=WORK, default=['infer'], help='kinds of work (infer)')
    add_device_argument(parser)
    parser.add_argument(
        '--forms', nargs='+', choices=('training', 'deploy'), default=['training', 'deploy'], help='forms (both)'
    )
    parser.add_argument('--runtimes', nargs='+', choices=list(RUNTIMES), help='runtimes for inference (eager)')
    parser.add_argument('--batch-sizes', nargs='+', type=positive, metavar='N', default=[1], help='batch sizes (1)')
    parser.add_argument('--dtypes', nargs='+', choices=DTYPES, default=['float32'], help='dtypes (float32)')
    parser.add_argument('--layouts', nargs='+', choices=LAYOUTS, default=['contiguous'], help='layouts (contiguous)')
    parser.add_argument(
        '--baseline',
        default='timm',
        metavar='MODEL',
        help="model that ratios compare with, in eager PyTorch (timm's own RepVGG)",
    )
    parser.add_argument('--rounds', type=positive, metavar='N', help='turns of each case (10)')
    parser.add_argument('--threads', type=positive, metavar='N', help='threads of every runtime (as PyTorch has them)')
    parser.add_argument('--no-memory', action='store_true', help='skip the peak memory, which takes a process a case')
    parser.add_argument('--out', default='repvgg-benchmark', help='folder for tables and plots (%(default)s)')
    parser.add_argument(
        '--overwrite',
        action='store_true',
        help='replace it if an earlier run wrote it as it is',
    )


def main(args: argparse.Namespace) -> int:
    """Run `repvgg-zoo benchmark`."""
    defaults = QUICK if args.quick else FULL
    if args.threads:
        torch.set_num_threads(args.threads)
    cases = plan(
        args.models or defaults.models,
        forms=args.forms,
        work=args.work,
        runtimes=args.runtimes or defaults.runtimes,
        batches=args.batch_sizes,
        dtypes=args.dtypes,
        layouts=args.layouts,
        device=args.device,
    )
    with new_folder(args.out, overwrite=args.overwrite) as folder:
        with progress(transient=False) as track:
            results = run_benchmark(
                cases,
                baseline=args.baseline,
                rounds=args.rounds or defaults.rounds,
                memory=defaults.memory and not args.no_memory,
                track=track,
            )
        if not results.rows:
            raise RuntimeError(f'nothing could be measured: {"; ".join(results.skipped)}')
        left_out = write_results(results, folder)
    print_table(*results.table())
    for line in (results.constants(), *results.skipped, *left_out, f'tables and plots are in {args.out}'):
        print(line)
    return 0


def run_benchmark(
    cases: Sequence[Case], *, baseline: str = 'timm', rounds: int = 10, memory: bool = True, track: Track
) -> Results:
    """Measure cases and their baselines.

    Cases of one kind of work, batch size, dtype and layout take turns.

    Args:
        cases: What `plan` returns.
        baseline: What `ratio` compares with, see `baseline_of`.
        rounds: Turns of each case.
        memory: Measure the peak memory too, in one process for each case.
        track: Shows the progress, see `repvgg_zoo.tools.console`.

    Returns:
        One row for each case that could be measured, and why others could not.

    Example:
        >>> from repvgg_zoo.tools.console import no_progress
        >>> cases = plan(['test_repvgg'], forms=['deploy'])
        >>> results = run_benchmark(cases, rounds=1, memory=False, track=no_progress)
        >>> [row.model for row in results.rows]
        ['test_repvgg']
    """
    torch.manual_seed(0)
    baselines = {case: baseline_of(case, baseline) for case in cases}
    everything = list(dict.fromkeys((*cases, *filter(None, baselines.values()))))
    device = torch.device(everything[0].device)
    dtypes = dict.fromkeys(case.dtype.removeprefix('amp_') for case in everything)
    skipped: list[str] = []
    rows: dict[Case, Row] = {}
    with tempfile.TemporaryDirectory() as folder, _warnings_silenced(), _autotuned_convolutions():
        peaks = {dtype: matmul_peak_gmacs_per_s(dtype, device=device) for dtype in dtypes}
        for group in _groups(everything):
            seconds, device_bytes = _time(group, Path(folder), rounds, skipped, track)
            for case in track(seconds, description=f'counting {group[0].work}'):
                against = baselines.get(case)
                baseline_ms = latency_quantiles_ms(seconds[against])[0] if against in seconds else None
                peak = device_bytes.get(case)
                if memory and device.type == 'cpu':
                    peak = _peak_memory_bytes(case, Path(folder), skipped)
                rate = peaks[case.dtype.removeprefix('amp_')]
                rows[case] = _row(case, seconds[case], rate, peak, against, baseline_ms)
    machine = machine_facts(device) | {f'matrix product {k} GMAC/s': round(peak, 1) for k, peak in peaks.items()}
    return Results(machine=machine, rows=[rows[case] for case in everything if case in rows], skipped=skipped)


def write_results(results: Results, folder: Path) -> list[str]:
    """Write tables and plots into a folder.

    Args:
        results: What was measured.
        folder: An existing folder.

    Returns:
        A line for each thing that was left out.

    Example:
        >>> import tempfile
        >>> write_results(Results(machine={}, rows=[]), Path(tempfile.mkdtemp()))
        []
    """
    for name, text in zip(_TABLES, (results.csv(), results.json(), results.markdown()), strict=True):
        (folder / name).write_text(text, 'utf-8')
    try:
        save_plots(results, folder)
    except ImportError:
        return ["no plots: matplotlib is missing; pip install 'repvgg-zoo[benchmark]'"]
    return []


def _groups(cases: Iterable[Case]) -> list[list[Case]]:
    groups: dict[tuple[Any, ...], list[Case]] = {}
    for case in cases:
        # the baseline may train in another layout, and loading and folding concern one model at a time
        apart = {'infer': case.layout, 'train': None}.get(case.work, case.model.name)
        key = (case.work, case.batch, case.dtype, apart)
        groups.setdefault(key, []).append(case)
    return list(groups.values())


def _time(
    group: Sequence[Case], folder: Path, rounds: int, skipped: list[str], track: Track
) -> tuple[dict[Case, list[float]], dict[Case, int]]:
    """Seconds of the runs of each case that works, and on a GPU its peak memory."""
    device = torch.device(group[0].device)
    prepared, device_bytes = {}, {}
    for case in track(group, description=f'preparing {group[0].work}'):
        if missing := RUNTIMES[case.runtime].missing:
            extra = RUNTIMES[case.runtime].extra
            remedy = f"'repvgg-zoo[{extra}]'" if extra else ' '.join(missing)
            line = f'{case.runtime}: {", ".join(missing)} missing; pip install {remedy}'
            if line not in skipped:
                skipped.append(line)
            continue
        gc.collect()  # what an earlier case left does not count
        before = torch.cuda.memory_allocated(device) if device.type == 'cuda' else 0
        try:
            set_up, run = case.prepare(_weights(case, folder))
            run(set_up())
            if device.type == 'cuda':
                device_bytes[case] = peak_device_bytes(partial(run, set_up()), device) - before
        except Exception as error:  # each runtime has its own errors for a model that it cannot take
            skipped.append(f'{case}: {type(error).__name__}: {" ".join(str(error).split())[:200]}')
        else:
            prepared[case] = set_up, run
    seconds = time_rounds(list(prepared.values()), rounds=rounds, device=device, track=track)
    return dict(zip(prepared, seconds, strict=True)), device_bytes


def _peak_memory_bytes(case: Case, folder: Path, skipped: list[str]) -> int | None:
    try:
        return peak_memory_bytes(case, _weights(case, folder), torch.get_num_threads())
    except BrokenProcessPool:
        skipped.append(f'{case}: its peak memory, because the process ended early, perhaps for lack of memory')
        return None


def _weights(case: Case, folder: Path) -> Path:
    """Make a file of training-form weights to load, once for each model."""
    path = folder / f'{case.model.name}.safetensors'
    if case.work == 'load' and not path.exists():
        save_file(ModelName('zoo', case.model.name).build('training').state_dict(), path)
    return path


def _row(
    case: Case,
    seconds: list[float],
    matmul_peak: float,
    memory_bytes: int | None,
    baseline: Case | None,
    baseline_ms: float | None,
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
        pct_of_matmul_peak=rate and 100 * rate / matmul_peak,
        peak_memory_mb=None if memory_bytes is None else memory_bytes / 1e6,
        saved_mb=case.saved_bytes() / 1e6 if case.work == 'train' else None,
        top1_pct=case.model.top1_pct,
        baseline=f'{baseline.model} {baseline.form} {baseline.runtime}' if baseline and baseline_ms else None,
        ratio=baseline_ms and baseline_ms / latency_ms,
    )


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Tell what a benchmark ran on.

    Args:
        device: Where the models ran.

    Returns:
        Processor or GPU, threads or driver, versions and the date.

    Example:
        >>> 'torch' in machine_facts(torch.device('cpu'))
        True
    """
    versions = {}
    packages = (package for runtime in RUNTIMES.values() for package in runtime.packages)
    for package in dict.fromkeys(('torch', 'timm', 'torchvision', *packages)):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    facts: dict[str, Any] = {'processor': _processor(), 'threads': torch.get_num_threads()}
    if device.type == 'cuda':
        facts = {
            'GPU': torch.cuda.get_device_name(device),
            'CUDA': torch.version.cuda,
            'cuDNN': torch.backends.cudnn.version(),
        } | facts
    return facts | {'Python': platform.python_version(), **versions, 'date': datetime.now(UTC).date().isoformat()}


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    return platform.processor() or platform.machine()


@contextlib.contextmanager
def _warnings_silenced() -> Iterator[None]:
    """Silence the logs of exporters and timm."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)


@contextlib.contextmanager
def _autotuned_convolutions() -> Iterator[None]:
    """Let cuDNN choose the fastest of its algorithms, as timm's scripts do."""
    previous = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = previous
