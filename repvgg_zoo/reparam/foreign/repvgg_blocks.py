"""The names that code bases give to the parts of a RepVGG block, and an adapter to the fold protocol."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import nn

from ..fold import ConvBN, check_norm, check_result, fold_exactly, identity_kernel
from ..geometry import Geometry, agreed, build_conv, check_is_plain_conv, geometry_of
from ..kernel_hooks import refresh_kernels

__all__ = [
    'BLOCK_NAMES',
    'MMPRETRAIN',
    'MULTI_BRANCH_KEY',
    'OFFICIAL',
    'OFFICIAL_PLUS',
    'TIMM',
    'BlockNames',
    'ForeignBlock',
]


class BlockNames(NamedTuple):
    """The names that one code base gives to the parts of a RepVGG block. A branch holds `conv` and `norm`."""

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

MULTI_BRANCH_KEY = re.compile(r'(?:^|\.)branches\.\d*[a-z]')
"""Matches keys of this package's multi-branch blocks: their branches have names, not numbers."""

BLOCK_NAMES = (TIMM, OFFICIAL, MMPRETRAIN)
"""The names by which a block's parts are found in a module."""


class ForeignBlock:
    """Adapts a RepVGG block of timm, of the official code or of mmpretrain to the protocol `switch.Foldable`."""

    def __init__(self, block: nn.Module, names: BlockNames) -> None:
        self.module = block
        self.names = names
        self.branch_names: tuple[str, ...] = (names.conv_kxk, names.conv_1x1, names.identity)
        self.conv_name = names.reparam_conv

    @classmethod
    def of(cls, module: nn.Module) -> ForeignBlock | None:
        """Adapt a module that has the parts of a block, in either form; return None for any other module.

        Only its own children count: a wrapper that passes attributes on is not the block inside it.
        """
        children = dict(module.named_children())
        for names in BLOCK_NAMES:
            branches = (children.get(names.conv_kxk), children.get(names.conv_1x1))
            trains = all(isinstance(b, nn.Module) and _has(b, 'conv') and _has(b, names.norm) for b in branches)
            if trains or isinstance(children.get(names.reparam_conv), nn.Conv2d):
                return cls(module, names)
        return None

    def is_deploy(self) -> bool:
        return isinstance(dict(self.module.named_children()).get(self.conv_name), nn.Conv2d)

    def needs_proof(self) -> bool:
        """Return True, because code of others decides what `forward` does with the parts."""
        return True

    @torch.no_grad()
    def check_foldable(self) -> None:
        refresh_kernels(self.module)
        for name, conv, norm in self._convolutions():
            check_is_plain_conv(conv, f'{name}.conv')
            check_norm(norm)
        check_norm(self._identity())
        branches = self._branches(self.geometry())
        check_result(branches, branches[0].kernel.dtype)

    def geometry(self) -> Geometry:
        geometries = {name: geometry_of(conv) for name, conv, _ in self._convolutions()}
        first = next(iter(geometries.values()))
        if self._identity() is not None:
            geometries[self.names.identity] = Geometry(
                in_chs=first.out_chs, out_chs=first.in_chs, stride=(1, 1), inset=(0, 0)
            )
        return agreed(geometries)

    @torch.no_grad()
    def folded_conv(self) -> nn.Conv2d:
        geometry = self.geometry()
        branches = self._branches(geometry)
        kernel, bias = fold_exactly(branches)
        like = branches[0].kernel
        convs = [conv for _, conv, _ in self._convolutions()]
        kernel, bias = kernel.to(like.dtype), bias.to(like.dtype)
        return build_conv(kernel, bias, geometry, replaced=convs, training=self.module.training)

    def _branches(self, geometry: Geometry) -> list[ConvBN]:
        branches = [ConvBN(conv.weight, conv.bias, norm) for _, conv, norm in self._convolutions()]
        if (identity := self._identity()) is not None:
            like, groups = branches[0].kernel, geometry.groups or 1
            in_chs = like.shape[1] * groups
            branches.append(
                ConvBN(identity_kernel(len(like), in_chs, groups, torch.float32, like.device), None, identity)
            )
        return branches

    def _convolutions(self) -> list[tuple[str, nn.Conv2d, nn.Module]]:
        branches = [(name, getattr(self.module, name)) for name in self.branch_names[:2]]
        return [(name, branch.conv, getattr(branch, self.names.norm)) for name, branch in branches]

    def _identity(self) -> nn.Module | None:
        return getattr(self.module, self.names.identity, None)


def _has(module: nn.Module, name: str) -> bool:
    return any(child == name for child, _ in module.named_children())
