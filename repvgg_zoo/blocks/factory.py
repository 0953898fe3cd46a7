"""The training-time blocks by name, and which of them a state dict is of."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable

from ..variants import suggestion
from .base import ReparamBlock
from .block_types import MEMBERS
from .multi_branch import SPLIT_BN, FamilyBlock
from .repvgg_block import RepVGGBlock

__all__ = ['BLOCKS', 'block_type', 'blocks_with_keys']

BLOCKS = ('repvgg', *MEMBERS)
"""The names that `block=` takes."""


def block_type(name: str) -> Callable[..., ReparamBlock]:
    """What makes blocks of a name; raises `ValueError` that names the nearest one."""
    if name == 'repvgg':
        return RepVGGBlock
    if isinstance(name, str) and name in MEMBERS:
        return functools.partial(FamilyBlock, member=name)
    raise ValueError(f'unknown block {name!r};{suggestion(str(name), BLOCKS)} it can be: {", ".join(BLOCKS)}')


_BLOCK = re.compile(r'^(?:stem|stages\.\d+\.\d+)\.')


def blocks_with_keys(keys: Iterable[str]) -> list[str]:
    """Find the block types whose branches have the keys of a training-form state dict in timm's layout.

    More than one where block types differ only in their initial values; none if no known type has these keys.
    """
    parts = [_BLOCK.sub('', key) for key in keys if _BLOCK.match(key) and SPLIT_BN not in key]
    if any(part.startswith('conv_kxk.') for part in parts):
        return ['repvgg']
    held = _modules(parts)
    return [name for name, modules in _modules_of_members().items() if modules == held]


@functools.cache
def _modules_of_members() -> dict[str, frozenset[str]]:
    return {name: _modules(FamilyBlock(2, 2, member=name, device='meta').state_dict()) for name in MEMBERS}


def _modules(keys: Iterable[str]) -> frozenset[str]:
    """Paths within a block of all modules of its branches that have keys."""
    return frozenset(key.rpartition('.')[0] for key in keys if key.startswith(FamilyBlock.folded_parts))
