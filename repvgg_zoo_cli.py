"""The command line: finds the commands in their files.

It is no part of the package, because importing that brings torch and timm and takes seconds. So the program answers its
own help and mistyped commands at once, and catches Ctrl-C from the beginning.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Sequence
from types import MappingProxyType
from typing import NamedTuple, NoReturn

__all__ = ['COMMANDS', 'Command', 'main']


class Command(NamedTuple):
    """A word of the command line and the module behind it."""

    module: str
    """Relative to `repvgg_zoo.tools`. It has `add_arguments(parser)`, and `main(args)`, which returns the status."""
    summary: str
    errors: tuple[type[Exception], ...] = (RuntimeError, ValueError, OSError, ModuleNotFoundError)
    """Mistakes of the user: they are told in one line. Other exceptions are bugs."""


COMMANDS = MappingProxyType(
    {
        'list': Command('.listing', 'list the variants, their sizes, published accuracy and weights'),
        'demo': Command('.demo.demo', 'fine-tune on bundled images, fold, compare both forms, and draw a picture'),
        'convert': Command('.convert', 'write a checkpoint of any layout and form as a model folder'),
        'quantize': Command('.quantize.command', 'write the deploy form in INT8, and report what it costs and gains'),
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
        The exit status: 0 for success, 1 for a mistake that is told in one line, 2 without a command, 130 after Ctrl-C.

    Raises:
        SystemExit: The arguments are wrong, or ask for help.

    Example:
        >>> main(['convert', 'nowhere.pth', 'out'])  # which says on stderr what is wrong
        1
    """
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        print('repvgg-zoo: interrupted', file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(argv: list[str]) -> int:
    parser = _Parser(
        prog='repvgg-zoo',
        usage='%(prog)s [--help] [--version] COMMAND ...',
        description='RepVGG models for timm, in the training and the deploy form.',
        epilog='commands:\n'
        + ''.join(f'  {name:<11}{command.summary}\n' for name, command in COMMANDS.items())
        + '\n`repvgg-zoo COMMAND --help` explains a command.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--version', action='store_true', help='print the version')
    parser.add_argument('command', metavar='COMMAND', nargs='?', choices=COMMANDS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv[:1])
    if args.version:
        from importlib.metadata import version

        print(f'repvgg-zoo {version("repvgg-zoo")}')
        return 0
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    command = COMMANDS[args.command]
    parser = _Parser(
        prog=f'repvgg-zoo {args.command}', description=f'{command.summary[0].upper()}{command.summary[1:]}.'
    )
    try:
        module = importlib.import_module(command.module, 'repvgg_zoo.tools')
        module.add_arguments(parser)
        status: int = module.main(parser.parse_args(argv[1:]))
    except BrokenPipeError:
        raise
    except command.errors as error:
        from repvgg_zoo.tools.console import print_error

        print_error(error)
        return 1
    return status


class _Parser(argparse.ArgumentParser):
    """A parser that tells a mistake in one line, with what was perhaps meant."""

    def error(self, message: str) -> NoReturn:
        import difflib

        wrong = re.search(r"(?:invalid choice: '|unrecognized arguments: )([^\s'=]+)", message)
        choices = re.findall(r'[\w-]+', message.partition('choose from')[2])
        options = choices or [option for action in self._actions for option in action.option_strings]
        nearest = difflib.get_close_matches(wrong[1], options, n=1, cutoff=0.7) if wrong else []
        meant = f'; did you mean {nearest[0]!r}?' if nearest else ';'
        self.exit(2, f'{self.prog}: {message}{meant} `{self.prog} --help` explains\n')


if __name__ == '__main__':
    sys.exit(main())
