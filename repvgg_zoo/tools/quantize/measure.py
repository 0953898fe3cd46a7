"""Accuracy and latency of ONNX files in OpenVINO."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from timm.data import ImageDataset
from torch import Tensor
from torch.utils.data import DataLoader

from ..benchmark.measure import time_rounds
from ..benchmark.runtimes import compile_openvino
from ..console import Track
from .report import Precision

__all__ = ['measure']

_BATCH_SIZE, _LATENCY_ROUNDS = 50, 10

Run = Callable[[Tensor], Tensor]


def measure(
    files: Mapping[str, Path], dataset: ImageDataset, sample: Tensor, *, num_classes: int, has_top1: bool, track: Track
) -> list[Precision]:
    """Run files on images.

    Args:
        files: By the name of their precision, float32 first.
        dataset: Images to evaluate on.
        sample: One image, for the latency.
        num_classes: Classes of the model.
        has_top1: Whether the classes of the images are those of the model.
        track: Shows the progress.
    """
    runs = [_compile(path) for path in files.values()]
    same, right = _count(runs, dataset, track) if num_classes else ([], [])
    times = time_rounds([(lambda: sample, run) for run in runs], rounds=_LATENCY_ROUNDS, track=track)
    return [
        Precision(
            name=name,
            top1_pct=100 * right[index] / len(dataset) if has_top1 else None,
            same_top_class_pct=100 * same[index] / len(dataset) if num_classes else None,
            latency_ms=1e3 * statistics.median(times[index]),
            bytes=path.stat().st_size,
        )
        for index, (name, path) in enumerate(files.items())
    ]


def _compile(path: Path) -> Run:
    compiled = compile_openvino(path, 'float32')
    return lambda x: torch.from_numpy(compiled(x.numpy())[0])


def _count(runs: list[Run], dataset: ImageDataset, track: Track) -> tuple[list[int], list[int]]:
    """Count, for each file, the images with the class of the first file, and those with the right class."""
    same, right = [0] * len(runs), [0] * len(runs)
    for x, labels in track(DataLoader(dataset, batch_size=_BATCH_SIZE), description='evaluating'):
        tops = [run(x).argmax(1) for run in runs]
        for index, top in enumerate(tops):
            same[index] += int((top == tops[0]).sum())
            right[index] += int((top == labels).sum())
    return same, right
