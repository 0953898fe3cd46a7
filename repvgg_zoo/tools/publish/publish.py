"""The command `publish`: both forms of a checkpoint as model folders, and as repositories on the Hub."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...pretrained.hub import WEIGHT_FILES
from ...pretrained.manifest import read_manifest
from ..console import positive, print_error, progress
from ..devices import add_device_argument
from ..model_arguments import add_model_arguments, model_options
from .cards import CARD
from .preprocessing import INTERPOLATIONS
from .publication import Publication, own_publication, recorded_publication
from .push import names_to_publish, publish

__all__ = ['add_arguments', 'main']

_EPILOG = (
    'The forms are compared before anything is written. Without --push nothing is uploaded. A run that was stopped can '
    'be started again: what is on the Hub already is not uploaded twice. Example: repvgg-zoo publish --from '
    'last.pth.tar --model repvgg_a0 --name repvgg_a0.my_flowers --owner me --label-names labels.txt --dataset flowers '
    '--top1 93.5 --license mit --push'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `repvgg-zoo publish`."""
    parser.epilog = _EPILOG
    which = parser.add_argument_group('what to publish, one of these').add_mutually_exclusive_group(required=True)
    which.add_argument('name', metavar='ARCH.TAG', nargs='?', help='weights that the manifest describes')
    which.add_argument('--name', dest='own_name', metavar='ARCH.NAME', help='weights of your own, under this name')
    which.add_argument('--all', action='store_true', help='all weights whose source the manifest knows')
    parser.add_argument(
        '--from',
        dest='source',
        metavar='SRC',
        help='checkpoint file of any layout, model folder, or Hub repository (default: what the manifest names)',
    )
    parser.add_argument(
        '--from-folder',
        metavar='DIR',
        help='with --all: folder of the .pth files of the official release, instead of what the manifest names',
    )
    parser.add_argument(
        '--trust-source',
        action='store_true',
        help='SRC holds the weights that the manifest describes. Without your word, or a sha256 that the manifest '
        'knows, the cards claim neither origin nor accuracy, and the manifest does not record them',
    )
    parser.add_argument('--owner', required=True, help='Hub account to publish under')
    parser.add_argument('--out', metavar='DIR', help='folder for the model folders (default: OWNER)')
    parser.add_argument('--push', action='store_true', help='upload; the manifest records where its own weights are')
    parser.add_argument(
        '--replace',
        action='store_true',
        help='replace model folders that hold something else, and files of repositories; a card that you edited stays',
    )
    parser.add_argument(
        '--verify-images', metavar='FOLDER', help='real images to compare the forms on (default: random ones)'
    )
    add_device_argument(parser, what='the forms are compared')
    add_model_arguments(parser, 'SRC')
    _add_own_arguments(parser)


def _add_own_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('weights of your own, with --name')
    group.add_argument(
        '--base', metavar='NAME', help='what SRC was fine-tuned from: a name of the zoo, whose preprocessing it has '
        'unless you say otherwise, or OWNER/NAME'
    )  # fmt: skip
    group.add_argument('--label-names', metavar='FILE', help='class names, one a line; a description behind a tab')
    group.add_argument('--dataset', metavar='NAME', help='data set that it was trained on, or its id on the Hub')
    group.add_argument('--top1', metavar='PCT', type=float, help='its accuracy there, in per cent')
    group.add_argument('--top5', metavar='PCT', type=float, help='the same for the five best classes')
    group.add_argument(
        '--license', metavar='ID', help='licence, best by the name that the Hub has for it: mit, cc-by-4.0, …'
    )
    group.add_argument('--img-size', metavar='PX', type=positive, help='preprocessing: side of the image')
    group.add_argument('--crop-pct', metavar='N', type=float, help='preprocessing: part that the crop keeps, 0 to 1')
    group.add_argument('--interpolation', choices=INTERPOLATIONS, help='preprocessing: resizing')
    group.add_argument('--mean', metavar='N', type=float, nargs='+', help='preprocessing: mean of each channel')
    group.add_argument('--std', metavar='N', type=float, nargs='+', help='preprocessing: deviation of each channel')


