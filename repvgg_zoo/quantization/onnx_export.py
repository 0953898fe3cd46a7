"""Export to ONNX."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ['export_onnx', 'quiet']


def export_onnx(model: nn.Module, x: Tensor, path: str | Path) -> None:
    """Write a model of one input `x` as one file, with a free batch size."""
    with quiet():
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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporters' progress and the warnings about each other's deprecated parts."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter('ignore')
        yield
