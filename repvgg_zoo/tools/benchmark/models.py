"""Models to compare: the zoo's, timm's own RepVGG, and others of timm and torchvision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import timm
import torchvision
from timm.models import byobnet, get_pretrained_cfg_value
from timm.utils import reparameterize_model
from torch import nn

from ...pretrained.manifest import read_manifest
from ...variants import VARIANTS, suggestion

__all__ = ['PEERS', 'BenchmarkForm', 'ModelName', 'timms_own']

BenchmarkForm: TypeAlias = Literal['training', 'deploy', 'single']
"""The two forms of RepVGG, and `single` for models that have one form."""
Source: TypeAlias = Literal['zoo', 'timm', 'torchvision']

PEERS = (
    'torchvision:resnet18',
    'torchvision:resnet34',
    'torchvision:resnet50',
    'torchvision:resnet101',
    'torchvision:resnext50_32x4d',
    'torchvision:vgg16',
    'torchvision:googlenet',
    'torchvision:densenet121',
    'torchvision:efficientnet_b0',
    'torchvision:regnet_x_3_2gf',
    'torchvision:mobilenet_v2',
    'torchvision:shufflenet_v2_x1_0',
    'timm:mobilenetv1_100.ra4_e3600_r224_in1k',
    'timm:legacy_xception.tf_in1k',
    'timm:inception_resnet_v2.tf_in1k',
    'timm:nasnetalarge.tf_in1k',
    'timm:pnasnet5large.tf_in1k',
)
"""The architectures of the tables and of the related work of arXiv 2101.03697."""

_TIMM_TOP1_PCT = {
    'mobilenetv1_100.ra4_e3600_r224_in1k': 75.388,
    'legacy_xception.tf_in1k': 79.058,
    'inception_resnet_v2.tf_in1k': 80.434,
    'nasnetalarge.tf_in1k': 82.638,
    'pnasnet5large.tf_in1k': 82.814,
}
"""From timm's results/results-imagenet.csv, at the input size of the configuration. timm's wheel does not have it."""


class ModelName(NamedTuple):
    """`ARCH` of the zoo, `timm:NAME` or `torchvision:NAME`."""

    source: Source
    name: str

    @classmethod
    def parse(cls, text: str) -> ModelName:
        """Parse a name.

        Args:
            text: The name.

        Returns:
            The name in two parts.

        Raises:
            ValueError: Its source does not have it. The message suggests others.

        Example:
            >>> ModelName.parse('timm:resnet18')
            ModelName(source='timm', name='resnet18')
        """
        source, _, name = text.rpartition(':')
        source = source or 'zoo'
        if source not in _LISTS:
            raise ValueError(f'unknown source {source!r} of {text!r}; it can be timm: or torchvision:')
        known = _LISTS[source]()
        if (name.partition('.')[0] if source == 'timm' else name) not in known:
            hint = suggestion(name, known)
            others = '' if source != 'zoo' else '; models of others are called timm:NAME or torchvision:NAME'
            raise ValueError(f'unknown model {text!r};{hint or " see the lists of its source"}{others}')
        if source == 'timm' and '.' in name:
            tags = [known.partition('.')[2] for known in timm.list_pretrained(f'{name.partition(".")[0]}.*')]
            if name.partition('.')[2] not in tags:
                raise ValueError(f'unknown tag in {text!r}; there are: {", ".join(tags)}')
        return cls(cast('Source', source), name)

    def __str__(self) -> str:
        return self.name if self.source == 'zoo' else f'{self.source}:{self.name}'

    @property
    def is_timms_repvgg(self) -> bool:
        """Whether it is a RepVGG of timm's own code."""
        return self.source == 'timm' and self.name in VARIANTS

    @property
    def has_forms(self) -> bool:
        """Whether the model has a training form and a deploy form."""
        return self.source == 'zoo' or self.is_timms_repvgg

    @property
    def input_px(self) -> int:
        """Side of the square images that the published accuracy holds for."""
        if self.source == 'torchvision':
            return _torchvision_weights(self.name).transforms().crop_size[0]
        return cast('tuple[int, int, int]', get_pretrained_cfg_value(self.name, 'input_size'))[-1]

    @property
    def top1_pct(self) -> float | None:
        """Published top-1 on ImageNet-1k; for torchvision, that of its first weights, trained as in the papers."""
        if self.source == 'torchvision':
            return _torchvision_weights(self.name).meta['_metrics']['ImageNet-1K']['acc@1']
        if self.source == 'timm' and not self.is_timms_repvgg:
            return _TIMM_TOP1_PCT.get(self.name)
        published = next(r.published for r in read_manifest().values() if r.arch == self.name)
        return published[0].top1_pct if published else None

    def build(self, form: BenchmarkForm, *, device: str = 'cpu', weights: str | None = None) -> nn.Module:
        """Build the model in eval mode.

        Args:
            form: The form to build.
            device: Its device.
            weights: File of training-form weights of a RepVGG; fresh weights by default.

        Returns:
            The model.
        """
        load: dict[str, Any] = (
            {} if weights is None else dict(pretrained=True, pretrained_cfg_overlay=dict(file=weights))
        )
        if self.source == 'torchvision':
            fresh = dict(aux_logits=False, init_weights=False) if self.name == 'googlenet' else {}
            model = torchvision.models.get_model(self.name, weights=None, **fresh)
        elif self.source == 'zoo':
            model = timm.create_model(self.name, deploy=form == 'deploy', device=device, **load)
        elif self.is_timms_repvgg:
            model = getattr(byobnet, self.name)(device=device, **load)  # not the registry, whose entry is the zoo's
            model = reparameterize_model(model, inplace=True) if form == 'deploy' else model
        else:
            model = timm.create_model(self.name)
        return model.to(device).eval()


def _timms_models() -> list[str]:
    """Names in timm's registry, except those that only the zoo has put there."""
    return [name for name in timm.list_models() if name not in VARIANTS or hasattr(byobnet, name)]


_LISTS: dict[str, Callable[[], list[str]]] = {
    'zoo': lambda: list(VARIANTS),
    'timm': _timms_models,
    'torchvision': lambda: torchvision.models.list_models(torchvision.models),
}


def timms_own(name: ModelName) -> ModelName | None:
    """Find timm's own implementation of a variant of the zoo.

    Args:
        name: A model.

    Returns:
        Its name. None if timm does not have the variant.

    Example:
        >>> str(timms_own(ModelName.parse('repvgg_a0')))
        'timm:repvgg_a0'
    """
    return ModelName('timm', name.name) if name.source == 'zoo' and hasattr(byobnet, name.name) else None


def _torchvision_weights(name: str) -> torchvision.models.WeightsEnum:
    return next(iter(torchvision.models.get_model_weights(name)))
