"""Weights from the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

from ..checkpoints.errors import CheckpointError

__all__ = [
    'WEIGHT_FILES',
    'cached_sha256',
    'download_weights',
    'is_http_error',
    'is_transient',
    'retrying',
    'sha256_of',
    'short_message',
]

_logger = logging.getLogger(__name__)
T = TypeVar('T')

WEIGHT_FILES = ('model.safetensors', 'pytorch_model.bin')
"""Names of the weights file in a model folder, the preferred one first."""

_WAITS_S = (1, 2, 4, 8)
"""Seconds to wait before each new try."""
_MAX_WAIT_S = 300
"""Longest wait that a server may ask for."""
_HTTP_LIBRARIES = {'requests', 'urllib3', 'httpx', 'httpx2', 'httpcore', 'httpcore2'}
_TRANSIENT_STATUS = {408, 409, 412, 429, 500, 502, 503, 504}
"""Answers that may change: the server is busy, or the repository has just changed."""
_MESSAGES = {
    401: 'the Hub does not know you; log in with `hf auth login`, or set HF_TOKEN',
    403: 'your token has no right to that; use another one',
    429: 'you have sent too many requests to the Hub; wait some minutes',
}


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
            # huggingface_hub resumes a cut download, but gives up when the server answers 5xx
            path = Path(retrying(download, retry=lambda e: isinstance(e, HfHubHTTPError) and is_transient(e)))
        except LocalEntryNotFoundError as error:
            cause = error.__cause__ or error
            raise CheckpointError(
                f'cannot get {name} of {repo_id} from the Hub, and it is not in the cache: {short_message(cause)}'
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
            if not isinstance(error, OSError) and not is_http_error(error):
                raise
            raise CheckpointError(f'cannot get {name} of {repo_id} from the Hub: {short_message(error)}') from error
        _check_blob(path)
        return path
    raise CheckpointError(f'{repo_id} on the Hub has no weights: neither {" nor ".join(names)}')


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


# ------------------------------------------------------------------------------------- errors of the Hub


def retrying(action: Callable[[], T], *, retry: Callable[[Exception], bool]) -> T:
    """Call a function; if it fails, wait and call it again, five times in all.

    Args:
        action: The function.
        retry: Tells whether another try may help. `is_transient` answers it for errors of the Hub.

    Returns:
        What the function returns.

    Raises:
        Exception: The error of the last try, or the first one that `retry` turns down.

    Example:
        >>> retrying(lambda: 'done', retry=is_transient)
        'done'
    """
    for wait_s in _WAITS_S:
        try:
            return action()
        except Exception as error:
            if not retry(error):
                raise
            wait_s = max(wait_s, min(_retry_after_s(error), _MAX_WAIT_S))
            _logger.warning('the Hub failed (%s); next try in %d s', short_message(error), wait_s)
            time.sleep(wait_s)
    return action()


def is_http_error(error: BaseException) -> bool:
    """Tell whether an exception, or one of its causes, comes from the network.

    Args:
        error: The exception. huggingface_hub lets exceptions of its HTTP library through (requests or httpx).

    Returns:
        Whether it comes from the network.

    Example:
        >>> is_http_error(ConnectionError()), is_http_error(KeyError())
        (True, False)
    """
    return _status(error) is not None or any(
        isinstance(e, ConnectionError) or type(e).__module__.split('.')[0] in _HTTP_LIBRARIES for e in _causes(error)
    )


def is_transient(error: BaseException) -> bool:
    """Tell whether another try may succeed after an error of the Hub.

    Args:
        error: An exception for which `is_http_error` is true.

    Returns:
        Whether the server was busy or out of reach. False in huggingface_hub's offline mode.

    Example:
        >>> is_transient(ConnectionError())
        True
    """
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = _status(error)
    return not isinstance(error, OfflineModeIsEnabled) and (status is None or status in _TRANSIENT_STATUS)


def short_message(error: BaseException) -> str:
    """Say in one line what is wrong, and what to do about it if that is known.

    Args:
        error: The exception. Its first cause speaks.

    Returns:
        The message.

    Example:
        >>> short_message(ConnectionError('no route to host'))
        'no route to host'
    """
    root = list(_causes(error))[-1]
    return _MESSAGES.get(_status(error) or 0) or str(root).strip().split('\n', 1)[0] or type(root).__name__


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, its cause, the cause of that, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    """The HTTP status of an exception or of one of its causes."""
    statuses = (getattr(getattr(e, 'response', None), 'status_code', None) for e in _causes(error))
    return next((status for status in statuses if status is not None), None)


def _retry_after_s(error: BaseException) -> int:
    """The seconds that the server asked to wait, or 0."""
    headers = (getattr(getattr(e, 'response', None), 'headers', None) for e in _causes(error))
    asked = next((h['retry-after'] for h in headers if h and 'retry-after' in h), '')
    return int(asked) if asked.isdigit() else 0
