"""The RepVGG block, in both forms."""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from ..reparam.fold import BNStats, fold_block
from .base import ReparamBlock, has_identity
from .fast_sum import ConvNorm, subsample, sum_branches

__all__ = ['RepVGGBlock']


class RepVGGBlock(ReparamBlock):
    """act(attn(BN(3x3 · x) + BN(1x1 · x) + BN(x))) to train, act(attn(3x3 · x + b)) to deploy.

    `(N, C_in, H, W)` to `(N, C_out, H / stride, W / stride)`, rounded up; arXiv 2101.03697, figure 4 and
    section 3.3. The identity branch exists where input and output have one shape. The form is `deploy`
    if `reparam_conv` is there, and the training form otherwise. `attn_last` puts the squeeze-excite
    behind the activation, as RepVGGplus has it.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        padding_mode: str = 'zeros',
        identity: bool | None = None,
        deploy: bool = False,
        attn_layer: Callable[..., nn.Module] | None = None,
        attn_last: bool = False,
        act_layer: Callable[..., nn.Module] = nn.ReLU,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        drop_path_rate: float = 0.0,
        drop_block: Callable[[], nn.Module] | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """`identity` is decided by the shapes unless given (a dilated first block of a stage has none)."""
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        identity = has_identity(in_chs, out_chs, stride, asked=identity)
        kxk: dict[str, Any] = dict(
            stride=stride, padding=dilation, dilation=dilation, groups=groups, padding_mode=padding_mode
        )
        self.stride = stride
        self.has_identity = identity
        self.norm_eps: float = norm_layer(out_chs, device='meta').eps
        self.reparam_conv = nn.Conv2d(in_chs, out_chs, 3, **kxk, **dd) if deploy else None
        training: dict[str, Any] = dict(norm_layer=norm_layer, **dd)
        self.identity = norm_layer(out_chs, **dd) if identity and not deploy else None
        self.conv_kxk = None if deploy else ConvNorm(in_chs, out_chs, 3, **kxk, **training)
        self.conv_1x1 = None if deploy else ConvNorm(in_chs, out_chs, 1, groups=groups, **training)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate and identity and not deploy else nn.Identity()
        self.drop_block = nn.Identity() if drop_block is None or deploy else drop_block()
        self.attn = nn.Identity() if attn_layer is None else attn_layer(out_chs, **dd)
        self.attn_last = attn_last
        self.act = act_layer(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        # Read before it is known whether they are needed: a switch in another thread puts the convolution in before
        # it takes the branches out, so a block never computes a part of its branches.
        conv_kxk = self.conv_kxk
        conv_1x1 = self.conv_1x1
        identity = self.identity
        reparam_conv = self.reparam_conv
        y: Tensor | None = None
        if reparam_conv is not None:
            y = reparam_conv(x)
        elif not torch.jit.is_scripting():
            y = sum_branches(x, conv_kxk, conv_1x1, identity, drops=(self.drop_block, self.drop_path))
        if y is None:
            y = conv_1x1(subsample(x, self.stride)) + self.drop_block(conv_kxk(x))
            if identity is not None:
                y = self.drop_path(y) + identity(x)
        if self.attn_last:
            return self.attn(self.act(y))
        return self.act(self.attn(y))

    def _sum_of_kernels(self) -> tuple[Tensor, Tensor]:
        kxk, point, identity = self.conv_kxk, self.conv_1x1, self.identity
        wide = torch.promote_types(kxk.conv.weight.dtype, torch.float32)
        return fold_block(
            kxk.conv.weight.to(wide),
            BNStats.of(kxk.bn),
            point.conv.weight.to(wide),
            BNStats.of(point.bn),
            None if identity is None else BNStats.of(identity),
            sum_dtype=wide,
        )
