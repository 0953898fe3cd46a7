"""Run any script, module or console script with the zoo registered in timm."""

from __future__ import annotations

import argparse
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

from ..overparam.registry import parse_recipe, register_overparameterized
from .console import print_error

__all__ = ['LaunchError', 'add_arguments', 'main', 'run']

_logger = logging.getLogger(__name__)


class LaunchError(ValueError):
    """There is nothing by that name to run, or no model by that name to register."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `repvgg-zoo run`."""
    parser.epilog = 'All arguments behind SCRIPT_OR_MODULE are passed on.'
    parser.add_argument(
        '--overparameterize', metavar='NAME:BLOCK[:PATHS]', action='append', default=[],
        help='register a timm model with branches, resnet18:acb as resnet18_acb, for all convolutions or those of a '
        'pattern of paths like layer1.*; may be given several times',
    )  # fmt: skip
    parser.add_argument('target', metavar='SCRIPT_OR_MODULE', help='what to run')
    parser.add_argument('args', metavar='ARGS', nargs=argparse.REMAINDER, help='its arguments')


def main(args: argparse.Namespace) -> int:
    """Run `repvgg-zoo run`."""
    try:
        _register(args.overparameterize)
        run(args.target, args.args)
    except LaunchError as error:
        print_error(error)
        return 1
    return 0


def run(target: str, args: Sequence[str] = ()) -> None:
    """Run a program with the zoo registered, as `python target args…` would without.

    `sys.argv`, `sys.path[0]`, `__file__` and the exit status are those of a direct run.

    Args:
        target: Path of a script, or of a folder or zip file with a `__main__.py`; else name of an installed console
            script; else name of a module.
        args: Arguments of the program.

    Raises:
        LaunchError: There is nothing of that name to run.
        BaseException: What the program raises, `SystemExit` included.

    Example:
        >>> run('train.py', ['--model', 'repvgg_a0'])  # doctest: +SKIP
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


def _register(recipes: Sequence[str]) -> None:
    try:
        for text in recipes:
            name, block, where = parse_recipe(text)
            register_overparameterized(name, block, where=where)
    except ValueError as error:
        raise LaunchError(f'--overparameterize: {error}') from None


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
