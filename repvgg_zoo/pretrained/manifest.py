"""Typed view of `weights/manifest.json`: one record for each `arch.tag`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..checkpoints.state_dicts import Form
from ..tools.atomic import write_text

__all__ = [
    'DEPLOY_SUFFIX',
    'FoldCheck',
    'Metrics',
    'Preprocessing',
    'WeightsRecord',
    'read_manifest',
    'weights_dir',
    'write_manifest',
]

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
    source_url: str | None


@dataclass(frozen=True, kw_only=True)
class FoldCheck:
    """How far the logits of the two forms were apart when they were published, relative to the largest logit."""

    float64_rel_diff: float
    """Of the fold computed and run in float64."""
    float32_rel_diff: float
    """Of the files as they are, run in float32."""
    images: int
    top1_agreement_pct: float | None
    """Images with the same top class in both forms; None where the images were random."""


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
    """The official file, where that was the only source of the training weights."""
    recipe: str | None
    """How the weights were trained, and who says so."""
    params: int
    """Of this form, without auxiliary heads."""
    gmacs: float
    """Multiply-adds of the deploy form for one image of `preprocessing.input_px`, in 1e9."""
    preprocessing: Preprocessing
    published: tuple[Metrics, ...]
    measured: tuple[Metrics, ...]
    fold_check: FoldCheck | None
    """Once both forms are published."""

    @property
    def name(self) -> str:
        """The timm model name, `arch.tag`."""
        return f'{self.arch}.{self.tag}'

    @property
    def training_name(self) -> str:
        """The name of the training-form weights that these are, or are the fold of."""
        return self.name.removesuffix(DEPLOY_SUFFIX)

    @property
    def hub_ref(self) -> str | None:
        """Hub repository and revision, `owner/name@revision`, as timm and huggingface-hub's `hf` take it."""
        return f'{self.hub_id}@{self.revision}' if self.hub_id and self.revision else self.hub_id

    @property
    def available(self) -> WeightsRecord:
        """The record whose file can be had: this one, or the training form of a fold that nobody published."""
        return self if self.hub_id or self.file else read_manifest()[self.training_name]

    @property
    def path(self) -> Path | None:
        """The bundled file."""
        return weights_dir() / self.file if self.file else None


def weights_dir() -> Path:
    """The folder of the manifest and the bundled weights: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / 'weights'
    return installed if installed.is_dir() else package.parent / 'weights'


@cache
def read_manifest() -> Mapping[str, WeightsRecord]:
    """All records by `arch.tag`, in the order of the file."""
    records = json.loads(_path().read_text('utf-8'))
    return MappingProxyType({name: _record(name, fields) for name, fields in records.items()})


def write_manifest(records: Mapping[str, WeightsRecord]) -> None:
    """Replace the manifest."""
    content = {
        name: {key: value for key, value in asdict(record).items() if key not in ('arch', 'tag')}
        for name, record in records.items()
    }
    write_text(_path(), json.dumps(content, indent=1, allow_nan=False) + '\n')
    read_manifest.cache_clear()


def _path() -> Path:
    return weights_dir() / 'manifest.json'


def _record(name: str, fields: dict[str, Any]) -> WeightsRecord:
    arch, tag = name.split('.', 1)
    preprocessing, fold_check = fields.pop('preprocessing'), fields.pop('fold_check')
    mean, std = tuple(preprocessing.pop('mean')), tuple(preprocessing.pop('std'))
    published, measured = (tuple(Metrics(**m) for m in fields.pop(kind)) for kind in ('published', 'measured'))
    return WeightsRecord(
        arch=arch,
        tag=tag,
        preprocessing=Preprocessing(mean=mean, std=std, **preprocessing),
        published=published,
        measured=measured,
        fold_check=FoldCheck(**fold_check) if fold_check else None,
        **fields,
    )
