"""The options that timm's train.py saves beside the weights."""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .torch_files import read_torch

__all__ = ['read_training_options']


def read_training_options(path: str | Path) -> dict[str, Any]:
    """Read the options of a training run from its checkpoint.

    Args:
        path: Any file.

    Returns:
        Options of train.py by name, such as `model` and `num_classes`. Empty if the file holds none.

    Raises:
        CheckpointError: It is a torch file that cannot be read.

    Example:
        >>> import argparse, tempfile
        >>> path = Path(tempfile.mkdtemp()) / 'last.pth.tar'
        >>> args = argparse.Namespace(model='resnet18', num_classes=10)
        >>> torch.save({'arch': 'resnet18', 'args': args, 'state_dict': {'bias': torch.zeros(1)}}, path)
        >>> read_training_options(path)
        {'model': 'resnet18', 'num_classes': 10}
    """
    if not zipfile.is_zipfile(path):  # neither are safetensors, nor the format of torch before 2020
        return {}
    with torch.serialization.safe_globals([argparse.Namespace]):  # it holds values and runs nothing
        content = read_torch(Path(path), mmap=True)
    if not isinstance(content, Mapping):
        return {}
    args, arch = content.get('args'), content.get('arch')
    options = dict(vars(args)) if isinstance(args, argparse.Namespace) else {}
    return options | ({'model': arch} if isinstance(arch, str) else {})
