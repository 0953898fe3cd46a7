"""Time in interleaved rounds, peak memory in separate processes, and the machine's peak rate."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from ..console import Track

if TYPE_CHECKING:
    from .cases import Case

__all__ = ['matmul_peak_gmacs_per_s', 'peak_memory_bytes', 'time_rounds']

_SLICE_S = 0.1
"""A turn of a case takes this long, and at least one run."""


def time_rounds(
    runs: list[tuple[Callable[[], Any], Callable[[Any], Any]]], *, rounds: int, track: Track
) -> list[list[float]]:
    """Time functions in interleaved rounds, each round in a random order.

    So a slow spell of the machine hits all functions, and no function always follows the same other one, which can
    cost some per cent. The first run of each turn does not count, because its caches are filled by others, unless it
    takes the whole turn.

    Args:
        runs: Pairs of a function to call before each run, untimed, and the run, which takes its result.
        rounds: Turns of each pair.
        track: Shows the progress.

    Returns:
        Seconds of the runs of each pair.

    Example:
        >>> from repvgg_zoo.tools.console import no_progress
        >>> seconds = time_rounds([(lambda: 0.01, time.sleep)], rounds=2, track=no_progress)
        >>> all(s > 0.009 for s in seconds[0])
        True
    """
    seconds: list[list[float]] = [[] for _ in runs]
    generator = torch.Generator().manual_seed(0)
    turns = [turn for _ in range(rounds) for turn in torch.randperm(len(runs), generator=generator).tolist()]
    for turn in track(turns, description='timing'):
        seconds[turn] += _turn(*runs[turn])
    return seconds


def _turn(set_up: Callable[[], Any], run: Callable[[Any], Any]) -> list[float]:
    seconds: list[float] = []
    while sum(seconds) < _SLICE_S:
        state = set_up()
        start = time.perf_counter()
        state = run(state)
        seconds.append(time.perf_counter() - start)
        del state
    return seconds[1:] or seconds


def peak_memory_bytes(case: Case, weights: Path, threads: int) -> int | None:
    """Measure the peak memory of a fresh process that prepares a case and runs it once.

    Args:
        case: The case.
        weights: File of training-form weights, for the work `load`.
        threads: Threads of PyTorch.

    Returns:
        Bytes beyond the peak after importing. None if the system does not tell.

    Raises:
        BrokenProcessPool: The process was killed, perhaps for lack of memory.

    Example:
        >>> peak_memory_bytes(case, Path('weights.safetensors'), 1)  # doctest: +SKIP
        80142336
    """
    with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool:
        return pool.submit(_peak_in_this_process, case, weights, threads).result()


def _peak_in_this_process(case: Case, weights: Path, threads: int) -> int | None:
    torch.compiler.reset()  # imports what the first run of a model would import
    torch.set_num_threads(threads)
    before = _peak_resident_bytes()
    set_up, run = case.prepare(weights)
    run(set_up())
    after = _peak_resident_bytes()
    return None if before is None or after is None else after - before


def _peak_resident_bytes() -> int | None:
    """Peak memory of this program. On Linux `getrusage` would include the process that it was forked from."""
    try:
        status = Path('/proc/self/status').read_text()
    except OSError:
        if sys.platform != 'darwin':
            return None
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith('VmHWM'))


def matmul_peak_gmacs_per_s(dtype: str, *, repeats: int = 5) -> float:
    """Measure the rate of the fastest of some square matrix products.

    The products grow until one takes longer than a turn: without instructions for the dtype they are a hundred times
    slower.

    Args:
        dtype: Name of a torch dtype.
        repeats: Runs of each product.

    Returns:
        Multiply-adds a second, in 1e9.

    Example:
        >>> matmul_peak_gmacs_per_s('float32') > 0.1
        True
    """
    best = 0.0
    for size in (256, 512, 1024, 2048, 3072):
        a, b = torch.randn(2, size, size, dtype=getattr(torch, dtype))
        seconds = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            a @ b
            seconds.append(time.perf_counter() - start)
        best = max(best, size**3 / median(seconds[1:]) / 1e9)
        if median(seconds[1:]) > _SLICE_S:
            break
    return best
