"""The option `--device` of the commands."""

from __future__ import annotations

import argparse

__all__ = ['add_device_argument', 'available_device']


def add_device_argument(parser: argparse.ArgumentParser, *, what: str = 'models run') -> None:
    """Add `--device`, the name of a device of PyTorch, `cpu` by default.

    Args:
        parser: Its parsed arguments get `device`, a name that PyTorch can compute on here.
        what: What happens on the device, for the help.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_device_argument(parser)
        >>> parser.parse_args([]).device
        'cpu'
    """
    parser.add_argument(
        '--device',
        type=available_device,
        default='cpu',
        metavar='DEVICE',
        help=f'where {what}: cpu, cuda, cuda:N or mps (%(default)s)',
    )


def available_device(text: str) -> str:
    """Check that PyTorch can compute on a device here: a `type` for argparse.

    Args:
        text: The name of a device, as PyTorch spells it.

    Returns:
        The name, without the number of the only CPU or MPS device.

    Raises:
        argparse.ArgumentTypeError: There is no such device. The message lists those that there are.

    Example:
        >>> available_device('cpu:0')
        'cpu'
    """
    import torch

    found = ['cpu']
    if torch.cuda.is_available():
        found += ['cuda', *(f'cuda:{index}' for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        found.append('mps')
    name = text.removesuffix(':0') if text in ('cpu:0', 'mps:0') else text
    if name not in found:
        raise argparse.ArgumentTypeError(f'there is no device {text!r} here; there is: {", ".join(found)}')
    return name
