"""Typed, read-only view of `weights/manifest.json`: one record for each `arch.tag`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast, get_args, get_origin, get_type_hints

from ..checkpoints.state_dicts import Form
from ..variants import get_variant

__all__ = [
    'DEPLOY_SUFFIX',
    'FoldCheck',
    'Metrics',
    'Preprocessing',
    'WeightsRecord',
    'manifest_path',
    'read_manifest',
    'weights_dir',
]

DEPLOY_SUFFIX = '_deploy'
"""End of the tag of deploy-form weights. The rest is the tag of the training form."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Preparation of an image for the weights, and the number of classes."""

    input_px: int
    crop_pct: float
    """Fraction of the image's shorter side that the centre crop keeps."""
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    num_classes: int


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Accuracy on a data set, with its source."""

    dataset: str
    top1_pct: float
    top5_pct: float | None
    source: str
    """A publication, or the command and versions that measured it."""
    source_url: str | None


@dataclass(frozen=True, kw_only=True)
class FoldCheck:
    """Difference between the logits of both forms when they were published, relative to the largest logit."""

    float64_rel_diff: float
    """Folded and run in float64."""
    float32_rel_diff: float
    """The published files, run in float32."""
    images: int
    top1_agreement_pct: float | None
    """Images with the same top class in both forms. None if the images were random."""
    device: str = 'cpu'
    """Where both forms ran."""


@dataclass(frozen=True, kw_only=True)
class WeightsRecord:
    """One file of weights."""

    arch: str
    tag: str
    form: Form
    hub_id: str | None
    """Hub repository that holds the file. None if nobody has published it there."""
    revision: str | None
    url: str | None
    """Address of the file, of the training form, in any layout. Its name ends in the first digits of its sha256."""
    file: str | None
    """Name of a bundled file in `weights_dir()`."""
    sha256: str | None
    size_bytes: int | None
    license: str
    origin: str
    """Origin of the weights."""
    upstream: str | None
    """File of the official release, of weights that its authors have nowhere else."""
    recipe: str | None
    """How the weights were trained, with the source of that information."""
    params: int
    """Parameters of this form, without auxiliary heads."""
    gmacs: float
    """Multiply-adds of the deploy form for one image of `preprocessing.input_px`, in 1e9."""
    preprocessing: Preprocessing
    published: tuple[Metrics, ...]
    measured: tuple[Metrics, ...]
    fold_check: FoldCheck | None
    """None until both forms are published."""

    @property
    def name(self) -> str:
        """The timm model name, `arch.tag`."""
        return f'{self.arch}.{self.tag}'

    @property
    def training_name(self) -> str:
        """Name of the training-form weights: this record, or the record whose fold this is."""
        return self.name.removesuffix(DEPLOY_SUFFIX)

    @property
    def has_source(self) -> bool:
        """True if the file is bundled, on the Hub or at an address."""
        return bool(self.file or self.hub_id or self.url)

    @property
    def dataset(self) -> str:
        """Data set of the figures; ImageNet-1k if there are none."""
        return next((metrics.dataset for metrics in (*self.published, *self.measured)), 'ImageNet-1k')

    @property
    def hub_ref(self) -> str | None:
        """Hub repository and revision, `owner/name@revision`, as timm and huggingface-hub's `hf` take it."""
        return f'{self.hub_id}@{self.revision}' if self.hub_id and self.revision else self.hub_id

    @property
    def available(self) -> WeightsRecord:
        """The record to load from: this one, or the training form if nobody has published the fold."""
        return self if self.has_source else read_manifest()[self.training_name]

    @property
    def path(self) -> Path | None:
        """The bundled file."""
        return weights_dir() / self.file if self.file else None


def weights_dir() -> Path:
    """Return the folder of the manifest and the bundled weights.

    Returns:
        `weights` inside an installed package, or beside the package in a checkout.

    Example:
        >>> weights_dir().name
        'weights'
    """
    package = Path(__file__).resolve().parents[1]
    installed = package / 'weights'
    return installed if installed.is_dir() else package.parent / 'weights'


def manifest_path() -> Path:
    """Return the path of the manifest.

    Returns:
        `manifest.json` in `weights_dir()`.

    Example:
        >>> manifest_path().name
        'manifest.json'
    """
    return weights_dir() / 'manifest.json'


@cache
def read_manifest() -> Mapping[str, WeightsRecord]:
    """Read the records of all weights.

    Returns:
        Records by `arch.tag`, in the order of the file.

    Raises:
        ValueError: The file cannot be read, or is no manifest; the error names the record and the field.

    Example:
        >>> record = read_manifest()['test_repvgg.cifar10_deploy']
        >>> record.form, record.training_name, record.params
        ('deploy', 'test_repvgg.cifar10', 629354)
    """
    path = manifest_path()
    try:
        content = json.loads(path.read_text('utf-8'))
        if not isinstance(content, dict):
            raise ValueError('it holds no records by name')
        records = {name: _record(name, fields) for name, fields in content.items()}
        if orphans := [record.name for record in records.values() if record.training_name not in records]:
            raise ValueError(f'it has no training form of {orphans[0]!r}')
    except (OSError, ValueError) as error:
        raise ValueError(
            f'{str(path)!r} is no manifest of weights: {error}; install repvgg-zoo again, or restore the file of a '
            'checkout by `git checkout`'
        ) from error
    return MappingProxyType(records)


def _record(name: str, fields: Any) -> WeightsRecord:
    arch, _, tag = name.partition('.')
    if not tag or not isinstance(fields, dict):
        raise ValueError(f'{name!r} is no `arch.tag` with fields')
    get_variant(arch)
    return cast('WeightsRecord', _convert(fields | {'arch': arch, 'tag': tag}, WeightsRecord, repr(name)))


_type_hints = cache(get_type_hints)


def _convert(value: Any, hint: Any, what: str) -> Any:
    """Convert a value of JSON to its annotation. Raises `ValueError` if it is of another type."""
    options = get_args(hint)
    if isinstance(hint, type) and is_dataclass(hint) and isinstance(value, dict):
        hints = _type_hints(hint)
        for problem, names in (
            ('lacks', hints.keys() - value.keys()),
            ('has the unknown', value.keys() - hints.keys()),
        ):
            if names:
                raise ValueError(f'{what} {problem} {", ".join(sorted(names))}')
        return hint(**{name: _convert(value[name], hints[name], f'{what}, {name}') for name in hints})
    if get_origin(hint) is tuple and isinstance(value, list):
        items = options[:1] * len(value) if options[-1] is Ellipsis else options
        if len(items) == len(value):
            return tuple(_convert(*pair, what) for pair in zip(value, items, strict=True))
    elif type(None) in options:
        return None if value is None else _convert(value, options[0], what)
    elif value in options or (not options and isinstance(value, (int, float) if hint is float else hint)):
        return value
    raise ValueError(f'{what} is {value!r}')
