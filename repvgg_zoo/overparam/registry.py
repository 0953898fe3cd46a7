"""Over-parameterized networks under names of their own in timm's registry, for timm's scripts."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import timm
from timm.layers import to_2tuple
from timm.models import (
    DefaultCfg,
    get_arch_pretrained_cfgs,
    model_entrypoint,
    register_model,
    split_model_name_tag,
)
from torch import nn

from ..blocks.factory import BLOCKS, block_type
from ..checkpoints.errors import abbreviate
from ..checkpoints.files import read_checkpoint
from ..reparam.foreign import MULTI_BRANCH_KEY
from ..reparam.pairs import sample_of
from ..variants import VARIANTS, suggestion
from .overparameterize import overparameterize

__all__ = ['parse_recipe', 'register_overparameterized', 'split_overparameterized']  # timm adds names

default_cfgs: dict[str, DefaultCfg] = {}
"""What timm's `register_model` looks up."""

_recipes: dict[str, tuple[str, str, str | None]] = {}
"""Name with tag, block and paths of every network that was registered here, by its name."""


def register_overparameterized(name: str, block: str = 'acb', *, where: str | None = None) -> str:
    """Register a network of timm with branches under a name of its own, such as `resnet18_acb` for `resnet18`.

    `timm.create_model` then makes it as it makes the plain network, with the same arguments, weights and preprocessing,
    and passes it through `overparameterize`. Checkpoints that hold branches load by `checkpoint_path=`. Those of the
    plain network load by `pretrained=True`.

    Args:
        name: A name of timm's registry. If it has a tag, as in `'resnet18.a1_in1k'`, that is the default tag.
        block: The block type, a name of `repvgg_zoo.BLOCKS`.
        where: A pattern of the paths of the convolutions to replace, by default all that can be.

    Returns:
        The new name. If it is registered in the same way already, nothing changes.

    Raises:
        ValueError: The network, its tag or the block type is unknown, or the new name is taken.

    Example:
        >>> import timm, repvgg_zoo
        >>> repvgg_zoo.register_overparameterized('resnet10t', 'acb', where='layer1.*')
        'resnet10t_acb'
        >>> model = timm.create_model('resnet10t_acb', num_classes=10)
        >>> list(model.layer1[0].conv1.branches)
        ['kxk', 'kx1', '1xk']
    """
    block_type(block)
    arch, _ = split_model_name_tag(name)
    _check_network(name)
    new = f'{arch}_{block}'
    if _recipes.get(new) == (name, block, where):
        return new
    if timm.is_model(new):
        raise ValueError(f'cannot register {_join(name, block, where)}: {new!r} is {_holder(new)}')
    if (cfgs := _cfgs(name)) is not None:
        default_cfgs[new] = cfgs
    entry_point = _entry_point(name, block, where)
    entry_point.__name__ = entry_point.__qualname__ = new
    entry_point.__doc__ = f'{name} with branches of {block}.'
    globals()[new] = register_model(entry_point)  # `__all__` now has the name
    _recipes[new] = name, block, where
    return new


def parse_recipe(text: str) -> tuple[str, str, str | None]:
    """Parse `NAME:BLOCK` or `NAME:BLOCK:PATTERN`, as on the command line.

    Args:
        text: Such as `'resnet18:acb'` or `'resnet18.a1_in1k:acb:layer1.*'`.

    Returns:
        The name, the block type, and the pattern or None, for `register_overparameterized`.

    Raises:
        ValueError: The text is of another form.

    Example:
        >>> parse_recipe('resnet18:acb:layer1.*')
        ('resnet18', 'acb', 'layer1.*')
    """
    name, *rest = text.split(':', 2)
    if not name or not rest or not all(rest):
        raise ValueError(
            f'{text!r} is not of the form NAME:BLOCK or NAME:BLOCK:PATTERN, like resnet18:acb or resnet18:acb:layer1.*'
        )
    return name, rest[0], rest[1] if rest[1:] else None


def split_overparameterized(name: str) -> tuple[str, str] | None:
    """Split the name of an over-parameterized network, registered or not, into those of the plain one and the block.

    Args:
        name: Such as `'resnet18_acb'`. A tag is ignored.

    Returns:
        The two names; None if it is no such name.

    Example:
        >>> split_overparameterized('resnet18_bn_after')
        ('resnet18', 'bn_after')
        >>> split_overparameterized('repvgg_a0') is None
        True
    """
    arch, _ = split_model_name_tag(name)
    for block in BLOCKS:
        plain = arch.removesuffix(f'_{block}')
        if plain != arch and plain not in VARIANTS and timm.is_model(plain):
            return plain, block
    return None


def _check_network(name: str) -> None:
    arch, tag = split_model_name_tag(name)
    if arch in VARIANTS:
        raise ValueError(f'{arch} has such blocks itself: create it with block=… (`--model-kwargs block=…`)')
    if not timm.is_model(arch):
        raise ValueError(f'unknown model {arch!r};{suggestion(arch, timm.list_models())} timm.list_models() lists all')
    tags = [split_model_name_tag(known)[1] for known in get_arch_pretrained_cfgs(arch)]
    if tag and tag not in tags:
        raise ValueError(
            f'{arch} has no weights tagged {tag!r};{suggestion(tag, tags)} it has: {", ".join(filter(None, tags))}'
        )


def _holder(name: str) -> str:
    if name not in _recipes:
        return 'a model already'
    return f'registered already, for {_join(*_recipes[name])}'


def _join(*recipe: str | None) -> str:
    return ':'.join(filter(None, recipe))


def _cfgs(name: str) -> DefaultCfg | None:
    """Return the pretrained configurations of a network by tag, the default tag first."""
    arch, tag = split_model_name_tag(name)
    cfgs = {split_model_name_tag(full)[1]: cfg for full, cfg in get_arch_pretrained_cfgs(arch).items()}
    if not cfgs:
        return None
    return DefaultCfg(tags=deque(sorted(cfgs, key=lambda t: t != (tag or next(iter(cfgs))))), cfgs=cfgs)


def _entry_point(name: str, block: str, where: str | None) -> Any:
    arch, default_tag = split_model_name_tag(name)

    def create(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        if pretrained:
            _refuse_branches(pretrained_cfg_overlay or {})
        model = model_entrypoint(arch)(
            pretrained=pretrained,
            pretrained_cfg=pretrained_cfg or default_tag or None,
            pretrained_cfg_overlay=pretrained_cfg_overlay,
            **kwargs,
        )
        if isinstance(cfg := getattr(model, 'pretrained_cfg', None), dict):
            cfg['architecture'] = arch  # which it is again after the fold, and which timm writes into a config.json
        sample = None
        if kwargs.get('img_size') is not None:
            sample = nn.functional.interpolate(sample_of(model), to_2tuple(kwargs['img_size']))
        return overparameterize(model, block, where=where, sample=sample)

    return create


def _refuse_branches(overlay: Mapping[str, Any]) -> None:
    """Refuse a file of weights with branches, of which timm would load nothing into the plain network."""
    held = overlay.get('state_dict') or {}
    if not held and overlay.get('file'):
        held = read_checkpoint(overlay['file'])
    if branches := [key for key in held if MULTI_BRANCH_KEY.search(str(key))]:
        raise ValueError(
            f'the weights hold branches ({abbreviate(branches, 2)}), and pretrained=True loads weights of the plain '
            'network. Go on with checkpoint_path=… (`--initial-checkpoint`) or `--resume`, or fold them first '
            '(`repvgg-zoo convert`)'
        )
