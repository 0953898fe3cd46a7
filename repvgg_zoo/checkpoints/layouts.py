"""The key layouts of checkpoints, one row each, and their translation to timm's layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..reparam.foreign import MMPRETRAIN, MULTI_BRANCH_KEY, OFFICIAL, OFFICIAL_PLUS, TIMM, BlockNames
from .errors import CheckpointError, abbreviate
from .prefixes import how_to_choose, take_network
from .state_dicts import AUX_PREFIX, StateDict

__all__ = ['to_timm_layout']


@dataclass(frozen=True)
class _Layout:
    name: str
    marker: re.Pattern[str]
    """Matches a key that only this layout has, with what stands in front of the network as `prefix`."""
    stem: re.Pattern[str]
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


def _marker(pattern: str) -> re.Pattern[str]:
    return re.compile(rf'(?P<prefix>(?:.*?\.)??){pattern}')


_TIMM_MARKER = _marker(r'stem\.(conv_kxk|reparam_conv|branches)\.')
_FLAT_STAGE = re.compile(r'^stages_(\d+)\.')
"""Matches a stage of timm's `features_only=True`, which segmentation_models.pytorch makes its encoders with."""
_FOREIGN_LAYOUTS = (
    _Layout(
        name='official RepVGG',
        marker=_marker(r'stage1\.\d+\.rbr_'),
        stem=re.compile(r'stage0\.'),
        stages=re.compile(r'stage(?P<stage>[1-4])\.(?P<block>\d+)\.'),
        names=OFFICIAL,
        head='linear.',
    ),
    _Layout(
        name='official RepVGGplus',
        marker=_marker(r'stage1\.blocks\.\d+\.rbr_'),
        stem=re.compile(r'stage0\.'),
        stages=re.compile(r'stage(?P<stage>[1-4])(?P<half>_first|_second)?\.blocks\.(?P<block>\d+)\.'),
        names=OFFICIAL_PLUS,
        head='linear.',
        aux_heads=('stage1_aux.', 'stage2_aux.', 'stage3_first_aux.'),
        aux_parts={'0.conv.': 'conv.', '0.bn.': 'bn.', '3.': 'fc.'},
    ),
    _Layout(
        name='mmpretrain',
        marker=_marker(r'(?:backbone\.)?stem\.branch_'),
        stem=re.compile(r'(?P<root>backbone\.)?stem\.'),
        stages=re.compile(r'(?:backbone\.)?stage_(?P<stage>[1-4])\.(?P<block>\d+)\.'),
        names=MMPRETRAIN,
        head='head.fc.',
    ),
)


def to_timm_layout(state_dict: Mapping[str, Any], *, prefix: str | None = None, strict: bool = True) -> dict[str, Any]:
    """Rename the keys of any layout, in either form, to timm's.

    What stands in front of all keys is stripped: the wrappers of DistributedDataParallel, torch.compile and averages,
    and the attribute under which a trainer keeps the network, like `model.`. `num_batches_tracked`, which very old
    files lack, is filled in.

    Args:
        state_dict: Weights of a whole model, or of a larger network.
        prefix: Take only the keys with this prefix, and strip it. A dot at its end may be left out.
        strict: Raise if no layout is recognised, or if the keys are those of a larger network. Otherwise the keys then
            stay as they are, without wrappers.

    Returns:
        A new dict of the same tensors.

    Raises:
        CheckpointError: No layout is recognised, or a key has no place in the recognised one, or there are other parts
            or several RepVGGs in a larger network and `prefix` does not choose one.

    Example:
        >>> import torch
        >>> list(to_timm_layout({'model.backbone.stem.branch_reparam.bias': torch.zeros(1)}))
        ['stem.reparam_conv.bias']
    """
    state_dict = take_network(state_dict, prefix)
    layout, prefixes = _find(state_dict)
    if not prefixes and strict:
        names = ', '.join(['timm', *(known.name for known in _FOREIGN_LAYOUTS)])
        if any(map(MULTI_BRANCH_KEY.search, state_dict)):
            raise CheckpointError(
                f'no RepVGG checkpoint, but another network with branches ({abbreviate(state_dict, 2)}): '
                '`repvgg-zoo convert` folds it; if the file does not tell its name, --model does, like '
                '--model resnet18_acb'
            )
        raise CheckpointError(
            f'no RepVGG checkpoint: its keys ({abbreviate(state_dict)}) are of none of the known layouts ({names})'
        )
    if len(prefixes) > 1 and strict:
        raise CheckpointError(f'a checkpoint of {len(prefixes)} RepVGGs: {how_to_choose(prefixes)}')
    if len(prefixes) == 1:
        (found,) = prefixes
        others = [key for key in state_dict if not key.startswith(found)]
        below = f'{prefix.removesuffix(".")}.' if prefix else ''
        if others and strict:
            raise CheckpointError(
                f'a checkpoint of a larger network, with other parts than a RepVGG ({abbreviate(others)}): '
                f'{how_to_choose([below + found])}'
            )
        if not others:
            state_dict = {key.removeprefix(found): value for key, value in state_dict.items()}
            state_dict = _translate(state_dict, layout) if layout else _with_nested_stages(state_dict)
    for key in [key for key in state_dict if key.endswith('.running_var')]:
        counter = key.removesuffix('running_var') + 'num_batches_tracked'
        state_dict.setdefault(counter, torch.zeros((), dtype=torch.int64, device='cpu'))
    return state_dict


def _find(state_dict: Mapping[str, Any]) -> tuple[_Layout | None, list[str]]:
    """Find the layout, None for timm's, and what stands in front of each RepVGG of that layout."""
    for marker, layout in [(_TIMM_MARKER, None), *((known.marker, known) for known in _FOREIGN_LAYOUTS)]:
        if prefixes := {match['prefix'] for key in state_dict if (match := marker.match(key))}:
            return layout, sorted(prefixes)
    return None, []


def _with_nested_stages(state_dict: StateDict) -> StateDict:
    return {_FLAT_STAGE.sub(r'stages.\1.', key): value for key, value in state_dict.items()}


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
        elif match := layout.stem.match(key):
            prefix, rest = 'stem.', key[match.end() :]
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
        roots = {match.groupdict().get('root') for key in state_dict if (match := layout.stem.match(key))} - {None}
        remedy = f'; if they are other parts of a larger network, {how_to_choose(map(str, roots))}' if roots else ''
        raise CheckpointError(
            f'a checkpoint in the layout of {layout.name} with unknown keys: {abbreviate(strangers)}{remedy}'
        )
    return renamed


def _replace_prefix(text: str, table: Mapping[str, str]) -> str | None:
    for old, new in table.items():
        if text.startswith(old):
            return new + text.removeprefix(old)
    return None
