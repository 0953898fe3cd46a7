"""Optimizers that hold replaced parameters fail instead of training nothing."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ['forget_replaced', 'remember_replaced']

_replaced = WeakIdKeyDictionary()
"""Each replaced parameter, and the id of the gradient that it had when it was replaced."""


def remember_replaced(parameters: Iterable[Tensor]) -> None:
    """Make `step()` of an optimizer that holds one of these replaced parameters raise an error.

    Frozen parameters do not count, because an optimizer does not train them anyway. Parameters that get a new gradient
    after they were replaced do not count, because another model still uses them.
    """
    _register()
    _replaced.update((p, id(p.grad)) for p in parameters if p.requires_grad)


def forget_replaced(parameters: Iterable[Tensor]) -> None:
    """Undo `remember_replaced` for parameters that are in use again."""
    for parameter in parameters:
        _replaced.pop(parameter, None)


@cache
def _register() -> None:
    register_optimizer_step_pre_hook(_refuse_replaced)


def _refuse_replaced(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    held = [parameter for group in optimizer.param_groups for parameter in group['params']]
    stale = sum(p in _replaced and (p.grad is None or id(p.grad) == _replaced[p]) for p in held)
    if stale:
        raise RuntimeError(
            f'{stale} of the {len(held)} parameters of this {type(optimizer).__name__} were replaced by '
            'switch_to_deploy(), unfold() or overparameterize(), so it would train nothing; make a new one from '
            'model.parameters()'
        )
