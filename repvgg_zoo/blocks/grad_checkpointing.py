"""Activations that are computed again in the backward pass, with running statistics that move once a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ['checkpointed']


def checkpointed(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, of which autograd keeps the input alone.

    Where the forward pass is repeated, batch normalisation finds the running statistics that the first one left, and
    does not move them: they are those of training without checkpoints, and so are the gradients of modules that compute
    with them in train mode, as the Diverse Branch Block does.
    """
    if torch.compiler.is_compiling():  # where what is computed again moves nothing
        return checkpoint(module, x, use_reentrant=False)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        norms = {m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training}
        statistics: _Statistics = {norm: {} for norm in norms if norm.running_mean is not None}
        return _kept(statistics), _FoundAgain(statistics)

    return checkpoint(module, x, use_reentrant=False, context_fn=contexts)


_Statistics: TypeAlias = dict[nn.Module, dict[str, Tensor]]
"""Buffers of each normalisation, by name."""


@contextmanager
def _kept(statistics: _Statistics) -> Iterator[None]:
    """Remember what a forward pass leaves."""
    yield
    for norm, buffers in statistics.items():
        buffers.update(running_mean=norm.running_mean.clone(), running_var=norm.running_var.clone())
        if norm.num_batches_tracked is not None:  # to the mean of so many batches, one more adds nothing
            buffers['num_batches_tracked'] = torch.full_like(norm.num_batches_tracked, 2**62)


class _FoundAgain(AbstractContextManager[None]):
    """A forward pass with what was remembered, once for each backward pass; it moves nothing."""

    def __init__(self, statistics: _Statistics) -> None:
        self.statistics = statistics

    def __enter__(self) -> None:
        self.before = [(dict(norm._buffers), norm.momentum) for norm in self.statistics]
        for norm, buffers in self.statistics.items():
            norm._buffers.update(buffers)
            norm.momentum = None if norm.momentum is None else 0.0

    def __exit__(self, *_: object) -> None:
        for norm, (buffers, momentum) in zip(self.statistics, self.before, strict=True):
            norm._buffers.update(buffers)
            norm.momentum = momentum
