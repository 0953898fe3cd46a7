"""A check of the preprocessing that is published with weights."""

from __future__ import annotations

import math
from typing import Any

from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from ...model import RepVGG

__all__ = ['INTERPOLATIONS', 'check_preprocessing']

INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
"""What timm resizes images by."""


def check_preprocessing(model: RepVGG) -> None:
    """Raise an error unless timm can prepare images as the configuration of a model says.

    Args:
        model: With the `pretrained_cfg` that is to be published.

    Raises:
        ValueError: A value is impossible, or timm cannot build its transform.

    Example:
        >>> import timm
        >>> model = timm.create_model('test_repvgg')
        >>> model.pretrained_cfg['crop_pct'] = 87.5
        >>> check_preprocessing(model)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: the preprocessing has crop_pct 87.5; ...
    """
    config = resolve_model_data_config(model)
    told = model.pretrained_cfg.get('crop_pct')
    crop_pct = config['crop_pct'] if told is None else told  # timm takes 0 for nothing told
    if not 0.1 <= crop_pct <= 1:  # images are resized to the input divided by it
        raise ValueError(
            f'the preprocessing has crop_pct {crop_pct:g}; it is the part of an image that the crop keeps, 0.1 to 1'
        )
    for name, lowest, bounds in (('mean', 0, 'from 0 to 1'), ('std', math.ulp(0), 'more than 0 and at most 1')):
        values = config[name]
        if len(values) not in (3, model.in_chans):  # timm averages those of three channels for any other number
            raise ValueError(f'the preprocessing has {len(values)} values of {name} for {model.in_chans} channels')
        if not all(lowest <= value <= 1 for value in values):
            raise ValueError(
                f'the preprocessing has {name} {", ".join(f"{value:g}" for value in values)}; each value is {bounds}, '
                'as pixels are from 0 to 1'
            )
    _try_on_image(config, model.in_chans)


def _try_on_image(config: dict[str, Any], in_chans: int) -> None:
    """Prepare an image once, because timm's transforms find some mistakes only then."""
    try:
        transform = create_transform(**config)
        if in_chans == 3:
            transform(Image.new('RGB', config['input_size'][:0:-1]))
    except Exception as error:
        raise ValueError(f'timm cannot prepare images as this says, because of {error!r}: {config}') from error
