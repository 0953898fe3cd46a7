"""The block of every type except the default one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .base import ReparamBlock
from .block_types import BLOCK_TYPES
from .branches import Branch, ConvSpec
from .repvgg_block import repvgg_form_of

__all__ = ['MultiBranchBlock']


class MultiBranchBlock(ReparamBlock):
    """act(attn(BN(sum of branches))) to train, act(attn(3x3 · x + b)) to deploy.

    The option `block` is a name of `BLOCK_TYPES`. That table has the branches, and tells if their sum is normalised.
    Shapes and all other arguments are those of `ReparamBlock`.

    Example:
        >>> block = MultiBranchBlock(8, 8, block='acb')
        >>> list(block.branches)
        ['kxk', 'kx1', '1xk']
        >>> block.eval().switch_to_deploy().reparam_conv.kernel_size
        (3, 3)
    """

    branch_names = ('branches', 'identity', 'norm')
    if TYPE_CHECKING:
        branches: Any  # an `nn.ModuleDict` of branches; in the deploy form None
        identity: Branch | None

    @torch.jit.unused
    def _make_branches(self, spec: ConvSpec | None, *, block: str) -> bool:
        self.block = block
        kind = BLOCK_TYPES[block]
        branches = {name: b for name, b in (kind.branches(spec) if spec else {}).items() if b is not None}
        self.identity = branches.pop('identity', None)
        self.branches = nn.ModuleDict(branches) if spec else None
        self.norm = spec.norm() if spec and kind.norm_after else None
        return self.identity is not None

    def run_branches(self, x: Tensor) -> Tensor:
        images = [branch(x) for branch in self.branches.values()]
        y = images[0]
        for image in images[1:]:
            y = y + image
        y = self.drop_block(y)
        if self.identity is not None:
            y = self.drop_path(y) + self.identity(x)
        if self.norm is not None:
            y = self.norm(y)
        return y

    @torch.jit.unused
    def named_branches(self) -> dict[str, Branch]:
        return {**self.branches} | ({} if self.identity is None else {'identity': self.identity})

    @torch.jit.unused
    def branch_norms(self) -> list[nn.Module]:
        return [norm for branch in self.named_branches().values() for norm in branch.norms()]

    @torch.jit.unused
    def _training_form_of(self, own: Mapping[str, Tensor]) -> ReparamBlock | None:
        if not any(key.startswith('branches.') for key in own):
            return repvgg_form_of(own, self)
        in_chs, out_chs = self.made_with.args
        widths = [value.shape[1] for value in own.values() if value.ndim == 4]
        if widths and not self.has_identity:
            # a stem may have been trained with another number of input channels; inner kernels have more
            in_chs = min(widths) * self.made_with.keywords['groups']
        form = self.made_with
        return form.func(in_chs, out_chs, **form.keywords, identity=self.has_identity, device='meta')
