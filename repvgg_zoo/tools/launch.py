"""Run any script, module or console script with the zoo registered in timm."""

from __future__ import annotations

import io
import logging
import runpy
import sys
import zipfile
from collections.abc import Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import timm

__all__ = ['LaunchError', 'run']

_logger = logging.getLogger(__name__)


class LaunchError(ValueError):
    """There is nothing by that name to run."""


def run(target: str, args: Sequence[str] = ()) -> None:
    """Run `target` as the main program with `args`, as `python target args…` would.

    `target` is the path of a script, or of a folder or zip file with a `__main__.py`; the name of an
    installed console script; or the name of a module, looked for in this order. `sys.argv`,
    `sys.path[0]`, `__file__` and the exit status are those of a direct run: whatever the program raises,
    `SystemExit` included, passes through. Raises `LaunchError` if there is no such thing.
    """
    path = Path(target)
    sys.argv = [target, *args]
    if path.is_file() and not zipfile.is_zipfile(path):
        _set_first_path(path.resolve().parent)
        _run_script(path)
    elif zipfile.is_zipfile(path) or ((path / '__main__.py').is_file() and not (path / '__init__.py').is_file()):
        _set_first_path(path.resolve())
        runpy.run_path(target, run_name='__main__')
    elif scripts := entry_points(group='console_scripts', name=target):
        main = next(iter(scripts)).load()
        sys.exit(main())
    else:
        _set_first_path(Path.cwd())
        if not _is_module(target):
            raise LaunchError(f'{target!r} is no file, no installed console script and no module that can be run')
        runpy.run_module(target, run_name='__main__', alter_sys=True)


def _run_script(path: Path) -> None:
    timm_beside = path.resolve().parent / 'timm' / '__init__.py'
    if timm_beside.is_file() and timm_beside != Path(timm.__file__).resolve():
        _logger.warning('%s has a timm beside it, but runs with timm %s of %s', path, timm.__version__, timm.__file__)
    main = ModuleType('__main__')
    main.__file__ = str(path.absolute())
    sys.modules['__main__'] = main
    with io.open_code(main.__file__) as file:
        code = compile(file.read(), main.__file__, 'exec')
    exec(code, main.__dict__)  # noqa: S102


def _set_first_path(path: Path) -> None:
    if not sys.flags.safe_path:  # sys.path has no such entry then
        sys.path[0] = str(path)


def _is_module(name: str) -> bool:
    try:
        spec = find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = find_spec(f'{name}.__main__')
    except (ImportError, ValueError):
        return False
    return spec is not None
