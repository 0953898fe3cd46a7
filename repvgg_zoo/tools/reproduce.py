"""The commands that reproduce the published accuracy."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator

from ..pretrained.manifest import read_manifest
from .publish.weights_page import top1_text

__all__ = ['add_arguments', 'main', 'reproduction_lines']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `repvgg-zoo reproduce`."""
    parser.epilog = "The commands use validate.py of timm's repository, which timm's wheel does not hold."
    parser.add_argument('--imagenet', metavar='FOLDER', default='imagenet', help='ImageNet-1k, as an image folder')
    parser.add_argument('--cifar10', metavar='FOLDER', default='cifar10', help='CIFAR-10, as an image folder')
    parser.add_argument('--cifar100', metavar='FOLDER', default='cifar100', help='CIFAR-100, as an image folder')


def main(args: argparse.Namespace) -> int:
    """Run `repvgg-zoo reproduce`."""
    print('\n'.join(reproduction_lines(imagenet=args.imagenet, cifar10=args.cifar10, cifar100=args.cifar100)))
    return 0


def reproduction_lines(*, imagenet: str, cifar10: str, cifar100: str) -> Iterator[str]:
    r"""Write shell lines that evaluate all training-form weights by timm's `validate.py`.

    Args:
        imagenet: Folder of ImageNet-1k.
        cifar10: Folder of CIFAR-10, with a folder `test`.
        cifar100: Folder of CIFAR-100, with a folder `test`.

    Yields:
        Comments that tell which accuracy to expect, and commands.

    Example:
        >>> lines = list(reproduction_lines(imagenet='imagenet', cifar10='cifar10', cifar100='cifar100'))
        >>> print('\n'.join(lines[:3]))
        # repvgg_a0.rvgg_in1k: top-1 % 72.41 (arXiv 2101.03697, table 4), 72.426 (timm, results-imagenet.csv)
        # published, not verified here
        repvgg-zoo run validate.py --data-dir imagenet --model repvgg_a0.rvgg_in1k --pretrained
    """
    data = {
        'ImageNet-1k': shlex.quote(imagenet),
        'CIFAR-10': f'{shlex.quote(cifar10)} --split test',
        'CIFAR-100': f'{shlex.quote(cifar100)} --split test',
    }
    for record in read_manifest().values():
        if record.form != 'training' or not (record.has_source or record.upstream):
            continue
        expected = top1_text((*record.published, *record.measured))
        yield f'# {record.name}: top-1 % {expected or "nobody has published it"}'
        if expected:
            yield '# measured here' if record.measured else '# published, not verified here'
        if not record.has_source:
            yield f'# needs {record.upstream} of the official release; the command tells how to use it'
        yield f'repvgg-zoo run validate.py --data-dir {data[record.dataset]} --model {record.name} --pretrained'
