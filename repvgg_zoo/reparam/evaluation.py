"""A module's outputs in eval mode, by its branches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ['call', 'disable_fast_path', 'eval_outputs', 'evaluating', 'fast_path_is_disabled']

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
    """Run a module in eval mode, and return all tensors of floating-point numbers among its outputs."""
    with evaluating(module):
        return [output.detach().clone() for output in _tensors(call(module, sample))]


def call(module: nn.Module, sample: Any) -> Any:
    """Call a module with a sample: a tuple holds several arguments, a mapping holds arguments by name."""
    if isinstance(sample, tuple):
        return module(*sample)
    return module(**sample) if isinstance(sample, Mapping) else module(sample)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.numel():  # labels and counts flip where scores are close
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)
