"""From a checkpoint to weights in a model: read, convert the form, adapt the ends, assign."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timm.models import PretrainedCfg, adapt_input_conv
from torch import Tensor, nn

from ..blocks.factory import blocks_with_keys
from ..blocks.unfold import unfold_state_dict
from ..checkpoints.contents import check_contents, check_keys, check_range
from ..checkpoints.errors import CheckpointError
from ..checkpoints.files import read_checkpoint
from ..checkpoints.inserted_bn import fold_inserted_bn
from ..checkpoints.layouts import to_timm_layout
from ..checkpoints.state_dicts import Form, StateDict, check_fit, drop_aux_heads, folded_shapes, form_of
from .locate import locate, weights_in

if TYPE_CHECKING:
    from ..model import RepVGG

__all__ = [
    'Checkpoint',
    'adapt_inputs_and_classifier',
    'assign',
    'convert_form',
    'identify',
    'load_checkpoint',
    'load_pretrained',
    'make_branches',
    'read',
]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """Weights with their form and block types. Loading changes the state dict in place, to hold no tensor twice."""

    state_dict: StateDict
    """In timm's layout."""
    form: Form
    blocks: tuple[str, ...]
    """Block types that have these keys. Types that share all keys are all named. The deploy form has none."""


def load_checkpoint(
    model: RepVGG, path: str | Path, *, use_ema: bool = True, prefix: str | None = None, unfold: bool = False
) -> RepVGG:
    """Load a checkpoint of any layout and either form strictly into a model.

    Training-form weights are folded for a deploy-form model. What a trainer puts in front of all keys, like `model.`,
    is found and stripped.

    Args:
        model: The model to change.
        path: A safetensors or torch file, the index of several files, or a folder with one of them; see
            `repvgg_zoo.checkpoints.files.read_checkpoint`.
        use_ema: Take the average of the weights where the file has one.
        prefix: Take only the part of a larger network whose keys start with this, like 'encoder.model.'.
        unfold: Make the branches of a training-form model, of any block, from deploy-form weights or from
            training-form weights of the default block. In eval mode the model then computes the same.

    Returns:
        The model.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file cannot be read, or does not fit the model; the model is then unchanged.
        FoldError: The weights cannot be folded; the model is then unchanged.
        ValueError: `unfold` is for a model of the training form, and this one is of the deploy form.

    Example:
        >>> import timm, repvgg_zoo
        >>> from repvgg_zoo.pretrained.manifest import weights_dir
        >>> model = timm.create_model('test_repvgg', deploy=True)
        >>> repvgg_zoo.load_checkpoint(model, weights_dir() / 'test_repvgg.cifar10.safetensors').deploy
        True
    """
    _load(model, read(path, use_ema=use_ema, prefix=prefix), unfold=unfold)
    return model


def load_pretrained(
    model: RepVGG,
    cfg: PretrainedCfg,
    *,
    cache_dir: str | Path | None = None,
    unfold: bool = False,
    device: torch.device | None = None,
) -> None:
    """Load the weights that a pretrained configuration names into a model.

    The stem is adapted to the model's input channels as timm does it. If `cfg.num_classes` differs from the model's,
    a classifier that does not fit keeps its initial weights (logged at INFO). Everything else must fit.

    Args:
        model: The model to change.
        cfg: Names a state dict, a file, a Hub repository or a URL.
        cache_dir: Folder for downloads, instead of the default one.
        unfold: As in `load_checkpoint`.
        device: Device for a model on the meta device, instead of the CPU.

    Raises:
        CheckpointError: The weights cannot be had or read, or do not fit the model.
        FoldError: The weights cannot be folded.
        ValueError: `unfold` is for a model of the training form, and this one is of the deploy form.

    Example:
        >>> import timm, repvgg_zoo
        >>> model = timm.create_model('test_repvgg', num_classes=3)
        >>> load_pretrained(model, timm.get_pretrained_cfg('test_repvgg.cifar10'))
    """
    if cfg.state_dict is not None:
        checkpoint = identify(cfg.state_dict)
        copies = {key: value.clone() for key, value in checkpoint.state_dict.items()}
        _load(model, replace(checkpoint, state_dict=copies), unfold=unfold, cfg=cfg, device=device)
        return
    path = locate(cfg, cache_dir=cache_dir)
    # CUDA folds faster than the CPU, and other devices may lack float64
    checkpoint = read(path, device=str(device) if device is not None and device.type == 'cuda' else 'cpu')
    try:
        _load(model, checkpoint, unfold=unfold, cfg=cfg, device=device)
    except CheckpointError as error:
        raise CheckpointError(f'{str(path)!r}: {error}') from error


