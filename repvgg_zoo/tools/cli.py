"""The command line: finds the commands in their files."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from types import MappingProxyType, ModuleType
from typing import NamedTuple

from .console import print_error

__all__ = ['COMMANDS', 'Command', 'main']


class Command(NamedTuple):
    """A word of the command line and the module behind it."""

    module: str
    """Relative to this package. It has `add_arguments(parser)`, and `main(args)`, which returns the exit status."""
    summary: str
    errors: tuple[type[Exception], ...] = (RuntimeError, ValueError, OSError, ModuleNotFoundError)
    """Mistakes of the user: they are told in one line. Other exceptions are bugs."""


COMMANDS = MappingProxyType(
    {
        'list': Command('.listing', 'list the variants, their sizes, published accuracy and weights'),
        'demo': Command('.demo', 'evaluate, fine-tune, fold and evaluate again on bundled images'),
        'convert': Command('.convert', 'write a checkpoint of any layout and form as a model folder'),
        'quantize': Command('.quantize', 'write the deploy form in INT8, and report what it costs and gains'),
        'verify': Command('.verify', 'tell whether two checkpoints, or both forms of one, compute the same function'),
        'publish': Command('.publish.publish', 'write both forms of a checkpoint as model folders, and upload them'),
        'reproduce': Command('.reproduce', 'print the commands that reproduce the published accuracy'),
        'benchmark': Command('.benchmark.benchmark', 'measure speed and memory of models on this machine'),
        # a script's own errors pass through the launcher
        'run': Command('.launch', 'run a script, module or console script with the zoo registered in timm', ()),
    }
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments behind the program's name, by default those of the process.

    Returns:
        The exit status: 0 for success, 1 for a mistake that is told in one line.

    Raises:
        SystemExit: The arguments are wrong, or ask for help.

    Example:
        >>> main(['verify', 'test_repvgg.cifar10_deploy'])  # which says on stderr what is wrong
        1
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    args = _parser(argv[0] if argv else None).parse_args(argv)
    command = COMMANDS[args.command]
    try:
        return _module(command).main(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except command.errors as error:
        print_error(error)
        return 1


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    """The parser, with the arguments of the chosen command: other commands' modules are not imported."""
    from .. import __version__

    parser = argparse.ArgumentParser(
        prog='repvgg-zoo',
        description='RepVGG models for timm, in the training and the deploy form.',
        epilog='`repvgg-zoo COMMAND --help` explains a command.',
    )
    parser.add_argument('--version', action='version', version=f'repvgg-zoo {__version__}')
    subparsers = parser.add_subparsers(dest='command', metavar='COMMAND', required=True)
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=command.summary, description=f'{command.summary[0].upper()}{command.summary[1:]}.'
        )
        if name == chosen:
            _module(command).add_arguments(subparser)
    return parser


def _module(command: Command) -> ModuleType:
    return importlib.import_module(command.module, __package__)
