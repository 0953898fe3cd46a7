"""A module's outputs in eval mode, by its branches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ['call', 'disable_fast_path', 'eval_outputs', 'evaluating', 'fast_path_is_disabled', 'tensors_in']

_disabled = ContextVar('fast_path_is_disabled', default=False)


@contextmanager
def disable_fast_path() -> Iterator[None]:
    """Run branches one by one inside the `with` block, in this thread. Comparisons of both forms need it.

    Returns:
        A context manager.

    Example:
        >>> import timm, repvgg_zoo
        >>> model = timm.create_model('test_repvgg').eval()
        >>> with disable_fast_path():
        ...     logits = model(torch.ones(1, 3, 32, 32))
    """
    token = _disabled.set(True)
    try:
        yield
    finally:
        _disabled.reset(token)


def fast_path_is_disabled() -> bool:
    """Tell whether `disable_fast_path` is in force."""
    return _disabled.get()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode inside the `with` block, with branches one by one and without gradients.

    The mode of every submodule is restored at the end.
    """
    modes = {submodule: submodule.training for submodule in module.modules()}
    module.eval()
    try:
        with torch.no_grad(), disable_fast_path():
            yield
    finally:
        for submodule in module.modules():
            submodule.training = modes.get(submodule, module.training)


def eval_outputs(module: nn.Module, sample: Any) -> list[Tensor]:
    """Run a module in eval mode, and return all tensors of floating-point numbers among its outputs.

    Labels and counts are left out, because they flip where scores are close.
    """
    with evaluating(module):
        outputs = tensors_in(call(module, sample))
        return [t.detach().clone() for t in outputs if t.is_floating_point() and t.numel()]


def call(module: nn.Module, sample: Any) -> Any:
    """Call a module with a copy of a sample: a tuple holds several arguments, a mapping holds arguments by name."""
    sample = _copied(sample)
    if isinstance(sample, tuple):
        return module(*sample)
    return module(**sample) if isinstance(sample, Mapping) else module(sample)


def _copied(sample: Any) -> Any:
    """Copy tensors, because a forward pass may change its input in place."""
    if isinstance(sample, Tensor):
        return sample.detach().clone()
    if type(sample) in (tuple, list):
        return type(sample)(map(_copied, sample))
    return {name: _copied(value) for name, value in sample.items()} if type(sample) is dict else sample


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested mappings, tuples, lists and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in(vars(value))
