"""The weight decay of the paper and of the official code, for timm's and torch's optimizers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.multi_branch import MultiBranchBlock
from ..blocks.repvgg_block import RepVGGBlock
from ..reparam.fold import BNStats

__all__ = ['equivalent_kernel_l2', 'param_groups']


def param_groups(model: nn.Module, *, decay_kernels: bool = True) -> list[dict[str, Any]]:
    """Parameter groups of the paper's weight decay (arXiv 2101.03697, section 4.1).

    None on biases and on the normalisation of the convolution branches; the scales of the identity
    branches decay. For timm's factory: `create_optimizer_v2(model, opt, lr, weight_decay,
    param_group_fn=repvgg_zoo.param_groups)`; the first group takes the optimizer's weight decay.

    Args:
        decay_kernels: Leave out the kernels of both convolution branches if false, for use with
            `equivalent_kernel_l2`.
    """
    kernels = {id(kernel) for block in _training_blocks(model) for kernel in _kernels(block)}
    identities = {id(norm.weight) for norm in _identity_norms(model)}
    decayed, others = [], []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        is_kernel = id(parameter) in kernels
        decays = decay_kernels if is_kernel else id(parameter) in identities or parameter.ndim > 1
        (decayed if decays else others).append(parameter)
    return [{'params': decayed}, {'params': others, 'weight_decay': 0.0}]


def equivalent_kernel_l2(model: nn.Module) -> Tensor:
    """Squared L2 norm of the kernels that the two convolution branches are equivalent to, a scalar.

    The sum over blocks of Σ (K3 off the centre)² + Σ (s3 K3_centre + s1 K1)² / (s3² + s1²) with
    s = γ / sqrt(σ² + ε) of each branch taken as a constant, so that it compares to plain weight decay. Add
    `weight_decay / 2` times it to the loss, with `param_groups(model, decay_kernels=False)`. An option of
    the official code, whose README calls it insignificant and deprecated.
    """
    terms = []
    for block in _training_blocks(model):
        kernel_3x3, kernel_1x1 = _kernels(block)
        scale_3x3, scale_1x1 = (
            BNStats.of(branch.bn).scale_shift(kernel_3x3.dtype)[0].detach().view(-1, 1, 1)
            for branch in (block.conv_kxk, block.conv_1x1)
        )
        centre = kernel_3x3[:, :, 1, 1]
        terms.append(kernel_3x3.square().sum() - centre.square().sum())
        equivalent = scale_3x3[..., 0] * centre + scale_1x1[..., 0] * kernel_1x1[:, :, 0, 0]
        terms.append((equivalent.square() / (scale_3x3**2 + scale_1x1**2)[..., 0]).sum())
    if not terms:
        raise ValueError(
            f'no block with the two convolution branches of RepVGG in {type(model).__name__}; of other blocks of the '
            'training form, take equivalent_kernel_bias()'
        )
    return torch.stack(terms).sum()


def _identity_norms(model: nn.Module) -> Iterator[nn.Module]:
    for block in model.modules():
        if isinstance(block, RepVGGBlock) and block.identity is not None:
            yield block.identity
        elif isinstance(block, MultiBranchBlock) and getattr(block.identity, 'bn', None) is not None:
            yield block.identity.bn


def _training_blocks(model: nn.Module) -> list[RepVGGBlock]:
    return [m for m in model.modules() if isinstance(m, RepVGGBlock) and m.reparam_conv is None]


def _kernels(block: RepVGGBlock) -> tuple[Tensor, Tensor]:
    return block.conv_kxk.conv.weight, block.conv_1x1.conv.weight