def _load(
    model: RepVGG,
    checkpoint: Checkpoint,
    *,
    unfold: bool,
    cfg: PretrainedCfg | None = None,
    device: torch.device | None = None,
) -> None:
    checkpoint = convert_form(checkpoint, model, unfold=unfold)
    if cfg is not None:
        adapt_inputs_and_classifier(checkpoint, model, cfg)
    if unfold:  # once the shapes are the model's
        checkpoint = make_branches(checkpoint, model)
    assign(model, checkpoint, device=device)


def read(path: str | Path, *, use_ema: bool = True, prefix: str | None = None, device: str = 'cpu') -> Checkpoint:
    """Read a file of weights, rename its keys, check its values and identify it.

    Args:
        path: See `load_checkpoint`.
        use_ema: Take the average of the weights where the file has one.
        prefix: Take only the part of a larger network whose keys start with this.
        device: Device to read safetensors to. Those of torch files are on the CPU.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file cannot be read, holds something else than weights, is of no known layout, or mixes
            both forms.
        FoldError: The file has normalisation behind its deploy-form convolutions, which cannot be folded.

    Example:
        >>> from repvgg_zoo.pretrained.manifest import weights_dir
        >>> checkpoint = read(weights_dir() / 'test_repvgg.cifar10.safetensors')
        >>> checkpoint.form, checkpoint.blocks
        ('training', ('repvgg',))
    """
    path = Path(path)
    path = weights_in(path) if path.is_dir() else path
    state_dict = read_checkpoint(path, use_ema=use_ema, device=device)
    try:
        return identify(state_dict, prefix=prefix)
    except CheckpointError as error:
        raise CheckpointError(f'{str(path)!r}: {error}') from error


def identify(state_dict: Mapping[Any, Any], *, prefix: str | None = None) -> Checkpoint:
    """Rename the keys of a state dict of any layout, check its values, find its form and block types; see `read`."""
    check_keys(state_dict)
    state_dict = check_contents(to_timm_layout(state_dict, prefix=prefix))
    fold_inserted_bn(state_dict)
    return Checkpoint(state_dict, form_of(state_dict), tuple(blocks_with_keys(state_dict)))


def convert_form(checkpoint: Checkpoint, model: RepVGG, *, unfold: bool = False) -> Checkpoint:
    """Keep, fold or refuse weights. The form and the block type of a model decide.

    Args:
        checkpoint: Weights in any form. The state dict may change in place.
        model: The model that the weights are for.
        unfold: Prepare for `make_branches`: keep deploy-form weights for a training-form model, and fold those of the
            default block for a model of another block.

    Returns:
        Weights in the form of the model, or with `unfold` possibly in the deploy form.

    Raises:
        CheckpointError: The weights need branches that they do not have, or are of another block type.
        FoldError: A block cannot be folded.
        ValueError: `unfold` is for a model of the training form, and this one is of the deploy form.
    """
    if unfold and model.deploy:
        raise ValueError('unfold=True needs a model of the training form, and this one is of the deploy form')
    if checkpoint.form == 'deploy' and not model.deploy and not unfold:
        raise CheckpointError(
            f'the checkpoint holds {model.variant.name} in the deploy form, whose branches are summed; create the '
            'model with deploy=True, or load with unfold=True, which makes branches that compute the same'
        )
    has_other_block = bool(checkpoint.blocks) and model.block not in checkpoint.blocks
    if has_other_block and not ('repvgg' in checkpoint.blocks and (model.deploy or unfold)):
        raise CheckpointError(
            f'the checkpoint holds the branches of block={" or ".join(map(repr, checkpoint.blocks))}, and the model '
            f'has those of block={model.block!r}; create it with the block of the weights'
            + (', or load with unfold=True' if 'repvgg' in checkpoint.blocks else '')
        )
    if checkpoint.form == 'training' and (model.deploy or has_other_block):
        if model.deploy:
            _check_kernels(checkpoint, model)
        model.fold_state_dict(checkpoint.state_dict)
        checkpoint = replace(checkpoint, form='deploy', blocks=())
    if model.aux_heads is None:
        drop_aux_heads(checkpoint.state_dict)
    return checkpoint


