"""From a pretrained configuration to weights in a model: where the file is, and how it is made to fit."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

import torch
from timm.models import PretrainedCfg, adapt_input_conv
from torch import Tensor, nn

from .checkpoints import (
    FAMILY_BRANCH,
    CheckpointError,
    StateDict,
    check_fit,
    fold_state_dict,
    form_of,
    read_checkpoint,
    to_timm_layout,
    without_aux_heads,
)
from .family import blocks_with_keys
from .hub import WEIGHT_FILES, cached_sha256, download_weights, sha256_of
from .manifest import WeightsRecord, read_manifest
from .unfolding import unfold_state_dict

if TYPE_CHECKING:
    from .repvgg import RepVGG

__all__ = ['WEIGHTS_VARIABLE', 'load_checkpoint', 'load_pretrained', 'load_state_dict', 'locate', 'weights_in']

WEIGHTS_VARIABLE = 'REPVGG_ZOO_WEIGHTS'
"""Environment variable: a folder of model folders, named `arch.tag`, that go before the Hub and the bundled files."""

_logger = logging.getLogger(__name__)


def load_checkpoint(model: RepVGG, path: str | Path, *, use_ema: bool = True, unfold: bool = False) -> RepVGG:
    """Load a checkpoint of any layout and either form strictly into a model, and return the model.

    Training-form weights are folded if the model is of the deploy form. With `unfold`, deploy-form weights, and
    training-form weights of the default block, go into a training-form model of any block: it then computes the
    same in eval mode. See `repvgg_zoo.checkpoints.read_checkpoint` for the files that are read and for `use_ema`.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file cannot be read, or does not fit the model; the model is then unchanged.
    """
    state_dict = to_timm_layout(read_checkpoint(path, use_ema=use_ema))
    if unfold:
        state_dict = _unfolded(model, _for_unfolding(model, state_dict))
    load_state_dict(model, state_dict)
    return model


def load_state_dict(model: RepVGG, state_dict: StateDict) -> None:
    """Load a state dict in timm's layout and either form strictly; a misfit leaves the model unchanged.

    A model on the meta device takes the tensors as its own, without a copy, and training weights are folded for
    a deploy model in their own memory: the state dict is used up.
    """
    state_dict = _to_form_of(model, state_dict)
    expected = model.state_dict()
    check_fit(state_dict, expected, what=model.variant.name)
    if model.device.type != 'meta':
        model.load_state_dict(state_dict)
        return
    model.load_state_dict({key: _owned(value, expected[key]) for key, value in state_dict.items()}, assign=True)


def load_pretrained(
    model: RepVGG, cfg: PretrainedCfg, *, cache_dir: str | Path | None = None, unfold: bool = False
) -> None:
    """Load the weights that a pretrained configuration names into a model.

    The stem is adapted to the model's input channels as timm does it. Where the configuration speaks of
    another number of classes than the model has, a classifier that does not fit is left as it is
    initialised, which is logged. Everything else must fit. Raises
    `CheckpointError` as `load_checkpoint` does, and where no file can be had.
    """
    if cfg.state_dict is not None:
        _load_adapted(model, cfg, {key: value.clone() for key, value in cfg.state_dict.items()}, unfold)
        return
    path = locate(cfg, cache_dir=cache_dir)
    state_dict = read_checkpoint(path)
    try:
        _load_adapted(model, cfg, state_dict, unfold)
    except CheckpointError as error:
        raise CheckpointError(f'{str(path)!r}: {error}') from error


def _load_adapted(model: RepVGG, cfg: PretrainedCfg, state_dict: StateDict, unfold: bool) -> None:
    state_dict = to_timm_layout(state_dict)
    state_dict = _for_unfolding(model, state_dict) if unfold else _to_form_of(model, state_dict)
    _adapt_stem(state_dict, model.in_chans, cfg.input_size[0])
    if model.num_classes != cfg.num_classes:
        for name in model.classifier_names:
            _keep_classifier_that_fits(model, name, state_dict)
    load_state_dict(model, _unfolded(model, state_dict) if unfold else state_dict)


def _for_unfolding(model: RepVGG, state_dict: StateDict) -> StateDict:
    """The deploy form of a state dict that is to be unfolded; weights of the model's own block stay as they are."""
    if model.deploy:
        raise ValueError('unfold=True is for a model of the training form, and this one is of the deploy form')
    if form_of(state_dict) == 'training':
        if model.block != 'repvgg' and _is_of_default_block(state_dict):
            folded = fold_state_dict(state_dict, eps=model.stem.norm_eps)
            if model.aux_heads is None:
                return folded
            return folded | {key: state_dict[key] for key in state_dict.keys() - without_aux_heads(state_dict).keys()}
        _check_block(model, state_dict)
    return state_dict


