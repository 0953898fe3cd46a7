"""From a pretrained configuration to weights in a model: where the file is, and how it is made to fit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from timm.models import PretrainedCfg, adapt_input_conv
from torch import Tensor, nn

from ..blocks.factory import blocks_with_keys
from ..blocks.unfold import unfold_state_dict
from ..checkpoints.errors import CheckpointError
from ..checkpoints.files import read_checkpoint
from ..checkpoints.layouts import to_timm_layout
from ..checkpoints.state_dicts import FAMILY_BRANCH, StateDict, check_fit, form_of, without_aux_heads
from .locate import locate

if TYPE_CHECKING:
    from ..model import RepVGG

__all__ = ['load_checkpoint', 'load_pretrained', 'load_state_dict']

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
            folded = model.fold_state_dict(dict(state_dict))
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
