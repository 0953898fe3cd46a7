"""Time in interleaved rounds, peak memory, and the peak rate of a device."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from ..console import Track

if TYPE_CHECKING:
    from .cases import Case

__all__ = ['matmul_peak_gmacs_per_s', 'peak_device_bytes', 'peak_memory_bytes', 'time_rounds', 'timed']

_CPU = torch.device('cpu')
_SLICE_S = 0.1
"""A turn of a case takes this long, and at least one run."""


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Run a function once.

    Args:
        run: The function.
        device: Where it computes.

    Returns:
        Seconds until the device has done the work: by its own events on CUDA, by the host's clock elsewhere.

    Example:
        >>> timed(lambda: time.sleep(0.01), torch.device('cpu')) > 0.009
        True
    """
    if device.type == 'cuda':
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start_event.record(torch.cuda.current_stream(device))
        _ = run()  # freed after the clock has stopped
        end_event.record(torch.cuda.current_stream(device))
        end_event.synchronize()
        return start_event.elapsed_time(end_event) / 1e3
    _synchronise(device)
    start = time.perf_counter()
    _ = run()
    _synchronise(device)
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type != 'cpu':
        getattr(torch, device.type).synchronize()


def time_rounds(
    runs: list[tuple[Callable[[], Any], Callable[[Any], Any]]],
    *,
    rounds: int,
    device: torch.device = _CPU,
    track: Track,
) -> list[list[float]]:
    """Time functions in interleaved rounds, each round in a random order.

    So a slow spell of the machine hits all functions, and no function always follows the same other one, which can
    cost some per cent. The first run of each turn does not count, because its caches are filled by others, unless it
    takes the whole turn.

    Args:
        runs: Pairs of a function to call before each run, untimed, and the run, which takes its result.
        rounds: Turns of each pair.
        device: Where all of them compute.
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
        seconds[turn] += _turn(*runs[turn], device)
    return seconds


def _turn(set_up: Callable[[], Any], run: Callable[[Any], Any], device: torch.device) -> list[float]:
    seconds: list[float] = []
    while sum(seconds) < _SLICE_S:
        state = set_up()
        seconds.append(timed(partial(run, state), device))
    return seconds[1:] or seconds


def peak_device_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Measure the peak of the memory of a CUDA device while a function runs.

    Args:
        run: The function. It has run before, so that buffers of the first run do not count.
        device: The device.

    Returns:
        Bytes of all tensors on the device at the peak, those of other models too.

    Example:
        >>> peak_device_bytes(lambda: model(x), torch.device('cuda'))  # doctest: +SKIP
        80142336
    """
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device)


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


def matmul_peak_gmacs_per_s(dtype: str, *, device: torch.device = _CPU, repeats: int = 5) -> float:
    """Measure the rate of the fastest of some square matrix products.

    The products grow until one takes longer than a turn: without instructions for the dtype they are a hundred times
    slower.

    Args:
        dtype: Name of a torch dtype.
        device: Where to compute.
        repeats: Runs of each product.

    Returns:
        Multiply-adds a second, in 1e9.

    Example:
        >>> matmul_peak_gmacs_per_s('float32') > 0.1
        True
    """
    best = 0.0
    for size in (256, 512, 1024, 2048, 3072) if device.type == 'cpu' else (2048, 4096, 8192):
        a, b = torch.randn(2, size, size, dtype=getattr(torch, dtype), device=device)
        seconds = median([timed(partial(torch.mm, a, b), device) for _ in range(repeats + 1)][1:])
        best = max(best, size**3 / seconds / 1e9)
        if seconds > _SLICE_S:
            break
    return best
