"""Reference outputs of a model: the file that timm's own tests read, and the check against it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config
from timm.models import PretrainedCfg
from torch import Tensor

from ..checkpoints.errors import CheckpointError
from ..checkpoints.state_dicts import Form
from ..model import RepVGG
from ..pretrained.hub import download_file
from ..pretrained.locate import WEIGHTS_VARIABLE, locate
from ..reparam.evaluation import disable_fast_path
from ..reparam.tolerance import max_rel_diff, rel_diff

__all__ = ['REFERENCE', 'ReferenceCheck', 'check_reference', 'find_reference', 'write_reference']

REFERENCE = 'test/rand_tensors.safetensors'
"""Name in a model folder. timm's `test_model_inference` reads it from the Hub under this name."""

_OUTPUTS = ('output', 'features', 'pre_logits')


@dataclass(frozen=True, kw_only=True)
class ReferenceCheck:
    """Differences between a model and its reference outputs."""

    form: Form
    rel_diffs: Mapping[str, float]
    """Largest difference of each output, relative to the largest value of its reference."""
    device: str = 'cpu'
    """Where the model computed."""

    @property
    def same(self) -> bool:
        """Whether the model computes what the reference says, as far as rounding in float32 lets it."""
        bound = max_rel_diff(torch.float32, torch.device(self.device))
        return all(diff <= bound for diff in self.rel_diffs.values())


def write_reference(model: RepVGG, folder: Path) -> None:
    """Write a random image, and the features, pooled features and logits that a model computes from it.

    The same model gives the same bytes each time on the same machine.

    Args:
        model: In float32 and eval mode.
        folder: The model folder.

    Example:
        >>> import tempfile, timm
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_reference(timm.create_model('test_repvgg').eval(), folder)
        >>> sorted(load_file(folder / REFERENCE))
        ['features', 'input', 'output', 'pre_logits']
    """
    _, height, width = resolve_model_data_config(model)['input_size']
    x = torch.randn(1, model.in_chans, height, width, generator=torch.Generator().manual_seed(0))
    path = folder / REFERENCE
    path.parent.mkdir(exist_ok=True)
    save_file({'input': x, **_outputs(model, x)}, path, metadata={'format': 'pt'})
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors ignores the umask


def check_reference(model: RepVGG, path: Path) -> ReferenceCheck:
    """Compare a model with its reference outputs.

    Args:
        model: In float32 and eval mode.
        path: The file that `write_reference` wrote.

    Returns:
        The differences.

    Raises:
        CheckpointError: The file is none of reference outputs, or of a model with other channels or classes.

    Example:
        >>> import tempfile, timm
        >>> folder, model = Path(tempfile.mkdtemp()), timm.create_model('test_repvgg').eval()
        >>> write_reference(model, folder)
        >>> check_reference(model, folder / REFERENCE).same
        True
    """
    try:
        reference = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f'cannot read the reference outputs {str(path)!r}: {error}') from error
    if missing := {'input', *_OUTPUTS} - reference.keys():
        raise CheckpointError(f'{str(path)!r} holds no reference outputs: it lacks {", ".join(sorted(missing))}')
    x = reference['input'].to(model.device)
    if x.ndim != 4 or x.shape[1] != model.in_chans:
        raise CheckpointError(
            f'{str(path)!r} has an input of shape {tuple(x.shape)}, and the model takes {model.in_chans} channels'
        )
    outputs = _outputs(model, x)
    for name, value in outputs.items():
        if value.shape != reference[name].shape:
            shapes = f'{tuple(reference[name].shape)}, and the model gives {tuple(value.shape)}'
            raise CheckpointError(f'{str(path)!r} has {name} of shape {shapes}')
    return ReferenceCheck(
        form='deploy' if model.deploy else 'training',
        rel_diffs={name: rel_diff(outputs[name], reference[name]) for name in _OUTPUTS},
        device=str(model.device),
    )


def find_reference(source: str | Path, model: RepVGG) -> Path | None:
    """Find the reference outputs of a model; download them if it comes from the Hub.

    Args:
        source: What the model was opened from: a checkpoint file, a model folder or a timm model name.
        model: The model, with its `pretrained_cfg`.

    Returns:
        The file, or None if there is none: checkpoint files and the bundled weights have none.

    Raises:
        CheckpointError: The Hub cannot be reached.

    Example:
        >>> import timm
        >>> find_reference('test_repvgg', timm.create_model('test_repvgg', pretrained=True)) is None
        True
    """
    if Path(source).is_file():
        return None
    cfg = PretrainedCfg(**model.pretrained_cfg)
    weights = locate(cfg)
    if (path := weights.parent / REFERENCE).is_file():
        return path
    override = os.environ.get(WEIGHTS_VARIABLE)
    if cfg.file or not cfg.hf_hub_id or (override and weights.is_relative_to(override)):
        return None
    return download_file(cfg.hf_hub_id, REFERENCE)


def _outputs(model: RepVGG, x: Tensor) -> dict[str, Tensor]:
    with torch.inference_mode(), disable_fast_path():
        features = model.forward_features(x)
        return {
            'output': model.forward_head(features),
            'features': features,
            'pre_logits': model.forward_head(features, pre_logits=True),
        }
