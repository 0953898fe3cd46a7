"""Stand-ins for the objects in a torch file that are no tensors: its weights are read, and none of its code runs.

Trainers write more than weights: numbers of NumPy, paths, configurations of yacs and omegaconf, histories of mmengine.
Their classes may be missing here, and running their code is what `weights_only=True` is there to prevent. So a class in
a file becomes a class of that name without any behaviour.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

__all__ = ['stand_ins']


class _Nothing:
    """Takes any arguments and any state, and keeps none of them."""

    def __new__(cls, *_: Any, **__: Any) -> _Nothing:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


class _EmptyCounter:
    """Makes an empty `Counter`: of what torch lets a file fill, the class that takes both items and attributes."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return Counter()


class _EmptyList:
    """Makes an empty list, because torch lets a file append to nothing else."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return []


_WITHOUT_ITEMS = ('numpy.', 'functools.', 'pathlib.')
"""Modules whose objects hold no items, but may be filled with a tuple, or be keys, which a `Counter` cannot."""


def stand_ins(names: Iterable[str]) -> list[type]:
    """Make stand-ins for classes and functions, for `torch.serialization.safe_globals`.

    Args:
        names: Full names, like 'yacs.config.CfgNode'. None has to be installed.

    Returns:
        Classes of these names.

    Example:
        >>> [stand_in] = stand_ins(['yacs.config.CfgNode'])
        >>> stand_in, stand_in('any', 'arguments')
        (<class 'yacs.config.CfgNode'>, Counter())
    """
    parts = [(name, *name.rpartition('.')[::2]) for name in names]
    return [type(last, (_kind(name),), {'__module__': module}) for name, module, last in parts]


def _kind(name: str) -> type:
    if name == 'collections.deque':
        return _EmptyList
    return _Nothing if name.startswith(_WITHOUT_ITEMS) else _EmptyCounter
