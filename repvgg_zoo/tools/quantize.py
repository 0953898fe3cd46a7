"""INT8 by post-training quantization of the deploy form, with a report of what it costs and gains."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Unpack, cast

import torch
from timm.data import ImageDataset, create_dataset, create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..blocks.base import ReparamBlock
from ..model import RepVGG
from .atomic import new_folder
from .benchmark.measure import time_rounds
from .benchmark.runtimes import compile_openvino
from .console import Track, print_table, progress
from .convert import open_model
from .devices import add_device_argument
from .markdown import markdown_table
from .model_arguments import ModelOptions, add_model_arguments, model_options

__all__ = ['LayerError', 'QuantizationReport', 'add_arguments', 'equalize', 'layer_errors', 'main', 'quantize']

_BATCH_SIZE, _LATENCY_ROUNDS, _SENSITIVITY_IMAGES = 50, 10, 64
_FILES = ('model.onnx', 'report.json', 'report.md')
_HEADER = ('precision', 'top1_pct', 'latency_ms', 'MB')
_DEAD_RANGE = 1e-3
"""Channels whose range is below this fraction of the median are not equalized: their bias would become huge."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `repvgg-zoo quantize`."""
    parser.epilog = (
        'Post-training quantization by NNCF into an ONNX file, for OpenVINO or ONNX Runtime. Accuracy and latency are '
        "measured in OpenVINO. Needs pip install 'repvgg-zoo[quantize]'."
    )
    parser.add_argument('src', metavar='SRC', help='checkpoint file, model folder, or timm model name')
    parser.add_argument('dst', metavar='DST', help=f'folder to write: {", ".join(_FILES[:2])} and {_FILES[2]}')
    parser.add_argument('--images', metavar='FOLDER', required=True, help='images to evaluate on, in a folder a class')
    parser.add_argument(
        '--calibration', metavar='FOLDER', help='images to calibrate on, better of the training set (default: --images)'
    )
    parser.add_argument('--subset', type=int, metavar='N', default=300, help='images to calibrate on (%(default)s)')
    parser.add_argument('--equalize', action='store_true', help='apply cross-layer equalisation first')
    parser.add_argument(
        '--full-range',
        action='store_true',
        help='let weights use all 8 bits, for machines with VNNI or AMX, or ARM; on others ONNX Runtime saturates then',
    )
    parser.add_argument(
        '--overwrite',
        action='store_true',
        help='replace DST if an earlier run wrote it as it is',
    )
    add_device_argument(parser, what='the sensitivity of the layers is computed')
    add_model_arguments(parser, 'SRC')


def main(args: argparse.Namespace) -> int:
    """Run `repvgg-zoo quantize`."""
    with progress() as track:
        report = quantize(
            args.src,
            args.dst,
            images=args.images,
            calibration=args.calibration,
            subset=args.subset,
            equalize_layers=args.equalize,
            full_range=args.full_range,
            overwrite=args.overwrite,
            device=args.device,
            track=track,
            **model_options(args),
        )
    print_table(_HEADER, report.rows())
    print(report.summary)
    if report.no_top1:
        print(f'no top-1: {report.no_top1}')
    worst = ', '.join(f'{error.layer} {error.rel_error:.1e}' for error in report.sensitivity[:3])
    print(f'most sensitive layers, and the relative error of the logits{report.place}: {worst}')
    print(f'the model and the whole report are in {args.dst}')
    return 0


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """Error of the logits if only one layer is quantized."""

    layer: str
    rel_error: float
    """Root mean square of the error, relative to that of the logits."""


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """Comparison of the quantized model with the float32 one, both in OpenVINO with the same threads."""

    variant: str
    images: int
    calibration_images: int
    equalized: bool
    full_range: bool
    threads: int
    float32_top1_pct: float | None
    """None unless each class of the model has a folder with images."""
    int8_top1_pct: float | None
    no_top1: str | None
    """Reason why top-1 is None."""
    same_top_class_pct: float | None
    """None if the model has no classifier."""
    float32_latency_ms: float
    """Median time of one image, measured in interleaved rounds."""
    int8_latency_ms: float
    float32_bytes: int
    int8_bytes: int
    sensitivity_device: str
    """Where the sensitivity was computed."""
    sensitivity: tuple[LayerError, ...]
    """The largest error first."""

    @property
    def speedup(self) -> float:
        """Latency of float32 over that of INT8."""
        return self.float32_latency_ms / self.int8_latency_ms

    @property
    def summary(self) -> str:
        """Speed and agreement of INT8, relative to float32."""
        summary, same = f'{self.speedup:.2f} times as fast', self.same_top_class_pct
        return summary if same is None else f'{summary}; the same top class on {same:.2f} % of the images'

    @property
    def place(self) -> str:
        """The device of the sensitivity, for the end of a sentence. The CPU goes unsaid."""
        return '' if self.sensitivity_device == 'cpu' else f' on {self.sensitivity_device}'

    def rows(self) -> list[tuple[str, ...]]:
        """One row for each precision: top-1, latency and size."""
        return [
            (name, '' if top1 is None else f'{top1:.2f}', f'{latency:.2f}', f'{size / 1e6:.2f}')
            for name, top1, latency, size in (
                ('float32', self.float32_top1_pct, self.float32_latency_ms, self.float32_bytes),
                ('int8', self.int8_top1_pct, self.int8_latency_ms, self.int8_bytes),
            )
        ]

    def markdown(self) -> str:
        """The report as a page in Markdown."""
        layers = [(error.layer, f'{error.rel_error:.2e}') for error in self.sensitivity]
        return '\n'.join(
            [
                f'# {self.variant} in INT8',
                '',
                markdown_table(self.rows(), _HEADER),
                '',
                f'{self.images} images, calibrated on {self.calibration_images}; one image a time in OpenVINO with '
                f'{self.threads} threads: {self.summary}.' + (f' No top-1: {self.no_top1}.' if self.no_top1 else ''),
                '',
                f'Relative error of the logits if only one layer is quantized{self.place}:',
                '',
                markdown_table(layers, ('layer', 'error')),
                '',
            ]
        )


