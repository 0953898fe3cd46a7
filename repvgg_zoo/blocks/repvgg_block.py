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
    if TYPE_CHECKING:  # a convolution branch, another one, and a norm; in the deploy form None
        conv_kxk: Any
        conv_1x1: Any
        identity: nn.Module | None

    @torch.jit.unused
    def _make_branches(self, spec: ConvSpec | None) -> bool:
        self.norm = None
        self.identity = spec.norm() if spec and spec.has_identity else None
        self.conv_kxk = ConvBranch.of(spec) if spec else None
        self.conv_1x1 = ConvBranch.of(spec, (1, 1)) if spec else None
        return self.identity is not None

    def run_branches(self, x: Tensor) -> Tensor:
        y = self.conv_1x1(x) + self.drop_block(self.conv_kxk(x))
        if self.identity is not None:
            y = self.drop_path(y) + self.identity(x)
        return y

    @torch.jit.unused
    def named_branches(self) -> dict[str, Branch]:
        branches: dict[str, Branch] = {'conv_kxk': self.conv_kxk, 'conv_1x1': self.conv_1x1}
        if self.identity is not None:  # as in timm, only a norm
            conv = self.conv_kxk.conv  # if it is no convolution, `geometry` refuses it
            chs, groups = getattr(conv, 'in_channels', 0), getattr(conv, 'groups', 1)
            branches['identity'] = IdentityBranch(chs, groups, self.identity)
        return branches

    @torch.jit.unused
    def branch_norms(self) -> list[nn.Module]:
        norms = [self.conv_kxk.bn, self.conv_1x1.bn, self.identity]
        return [norm for norm in norms if norm is not None]

    @torch.jit.unused
    def _training_form_of(self, own: Mapping[str, Tensor]) -> RepVGGBlock | None:
        return repvgg_form_of(own, self)


def repvgg_form_of(own: Mapping[str, Tensor], block: ReparamBlock) -> RepVGGBlock | None:
    """Make a RepVGG block on the meta device for the branches of a state dict; return None if it holds none.

    The weights may be of another network, which is told later: their shapes count, not those of the block.

    Args:
        own: State dict of a block.
        block: The block that they are for.

    Raises:
        ValueError: An identity branch is missing or too many.
    """
    kernel = own.get('conv_kxk.conv.weight')
    if kernel is None:
        return None
    if kernel.ndim != 4:
        raise ValueError(f'the kernel of its conv_kxk has the shape {tuple(kernel.shape)}, which is none of a kernel')
    (in_chs, out_chs), options = block.made_with.args, block.made_with.keywords
    shape, has_identity = (kernel.shape[0], kernel.shape[1] * options['groups']), 'identity.running_var' in own
    if has_identity != block.has_identity and shape == (out_chs, in_chs):
        raise ValueError(
            f'the weights have {"an" if has_identity else "no"} identity branch, and the block has '
            f'{"one" if block.has_identity else "none"}; take weights of the same architecture'
        )
    return RepVGGBlock(
        shape[1],
        shape[0],
        groups=options['groups'],
        norm_layer=options['norm_layer'],
        identity=has_identity,
        device='meta',
    )
