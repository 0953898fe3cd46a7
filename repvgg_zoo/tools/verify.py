"""Whether two models compute the same function."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.data import ImageDataset, create_transform, resolve_model_data_config
from torch import Tensor

from ..checkpoints.errors import CheckpointError
from ..model import RepVGG
from ..reparam.evaluation import disable_fast_path
from .convert import open_model

__all__ = ['MAX_FLOAT32_REL_DIFF', 'Comparison', 'compare', 'float64_rel_diff', 'images_for', 'rel_diff', 'verify']

_RANDOM_IMAGES, _BATCH_SIZE = 8, 2  # large models on many images would double what is in memory
MAX_FLOAT32_REL_DIFF = 1e-3
"""What storing both forms in float32 explains: an ulp or two a weight, amplified by some fifty layers."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far the logits of two models are apart, over all images and classes."""

    images: int
    max_abs_diff: float
    max_rel_diff: float
    """Largest absolute difference, relative to the largest logit."""
    top1_agreement_pct: float
    """Images on which both models have the same top class, in per cent."""

    @property
    def same(self) -> bool:
        """Whether the models compute the same function, as far as float32 weights can."""
        return self.max_rel_diff <= MAX_FLOAT32_REL_DIFF and self.top1_agreement_pct == 100


def verify(
    a: str | Path,
    b: str | Path | None = None,
    *,
    images: str | Path | None = None,
    variant: str | None = None,
    block: str | None = None,
) -> dict[str, Comparison]:
    """Compare two checkpoints, or a training-form one and its fold, in float32 and in float64.

    `a` and `b` are what `repvgg_zoo.convert.open_model` takes, `variant` and `block` those of `a`; `variant` is that of
    `b` too, where it does not tell it itself. Runs on the images below a folder, or on random ones.
    """
    model_a = open_model(a, variant=variant, block=block)
    if b is not None:
        model_b = open_model(b, variant=model_a.variant.name)
    elif model_a.deploy:
        raise CheckpointError(f'{str(a)!r} is of the deploy form, so there is no other form of it to compare with')
    else:
        model_b = copy.deepcopy(model_a).eval().switch_to_deploy()
    return {
        str(dtype).removeprefix('torch.'): compare(model_a, model_b, images_for(model_a, images), dtype=dtype)
        for dtype in (torch.float32, torch.float64)
    }


def compare(a: RepVGG, b: RepVGG, batches: Iterator[Tensor], *, dtype: torch.dtype) -> Comparison:
    """Run two models in eval mode and `dtype` on batches of images, `(N, C, H, W)`."""
    if (a.in_chans, a.num_classes) != (b.in_chans, b.num_classes):
        raise ValueError(
            f'the models differ in shape: {a.in_chans} channels to {a.num_classes} classes, and {b.in_chans} channels '
            f'to {b.num_classes} classes'
        )
    a, b = (copy.deepcopy(model).to(dtype).eval() for model in (a, b))
    images = agreeing = 0
    max_abs_diff = largest = torch.zeros((), dtype=torch.float64)
    with torch.inference_mode(), disable_fast_path():
        for batch in batches:
            logits_a, logits_b = a(batch.to(dtype)).double(), b(batch.to(dtype)).double()
            images += len(batch)
            agreeing += int((logits_a.argmax(1) == logits_b.argmax(1)).sum())
            max_abs_diff = torch.maximum(max_abs_diff, (logits_a - logits_b).abs().max())  # keeps NaN, unlike max()
            largest = torch.maximum(largest, logits_a.abs().max())
    return Comparison(
        images=images,
        max_abs_diff=max_abs_diff.item(),
        max_rel_diff=(max_abs_diff / largest).item() if max_abs_diff != 0 else 0.0,
        top1_agreement_pct=100 * agreeing / images,
    )


def float64_rel_diff(model: RepVGG, x: Tensor) -> float:
    """Largest difference between the logits of a model and of its fold, both in float64, relative to the largest logit.

    `x` is `(N, C, H, W)`; the model is in eval mode. One block at a time is copied, so the memory is that of
    a block.
    """
    training = deploy = x.double()
    with torch.inference_mode(), disable_fast_path():
        for block in (model.stem, *(block for stage in model.stages for block in stage)):
            exact = copy.deepcopy(block).double()
            training = exact(training)
            deploy = exact.switch_to_deploy()(deploy)
        head = copy.deepcopy(model.head).double()
        return rel_diff(head(training), head(deploy))


def rel_diff(a: Tensor, b: Tensor) -> float:
    """Largest difference of two tensors, relative to the largest value of the first; NaN if either holds one."""
    diff = (a.double() - b.double()).abs().max()
    return 0.0 if diff == 0 else (diff / a.double().abs().max()).item()


def images_for(model: RepVGG, folder: str | Path | None = None) -> Iterator[Tensor]:
    """Batches of the images below a folder, preprocessed for the model; without one, random images."""
    config = resolve_model_data_config(model)
    if folder is None:
        size = model.in_chans, *config['input_size'][1:]
        yield from torch.randn(_RANDOM_IMAGES, *size, generator=torch.Generator().manual_seed(0)).split(_BATCH_SIZE)
        return
    if model.in_chans != 3:
        raise ValueError(f'the images have 3 channels, and the model takes {model.in_chans}; leave the images out')
    if not Path(folder).is_dir():
        raise FileNotFoundError(f'no folder of images at {str(folder)!r}')
    dataset = ImageDataset(str(folder), transform=create_transform(**config))
    for batch, _ in torch.utils.data.DataLoader(dataset, batch_size=_BATCH_SIZE):
        yield batch
