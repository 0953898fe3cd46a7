"""The interface of branches, and two views of their kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...reparam.fold import (
    ConvBN,
    KernelBias,
    fold_branches,
    identity_kernel,
)
from ...reparam.geometry import Geometry

__all__ = ['Branch', 'diagonal', 'per_group']


class Branch(nn.Module):
    """The interface of branches. The methods are differentiable, and change nothing."""

    if TYPE_CHECKING:  # TorchScript does not take the annotation
        bn: nn.Module | None

    def geometry(self) -> Geometry:
        """Return the geometry of the branch; raise `FoldError` if it is no convolution."""
        raise NotImplementedError

    def conv_bn(self, dtype: torch.dtype, like: Tensor | None = None) -> ConvBN:
        """Describe the branch in eval mode as one convolution and the normalisation behind it.

        Args:
            dtype: Dtype of a kernel that is computed; one that is a parameter stays as it is.
            like: Kernel of another branch. Without normalisation an identity has no device of its own, and pruning
                changes its width, so it takes both from this kernel.

        Returns:
            A kernel no larger than that of the block, a bias or None, and the normalisation or None.
        """
        raise NotImplementedError

    @torch.jit.unused
    def equivalent_kernel_bias(self, dtype: torch.dtype, like: Tensor | None = None) -> KernelBias:
        """Compute the convolution that the branch is in eval mode; the arguments are those of `conv_bn`."""
        return fold_branches([self.conv_bn(dtype, like)], dtype)

    def set_kernel(self, kernel: Tensor) -> None:
        """Set the parameters so that the equivalent kernel is `kernel`, or as near as the structure allows."""
        raise NotImplementedError

    def norms(self) -> list[nn.Module]:
        """Return the normalisation layers of the branch."""
        return [] if self.bn is None else [self.bn]

    def input_convs(self) -> list[str]:
        """Return paths of the convolution modules that read the input and hold their kernel."""
        return []


def diagonal(kernel: Tensor, groups: int) -> Tensor:
    """Return the centre tap of each output channel for its own input channel, `(C_out,)`."""
    eye = identity_kernel(kernel.shape[0], kernel.shape[1] * groups, groups, kernel.dtype, kernel.device)
    row, column = kernel.shape[2] // 2, kernel.shape[3] // 2
    return (kernel[:, :, row, column] * eye[:, :, 0, 0]).sum(1)


def per_group(kernel: Tensor, groups: int) -> Tensor:
    """View `(C_out, …)` as `(groups, C_out / groups, …)`."""
    return kernel.unflatten(0, (groups, kernel.shape[0] // groups))
