"""A pytest plugin that registers `test_repvgg.owl` and its deploy tag, whose weights are on the Hub."""

from __future__ import annotations

from typing import Any

import timm
from timm.models import generate_default_cfgs, register_model
from torch import nn

import repvgg_zoo  # noqa: F401

_entry_point = timm.model_entrypoint('test_repvgg')
_like = timm.get_pretrained_cfg('test_repvgg.cifar10')
_cfg = {
    'hf_hub_id': 'timm/',
    'num_classes': 1000,
    **{name: getattr(_like, name) for name in ('input_size', 'pool_size', 'crop_pct', 'interpolation', 'mean', 'std')},
}
default_cfgs = generate_default_cfgs({f'test_repvgg.owl{suffix}': dict(_cfg) for suffix in ('', '_deploy')})


@register_model
def test_repvgg(pretrained: bool = False, pretrained_cfg: Any = None, **kwargs: Any) -> nn.Module:  # noqa: PT028
    """Build the zoo's model with the configuration of a tag of this file."""
    cfg = timm.get_pretrained_cfg(f'test_repvgg.{pretrained_cfg or "owl"}')
    return _entry_point(pretrained=pretrained, pretrained_cfg=cfg, **kwargs)
