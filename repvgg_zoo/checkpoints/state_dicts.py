"""What a model needs from a state dict: its form, its fold, strict checks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal, TypeAlias

from torch import Tensor

from ..reparam.foreign import TIMM
from ..variants import VARIANTS, Variant
from .errors import CheckpointError, abbreviate

__all__ = [
    'AUX_PREFIX',
    'FAMILY_BRANCH',
    'Form',
    'StateDict',
    'check_fit',
    'form_of',
    'identify_variant',
    'without_aux_heads',
]

Form: TypeAlias = Literal['training', 'deploy']
StateDict: TypeAlias = dict[str, Tensor]
AUX_PREFIX = 'aux_heads.'

_KXK, _DEPLOY = f'{TIMM.conv_kxk}.conv.weight', f'{TIMM.reparam_conv}.weight'
FAMILY_BRANCH = re.compile(r'(?:^|\.)branches\.\d*[a-z]')
"""Matches the path of a branch of `family.FamilyBlock`, which alone knows how it folds: it has a name, not a number."""


def form_of(state_dict: Iterable[str]) -> Form:
    """The form that a state dict in timm's layout holds; raises `CheckpointError` for a mixture."""
    keys = list(state_dict)
    training = [key for key in keys if key.endswith(_KXK) or FAMILY_BRANCH.search(key)]
    deploy = [key for key in keys if key.endswith(_DEPLOY)]
    if training and deploy:
        raise CheckpointError(
            f'a checkpoint with blocks of both forms: {abbreviate(training)} of the training form, '
            f'{abbreviate(deploy)} of the '
            'deploy form; save it again from a model of one form'
        )
    if not training and not deploy:
        raise CheckpointError(f'no RepVGG block among the keys {abbreviate(keys)}')
    return 'training' if training else 'deploy'


def without_aux_heads(state_dict: Mapping[str, Tensor]) -> StateDict:
    """A state dict without the auxiliary heads, which only training uses."""
    return {key: value for key, value in state_dict.items() if not key.startswith(AUX_PREFIX)}


def check_fit(state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, what: str) -> None:
    """Raise `CheckpointError` unless keys and shapes are those of `expected`, the model's state dict.

    The error lists what is missing, unexpected and of the wrong shape, and the variant that the
    checkpoint is of where its shapes tell. `what` names the model.
    """
    wrong_shape = [
        f'{key}: {tuple(value.shape)} in the checkpoint, {tuple(expected[key].shape)} in the model'
        for key, value in state_dict.items()
        if key in expected and value.shape != expected[key].shape
    ]
    problems = {
        'missing': [key for key in expected if key not in state_dict],
        'unexpected': [key for key in state_dict if key not in expected],
        'of the wrong shape': wrong_shape,
    }
    if any(problems.values()):
        variant = identify_variant(state_dict)
        hint = f' (it looks like a checkpoint of {variant.name})' if variant and variant.name != what else ''
        details = '; '.join(f'{len(keys)} {problem}: {abbreviate(keys)}' for problem, keys in problems.items() if keys)
        raise CheckpointError(f'the checkpoint does not fit {what}{hint}: {details}')


def identify_variant(state_dict: Mapping[str, Tensor]) -> Variant | None:
    """The variant whose depths, channels, groups and squeeze-excite a state dict in timm's layout has."""
    suffix = f'.{_KXK}' if any(key.endswith(_KXK) for key in state_dict) else f'.{_DEPLOY}'
    shapes = {key.removesuffix(suffix): value.shape for key, value in state_dict.items() if key.endswith(suffix)}
    squeezed = state_dict.get(f'stages.0.0.{TIMM.squeeze}.weight')
    for variant in VARIANTS.values():
        channels = {
            f'stages.{stage}.{block}': width
            for stage, (depth, width) in enumerate(zip(variant.depths, variant.stage_channels, strict=True))
            for block in range(depth)
        } | {'stem': variant.stem_channels}
        if {name: shape[0] for name, shape in shapes.items()} != channels:
            continue
        if shapes['stages.0.1'][1] != variant.stage_channels[0] // variant.groups:
            continue
        ratio = variant.se.rd_ratio if variant.se else 0
        if (0 if squeezed is None else squeezed.shape[0] / squeezed.shape[1]) == ratio:
            return variant
    return None
