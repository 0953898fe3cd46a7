"""The members of the family by name: which branches a block is the sum of, and whether it is normalised after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn

from .branches import Average, Conv, Dirac, DOConv, Expand, Identity, Scaled, Shape, SqueezeConv

__all__ = ['MEMBERS', 'Member']


@dataclass(frozen=True, kw_only=True)
class Member:
    """A training-time block; the first branch that it lists is one that can have any kernel."""

    summary: str
    source: str
    branches: Callable[[Shape], Mapping[str, nn.Module | None]]
    """From the convolution that a block stands for to its branches; None where the shape does not admit one."""
    norm_after: bool = False
    """Whether the sum of the branches is normalised, in place of or beside the branches."""


def _identity(shape: Shape, *, norm: bool = True) -> Identity | None:
    return Identity.of(shape, norm=norm) if shape.identity else None


def _delta_orthogonal(shape: Shape) -> Conv:
    """Orthogonal at the centre tap, zero elsewhere (arXiv 1806.05393, section 3.3).

    The norm of any input is kept where there are as many output channels or more.
    """
    conv = Conv.of(shape)
    with torch.no_grad():
        conv.conv.weight.zero_()
        for group in conv.conv.weight.chunk(shape.groups):
            centre = torch.empty_like(group[:, :, 1, 1], dtype=torch.float32)
            group[:, :, 1, 1] = nn.init.orthogonal_(centre).to(group.dtype)
    return conv


_REPVGG = 'ablation of RepVGG, arXiv 2101.03697'

MEMBERS: Mapping[str, Member] = MappingProxyType(
    {
        'plain': Member(
            summary='one 3x3 convolution',
            source=_REPVGG,
            branches=lambda s: {'kxk': Conv.of(s)},
        ),
        'plain_delta': Member(
            summary='one 3x3 convolution, initially delta-orthogonal',
            source='Delta-orthogonal initialisation, arXiv 1806.05393',
            branches=lambda s: {'kxk': _delta_orthogonal(s)},
        ),
        'acb': Member(
            summary='3x3 + 3x1 + 1x3',
            source='ACNet, arXiv 1908.03930',
            branches=lambda s: {'kxk': Conv.of(s), 'kx1': Conv.of(s, (3, 1)), '1xk': Conv.of(s, (1, 3))},
        ),
        'dbb': Member(
            summary='3x3 + 1x1 + 1x1 · 3x3 + 1x1 · average',
            source='Diverse Branch Block, arXiv 2103.13425',
            branches=lambda s: {
                'kxk': Conv.of(s),
                '1x1': Conv.of(s, 1),
                '1x1_kxk': SqueezeConv(s),
                '1x1_avg': Average(s),
            },
        ),
        'dirac': Member(
            summary='diag(a) · I + diag(b) · W / ‖W‖',
            source='DiracNets, arXiv 1706.00388',
            branches=lambda s: {'dirac': Dirac(s)},
        ),
        'doconv': Member(
            summary='depthwise over-parameterised 3x3',
            source='DO-Conv, arXiv 2006.12030',
            branches=lambda s: {'doconv': DOConv(s)},
        ),
        'expand': Member(
            summary='1x1 · 3x3 · 1x1, four times as wide inside',
            source='ExpandNets, arXiv 1811.10495',
            branches=lambda s: {'expand': Expand(s)},
        ),
        'mobileone': Member(
            summary='four times 3x3 + 1x1 + identity',
            source='MobileOne, arXiv 2206.04040',
            branches=lambda s: {
                **{f'kxk_{index}': Conv.of(s) for index in range(4)},
                '1x1': Conv.of(s, 1),
                'identity': _identity(s),
            },
        ),
        'qarepvgg': Member(
            summary='3x3 with BN + 1x1 + identity, BN after the sum',
            source='QARepVGG, arXiv 2212.01593',
            branches=lambda s: {
                'kxk': Conv.of(s),
                '1x1': Conv.of(s, 1, norm=False),
                'identity': _identity(s, norm=False),
            },
            norm_after=True,
        ),
        'csla': Member(
            summary='scales times 3x3 + 1x1 + identity, BN after the sum',
            source='RepOptimizer, arXiv 2205.15242',
            branches=lambda s: {
                'kxk': Scaled(s, 3),
                '1x1': Scaled(s, 1),
                'identity': Scaled(s, 0) if s.identity else None,
            },
            norm_after=True,
        ),
        'no_identity': Member(
            summary='3x3 + 1x1',
            source=_REPVGG,
            branches=lambda s: {'kxk': Conv.of(s), '1x1': Conv.of(s, 1)},
        ),
        'no_1x1': Member(
            summary='3x3 + identity',
            source=_REPVGG,
            branches=lambda s: {'kxk': Conv.of(s), 'identity': _identity(s)},
        ),
        'no_identity_bn': Member(
            summary='3x3 + 1x1 + identity without BN',
            source=_REPVGG,
            branches=lambda s: {'kxk': Conv.of(s), '1x1': Conv.of(s, 1), 'identity': _identity(s, norm=False)},
        ),
        'bn_after': Member(
            summary='3x3 + 1x1 + identity, BN after the sum alone',
            source=_REPVGG,
            branches=lambda s: {
                'kxk': Conv.of(s, norm=False),
                '1x1': Conv.of(s, 1, norm=False),
                'identity': _identity(s, norm=False),
            },
            norm_after=True,
        ),
    }
)
"""Beside `repvgg`, the default, which is `repvgg_zoo.RepVGGBlock`."""
