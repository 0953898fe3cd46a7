"""From a checkpoint to an INT8 file with a report."""

from __future__ import annotations

import copy
import logging
import math
import random
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack

import torch
from timm.data import ImageDataset, create_transform, resolve_model_data_config
from torch import Tensor
from torch.utils.data import DataLoader

from ...blocks.base import ReparamBlock
from ...model import RepVGG
from ...quantization.equalize import equalize
from ...quantization.finetune import finetune
from ...quantization.onnx_export import export_onnx
from ...quantization.ptq import quantize_onnx
from ...quantization.qat import prepare_qat, roundable_layers, without_quantizers
from ...quantization.qdq import export_qdq
from ...quantization.ranges import layer_ranges
from ...quantization.sensitivity import layer_errors
from ..atomic import new_folder
from ..console import Track
from ..convert import open_model
from ..model_arguments import ModelOptions
from .images import evenly_spaced, image_folder, why_no_top1
from .measure import measure
from .plots import save_ranges_plot
from .report import Precision, QuantizationReport

__all__ = ['FILES', 'quantize']

FILES = ('model.onnx', 'report.json', 'report.md', 'ranges.png')
"""What the folder holds."""

_ANALYSED_IMAGES, _CALIBRATION_BATCH, _TRAINING_BATCH = 64, 50, 128
_AUGMENTATION: dict[str, Any] = dict(scale=(0.7, 1.0), ratio=(0.9, 1.1), color_jitter=None)
"""Mild: the images are to look as those that the model meets."""


def quantize(
    source: str | Path,
    target: str | Path,
    *,
    images: str | Path,
    calibration: str | Path | None = None,
    subset: int = 300,
    equalize_layers: bool = False,
    full_range: bool = False,
    keep_float: int = 0,
    finetune_on: str | Path | None = None,
    epochs: int = 3,
    lr: float = 1e-4,
    overwrite: bool = False,
    device: str = 'cpu',
    track: Track,
    **options: Unpack[ModelOptions],
) -> QuantizationReport:
    """Write a checkpoint's deploy form in INT8 as a folder.

    The folder holds `model.onnx`, `report.json`, `report.md` and `ranges.png`. The model has 8-bit weights, quantized
    per channel, quantizers of the activations (QDQ), and a free batch size. NNCF calibrates on real images, prepared as
    the model expects them, and corrects the biases for the shift of each layer's mean. With `finetune_on`, a training
    comes after that, and the file is of the trained model unless that agrees less often with float32.

    Args:
        source: Checkpoint file, model folder or timm model name, in either form.
        target: Folder to write.
        images: Folder of images to evaluate on. Top-1 is measured if it has a folder for each class, in the order of
            the model's classes.
        calibration: Folder of images to calibrate on, best of the training set; `images` by default.
        subset: Number of images to calibrate on, spread evenly over the folder.
        equalize_layers: Apply `equalize` first.
        full_range: Let weights use all 8 bits instead of 7, see `quantize_onnx`.
        keep_float: Number of layers that stay in float32: those that suffer most from rounding.
        finetune_on: Folder of training images for quantization-aware training, see `quantization.finetune`. Labels are
            not read. The draws of the training are the same each time.
        epochs: Passes over these images.
        lr: Learning rate of the training.
        overwrite: Replace the target if it is such a folder.
        device: Where PyTorch trains, and computes the sensitivity of the layers. OpenVINO runs on the CPU.
        track: Shows the progress, see `repvgg_zoo.tools.console`.
        options: How to read the source, see `open_model`.

    Returns:
        The report.

    Raises:
        ModuleNotFoundError: A package of the extra `quantize` is not installed.
        FileNotFoundError: There is no such folder of images, or it is empty.
        ValueError: `subset` or `epochs` is less than 1, `lr` is not above 0, `keep_float` is negative or leaves nothing
            to quantize, the model does not take 3 channels or gives values that are not finite, or there is nothing to
            equalise or no classifier to train.
        FileExistsError: The target exists, and `overwrite` is off or it holds other files.

    Example:
        >>> report = quantize('test_repvgg', 'int8', images='cifar10', track=no_progress)  # doctest: +SKIP
    """
    _require()
    for name, value, least in (('subset', subset, 1), ('epochs', epochs, 1), ('keep_float', keep_float, 0)):
        if value < least:
            raise ValueError(f'{name} is {value}; it takes a number from {least} on')
    if not 0 < lr < math.inf:
        raise ValueError(f'lr is {lr}; it takes a number above 0')
    evaluated, calibrated = image_folder(images), image_folder(images if calibration is None else calibration)
    trained_on = None if finetune_on is None else image_folder(finetune_on)
    with new_folder(target, overwrite=overwrite) as folder:
        model = open_model(source, **options).float().eval().switch_to_deploy()
        if model.in_chans != 3:
            raise ValueError(f'the images have 3 channels, and the model takes {model.in_chans}')
        if trained_on is not None and model.num_classes == 0:
            raise ValueError('the model has no classifier, so there are no answers to train on; leave finetune out')
        data_config = resolve_model_data_config(model)
        evaluated.transform = calibrated.transform = create_transform(**data_config)
        chosen = [calibrated[index][0] for index in evenly_spaced(len(calibrated), subset)]
        sample = torch.stack(chosen)
        few = sample[:_ANALYSED_IMAGES]
        with torch.no_grad():
            answers = model(few)
        if not bool(answers.isfinite().all()):
            raise ValueError(f'{source} gives values that are not finite on the images of the calibration')
        ranges = {'before': layer_ranges(model, few)}
        if equalize_layers:
            equalize(model)
        sensitivity = layer_errors(model.to(device), few.to(device), full_range=full_range, track=track)
        kept = tuple(error.layer for error in sensitivity[:keep_float])
        rounded = {error.layer for error in sensitivity} if trained_on is None else _rounded_in_training(model)
        if rounded <= set(kept):
            raise ValueError(f'keep_float is {keep_float} of {len(sensitivity)} layers; leave some to quantize')
        files = {name: folder / f'{name}.onnx' for name in ('float32', 'int8')}
        export_onnx(model.cpu(), sample[:2], files['float32'])
        quantize_onnx(files['float32'], sample.split(1), files['int8'], full_range=full_range, keep_float=kept)
        if trained_on is not None:
            trained_on.transform = create_transform(**data_config, is_training=True, **_AUGMENTATION)
            trained = _train(model, sample, trained_on, rounded & set(kept), full_range, epochs, lr, device, track)
            files['int8 trained'] = folder / 'trained.onnx'
            export_qdq(trained, files['int8 trained'], sample[:2])
            model = without_quantizers(trained)
        if equalize_layers or trained_on is not None:
            ranges['after'] = layer_ranges(model, few)
        no_top1 = why_no_top1(evaluated, model.num_classes)
        precisions = measure(
            files, evaluated, sample[:1], num_classes=model.num_classes, has_top1=no_top1 is None, track=track
        )
        trained_is_worse = trained_on is not None and _agreement(precisions[-1]) < _agreement(precisions[-2])
        if trained_is_worse:
            precisions[-2:] = reversed(precisions[-2:])
        report = QuantizationReport(
            variant=model.variant.name,
            images=len(evaluated),
            calibration_images=len(sample),
            equalized=equalize_layers,
            full_range=full_range,
            kept_float=kept,
            epochs=0 if trained_on is None else epochs,
            trained_is_worse=trained_is_worse,
            threads=torch.get_num_threads(),
            no_top1=no_top1,
            precisions=tuple(precisions),
            sensitivity_device=device,
            sensitivity=tuple(sensitivity),
            ranges=ranges,
        )
        files[report.precisions[-1].name].replace(folder / FILES[0])
        for file in files.values():
            file.unlink(missing_ok=True)
        save_ranges_plot(ranges, folder / FILES[3])
        report.write(folder)
    return report


