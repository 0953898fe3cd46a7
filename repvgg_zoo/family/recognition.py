"""Which training-time blocks a state dict is of, by its keys."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

from .block import SPLIT_BN, FamilyBlock
from .members import MEMBERS

__all__ = ['blocks_with_keys']

_BLOCK = re.compile(r'^(?:stem|stages\.\d+\.\d+)\.')


def blocks_with_keys(keys: Iterable[str]) -> list[str]:
    """The members whose branches have the keys of a training-form state dict in timm's layout, if it is of any.

    More than one where blocks differ in their first values alone; none if it is of the default block, or of no block
    that is known.
    """
    held = _modules(_BLOCK.sub('', key) for key in keys if _BLOCK.match(key) and SPLIT_BN not in key)
    return [name for name, modules in _modules_of_members().items() if modules == held]


@functools.cache
def _modules_of_members() -> dict[str, frozenset[str]]:
    return {name: _modules(FamilyBlock(2, 2, member=name, device='meta').state_dict()) for name in MEMBERS}


def _modules(keys: Iterable[str]) -> frozenset[str]:
    """Paths within a block of all modules of its branches that have keys."""
    return frozenset(key.rpartition('.')[0] for key in keys if key.startswith(FamilyBlock.folded_parts))
