"""The command line: finds the verbs in their files."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from types import MappingProxyType, ModuleType
from typing import NamedTuple

from .console import print_error

__all__ = ['VERBS', 'Verb', 'main']


class Verb(NamedTuple):
    """A word of the command line and the module behind it."""

    module: str
    """Relative to this package. It has `add_arguments(parser)`, and `main(args)`, which returns the exit status."""
    summary: str
    errors: tuple[type[Exception], ...] = (RuntimeError, ValueError, OSError, ModuleNotFoundError)
    """Mistakes of the user: they are told in one line. Other exceptions are bugs."""


VERBS = MappingProxyType(
    {
        'list': Verb('.listing', 'list the variants, their sizes, published accuracy and weights'),
        'demo': Verb('.demo', 'evaluate, fine-tune, fold and evaluate again on bundled images'),
        'convert': Verb('.convert', 'write a checkpoint of any layout and form as a model folder'),
        'quantize': Verb('.quantize', 'write the deploy form in INT8, and report what it costs and gains'),
        'verify': Verb('.verify', 'tell whether two checkpoints, or both forms of one, compute the same function'),
        'publish': Verb('.publish.publish', 'write both forms of a checkpoint as model folders, and upload them'),
        'reproduce': Verb('.reproduce', 'print the commands that reproduce the published accuracy'),
        'benchmark': Verb('.benchmark.benchmark', 'measure speed and memory, here and beside other models'),
        # a script's own errors pass through the launcher
        'run': Verb('.launch', 'run a script, module or console script with the zoo registered in timm', ()),
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
    verb = VERBS[args.verb]
    try:
        return _module(verb).main(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except verb.errors as error:
        print_error(error)
        return 1


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    """The parser, with the arguments of the chosen verb: other verbs' modules are not imported."""
    from .. import __version__

    parser = argparse.ArgumentParser(
        prog='repvgg-zoo',
        description='RepVGG models for timm, in the training and the deploy form.',
        epilog='`repvgg-zoo VERB --help` explains a verb.',
    )
    parser.add_argument('--version', action='version', version=f'repvgg-zoo {__version__}')
    subparsers = parser.add_subparsers(dest='verb', metavar='VERB', required=True)
    for name, verb in VERBS.items():
        subparser = subparsers.add_parser(
            name, help=verb.summary, description=f'{verb.summary[0].upper()}{verb.summary[1:]}.'
        )
        if name == chosen:
            _module(verb).add_arguments(subparser)
    return parser


def _module(verb: Verb) -> ModuleType:
    return importlib.import_module(verb.module, __package__)
