"""What a card says about the model itself: its sizes, its preprocessing, and who can load it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import resolve_model_data_config
from timm.models import byobnet
from torch.overrides import TorchFunctionMode

from ...checkpoints.state_dicts import Form
from ...model import RepVGG
from ..benchmark.cases import forward_gmacs

__all__ = ['ModelFacts', 'facts_of']

_ARGS_OF_TIMM = {'in_chans', 'num_classes', 'global_pool', 'drop_rate', 'drop_path_rate'}


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """A model in one form, as its card describes it."""

    variant: str
    """Name in timm's registry, and what differs from the variant of this name."""
    form: Form
    block: str
    """Training-time block."""
    in_plain_timm: bool
    """timm loads it without this package."""
    params: int
    gmacs: float
    """Multiply-adds for one image, in 1e9."""
    activations: int
    """Values that convolutions and linear layers give for one image."""
    num_classes: int
    num_features: int
    """Size of an embedding."""
    feature_shapes: tuple[tuple[int, int, int, int], ...]
    """Shapes of the feature maps of one image."""
    preprocessing: Mapping[str, Any]
    """timm's data configuration."""

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.preprocessing['input_size']
        return channels, height, width


def facts_of(model: RepVGG) -> ModelFacts:
    """Count and look up what a card says about a model.

    Args:
        model: In eval mode, on any device, the meta device included.

    Returns:
        The facts.

    Example:
        >>> import timm
        >>> facts = facts_of(timm.create_model('repvgg_a0', device='meta').eval())
        >>> facts.params, round(facts.gmacs, 2), round(facts.activations / 1e6, 2)
        (9108968, 1.51, 3.59)
    """
    config = resolve_model_data_config(model)
    _, height, width = config['input_size']
    x = torch.empty(1, model.in_chans, height, width, device=model.device, dtype=model.dtype)
    with torch.no_grad(), _CountActivations() as counted:
        model(x)
    infos = model.feature_info
    return ModelFacts(
        variant=str(model.variant),
        form='deploy' if model.deploy else 'training',
        block=model.block,
        in_plain_timm=not model.deploy
        and hasattr(byobnet, model.variant.name)
        and model._model_args.keys() <= _ARGS_OF_TIMM,
        params=sum(p.numel() for name, p in model.named_parameters() if not name.startswith('aux_heads.')),
        gmacs=forward_gmacs(model, x),
        activations=counted.activations,
        num_classes=model.num_classes,
        num_features=model.num_features,
        feature_shapes=tuple(
            (1, i['num_chs'], -(-height // i['reduction']), -(-width // i['reduction'])) for i in infos
        ),
        preprocessing=config | {'input_size': (model.in_chans, height, width)},
    )


class _CountActivations(TorchFunctionMode):
    """Counts the values that convolutions and linear layers give, as the tables of timm do."""

    def __init__(self) -> None:
        super().__init__()
        self.activations = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.conv2d, torch.nn.functional.linear):
            self.activations += result.numel()
        return result
