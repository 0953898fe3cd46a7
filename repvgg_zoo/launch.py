"""Run any script, module or console script with the zoo registered in timm."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

__all__ = ['LaunchError', 'run']


class LaunchError(ValueError):
    """There is nothing by that name to run."""


def run(target: str, args: Sequence[str] = ()) -> None:
    """Run `target` as the main program with `args`, as `python target args…` would.

    `target` is a script's path, the name of an installed console script, or a module's name, looked for
    in this order. `sys.argv`, `sys.path[0]` and the exit status are those of a direct run: whatever the
    program raises, `SystemExit` included, passes through. Raises `LaunchError` if there is no such thing.
    """
    if Path(target).is_file():
        sys.argv = [target, *args]
        sys.path[0] = str(Path(target).resolve().parent)
        runpy.run_path(target, run_name='__main__')
        return
    if scripts := entry_points(group='console_scripts', name=target):
        main = next(iter(scripts)).load()
        sys.argv = [target, *args]
        sys.exit(main())
    sys.path[0] = str(Path.cwd())
    if not _is_module(target):
        raise LaunchError(f'{target!r} is no file, no installed console script and no module that can be run')
    sys.argv = [target, *args]
    runpy.run_module(target, run_name='__main__', alter_sys=True)


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False
