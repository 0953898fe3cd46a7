"""A checkpoint of any layout and form to a model, and to a model folder in timm's format."""

from __future__ import annotations

import argparse
import inspect
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm

from ..blocks.factory import block_type
from ..blocks.unfold import unfold as unfold_model
from ..checkpoints.errors import CheckpointError
from ..checkpoints.files import FILE_SUFFIXES
from ..checkpoints.state_dicts import Form, identify_variant
from ..model import RepVGG
from ..pretrained.hub import download_file, is_hub_ref
from ..pretrained.load import assign, convert_form, read
from ..pretrained.locate import weights_in
from ..variants import OVERRIDES, VARIANTS, Variant, get_variant, suggestion
from .atomic import new_folder
from .model_arguments import add_model_arguments, model_options
from .model_folder import save_model
from .overparameterized import find_branched, write_folded

__all__ = ['add_arguments', 'convert', 'main', 'open_model']

_logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `repvgg-zoo convert`."""
    parser.epilog = (
        "timm.create_model('local-dir:DST', pretrained=True) then builds the model. A checkpoint of `repvgg-zoo run "
        '--overparameterize resnet18:acb train.py` becomes a plain resnet18; if the file does not tell that, '
        '--model resnet18_acb does.'
    )
    parser.add_argument('src', metavar='SRC', help='checkpoint file, model folder, or timm model name')
    parser.add_argument('dst', metavar='DST', help='folder to write: model.safetensors and config.json')
    parser.add_argument('--form', choices=('training', 'deploy'), help='form to write (default: that of SRC)')
    parser.add_argument(
        '--unfold',
        action='store_true',
        help='make branches that compute the same as a deploy form, those of --block (default: repvgg)',
    )
    parser.add_argument(
        '--overwrite',
        action='store_true',
        help='replace DST if an earlier run wrote it as it is',
    )
    add_model_arguments(parser, 'SRC')


def main(args: argparse.Namespace) -> int:
    """Run `repvgg-zoo convert`."""
    model = convert(
        args.src,
        args.dst,
        form=args.form,
        unfold=args.unfold,
        overwrite=args.overwrite,
        **model_options(args),
    )
    if isinstance(model, RepVGG):
        what = f'{model.variant.name}, {"deploy" if model.deploy else "training"} form'
    else:
        what = f'{model.pretrained_cfg["architecture"]}, branches folded'
    print(f'wrote {what}, {model.num_classes} classes, to {args.dst}')
    return 0


def convert(
    source: str | Path,
    target: str | Path,
    *,
    form: Form | None = None,
    variant: str | None = None,
    block: str | None = None,
    unfold: bool = False,
    use_ema: bool = True,
    prefix: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Any:
    """Write a checkpoint as a model folder.

    The folder holds `model.safetensors` and timm's `config.json`, so that
    `timm.create_model('local-dir:TARGET', pretrained=True)` builds the model, its form included.

    A training checkpoint of another network that was over-parameterized, such as `resnet18_acb`, is folded, and written
    as the plain network, which timm loads without this package.

    Args:
        source: Checkpoint file, model folder or timm model name, see `open_model`.
        target: Folder to write.
        form: Form to write, by default that of the source. Training weights are folded for the deploy form; the
            reverse needs `unfold`.
        variant: Name of the variant, if the shapes do not tell it. Name of the over-parameterized network, if the
            checkpoint does not tell it.
        block: Training-time block of a bare file, if its keys do not tell it. With `unfold`, the block to make.
        unfold: Write the training form of deploy-form weights: branches that compute the same. Weights that have the
            wanted branches stay as they are. Other branches are folded first.
        use_ema: Take the averaged weights of a training checkpoint that has them.
        prefix: Take only the part of a larger network whose keys start with this.
        model_kwargs: Further arguments of `timm.create_model` for a bare file.
        overwrite: Replace the target if it is such a folder.

    Returns:
        The model that was written.

    Raises:
        CheckpointError: The source cannot be read, fits no variant, or is of the deploy form and not to be unfolded.
        FileNotFoundError: The source does not exist.
        FileExistsError: The target exists, and `overwrite` is off or it holds other files.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / 'deploy'
        >>> convert('test_repvgg', target, form='deploy').deploy
        True
        >>> sorted(path.name for path in target.glob('[!.]*'))
        ['config.json', 'model.safetensors']
    """
    with new_folder(target, overwrite=overwrite) as folder:
        if (network := find_branched(source, variant)) is not None:
            if form == 'training' or unfold or block is not None:
                raise ValueError(
                    f'{str(source)!r} holds {network.plain} with branches of {network.block}, which are folded; leave '
                    'out unfold, block and the form training'
                )
            return write_folded(network, folder, use_ema=use_ema, prefix=prefix, model_kwargs=model_kwargs)
        model: Any = open_model(
            source,
            variant=variant,
            block=None if unfold else block,
            use_ema=use_ema,
            prefix=prefix,
            model_kwargs=model_kwargs,
        )
        if unfold:
            _unfold(model, form, block or 'repvgg')
        elif form == 'deploy':
            model.eval().switch_to_deploy()
        elif form == 'training' and model.deploy:
            raise CheckpointError(
                f'{str(source)!r} is of the deploy form, and its branches are summed; find the training weights, or '
                'unfold it into branches that compute the same'
            )
        model.pretrained_cfg.pop('tag', None)
        model.pretrained_cfg['input_size'] = (model.in_chans, *model.pretrained_cfg['input_size'][1:])
        save_model(model, folder)
    return model


def _unfold(model: RepVGG, form: Form | None, block: str) -> None:
    if form == 'deploy':
        raise ValueError('unfolding makes the training form; leave out either unfold or the form deploy')
    if not model.deploy and model.block == block:  # better than what their sum could be unfolded to
        return
    unfold_model(model.eval().switch_to_deploy(), block=block)


def open_model(
    source: str | Path,
    *,
    variant: str | None = None,
    block: str | None = None,
    use_ema: bool = True,
    prefix: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> RepVGG:
    """Build the model that a checkpoint holds, in the checkpoint's form.

    The variant, the classes and the input channels of a bare file follow from its shapes, the block from its keys.

    Args:
        source: Checkpoint file of any layout and form, model folder with `config.json`, or timm model name.
        variant: Name of the variant. Necessary for files with another block than the default one.
        block: Training-time block. Necessary if two blocks have the same keys.
        use_ema: Take the averaged weights of a training checkpoint that has them. Off for a bare file only.
        prefix: Take only the part of a larger network whose keys start with this, of a bare file.
        model_kwargs: Further arguments of `timm.create_model` for a bare file.

    Returns:
        The model with its weights.

    Raises:
        FileNotFoundError: There is no such file, folder or name.
        CheckpointError: The file fits no known variant, the source is of another variant or block than asked for, or
            of another architecture.
        ValueError: An argument is none that a model takes, or is for a bare file and the source is none.

    Example:
        >>> open_model('test_repvgg.cifar10_deploy').deploy
        True
    """
    block_type(block or 'repvgg')  # an error now if there is none of that name
    path = Path(source)
    config = path / 'config.json'
    _check_model_kwargs(model_kwargs or {})
    if config.is_file() or _is_model_name(source):
        _check_no_options(source, use_ema=use_ema, prefix=prefix, model_kwargs=model_kwargs)
    if config.is_file():
        try:
            model = _create(f'local-dir:{path}', pretrained=True)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise CheckpointError(f'{str(config)!r} is no configuration of a timm model: {error!r}') from error
        return _checked(model, source, variant, block)
    if path.is_dir():
        path = weights_in(path)
    if _is_model_name(source):
        return _checked(_create(str(source), pretrained=True), source, variant, block)

    checkpoint = read(path, use_ema=use_ema, prefix=prefix)
    state_dict = checkpoint.state_dict
    chosen = identify_variant(state_dict) if variant is None else get_variant(variant)
    if chosen is None:
        raise CheckpointError(
            f'{str(path)!r} has the shapes of no known variant; `repvgg-zoo list` shows them. If it was trained with '
            'another block than the default one, name the variant; if with other depths, width, strides or groups, '
            'name it and give these as model_kwargs (--model-kwargs)'
        )
    classifier = state_dict.get('head.fc.weight')
    twin = next((v.name for v in VARIANTS.values() if v != chosen and _differ_in_strides(v, chosen)), None)
    if variant is None and twin and classifier is not None and len(classifier) != 1000:
        _logger.warning('%s is taken for %s; if it is %s, with other strides, say so', path, chosen.name, twin)
    stem = [
        v.shape[1] for key, v in state_dict.items() if key.startswith('stem.') and v.ndim == 4 and '.attn.' not in key
    ]
    model = _create(
        chosen.name,
        num_classes=0 if classifier is None else classifier.shape[0],
        in_chans=min(stem, default=3),  # kernels behind the first of a branch have more
        deploy=checkpoint.form == 'deploy',
        block=block or next(iter(checkpoint.blocks), 'repvgg'),
        device='meta',
        **(model_kwargs or {}),
    )
    assign(model, convert_form(checkpoint, model))
    model.pretrained_cfg['license'] = None  # that of the variant's own weights; nobody told that of these
    return model


def _check_no_options(
    source: str | Path, *, use_ema: bool, prefix: str | None, model_kwargs: Mapping[str, Any] | None
) -> None:
    options = {'model_kwargs (--model-kwargs)': model_kwargs, 'prefix (--prefix)': prefix, '--no-ema': not use_ema}
    if given := [name for name, value in options.items() if value]:
        raise ValueError(
            f'{str(source)!r} knows its own arguments and weights, so it takes no {given[0]}; a bare file does'
        )


def _check_model_kwargs(model_kwargs: Mapping[str, Any]) -> None:
    told_by_the_file = ('variant', 'num_classes', 'in_chans', 'block', 'deploy', 'aux_heads', 'device', 'dtype')
    possible = [*OVERRIDES, *(name for name in inspect.signature(RepVGG).parameters if name not in told_by_the_file)]
    for name in model_kwargs:
        if name not in possible:
            raise ValueError(
                f'{name!r} is no argument of a model that can be given here;{suggestion(name, possible)} these can: '
                f'{", ".join(possible)}'
            )


def _differ_in_strides(a: Variant, b: Variant) -> bool:
    return replace(a, name=b.name, strides=b.strides) == b


def _create(name: str, **kwargs: Any) -> RepVGG:
    if name.startswith('hf-hub:'):  # timm would try again for half a minute where there is no network
        download_file(name.removeprefix('hf-hub:'), 'config.json')
    model: Any = timm.create_model(name, **kwargs)
    if not isinstance(model, RepVGG):
        raise CheckpointError(
            f'{name!r} holds {model.pretrained_cfg["architecture"]}, a {type(model).__name__} of timm, and no RepVGG; '
            'the variants are those of `repvgg-zoo list`. For other networks there is timm.utils.reparameterize_model'
        )
    return model


def _checked(model: RepVGG, source: str | Path, variant: str | None, block: str | None) -> RepVGG:
    """Return a model that knows its variant and block, if they are those asked for."""
    if variant and get_variant(variant).name != model.variant.name:
        raise CheckpointError(f'{str(source)!r} is of {model.variant.name}, not of {variant}')
    if block and not model.deploy and block != model.block:
        raise CheckpointError(
            f'{str(source)!r} has the branches of {model.block}, not of {block}; to make those, unfold it'
        )
    return model


def _is_model_name(source: str | Path) -> bool:
    name = str(source)
    if Path(source).exists() or name.endswith(FILE_SUFFIXES):
        return False
    if ':' in name:
        return True
    if is_hub_ref(name):
        raise FileNotFoundError(f"no checkpoint file or folder at {name!r}; if it is on the Hub, write 'hf-hub:{name}'")
    try:
        get_variant(name.split('.')[0])
    except ValueError as error:
        raise FileNotFoundError(f'no checkpoint file or folder at {name!r}, and {error}') from None
    return True
