"""The base class of all blocks: constructor, both forms of the forward pass, fold, loading."""

# no `from __future__ import annotations`: graphs of torch.fx could not be scripted

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from .._compat import has_hooks
from ..checkpoints.errors import CheckpointError
from ..reparam.fold import (
    ConvBN,
    FoldError,
    KernelBias,
    check_norm,
    check_result,
    exact_dtype,
    fold_branches,
    fold_exactly,
)
from ..reparam.geometry import GATHER, Geometry, agreed, build_conv
from ..reparam.kernel_hooks import computes_kernel, refresh_kernels
from ..reparam.switch import switch_to_deploy
from .branches import BRANCHES, CONVOLUTIONS, Branch, ConvSpec
from .fast_paths import (
    DROPS,
    MIN_OUTPUT_PIXELS,
    NORMS,
    can_fold,
    full_precision,
    is_fixed_norm,
    is_stochastic,
    moves_statistics,
    runs_plainly,
)

__all__ = ['ReparamBlock']


class ReparamBlock(nn.Module):
    """act(attn(sum of branches)) to train, act(attn(3x3 · x + b)) to deploy.

    It maps `(N, C_in, H, W)` to `(N, C_out, H / stride, W / stride)`, rounded up. A block is of the deploy form if its
    `reparam_conv` is a convolution, and of the training form if that is None.
    """

    branch_names: tuple[str, ...] = ()
    conv_name = 'reparam_conv'
    if TYPE_CHECKING:  # TorchScript does not take the annotations
        norm: nn.Module | None
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
        self.register_load_state_dict_pre_hook(_fold_what_is_loaded)

    @torch.jit.unused
    def _make_branches(self, spec: ConvSpec | None, *args: Any, **block_options: Any) -> bool:
        """Set the attributes of `branch_names`, to None if `spec` is None; return True if there is an identity."""
        raise NotImplementedError

    def run_branches(self, x: Tensor) -> Tensor:
        """Run the branches one by one, add their outputs, and normalise the sum if the block type does."""
        raise NotImplementedError

    @torch.jit.unused
    def named_branches(self) -> dict[str, Branch]:
        """Return the branches of the training form by name. The first one can have any kernel."""
        raise NotImplementedError

    @torch.jit.unused
    def branch_norms(self) -> list[nn.Module]:
        """Return the normalisation layers inside the branches."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Run the block in its present form."""
        y: Tensor | None = None
        if self.reparam_conv is not None:
            y = self.reparam_conv(x)
        else:
            if not torch.jit.is_scripting():
                y = self._run_folded(x)
            if y is None:
                y = self.run_branches(x)
        if self.attn_last:
            return self.attn(self.act(y))
        return self.act(self.attn(y))

    @torch.jit.unused
    def _run_folded(self, x: Tensor) -> Tensor | None:
        """Compute the sum of the branches by one convolution; return None if they must run one by one."""
        if type(x) is not Tensor or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return None
        if x.dim() != 4 or x.shape[0] * x.shape[2] * x.shape[3] < MIN_OUTPUT_PIXELS:
            return None
        try:
            if any(map(moves_statistics, self.branch_norms())) or not (runs_plainly(x) and self._runs_as_written()):
                return None
            geometry = self.geometry()
        except (FoldError, AttributeError, TypeError):  # changed by hand
            return None
        rows, columns = geometry.stride or (1, 1)
        pixels = x.shape[0] * -(-x.shape[2] // rows) * -(-x.shape[3] // columns)
        branches, drops = self.named_branches().values(), (self.drop_path, self.drop_block)
        if pixels < MIN_OUTPUT_PIXELS or not can_fold(branches, _PLAIN) or any(map(is_stochastic, drops)):
            return None
        norm = self.norm
        like = next(p for branch in branches for p in branch.parameters() if p.ndim == 4)
        with full_precision(self):
            kernel, bias = self.sum_of_branches(torch.promote_types(like.dtype, torch.float32))
            if norm is not None and is_fixed_norm(norm):
                kernel, bias = fold_branches([ConvBN(kernel, bias, norm)], kernel.dtype)
                norm = None
        y = _convolve(x, kernel.to(like.dtype), bias.to(like.dtype), geometry)
        if self.identity is not None:  # under autocast the identity keeps the dtype of the input, and so does the sum
            y = y.to(torch.promote_types(y.dtype, x.dtype))
        return y if norm is None else norm(y)

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
        """Compute the convolution that the block is in eval mode from its parameters and running statistics.

        The result is differentiable, for regularisation, pruning and quantization. In the deploy form it is the
        kernel and the bias of the convolution.

        Args:
            dtype: Dtype of the computation. By default it is that of the parameters, and at least float32.

        Returns:
            The kernel `(C_out, C_in / groups, 3, 3)` and the bias `(C_out,)`.

        Raises:
            FoldError: The branches are no convolution, or do not fit together.

        Example:
            >>> from repvgg_zoo import RepVGGBlock
            >>> kernel, bias = RepVGGBlock(8, 8).equivalent_kernel_bias()
            >>> kernel.shape, bias.shape, kernel.requires_grad
            (torch.Size([8, 8, 3, 3]), torch.Size([8]), True)
        """
        if self.reparam_conv is not None:
            weight, bias = self.reparam_conv.weight, self.reparam_conv.bias
            if bias is None:
                bias = weight.new_zeros(len(weight))
            return (weight, bias) if dtype is None else (weight.to(dtype), bias.to(dtype))
        refresh_kernels(self)
        if dtype is None:
            dtype = torch.promote_types(next(p for p in self.parameters() if p.ndim == 4).dtype, torch.float32)
        with full_precision(self):
            kernel, bias = self.sum_of_branches(dtype)
            return (kernel, bias) if self.norm is None else fold_branches([ConvBN(kernel, bias, self.norm)], dtype)

    @torch.jit.unused
    def sum_of_branches(self, dtype: torch.dtype) -> KernelBias:
        """Compute the convolution that the branches are in eval mode, before `norm`."""
        return fold_branches(self._conv_bns(dtype), dtype)

    @torch.jit.unused
    def _conv_bns(self, dtype: torch.dtype) -> list[ConvBN]:
        first, *others = self.named_branches().values()
        main = first.conv_bn(dtype)
        return [main, *(branch.conv_bn(dtype, main.kernel) for branch in others)]

    @torch.jit.ignore
    def input_convs(self) -> list[str]:
        """Return paths of the convolutions that read the block's input and hold their kernel, in either form.

        Convolutions that compute their kernel from parameters are left out.
        """
        if self.reparam_conv is not None:
            return [self.conv_name]
        paths = {module: path for path, module in self.named_modules()}
        branches = [branch for branch in self.named_branches().values() if branch in paths]
        return [f'{paths[branch]}.{conv}' for branch in branches for conv in branch.input_convs()]

    # The fold protocol, `reparam.switch.Foldable`.

    @torch.jit.unused
    def is_deploy(self) -> bool:
        """Tell whether the block is of the deploy form."""
        return isinstance(self.reparam_conv, nn.Conv2d)

    @torch.jit.unused
    def needs_proof(self) -> bool:
        """Tell whether a hook, a patch or an unknown class may change what the sum of the branches is."""
        if not self._runs_as_written() or any(type(drop) not in DROPS for drop in (self.drop_path, self.drop_block)):
            return True
        parts = [*self.named_branches().values(), *([] if self.norm is None else [self.norm])]
        for path, module in ((path, module) for part in parts for path, module in part.named_modules()):
            if 'parametrizations' in path.split('.'):  # they only compute a kernel, which the fold reads
                continue
            is_known = type_before_parametrizations(module) in (*_PLAIN, *NORMS)
            if not is_known or has_hooks(module, ignore=computes_kernel):
                return True
        return False

    @torch.jit.unused
    def _runs_as_written(self) -> bool:
        """Tell whether `forward` is that of this package: a subclass or an instance may have another one.

        Wrappers such as `fully_shard` derive a class and leave the methods.
        """
        kind: Any = type(self)
        written: Any = next(cls for cls in kind.__mro__ if 'branch_names' in vars(cls))
        is_kept = kind.forward is written.forward and kind.run_branches is written.run_branches
        return is_kept and 'run_branches' not in vars(self)

    @torch.jit.unused
    @torch.no_grad()
    def check_foldable(self) -> None:
        """Raise `FoldError` if the branches are no convolution, do not fit together, or hold values out of range."""
        refresh_kernels(self)
        self.geometry()
        for norm in (*self.branch_norms(), self.norm):
            check_norm(norm)
        kernel = next(
            (p for branch in self.named_branches().values() for p in branch.parameters() if p.ndim == 4), None
        )
        if kernel is None:
            raise FoldError(f'no kernel is among its parameters; if they are sharded over processes, {GATHER}')
        with full_precision(self):
            check_result(self._conv_bns(exact_dtype(kernel)), kernel.dtype, self.norm)

    @torch.jit.unused
    def geometry(self) -> Geometry:
        """Return the geometry that all branches share; raise `FoldError` if they do not fit together."""
        geometries = {}
        for name, branch in self.named_branches().items():
            if not isinstance(branch, Branch):
                raise FoldError(
                    f'its {name} is a {type(branch).__name__}, which is no branch; put back the branch that it replaced'
                )
            try:
                geometries[name] = branch.geometry()
            except FoldError as error:
                raise FoldError(f'in its {name}, {error}') from None
        return agreed(geometries)

    @torch.jit.unused
    @torch.no_grad()
    def folded_conv(self) -> nn.Conv2d:
        """Make the convolution that the branches are in eval mode: computed in float64, rounded to their dtype."""
        kernels = [p for branch in self.named_branches().values() for p in branch.parameters() if p.ndim == 4]
        with full_precision(self):
            kernel, bias = fold_exactly(self._conv_bns(exact_dtype(kernels[0])), self.norm)
        layout = torch.channels_last if _is_channels_last(kernels) else torch.contiguous_format
        kernel = kernel.to(kernels[0].dtype).contiguous(memory_format=layout)
        branches = self.named_branches().values()
        bias = bias.to(kernels[0].dtype)
        return build_conv(kernel, bias, self.geometry(), replaced=branches, training=self.training)

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

_PLAIN = (*CONVOLUTIONS, *BRANCHES, nn.Identity)
"""Classes that the fold knows, except norms."""


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


def _convolve(x: Tensor, kernel: Tensor, bias: Tensor, geometry: Geometry) -> Tensor:
    dilation, padding = geometry.dilation_and_padding(kernel)
    if geometry.padding_mode not in (None, 'zeros'):
        x = F.pad(x, [padding[1], padding[1], padding[0], padding[0]], geometry.padding_mode)
        padding = (0, 0)
    return F.conv2d(x, kernel, bias, geometry.stride or 1, padding, dilation, geometry.groups or 1)


def _is_channels_last(kernels: Iterable[Tensor]) -> bool:
    large = [k for k in kernels if k.shape[2:] == (3, 3) and k.shape[1] > 1]
    return bool(large) and all(k.is_contiguous(memory_format=torch.channels_last) for k in large)
