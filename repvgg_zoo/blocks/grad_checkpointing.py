"""Activation checkpointing, with running statistics that move once a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ['checkpointed']


def checkpointed(module: nn.Module, x: Tensor) -> Tensor:
    """Return `module(x)`, and let autograd keep only the input.

    The repeated forward pass starts from the running statistics that the first one left, and does not move them. So the
    statistics are those of training without checkpoints. So are the gradients of modules that use the statistics in
    train mode, as the Diverse Branch Block does.
    """
    if torch.compiler.is_compiling():  # compiled recomputation moves nothing
        return checkpoint(module, x, use_reentrant=False)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        statistics: _Statistics = {m: {} for m in module.modules() if m.training and _running(m)}
        return _record_stats(statistics), _RestoreStats(statistics)

    return checkpoint(module, x, use_reentrant=False, context_fn=contexts)


_Statistics: TypeAlias = dict[Any, dict[str, Tensor]]
"""Buffers of each module that averages over batches, by name."""


def _running(module: nn.Module) -> dict[str, Tensor]:
    """Return what a module averages over batches with its `momentum`: norms do, and quantizers of inputs."""
    if not hasattr(module, 'momentum'):
        return {}
    return {name: buffer for name, buffer in module.named_buffers(recurse=False) if name.startswith('running_')}


@contextmanager
def _record_stats(statistics: _Statistics) -> Iterator[None]:
    """Record the statistics that a forward pass leaves."""
    yield
    for module, buffers in statistics.items():
        buffers.update({name: buffer.clone() for name, buffer in _running(module).items()})
        if (count := getattr(module, 'num_batches_tracked', None)) is not None:
            # momentum=None averages over num_batches_tracked; a huge count makes the update a no-op
            buffers['num_batches_tracked'] = torch.full_like(count, 2**62)


class _RestoreStats(AbstractContextManager[None]):
    """Run a forward pass with the recorded statistics, and move none of them. Each backward pass enters it once."""

    def __init__(self, statistics: _Statistics) -> None:
        self.statistics = statistics

    def __enter__(self) -> None:
        self.before = [(dict(norm.named_buffers(recurse=False)), norm.momentum) for norm in self.statistics]
        for norm, buffers in self.statistics.items():
            _set_buffers(norm, buffers)
            norm.momentum = None if norm.momentum is None else 0.0

    def __exit__(self, *_: object) -> None:
        for norm, (buffers, momentum) in zip(self.statistics, self.before, strict=True):
            _set_buffers(norm, buffers)
            norm.momentum = momentum


def _set_buffers(norm: nn.Module, buffers: dict[str, Tensor]) -> None:
    for name, buffer in buffers.items():
        setattr(norm, name, buffer)
