"""Builds and uploads model folders, and records in the manifest where its weights are."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ...pretrained.hub import WEIGHT_FILES, sha256_of
from ...pretrained.manifest import DEPLOY_SUFFIX, manifest_path, read_manifest
from .folders import Published, build_folders
from .manifest_file import record_weights
from .publication import Publication
from .upload import HubError, push_folder

__all__ = ['names_to_publish', 'publish', 'push_folders']

_logger = logging.getLogger(__name__)


def publish(
    publication: Publication, *, push: bool = False, replace_existing: bool = False, **options: Any
) -> tuple[Published, Published]:
    """Write the model folders of both forms of a checkpoint, and upload them.

    Args:
        publication: See `build_folders`.
        push: Upload the folders, see `push_folders`.
        replace_existing: Replace model folders, and with `push` files of repositories, that hold something else.
        options: Other options of `build_folders`. `owner` is required.

    Returns:
        The training form and the deploy form.

    Raises:
        PermissionError: The manifest cannot be written, so that publishing could not be recorded.
        Exception: Those of `build_folders` and `push_folders`.

    Example:
        >>> import tempfile
        >>> from repvgg_zoo.tools.publish.publication import recorded_publication
        >>> training, deploy = publish(recorded_publication('test_repvgg.cifar10'), owner='me', out=tempfile.mkdtemp())
        >>> training.hub_id
        'me/test_repvgg.cifar10'
    """
    weights_dir = manifest_path().parent
    if push and publication.record and publication.vouched and not os.access(weights_dir, os.W_OK):
        raise PermissionError(f'{str(weights_dir)!r} cannot be written, so publishing could not be recorded there')
    published = build_folders(publication, replace_existing=replace_existing, **options)
    if push:
        training, deploy = push_folders(published, replace_existing=replace_existing)
        published = training, deploy
    return published


def push_folders(published: Iterable[Published], *, replace_existing: bool = False) -> list[Published]:
    """Upload model folders to their repositories, and record in the manifest where its own weights are.

    Args:
        published: What `build_folders` returns.
        replace_existing: Replace other files that a repository holds.

    Returns:
        The same, and whether something was uploaded.

    Raises:
        HubError: A folder has changed, or the Hub did not take it. Folders that were uploaded before stay on the Hub
            and are not uploaded again.

    Example:
        >>> from repvgg_zoo.tools.publish.publication import recorded_publication
        >>> publication = recorded_publication('test_repvgg.cifar10')
        >>> pushed = push_folders(build_folders(publication, owner='me'))  # doctest: +SKIP
    """
    pushed = []
    for item in published:
        weights = item.folder / WEIGHT_FILES[0]
        if sha256_of(weights) != item.sha256:
            raise HubError(f'{str(weights)!r} has changed since it was written; publish it again')
        push = push_folder(item.folder, item.hub_id, replace=replace_existing)
        pushed.append(replace(item, uploaded=push.uploaded))
        if item.in_manifest:
            record_weights(
                replace(
                    read_manifest()[item.name],
                    hub_id=item.hub_id,
                    revision=push.revision,
                    sha256=item.sha256,
                    size_bytes=item.size_bytes,
                    fold_check=item.fold_check,
                )
            )
        _logger.info('%s is on the Hub at revision %s', item.hub_id, push.revision)
    return pushed


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
