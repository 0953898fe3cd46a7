"""The variants: one frozen row each, and the only place that holds an architecture number.

Sources: "RepVGG: Making VGG-style ConvNets Great Again", arXiv 2101.03697, section 4.1 and tables 2, 4 and 5; the
README of the official code for D2se and RepVGGplus.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

__all__ = ['VARIANTS', 'SqueezeExcite', 'Variant', 'get_variant', 'suggestion']

_BASE_CHANNELS = (64, 128, 256, 512)


@dataclass(frozen=True, kw_only=True)
class SqueezeExcite:
    """Squeeze-and-excitation after each block's convolution (arXiv 1709.01507)."""

    rd_ratio: float
    """Squeezed channels as a fraction of the block's channels."""
    position: Literal['before_act', 'after_act']


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One RepVGG architecture: a stem block, then four stages, then a linear classifier.

    Attributes:
        name: Name in timm's registry.
        depths: Number of blocks in each stage.
        width: Multiplier of each stage for its base channels, which are 64, 128, 256 and 512.
        groups: Groups of every second convolution. The stem is number 0 and has one group (section 4.1).
        se: Squeeze-and-excitation of every block.
        aux_heads: True if the official recipe trains with auxiliary heads.
        strides: Strides of the stem and of each stage's first block.

    Example:
        >>> from dataclasses import replace
        >>> narrow = replace(VARIANTS['repvgg_a0'], name='repvgg_narrow', width=(0.5, 0.5, 0.5, 1.0))
        >>> narrow.stage_channels
        (32, 64, 128, 512)
    """

    name: str
    depths: tuple[int, int, int, int]
    width: tuple[float, float, float, float]
    groups: int = 1
    se: SqueezeExcite | None = None
    aux_heads: bool = False
    strides: tuple[int, int, int, int, int] = (2, 2, 2, 2, 2)

    @property
    def stage_channels(self) -> tuple[int, ...]:
        """Output channels of the four stages."""
        return tuple(int(base * factor) for base, factor in zip(_BASE_CHANNELS, self.width, strict=True))

    @property
    def stem_channels(self) -> int:
        """Output channels of the stem block."""
        return min(_BASE_CHANNELS[0], self.stage_channels[0])

    @property
    def total_stride(self) -> int:
        """Input pixels for each pixel of the last feature map, in either direction."""
        return math.prod(self.strides)

    @property
    def aux_blocks(self) -> tuple[tuple[int, int], ...]:
        """Places of the auxiliary heads, as (stage, blocks of that stage before the head)."""
        return (0, self.depths[0]), (1, self.depths[1]), (2, self.depths[2] // 2)


_A, _A2 = (0.75, 0.75, 0.75, 2.5), (1.5, 1.5, 1.5, 2.75)
_W1, _W2, _W25, _W3 = (1, 1, 1, 2.5), (2, 2, 2, 4), (2.5, 2.5, 2.5, 5), (3, 3, 3, 5)
_DEPTHS_A, _DEPTHS_B, _DEPTHS_D = (2, 4, 14, 1), (4, 6, 16, 1), (8, 14, 24, 1)
_SE_D = SqueezeExcite(rd_ratio=1 / 16, position='before_act')
_SE_PLUS = SqueezeExcite(rd_ratio=1 / 4, position='after_act')

VARIANTS = MappingProxyType(
    {
        v.name: v
        for v in (
            Variant(name='repvgg_a0', depths=_DEPTHS_A, width=_A),
            Variant(name='repvgg_a1', depths=_DEPTHS_A, width=_W1),
            Variant(name='repvgg_a2', depths=_DEPTHS_A, width=_A2),
            Variant(name='repvgg_b0', depths=_DEPTHS_B, width=_W1),
            Variant(name='repvgg_b1', depths=_DEPTHS_B, width=_W2),
            Variant(name='repvgg_b1g2', depths=_DEPTHS_B, width=_W2, groups=2),
            Variant(name='repvgg_b1g4', depths=_DEPTHS_B, width=_W2, groups=4),
            Variant(name='repvgg_b2', depths=_DEPTHS_B, width=_W25),
            Variant(name='repvgg_b2g2', depths=_DEPTHS_B, width=_W25, groups=2),
            Variant(name='repvgg_b2g4', depths=_DEPTHS_B, width=_W25, groups=4),
            Variant(name='repvgg_b3', depths=_DEPTHS_B, width=_W3),
            Variant(name='repvgg_b3g2', depths=_DEPTHS_B, width=_W3, groups=2),
            Variant(name='repvgg_b3g4', depths=_DEPTHS_B, width=_W3, groups=4),
            Variant(name='repvgg_d2se', depths=_DEPTHS_D, width=_W25, se=_SE_D),
            Variant(name='repvggplus_l2pse', depths=_DEPTHS_D, width=_W25, se=_SE_PLUS, aux_heads=True),
            Variant(
                name='test_repvgg',  # for images of 32 pixels
                depths=(4, 4, 1, 1),
                width=(0.75, 0.75, 0.5, 0.1875),
                strides=(1, 2, 2, 2, 2),
            ),
        )
    }
)


def get_variant(name: str) -> Variant:
    """Look a variant up by its timm name.

    Raises:
        ValueError: There is none of this name; the error names the nearest one.

    Example:
        >>> get_variant('repvgg_b1g2').groups
        2
    """
    if name in VARIANTS:
        return VARIANTS[name]
    raise ValueError(f'unknown variant {name!r};{suggestion(name, VARIANTS)} `repvgg-zoo list` shows all')


def suggestion(name: str, options: Iterable[str]) -> str:
    """Return ` did you mean …?` with the nearest option, or nothing if none is near.

    Papers' spellings and short names, like `RepVGG-B1g2` and `b1g2`, are near too.

    Example:
        >>> suggestion('repvgg_b11', VARIANTS)
        " did you mean 'repvgg_b1'?"
        >>> suggestion('B1g2', VARIANTS)
        " did you mean 'repvgg_b1g2'?"
    """
    options, name = list(options), name.lower().replace('-', '_')
    nearest = [option for option in options if option.endswith(f'_{name}')]
    nearest = nearest or difflib.get_close_matches(name, options, n=1)
    return f' did you mean {nearest[0]!r}?' if nearest else ''
