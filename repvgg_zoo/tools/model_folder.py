"""A model as a folder in timm's format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from .._compat import save_config_for_hf
from ..model import RepVGG

__all__ = ['MODEL_FILES', 'save_model']

MODEL_FILES = ('model.safetensors', 'config.json')
"""What `save_model` writes."""


def save_model(model: Any, folder: Path, *, model_args: Mapping[str, Any] | None = None) -> None:
    """Write `model.safetensors` and timm's `config.json`, the same bytes each time.

    Args:
        model: A model of timm's registry, RepVGG in either form.
        folder: An existing folder.
        model_args: Arguments that made the model. RepVGG knows its own.

    Raises:
        OSError: A file cannot be written.

    Example:
        >>> import tempfile, timm
        >>> folder = Path(tempfile.mkdtemp())
        >>> save_model(timm.create_model('test_repvgg'), folder)
        >>> json.loads((folder / 'config.json').read_text())['architecture']
        'test_repvgg'
    """
    weights, config = (folder / name for name in MODEL_FILES)
    metadata = {'format': 'pt', 'architecture': model.pretrained_cfg['architecture']}
    if isinstance(model, RepVGG):
        metadata['form'] = 'deploy' if model.deploy else 'training'
    try:
        save_file(model.state_dict(), weights, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f'cannot write {str(weights)!r}: {error}') from error
    _sort_metadata(weights)
    model_args = dict(model._model_args if isinstance(model, RepVGG) else model_args or {})
    model_args.pop('num_classes', None)  # out of date if the classifier was replaced
    path: Any = config  # timm annotates str, but its older versions take a Path only
    save_config_for_hf(model, path, model_args=model_args)
    content = json.loads(config.read_text())
    content.get('model_args', {}).pop('num_classes', None)  # already at the top level; transformers rejects it here
    for key in ('label_names', 'label_descriptions'):  # which timm and transformers read at the top level
        if labels := content['pretrained_cfg'].pop(key, None):
            content[key] = labels
    config.write_text(json.dumps(content, indent=2))
    weights.chmod(config.stat().st_mode)  # safetensors ignores the umask


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file, which the library writes in random order: the sha256 must not vary."""
    with path.open('r+b') as file:
        size = int.from_bytes(file.read(8), 'little')
        header = json.loads(file.read(size))
        header['__metadata__'] = dict(sorted(header['__metadata__'].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode().ljust(size))
