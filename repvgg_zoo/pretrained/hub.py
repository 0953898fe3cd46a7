"""The Hugging Face Hub: weights from it, model folders to it."""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..checkpoints.errors import CheckpointError

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

__all__ = ['CARD', 'WEIGHT_FILES', 'HubError', 'cached_sha256', 'download_weights', 'push_folder', 'sha256_of']

_logger = logging.getLogger(__name__)
T = TypeVar('T')

WEIGHT_FILES = ('model.safetensors', 'pytorch_model.bin')
"""Names of the file of weights in a model folder, the preferred one first."""

CARD = 'README.md'
"""Name of the model card in a model folder."""

_WAITS_S, _MAX_WAIT_S = (1, 2, 4, 8), 300
"""Before each new try, and the longest that a server may ask for."""
_HTTP_LIBRARIES = {'requests', 'urllib3', 'httpx', 'httpx2', 'httpcore', 'httpcore2'}
_TRANSIENT_STATUS = {408, 409, 412, 429, 500, 502, 503, 504}
"""Of answers that another try may change: the server is busy, or the repository has changed meanwhile."""


class HubError(RuntimeError):
    """A folder could not be published on the Hub."""


# -------------------------------------------------------------------------------------------- downloading


def download_weights(hub_ref: str, filename: str | None = None, *, cache_dir: str | Path | None = None) -> Path:
    """The cached file of weights of a Hub repository, downloaded if need be.

    Args:
        hub_ref: `owner/name` or `owner/name@revision`.
        filename: Its name in the repository; by default the first of `WEIGHT_FILES` that is there.
        cache_dir: Instead of huggingface-hub's cache.

    Raises:
        CheckpointError: There is no such repository, revision or file, or it cannot be had now.
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
    names = (filename,) if filename else WEIGHT_FILES
    for name in names:
        download = partial(hf_hub_download, repo_id, name, revision=revision or None, cache_dir=cache_dir)
        try:
            # the client repeats what fails, but for an answer of the server when it gets the file itself
            path = Path(_retrying(download, retry=lambda e: isinstance(e, HfHubHTTPError) and _may_pass(e)))
        except LocalEntryNotFoundError as error:
            cause = error.__cause__ or error
            raise CheckpointError(
                f'cannot get {name} of {repo_id} from the Hub, and it is not in the cache: {_reason(cause)}'
            ) from error
        except EntryNotFoundError:
            continue
        except RepositoryNotFoundError as error:
            raise CheckpointError(
                f'there is no repository {repo_id} on the Hub, or it is private and you are not logged in '
                '(`hf auth login`)'
            ) from error
        except RevisionNotFoundError as error:
            raise CheckpointError(f'{repo_id} on the Hub has no revision {revision!r}') from error
        except Exception as error:
            if not isinstance(error, OSError) and not _is_from_http(error):
                raise
            raise CheckpointError(f'cannot get {name} of {repo_id} from the Hub: {_reason(error)}') from error
        _check_blob(path)
        return path
    raise CheckpointError(f'{repo_id} on the Hub has no weights: neither {" nor ".join(names)}')


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def cached_sha256(path: Path) -> str | None:
    """What the Hub said a large file's sha256 is: the name of the blob that the cache links to."""
    name = path.resolve().name
    return name if re.fullmatch('[0-9a-f]{64}', name) else None


def _check_blob(path: Path) -> None:
    expected = cached_sha256(path)
    if expected and sha256_of(path) != expected:
        raise CheckpointError(
            f'{str(path)!r} is not the file that the Hub has: its sha256 is not {expected}; delete it and get it again'
        )


# ---------------------------------------------------------------------------------------------- uploading


def push_folder(folder: Path, repo_id: str, *, replace: bool = False) -> str:
    """Make a Hub repository hold the files of a folder, in one commit; returns the commit's id.

    The repository is created if there is none. If it holds the same files already, nothing is uploaded; a
    model card that differs alone is replaced only if told, since the figures that it was measured with may.
    Each try begins by looking at what the Hub has, so it does not matter where an earlier one was cut off;
    a try that failed for a reason that may pass is repeated.

    Args:
        folder: Files on one level.
        repo_id: `owner/name`.
        replace: Replace other files that the repository holds.

    Raises:
        HubError: The repository holds other files, or the Hub refused, or could not be reached in five tries.
    """
    try:
        return _retrying(
            partial(_push_once, folder, repo_id, replace=replace), retry=lambda e: _is_from_http(e) and _may_pass(e)
        )
    except HubError:
        raise
    except Exception as error:  # huggingface-hub lets those of its HTTP library pass, which is not always the same
        if not _is_from_http(error):
            raise
        raise HubError(f'cannot publish {repo_id}: {_reason(error)}') from error


