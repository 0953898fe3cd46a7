"""The weight decay of the paper and of the official code, for timm's and torch's optimizers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.multi_branch import MultiBranchBlock
from ..blocks.repvgg_block import RepVGGBlock
from ..reparam.fold import norm_scale

__all__ = ['equivalent_kernel_l2', 'param_groups']


def param_groups(model: nn.Module, *, decay_kernels: bool = True) -> list[dict[str, Any]]:
    """Split the parameters of a model for the paper's weight decay (arXiv 2101.03697, section 4.1).

    Kernels, linear layers and the scales of the identity branches decay. Biases and the normalisation of the
    convolution branches do not.

    Args:
        model: Any module. Parameters that require no gradient are left out.
        decay_kernels: Let the kernels of both convolution branches of RepVGG blocks decay. Pass False to regularise
            them by `equivalent_kernel_l2` instead.

    Returns:
        Two parameter groups. The first takes the weight decay of the optimizer, the second has none.

    Example:
        >>> import timm, repvgg_zoo
        >>> from timm.optim import create_optimizer_v2
        >>> model = timm.create_model('test_repvgg')
        >>> optimizer = create_optimizer_v2(
        ...     model, 'sgd', lr=0.1, weight_decay=1e-4, param_group_fn=repvgg_zoo.param_groups
        ... )
        >>> [group['weight_decay'] for group in optimizer.param_groups]
        [0.0001, 0.0]
    """
    kernels = {id(kernel) for block in _training_blocks(model) for kernel in _kernels(block)}
    identities = {id(norm.weight) for norm in _identity_norms(model)}
    decayed: list[Tensor] = []
    others: list[Tensor] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        is_kernel = id(parameter) in kernels
        decays = decay_kernels if is_kernel else id(parameter) in identities or parameter.ndim > 1
        (decayed if decays else others).append(parameter)
    return [{'params': decayed}, {'params': others, 'weight_decay': 0.0}]


def equivalent_kernel_l2(model: nn.Module) -> Tensor:
    """Sum the squares of the kernels that the two convolution branches of each RepVGG block are equivalent to.

    The sum over blocks of Σ (K3 off the centre)² + Σ (s3 · K3_centre + s1 · K1)² / (s3² + s1²). K3 and K1 are the
    kernels of both branches, and s = γ / sqrt(σ² + ε) is the scale of each. The division makes the sum comparable to
    that of plain weight decay. The scales count as constants and get no gradient.

    This is an option of the official code. Its README calls the gain insignificant and the option deprecated.

    Args:
        model: A module with RepVGG blocks of the training form.

    Returns:
        A scalar. Add `weight_decay / 2` times it to the loss, and take `param_groups(model, decay_kernels=False)`.

    Raises:
        ValueError: No block has both convolution branches.

    Example:
        >>> import timm, repvgg_zoo
        >>> model = timm.create_model('test_repvgg')
        >>> penalty = 1e-4 / 2 * repvgg_zoo.equivalent_kernel_l2(model)
        >>> penalty.shape, penalty.requires_grad
        (torch.Size([]), True)
    """
    terms = []
    for block in _training_blocks(model):
        kernel_3x3, kernel_1x1 = _kernels(block)
        scale_3x3, scale_1x1 = (
            norm_scale(branch.bn, kernel_3x3).detach().view(-1, 1) for branch in (block.conv_kxk, block.conv_1x1)
        )
        centre = kernel_3x3[:, :, 1, 1]
        terms.append(kernel_3x3.square().sum() - centre.square().sum())
        equivalent = scale_3x3 * centre + scale_1x1 * kernel_1x1[:, :, 0, 0]
        terms.append((equivalent.square() / (scale_3x3**2 + scale_1x1**2)).sum())
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
        elif isinstance(block, MultiBranchBlock) and (norm := getattr(block.identity, 'bn', None)) is not None:
            yield norm


def _training_blocks(model: nn.Module) -> list[RepVGGBlock]:
    return [m for m in model.modules() if isinstance(m, RepVGGBlock) and m.reparam_conv is None]


def _kernels(block: RepVGGBlock) -> tuple[Tensor, Tensor]:
    return block.conv_kxk.conv.weight, block.conv_1x1.conv.weight
