"""A sum of branches that equals one convolution: the engine of every block."""

# no `from __future__ import annotations`: graphs of torch.fx could not be scripted

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from .._compat import has_hooks
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
from ..reparam.geometry import GATHER, Geometry, agreed, build_conv, is_channels_last
from ..reparam.kernel_hooks import computes_kernel, refresh_kernels
from .branches import BRANCHES, CONVOLUTIONS, Branch
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

__all__ = ['BranchSum', 'convolve']


class BranchSum(nn.Module):
    """A sum of branches, which may be normalised. In eval mode it is one convolution with a bias.

    A subclass makes the branches and says how they are added. Everything else follows from their equivalent kernels:
    the convolution itself, its checks, and the fast way to run the branches while their norms are fixed.
    """

    branch_names: tuple[str, ...] = ()
    """The attributes that hold the branches."""
    if TYPE_CHECKING:  # TorchScript does not take the annotation
        norm: nn.Module | None

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

    @torch.jit.unused
    def drops(self) -> tuple[nn.Module, ...]:
        """Return the layers that drop branches in training."""
        return ()

    @torch.jit.unused
    def run_folded(self, x: Tensor) -> Tensor | None:
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
        branches = self.named_branches()
        is_small, is_random = pixels < MIN_OUTPUT_PIXELS, any(map(is_stochastic, self.drops()))
        if is_small or is_random or not can_fold(branches.values(), _PLAIN):
            return None
        norm = self.norm
        like = next(p for branch in branches.values() for p in branch.parameters() if p.ndim == 4)
        with full_precision(self):
            kernel, bias = self.sum_of_branches(torch.promote_types(like.dtype, torch.float32))
            if norm is not None and is_fixed_norm(norm):
                kernel, bias = fold_branches([ConvBN(kernel, bias, norm)], kernel.dtype)
                norm = None
        y = convolve(x, kernel.to(like.dtype), bias.to(like.dtype), geometry)
        if 'identity' in branches:  # under autocast the identity keeps the dtype of the input, and so does the sum
            y = y.to(torch.promote_types(y.dtype, x.dtype))
        return y if norm is None else norm(y)

    @torch.jit.ignore
    def equivalent_kernel_bias(self, dtype: torch.dtype | None = None) -> KernelBias:
        """Compute the convolution that the block is in eval mode from its parameters and running statistics.

        The result is differentiable, for regularisation, pruning and quantization.

        Args:
            dtype: Dtype of the computation. By default it is that of the parameters, and at least float32.

        Returns:
            The kernel `(C_out, C_in / groups, k_h, k_w)` and the bias `(C_out,)`.

        Raises:
            FoldError: The branches are no convolution, or do not fit together.

        Example:
            >>> from repvgg_zoo import RepVGGBlock
            >>> kernel, bias = RepVGGBlock(8, 8).equivalent_kernel_bias()
            >>> kernel.shape, bias.shape, kernel.requires_grad
            (torch.Size([8, 8, 3, 3]), torch.Size([8]), True)
        """
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
        """Return paths of the convolutions that read the input and hold their kernel.

        Convolutions that compute their kernel from parameters are left out.
        """
        paths = {module: path for path, module in self.named_modules()}
        branches = [branch for branch in self.named_branches().values() if branch in paths]
        return [f'{paths[branch]}.{conv}' for branch in branches for conv in branch.input_convs()]

    # The fold protocol, `reparam.switch.Foldable`.

    @torch.jit.unused
    def is_deploy(self) -> bool:
        """Tell whether the branches are folded already."""
        return False

    @torch.jit.unused
    def needs_proof(self) -> bool:
        """Tell whether a hook, a patch or an unknown class may change what the sum of the branches is."""
        if not self._runs_as_written() or any(type(drop) not in DROPS for drop in self.drops()):
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
    def folded_kernel_bias(self) -> KernelBias:
        """Compute kernel and bias of `folded_conv`, to the last bit. The result is differentiable."""
        like = next(p for branch in self.named_branches().values() for p in branch.parameters() if p.ndim == 4)
        with full_precision(self):
            kernel, bias = fold_exactly(self._conv_bns(exact_dtype(like)), self.norm)
        return kernel.to(like.dtype), bias.to(like.dtype)

    @torch.jit.unused
    @torch.no_grad()
    def folded_conv(self) -> nn.Conv2d:
        """Make the convolution that the branches are in eval mode: computed in float64, rounded to their dtype."""
        branches = self.named_branches().values()
        kernels = [p for branch in branches for p in branch.parameters() if p.ndim == 4]
        kernel, bias = self.folded_kernel_bias()
        layout = torch.channels_last if is_channels_last(kernels) else torch.contiguous_format
        kernel = kernel.contiguous(memory_format=layout)
        return build_conv(kernel, bias, self.geometry(), replaced=branches, training=self.training)


_PLAIN = (*CONVOLUTIONS, *BRANCHES, nn.Identity)
"""Classes that the fold knows, except norms."""


def convolve(x: Tensor, kernel: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Convolve `(N, C_in, H, W)` as a geometry says."""
    dilation, padding = geometry.dilation_and_padding(kernel)
    if geometry.padding_mode not in (None, 'zeros'):
        x = F.pad(x, [padding[1], padding[1], padding[0], padding[0]], geometry.padding_mode)
        padding = (0, 0)
    return F.conv2d(x, kernel, bias, geometry.stride or 1, padding, dilation, geometry.groups or 1)
