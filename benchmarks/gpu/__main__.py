"""Everything that a GPU has to show, in one command of nine minutes that downloads nothing.

    python benchmarks/gpu --out results [--cifar10 FOLDER]
    python benchmarks/gpu --out results --rehearse      # on a CPU, with tiny models

First, at the same time, what is not timed: the device tests, a training of `test_repvgg` on CIFAR-10 if its folder is
given, the agreement of both forms, and the compilation of the models. Then the timings, with nothing beside them. Each
part that fails leaves a line in the page, and the others go on. `--out` gets a Markdown page, CSV, JSON and plots.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from agreement import agreement
from page import BY_BRANCHES, write_page
from speed import FULL, REHEARSAL, loading, measure, plans, warm_up

from repvgg_zoo.tools.benchmark.benchmark import machine_facts
from repvgg_zoo.tools.console import positive
from repvgg_zoo.tools.devices import available_device

ROOT = Path(__file__).parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, required=True, help='folder for the results')
    parser.add_argument('--device', help='where to measure (cuda, and cpu for a rehearsal)')
    parser.add_argument('--rehearse', action='store_true', help='tiny models')
    parser.add_argument('--minutes', type=float, default=8.5, help='start no part after that (%(default)s)')
    parser.add_argument('--cifar10', type=Path, metavar='FOLDER', help='folder with the folders train and test')
    parser.add_argument('--cifar10-options', nargs=argparse.REMAINDER, default=[], help='of experiments/cifar10.py')
    parser.add_argument('--epochs', type=positive, default=200, help='of the training on CIFAR-10 (%(default)s)')
    skippable = ['tests', 'cifar10', 'agreement', 'warm_up', 'loading', *plans(REHEARSAL, 'cpu'), BY_BRANCHES]
    parser.add_argument(
        '--skip',
        nargs='*',
        choices=skippable,
        default=[],
        metavar='PART',
        help=f'parts to leave out: {", ".join(skippable)}',
    )
    args = parser.parse_args()
    try:
        args.device = available_device(args.device or ('cpu' if args.rehearse else 'cuda'))
    except argparse.ArgumentTypeError as error:
        parser.error(f'{error}; --rehearse runs on any')
    args.out = args.out.resolve()  # the programs that are started run in another folder
    settings = REHEARSAL if args.rehearse else FULL
    args.out.mkdir(parents=True, exist_ok=True)
    results = Parts(args.out / 'results.json', end=time.monotonic() + 60 * args.minutes, skip=args.skip)
    results.add('machine', lambda: machine_facts(torch.device(args.device)))

    tests = start(device_tests(args), args.out / 'device-tests.txt') if 'tests' not in args.skip else None
    with_training = args.cifar10 and 'cifar10' not in args.skip
    training = start(cifar10(args), args.out / 'cifar10.txt') if with_training else None
    # in a process of its own, because a change of the precision of float32 invalidates the compiler's cache
    apart = ProcessPoolExecutor(1, mp_context=get_context('spawn'))
    if 'agreement' not in args.skip:
        agreeing = apart.submit(agreement, settings.agreeing, args.device, px=settings.agreement_px)
    parts = plans(settings, args.device)
    compiled = [case for cases in parts.values() for case in cases if case.runtime != 'eager']
    results.add('warm_up', lambda: warm_up(compiled, seconds=results.seconds_left() / 3, workers=5))
    results.add('agreement', lambda: agreeing.result(results.seconds_left()))
    apart.shutdown(wait=False, cancel_futures=True)
    if tests:
        results.add('tests', lambda: finish(tests, results.seconds_left() / 4, args.out / 'device-tests.txt'))
    if training:
        results.add('cifar10', lambda: finish(training, results.seconds_left() / 2, args.out / 'cifar10.txt'))

    results.add('loading', lambda: loading(settings, args.device))
    for name, cases in parts.items():
        results.add(name, lambda cases=cases: measure(cases, settings))
        if name == 'training_eager_channels_last':
            results.add(BY_BRANCHES, lambda cases=cases: measure(cases, settings, by_branches=True))
    results.add('page', lambda: write_page(results.parts, args.out))
    return 1 if results.failed() else 0


class Parts:
    """Results of the parts, written to a file after each."""

    def __init__(self, path: Path, *, end: float, skip: list[str]) -> None:
        self.path, self.end, self.skip, self.parts = path, end, skip, {}

    def seconds_left(self) -> float:
        return max(1.0, self.end - time.monotonic())

    def add(self, name: str, run: Callable[[], Any]) -> None:
        if name in self.skip:
            return
        start = time.monotonic()
        if name != 'page' and start > self.end:
            self.parts[name] = {'error': 'no time was left'}
            return
        try:
            self.parts[name] = run()
        except Exception as error:  # the other parts go on
            traceback.print_exc()
            self.parts[name] = {'error': f'{type(error).__name__}: {error}'}
        self.parts.setdefault('seconds', {})[name] = round(time.monotonic() - start, 1)
        print(f'{name}: {self.parts["seconds"][name]} s', flush=True)
        self.path.write_text(json.dumps(self.parts, indent=1) + '\n')

    def failed(self) -> list[str]:
        return [name for name, part in self.parts.items() if isinstance(part, dict) and 'error' in part]


def device_tests(args: argparse.Namespace) -> list[str]:
    chosen, workers = ('tests/reparam/test_fold.py', '2') if args.rehearse else ('tests', '8')
    options = ['-v', '-m', 'device and not slow and not exhaustive', '-n', workers, '-p', 'no:cacheprovider']
    return [sys.executable, '-m', 'pytest', chosen, '--device', args.device, *options]


def cifar10(args: argparse.Namespace) -> list[str]:
    options = ['--epochs', str(args.epochs), '--minutes', str(args.minutes / 2), '--device', args.device]
    options += ['--out', str(args.out / 'cifar10')]
    options += args.cifar10_options
    tiny = ['--images', '256', '--eager'] if args.rehearse else []
    return [sys.executable, 'experiments/cifar10.py', '--data', str(args.cifar10.resolve()), *options, *tiny]


def start(command: list[str], log: Path) -> subprocess.Popen:
    return subprocess.Popen(command, cwd=ROOT, stdout=log.open('w'), stderr=subprocess.STDOUT, start_new_session=True)


def finish(process: subprocess.Popen, seconds: float, log: Path) -> dict[str, Any]:
    """Wait for a process, and give the last line that it printed."""
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        status = 'no end in time'
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its workers too
    last = (log.read_text().splitlines() or [''])[-1]
    if status:
        raise RuntimeError(f'{status}; its last line: {last}')
    return {'last_line': last}


if __name__ == '__main__':
    if 'PYTHONHASHSEED' not in os.environ:  # or each process would compile, and cache, other code for the same model
        os.execve(sys.executable, sys.orig_argv, os.environ | {'PYTHONHASHSEED': '0'})
    sys.exit(main())
