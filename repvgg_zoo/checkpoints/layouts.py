"""The key layouts of checkpoints, one row each, and their translation to timm's layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..reparam.foreign import MMPRETRAIN, OFFICIAL, OFFICIAL_PLUS, TIMM, BlockNames
from .errors import CheckpointError, abbreviate
from .state_dicts import AUX_PREFIX, StateDict

__all__ = ['to_timm_layout']


@dataclass(frozen=True)
class _Layout:
    name: str
    marker: re.Pattern[str]
    """Matches a key that only this layout has."""
    stem: str
    stages: re.Pattern[str]
    """Matches a block's prefix: stage (1 to 4), half of the stage if it has halves, block."""
    names: BlockNames
    head: str
    aux_heads: tuple[str, ...] = ()
    aux_parts: Mapping[str, str] | None = None

    def parts(self) -> dict[str, str]:
        """Return the prefixes inside a block in timm's layout, by those in this layout."""
        table = {}
        for branch in ('conv_kxk', 'conv_1x1'):
            ours, theirs = getattr(TIMM, branch), getattr(self.names, branch)
            table[f'{theirs}.conv.'] = f'{ours}.conv.'
            table[f'{theirs}.{self.names.norm}.'] = f'{ours}.{TIMM.norm}.'
        for part in ('identity', 'reparam_conv', 'squeeze', 'excite'):
            table[f'{getattr(self.names, part)}.'] = f'{getattr(TIMM, part)}.'
        return table


_TIMM_MARKER = re.compile(r'stem\.(conv_kxk|reparam_conv|branches)\.')
_FOREIGN_LAYOUTS = (
    _Layout(
        name='official RepVGG',
        marker=re.compile(r'stage1\.\d+\.rbr_'),
        stem='stage0.',
        stages=re.compile(r'stage(?P<stage>[1-4])\.(?P<block>\d+)\.'),
        names=OFFICIAL,
        head='linear.',
    ),
    _Layout(
        name='official RepVGGplus',
        marker=re.compile(r'stage1\.blocks\.\d+\.rbr_'),
        stem='stage0.',
        stages=re.compile(r'stage(?P<stage>[1-4])(?P<half>_first|_second)?\.blocks\.(?P<block>\d+)\.'),
        names=OFFICIAL_PLUS,
        head='linear.',
        aux_heads=('stage1_aux.', 'stage2_aux.', 'stage3_first_aux.'),
        aux_parts={'0.conv.': 'conv.', '0.bn.': 'bn.', '3.': 'fc.'},
    ),
    _Layout(
        name='mmpretrain',
        marker=re.compile(r'backbone\.stem\.branch_'),
        stem='backbone.stem.',
        stages=re.compile(r'backbone\.stage_(?P<stage>[1-4])\.(?P<block>\d+)\.'),
        names=MMPRETRAIN,
        head='head.fc.',
    ),
)
_WRAPPERS = ('module.', '_orig_mod.')


def to_timm_layout(state_dict: Mapping[str, Tensor], *, strict: bool = True) -> StateDict:
    """Rename the keys of any layout, in either form, to timm's.

    Prefixes of DistributedDataParallel and torch.compile are stripped from the front of keys. `num_batches_tracked`,
    which very old files lack, is filled in.

    Args:
        state_dict: Weights of a whole model.
        strict: Raise if no layout is recognised. Otherwise the keys then stay as they are.

    Returns:
        A new dict of the same tensors.

    Raises:
        CheckpointError: No layout is recognised, or a key has no place in the recognised one.

    Example:
        >>> import torch
        >>> list(to_timm_layout({'backbone.stem.branch_reparam.bias': torch.zeros(1)}))
        ['stem.reparam_conv.bias']
    """
    state_dict = {_strip_wrappers(key): value for key, value in state_dict.items()}
    if not any(map(_TIMM_MARKER.match, state_dict)):
        layout = next((known for known in _FOREIGN_LAYOUTS if any(map(known.marker.match, state_dict))), None)
        if layout is not None:
            state_dict = _translate(state_dict, layout)
        elif strict:
            names = ', '.join(['timm', *(known.name for known in _FOREIGN_LAYOUTS)])
            raise CheckpointError(
                f'no RepVGG checkpoint: its keys ({abbreviate(state_dict)}) are of none of the known layouts ({names})'
            )
    for key in [key for key in state_dict if key.endswith('.running_var')]:
        counter = key.removesuffix('running_var') + 'num_batches_tracked'
        state_dict.setdefault(counter, torch.zeros((), dtype=torch.int64))
    return state_dict


def _strip_wrappers(key: str) -> str:
    while key.startswith(_WRAPPERS):
        key = key.split('.', 1)[1]
    return key


def _translate(state_dict: StateDict, layout: _Layout) -> StateDict:
    parts = layout.parts()
    matches = {key: layout.stages.match(key) for key in state_dict}
    first_half = {m['block'] for m in matches.values() if m and m.groupdict().get('half') == '_first'}

    def rename(key: str) -> str | None:
        if key.startswith(layout.head):
            return 'head.fc.' + key.removeprefix(layout.head)
        for index, prefix in enumerate(layout.aux_heads):
            if key.startswith(prefix):
                part = _replace_prefix(key.removeprefix(prefix), layout.aux_parts or {})
                return part and f'{AUX_PREFIX}{index}.{part}'
        if match := matches[key]:
            block = int(match['block']) + (len(first_half) if match.groupdict().get('half') == '_second' else 0)
            prefix, rest = f'stages.{int(match["stage"]) - 1}.{block}.', key[match.end() :]
        elif key.startswith(layout.stem):
            prefix, rest = 'stem.', key.removeprefix(layout.stem)
        else:
            return None
        part = _replace_prefix(rest, parts)
        return part and prefix + part

    renamed, strangers = {}, []
    for key, value in state_dict.items():
        new_key = rename(key)
        if new_key is None:
            strangers.append(key)
        else:
            renamed[new_key] = value
    if strangers:
        raise CheckpointError(f'a checkpoint in the layout of {layout.name} with unknown keys: {abbreviate(strangers)}')
    return renamed


def _replace_prefix(text: str, table: Mapping[str, str]) -> str | None:
    for old, new in table.items():
        if text.startswith(old):
            return new + text.removeprefix(old)
    return None