def quantize(
    source: str | Path,
    target: str | Path,
    *,
    images: str | Path,
    calibration: str | Path | None = None,
    subset: int = 300,
    equalize_layers: bool = False,
    full_range: bool = False,
    overwrite: bool = False,
    device: str = 'cpu',
    track: Track,
    **options: Unpack[ModelOptions],
) -> QuantizationReport:
    """Write a checkpoint's deploy form in INT8 as a folder.

    The folder holds `model.onnx`, `report.json` and `report.md`. The model has 8-bit weights, quantized per channel,
    quantizers of the activations (QDQ), and a free batch size. NNCF calibrates on real images, prepared as the model
    expects them, and corrects the biases for the shift of each layer's mean.

    Args:
        source: Checkpoint file, model folder or timm model name, in either form.
        target: Folder to write.
        images: Folder of images to evaluate on. Top-1 is measured if it has a folder for each class, in the order of
            the model's classes.
        calibration: Folder of images to calibrate on, best of the training set; `images` by default.
        subset: Number of images to calibrate on, spread evenly over the folder.
        equalize_layers: Apply `equalize` first.
        full_range: Let weights use all 8 bits. By default they use 7, because without VNNI or AMX, x86 processors add
            two products of 8 bits in 16 bits, and ONNX Runtime lets that saturate. The machine that runs the file
            decides, not the one that writes it.
        overwrite: Replace the target if it is such a folder.
        device: Where PyTorch computes the sensitivity of the layers. OpenVINO runs on the CPU.
        track: Shows the progress, see `repvgg_zoo.tools.console`.
        options: How to read the source, see `open_model`.

    Returns:
        The report.

    Raises:
        ModuleNotFoundError: NNCF, ONNX, ONNX Runtime or OpenVINO are not installed: they are the extra `quantize`.
        FileNotFoundError: There is no such folder of images, or it is empty.
        ValueError: `subset` is less than 1, or the model does not take 3 channels.
        FileExistsError: The target exists, and `overwrite` is off or it holds other files.

    Example:
        >>> report = quantize('test_repvgg', 'int8', images='cifar10', track=no_progress)  # doctest: +SKIP
    """
    _require()
    if subset < 1:
        raise ValueError(f'subset is {subset}; it takes at least one image to calibrate')
    evaluated = _dataset(images)
    calibrated = _dataset(calibration or images)
    with new_folder(target, overwrite=overwrite) as folder:
        model = open_model(source, **options).float().eval().switch_to_deploy()
        if model.in_chans != 3:
            raise ValueError(f'the images have 3 channels, and the model takes {model.in_chans}')
        if equalize_layers:
            equalize(model)
        for dataset in (evaluated, calibrated):
            dataset.transform = create_transform(**resolve_model_data_config(model))
        chosen = [calibrated[index][0] for index in _evenly_spaced(len(calibrated), subset)]
        sample = torch.stack(chosen)
        exact = folder / 'float32.onnx'
        quantized, json_report, markdown_report = (folder / name for name in _FILES)
        _export(model, sample[:2], exact)
        _quantize_onnx(exact, chosen, quantized, full_range=full_range)
        runs = [_compile(path) for path in (exact, quantized)]
        scores = _evaluate(runs, evaluated, model.num_classes, track)
        latencies = _latencies(runs, sample[:1], track)
        sensitivity = layer_errors(model.to(device), sample[:_SENSITIVITY_IMAGES].to(device), track=track)
        report = QuantizationReport(
            variant=model.variant.name,
            images=len(evaluated),
            calibration_images=len(sample),
            equalized=equalize_layers,
            full_range=full_range,
            threads=torch.get_num_threads(),
            **scores,
            **latencies,
            float32_bytes=exact.stat().st_size,
            int8_bytes=quantized.stat().st_size,
            sensitivity_device=device,
            sensitivity=tuple(sensitivity),
        )
        exact.unlink()
        json_report.write_text(json.dumps(asdict(report) | {'speedup': report.speedup}, indent=2) + '\n')
        markdown_report.write_text(report.markdown())
    return report


