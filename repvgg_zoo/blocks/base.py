"""The base class of RepVGG's blocks: constructor, both forms of the forward pass, loading."""

# no `from __future__ import annotations`: graphs of torch.fx could not be scripted

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from ..checkpoints.errors import CheckpointError
from ..reparam.fold import FoldError, KernelBias
from ..reparam.switch import switch_to_deploy
from .branch_sum import BranchSum
from .branches import ConvSpec

__all__ = ['ReparamBlock']


class ReparamBlock(BranchSum):
    """act(attn(sum of branches)) to train, act(attn(3x3 · x + b)) to deploy.

    It maps `(N, C_in, H, W)` to `(N, C_out, H / stride, W / stride)`, rounded up. A block is of the deploy form if its
    `reparam_conv` is a convolution, and of the training form if that is None.
    """

    conv_name = 'reparam_conv'
    if TYPE_CHECKING:  # TorchScript does not take the annotations
        identity: nn.Module | None
        block: str

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
        **block_options: Any,
    ) -> None:
        """Make the branches, or for `deploy` the convolution.

        Args:
            in_chs: Number of input channels.
            out_chs: Number of output channels.
            stride: Stride of the convolution.
            dilation: Dilation of the convolution.
            groups: Groups of the convolution.
            padding_mode: Padding mode of `nn.Conv2d`.
            identity: Make the identity branch, if the block type has one. By default it is made if input and output
                have one shape. A dilated first block of a stage has none.
            deploy: Make the deploy form.
            attn_layer: Makes the attention for a number of channels, such as timm's `SEModule`.
            attn_last: Put the attention behind the activation, as RepVGGplus has it.
            act_layer: Makes the activation.
            norm_layer: Makes batch normalisation for a number of channels.
            drop_path_rate: Rate of stochastic depth. It drops all branches except the identity, and has no effect
                without an identity.
            drop_block: Makes the DropBlock.
            device: Device of the tensors.
            dtype: Dtype of the parameters.
            block_options: Options of the subclass.

        Raises:
            ValueError: An identity branch is asked for, and input and output differ in shape.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        conv_options: dict[str, Any] = dict(stride=stride, dilation=dilation, groups=groups, padding_mode=padding_mode)
        self.has_identity = _has_identity(in_chs, out_chs, stride, asked=identity)
        spec = ConvSpec(
            in_chs=in_chs,
            out_chs=out_chs,
            has_identity=self.has_identity,
            norm_layer=norm_layer,
            dd=dd,
            **conv_options,
        )
        norm: Any = norm_layer(out_chs, device='meta')
        self.norm_eps: float = norm.eps
        self.made_with = functools.partial(
            type(self), in_chs, out_chs, norm_layer=norm_layer, **conv_options, **block_options
        )
        self.reparam_conv = spec.conv(bias=True) if deploy else None
        has_identity = self._make_branches(None if deploy else spec, **block_options)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate and has_identity else nn.Identity()
        self.drop_block = nn.Identity() if drop_block is None or deploy else drop_block()
        self.attn = nn.Identity() if attn_layer is None else attn_layer(out_chs, **dd)
        self.attn_last = attn_last
        self.act = act_layer(inplace=True)
        self.quantizer: nn.Module | None = None
        self.register_load_state_dict_pre_hook(_fold_what_is_loaded)

    @torch.jit.unused
    def _make_branches(self, spec: ConvSpec | None, *args: Any, **block_options: Any) -> bool:
        """Set the attributes of `branch_names`, to None if `spec` is None; return True if there is an identity."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Run the block in its present form."""
        y: Tensor | None = None
        if self.quantizer is not None:
            y = self.quantizer(x, self)
        elif self.reparam_conv is not None:
            y = self.reparam_conv(x)
        else:
            if not torch.jit.is_scripting():
                y = self.run_folded(x)
            if y is None:
                y = self.run_branches(x)
        if self.attn_last:
            return self.attn(self.act(y))
        return self.act(self.attn(y))

    @torch.jit.ignore
    def switch_to_deploy(self, *, verify: Tensor | None = None) -> 'ReparamBlock':
        """Fold the branches into one convolution, in place; see `repvgg_zoo.switch_to_deploy`."""
        return switch_to_deploy(self, verify=verify)

    @torch.jit.ignore
    def reparameterize(self) -> 'ReparamBlock':
        """`switch_to_deploy()` by timm's name."""
        return self.switch_to_deploy()

    @torch.jit.ignore
    def equivalent_kernel_bias(self, dtype: torch.dtype | None = None) -> KernelBias:
        """Compute the convolution that the block is in eval mode; see `BranchSum.equivalent_kernel_bias`.

        In the deploy form it is the kernel and the bias of the convolution.
        """
        if self.reparam_conv is None:
            return super().equivalent_kernel_bias(dtype)
        weight, bias = self.reparam_conv.weight, self.reparam_conv.bias
        if bias is None:
            bias = weight.new_zeros(len(weight))
        return (weight, bias) if dtype is None else (weight.to(dtype), bias.to(dtype))

    @torch.jit.ignore
    def input_convs(self) -> list[str]:
        """Return paths of the convolutions that read the block's input and hold their kernel, in either form.

        Convolutions that compute their kernel from parameters are left out.
        """
        return super().input_convs() if self.reparam_conv is None else [self.conv_name]

    @torch.jit.unused
    def drops(self) -> tuple[nn.Module, ...]:
        """Return stochastic depth and DropBlock."""
        return self.drop_path, self.drop_block

    @torch.jit.unused
    def is_deploy(self) -> bool:
        """Tell whether the block is of the deploy form."""
        return isinstance(self.reparam_conv, nn.Conv2d)

    @torch.jit.unused
    def fold_state_dict(self, state_dict: dict[str, Any], prefix: str = '') -> None:
        """Replace the block's training-form weights in a state dict by their fold.

        The branches may be those of this block's type or of the default type. A state dict without branches of the
        block stays as it is.

        Args:
            state_dict: Weights of a model, changed in place. The branches are released, so the fold needs memory only
                for one block.
            prefix: Path of the block in the state dict, with a dot at its end.

        Raises:
            CheckpointError: The weights are of another block type, or incomplete.
            FoldError: A running variance is negative, or a value is not finite.
        """
        own = {k.removeprefix(prefix): value for k, value in state_dict.items() if k.startswith(prefix)}
        path = prefix.removesuffix('.')
        try:
            form = self._training_form_of(own)
        except ValueError as error:
            raise CheckpointError(f'block {path!r}: {error}') from error
        if form is None:
            return
        try:
            held = {k: v for k, v in own.items() if k.split('.')[0] in form.branch_names}
            form.load_state_dict({k: self._widened(v) for k, v in held.items() if SPLIT_BN not in k}, assign=True)
            form.check_foldable()
        except FoldError as error:
            raise FoldError(f'cannot fold block {path!r}: {error}') from None
        except RuntimeError as error:
            raise CheckpointError(f'block {path!r}: no {form.block} block in the weights: {error}') from error
        conv = form.folded_conv()
        del own
        for key in held:
            del state_dict[prefix + key]
        state_dict.update({f'{prefix}{self.conv_name}.{name}': value for name, value in conv.state_dict().items()})

    @torch.jit.unused
    def _widened(self, value: Tensor) -> Tensor:
        """A tensor in the block's dtype if that is wider: half-precision weights are folded first and rounded last."""
        dtype = next(p for p in self.parameters() if p.ndim == 4).dtype
        return value.to(torch.promote_types(value.dtype, dtype)) if value.is_floating_point() else value

    @torch.jit.unused
    def _training_form_of(self, own: Mapping[str, Tensor]) -> 'ReparamBlock | None':
        """Make a block on the meta device for the branches of a state dict; return None if it holds none."""
        raise NotImplementedError


SPLIT_BN = '.aux_bn.'
"""Part of the keys of timm's split normalisation that only training uses."""


def _fold_what_is_loaded(block: ReparamBlock, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Fold training-form weights that are loaded into the deploy form, wherever the block stands in a model."""
    if block.reparam_conv is not None:
        block.fold_state_dict(state_dict, prefix)
    elif f'{prefix}{block.conv_name}.weight' in state_dict:
        raise CheckpointError(
            'deploy-form weights do not go into a training-form model as they are: the branches cannot be told from '
            'their sum; create the model with deploy=True, or load with unfold=True'
        )


def _has_identity(in_chs: int, out_chs: int, stride: int, *, asked: bool | None) -> bool:
    """Tell whether a block may have an identity branch: `asked` decides, and by default the shapes do."""
    fits = in_chs == out_chs and stride == 1
    if asked and not fits:
        raise ValueError(
            f'an identity branch needs as many output as input channels and stride 1; here are {in_chs} to {out_chs} '
            f'channels and stride {stride}; leave identity out'
        )
    return fits if asked is None else asked
