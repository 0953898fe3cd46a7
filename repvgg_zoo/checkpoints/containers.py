"""The place of the weights in what a trainer saves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch

from .errors import CheckpointError, abbreviate

__all__ = ['AVERAGES', 'PLAIN', 'is_state_dict', 'weights_of']

AVERAGES = ('state_dict_ema', 'model_ema', 'ema_state_dict', 'ema', 'params_ema')
"""Where trainers put the average of the weights."""

PLAIN = ('state_dict', 'model', 'model_state_dict', 'net', 'params', 'module')
"""Where trainers put the weights."""


def weights_of(content: Any, *, use_ema: bool = True) -> Mapping[Any, Any] | None:
    """Find the state dict in the content of a checkpoint file.

    Args:
        content: What the file holds.
        use_ema: Take the average of the weights if there is one.

    Returns:
        A mapping with tensors; None if there is none.

    Raises:
        CheckpointError: There is an average that is no state dict.

    Example:
        >>> import torch
        >>> weights_of({'epoch': 3, 'model': {'bias': torch.zeros(1)}})
        {'bias': tensor([0.])}
    """
    if not isinstance(content, Mapping):
        return None
    for name in _containers(content, use_ema=use_ema):
        inside = content.get(name)
        if (found := _state_dict_in(inside)) is not None:
            return found
        if name in AVERAGES and isinstance(inside, Mapping) and any(map(_holds_tensors, inside.values())):
            raise CheckpointError(
                f'the average of the weights under {name!r} is of no known layout ({abbreviate(inside)}); save its '
                'state dict, or take the plain weights with use_ema=False (`--no-ema`)'
            )
    return content if is_state_dict(content) else None


def is_state_dict(content: Any) -> bool:
    """Tell whether this is a mapping with tensors."""
    return isinstance(content, Mapping) and any(map(torch.is_tensor, content.values()))


def _state_dict_in(content: Any) -> Mapping[Any, Any] | None:
    """Find a state dict: the content itself, or one level below as in averages that keep a module."""
    if is_state_dict(content):
        return cast('Mapping[Any, Any]', content)
    below = map(content.get, (*AVERAGES, *PLAIN)) if isinstance(content, Mapping) else ()
    return next(filter(is_state_dict, below), None)


def _holds_tensors(value: Any) -> bool:
    return torch.is_tensor(value) or (isinstance(value, list | tuple) and any(map(torch.is_tensor, value)))


def _containers(content: Mapping[Any, Any], *, use_ema: bool) -> tuple[str, ...]:
    # Lightning and mmengine save the average as the weights, and the weights elsewhere
    if 'current_model_state' in content:
        return ('state_dict',) if use_ema else ('current_model_state',)
    if 'ema_state_dict' in content and 'message_hub' in content:
        return ('state_dict',) if use_ema else ('ema_state_dict',)
    return (*AVERAGES, *PLAIN) if use_ema else PLAIN
