"""The block of every member but the default one, in both forms."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..checkpoints.errors import CheckpointError
from ..reparam.fold import BNStats, FoldError
from .base import ReparamBlock, has_identity
from .block_types import MEMBERS
from .branches import KernelBias, Shape, SqueezeConv, after

__all__ = ['SPLIT_BN', 'FamilyBlock']


class FamilyBlock(ReparamBlock):
    """act(attn(BN(sum of branches))) to train, act(attn(3x3 · x + b)) to deploy.

    `(N, C_in, H, W)` to `(N, C_out, H / stride, W / stride)`, rounded up. `member` names the branches, and whether
    their sum is normalised; see `repvgg_zoo.family.MEMBERS`. The other arguments are those of `RepVGGBlock`;
    stochastic depth has an effect where there is an identity branch, which it leaves.
    """

    folded_parts = ('branches', 'identity', 'norm')

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        *,
        member: str,
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
        super().__init__()
        identity = has_identity(in_chs, out_chs, stride, asked=identity)
        dd = {'device': device, 'dtype': dtype}
        options: dict[str, Any] = dict(stride=stride, dilation=dilation, groups=groups, padding_mode=padding_mode)
        shape = Shape(in_chs=in_chs, out_chs=out_chs, identity=identity, norm_layer=norm_layer, dd=dd, **options)
        self.member = member
        self.has_identity = identity
        self.norm_eps: float = norm_layer(out_chs, device='meta').eps
        self._of_this_shape = functools.partial(
            type(self),
            in_chs=in_chs,
            out_chs=out_chs,
            member=member,
            identity=identity,
            norm_layer=norm_layer,
            **options,
        )
        self.reparam_conv = nn.Conv2d(in_chs, out_chs, 3, padding=dilation, **options, **dd) if deploy else None
        branches = {} if deploy else dict(MEMBERS[member].branches(shape))
        self.identity = branches.pop('identity', None)
        self.branches = None if deploy else nn.ModuleDict(branches)
        self.norm = shape.norm() if MEMBERS[member].norm_after and not deploy else None
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate and self.identity is not None else nn.Identity()
        self.drop_block = nn.Identity() if drop_block is None or deploy else drop_block()
        self.attn = nn.Identity() if attn_layer is None else attn_layer(out_chs, **dd)
        self.attn_last = attn_last
        self.act = act_layer(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        # Read in this order, a switch in another thread cannot make a block compute a part of its branches.
        identity = self.identity
        norm = self.norm
        reparam_conv = self.reparam_conv
        if reparam_conv is not None:
            y = reparam_conv(x)
        else:
            images = [branch(x) for branch in self.branches.values()]
            y = images[0]
            for image in images[1:]:
                y = y + image
            y = self.drop_block(y)
            if identity is not None:
                y = self.drop_path(y) + identity(x)
            if norm is not None:
                y = norm(y)
        if self.attn_last:
            return self.attn(self.act(y))
        return self.act(self.attn(y))

    def _sum_of_kernels(self) -> KernelBias:
        kernels, biases = zip(*(branch.equivalent_kernel_bias() for branch in self.branches.values()), strict=True)
        kernel, bias = sum(kernels), sum(biases)
        if self.identity is not None:
            # which without normalisation has no device and dtype of its own, nor, after pruning, a number of channels
            eye, shift = self.identity.equivalent_kernel_bias(len(kernel))
            kernel, bias = kernel + eye.to(kernel), bias + shift.to(bias)
        return after(kernel, self.norm, bias)

    def _folded(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        if not any(key.startswith('branches.') for key in state_dict):
            return super()._folded(state_dict)
        parts = tuple(f'{part}.' for part in self.folded_parts)
        folded = {key: value for key, value in state_dict.items() if key.startswith(parts)}
        own = {key: value for key, value in folded.items() if SPLIT_BN not in key}
        shape = {}
        kernel = next((value for value in own.values() if value.ndim == 4), None)
        if kernel is not None and not self.has_identity:  # a stem for other images, which is adapted when it is folded
            shape = {'in_chs': kernel.shape[1] * self._of_this_shape.keywords['groups']}
        trained = self._of_this_shape(**shape, device='meta')
        try:
            trained.load_state_dict(own, assign=True)
        except RuntimeError as error:
            raise CheckpointError(f'no {self.member} block, which this one is: {error}') from error
        trained._check_norms()  # all else is as it was made
        conv = trained.folded_conv()
        rest = {key: value for key, value in state_dict.items() if key not in folded}
        return rest | {f'reparam_conv.{name}': value for name, value in conv.state_dict().items()}

    @torch.jit.ignore
    def input_convs(self) -> list[str]:
        chains = [name for name, branch in (self.branches or {}).items() if isinstance(branch, SqueezeConv)]
        inner = tuple(f'branches.{name}.' for name in chains)  # convolutions behind a 1x1 kernel
        return [path for path in super().input_convs() if not path.startswith(inner)]

    @torch.jit.ignore
    def branch_list(self) -> list[nn.Module]:
        """The branches; the first one can have any kernel."""
        return [*self.branches.values()] + ([] if self.identity is None else [self.identity])

    @torch.jit.ignore
    @torch.no_grad()
    def check_foldable(self) -> None:
        """Raise `FoldError` if a normalisation is not linear in eval mode or has no finite statistics, a convolution is
        another one than was made here, or the branches do not fit together.
        """
        self._check_norms()
        for path, made in self._of_this_shape(device='meta').branches.named_modules():
            if isinstance(made, nn.Conv2d) and _geometry(found := self.branches.get_submodule(path)) != _geometry(made):
                raise FoldError(
                    f'its branches.{path} is {found}, where the block was made with {made}; put that back, or create '
                    'the model as it should be (output_stride= dilates)'
                )
        # What parametrizes a kernel may hold tensors that do not go to another device.
        device = {} if any(map(is_parametrized, self.modules())) else {'device': 'meta'}
        try:
            _twin(self, dtype=self._fold_dtype(), **device).equivalent_kernel_bias()
        except RuntimeError as error:
            raise FoldError(f'its branches have no kernel of one shape in {self._fold_dtype()}: {error}') from error

    @torch.jit.ignore
    def _check_norms(self) -> None:
        norms = [
            m for branch in self.branch_list() for path, m in branch.named_modules() if path.split('.')[-1] in _NORMS
        ]
        for norm in norms if self.norm is None else [*norms, self.norm]:
            BNStats.of(norm).check()

    @torch.jit.ignore
    def _fold_dtype(self) -> torch.dtype:
        return torch.float32 if next(self.branches.parameters()).device.type == 'mps' else torch.float64

    @torch.jit.ignore
    @torch.no_grad()
    def folded_conv(self) -> nn.Conv2d:
        """The convolution that the branches are in eval mode: computed in float64, rounded to the block's dtype."""
        like = next(self.branches.parameters())
        conv = self._of_this_shape(deploy=True, device='meta').reparam_conv
        kernel, bias = _twin(self, dtype=self._fold_dtype()).equivalent_kernel_bias()
        layout = torch.channels_last if _is_channels_last(self.branches) else torch.contiguous_format
        kernel = kernel.to(like.dtype).contiguous(memory_format=layout)
        conv.out_channels, conv.in_channels = len(kernel), kernel.shape[1] * conv.groups  # pruning leaves fewer
        requires_grad = any(parameter.requires_grad for parameter in self.branches.parameters() if parameter.ndim > 2)
        conv.weight = nn.Parameter(kernel, requires_grad=requires_grad)
        conv.bias = nn.Parameter(bias.to(like.dtype), requires_grad=requires_grad)
        return conv.train(self.training)


