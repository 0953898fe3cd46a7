"""timm's registry: default configurations and entry points.

Every entry point takes the arguments of `timm.create_model` and of `repvgg_zoo.RepVGG`, and these:

deploy: Build the deploy form. By default the tag of the weights decides. Training-form weights are folded.
depths, width, strides, groups: Numbers to use instead of the variant's, see `repvgg_zoo.variants.Variant`.
unfold: Make the branches of `block=` from deploy-form weights. This needs `pretrained=True`, and no `deploy=True`.
cache_dir: Folder for downloads.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs, resolve_pretrained_cfg
from timm.models import register_model as register_with_timm
from torch import nn

from .model import RepVGG
from .pretrained.load import load_pretrained
from .pretrained.manifest import DEPLOY_SUFFIX, WeightsRecord, read_manifest
from .variants import OVERRIDES, VARIANTS, Variant, customized, get_variant, suggestion

__all__ = ['RepVGG']  # timm adds the entry points


def _first_conv(*, deploy: bool) -> Any:
    """Return the path of the convolution that reads the images, or several, which timm takes but does not annotate."""
    return 'stem.reparam_conv' if deploy else ('stem.conv_kxk.conv', 'stem.conv_1x1.conv')


def _pool_size(variant: Variant, input_size: Sequence[int]) -> tuple[int, int]:
    """Return height and width of the last feature map, rounded up as the convolutions do."""
    height, width = (-(-side // variant.total_stride) for side in input_size[1:])
    return height, width


def _pretrained_cfg(record: WeightsRecord) -> PretrainedCfg:
    """Describe a file of weights to timm. If nobody published the fold, the file is that of the training form."""
    variant, preprocessing = VARIANTS[record.arch], record.preprocessing
    input_size = (3, preprocessing.input_px, preprocessing.input_px)
    return PretrainedCfg(
        url=record.available.url or '',  # as timm has it for weights on the Hub
        hf_hub_id=record.available.hub_ref,
        file=str(record.path) if record.path else None,
        input_size=input_size,
        pool_size=_pool_size(variant, input_size),
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
    name: str,
    *,
    pretrained: bool = False,
    pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    deploy: bool | None = None,
    unfold: bool = False,
    **kwargs: Any,
) -> nn.Module:
    variant = customized(get_variant(name), **{field: kwargs.pop(field, None) for field in OVERRIDES})
    if isinstance(pretrained_cfg, str):
        _check_tag(variant, pretrained_cfg)
    if unfold and not pretrained:
        raise ValueError(
            'unfold=True unfolds weights that pretrained=True loads; for a file, create the model and call '
            'repvgg_zoo.load_checkpoint(model, path, unfold=True)'
        )
    source: Any = pretrained_cfg  # timm annotates no PretrainedCfg, but takes one
    cfg = resolve_pretrained_cfg(variant.name, source, pretrained_cfg_overlay)
    saved_args = kwargs.get('pretrained_model_args') or {}  # of a config.json, beside what the caller wants instead
    cfg = dataclasses.replace(cfg, num_classes=saved_args.get('num_classes', cfg.num_classes))
    if unfold:
        # the config.json of a model folder may say deploy, and timm may mix its arguments with the caller's
        is_of_config = saved_args.get('deploy') if saved_args else cfg.source is not None
        if deploy and not is_of_config:
            raise ValueError(
                'deploy=True builds the deploy form, and unfold=True the branches of the training form; give one of '
                'them (deploy=True loads weights of either form)'
            )
        deploy = False
    elif deploy is None:
        deploy = (cfg.tag or '').endswith(DEPLOY_SUFFIX)
    cfg = dataclasses.replace(cfg, first_conv=_first_conv(deploy=deploy))
    if 'strides' in variant.overrides:
        cfg = dataclasses.replace(cfg, pool_size=_pool_size(variant, cfg.input_size))

    def build(**model_kwargs: Any) -> RepVGG:
        if not pretrained:
            return RepVGG(variant, deploy=deploy, **model_kwargs)
        given = model_kwargs.get('device')
        device = torch.get_default_device() if given is None else torch.device(given)
        # unfolding starts from the initial values of the branches
        make = RepVGG if unfold or device.type == 'meta' else _build_without_values
        model = make(variant, deploy=deploy, **model_kwargs)
        load_pretrained(model, cfg, cache_dir=cache_dir, unfold=unfold, device=device)
        return model

    description: Any = dataclasses.replace(cfg, state_dict=None)
    model = build_model_with_cfg(
        build,
        variant.name,
        pretrained=False,
        pretrained_cfg=description,
        feature_cfg=dict(flatten_sequential=True) | kwargs.pop('feature_cfg', {}),
        **kwargs,
    )
    if isinstance(model, RepVGG):
        model._describe_form()
    return model


def _build_without_values(variant: Variant, **kwargs: Any) -> RepVGG:
    """Build a model whose tensors are all loaded next, and spend no memory or time on initial values."""
    model = RepVGG(variant, **(kwargs | {'device': 'meta'}))
    tensors = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    if tensors <= model.state_dict().keys():  # no layer has a buffer that no file holds
        return model
    return RepVGG(variant, **kwargs)


def _check_tag(variant: Variant, tag: str) -> None:
    tags = list(default_cfgs[variant.name].cfgs)
    if tag not in tags:
        raise RuntimeError(f'unknown tag {tag!r} of {variant.name};{suggestion(tag, tags)} it has: {", ".join(tags)}')


def register_model(entry_point: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Register an entry point with timm, without timm's warning, because most names replace timm's on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return register_with_timm(entry_point)


@register_model
def repvgg_a0(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepVGG-A0 (arXiv 2101.03697)."""
    return _create_repvgg('repvgg_a0', pretrained=pretrained, **kwargs)


