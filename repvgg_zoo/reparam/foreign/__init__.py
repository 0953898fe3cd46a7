"""What other code bases call the parts of their re-parameterizable blocks; no other file has such names."""

from .known_blocks import KNOWN_BLOCKS, KnownBlock
from .repvgg_blocks import (
    BLOCK_NAMES,
    MMPRETRAIN,
    MULTI_BRANCH_KEY,
    OFFICIAL,
    OFFICIAL_PLUS,
    TIMM,
    BlockNames,
    ForeignBlock,
)

__all__ = [
    'BLOCK_NAMES',
    'KNOWN_BLOCKS',
    'MMPRETRAIN',
    'MULTI_BRANCH_KEY',
    'OFFICIAL',
    'OFFICIAL_PLUS',
    'TIMM',
    'BlockNames',
    'ForeignBlock',
    'KnownBlock',
]
