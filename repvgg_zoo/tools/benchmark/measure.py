"""Time in interleaved rounds, memory in processes of their own, and what the machine can do at most."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..progress import Track
from .cases import Case

__all__ = ['matmul_peak_gmacs_per_s', 'peak_memory_bytes', 'time_rounds']

_SLICE_S = 0.1
"""A case runs for this long, and at least once, before it is the next one's turn."""


def time_rounds(
    runs: list[tuple[Callable[[], Any], Callable[[Any], Any]]], *, rounds: int, track: Track
) -> list[list[float]]:
    """Seconds of each run, of each pair of setting-up and run; every round is in an order of its own.

    A slow spell of the machine so falls on all of them, and none always follows the same other one, which can cost
    some per cent. The first run of each turn, on caches that the others
    filled, does not count, unless the run takes more than the turn itself.
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
    """Most memory that a fresh process takes to prepare a case and run it once, beyond what it had after importing.

    None where the system does not tell.
    """
    with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool:
        return pool.submit(_peak_in_this_process, case, weights, threads).result()


def _peak_in_this_process(case: Case, weights: Path, threads: int) -> int | None:
    import torch._dynamo  # what the first run of a model imports is not the model's

    torch.set_num_threads(threads)
    before = _peak_resident_bytes()
    set_up, run = case.prepare(weights)
    run(set_up())
    after = _peak_resident_bytes()
    return None if before is None or after is None else after - before


def _peak_resident_bytes() -> int | None:
    """Of this program; Linux's `getrusage` tells that of the process which it was forked from, too."""
    try:
        status = Path('/proc/self/status').read_text()
    except OSError:
        if sys.platform != 'darwin':
            return None
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith('VmHWM'))


def matmul_peak_gmacs_per_s(dtype: str, *, repeats: int = 5) -> float:
    """Multiply-adds a second, in 1e9, of the fastest of some square matrix products on this machine.

    The products grow until one takes longer than a turn: without instructions for a dtype they are a hundred times
    slower than with them.
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