@register_model
def repvgg_a1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepVGG-A1 (arXiv 2101.03697)."""
    return _create_repvgg('repvgg_a1', pretrained=pretrained, **kwargs)


@register_model
def repvgg_a2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepVGG-A2 (arXiv 2101.03697)."""
    return _create_repvgg('repvgg_a2', pretrained=pretrained, **kwargs)


@register_model
def repvgg_b0(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepVGG-B0 (arXiv 2101.03697)."""
    return _create_repvgg('repvgg_b0', pretrained=pretrained, **kwargs)


@register_model
def repvgg_b1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepVGG-B1 (arXiv 2101.03697)."""
    return _create_repvgg('repvgg_b1', pretrained=pretrained, **kwargs)


@register_model
def repvgg_b1g2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepVGG-B1g2 (arXiv 2101.03697)."""
    return _create_repvgg('repvgg_b1g2', pretrained=pretrained, **kwargs)


@register_model
def repvgg_b1g4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepVGG-B1g4 (arXiv 2101.03697)."""
    return _create_repvgg('repvgg_b1g4', pretrained=pretrained, **kwargs)


@register_model
def repvgg_b2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepVGG-B2 (arXiv 2101.03697)."""
    return _create_repvgg('repvgg_b2', pretrained=pretrained, **kwargs)


@register_model
def repvgg_b2g2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepVGG-B2g2 (arXiv 2101.03697)."""
    return _create_repvgg('repvgg_b2g2', pretrained=pretrained, **kwargs)


@register_model
def repvgg_b2g4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepVGG-B2g4 (arXiv 2101.03697)."""
    return _create_repvgg('repvgg_b2g4', pretrained=pretrained, **kwargs)


@register_model
def repvgg_b3(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepVGG-B3 (arXiv 2101.03697)."""
    return _create_repvgg('repvgg_b3', pretrained=pretrained, **kwargs)


@register_model
def repvgg_b3g2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepVGG-B3g2 (arXiv 2101.03697)."""
    return _create_repvgg('repvgg_b3g2', pretrained=pretrained, **kwargs)


@register_model
def repvgg_b3g4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepVGG-B3g4 (arXiv 2101.03697)."""
    return _create_repvgg('repvgg_b3g4', pretrained=pretrained, **kwargs)


@register_model
def repvgg_d2se(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepVGG-D2se of the official code: deeper, with squeeze-and-excitation."""
    return _create_repvgg('repvgg_d2se', pretrained=pretrained, **kwargs)


@register_model
def repvggplus_l2pse(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepVGGplus-L2pse of the official code: squeeze-and-excitation last, auxiliary heads to train with."""
    return _create_repvgg('repvggplus_l2pse', pretrained=pretrained, **kwargs)


@register_model
def repvgg_a0_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepVGG-A0 for images of 32 pixels: the stem and the first stage keep the resolution."""
    return _create_repvgg('repvgg_a0_cifar', pretrained=pretrained, **kwargs)


@register_model
def repvgg_a1_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepVGG-A1 for images of 32 pixels: the stem and the first stage keep the resolution."""
    return _create_repvgg('repvgg_a1_cifar', pretrained=pretrained, **kwargs)


@register_model
def repvgg_a2_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RepVGG-A2 for images of 32 pixels: the stem and the first stage keep the resolution."""
    return _create_repvgg('repvgg_a2_cifar', pretrained=pretrained, **kwargs)


@register_model
def test_repvgg(pretrained: bool = False, **kwargs: Any) -> nn.Module:  # noqa: PT028
    """RepVGG for tests: a tiny network for images of 32 pixels."""
    return _create_repvgg('test_repvgg', pretrained=pretrained, **kwargs)