def _check_kernels(checkpoint: Checkpoint, model: RepVGG) -> None:
    """Raise `CheckpointError` before folding if blocks of the default type are of another network.

    The stem and the classifier are left out, because they may still be adapted.
    """
    if 'repvgg' not in checkpoint.blocks:
        return
    folded = folded_shapes(checkpoint.state_dict)
    expected = model.state_dict()
    stages = [{k: v.shape for k, v in weights.items() if k.startswith('stages.')} for weights in (folded, expected)]
    if stages[0] != stages[1]:
        check_fit(folded, expected, what=str(model.variant))


def adapt_inputs_and_classifier(checkpoint: Checkpoint, model: RepVGG, cfg: PretrainedCfg) -> None:
    """Fit the first kernels to the model's input channels, and leave out a classifier of other classes.

    Args:
        checkpoint: Weights in the form of the model, or in the deploy form; changed in place.
        model: The model that the weights are for. A classifier on the meta device that gets no weights is initialised.
        cfg: Says how many input channels and classes the weights are for.

    Raises:
        CheckpointError: The stem cannot be adapted.
    """
    _adapt_stem(checkpoint, model, cfg.input_size[0])
    if model.num_classes != cfg.num_classes:
        for name in model.classifier_names:
            _keep_classifier_that_fits(model, name, checkpoint.state_dict)


def make_branches(checkpoint: Checkpoint, model: RepVGG) -> Checkpoint:
    """Make the branches of a training-form model from deploy-form weights; training-form weights stay as they are."""
    if checkpoint.form == 'training':
        return checkpoint
    state_dict = unfold_state_dict(model, checkpoint.state_dict, what=str(model.variant))
    return Checkpoint(state_dict, 'training', (model.block,))


def assign(model: RepVGG, checkpoint: Checkpoint, *, device: torch.device | None = None) -> None:
    """Give a model weights that fit it exactly: a model on the meta device takes the tensors over, others copy them.

    Args:
        model: The model to change.
        checkpoint: Weights in the form of the model.
        device: Device for a model on the meta device, instead of that of the weights.

    Raises:
        CheckpointError: The weights do not fit, or are beyond the dtype of the model; the model is then unchanged.
    """
    state_dict, expected = checkpoint.state_dict, model.state_dict()
    check_fit(state_dict, expected, what=str(model.variant))
    check_range(state_dict, expected)
    if model.device.type != 'meta':
        model.load_state_dict(state_dict)
        return
    own = {key: _detached_copy(value, expected[key], device or value.device) for key, value in state_dict.items()}
    model.load_state_dict(own, assign=True)


def _keep_classifier_that_fits(model: RepVGG, name: str, state_dict: StateDict) -> None:
    """Keep the initial classifier of a model if the weights have another number of classes."""
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


def _adapt_stem(checkpoint: Checkpoint, model: RepVGG, source_chans: int) -> None:
    if model.in_chans == source_chans:
        return
    if source_chans != 3:
        raise CheckpointError(
            f'weights for {source_chans} input channels cannot be adapted to {model.in_chans}, because only weights '
            f'for 3 can; create the model with in_chans={source_chans}'
        )
    state_dict = checkpoint.state_dict
    convs = ['reparam_conv'] if checkpoint.form == 'deploy' else model.stem.input_convs()
    inputs = [f'stem.{conv}.weight' for conv in convs]
    kernels = [key for key, value in state_dict.items() if key.startswith('stem.') and value.ndim > 2]
    if others := [key for key in kernels if key not in inputs and '.attn.' not in key]:
        raise CheckpointError(
            f'{others[0]} has another structure for {model.in_chans} channels than for {source_chans}; load '
            f'deploy-form weights with unfold=True, or create the model with in_chans={source_chans}'
        )
    for key in state_dict.keys() & inputs:
        state_dict[key] = adapt_input_conv(model.in_chans, state_dict[key])


def _detached_copy(value: Tensor, like: Tensor, device: torch.device) -> Tensor:
    """Return a contiguous tensor in the dtype of `like` with a storage of its own; copy only if necessary."""
    # flat in between, because a 1x1 kernel is contiguous in channels_last too
    value = value.detach().to(like.dtype).to(device).contiguous().view(-1).view(value.shape)
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()