def _push_once(folder: Path, repo_id: str, *, replace: bool) -> str:
    from huggingface_hub import HfApi

    from .. import __version__

    api = HfApi(library_name='repvgg-zoo', library_version=__version__)
    info = _get_or_create(api, repo_id)
    there = {sibling.rfilename: sibling for sibling in info.siblings or () if sibling.rfilename != '.gitattributes'}
    here = {path.name: path for path in folder.iterdir()}
    surplus = [name for name in there if name not in here]
    different = [name for name in here if name not in there or not _same(here[name], there[name])]
    if not different and not surplus:
        return info.sha
    if there and not replace:
        if not surplus and different == [CARD]:
            return info.sha
        raise HubError(
            f'{repo_id} on the Hub holds other files than {str(folder)!r} (first: {(surplus or different)[0]}); look '
            'at it, and pass replace (--replace) to replace them'
        )
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=f'Publish {repo_id.split("/")[-1]}',
        parent_commit=info.sha,
        delete_patterns='*' if surplus else None,
    )
    return commit.oid


def _get_or_create(api: HfApi, repo_id: str) -> ModelInfo:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return api.model_info(repo_id, files_metadata=True)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, exist_ok=True)
        return api.model_info(repo_id, files_metadata=True)


def _same(path: Path, sibling: RepoSibling) -> bool:
    """Whether the Hub's file is that at `path`: by its sha256 in large file storage, else by git's id of a blob."""
    if sibling.lfs is not None:
        return sha256_of(path) == sibling.lfs.sha256
    content = path.read_bytes()
    return hashlib.sha1(b'blob %d\0' % len(content) + content, usedforsecurity=False).hexdigest() == sibling.blob_id


# ------------------------------------------------------------------------------------------------- errors


def _retrying(action: Callable[[], T], *, retry: Callable[[Exception], bool]) -> T:
    """Do something over HTTP, and again, after a while, if it fails for a reason that may pass."""
    for wait_s in _WAITS_S:
        try:
            return action()
        except Exception as error:
            if isinstance(error, HubError) or not retry(error):
                raise
            wait_s = max(wait_s, min(_retry_after_s(error), _MAX_WAIT_S))
            _logger.warning('the Hub failed (%s); next try in %d s', _reason(error), wait_s)
            time.sleep(wait_s)
    return action()


def _retry_after_s(error: BaseException) -> int:
    """The time that the server asked to wait."""
    headers = (getattr(getattr(e, 'response', None), 'headers', None) for e in _chain(error))
    asked = next((h['retry-after'] for h in headers if h and 'retry-after' in h), '')
    return int(asked) if asked.isdigit() else 0


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    """The HTTP status that an exception tells of, itself or by its cause."""
    statuses = (getattr(getattr(e, 'response', None), 'status_code', None) for e in _chain(error))
    return next((status for status in statuses if status is not None), None)


def _is_from_http(error: BaseException) -> bool:
    return _status(error) is not None or any(
        isinstance(e, ConnectionError) or type(e).__module__.split('.')[0] in _HTTP_LIBRARIES for e in _chain(error)
    )


def _may_pass(error: BaseException) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = _status(error)
    return not isinstance(error, OfflineModeIsEnabled) and (status is None or status in _TRANSIENT_STATUS)


def _reason(error: BaseException) -> str:
    reasons = {
        401: 'the Hub does not know you; log in with `hf auth login`, or set HF_TOKEN',
        403: 'your token has no right to that',
        429: 'the Hub has had too many requests from you; wait some minutes',
    }
    root = list(_chain(error))[-1]
    return reasons.get(_status(error)) or _first_line(root) or type(root).__name__


def _first_line(error: BaseException) -> str:
    return str(error).strip().split('\n', 1)[0]
