"""From a pretrained configuration to a file of weights."""

from __future__ import annotations

import os
from pathlib import Path

from timm.models import PretrainedCfg

from ..checkpoints.errors import CheckpointError
from ..checkpoints.files import INDEX_SUFFIX
from .hub import WEIGHT_FILES, cached_sha256, download_weights, sha256_of
from .manifest import WeightsRecord, read_manifest
from .urls import download_url

__all__ = ['WEIGHTS_VARIABLE', 'locate', 'weights_in']

WEIGHTS_VARIABLE = 'REPVGG_ZOO_WEIGHTS'
"""Environment variable that names a folder of model folders, each named `arch.tag`.

Weights in it take precedence over the Hub and the bundled files.
"""


def locate(cfg: PretrainedCfg, *, cache_dir: str | Path | None = None, use_override_dir: bool = True) -> Path:
    """Find the weights that a pretrained configuration names; download them to the cache if necessary.

    The sha256 of a file is compared with that in the manifest, if the manifest has one. The sha256 of a download is
    compared with that of the Hub.

    Args:
        cfg: Names a file, a folder, a Hub repository or a URL.
        cache_dir: Folder for downloads, instead of the default one.
        use_override_dir: Look into the folder that `REPVGG_ZOO_WEIGHTS` names first.

    Returns:
        A local path.

    Raises:
        CheckpointError: The weights cannot be found or downloaded, or have another sha256 than the manifest.

    Example:
        >>> import timm, repvgg_zoo
        >>> locate(timm.get_pretrained_cfg('test_repvgg.cifar10')).name
        'test_repvgg.cifar10.safetensors'
    """
    record = _record_of(cfg)
    if use_override_dir and record is not None and (path := _in_override_dir(record)):
        return path
    if cfg.file:
        path = Path(cfg.file)
        path = weights_in(path) if path.is_dir() else path
    elif cfg.hf_hub_id:
        path = download_weights(cfg.hf_hub_id, cfg.hf_hub_filename, cache_dir=cache_dir)
    elif cfg.url:
        path = download_url(cfg.url, cache_dir=cache_dir)
    else:
        raise CheckpointError(_how_to_get(cfg, record))
    if record is not None and record.available.sha256 is not None:
        _check_sha256(path, record.available)
    return path


def _record_of(cfg: PretrainedCfg) -> WeightsRecord | None:
    """Find the manifest record for `cfg`; None if the user overrode its source."""
    record = read_manifest().get(f'{cfg.architecture}.{cfg.tag}')
    if record is None or cfg.source:
        return None
    named = cfg.file or None, cfg.hf_hub_id or None, cfg.url or None
    known = record.path and str(record.path), record.available.hub_ref, record.available.url
    return record if named == known else None


def _in_override_dir(record: WeightsRecord) -> Path | None:
    """Find the weights of a record, or their training form, in the user's folder of model folders."""
    if not (override := os.environ.get(WEIGHTS_VARIABLE)):
        return None
    if not Path(override).is_dir():
        raise CheckpointError(f'{WEIGHTS_VARIABLE} is {override!r}, which is no folder; set it to one, or unset it')
    for name in (record.name, record.training_name):
        folder = Path(override) / name
        if folder.is_dir():
            return weights_in(folder)
        if os.path.lexists(folder):
            raise CheckpointError(
                f'{str(folder)!r}, in the folder that {WEIGHTS_VARIABLE} names, is {_kind(folder, "folder")}; delete '
                f'it, or make a model folder in its place, by `repvgg-zoo convert SRC {folder}`'
            )
    return None


def _kind(path: Path, wanted: str) -> str:
    broken = path.is_symlink() and not path.exists()
    return f'a broken link to {os.readlink(path)!r}' if broken else f'no {wanted}'


def _how_to_get(cfg: PretrainedCfg, record: WeightsRecord | None) -> str:
    name = f'{cfg.architecture}.{cfg.tag}'
    if record is None or record.upstream is None:
        return f"{name} has no weights; use pretrained=False, or give a file with pretrained_cfg_overlay=dict(file='…')"
    override = os.environ.get(WEIGHTS_VARIABLE)
    missing = f' and {override!r} has no folder {record.training_name}' if override else ''
    return (
        f'nobody has published weights of {name} on the Hub{missing}; get {record.upstream} from the official release '
        f'({record.origin}), run `repvgg-zoo convert {record.upstream} zoo/{record.training_name}`, and set '
        f'{WEIGHTS_VARIABLE}=zoo'
    )


def weights_in(folder: Path) -> Path:
    """Find the file of weights in a model folder; raise `CheckpointError` if there is none."""
    for name in (*WEIGHT_FILES, *(f'{name}{INDEX_SUFFIX}' for name in WEIGHT_FILES)):
        path = folder / name
        if path.is_file():
            return path
        if os.path.lexists(path):
            raise CheckpointError(f'{str(path)!r} is {_kind(path, "file")}; put the weights there, or delete it')
    raise CheckpointError(f'no weights in {str(folder)!r}: neither {" nor ".join(WEIGHT_FILES)}')


def _check_sha256(path: Path, record: WeightsRecord) -> None:
    if cached_sha256(path) == record.sha256:  # huggingface_hub has compared it with the content
        return
    if (actual := sha256_of(path)) != record.sha256:
        raise CheckpointError(
            f'{str(path)!r} is not the file that was published as {record.name}: its sha256 is {actual}, not '
            f'{record.sha256}; delete it and get it again'
        )
