"""The variants: one frozen row each, and the only place that holds an architecture number.

Sources: "RepVGG: Making VGG-style ConvNets Great Again", arXiv 2101.03697, section 4.1 and tables 2, 4 and 5; the
README of the official code for D2se and RepVGGplus; Yaofo Chen's models for CIFAR for the strides of those.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

__all__ = ['OVERRIDES', 'VARIANTS', 'SqueezeExcite', 'Variant', 'customized', 'get_variant', 'suggestion']

OVERRIDES = ('depths', 'width', 'strides', 'groups')
"""Fields of a variant that `timm.create_model` takes as arguments."""

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

    Raises:
        ValueError: A field is of the wrong length or out of range, or the groups do not divide the channels.

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

    def __post_init__(self) -> None:
        for field, length, kinds in (('depths', 4, int), ('width', 4, (int, float)), ('strides', 5, int)):
            values = getattr(self, field)
            if (
                not isinstance(values, tuple)
                or len(values) != length
                or not all(isinstance(v, kinds) and not isinstance(v, bool) and 0 < v < math.inf for v in values)
            ):
                what = 'numbers above 0' if field == 'width' else 'integers from 1 on'
                raise ValueError(f'{field} of {self.name} is {values!r}; it takes {length} {what}')
        if not isinstance(self.groups, int) or isinstance(self.groups, bool) or self.groups < 1:
            raise ValueError(f'groups of {self.name} is {self.groups!r}; it takes an integer from 1 on')
        channels = (self.stem_channels, *self.stage_channels)
        if min(channels) < 1:
            raise ValueError(f'width of {self.name} is {self.width!r}, which leaves stages of {channels[1:]} channels')
        if any(chs % self.groups for chs in channels):
            raise ValueError(f'groups of {self.name} is {self.groups}, which does not divide the channels {channels}')
        if self.aux_heads and self.depths[2] < 2:
            raise ValueError(f'depths of {self.name} is {self.depths!r}; its auxiliary heads take 2 blocks in stage 3')

    def __str__(self) -> str:
        """Return the name, and what the variant has other than the one of that name."""
        overrides = ', '.join(f'{field}={value}' for field, value in self.overrides.items())
        return f'{self.name} with {overrides}' if overrides else self.name

    @property
    def overrides(self) -> dict[str, Any]:
        """Fields that differ from those of the variant of this name."""
        original = VARIANTS.get(self.name, self)
        fields = {field: getattr(self, field) for field in OVERRIDES}
        return {field: value for field, value in fields.items() if value != getattr(original, field)}

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
_STRIDES_CIFAR = (1, 1, 2, 2, 2)
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
            Variant(name='repvgg_a0_cifar', depths=_DEPTHS_A, width=_A, strides=_STRIDES_CIFAR),
            Variant(name='repvgg_a1_cifar', depths=_DEPTHS_A, width=_W1, strides=_STRIDES_CIFAR),
            Variant(name='repvgg_a2_cifar', depths=_DEPTHS_A, width=_A2, strides=_STRIDES_CIFAR),
            Variant(
                name='test_repvgg',  # for images of 32 pixels
                depths=(2, 4, 3, 1),
                width=(0.5, 0.5, 0.5, 0.1875),
                strides=(1, 1, 2, 2, 2),
            ),
        )
    }
)
"""The variants by their timm names, in the order of every table.

Example:
    >>> VARIANTS['repvgg_b1g2'].groups
    2
"""


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


def customized(variant: Variant, **overrides: Any) -> Variant:
    """Return a variant with other numbers under the same name.

    Args:
        variant: The variant to start from.
        overrides: Fields of `OVERRIDES`; lists stand for tuples. None keeps the variant's own.

    Raises:
        ValueError: A value is not possible, see `Variant`.

    Example:
        >>> print(customized(VARIANTS['repvgg_a0'], strides=[1, 1, 2, 2, 2]))
        repvgg_a0 with strides=(1, 1, 2, 2, 2)
    """
    given: dict[str, Any] = {
        field: tuple(value) if isinstance(value, list) else value  # JSON has lists
        for field, value in overrides.items()
        if value is not None
    }
    return replace(variant, **given) if given else variant


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
