"""Look up block types by name, and by the keys of a state dict."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable

from ..variants import suggestion
from .base import SPLIT_BN, ReparamBlock
from .block_types import BLOCK_TYPES, BRANCH_TYPES
from .multi_branch import MultiBranchBlock
from .repvgg_block import RepVGGBlock

__all__ = ['BLOCKS', 'block_type', 'blocks_with_keys']

BLOCKS = tuple(BRANCH_TYPES)
"""The names that `block=` takes.

Example:
    >>> BLOCKS[0]
    'repvgg'
"""


def block_type(name: str) -> Callable[..., ReparamBlock]:
    """Look up the constructor of a block type.

    Args:
        name: A name of `BLOCKS`.

    Returns:
        A callable that takes the arguments of `ReparamBlock`.

    Raises:
        ValueError: There is no block type of that name; the message names the nearest one.

    Example:
        >>> block = block_type('mobileone')(8, 16, stride=2)
        >>> block.has_identity
        False
    """
    if name == 'repvgg':
        return RepVGGBlock
    if isinstance(name, str) and name in BLOCK_TYPES:
        return functools.partial(MultiBranchBlock, block=name)
    raise ValueError(f'unknown block {name!r};{suggestion(str(name), BLOCKS)} it can be: {", ".join(BLOCKS)}')


_BLOCK_PATH = re.compile(r'^(?:stem|stages\.\d+\.\d+)\.')


def blocks_with_keys(keys: Iterable[str]) -> list[str]:
    """Find the block types whose branches have the keys of a training-form state dict in timm's layout.

    Args:
        keys: Keys of a whole model.

    Returns:
        Names of block types. There are several if types differ only in their initial values, and none if no type has
        these keys.

    Example:
        >>> blocks_with_keys(['stem.conv_kxk.conv.weight'])
        ['repvgg']
    """
    parts = [_BLOCK_PATH.sub('', key) for key in keys if _BLOCK_PATH.match(key) and SPLIT_BN not in key]
    if any(part.startswith('conv_kxk.') for part in parts):
        return ['repvgg']
    held = _branch_modules(parts)
    return [name for name, modules in _branch_modules_by_type().items() if modules == held]


@functools.cache
def _branch_modules_by_type() -> dict[str, frozenset[str]]:
    return {name: _branch_modules(block_type(name)(2, 2, device='meta').state_dict()) for name in BLOCK_TYPES}


def _branch_modules(keys: Iterable[str]) -> frozenset[str]:
    """Return the paths within a block of all modules of its branches that have keys."""
    return frozenset(key.rpartition('.')[0] for key in keys if key.startswith(MultiBranchBlock.branch_names))