def main(args: argparse.Namespace) -> int:
    """Run `repvgg-zoo publish`."""
    if args.from_folder and not args.all:
        raise ValueError('--from-folder goes with --all; for one file use --from')
    _check_own_arguments(args)
    if args.own_name:
        _publish_and_print(_own(args), args)
        return 0
    if not args.all:
        options: dict[str, Any] = dict(trust_source=args.trust_source, use_ema=not args.no_ema, prefix=args.prefix)
        _publish_and_print(recorded_publication(args.name, args.source, **options), args)
        return 0
    if args.source:
        raise ValueError('--all takes every source from the manifest, or from --from-folder, so it goes without --from')
    failed = False
    for name, source in _all_sources(args):
        try:
            if source is not None and not source.is_file():
                raise FileNotFoundError(f'{name} is not published: {str(source)!r} is missing')
            _publish_and_print(recorded_publication(name, source, trust_source=args.trust_source), args)
        except (RuntimeError, ValueError, OSError) as error:
            failed = True
            print_error(error)
    return int(failed)


def _all_sources(args: argparse.Namespace) -> Iterator[tuple[str, Path | None]]:
    """Names, and files of the official release to publish them from."""
    if not args.from_folder:
        yield from ((name, None) for name in names_to_publish(args.owner))
        return
    folder = Path(args.from_folder)
    if not folder.is_dir():
        raise FileNotFoundError(f'no folder at {args.from_folder!r}')
    for record in read_manifest().values():
        if record.form == 'training' and record.upstream:
            yield record.name, folder / record.upstream


_OWN = (
    *('variant', 'model_kwargs', 'block', 'base', 'label_names', 'dataset', 'top1', 'top5', 'license'),
    *('img_size', 'crop_pct', 'interpolation', 'mean', 'std'),
)


def _check_own_arguments(args: argparse.Namespace) -> None:
    if args.own_name:
        if not args.source:
            raise ValueError('--name publishes a checkpoint of your own; say with --from where it is')
        if args.trust_source:
            raise ValueError('--trust-source is for weights of the manifest, so it goes without --name')
        return
    if not args.source and (args.prefix is not None or args.no_ema):
        raise ValueError('--prefix and --no-ema tell how to read a file; say with --from which')
    if given := [name for name in _OWN if getattr(args, name) is not None]:
        option = f'--{given[0].replace("_", "-")}'
        raise ValueError(f'{option} describes weights of your own; give them a name with --name')


def _own(args: argparse.Namespace) -> Publication:
    preprocessing: dict[str, Any] = {
        'input_size': args.img_size and (3, args.img_size, args.img_size),
        'crop_pct': args.crop_pct,
        'interpolation': args.interpolation,
        'mean': args.mean and tuple(args.mean),
        'std': args.std and tuple(args.std),
    }
    return own_publication(
        args.own_name,
        args.source,
        base=args.base,
        preprocessing={key: value for key, value in preprocessing.items() if value is not None},
        dataset=args.dataset,
        top1_pct=args.top1,
        top5_pct=args.top5,
        labels=args.label_names,
        license=args.license,
        **model_options(args),
    )


_DONE = {None: 'would publish', True: 'published', False: 'nothing to upload, it is on the Hub already'}


def _publish_and_print(publication: Publication, args: argparse.Namespace) -> None:
    with progress() as track:
        published = publish(
            publication,
            owner=args.owner,
            out=args.out,
            push=args.push,
            replace_existing=args.replace,
            images=args.verify_images,
            device=args.device,
            track=track,
        )
    for item in published:
        size_mb = (item.folder / WEIGHT_FILES[0]).stat().st_size / 1e6
        print(f'{item.folder}: {size_mb:.1f} MB, {_DONE[item.uploaded]} as {item.hub_id}')
        if item.edited_card:
            print(f'{item.folder / CARD} stays as you edited it; for a new card delete it, and pass --replace')
    check = published[0].fold_check
    place = '' if check.device == 'cpu' else f', on {check.device}'
    print(
        f'the forms differ by {check.float64_rel_diff:.1e} in float64, {check.float32_rel_diff:.1e} in float32{place}'
    )
    if not publication.vouched:
        print(
            f'{publication.source.title} has a sha256 that the manifest does not know, so the cards claim neither '
            'origin nor accuracy, and the manifest does not record it; if it holds the weights that the manifest '
            'describes, say so with --trust-source'
        )
