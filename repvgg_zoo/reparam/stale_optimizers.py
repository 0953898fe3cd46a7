"""Optimizers that hold parameters which a switch of the form replaced fail instead of training nothing."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ['forget_folded', 'remember_folded']

_folded = WeakIdKeyDictionary()


def remember_folded(parameters: Iterable[Tensor]) -> None:
    """From now on, an optimizer that holds one of these parameters of folded branches fails when it is stepped."""
    _register()
    _folded.update((parameter, None) for parameter in parameters)


def forget_folded(parameters: Iterable[Tensor]) -> None:
    """Take it back, for branches that are in use again."""
    for parameter in parameters:
        _folded.pop(parameter, None)


@cache
def _register() -> None:
    register_optimizer_step_pre_hook(_refuse_folded)


def _refuse_folded(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    held = [parameter for group in optimizer.param_groups for parameter in group['params']]
    if folded := sum(parameter in _folded for parameter in held):
        raise RuntimeError(
            f'{folded} of the {len(held)} parameters of this {type(optimizer).__name__} were replaced by '
            'switch_to_deploy() or unfold(), so it would train nothing; make a new one from model.parameters()'
        )
