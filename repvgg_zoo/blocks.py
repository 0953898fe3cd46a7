"""What all blocks share, and the RepVGG block, in both forms."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from . import deploy as _deploy
from .branches import ConvNorm, full_precision, refresh_kernels, subsample, sum_branches
from .checkpoints import CheckpointError, fold_state_dict
from .reparam import BNStats, FoldError, fold_block

__all__ = ['RepVGGBlock', 'ReparamBlock', 'has_identity']


class ReparamBlock(nn.Module):
    """A block that is a sum of branches to train and one 3x3 convolution, `reparam_conv`, to deploy.

    `has_identity` tells whether the training form has an identity branch, if it is of a kind that knows one.
    """

    @torch.jit.ignore
    def switch_to_deploy(self, *, verify: Tensor | None = None) -> 'ReparamBlock':
        """Fold the branches into one convolution, in place; see `repvgg_zoo.switch_to_deploy`."""
        return _deploy.switch_to_deploy(self, verify=verify)

    @torch.jit.ignore
    def reparameterize(self) -> 'ReparamBlock':
        """`switch_to_deploy()` by timm's name."""
        return self.switch_to_deploy()

    @torch.jit.ignore
    def equivalent_kernel_bias(self) -> tuple[Tensor, Tensor]:
        """Kernel `(C_out, C_in / groups, 3, 3)` and bias `(C_out,)` of the convolution that the block is in eval mode.

        A differentiable function of the parameters and running statistics, in their dtype, float32 at least (of a
        block of the deploy form, its convolution's own): for regularisation, pruning and quantization.
        """
        if self.reparam_conv is not None:
            return self.reparam_conv.weight, self.reparam_conv.bias
        refresh_kernels(self)
        with full_precision(self):
            return self._sum_of_kernels()

    def _sum_of_kernels(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _folded(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """This block's own state dict with the fold of the branches, if they are there, in their place.

        Those of the default block go into the deploy form of any.
        """
        return fold_state_dict(state_dict, eps=self.norm_eps)

    @torch.jit.ignore
    def fold_state_dict(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Replace this block's branches, if they are there, by their fold."""
        own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        try:
            folded = self._folded(own)
        except (CheckpointError, FoldError) as error:
            raise type(error)(f'block {prefix.removesuffix(".")!r}: {error}') from error
        for key in own.keys() - folded.keys():
            del state_dict[prefix + key]
        state_dict.update({prefix + key: value for key, value in folded.items()})

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Mapping[str, Any], *args: Any
    ) -> None:
        """Fold training weights that are loaded into the deploy form, wherever the block stands."""
        if self.reparam_conv is not None:
            self.fold_state_dict(state_dict, prefix)
        elif f'{prefix}reparam_conv.weight' in state_dict:
            raise CheckpointError(
                'deploy-form weights do not go into a training-form model as they are: the branches cannot be told '
                'from their sum; create the model with deploy=True, or load with unfold=True'
            )
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)


def has_identity(in_chs: int, out_chs: int, stride: int, *, asked: bool | None = None) -> bool:
    """Whether a block has an identity branch: where input and output have one shape, unless it is asked for none."""
    fits = in_chs == out_chs and stride == 1
    if asked and not fits:
        raise ValueError(
            f'an identity branch takes as many channels as it gives, and stride 1; here are {in_chs} to {out_chs} '
            f'channels and stride {stride}'
        )
    return fits if asked is None else asked


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
