"""The max-norm constraint, with which networks without shortcuts become deeper."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

__all__ = ['max_norm']


def max_norm(optimizer: torch.optim.Optimizer, model: nn.Module, limit: float) -> RemovableHandle:
    """Keep the weights of each output channel within a norm, after every step of an optimizer.

    The constraint is that of Srivastava et al. (Dropout, 2014, section 5.1): ‖w‖₂ ≤ limit for the incoming weights of a
    unit. Oyedotun et al. ("Why is everyone training very deep neural network with skip connections?", 2021) train deep
    networks without shortcuts with it and with `act_layer='leaky_relu'`. Kernels and linear layers are limited; biases
    and norms are not. Behind a norm, the limit changes no output: it keeps the steps large relative to the weights.

    Args:
        optimizer: Any optimizer.
        model: The model that it trains. Of a RepVGG in the training form, each branch is limited for itself.
        limit: Largest norm. 3 to 4 is usual without norms.

    Returns:
        A handle; its `remove()` ends the constraint.

    Raises:
        ValueError: The limit is not above 0.

    Example:
        >>> import timm, torch, repvgg_zoo
        >>> model = timm.create_model('test_repvgg', block='plain', act_layer='leaky_relu')
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> handle = repvgg_zoo.max_norm(optimizer, model, 0.5)
        >>> model(torch.ones(2, 3, 32, 32)).sum().backward()
        >>> optimizer.step()
        >>> bool(model.stem.branches.kxk.conv.weight.flatten(1).norm(dim=1).max() < 0.5001)
        True
    """
    if not limit > 0:
        raise ValueError(f'limit is {limit}; it takes a number above 0')
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.ndim > 1]

    @torch.no_grad()
    def constrain(*_: Any) -> None:
        for weight in weights:
            weight.copy_(weight.renorm(p=2, dim=0, maxnorm=limit))

    return optimizer.register_step_post_hook(constrain)
