"""The table of block types: the branches of a block, and the normalisation of their sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn

from .branches import (
    AvgPoolBranch,
    Branch,
    ConvBranch,
    ConvSpec,
    DiracBranch,
    DOConvBranch,
    ExpandBranch,
    IdentityBranch,
    OREPABranch,
    PointConvBranch,
    ScaledBranch,
)

__all__ = ['BLOCK_TYPES', 'BRANCH_TYPES', 'BlockType']


@dataclass(frozen=True, kw_only=True)
class BlockType:
    """One type of training-time block."""

    summary: str
    source: str
    """Paper that the block is from."""
    branches: Callable[[ConvSpec], Mapping[str, Branch | None]]
    """Makes the branches by name. The first can have any kernel. A branch that does not fit the spec is None."""
    norm_after: bool = False
    """True if the sum of the branches is normalised."""
    is_kernel_type: bool = False
    """True if no branch needs a norm of its own, so that any norm, or none, may follow. Only the kernel is richer."""
    needs_rows_and_columns: bool = False
    """True if a kernel of one row or one column has no such branches."""


def _identity(spec: ConvSpec, *, norm: bool = True) -> IdentityBranch | None:
    return IdentityBranch.of(spec, norm=norm) if spec.has_identity else None


def _delta_orthogonal(spec: ConvSpec) -> ConvBranch:
    """Make a convolution that is orthogonal at the centre tap and zero elsewhere (arXiv 1806.05393, section 3.3).

    It keeps the norm of its input if there are at least as many output channels.
    """
    conv = ConvBranch.of(spec)
    with torch.no_grad():
        conv.conv.weight.zero_()
        row, column = (size // 2 for size in spec.kernel_size)
        for group in conv.conv.weight.chunk(spec.groups):
            centre = torch.empty_like(group[:, :, row, column], dtype=torch.float32)
            group[:, :, row, column] = nn.init.orthogonal_(centre).to(group.dtype)
    return conv


_REPVGG = 'ablation of RepVGG, arXiv 2101.03697'

BLOCK_TYPES: Mapping[str, BlockType] = MappingProxyType(
    {
        'plain': BlockType(
            summary='one 3x3 convolution',
            source=_REPVGG,
            branches=lambda s: {'kxk': ConvBranch.of(s)},
            is_kernel_type=True,
        ),
        'plain_delta': BlockType(
            summary='one 3x3 convolution, initially delta-orthogonal',
            source='Delta-orthogonal initialisation, arXiv 1806.05393',
            branches=lambda s: {'kxk': _delta_orthogonal(s)},
            is_kernel_type=True,
        ),
        'acb': BlockType(
            summary='3x3 + 3x1 + 1x3',
            source='ACNet, arXiv 1908.03930',
            branches=lambda s: {
                'kxk': ConvBranch.of(s),
                'kx1': ConvBranch.of(s, (s.kernel_size[0], 1)),
                '1xk': ConvBranch.of(s, (1, s.kernel_size[1])),
            },
            needs_rows_and_columns=True,
        ),
        'dbb': BlockType(
            summary='3x3 + 1x1 + 1x1 · 3x3 + 1x1 · average + identity',
            source='Diverse Branch Block, arXiv 2103.13425',
            branches=lambda s: {
                'kxk': ConvBranch.of(s),
                '1x1': ConvBranch.of(s, (1, 1)),
                '1x1_kxk': PointConvBranch(s),
                '1x1_avg': AvgPoolBranch(s),
                'identity': _identity(s),
            },
        ),
        'dirac': BlockType(
            summary='diag(a) · I + diag(b) · W / ‖W‖',
            source='DiracNets, arXiv 1706.00388',
            branches=lambda s: {'dirac': DiracBranch(s)},
            is_kernel_type=True,
        ),
        'doconv': BlockType(
            summary='depthwise over-parameterised 3x3',
            source='DO-Conv, arXiv 2006.12030',
            branches=lambda s: {'doconv': DOConvBranch(s)},
            is_kernel_type=True,
        ),
        'expand': BlockType(
            summary='1x1 · 3x3 · 1x1, four times as wide inside',
            source='ExpandNets, arXiv 1811.10495',
            branches=lambda s: {'expand': ExpandBranch(s)},
            is_kernel_type=True,
        ),
        'orepa': BlockType(
            summary='3x3 + average + cosines + 1x1 · 3x3 + 1x1 + separable, added as kernels',
            source='OREPA, arXiv 2204.00826',
            branches=lambda s: {'orepa': OREPABranch(s)},
            is_kernel_type=True,
        ),
        'mobileone': BlockType(
            summary='four times 3x3 + 1x1 + identity',
            source='MobileOne, arXiv 2206.04040',
            branches=lambda s: {
                **{f'kxk_{index}': ConvBranch.of(s) for index in range(4)},
                '1x1': ConvBranch.of(s, (1, 1)),
                'identity': _identity(s),
            },
        ),
        'qarepvgg': BlockType(
            summary='3x3 with BN + 1x1 + identity, BN after the sum',
            source='QARepVGG, arXiv 2212.01593',
            branches=lambda s: {
                'kxk': ConvBranch.of(s),
                '1x1': ConvBranch.of(s, (1, 1), norm=False),
                'identity': _identity(s, norm=False),
            },
            norm_after=True,
        ),
        'csla': BlockType(
            summary='scales times 3x3 + 1x1 + identity, BN after the sum',
            source='RepOptimizer, arXiv 2205.15242',
            branches=lambda s: {
                'kxk': ScaledBranch(s, ConvBranch.of(s, norm=False)),
                '1x1': ScaledBranch(s, ConvBranch.of(s, (1, 1), norm=False)),
                'identity': ScaledBranch(s, IdentityBranch.of(s, norm=False)) if s.has_identity else None,
            },
            norm_after=True,
            is_kernel_type=True,
        ),
        'no_identity': BlockType(
            summary='3x3 + 1x1',
            source=_REPVGG,
            branches=lambda s: {'kxk': ConvBranch.of(s), '1x1': ConvBranch.of(s, (1, 1))},
        ),
        'no_1x1': BlockType(
            summary='3x3 + identity',
            source=_REPVGG,
            branches=lambda s: {'kxk': ConvBranch.of(s), 'identity': _identity(s)},
        ),
        'no_identity_bn': BlockType(
            summary='3x3 + 1x1 + identity without BN',
            source=_REPVGG,
            branches=lambda s: {
                'kxk': ConvBranch.of(s),
                '1x1': ConvBranch.of(s, (1, 1)),
                'identity': _identity(s, norm=False),
            },
        ),
        'bn_after': BlockType(
            summary='3x3 + 1x1 + identity, BN only after the sum',
            source=_REPVGG,
            branches=lambda s: {
                'kxk': ConvBranch.of(s, norm=False),
                '1x1': ConvBranch.of(s, (1, 1), norm=False),
                'identity': _identity(s, norm=False),
            },
            norm_after=True,
            is_kernel_type=True,
        ),
    }
)
"""The block types by name, except the default `repvgg`, which is `repvgg_zoo.RepVGGBlock`."""

BRANCH_TYPES: Mapping[str, BlockType] = MappingProxyType(
    {
        'repvgg': BlockType(
            summary='3x3 + 1x1 + identity',
            source='RepVGG, arXiv 2101.03697',
            branches=lambda s: {'kxk': ConvBranch.of(s), '1x1': ConvBranch.of(s, (1, 1)), 'identity': _identity(s)},
        ),
        **BLOCK_TYPES,
    }
)
"""All block types, for the convolutions of other networks."""
