"""The re-parameterization family: training-time blocks of the literature that fold into the same 3x3 convolution."""

from __future__ import annotations

import functools
from collections.abc import Callable

from ..blocks import ReparamBlock, RepVGGBlock
from ..variants import suggestion
from .block import FamilyBlock
from .members import MEMBERS, Member
from .recognition import blocks_with_keys

__all__ = ['BLOCKS', 'MEMBERS', 'FamilyBlock', 'Member', 'block_type', 'blocks_with_keys']

BLOCKS = ('repvgg', *MEMBERS)
"""The names that `block=` takes."""


def block_type(name: str) -> Callable[..., ReparamBlock]:
    """What makes blocks of a name; raises `ValueError` that names the nearest one."""
    if name == 'repvgg':
        return RepVGGBlock
    if isinstance(name, str) and name in MEMBERS:
        return functools.partial(FamilyBlock, member=name)
    raise ValueError(f'unknown block {name!r};{suggestion(str(name), BLOCKS)} it can be: {", ".join(BLOCKS)}')
