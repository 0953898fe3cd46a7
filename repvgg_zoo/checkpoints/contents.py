"""The check of what a checkpoint holds: plain tensors of finite numbers under string keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CheckpointError, abbreviate
from .state_dicts import StateDict

__all__ = ['check_contents', 'check_keys', 'check_loadable', 'check_range']


def check_keys(state_dict: Mapping[Any, Any]) -> None:
    """Check that all keys are strings.

    Raises:
        CheckpointError: One is not.
    """
    if strangers := [repr(key) for key in state_dict if not isinstance(key, str)]:
        raise CheckpointError(f'keys that are no strings: {abbreviate(strangers)}; save a state dict')


def check_contents(state_dict: Mapping[str, Any]) -> StateDict:
    """Check that all values can be weights, before anything is computed from them.

    Args:
        state_dict: What a file holds under the keys of a network.

    Returns:
        The tensors, detached. Those of 8 bits, which nothing computes with, are widened to float32.

    Raises:
        CheckpointError: A value is no dense tensor with real values in memory, is expanded or not finite, or is a
            negative variance.

    Example:
        >>> check_contents({'stem.reparam_conv.bias': torch.zeros(1, device='meta')})
        Traceback (most recent call last):
        ...
        repvgg_zoo.checkpoints.errors.CheckpointError: stem.reparam_conv.bias is on device 'meta' and has no values; ...
    """
    checked = {}
    for key, value in state_dict.items():
        problem = _problem(value) or _problem_of_size(key, value)
        if problem is None and not _is_finite(value):
            problem = 'holds values that are not finite; the training diverged, so take an earlier checkpoint'
        if problem is not None:
            raise CheckpointError(f'{key} {problem}')
        if value.is_floating_point() and value.itemsize == 1:
            value = value.float()
        if key.endswith('.running_var') and bool((value < 0).any()):
            raise CheckpointError(f'{key} holds variances below 0; the file is damaged, so get it again')
        checked[key] = value.detach() if value.requires_grad or isinstance(value, nn.Parameter) else value
    return checked


def check_loadable(state_dict: Mapping[str, Any], model: nn.Module, *, assign: bool) -> None:
    """Check that `load_state_dict` can copy values into a model. torch takes some for others, or fails halfway at them.

    Tensors of the model that are no plain ones of floating-point numbers, as after quantization, take what they take.

    Args:
        state_dict: Weights in timm's layout.
        model: A RepVGG.
        assign: Whether the model takes the tensors over, which may then be on the meta device.

    Raises:
        CheckpointError: A value cannot be what the model has under its key.
    """
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    for key, value in state_dict.items():
        like = own.get(key)
        if like is None:
            is_plain = key.startswith(('stem.', 'stages.'))  # branches, which the deploy form folds
        else:
            is_plain = _is_plain(like) and like.is_floating_point()
        if not is_plain or hasattr(value, 'full_tensor'):
            continue
        may_be_meta = assign or (like is not None and like.is_meta)
        if problem := _problem(value, may_be_meta=may_be_meta):
            raise CheckpointError(f'{key} {problem}')


def check_range(state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check that the dtypes of a model hold all values.

    Args:
        state_dict: Finite weights that fit the model.
        expected: The model's state dict.

    Raises:
        CheckpointError: A value is beyond the dtype that the model has under its key.
    """
    for key, value in state_dict.items():
        dtype = expected[key].dtype
        if not (value.is_floating_point() and dtype.is_floating_point and value.numel()):
            continue
        limit = torch.finfo(dtype).max
        if torch.finfo(value.dtype).max > limit and bool((torch.stack(value.aminmax()).abs() > limit).any()):
            raise CheckpointError(f'{key} has values beyond {dtype}; load it into a model of {value.dtype}')


def _problem(value: Any, *, may_be_meta: bool = False) -> str | None:
    """Say why a value cannot be weights; return None if it can."""
    if not isinstance(value, Tensor):
        return f'is a {type(value).__name__} and no tensor; save a state dict'
    if hasattr(value, 'full_tensor'):
        return 'is a shard of a DTensor; gather the full state dict before you save it'
    if value.is_quantized:
        return f'is quantized to {value.dtype}; take the checkpoint from before the quantization'
    if not _is_plain(value):
        return f'is a {type(value).__name__} of layout {value.layout}; save plain dense tensors'
    if value.is_meta and not may_be_meta:
        return "is on device 'meta' and has no values; load the weights into the model before you save it"
    if value.is_complex():
        return f'has complex numbers ({value.dtype}); save real ones'
    if not value.is_floating_point() and value.ndim:  # counters and flags are single numbers
        return f'has integers ({value.dtype}); take the checkpoint from before the quantization'
    return None


def _is_plain(tensor: Tensor) -> bool:
    is_plain_class = type(tensor) is Tensor or isinstance(tensor, nn.Parameter)
    return is_plain_class and tensor.layout == torch.strided and not tensor.is_nested


def _problem_of_size(key: str, value: Tensor) -> str | None:
    if value.ndim == 0 and key.endswith('.weight'):
        return 'is a single number; take weights of a RepVGG'
    if value.nbytes > value.untyped_storage().nbytes():
        return f'has the shape {tuple(value.shape)} and fewer values than that (expanded); save a clone of it'
    return None


def _is_finite(value: Tensor) -> bool:
    if not value.is_floating_point() or value.itemsize == 1:
        return True
    # the sum needs no memory of the tensor's size; if it overflows, each value is looked at
    total = value.detach().sum(dtype=torch.promote_types(value.dtype, torch.float32))
    return bool(total.isfinite()) or bool(value.isfinite().all())