def _require() -> None:
    try:
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


def _dataset(folder: str | Path) -> ImageDataset:
    if not Path(folder).is_dir():
        raise FileNotFoundError(f'no folder of images at {str(folder)!r}')
    try:
        return create_dataset('', root=str(folder), search_split=False)  # a class may be called `val`
    except RuntimeError as error:
        raise FileNotFoundError(f'no images in {str(folder)!r}') from error


def _evenly_spaced(count: int, wanted: int) -> list[int]:
    """Choose at most `wanted` of `count` indices at even distances, so that every class of a sorted folder occurs."""
    chosen = min(count, wanted)
    return [index * count // chosen for index in range(chosen)]


def _export(model: nn.Module, x: Tensor, path: Path) -> None:
    with _quiet():
        torch.onnx.export(
            model,
            (x if len(x) > 1 else x.repeat(2, 1, 1, 1),),  # the exporter makes a constant of a batch of one
            path,
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=['x'],
            dynamic_shapes=({0: torch.export.Dim('batch')},),
        )


def _quantize_onnx(exact: Path, calibration: list[Tensor], path: Path, *, full_range: bool) -> None:
    import nncf
    import onnx

    with _quiet():
        data = nncf.Dataset([{'x': image[None].numpy()} for image in calibration])
        options = nncf.AdvancedQuantizationParameters(
            overflow_fix=nncf.OverflowFix.DISABLE if full_range else nncf.OverflowFix.ENABLE
        )
        quantized = nncf.quantize(onnx.load(exact), data, subset_size=len(calibration), advanced_parameters=options)
        onnx.save(quantized, path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' progress and the warnings about each other's deprecated parts."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter('ignore')
        yield


def _compile(path: Path) -> Callable[[Tensor], Tensor]:
    compiled = compile_openvino(path, 'float32')
    return lambda x: torch.from_numpy(compiled(x.numpy())[0])


def _evaluate(
    runs: list[Callable[[Tensor], Tensor]],
    dataset: ImageDataset,
    num_classes: int,
    track: Track,
) -> dict[str, Any]:
    if num_classes == 0:
        why_not = 'the model has no classifier'
        return dict(float32_top1_pct=None, int8_top1_pct=None, no_top1=why_not, same_top_class_pct=None)
    same, right = 0, [0, 0]
    for x, labels in track(DataLoader(dataset, batch_size=_BATCH_SIZE), description='evaluating'):
        tops = [run(x).argmax(1) for run in runs]
        same += int((tops[0] == tops[1]).sum())
        right = [count + int((top == labels).sum()) for count, top in zip(right, tops, strict=True)]
    root = Path(dataset.reader.root)
    folders = {path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(('.', '__'))}
    classes = dataset.reader.class_to_idx  # by the names of folders with images
    labelled = classes.keys() == folders and len(folders) == num_classes
    float32, int8 = (100 * count / len(dataset) if labelled else None for count in right)
    why_not = (
        f'it takes {num_classes} folders in {root}, one for each class, with the images in them; there are '
        f'{len(folders)}, {len(classes.keys() & folders)} of them with images'
    )
    return dict(
        float32_top1_pct=float32,
        int8_top1_pct=int8,
        no_top1=None if labelled else why_not,
        same_top_class_pct=100 * same / len(dataset),
    )


def _latencies(runs: list[Callable[[Tensor], Tensor]], x: Tensor, track: Track) -> dict[str, Any]:
    seconds = time_rounds([(lambda: x, run) for run in runs], rounds=_LATENCY_ROUNDS, track=track)
    float32, int8 = (1e3 * statistics.median(times) for times in seconds)
    return dict(float32_latency_ms=float32, int8_latency_ms=int8)


@torch.no_grad()
def layer_errors(model: RepVGG, images: Tensor, *, track: Track) -> list[LayerError]:
    """Measure the error of the logits if only one convolution, or only the classifier, is quantized.

    Weights are rounded to 8 bits for each output channel, symmetric about 0, and the layer's input to 8 bits between
    its extremes.

    Args:
        model: In the deploy form and eval mode.
        images: `(N, C, H, W)`.
        track: Shows the progress.

    Returns:
        One error for each layer, the largest first.

    Example:
        >>> from repvgg_zoo.tools.console import no_progress
        >>> model = open_model('test_repvgg.cifar10_deploy').eval()
        >>> len(layer_errors(model, torch.randn(2, 3, 32, 32), track=no_progress))
        12
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    reference = model(images)
    errors = []
    for name, layer in track(list(layers.items()), description='sensitivity'):
        handle = layer.register_forward_pre_hook(lambda _, inputs: (_fake_quantized_input(inputs[0]),))
        weight = layer.weight.clone()
        try:
            layer.weight.copy_(_fake_quantized_weight(weight))
            error = (model(images) - reference).square().mean().sqrt() / reference.square().mean().sqrt()
        finally:
            layer.weight.copy_(weight)
            handle.remove()
        errors.append(LayerError(layer=name, rel_error=error.item()))
    return sorted(errors, key=lambda error: -error.rel_error)


def _fake_quantized_weight(weight: Tensor) -> Tensor:
    largest = weight.flatten(1).abs().amax(1)
    scale = torch.where(largest > 0, largest / 127, 1.0)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -127, 127)


def _fake_quantized_input(x: Tensor) -> Tensor:
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    scale = (high - low) / 255 or 1.0
    return torch.fake_quantize_per_tensor_affine(x, scale, round(-low / scale), 0, 255)


@torch.no_grad()
def equalize(model: RepVGG, *, sweeps: int = 10) -> RepVGG:
    """Equalise the ranges of neighbouring layers of the deploy form, in place (arXiv 1906.04721, section 4.1).

    ReLU lets a positive scale through. So each output channel of a convolution is divided by s = sqrt(r1 / r2), and
    the same input channel of the next one is multiplied by s, where r1 and r2 are their largest absolute weights. Then
    both ranges are equal, and the model computes the same. Blocks with squeeze-excite or without ReLU stay as they
    are, because scaling would change what they compute.

    Args:
        model: A RepVGG in the deploy form.
        sweeps: Passes over all pairs of layers.

    Returns:
        The model.

    Raises:
        TypeError: The model is no RepVGG of this package.
        ValueError: The model is in the training form.

    Example:
        >>> equalize(open_model('test_repvgg.cifar10_deploy')).deploy
        True
    """
    if not isinstance(model, RepVGG):
        raise TypeError(f'equalisation is for a RepVGG of this package; here is a {type(model).__name__}')
    blocks = [model.stem, *(block for stage in model.stages for block in stage.children())]
    if not all(isinstance(block, ReparamBlock) and block.reparam_conv is not None for block in blocks):
        raise ValueError('equalisation is for the deploy form; call switch_to_deploy() first')
    for _ in range(sweeps):
        for block, following in pairwise(cast('list[ReparamBlock]', blocks)):
            if isinstance(block.attn, nn.Identity) and type(block.act) is nn.ReLU:
                _equalize_pair(cast('nn.Conv2d', block.reparam_conv), cast('nn.Conv2d', following.reparam_conv))
    return model


def _equalize_pair(first: nn.Conv2d, second: nn.Conv2d) -> None:
    # (groups, C_out / groups, C_in / groups, k, k)
    by_input = second.weight.view(second.groups, -1, *second.weight.shape[1:])
    range_1, range_2 = first.weight.abs().amax((1, 2, 3)), by_input.abs().amax((1, 3, 4)).flatten()
    dead = (range_1 < _DEAD_RANGE * range_1.median()) | (range_2 < _DEAD_RANGE * range_2.median())
    scale = torch.where(dead | (range_1 == 0) | (range_2 == 0), 1.0, (range_1 / range_2).sqrt())
    first.weight /= scale.view(-1, 1, 1, 1)
    cast('Tensor', first.bias).div_(scale)
    by_input *= scale.view(second.groups, 1, -1, 1, 1)
