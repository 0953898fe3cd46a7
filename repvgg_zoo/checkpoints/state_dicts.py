"""State dicts in timm's layout: their form, their variant, and the check that they fit a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, TypeAlias

from torch import Tensor

from ..reparam.foreign import MULTI_BRANCH_KEY, TIMM
from ..variants import VARIANTS, Variant
from .errors import CheckpointError, abbreviate

__all__ = [
    'AUX_PREFIX',
    'Form',
    'StateDict',
    'check_fit',
    'drop_aux_heads',
    'folded_shapes',
    'form_of',
    'identify_variant',
]

Form: TypeAlias = Literal['training', 'deploy']
StateDict: TypeAlias = dict[str, Tensor]
AUX_PREFIX = 'aux_heads.'

_KXK, _DEPLOY = f'{TIMM.conv_kxk}.conv.weight', f'{TIMM.reparam_conv}.weight'


def form_of(keys: Iterable[str]) -> Form:
    """Tell the form of weights by their keys in timm's layout.

    Raises:
        CheckpointError: There are blocks of both forms, or none.

    Example:
        >>> form_of(['stem.reparam_conv.weight', 'stem.reparam_conv.bias'])
        'deploy'
    """
    keys = list(keys)
    training = [key for key in keys if key.endswith(_KXK) or MULTI_BRANCH_KEY.search(key)]
    deploy = [key for key in keys if key.endswith(_DEPLOY)]
    if training and deploy:
        raise CheckpointError(
            f'a checkpoint with blocks of both forms: {abbreviate(training)} of the training form, '
            f'{abbreviate(deploy)} of the deploy form; save it again from a model of one form'
        )
    if not training and not deploy:
        raise CheckpointError(f'no RepVGG block among the keys {abbreviate(keys)}')
    return 'training' if training else 'deploy'


def drop_aux_heads(state_dict: StateDict) -> None:
    """Remove the auxiliary heads, which only training uses."""
    for key in [key for key in state_dict if key.startswith(AUX_PREFIX)]:
        del state_dict[key]


def folded_shapes(state_dict: Mapping[str, Tensor]) -> StateDict:
    """Give training-form weights of the default block the keys and shapes of their fold, without folding.

    Args:
        state_dict: Weights in timm's layout.

    Returns:
        Tensors whose values mean nothing.

    Example:
        >>> import timm
        >>> training, deploy = (timm.create_model('test_repvgg', deploy=deploy) for deploy in (False, True))
        >>> folded_shapes(training.state_dict()).keys() == deploy.state_dict().keys()
        True
    """
    folded = {}
    for key, value in state_dict.items():
        block, branch, _ = key.partition(f'.{TIMM.conv_kxk}.')
        if key == f'{block}.{_KXK}' and value.ndim == 4:
            folded[f'{block}.{_DEPLOY}'] = value
            folded[f'{block}.{TIMM.reparam_conv}.bias'] = value[:, 0, 0, 0]
        elif not branch and f'.{TIMM.conv_1x1}.' not in key and f'.{TIMM.identity}.' not in key:
            folded[key] = value
    return folded


def check_fit(state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, what: str) -> None:
    """Check that keys and shapes are those of a model.

    Args:
        state_dict: Weights in timm's layout.
        expected: The model's state dict.
        what: Name of the model's variant.

    Raises:
        CheckpointError: They are not. The error lists the keys that are missing, unexpected and of the wrong shape. It
            names the variant that has the shapes of the checkpoint.

    Example:
        >>> import torch
        >>> check_fit({'head.fc.bias': torch.zeros(2)}, {'head.fc.bias': torch.zeros(2)}, what='repvgg_a0')
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
        if problems['missing'] and not any(key.startswith('head.') for key in state_dict):
            hint += ', and has no classifier (create the model with num_classes=0)'
        details = '; '.join(f'{len(keys)} {problem}: {abbreviate(keys)}' for problem, keys in problems.items() if keys)
        raise CheckpointError(f'the checkpoint does not fit {what}{hint}: {details}')


def identify_variant(state_dict: Mapping[str, Tensor]) -> Variant | None:
    """Find the variant with the depths, channels, groups and squeeze-excite of a state dict in timm's layout.

    Strides leave no trace, except the identity branch that a block of stride 1 may have in the training form. Of
    variants that differ in strides only, it decides, and the first one is found if it does not.

    Returns:
        The variant; None if no variant has these shapes, or if the training-form blocks are not of the default type.

    Example:
        >>> import timm
        >>> identify_variant(timm.create_model('repvgg_b1g2', device='meta').state_dict()).name
        'repvgg_b1g2'
    """
    shapes = {
        key.removesuffix(suffix): value.shape
        for key, value in state_dict.items()
        for suffix in (f'.{_KXK}', f'.{_DEPLOY}')
        if key.endswith(suffix) and value.ndim == 4
    }
    squeezed = state_dict.get(f'stages.0.0.{TIMM.squeeze}.weight')
    has_identity = f'stages.0.0.{TIMM.identity}.weight' in state_dict
    found = []
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
            found.append(variant)
    return min(found, key=lambda variant: _starts_with_identity(variant) != has_identity, default=None)


def _starts_with_identity(variant: Variant) -> bool:
    return variant.strides[1] == 1 and variant.stem_channels == variant.stage_channels[0]