_NORMS = ('bn', 'inner_bn')
SPLIT_BN = '.aux_bn.'
"""In the keys of the further parts of timm's split normalisation, which only training uses."""


def _geometry(conv: nn.Module) -> tuple[Any, ...] | None:
    """What a convolution computes, but for its kernel and the number of its channels, which pruning changes."""
    if not isinstance(conv, nn.Conv2d):
        return None
    window = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    return *window, conv.groups, conv.padding_mode, conv.bias is None


def _twin(module: nn.Module, **to: Any) -> Any:
    """A module with tensors of its own, of another dtype or device; all else is shared, since hooks and the like may
    not be copied.

    Kernels that are computed, as pruning leaves them, are plain attributes.
    """

    def converted(values: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: value.detach().to(**to, copy=True)
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for name, value in values.items()
        }

    twin = type(module).__new__(type(module))
    twin.__dict__ |= converted(module.__dict__) | {
        '_parameters': converted(module._parameters),
        '_buffers': converted(module._buffers),
        '_modules': {name: None if child is None else _twin(child, **to) for name, child in module._modules.items()},
    }
    return twin


def _is_channels_last(branches: nn.Module) -> bool:
    kernels = [p for p in branches.parameters() if p.ndim == 4 and p.shape[2:] == (3, 3) and p.shape[1] > 1]
    return bool(kernels) and all(k.is_contiguous(memory_format=torch.channels_last) for k in kernels)