def _is_of_default_block(state_dict: StateDict) -> bool:
    return not any(map(FAMILY_BRANCH.search, state_dict))


def _unfolded(model: RepVGG, state_dict: StateDict) -> StateDict:
    if form_of(state_dict) == 'training':
        return state_dict
    return unfold_state_dict(model, state_dict, what=model.variant.name)


def _keep_classifier_that_fits(model: RepVGG, name: str, state_dict: StateDict) -> None:
    """Replace weights of another number of classes than the model has by the model's own, fresh ones."""
    linear = model.get_submodule(name)
    weight, bias = f'{name}.weight', f'{name}.bias'
    if isinstance(linear, nn.Linear) and weight in state_dict and state_dict[weight].shape == linear.weight.shape:
        return
    _logger.info('%s: the weights have no classifier of %d classes; it is fresh', name, model.num_classes)
    for key in (weight, bias):
        state_dict.pop(key, None)
    if isinstance(linear, nn.Linear):
        if linear.weight.is_meta:
            linear.to_empty(device='cpu').reset_parameters()
        state_dict |= {weight: linear.weight.detach(), bias: linear.bias.detach()}


def _owned(value: Tensor, like: Tensor) -> Tensor:
    """A tensor as a parameter of its own: of the model's dtype, contiguous, and with no other in its storage."""
    # flat in between, since a 1x1 kernel is contiguous in channels_last too
    value = value.detach().to(like.dtype).contiguous().view(-1).view(value.shape)
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


def _to_form_of(model: RepVGG, state_dict: StateDict) -> StateDict:
    form = form_of(state_dict)
    if form == 'training':
        _check_block(model, state_dict)
        if model.deploy:
            return model.fold_state_dict(state_dict)
    if not model.deploy and form == 'deploy':
        raise CheckpointError(
            f'the checkpoint holds {model.variant.name} in the deploy form, whose branches are summed; create the '
            'model with deploy=True, or load with unfold=True, which makes branches that compute the same'
        )
    return state_dict if model.aux_heads is not None else without_aux_heads(state_dict)


def _check_block(model: RepVGG, state_dict: StateDict) -> None:
    """Raise if training-form weights are of a block that neither fits the model nor folds into its deploy form."""
    is_default = _is_of_default_block(state_dict)
    held = ['repvgg'] if is_default else blocks_with_keys(state_dict)
    if not held or model.block in held or (model.deploy and is_default):
        return
    raise CheckpointError(
        f'the checkpoint holds the branches of block={" or ".join(map(repr, held))}, and the model has those of '
        f'block={model.block!r}; create it with the block of the weights'
        + (', or load with unfold=True' if is_default else '')
    )


def _adapt_stem(state_dict: StateDict, in_chans: int, source_chans: int) -> None:
    if in_chans == source_chans:
        return
    if source_chans != 3:
        raise CheckpointError(f'weights for {source_chans} channels go into a model of as many, not of {in_chans}')
    kernels = [key for key, value in state_dict.items() if key.startswith('stem.') and value.ndim > 2]
    if others := [key for key in kernels if not key.endswith('conv.weight') and '.attn.' not in key]:
        raise CheckpointError(
            f'{others[0]} has another structure for {in_chans} channels than for {source_chans}; unfold deploy-form '
            f'weights (unfold=True), or take a model of {source_chans} channels'
        )
    for key in [key for key in kernels if key.endswith('conv.weight')]:
        state_dict[key] = adapt_input_conv(in_chans, state_dict[key])


