"""From a checkpoint of any layout and form to a model, and to a model folder in timm's format."""

from __future__ import annotations

import json
from pathlib import Path

import timm
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf

from ..blocks.factory import block_type
from ..blocks.unfold import unfold as unfold_model
from ..checkpoints.errors import CheckpointError
from ..checkpoints.files import FILE_SUFFIXES, read_safetensors_header
from ..checkpoints.state_dicts import Form, identify_variant
from ..model import RepVGG
from ..pretrained.load import assign, convert_form, read
from ..pretrained.locate import weights_in
from ..variants import get_variant
from .atomic import new_folder

__all__ = ['convert', 'open_model', 'save_model']


def convert(
    source: str | Path,
    target: str | Path,
    *,
    form: Form | None = None,
    variant: str | None = None,
    block: str | None = None,
    unfold: bool = False,
    use_ema: bool = True,
    overwrite: bool = False,
) -> RepVGG:
    """Write a checkpoint as a model folder, and return the model.

    The folder holds `model.safetensors` and timm's `config.json`, so that
    `timm.create_model('local-dir:TARGET', pretrained=True)` builds the model, its form included.

    Args:
        source: What `open_model` takes.
        target: The folder to write.
        form: The form to write; that of the source by default. Training weights are folded for the deploy
            form; the reverse takes `unfold`.
        variant: The name of the variant, where the shapes do not tell it.
        block: The training-time block of a bare file, where its keys do not tell it; with `unfold`, the one to make.
        unfold: Make branches that compute the same from a deploy form, and write the training form. Those of a source
            that has the wanted branches stay as they are; others are folded first.
        use_ema: Take the average of the weights from a training checkpoint that has one.
        overwrite: Replace the target if it exists.
    """
    with new_folder(target, overwrite=overwrite) as folder:
        model = open_model(source, variant=variant, block=None if unfold else block, use_ema=use_ema)
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
        raise ValueError('unfolding makes the training form; leave it, or the form deploy, out')
    if not model.deploy and model.block == block:  # better than what their sum could be unfolded to
        return
    unfold_model(model.eval().switch_to_deploy(), block=block)


def save_model(model: RepVGG, folder: Path) -> None:
    """Write a model's `model.safetensors` and timm's `config.json`, the same bytes each time, into a folder."""
    weights = folder / 'model.safetensors'
    form = 'deploy' if model.deploy else 'training'
    metadata = {'format': 'pt', 'architecture': model.variant.name, 'form': form}
    try:
        save_file(model.state_dict(), weights, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f'cannot write {str(weights)!r}: {error}') from error
    _sort_metadata(weights)
    config = folder / 'config.json'
    model_args = model._model_args
    model_args.pop('num_classes', None)  # out of date if the classifier was replaced
    save_config_for_hf(model, config, model_args=model_args)
    content = json.loads(config.read_text())
    content.get('model_args', {}).pop('num_classes', None)  # it stands above too, and transformers trips over this one
    config.write_text(json.dumps(content, indent=2))
    weights.chmod(config.stat().st_mode)  # as the umask has it; safetensors writes for the owner alone


def _sort_metadata(path: Path) -> None:
    """Put a safetensors file's metadata into the order of its keys, which is random as the library writes it."""
    with path.open('r+b') as file:
        header = read_safetensors_header(file)
        size = file.tell() - 8
        header['__metadata__'] = dict(sorted(header['__metadata__'].items()))
        content = json.dumps(header, separators=(',', ':')).encode().ljust(size)
        if len(content) != size:
            raise CheckpointError(f'{str(path)!r} has a header that cannot be put into order')
        file.seek(8)
        file.write(content)


def open_model(
    source: str | Path, *, variant: str | None = None, block: str | None = None, use_ema: bool = True
) -> RepVGG:
    """The model that a checkpoint holds, in the checkpoint's form.

    `source` is a checkpoint file of any layout and form, a model folder with `config.json`, or a timm
    model name whose weights can be had. The variant, classes and input channels of a file are read off
    its shapes; of other training-time blocks than the default one `variant` must be given, and `block` where another
    one has the same keys. Raises `FileNotFoundError`, or `CheckpointError` for a file that is of no known variant or
    does not fit the given one, and for a folder or name that is of another variant or block than the given one.
    """
    block_type(block or 'repvgg')  # an error now if there is none of that name
    path = Path(source)
    if (config := path / 'config.json').is_file():
        try:
            model = timm.create_model(f'local-dir:{path}', pretrained=True)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise CheckpointError(f'{str(config)!r} is no configuration of a timm model: {error!r}') from error
        return _checked(model, source, variant, block)
    if path.is_dir():
        path = weights_in(path)
    if _is_model_name(source):
        return _checked(timm.create_model(str(source), pretrained=True), source, variant, block)

    checkpoint = read(path, use_ema=use_ema)
    state_dict = checkpoint.state_dict
    found = identify_variant(state_dict)
    if variant is None and found is None:
        raise CheckpointError(
            f'{str(path)!r} has the shapes of no known variant; `repvgg-zoo list` shows them. If it was trained with '
            'another block than the default one, name the variant'
        )
    name = get_variant(variant).name if variant else found.name
    classifier = state_dict.get('head.fc.weight')
    stem = [
        v.shape[1] for key, v in state_dict.items() if key.startswith('stem.') and v.ndim == 4 and '.attn.' not in key
    ]
    model = timm.create_model(
        name,
        num_classes=0 if classifier is None else classifier.shape[0],
        in_chans=min(stem, default=3),  # kernels behind the first of a branch have more
        deploy=checkpoint.form == 'deploy',
        block=block or next(iter(checkpoint.blocks), 'repvgg'),
        device='meta',
    )
    assign(model, convert_form(checkpoint, model))
    return model


def _checked(model: RepVGG, source: str | Path, variant: str | None, block: str | None) -> RepVGG:
    """A model that says itself what it is, if that is what was asked for."""
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
    try:
        get_variant(name.split('.')[0])
    except ValueError as error:
        raise FileNotFoundError(f'no checkpoint file or folder at {name!r}, and {error}') from None
    return True
