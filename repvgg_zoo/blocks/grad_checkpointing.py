"""Activation checkpointing, with running statistics that move once a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..reparam.fold import BATCH_NORMS, BatchNorm

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
        norms = {m for m in module.modules() if isinstance(m, BATCH_NORMS) and m.training}
        statistics: _Statistics = {norm: {} for norm in norms if norm.running_mean is not None}
        return _record_stats(statistics), _RestoreStats(statistics)

    return checkpoint(module, x, use_reentrant=False, context_fn=contexts)


_Statistics: TypeAlias = dict[BatchNorm, dict[str, Tensor]]
"""Buffers of each normalisation layer by name."""


@contextmanager
def _record_stats(statistics: _Statistics) -> Iterator[None]:
    """Record the statistics that a forward pass leaves."""
    yield
    for norm, buffers in statistics.items():
        buffers.update({name: norm.get_buffer(name).clone() for name in ('running_mean', 'running_var')})
        if norm.num_batches_tracked is not None:
            # momentum=None averages over num_batches_tracked; a huge count makes the update a no-op
            buffers['num_batches_tracked'] = torch.full_like(norm.num_batches_tracked, 2**62)


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
