"""A training checkpoint of an over-parameterized network as a folder of the plain network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
from timm.data import resolve_data_config
from timm.layers import to_2tuple
from torch import nn

from ..checkpoints.contents import check_keys
from ..checkpoints.errors import CheckpointError
from ..checkpoints.files import read_checkpoint
from ..checkpoints.prefixes import take_network
from ..checkpoints.state_dicts import StateDict, check_fit
from ..checkpoints.training_options import read_training_options
from ..overparam.overparameterize import overparameterize
from ..overparam.registry import split_overparameterized
from ..pretrained.locate import weights_in
from ..reparam.foreign import MULTI_BRANCH_KEY
from ..reparam.pairs import sample_of
from ..reparam.switch import switch_to_deploy
from .model_folder import save_model

__all__ = ['BranchedNetwork', 'find_branched', 'write_folded']


class BranchedNetwork(NamedTuple):
    """What a checkpoint holds: a network of timm whose convolutions have branches."""

    path: Path
    plain: str
    """Name of the network in timm."""
    block: str
    options: Mapping[str, Any]
    """Those of the training, by the names of train.py."""


def find_branched(source: str | Path, name: str | None) -> BranchedNetwork | None:
    """Tell which over-parameterized network a checkpoint holds.

    Args:
        source: A checkpoint file or a folder with one; anything else holds none.
        name: Name of the network, like 'resnet18_acb', if the checkpoint does not tell it.

    Returns:
        The network; None if neither the name nor the checkpoint tells of one.

    Raises:
        CheckpointError: The file cannot be read.

    Example:
        >>> find_branched('resnet18.pth', name='resnet18_acb') is None  # there is no such file
        True
    """
    path = Path(source)
    if not path.exists():
        return None
    if path.is_dir() and name is not None and split_overparameterized(name):
        path = weights_in(path)
    options = read_training_options(path) if path.is_file() else {}
    found = split_overparameterized(name or options.get('model') or '')
    return found and BranchedNetwork(path, *found, options)


def write_folded(
    network: BranchedNetwork,
    folder: Path,
    *,
    use_ema: bool = True,
    prefix: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Fold an over-parameterized network, and write it as a model folder of the plain network.

    The classes follow from the shapes. The other arguments of the model, and the preprocessing, are those that train.py
    was told.

    Args:
        network: What `find_branched` returned.
        folder: An existing folder.
        use_ema: Take the averaged weights if the checkpoint has them.
        prefix: Take only the part of a larger network whose keys start with this.
        model_kwargs: Further arguments of `timm.create_model`, which replace those of the checkpoint.

    Returns:
        The plain network.

    Raises:
        CheckpointError: The checkpoint holds no branches, or does not fit the network.
        ValueError: The network does not take the arguments.
    """
    state_dict = _read(network, use_ema=use_ema, prefix=prefix)
    model_args = _model_args(network.options) | dict(model_kwargs or {})
    model = _create(network.plain, model_args, state_dict)
    _tell_preprocessing(model, network.options, model_args)
    sample = sample_of(model)
    with_branches = {key[: match.start()] for key in state_dict if (match := MULTI_BRANCH_KEY.search(key))}
    overparameterize(model, network.block, where=lambda path, _: path in with_branches, sample=sample)
    check_fit(state_dict, model.state_dict(), what=f'{network.plain} with branches of {network.block}')
    model.load_state_dict(state_dict)
    switch_to_deploy(model.eval(), verify=sample)
    save_model(model, folder, model_args=model_args)
    return model


def _read(network: BranchedNetwork, *, use_ema: bool, prefix: str | None) -> StateDict:
    state_dict = read_checkpoint(network.path, use_ema=use_ema)
    check_keys(state_dict)
    state_dict = take_network(state_dict, prefix)
    if not any(map(MULTI_BRANCH_KEY.search, state_dict)):
        raise CheckpointError(
            f'{str(network.path)!r} holds no branches of {network.block}; if it is the plain {network.plain}, '
            'there is nothing to fold'
        )
    return state_dict


def _model_args(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with which train.py created the model, except those that only training uses."""
    in_chans = options.get('in_chans') or (options.get('input_size') or (None,))[0]
    given = {'in_chans': in_chans, 'global_pool': options.get('gp'), 'bn_eps': options.get('bn_eps')}
    return {name: value for name, value in given.items() if value is not None} | dict(options.get('model_kwargs') or {})


def _create(name: str, model_args: Mapping[str, Any], state_dict: StateDict) -> Any:
    cfg = timm.get_pretrained_cfg(name)
    classifier = cfg.classifier if cfg is not None else None
    classes = {}
    if classifier:
        first = classifier if isinstance(classifier, str) else classifier[0]
        weight = state_dict.get(f'{first}.weight')
        classes['num_classes'] = 0 if weight is None else len(weight)
    try:
        return timm.create_model(name, **(classes | dict(model_args)))
    except TypeError as error:
        raise ValueError(f'{name} does not take {dict(model_args)}: {error}') from error


def _tell_preprocessing(model: Any, options: Mapping[str, Any], model_args: Mapping[str, Any]) -> None:
    """Let the configuration tell how the images of the training were prepared, and no licence of other weights."""
    cfg = model.pretrained_cfg
    told = dict(options)
    if (img_size := model_args.get('img_size')) is not None:
        told['input_size'] = (model.in_chans, *to_2tuple(img_size))
    before = cfg['input_size']
    cfg.update(resolve_data_config(told, model=model))
    cfg['input_size'] = (model.in_chans, *cfg['input_size'][1:])
    if cfg['input_size'][1:] != before[1:]:
        for name in ('pool_size', 'test_input_size', 'test_pool_size'):
            cfg[name] = None
    cfg['tag'] = cfg['license'] = None