def _rounded_in_training(model: RepVGG) -> set[str]:
    """Return the convolutions and linear layers that `prepare_qat` rounds: not those of squeeze-excite."""
    layers = roundable_layers(model).items()
    return {f'{path}.{m.conv_name}' if isinstance(m, ReparamBlock) else path for path, m in layers}


def _agreement(precision: Precision) -> float:
    share = precision.same_top_class_pct
    return 0.0 if share is None else share


def _require() -> None:
    try:
        import matplotlib  # noqa: F401
        import nncf
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
        import openvino  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{error}; `pip install 'repvgg-zoo[quantize]'` brings what quantizing needs"
        ) from error
    nncf.set_log_level(logging.ERROR)


def _train(
    model: RepVGG,
    sample: Tensor,
    dataset: ImageDataset,
    kept: Collection[str],
    full_range: bool,
    epochs: int,
    lr: float,
    device: str,
    track: Track,
) -> RepVGG:
    teacher = copy.deepcopy(model).to(device)
    trained = model.to(device)
    batches = sample.to(device).split(_CALIBRATION_BATCH)
    prepare_qat(trained, batches, full_range=full_range, keep_float=kept)
    size = min(_TRAINING_BATCH, len(dataset))
    # no workers: a fork is not safe beside the threads of the runtimes that have run
    loader = DataLoader(dataset, batch_size=size, shuffle=True, drop_last=True)
    with _seeded():
        finetune(trained, teacher, loader, epochs=epochs, lr=lr, track=track)
    return trained.cpu()


@contextmanager
def _seeded() -> Iterator[None]:
    """Draw the same random numbers each time, and leave the generators as they were."""
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        random.seed(0)
        try:
            yield
        finally:
            random.setstate(state)
