"""The arguments of the commands that tell how a checkpoint is read."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, TypedDict

from timm.utils import ParseKwargs

__all__ = ['ModelOptions', 'add_model_arguments', 'model_options']


class ModelOptions(TypedDict, total=False):
    """The options of `open_model`."""

    variant: str | None
    block: str | None
    use_ema: bool
    prefix: str | None
    model_kwargs: Mapping[str, Any] | None


def add_model_arguments(parser: argparse.ArgumentParser, source: str) -> None:
    """Add the arguments that tell how a checkpoint is read.

    Args:
        parser: The parser of a command.
        source: The command's name for the checkpoint.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_model_arguments(parser, 'SRC')
        >>> parser.parse_args(['--prefix', 'model.']).prefix
        'model.'
    """
    group = parser.add_argument_group(f'how to read {source}, if that is a bare file')
    group.add_argument('--variant', '--model', metavar='ARCH', help=f'variant of {source}, if its shapes do not tell')
    group.add_argument('--block', help=f'training-time block of {source}, if its keys do not tell')
    group.add_argument(
        '--model-kwargs', metavar='KEY=VALUE', nargs='*', action=ParseKwargs,
        help='arguments of timm.create_model, with --variant: "strides=(1, 1, 2, 2, 2)"',
    )  # fmt: skip
    group.add_argument(
        '--no-ema', action='store_true', default=None, help=f'take the plain weights if {source} holds an average too'
    )
    group.add_argument('--prefix', help='take only the part of a larger network whose keys start with this')


def model_options(args: argparse.Namespace) -> ModelOptions:
    """Return the options of `open_model`.

    Args:
        args: What a parser with these arguments gives.

    Returns:
        The options.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_model_arguments(parser, 'SRC')
        >>> model_options(parser.parse_args(['--no-ema']))['use_ema']
        False
    """
    return {
        'variant': args.variant,
        'block': args.block,
        'use_ema': not args.no_ema,
        'prefix': args.prefix,
        'model_kwargs': args.model_kwargs,
    }
