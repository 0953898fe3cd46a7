"""From a pretrained configuration to weights in a model: where the file is, and how it is made to fit."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

import torch
from timm.models import PretrainedCfg, adapt_input_conv

from .checkpoints import (
    CheckpointError,
    StateDict,
    check_fit,
    fold_state_dict,
    form_of,
    read_checkpoint,
    to_timm_layout,
    without_aux_heads,
)
from .manifest import read_manifest

if TYPE_CHECKING:
    from .repvgg import RepVGG

__all__ = ['load_checkpoint', 'load_pretrained', 'load_state_dict', 'weights_in']

_logger = logging.getLogger(__name__)
_WEIGHT_FILES = ('model.safetensors', 'pytorch_model.bin')


def load_checkpoint(model: RepVGG, path: str | Path, *, use_ema: bool = True) -> RepVGG:
    """Load a checkpoint of any layout and either form strictly into a model, and return the model.

    Training-form weights are folded if the model is of the deploy form. See
    `repvgg_zoo.checkpoints.read_checkpoint` for the files that are read and for `use_ema`.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file cannot be read, or does not fit the model; the model is then unchanged.
    """
    load_state_dict(model, to_timm_layout(read_checkpoint(path, use_ema=use_ema)))
    return model


def load_state_dict(model: RepVGG, state_dict: StateDict) -> None:
    """Load a state dict in timm's layout and either form strictly; a misfit leaves the model unchanged."""
    state_dict = _to_form_of(model, state_dict)
    check_fit(state_dict, model.state_dict(), what=model.variant.name)
    model.load_state_dict(state_dict)


def load_pretrained(model: RepVGG, cfg: PretrainedCfg, *, cache_dir: str | Path | None = None) -> None:
    """Load the weights that a pretrained configuration names into a model.

    The stem is adapted to the model's input channels as timm does it. Where the configuration speaks of
    another number of classes than the model has, a classifier that does not fit is left as it is
    initialised, which is logged. Everything else must fit. Raises
    `CheckpointError` as `load_checkpoint` does, and where no file can be had.
    """
    if cfg.state_dict is not None:
        state_dict = cfg.state_dict
    else:
        path = _locate(cfg, cache_dir)
        _check_sha256(path, cfg)
        state_dict = read_checkpoint(path)
    state_dict = _to_form_of(model, to_timm_layout(state_dict))
    expected = model.state_dict()
    _adapt_stem(state_dict, model.in_chans, cfg.input_size[0])
    if model.num_classes != cfg.num_classes:
        for name in model.classifier_names:
            weight, bias = f'{name}.weight', f'{name}.bias'
            if weight in expected and weight in state_dict and state_dict[weight].shape == expected[weight].shape:
                continue
            _logger.info('%s: the weights have no classifier of %d classes; it is fresh', name, model.num_classes)
            for key in (weight, bias):
                state_dict.pop(key, None)
                if key in expected:
                    state_dict[key] = expected[key]
    check_fit(state_dict, expected, what=model.variant.name)
    model.load_state_dict(state_dict)


def _to_form_of(model: RepVGG, state_dict: StateDict) -> StateDict:
    form = form_of(state_dict)
    if model.deploy and form == 'training':
        return fold_state_dict(state_dict, eps=model.stem.norm_eps)
    if not model.deploy and form == 'deploy':
        raise CheckpointError(
            f'the checkpoint holds {model.variant.name} in the deploy form, whose branches are summed for good; create '
            'the model with deploy=True'
        )
    return state_dict if model.aux_heads is not None else without_aux_heads(state_dict)


def _adapt_stem(state_dict: StateDict, in_chans: int, source_chans: int) -> None:
    if in_chans == source_chans:
        return
    if source_chans != 3:
        raise CheckpointError(f'weights for {source_chans} channels go into a model of as many, not of {in_chans}')
    for key in [key for key in state_dict if key.startswith('stem.') and key.endswith('conv.weight')]:
        state_dict[key] = adapt_input_conv(in_chans, state_dict[key])


def _locate(cfg: PretrainedCfg, cache_dir: str | Path | None) -> Path:
    """The local path of a configuration's weights, downloaded to the cache if need be."""
    if cfg.file:
        path = Path(cfg.file)
        return weights_in(path) if path.is_dir() else path
    if cfg.hf_hub_id:
        return _from_hub(cfg.hf_hub_id, cfg.hf_hub_filename, cache_dir)
    if cfg.url:
        return _from_url(cfg.url, cache_dir)
    record = read_manifest().get(f'{cfg.architecture}.{cfg.tag}')
    upstream = f' (there is only {record.upstream})' if record and record.upstream else ''
    raise CheckpointError(
        f'nobody has published weights of {cfg.architecture}.{cfg.tag} on the Hub{upstream}; use pretrained=False, or '
        "give a file of your own with pretrained_cfg_overlay=dict(file='…')"
    )


def weights_in(folder: Path) -> Path:
    """The file of weights in a model folder; raises `CheckpointError` if there is none."""
    for name in _WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f'no weights in {str(folder)!r}: neither {" nor ".join(_WEIGHT_FILES)}')


def _from_hub(hub_id: str, filename: str | None, cache_dir: str | Path | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    repo_id, _, revision = hub_id.partition('@')
    names = (filename,) if filename else _WEIGHT_FILES
    for name in names:
        try:
            return Path(hf_hub_download(repo_id, name, revision=revision or None, cache_dir=cache_dir))
        except LocalEntryNotFoundError as error:
            raise CheckpointError(
                f'cannot get {name} of {repo_id} from the Hub, and it is not in the cache ({_first_line(error)}); '
                "connect and try again, or give a file with pretrained_cfg_overlay=dict(file='…')"
            ) from error
        except EntryNotFoundError:
            continue
        except HfHubHTTPError as error:
            raise CheckpointError(f'cannot get {name} of {repo_id} from the Hub: {_first_line(error)}') from error
    raise CheckpointError(f'{repo_id} on the Hub has no weights: neither {" nor ".join(names)}')


def _from_url(url: str, cache_dir: str | Path | None) -> Path:
    folder = Path(cache_dir) if cache_dir else Path(torch.hub.get_dir()) / 'checkpoints'
    path = folder / Path(urlparse(url).path).name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), progress=False)
    return path


def _check_sha256(path: Path, cfg: PretrainedCfg) -> None:
    """Compare a file with the manifest, if it is the one that the manifest speaks of."""
    record = read_manifest().get(f'{cfg.architecture}.{cfg.tag}')
    if record is None or record.sha256 is None:
        return
    if path != record.path and (record.hub_id is None or cfg.file or cfg.hf_hub_id != record.hub_id):
        return
    with path.open('rb') as file:
        actual = hashlib.file_digest(file, 'sha256').hexdigest()
    if actual != record.sha256:
        raise CheckpointError(
            f'{str(path)!r} is not the file that was published as {record.name}: its sha256 is {actual}, not '
            f'{record.sha256}; delete it and get it again'
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().split('\n', 1)[0]
