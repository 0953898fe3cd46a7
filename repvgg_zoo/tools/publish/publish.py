"""The command `publish`: both forms of a checkpoint as model folders, and as repositories on the Hub."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from ...pretrained.hub import WEIGHT_FILES, sha256_of
from ...pretrained.manifest import DEPLOY_SUFFIX, manifest_path, read_manifest
from ..console import print_error, progress
from .folders import Published, build_folders
from .manifest_file import record_weights
from .upload import HubError, push_folder

__all__ = ['add_arguments', 'main', 'names_to_publish', 'publish', 'push_folders']

_logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `repvgg-zoo publish`."""
    parser.epilog = (
        'The forms are compared before anything is written. Without --push nothing is uploaded. A run that was stopped '
        'can be started again: what is on the Hub already is not uploaded twice.'
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument('name', metavar='ARCH.TAG', nargs='?', help='name of the training weights')
    which.add_argument('--all', action='store_true', help='all weights whose source the manifest knows')
    parser.add_argument(
        '--from',
        dest='source',
        metavar='SRC',
        help='checkpoint file of any layout, model folder, or Hub repository, with the weights that the manifest '
        'describes (default: what the manifest names)',
    )
    parser.add_argument('--owner', required=True, help='Hub account to publish under')
    parser.add_argument('--out', metavar='DIR', help='folder for the model folders (default: OWNER)')
    parser.add_argument('--push', action='store_true', help='upload, and record in the manifest where the weights are')
    parser.add_argument(
        '--replace', action='store_true', help='replace model folders and repositories that hold other weights'
    )
    parser.add_argument(
        '--verify-images', metavar='FOLDER', help='real images to compare the forms on (default: random ones)'
    )


def main(args: argparse.Namespace) -> int:
    """Run `repvgg-zoo publish`."""
    if not args.all:
        _publish_and_print(args.name, args)
        return 0
    if args.source:
        raise ValueError('--all takes every source from the manifest, so it goes without --from')
    failed = False
    for name in names_to_publish(args.owner):
        try:
            _publish_and_print(name, args)
        except (RuntimeError, ValueError, OSError) as error:
            failed = True
            print_error(error)
    return int(failed)


def _publish_and_print(name: str, args: argparse.Namespace) -> None:
    with progress() as track:
        published = publish(
            name,
            args.source,
            owner=args.owner,
            out=args.out,
            push=args.push,
            replace_existing=args.replace,
            images=args.verify_images,
            track=track,
        )
    for item in published:
        done = 'published' if args.push else 'would publish'
        size_mb = (item.folder / WEIGHT_FILES[0]).stat().st_size / 1e6
        print(f'{item.folder}: {size_mb:.1f} MB, {done} as {item.record.hub_id}')
    if check := published[0].record.fold_check:
        print(f'the forms differ by {check.float64_rel_diff:.1e} in float64, {check.float32_rel_diff:.1e} in float32')


def publish(
    name: str,
    source: str | Path | None = None,
    *,
    push: bool = False,
    replace_existing: bool = False,
    **options: Any,
) -> tuple[Published, Published]:
    """Write the model folders of both forms of a checkpoint, and upload them.

    Args:
        name: See `build_folders`.
        source: See `build_folders`.
        push: Upload the folders, see `push_folders`.
        replace_existing: Replace model folders, and with `push` repositories, that hold other weights.
        options: Other options of `build_folders`. `owner` is required.

    Returns:
        The training form and the deploy form.

    Raises:
        PermissionError: The manifest cannot be written, so that publishing could not be recorded.
        Exception: Those of `build_folders` and `push_folders`.

    Example:
        >>> import tempfile
        >>> training, deploy = publish('test_repvgg.cifar10', owner='me', out=tempfile.mkdtemp())
        >>> training.record.hub_id
        'me/test_repvgg.cifar10'
    """
    weights_dir = manifest_path().parent
    if push and not os.access(weights_dir, os.W_OK):
        raise PermissionError(f'{str(weights_dir)!r} cannot be written, so publishing could not be recorded there')
    published = build_folders(name, source, replace_existing=replace_existing, **options)
    if push:
        push_folders(published, replace_existing=replace_existing)
    return published


def names_to_publish(owner: str) -> list[str]:
    """List the training weights that the manifest knows a source of and that `owner` has not published.

    Args:
        owner: Hub account.

    Returns:
        Names, `arch.tag`.

    Example:
        >>> 'test_repvgg.cifar10' in names_to_publish('me')
        True
    """
    manifest = read_manifest()

    def is_published(name: str) -> bool:
        record = manifest[name]
        return record.hub_id == f'{owner}/{name}' and record.revision is not None

    return [
        r.name
        for r in manifest.values()
        if r.form == 'training' and r.has_source and not (is_published(r.name) and is_published(r.name + DEPLOY_SUFFIX))
    ]


def push_folders(published: Iterable[Published], *, replace_existing: bool = False) -> None:
    """Upload model folders to their repositories, and record in the manifest where they are.

    Args:
        published: What `build_folders` returns.
        replace_existing: Replace other files that a repository holds.

    Raises:
        HubError: A folder has changed, or the Hub did not take it. Folders that were uploaded before stay on the Hub
            and are not uploaded again.

    Example:
        >>> push_folders(build_folders('test_repvgg.cifar10', owner='me'))  # doctest: +SKIP
    """
    for item in published:
        weights = item.folder / WEIGHT_FILES[0]
        if sha256_of(weights) != item.record.sha256:
            raise HubError(f'{str(weights)!r} has changed since it was written; publish it again')
        revision = push_folder(item.folder, cast('str', item.record.hub_id), replace=replace_existing)
        record_weights(replace(item.record, revision=revision))
        _logger.info('%s is on the Hub at revision %s', item.record.hub_id, revision)
