"""The re-parameterizable blocks of other networks: one row of a table each."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from ..fold import ConvBN, fold_branches
from ..geometry import agreed, build_conv, check_is_plain_conv, geometry_of

__all__ = ['KNOWN_BLOCKS', 'KnownBlock']


class KnownBlock(NamedTuple):
    """How blocks of one kind are recognised and folded, while they are of the training form."""

    name: str
    """Who has such blocks."""
    parts: tuple[str, ...]
    """Paths inside the block, in the order of its children. All are there, and no `nn.Identity`, only before the fold.
    The first one that has channels reads the input."""
    fold: str | Callable[[Any], nn.Module]
    """A method of the block, which folds it in place or returns what replaces it; or a function that does."""
    class_suffix: str = ''
    """How the name of the class ends, where parts and method do not tell enough."""
    reads_features: bool = False
    """The block reads `(N, C)`."""
    min_px: int = 0
    """The smallest input, in pixels, that the block runs on."""

    def matches(self, module: nn.Module) -> bool:
        """Tell whether a module is a block of this kind, of the training form."""
        kind: Any = type(module)
        if not kind.__name__.endswith(self.class_suffix):
            return False
        if isinstance(self.fold, str) and not callable(getattr(kind, self.fold, None)):
            return False
        names = [name for name, _ in module.named_children()]
        starts = list(dict.fromkeys(path.split('.')[0] for path in self.parts))
        return [name for name in names if name in starts] == starts and all(_is_there(module, p) for p in self.parts)


def _is_there(module: nn.Module, path: str) -> bool:
    try:
        part = module.get_submodule(path)
    except AttributeError:
        return False
    return not isinstance(part, nn.Identity)


def _fold_sum_of_two(block: Any) -> nn.Module:
    """act(conv1(x) + conv2(x)), for which transformers has no method; the names are those of the official RT-DETR."""
    layers = {name: getattr(block, name) for name in ('conv1', 'conv2')}
    for name, layer in layers.items():
        check_is_plain_conv(layer.conv, f'{name}.conv')
    geometry = agreed({name: geometry_of(layer.conv) for name, layer in layers.items()})
    branches = [ConvBN(layer.conv.weight, layer.conv.bias, layer.norm) for layer in layers.values()]
    kernel, bias = fold_branches(branches, torch.float64)
    conv = build_conv(kernel, bias, geometry, replaced=[], training=False)
    return nn.Sequential(OrderedDict(conv=conv, activation=block.activation))


KNOWN_BLOCKS = (
    KnownBlock('MobileOne, FastViT', ('conv_kxk.0.conv',), 'reparameterize'),
    KnownBlock('FastViT: token mixer', ('norm.identity', 'mixer.conv_kxk'), 'reparameterize'),
    KnownBlock('FastViT: large kernel', ('large_conv.conv',), 'reparameterize'),
    KnownBlock('FastViT: position encoding', ('pos_enc',), 'reparameterize'),
    KnownBlock('PP-LCNetV2', ('dw_conv_list.0.conv',), 'reparameterize'),
    KnownBlock('GhostNetV3: module', ('primary_rpr_conv.0.conv', 'cheap_rpr_conv.0.conv'), 'reparameterize'),
    KnownBlock('GhostNetV3: bottleneck', ('ghost1', 'dw_rpr_conv.0.conv'), 'reparameterize'),
    KnownBlock('RepGhost', ('primary_conv', 'fusion_bn.0', 'cheap_operation.0'), 'reparameterize'),
    KnownBlock('NextViT: convolution block', ('patch_embed', 'mhca', 'norm', 'mlp.fc1'), 'reparameterize'),
    KnownBlock('NextViT: transformer block', ('patch_embed', 'norm1', 'e_mhsa', 'norm2'), 'reparameterize', min_px=16),
    KnownBlock('EfficientViM', ('dwconv1.norm', 'dwconv2.norm'), 'fuse'),
    KnownBlock('EfficientViM: layer', ('conv', 'norm'), 'fuse'),
    KnownBlock('RepViT: token mixer', ('conv.c', 'conv1'), 'fuse'),
    KnownBlock('RepViT, iFormer: classifier', ('head_drop', 'head.bn'), 'fuse', reads_features=True),
    KnownBlock('iFormer: position encoding', ('cpe.module.c',), 'fuse'),
    KnownBlock('SHViT: residual', ('m.c', 'm.bn'), 'fuse'),
    KnownBlock('RepViT, SHViT, iFormer: layer', ('c', 'bn'), 'fuse'),
    KnownBlock('RepViT, SHViT, iFormer: classifier', ('bn', 'l'), 'fuse', reads_features=True),
    KnownBlock('TinyViT, EfficientViT-MSRA: layer', ('conv', 'bn'), 'fuse'),
    KnownBlock('LeViT: layer', ('linear', 'bn'), 'fuse'),
    KnownBlock('LeViT, EfficientViT-MSRA: classifier', ('bn', 'linear'), 'fuse', reads_features=True),
    KnownBlock(
        'RT-DETR, D-FINE and kin in transformers',
        ('conv1.conv', 'conv1.norm', 'conv2.conv', 'conv2.norm', 'activation'),
        _fold_sum_of_two,
        class_suffix='RepVggBlock',
    ),
)
"""Rows of blocks that contain blocks of other rows have more parts; the first row that matches counts."""
