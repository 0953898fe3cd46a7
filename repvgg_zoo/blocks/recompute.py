"""A block's branches in training, with two thirds of the memory that autograd would keep for them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ['train_branches']

_aten = torch.ops.aten


def train_branches(x: Tensor, conv_3x3: nn.Conv2d, conv_1x1: nn.Conv2d, norms: list[nn.BatchNorm2d]) -> Tensor:
    """BN(3x3 · x) + BN(1x1 · x) + BN(x) with the statistics of the batch, which move the running ones.

    `(N, C_in, H, W)` to `(N, C_out, H / stride, W / stride)`, rounded up. `norms` are those of the 3x3, the 1x1
    and, where there is one, the identity branch; the stride is that of `conv_3x3`. Autograd keeps the input, which
    is the output of the block before, and the output of the 3x3 convolution. That of the 1x1 convolution is
    computed again in the backward pass: a ninth of the work of the other one, paid for by the memory that is
    neither written nor read.
    """
    affine = [parameter for norm in norms for parameter in (norm.weight, norm.bias)]
    return _Branches.apply(_Constants(conv_3x3, norms), x, conv_3x3.weight, conv_1x1.weight, *affine)


class _Constants(NamedTuple):
    """What the branches compute with that has no gradient."""

    conv: nn.Conv2d
    norms: list[nn.BatchNorm2d]
    """Of the 3x3, the 1x1 and, where there is one, the identity branch."""

    def conv_3x3(self, x: Tensor, kernel: Tensor) -> Tensor:
        return F.conv2d(x, kernel, None, self.conv.stride, self.conv.padding, self.conv.dilation, self.conv.groups)

    def conv_1x1(self, x: Tensor, kernel: Tensor) -> Tensor:
        return F.conv2d(self.subsampled(x), kernel, None, groups=self.conv.groups)

    def subsampled(self, x: Tensor) -> Tensor:
        """A view of the pixels that the 1x1 branch reads."""
        vertical, horizontal = self.conv.stride
        return x if vertical == horizontal == 1 else x[:, :, ::vertical, ::horizontal]  # vmap takes no alias


class _Branches(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, constants: _Constants, x: Tensor, kernel_3x3: Tensor, kernel_1x1: Tensor, *affine: Tensor
    ) -> Tensor:
        y_3x3 = constants.conv_3x3(x, kernel_3x3)
        y = constants.conv_1x1(x, kernel_1x1)
        gammas, betas = affine[::2], affine[1::2]
        statistics = [_batch_statistics(norm, t) for norm, t in zip(constants.norms, (y_3x3, y, x), strict=False)]
        scales = [gamma * inv_std for gamma, (_, inv_std) in zip(gammas, statistics, strict=True)]
        shift = sum(beta - mean * scale for beta, scale, (mean, _) in zip(betas, scales, statistics, strict=True))
        y = torch.addcmul(_per_channel(shift), y, _per_channel(scales[1]), out=y)
        for branch, scale in zip((y_3x3, x), scales[::2], strict=False):
            y.addcmul_(branch, _per_channel(scale))
        ctx.constants = constants
        ctx.save_for_backward(y_3x3, x, kernel_3x3, kernel_1x1, *affine, *(s for pair in statistics for s in pair))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast('cpu', enabled=False):  # which PyTorch's own backward functions do not see either
            return _grads(ctx, grad)


def _grads(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    y_3x3, *tensors = ctx.saved_tensors
    constants, branches = ctx.constants, len(ctx.constants.norms)
    inputs, statistics = tensors[: 3 + 2 * branches], tensors[3 + 2 * branches :]
    if torch.is_grad_enabled():
        return None, *_differentiable_grads(constants, inputs, ctx.needs_input_grad[1:], grad)
    x, kernel_3x3, kernel_1x1, *affine = inputs
    needs_x, needs_3x3, needs_1x1 = ctx.needs_input_grad[1:4]

    def through_norm(branch: int, y: Tensor) -> Tensor:
        """The gradient before a normalisation; those of its parameters go to `affine_grads`."""
        mean, inv_std = statistics[2 * branch : 2 * branch + 2]
        grad_y, *grads = _aten.native_batch_norm_backward(
            grad, y, affine[2 * branch], None, None, mean, inv_std, True, constants.norms[branch].eps, [True] * 3
        )
        affine_grads.extend(grads)
        return grad_y

    affine_grads: list[Tensor] = []
    conv = constants.conv
    grad_x, grad_3x3, _ = _aten.convolution_backward(
        through_norm(0, y_3x3), x, kernel_3x3, None, conv.stride, conv.padding, conv.dilation, False, (0, 0),
        conv.groups, (needs_x, needs_3x3, False),
    )  # fmt: skip
    grad_pixels, grad_1x1, _ = _aten.convolution_backward(
        through_norm(1, constants.conv_1x1(x, kernel_1x1)), constants.subsampled(x), kernel_1x1, None, (1, 1),
        (0, 0), (1, 1), False, (0, 0), conv.groups, (needs_x, needs_1x1, False),
    )  # fmt: skip
    if needs_x:
        constants.subsampled(grad_x).add_(grad_pixels)
    if branches == 3:
        grad_identity = through_norm(2, x)
        if needs_x:
            grad_x.add_(grad_identity)
    return None, grad_x, grad_3x3, grad_1x1, *affine_grads


def _batch_statistics(norm: nn.BatchNorm2d, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(σ² + ε) of the batch, both `(C,)`; the running statistics are moved as `norm(y)` does it."""
    norm.num_batches_tracked.add_(1)
    mean, var = torch.batch_norm_update_stats(y, norm.running_mean, norm.running_var, norm.momentum)
    return mean, (var + norm.eps).rsqrt_()


def _per_channel(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


def _differentiable_grads(
    constants: _Constants, inputs: list[Tensor], needed: tuple[bool, ...], grad: Tensor
) -> list[Tensor | None]:
    """Gradients that can be differentiated again, for `create_graph=True`: those of the branches themselves."""
    inputs = [t.view_as(t) for t in inputs]  # one of them may be a function of another one, or be it
    x, kernel_3x3, kernel_1x1, *affine = inputs
    outputs = constants.conv_3x3(x, kernel_3x3), constants.conv_1x1(x, kernel_1x1), x
    total = sum(
        F.batch_norm(y, None, None, gamma, beta, training=True, eps=norm.eps)
        for y, norm, gamma, beta in zip(outputs, constants.norms, affine[::2], affine[1::2], strict=False)
    )
    grads = iter(
        torch.autograd.grad(total, [t for t, n in zip(inputs, needed, strict=True) if n], grad, create_graph=True)
    )
    return [next(grads) if n else None for n in needed]
