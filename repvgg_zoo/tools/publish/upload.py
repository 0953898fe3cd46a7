"""A model folder to the Hugging Face Hub."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from ...pretrained.hub import download_file, sha256_of
from ...pretrained.network import is_http_error, is_transient, retrying, short_message
from ..own_files import MARKER, foreign_entries
from ..reference import REFERENCE
from .cards import CARD, is_same_card

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

__all__ = ['HubError', 'Push', 'push_folder']


class HubError(RuntimeError):
    """A folder could not be published on the Hub."""


class Push(NamedTuple):
    """What became of a folder on the Hub."""

    revision: str
    """Id of the commit that holds its files."""
    uploaded: bool
    """False if the repository held them already."""


def push_folder(folder: Path, repo_id: str, *, replace: bool = False) -> Push:
    """Make a Hub repository hold the files of a folder.

    The repository is created if necessary, and all files arrive in one commit. Nothing is uploaded if the repository
    holds the same files already. Reference outputs, and the parts of a card that vary between machines, are uploaded
    with `replace=True` only, or with something else. Files of the repository that the folder does not have stay. Each
    try looks first at what the Hub has, so an upload that was cut off can be repeated.

    Args:
        folder: The files.
        repo_id: `owner/name`.
        replace: Replace files of the repository by others of the same name.

    Returns:
        The commit that holds the files, and whether it is new.

    Raises:
        HubError: The repository holds other files of the same names, the Hub refused, or it could not be reached in
            five tries.
        CheckpointError: The card of the repository cannot be had.

    Example:
        >>> push_folder(Path('published/test_repvgg.cifar10'), 'me/test_repvgg.cifar10')  # doctest: +SKIP
        Push(revision='9a3f…', uploaded=True)
    """
    try:
        # huggingface_hub retries uploads of large files, but neither the look at the repository nor its creation
        return retrying(
            partial(_push_once, folder, repo_id, replace=replace), retry=lambda e: is_http_error(e) and is_transient(e)
        )
    except Exception as error:
        if not is_http_error(error):
            raise
        raise HubError(f'cannot publish {repo_id}: {short_message(error)}') from error


def _push_once(folder: Path, repo_id: str, *, replace: bool) -> Push:
    from huggingface_hub import HfApi

    from ... import __version__

    api = HfApi(library_name='repvgg-zoo', library_version=__version__)
    info = _get_or_create(api, repo_id)
    sha = cast('str', info.sha)  # every repository has a first commit
    remote = {sibling.rfilename: sibling for sibling in info.siblings or () if sibling.rfilename != '.gitattributes'}
    local = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob('*')) if path.is_file()}
    local.pop(MARKER, None)
    different = [name for name in local if name not in remote or not _has_same_content(local[name], remote[name])]
    if remote and not replace:
        other = [n for n in different if n not in remote or not _varies_only(n, folder, f'{repo_id}@{sha}')]
        if other:
            other.sort(key=lambda name: name == CARD)  # other weights are the better reason
            raise HubError(
                f'{repo_id} on the Hub holds other files than {str(folder)!r} (first: {other[0]}), so nothing is '
                'uploaded; look at it, and pass replace (--replace) to replace them'
            )
        different = []
    if not different:
        return Push(sha, uploaded=False)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=f'Publish {repo_id.split("/")[-1]}',
        parent_commit=sha,  # a commit that somebody else makes meanwhile is not buried
        allow_patterns=different,
    )
    return Push(commit.oid, uploaded=True)


def _get_or_create(api: HfApi, repo_id: str) -> ModelInfo:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return api.model_info(repo_id, files_metadata=True)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, exist_ok=True)
        return api.model_info(repo_id, files_metadata=True)


def _varies_only(name: str, folder: Path, hub_ref: str) -> bool:
    """Tell whether a file differs from that of the Hub only in what varies between machines."""
    if name != CARD or CARD in foreign_entries(folder):  # what its author edited does not vary
        return name == REFERENCE
    theirs = download_file(hub_ref, CARD)
    return theirs is not None and is_same_card((folder / CARD).read_text('utf-8'), theirs.read_text('utf-8'))


def _has_same_content(path: Path, sibling: RepoSibling) -> bool:
    """Compare by sha256 for files in large file storage, and by git's blob id for others."""
    if sibling.lfs is not None:
        return sha256_of(path) == sibling.lfs.sha256
    content = path.read_bytes()
    return hashlib.sha1(b'blob %d\0' % len(content) + content, usedforsecurity=False).hexdigest() == sibling.blob_id
