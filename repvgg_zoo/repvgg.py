"""timm's registry: default configurations and entrypoints."""

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from torch import nn

from .model import RepVGG
from .pretrained.load import load_pretrained
from .pretrained.manifest import DEPLOY_SUFFIX, WeightsRecord, read_manifest
from .variants import VARIANTS, Variant, suggestion

__all__ = ['RepVGG']


def _first_conv(*, deploy: bool) -> str | tuple[str, str]:
    return 'stem.reparam_conv' if deploy else ('stem.conv_kxk.conv', 'stem.conv_1x1.conv')


# --------------------------------------------------------------------------------------- timm's registry


def _pretrained_cfg(record: WeightsRecord) -> PretrainedCfg:
    """timm's description of a file of weights; of the training-form file where nobody published the fold."""
    variant, preprocessing = VARIANTS[record.arch], record.preprocessing
    pool = preprocessing.input_px // variant.total_stride
    return PretrainedCfg(
        url='',  # as in timm
        hf_hub_id=record.available.hub_ref,
        file=str(record.path) if record.path else None,
        input_size=(3, preprocessing.input_px, preprocessing.input_px),
        pool_size=(pool, pool),
        crop_pct=preprocessing.crop_pct,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        num_classes=preprocessing.num_classes,
        first_conv=_first_conv(deploy=record.form == 'deploy'),
        classifier='head.fc',
        license=record.license,
    )


default_cfgs = generate_default_cfgs({name: _pretrained_cfg(record) for name, record in read_manifest().items()})


def _create_repvgg(
    variant: Variant,
    *,
    pretrained: bool = False,
    pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    deploy: bool | None = None,
    unfold: bool = False,
    **kwargs: Any,
) -> nn.Module:
    if isinstance(pretrained_cfg, str):
        _check_tag(variant, pretrained_cfg)
    if unfold and not pretrained:
        raise ValueError(
            'unfold=True unfolds weights that pretrained=True loads; for a file, create the model and call '
            'repvgg_zoo.load_checkpoint(model, path, unfold=True)'
        )
    cfg = resolve_pretrained_cfg(variant.name, pretrained_cfg, pretrained_cfg_overlay)
    if unfold:  # whatever the config.json of a folder of the deploy form says
        deploy = False
    elif deploy is None:
        deploy = (cfg.tag or '').endswith(DEPLOY_SUFFIX)
    cfg = dataclasses.replace(cfg, first_conv=_first_conv(deploy=deploy))

    def build(**model_kwargs: Any) -> RepVGG:
        if (
            pretrained
            and not unfold
            and model_kwargs.get('device') is None
            and torch.get_default_device().type == 'cpu'
        ):
            # neither memory nor time for weights that are replaced at once
            model = RepVGG(variant, deploy=deploy, **(model_kwargs | {'device': 'meta'}))
            load_pretrained(model, cfg, cache_dir=cache_dir)
            if not any(t.is_meta for t in (*model.parameters(), *model.buffers())):
                return model
        model = RepVGG(variant, deploy=deploy, **model_kwargs)
        if pretrained:
            load_pretrained(model, cfg, cache_dir=cache_dir, unfold=unfold)
        return model

    model = build_model_with_cfg(
        build,
        variant.name,
        pretrained=False,
        pretrained_cfg=dataclasses.replace(cfg, state_dict=None),
        feature_cfg=dict(flatten_sequential=True) | kwargs.pop('feature_cfg', {}),
        **kwargs,
    )
    if isinstance(model, RepVGG):
        model._describe_first_conv()
    return model


def _check_tag(variant: Variant, tag: str) -> None:
    tags = list(default_cfgs[variant.name].cfgs)
    if tag not in tags:
        raise RuntimeError(f'unknown tag {tag!r} of {variant.name};{suggestion(tag, tags)} it has: {", ".join(tags)}')


def _entrypoint(variant: Variant) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create_repvgg(variant, pretrained=pretrained, **kwargs)

    create.__name__ = create.__qualname__ = variant.name
    create.__doc__ = (
        f'{variant.name}: stages of {variant.depths} blocks and {variant.stage_channels} channels.\n\n'
        'Takes the arguments of `timm.create_model`, `deploy=True` for the deploy form, `block=` for another '
        'training-time block, and `unfold=True` to make its branches from deploy-form weights.'
    )
    return create


with warnings.catch_warnings():  # most names are timm's own, and are taken over on purpose
    warnings.simplefilter('ignore')
    for _variant in VARIANTS.values():
        globals()[_variant.name] = register_model(_entrypoint(_variant))
