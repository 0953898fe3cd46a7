"""Activations that are computed again in the backward pass, with running statistics that move once a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ['checkpointed']


def checkpointed(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, of which autograd keeps the input alone.

    The second forward pass leaves the running statistics of batch normalisation as the first one left them: they are
    those of training without checkpoints, and so are the gradients of modules that compute with them in train mode,
    as the Diverse Branch Block does.
    """
    if torch.compiler.is_compiling():  # where what is computed again moves nothing
        return checkpoint(module, x, use_reentrant=False)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _resting_statistics(module)

    return checkpoint(module, x, use_reentrant=False, context_fn=contexts)


@contextmanager
def _resting_statistics(module: nn.Module) -> Iterator[None]:
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    momenta = [norm.momentum for norm in norms]
    counts = [None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone() for norm in norms]
    for norm in norms:
        if norm.momentum is None:
            norm.num_batches_tracked.fill_(2**62)  # to the mean of so many batches, one more adds nothing
        else:
            norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, count in zip(norms, momenta, counts, strict=True):
            norm.momentum = momentum
            if count is not None:
                norm.num_batches_tracked.copy_(count)
