"""Sizes of a variant, counted from its architecture without allocating its weights."""

from __future__ import annotations

from dataclasses import replace

import torch

from repvgg_zoo import RepVGG, Variant
from repvgg_zoo.tools.benchmark.cases import forward_gmacs

__all__ = ['count_gmacs', 'count_params']


def count_params(variant: Variant, *, deploy: bool, num_classes: int = 1000) -> int:
    """Parameters of one form, without auxiliary heads."""
    model = RepVGG(variant, deploy=deploy, num_classes=num_classes, device='meta')
    return sum(parameter.numel() for parameter in model.parameters())


def count_gmacs(variant: Variant, *, input_px: int, num_classes: int = 1000) -> float:
    """Multiply-adds of the deploy form for one square image, in 1e9.

    The fused convolutions and the classifier count. Squeeze-excite, 0.02 % at the most, does not: the
    published figures leave it out.
    """
    model = RepVGG(replace(variant, se=None), deploy=True, num_classes=num_classes, device='meta').eval()
    return forward_gmacs(model, torch.empty(1, model.in_chans, input_px, input_px, device='meta'))
