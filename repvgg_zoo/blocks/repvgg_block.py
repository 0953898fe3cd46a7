"""The RepVGG block, with timm's keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .base import ReparamBlock
from .branches import Branch, ConvBranch, ConvSpec, IdentityBranch

__all__ = ['RepVGGBlock', 'repvgg_form_of']


class RepVGGBlock(ReparamBlock):
    """act(attn(BN(3x3 · x) + BN(1x1 · x) + BN(x))) to train, act(attn(3x3 · x + b)) to deploy.

    arXiv 2101.03697, figure 4 and section 3.3. Shapes and arguments are those of `ReparamBlock`.

    Example:
        >>> import torch
        >>> block = RepVGGBlock(8, 16, stride=2)
        >>> block(torch.ones(2, 8, 32, 32)).shape
        torch.Size([2, 16, 16, 16])
    """

    block = 'repvgg'
    branch_names = ('conv_kxk', 'conv_1x1', 'identity')
    if TYPE_CHECKING:  # in the deploy form all three are None
        conv_kxk: ConvBranch
        conv_1x1: ConvBranch
        identity: nn.Module | None

    @torch.jit.unused
    def _make_branches(self, spec: ConvSpec | None) -> bool:
        self.norm = None
        self.identity = spec.norm() if spec and spec.has_identity else None
        for name, kernel_size in (('conv_kxk', 3), ('conv_1x1', 1)):
            setattr(self, name, ConvBranch.of(spec, kernel_size) if spec else None)
        return self.identity is not None

    def run_branches(self, x: Tensor) -> Tensor:
        y = self.conv_1x1(x) + self.drop_block(self.conv_kxk(x))
        if self.identity is not None:
            y = self.drop_path(y) + self.identity(x)
        return y

    @torch.jit.unused
    def named_branches(self) -> dict[str, Branch]:
        branches: dict[str, Branch] = {'conv_kxk': self.conv_kxk, 'conv_1x1': self.conv_1x1}
        if self.identity is not None:  # as in timm, a norm of its own
            conv = self.conv_kxk.conv
            branches['identity'] = IdentityBranch(conv.in_channels, conv.groups, self.identity)
        return branches

    @torch.jit.unused
    def branch_norms(self) -> list[nn.Module]:
        norms = [self.conv_kxk.bn, self.conv_1x1.bn, self.identity]
        return [norm for norm in norms if norm is not None]

    @torch.jit.unused
    def _training_form_of(self, own: Mapping[str, Tensor]) -> RepVGGBlock | None:
        return repvgg_form_of(own, self._training_form.keywords)


def repvgg_form_of(own: Mapping[str, Tensor], options: Mapping[str, Any]) -> RepVGGBlock | None:
    """Make a RepVGG block on the meta device for the branches of a state dict; return None if it holds none.

    Args:
        own: State dict of a block. It decides the number of channels.
        options: Options of the block that the weights are for. Only `groups` and `norm_layer` count.
    """
    kernel = own.get('conv_kxk.conv.weight')
    if kernel is None:
        return None
    return RepVGGBlock(
        kernel.shape[1] * options['groups'],
        kernel.shape[0],
        groups=options['groups'],
        norm_layer=options['norm_layer'],
        identity='identity.running_var' in own,
        device='meta',
    )
