"""Comparison of two models: do they compute the same function?"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import torch
from timm.data import ImageDataset, create_transform, resolve_model_data_config
from torch import Tensor

from ..checkpoints.errors import CheckpointError
from ..model import RepVGG
from ..reparam.evaluation import disable_fast_path
from ..reparam.fold import exact_dtype
from ..reparam.switch import switch_to_deploy
from ..reparam.tolerance import MAX_REL_DIFF, max_rel_diff, rel_diff
from .console import print_table
from .convert import open_model
from .devices import add_device_argument
from .model_arguments import ModelOptions, add_model_arguments, model_options
from .reference import REFERENCE, ReferenceCheck, check_reference, find_reference

__all__ = [
    'Comparison',
    'add_arguments',
    'compare',
    'float64_rel_diff',
    'images_for',
    'main',
    'verify',
    'verify_reference',
]

_RANDOM_IMAGES, _BATCH_SIZE = 8, 2  # large models on many images would double what is in memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `repvgg-zoo verify`."""
    parser.epilog = (
        'Exits with 0 if all top classes agree and the logits differ by no more than float32 rounding explains '
        f'({MAX_REL_DIFF[torch.float32]:g} of the largest), with 1 otherwise. Published models carry reference outputs '
        '(test/rand_tensors.safetensors): without B, A is compared with those too.'
    )
    parser.add_argument('a', metavar='A', help='checkpoint file, model folder, or timm model name')
    parser.add_argument('b', metavar='B', nargs='?', help='another one (default: the fold of A)')
    parser.add_argument('--images', metavar='FOLDER', help='real images to compare on (default: random ones)')
    add_device_argument(parser, what='both run')
    add_model_arguments(parser, 'A')


def main(args: argparse.Namespace) -> int:
    """Run `repvgg-zoo verify`."""
    model = open_model(args.a, **model_options(args)).to(args.device)
    reference = None if args.b else _check_reference(model, args.a)
    if reference is not None:
        differences = ', '.join(f'{name} {diff:.1e}' for name, diff in reference.rel_diffs.items())
        print(f'relative difference from the reference outputs: {differences}')
    elif not args.b:
        print(f'{args.a} has no reference outputs ({REFERENCE})')
    same = reference is None or reference.same
    if reference is None or reference.form == 'training':
        results = _compare_with(model, args.a, args.b, images=args.images)
        _print_comparisons(results)
        same = same and all(result.same for result in results.values())
    print('the same function' if same else 'NOT the same function')
    return 0 if same else 1


