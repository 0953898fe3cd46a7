"""Typed reader of `weights/manifest.json`: one record for each `arch.tag`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .checkpoints import Form

__all__ = ['DEPLOY_SUFFIX', 'Metrics', 'Preprocessing', 'WeightsRecord', 'read_manifest', 'weights_dir']

DEPLOY_SUFFIX = '_deploy'
"""What the tag of deploy-form weights ends in; the rest is the tag of the training form."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What the weights expect of an image, and how many classes they tell."""

    input_px: int
    crop_pct: float
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    num_classes: int


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Accuracy, and who says so: a publication, or the command and versions that measured it."""

    dataset: str
    top1_pct: float
    top5_pct: float | None
    source: str


@dataclass(frozen=True, kw_only=True)
class WeightsRecord:
    """One file of weights."""

    arch: str
    tag: str
    form: Form
    hub_id: str | None
    """Hub repository that holds the file; None if nobody has published it there."""
    revision: str | None
    file: str | None
    """File name below `weights_dir()`, of bundled weights."""
    sha256: str | None
    size_bytes: int | None
    license: str
    origin: str
    """Where the weights come from."""
    upstream: str | None
    """The original file, where it is the only one and on no Hub."""
    preprocessing: Preprocessing
    published: tuple[Metrics, ...]
    measured: tuple[Metrics, ...]

    @property
    def name(self) -> str:
        """The timm model name, `arch.tag`."""
        return f'{self.arch}.{self.tag}'

    @property
    def training_name(self) -> str:
        """The name of the training-form weights that these are, or are the fold of."""
        return self.name.removesuffix(DEPLOY_SUFFIX)

    @property
    def path(self) -> Path | None:
        """The bundled file."""
        return weights_dir() / self.file if self.file else None


def weights_dir() -> Path:
    """The folder of the manifest and the bundled weights: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / 'weights'
    return installed if installed.is_dir() else package.parent / 'weights'


@cache
def read_manifest() -> MappingProxyType[str, WeightsRecord]:
    """All records by `arch.tag`, in the order of the file."""
    records = json.loads((weights_dir() / 'manifest.json').read_text('utf-8'))
    return MappingProxyType({name: _record(name, fields) for name, fields in records.items()})


def _record(name: str, fields: dict[str, Any]) -> WeightsRecord:
    arch, tag = name.split('.', 1)
    preprocessing = fields.pop('preprocessing')
    mean, std = tuple(preprocessing.pop('mean')), tuple(preprocessing.pop('std'))
    published, measured = (tuple(Metrics(**m) for m in fields.pop(kind)) for kind in ('published', 'measured'))
    return WeightsRecord(
        arch=arch,
        tag=tag,
        preprocessing=Preprocessing(mean=mean, std=std, **preprocessing),
        published=published,
        measured=measured,
        **fields,
    )
