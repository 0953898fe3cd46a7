"""Writes `weights/manifest.json`, and the page beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict

from ...pretrained.manifest import WeightsRecord, manifest_path, read_manifest
from ..atomic import locked, write_text
from .weights_page import weights_page

__all__ = ['PAGE', 'manifest_text', 'record_weights', 'write_manifest']

PAGE = 'README.md'
"""Name of the page beside the manifest."""


def manifest_text(records: Mapping[str, WeightsRecord]) -> str:
    """Write records as JSON.

    Args:
        records: Those of all weights, by `arch.tag`.

    Returns:
        The content of `weights/manifest.json`.

    Example:
        >>> manifest_text(read_manifest()) == manifest_path().read_text('utf-8')
        True
    """
    content = {
        name: {key: value for key, value in asdict(record).items() if key not in ('arch', 'tag')}
        for name, record in records.items()
    }
    return json.dumps(content, indent=1, allow_nan=False) + '\n'


def write_manifest(records: Mapping[str, WeightsRecord]) -> None:
    """Replace the manifest and its page.

    Args:
        records: Those of all weights, by `arch.tag`.

    Raises:
        OSError: A file cannot be written.

    Example:
        >>> write_manifest(read_manifest())  # doctest: +SKIP
    """
    # the manifest last: once it has a record, nothing is left to do
    write_text(manifest_path().with_name(PAGE), weights_page(records))
    write_text(manifest_path(), manifest_text(records))
    read_manifest.cache_clear()


def record_weights(record: WeightsRecord) -> None:
    """Put a record into the manifest. Records that other processes wrote meanwhile are kept.

    Args:
        record: The new record of its weights.

    Raises:
        OSError: A file cannot be written.

    Example:
        >>> record_weights(read_manifest()['test_repvgg.cifar10'])  # doctest: +SKIP
    """
    with locked(manifest_path().parent):
        read_manifest.cache_clear()
        write_manifest(dict(read_manifest()) | {record.name: record})