def _print_comparisons(results: Mapping[str, Comparison]) -> None:
    print_table(
        ('computed in', 'images', 'largest\ndifference', 'relative to the\nlargest logit', 'same top class'),
        [
            (
                dtype if result.device == 'cpu' else f'{dtype}, {result.device}',
                str(result.images),
                f'{result.max_abs_diff:.2e}',
                f'{result.max_rel_diff:.2e}',
                f'{result.top1_agreement_pct:.2f} %',
            )
            for dtype, result in results.items()
        ],
    )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Difference between the logits of two models, over all images and classes."""

    images: int
    device: str = 'cpu'
    """Where both were computed."""
    max_abs_diff: float
    max_rel_diff: float
    """Largest absolute difference, relative to the largest logit of the first model."""
    top1_agreement_pct: float
    """Images on which both models have the same top class, in per cent."""

    @property
    def same(self) -> bool:
        """Whether the models compute the same function, as far as float32 weights can."""
        bound = max_rel_diff(torch.float32, torch.device(self.device))
        return self.max_rel_diff <= bound and self.top1_agreement_pct == 100


def verify(
    a: str | Path,
    b: str | Path | None = None,
    *,
    images: str | Path | None = None,
    device: str = 'cpu',
    **options: Unpack[ModelOptions],
) -> dict[str, Comparison]:
    """Compare two checkpoints, or a training-form one and its fold.

    Args:
        a: Checkpoint file, model folder or timm model name.
        b: Another one, by default the fold of `a`.
        images: Folder of images to compare on, by default random images.
        device: Where to compute. If it has no float64, float64 is computed on the CPU.
        options: How to read `a`, see `open_model`. A bare file `b` is taken for the same variant.

    Returns:
        The comparison in float32 and the one in float64, by dtype.

    Raises:
        CheckpointError: A checkpoint cannot be read, or `a` is of the deploy form and there is no `b`.
        FileNotFoundError: A checkpoint or the folder of images does not exist.
        ValueError: The models differ in channels or classes, or do not take the images.

    Example:
        >>> verify('test_repvgg', 'test_repvgg.cifar10_deploy')['float32'].same
        True
    """
    return _compare_with(open_model(a, **options).to(device), a, b, images=images)


def _compare_with(
    model: RepVGG, a: str | Path, b: str | Path | None, *, images: str | Path | None
) -> dict[str, Comparison]:
    """Compare the model of `a` with that of `b`, or with its fold."""
    if b is not None:
        overrides = model.variant.overrides if Path(b).is_file() else None
        other = open_model(b, variant=model.variant.name, model_kwargs=overrides)
    elif model.deploy:
        raise CheckpointError(f'{str(a)!r} is of the deploy form, so there is no other form of it to compare with')
    else:
        other = copy.deepcopy(model).eval().switch_to_deploy()
    return {
        str(dtype).removeprefix('torch.'): compare(model, other, images_for(model, images), dtype=dtype)
        for dtype in (torch.float32, torch.float64)
    }


def verify_reference(a: str | Path, **options: Unpack[ModelOptions]) -> ReferenceCheck | None:
    """Compare a model with the reference outputs that it was published with.

    Args:
        a: Checkpoint file, model folder or timm model name.
        options: How to read it, see `open_model`.

    Returns:
        The differences, or None if it has no reference outputs.

    Raises:
        CheckpointError: The model or its reference outputs cannot be read.
        FileNotFoundError: There is no such model.

    Example:
        >>> verify_reference('test_repvgg') is None  # the bundled weights have none
        True
    """
    return _check_reference(open_model(a, **options), a)


def _check_reference(model: RepVGG, source: str | Path) -> ReferenceCheck | None:
    path = find_reference(source, model)
    return None if path is None else check_reference(model.float().eval(), path)


def compare(a: RepVGG, b: RepVGG, batches: Iterator[Tensor], *, dtype: torch.dtype) -> Comparison:
    """Compare two models in eval mode, on the device of the first one.

    If that has no such dtype, both are compared on the CPU.

    Args:
        a: A model. Relative differences are relative to its logits.
        b: Another model.
        batches: Images, `(N, C, H, W)`.
        dtype: What both compute in.

    Returns:
        The comparison.

    Raises:
        ValueError: The models differ in channels or classes.

    Example:
        >>> model = open_model('test_repvgg')
        >>> compare(model, model, images_for(model), dtype=torch.float32).max_abs_diff
        0.0
    """
    if (a.in_chans, a.num_classes) != (b.in_chans, b.num_classes):
        raise ValueError(
            f'the models differ in shape: {a.in_chans} channels to {a.num_classes} classes, and {b.in_chans} channels '
            f'to {b.num_classes} classes'
        )
    device = _device_for(a, dtype)
    a, b = (copy.deepcopy(model).to(device).to(dtype).eval() for model in (a, b))
    images = agreeing = 0
    max_abs_diff = largest = torch.zeros((), dtype=torch.float64)
    with torch.inference_mode(), disable_fast_path():
        for batch in batches:
            x = batch.to(device).to(dtype)
            logits_a, logits_b = (model(x).cpu().double() for model in (a, b))
            images += len(batch)
            agreeing += int((logits_a.argmax(1) == logits_b.argmax(1)).sum())
            max_abs_diff = torch.maximum(max_abs_diff, (logits_a - logits_b).abs().max())  # keeps NaN, unlike max()
            largest = torch.maximum(largest, logits_a.abs().max())
    return Comparison(
        images=images,
        device=str(device),
        max_abs_diff=max_abs_diff.item(),
        max_rel_diff=(max_abs_diff / largest).item() if max_abs_diff != 0 else 0.0,
        top1_agreement_pct=100 * agreeing / images,
    )


def float64_rel_diff(model: RepVGG, x: Tensor) -> float:
    """Compute the difference between the logits of a model and of its fold, both in float64.

    They run on the device of the model, or on the CPU if that has no float64.
    One block at a time is copied, so the memory needed is that of a block.

    Args:
        model: In the training form and eval mode.
        x: Images, `(N, C, H, W)`.

    Returns:
        Largest difference, relative to the largest logit of the training form.

    Example:
        >>> model = open_model('test_repvgg').eval()
        >>> float64_rel_diff(model, next(images_for(model))) < 1e-12
        True
    """
    device = _device_for(model, torch.float64)
    training = deploy = x.to(device).double()
    with torch.inference_mode(), disable_fast_path():
        for block in (model.stem, *(block for stage in model.stages for block in stage.children())):
            exact = copy.deepcopy(block).to(device).double()
            training = exact(training)
            deploy = switch_to_deploy(exact)(deploy)
        head = copy.deepcopy(model.head).to(device).double()
        return rel_diff(head(deploy), head(training))


def _device_for(model: RepVGG, dtype: torch.dtype) -> torch.device:
    """The device of a model, or the CPU if that has no such dtype."""
    is_possible = dtype != torch.float64 or exact_dtype(next(model.parameters())) == dtype
    return model.device if is_possible else torch.device('cpu')


def images_for(model: RepVGG, folder: str | Path | None = None) -> Iterator[Tensor]:
    """Read images, preprocessed for a model and on its device.

    Args:
        model: The model.
        folder: Folder of images, by default random images.

    Yields:
        Batches, `(N, C, H, W)`.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: The model does not take three channels, as the images have.

    Example:
        >>> next(images_for(open_model('test_repvgg'))).shape
        torch.Size([2, 3, 32, 32])
    """
    config = resolve_model_data_config(model)
    if folder is None:
        size = model.in_chans, *config['input_size'][1:]
        x = torch.randn(_RANDOM_IMAGES, *size, generator=torch.Generator().manual_seed(0))  # everywhere the same
        yield from x.to(model.device).split(_BATCH_SIZE)
        return
    if model.in_chans != 3:
        raise ValueError(f'the images have 3 channels, and the model takes {model.in_chans}; leave the images out')
    if not Path(folder).is_dir():
        raise FileNotFoundError(f'no folder of images at {str(folder)!r}')
    dataset = ImageDataset(str(folder), transform=create_transform(**config))
    for batch, _ in torch.utils.data.DataLoader(dataset, batch_size=_BATCH_SIZE):
        yield batch.to(model.device)
