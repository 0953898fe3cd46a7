"""The report: accuracy, speed and size of each precision, and the layers that suffer most."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ...quantization.ranges import LayerRanges
from ...quantization.sensitivity import LayerError
from ..markdown import markdown_table

__all__ = ['HEADER', 'Precision', 'QuantizationReport']

HEADER = ('precision', 'top1_pct', 'same_top_class_pct', 'latency_ms', 'MB')


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What was measured of the model in one precision, in OpenVINO."""

    name: str
    """`float32`, `int8` for post-training quantization, or `int8 trained`."""
    top1_pct: float | None
    """None unless each class of the model has a folder with images."""
    same_top_class_pct: float | None
    """Images to which it gives the class that float32 gives; None if the model has no classifier."""
    latency_ms: float
    """Median time of one image, measured in interleaved rounds."""
    bytes: int
    """Size of the file."""

    def cells(self) -> tuple[str, ...]:
        """One row of the table."""
        shares = ['' if share is None else f'{share:.2f}' for share in (self.top1_pct, self.same_top_class_pct)]
        return (self.name, *shares, f'{self.latency_ms:.2f}', f'{self.bytes / 1e6:.2f}')


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """Comparison of the quantized model with the float32 one, both in OpenVINO with the same threads."""

    variant: str
    images: int
    calibration_images: int
    equalized: bool
    full_range: bool
    kept_float: tuple[str, ...]
    """Layers that stayed in float32."""
    epochs: int
    """Of quantization-aware training; 0 for none."""
    trained_is_worse: bool
    """Whether the training made the model agree less often with float32. The file is not of the training then."""
    threads: int
    no_top1: str | None
    """Reason why top-1 is None."""
    precisions: tuple[Precision, ...]
    """float32 first; the last one is that of the file."""
    sensitivity_device: str
    """Where the sensitivity was computed."""
    sensitivity: tuple[LayerError, ...]
    """The largest error first."""
    ranges: Mapping[str, Sequence[LayerRanges]]
    """`before`, and `after` if equalisation or training changed the weights. In the order of the forward pass."""

    @property
    def speedup(self) -> float:
        """Latency of float32 over that of the file."""
        return self.precisions[0].latency_ms / self.precisions[-1].latency_ms

    @property
    def summary(self) -> str:
        """Speed and agreement of the file, relative to float32."""
        summary, same = f'{self.speedup:.2f} times as fast', self.precisions[-1].same_top_class_pct
        return summary if same is None else f'{summary}; the same top class on {same:.2f} % of the images'

    @property
    def advice(self) -> str:
        """What to do about a training that made the model worse; empty if there was none."""
        if not self.trained_is_worse:
            return ''
        return 'the training made the model worse, so the file is not of it; take a lower lr, or more epochs'

    @property
    def place(self) -> str:
        """The device of the sensitivity, for the end of a sentence. The CPU goes unsaid."""
        return '' if self.sensitivity_device == 'cpu' else f' on {self.sensitivity_device}'

    def rows(self) -> list[tuple[str, ...]]:
        """One row for each precision."""
        return [precision.cells() for precision in self.precisions]

    def markdown(self) -> str:
        """The report as a page in Markdown."""
        layers = [(error.layer, f'{error.rel_error:.2e}') for error in self.sensitivity]
        said = [
            f'{self.images} images, calibrated on {self.calibration_images}; one image a time in OpenVINO with '
            f'{self.threads} threads: {self.summary}.',
            f'No top-1: {self.no_top1}.' if self.no_top1 else '',
            'Equalised.' if self.equalized else '',
            f'Weights of {8 if self.full_range else 7} bits.',
            f'Epochs of training: {self.epochs}.' if self.epochs else '',
            f'{self.advice}.' if self.advice else '',
            f'In float32: {", ".join(self.kept_float)}.' if self.kept_float else '',
        ]
        return '\n'.join(
            [
                f'# {self.variant} in INT8',
                '',
                markdown_table(self.rows(), HEADER, text_columns=HEADER[:1]),
                '',
                ' '.join(filter(None, said)),
                '',
                f'Relative error of the logits if only one layer is quantized{self.place}:',
                '',
                markdown_table(layers, ('layer', 'error')),
                '',
                'The largest value and the largest weight of each input channel, from the smallest channel to the '
                'largest. All of them share the codes of INT8:',
                '',
                '![ranges of each layer](ranges.png)',
                '',
            ]
        )

    def write(self, folder: Path) -> None:
        """Write `report.json` and `report.md`."""
        (folder / 'report.json').write_text(json.dumps(asdict(self) | {'speedup': self.speedup}, indent=2) + '\n')
        (folder / 'report.md').write_text(self.markdown())
