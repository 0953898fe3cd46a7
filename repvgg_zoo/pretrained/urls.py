"""Weights from an address on the web."""

from __future__ import annotations

import re
from functools import partial
from http.client import HTTPException
from pathlib import Path
from urllib.parse import unquote, urlparse

import torch

from ..checkpoints.errors import CheckpointError
from .hub import sha256_of
from .network import is_http_error, is_transient, retrying, short_message

__all__ = ['download_url', 'sha256_prefix']

_HASH = re.compile(r'-(?!20\d{6}\.)([0-9a-f]{8,})\.')
"""torch.hub's convention, in which the hash has eight digits or more. A date is no hash."""


def download_url(source: str | tuple[str, str], *, cache_dir: str | Path | None = None) -> Path:
    """Return the cached file of an address; download it first if necessary.

    If the name of the file ends in the first digits of its sha256, the content is compared with them, in the cache too.

    Args:
        source: URL, or URL and name of the file, as timm has it.
        cache_dir: Folder to use instead of `checkpoints` in torch.hub's folder.

    Returns:
        Path of the file.

    Raises:
        CheckpointError: The file cannot be had, or has other content than its name says. The cache then holds nothing
            of this download.

    Example:
        >>> download_url('https://example.org/model-5c106cde.pth')  # doctest: +SKIP
        PosixPath('.../hub/checkpoints/model-5c106cde.pth')
    """
    url, name = (source, unquote(Path(urlparse(source).path).name)) if isinstance(source, str) else source
    path = Path(cache_dir or Path(torch.hub.get_dir()) / 'checkpoints') / name
    expected = sha256_prefix(name)
    if not path.exists():
        _download(url, path, expected)
    elif expected and not (actual := sha256_of(path)).startswith(expected):
        raise CheckpointError(
            f'{str(path)!r} is not the file that {url} had: its sha256 begins with {actual[: len(expected)]}, not '
            f'{expected}; delete it, and it will be downloaded again'
        )
    return path


def sha256_prefix(name: str) -> str | None:
    """Return the first digits of a file's sha256, if its name ends in them.

    Args:
        name: Name of the file, as `model-5c106cde.pth`.

    Returns:
        Eight hexadecimal digits or more, or None.

    Example:
        >>> sha256_prefix('model-5c106cde.pth'), sha256_prefix('model-20240131.pth')
        ('5c106cde', None)
    """
    found = _HASH.findall(name)
    return found[-1] if found else None


def _download(url: str, path: Path, expected: str | None) -> None:
    download = partial(torch.hub.download_url_to_file, url, str(path), hash_prefix=expected)
    hashes: list[str] = []

    def retry(error: Exception) -> bool:
        """A cut connection looks to torch like a wrong hash, which is then another one each time."""
        if not isinstance(error, RuntimeError):
            return is_http_error(error) and is_transient(error)
        hashes.append(str(error))
        return len(set(hashes)) == len(hashes)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        retrying(download, retry=retry)
    except (OSError, HTTPException, ValueError) as error:
        raise CheckpointError(
            f'cannot download {url}, and it is not in the cache: {short_message(error)}; try again, or get the file '
            f'elsewhere and save it as {str(path)!r}'
        ) from error
    except RuntimeError as error:
        raise CheckpointError(
            f'{url} gave other content than its name says ({error}): the connection is cut each time, or the file has '
            f'changed; nothing of it is kept. Try again, or get the file elsewhere and save it as {str(path)!r}'
        ) from error
