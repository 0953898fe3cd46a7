"""What other code bases call the parts of their RepVGG blocks."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ['BLOCK_NAMES', 'MMPRETRAIN', 'OFFICIAL', 'OFFICIAL_PLUS', 'TIMM', 'BlockNames']


class BlockNames(NamedTuple):
    """What one code base calls the parts of a RepVGG block; the branches hold `conv` and `norm`."""

    conv_kxk: str
    conv_1x1: str
    identity: str
    reparam_conv: str
    norm: str
    squeeze: str
    excite: str


TIMM = BlockNames('conv_kxk', 'conv_1x1', 'identity', 'reparam_conv', 'bn', 'attn.fc1', 'attn.fc2')
OFFICIAL = BlockNames('rbr_dense', 'rbr_1x1', 'rbr_identity', 'rbr_reparam', 'bn', 'se.down', 'se.up')
OFFICIAL_PLUS = OFFICIAL._replace(squeeze='post_se.down', excite='post_se.up')
MMPRETRAIN = BlockNames(
    'branch_3x3', 'branch_1x1', 'branch_norm', 'branch_reparam', 'norm', 'se_layer.conv1.conv', 'se_layer.conv2.conv'
)

BLOCK_NAMES = (TIMM, OFFICIAL, MMPRETRAIN)
"""The names by which a block's branches are found in a module, ours first."""
