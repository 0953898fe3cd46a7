"""Weights from the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import re
from functools import partial
from pathlib import Path

from ..checkpoints.errors import CheckpointError
from .network import is_http_error, is_transient, is_unreachable, retrying, short_message

__all__ = ['WEIGHT_FILES', 'cached_sha256', 'download_file', 'download_weights', 'is_hub_ref', 'sha256_of']

WEIGHT_FILES = ('model.safetensors', 'pytorch_model.bin')
"""Names of the weights file in a model folder, the preferred one first."""


def is_hub_ref(text: str) -> bool:
    """Tell whether a text can name a Hub repository.

    Args:
        text: Any text.

    Returns:
        True for `owner/name` and `owner/name@revision`.

    Example:
        >>> is_hub_ref('timm/repvgg_a0.rvgg_in1k'), is_hub_ref('./here'), is_hub_ref('repvgg_a0')
        (True, False, False)
    """
    return re.fullmatch(r'\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?', text) is not None


def download_weights(hub_ref: str, filename: str | None = None, *, cache_dir: str | Path | None = None) -> Path:
    """Return the cached weights file of a Hub repository; download it first if necessary.

    Args:
        hub_ref: `owner/name` or `owner/name@revision`.
        filename: File name in the repository. By default, the first of `WEIGHT_FILES` that exists.
        cache_dir: Folder to use instead of huggingface-hub's cache.

    Returns:
        Path of the file. Its content has the sha256 that the Hub gives.

    Raises:
        CheckpointError: The repository, revision or file does not exist, or cannot be reached now.

    Example:
        >>> download_weights('timm/repvgg_a0.rvgg_in1k')  # doctest: +SKIP
        PosixPath('.../model.safetensors')
    """
    repo_id = hub_ref.partition('@')[0]
    names = (filename,) if filename else WEIGHT_FILES
    for name in names:
        if path := download_file(hub_ref, name, cache_dir=cache_dir):
            return path
    raise CheckpointError(f'{repo_id} on the Hub has no weights: neither {" nor ".join(names)}')


def download_file(hub_ref: str, name: str, *, cache_dir: str | Path | None = None) -> Path | None:
    """Return a cached file of a Hub repository; download it first if necessary.

    Args:
        hub_ref: `owner/name` or `owner/name@revision`.
        name: File name in the repository.
        cache_dir: Folder to use instead of huggingface-hub's cache.

    Returns:
        Path of the file, or None if the repository has none of this name.

    Raises:
        CheckpointError: The repository or revision does not exist, or cannot be reached now.

    Example:
        >>> download_file('timm/repvgg_a0.rvgg_in1k', 'config.json')  # doctest: +SKIP
        PosixPath('.../config.json')
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo_id, _, revision = hub_ref.partition('@')
    download = partial(hf_hub_download, repo_id, name, revision=revision or None, cache_dir=cache_dir)
    _check_network(repo_id, name, revision or None, cache_dir)
    try:
        # huggingface_hub resumes a cut download, but gives up when the server answers 5xx
        path = Path(retrying(download, retry=lambda e: isinstance(e, HfHubHTTPError) and is_transient(e)))
    except LocalEntryNotFoundError as error:
        raise _not_cached(repo_id, name, error.__cause__ or error) from error
    except EntryNotFoundError:
        return None
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f'there is no repository {repo_id} on the Hub, or it is private and you are not logged in (`hf auth login`)'
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f'{repo_id} on the Hub has no revision {revision!r}') from error
    except Exception as error:
        if not isinstance(error, OSError) and not is_http_error(error):
            raise
        raise CheckpointError(f'cannot get {name} of {repo_id} from the Hub: {short_message(error)}') from error
    _check_blob(path)
    return path


def _check_network(repo_id: str, name: str, revision: str | None, cache_dir: str | Path | None) -> None:
    """Raise an error at once if a file is not in the cache and there is no network.

    huggingface_hub itself would ask again and again for half a minute.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE or isinstance(
        try_to_load_from_cache(repo_id, name, cache_dir=cache_dir, revision=revision), str
    ):
        return
    try:
        get_hf_file_metadata(hf_hub_url(repo_id, name, revision=revision))
    except Exception as error:  # any other is for the download to judge
        if is_unreachable(error):
            raise _not_cached(repo_id, name, error) from error


def _not_cached(repo_id: str, name: str, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f'cannot get {name} of {repo_id} from the Hub, and it is not in the cache: {short_message(error)}'
    )


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's content.

    Args:
        path: The file.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> from repvgg_zoo.pretrained.manifest import read_manifest
        >>> record = read_manifest()['test_repvgg.cifar10']
        >>> sha256_of(record.path) == record.sha256
        True
    """
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def cached_sha256(path: Path) -> str | None:
    """Return the sha256 that the Hub gave for a cached file.

    Args:
        path: A file in huggingface-hub's cache. The cache names the blob of a large file after its sha256.

    Returns:
        64 hexadecimal digits, or None if the name of the blob is no sha256.

    Example:
        >>> cached_sha256(Path('model.safetensors')) is None
        True
    """
    name = path.resolve().name
    return name if re.fullmatch('[0-9a-f]{64}', name) else None


def _check_blob(path: Path) -> None:
    expected = cached_sha256(path)
    if expected and sha256_of(path) != expected:
        raise CheckpointError(
            f'{str(path)!r} is not the file that the Hub has: its sha256 is not {expected}; delete it and get it again'
        )