def locate(cfg: PretrainedCfg, *, cache_dir: str | Path | None = None, own: bool = True) -> Path:
    """The local path of the weights that a pretrained configuration names, downloaded to the cache if need be.

    A file that the manifest has the sha256 of is checked against it, and a downloaded one against the Hub's.
    With `own`, the user's own folder goes first. Raises `CheckpointError`.
    """
    record = _record_of(cfg)
    if own and record is not None and (path := _in_own_folder(record)):
        return path
    if cfg.file:
        path = Path(cfg.file)
        path = weights_in(path) if path.is_dir() else path
    elif cfg.hf_hub_id:
        path = download_weights(cfg.hf_hub_id, cfg.hf_hub_filename, cache_dir=cache_dir)
    elif cfg.url:
        path = _from_url(cfg.url, cache_dir)
    else:
        raise CheckpointError(_how_to_get(cfg, record))
    if record is not None and record.available.sha256 is not None:
        _check_sha256(path, record.available)
    return path


def _record_of(cfg: PretrainedCfg) -> WeightsRecord | None:
    """The record that a configuration stands for; None where it was told another place than the record's."""
    record = read_manifest().get(f'{cfg.architecture}.{cfg.tag}')
    if record is None or cfg.source:
        return None
    file, hub_id = cfg.file or None, cfg.hf_hub_id or None
    return record if (file, hub_id) == (record.path and str(record.path), record.available.hub_ref) else None


def _in_own_folder(record: WeightsRecord) -> Path | None:
    """The weights of a record, or those that it is the fold of, in the user's own folder of model folders."""
    if not (own := os.environ.get(WEIGHTS_VARIABLE)):
        return None
    if not Path(own).is_dir():
        raise CheckpointError(f'{WEIGHTS_VARIABLE} is {own!r}, which is no folder; set it to one, or unset it')
    for name in (record.name, record.training_name):
        if (folder := Path(own) / name).is_dir():
            return weights_in(folder)
    return None


def _how_to_get(cfg: PretrainedCfg, record: WeightsRecord | None) -> str:
    name = f'{cfg.architecture}.{cfg.tag}'
    if record is None or record.upstream is None:
        return f"{name} has no weights; use pretrained=False, or give a file with pretrained_cfg_overlay=dict(file='…')"
    own = os.environ.get(WEIGHTS_VARIABLE)
    missing = f' and {own!r} has no folder {record.training_name}' if own else ''
    return (
        f'nobody has published weights of {name} on the Hub{missing}; get {record.upstream} from the official release '
        f'({record.origin}), run `repvgg-zoo convert {record.upstream} zoo/{record.training_name}`, and set '
        f'{WEIGHTS_VARIABLE}=zoo'
    )


def weights_in(folder: Path) -> Path:
    """The file of weights in a model folder; raises `CheckpointError` if there is none."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f'no weights in {str(folder)!r}: neither {" nor ".join(WEIGHT_FILES)}')


def _from_url(url: str, cache_dir: str | Path | None) -> Path:
    folder = Path(cache_dir) if cache_dir else Path(torch.hub.get_dir()) / 'checkpoints'
    path = folder / Path(urlparse(url).path).name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), progress=False)
    return path


def _check_sha256(path: Path, record: WeightsRecord) -> None:
    if cached_sha256(path) == record.sha256:  # which was compared with the content
        return
    if (actual := sha256_of(path)) != record.sha256:
        raise CheckpointError(
            f'{str(path)!r} is not the file that was published as {record.name}: its sha256 is {actual}, not '
            f'{record.sha256}; delete it and get it again'
        )
