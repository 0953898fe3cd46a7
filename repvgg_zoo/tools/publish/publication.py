"""What to publish, as the manifest or the user describes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import timm
from timm.models import PretrainedCfg

from ...checkpoints.files import FILE_SUFFIXES
from ...pretrained.hub import download_weights, is_hub_ref, sha256_of
from ...pretrained.locate import locate, weights_in
from ...pretrained.manifest import DEPLOY_SUFFIX, Metrics, WeightsRecord, read_manifest
from ...pretrained.urls import sha256_prefix
from ...variants import VARIANTS, suggestion

__all__ = ['Publication', 'Source', 'own_publication', 'read_labels', 'recorded_publication']

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_LABELS = {
    'CIFAR-10': ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck'),
}
"""Names of the classes of data sets whose classes timm does not know."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The file that both forms are made from."""

    path: Path
    title: str
    """Its name, without folders of this machine."""
    model: str
    """What `open_model` opens: the file, or a model folder or repository whose `config.json` describes it."""

    @property
    def sha256(self) -> str:
        """The sha256 of the file."""
        return sha256_of(self.path)


@dataclass(frozen=True, kw_only=True)
class Publication:
    """Weights in both forms, and all that their cards say of them."""

    name: str
    """Name of the training form. That of the deploy form ends in `_deploy`."""
    source: Source
    record: WeightsRecord | None = None
    """Record of the manifest that these weights are published for. None for the user's own."""
    variant: str | None = None
    block: str | None = None
    model_kwargs: Mapping[str, Any] | None = None
    """Further arguments of `timm.create_model`."""
    use_ema: bool = True
    """Take the averaged weights of a training checkpoint that has them."""
    prefix: str | None = None
    """Take only the part of a larger network whose keys start with this."""
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    """Fields of timm's `pretrained_cfg` that differ from those of the variant."""
    base_model: str | None = None
    """What the weights were fine-tuned from: a timm model name or a Hub repository."""
    license: str | None = None
    origin: str | None = None
    recipe: str | None = None
    dataset: str | None = None
    published: tuple[Metrics, ...] = ()
    measured: tuple[Metrics, ...] = ()
    label_names: tuple[str, ...] = ()
    """Names of the classes in the order of the logits, or nothing."""
    label_descriptions: Mapping[str, str] = field(default_factory=dict)
    """Longer descriptions of labels, by name."""
    vouched: bool = True
    """These are known to be the weights that the record describes."""

    @property
    def names(self) -> tuple[str, str]:
        """Names of both forms, the training form first."""
        return self.name, self.name + DEPLOY_SUFFIX


def recorded_publication(
    name: str,
    source: str | Path | None = None,
    *,
    trust_source: bool = False,
    use_ema: bool = True,
    prefix: str | None = None,
) -> Publication:
    """Describe weights of the manifest.

    A file that the user gives could hold any weights. Unless it has the sha256 of the manifest, or the user vouches for
    it, what the manifest says of origin, licence, training and accuracy is left out.

    Args:
        name: `arch.tag` of the training form.
        source: Checkpoint file of any layout, model folder, or Hub repository `owner/name`; by default what the
            manifest names.
        trust_source: The source holds the weights that the manifest describes.
        use_ema: Take the averaged weights of a training checkpoint that has them.
        prefix: Take only the part of a larger network whose keys start with this.

    Returns:
        The description.

    Raises:
        ValueError: The manifest has no such name, or does not know where its weights are.
        FileNotFoundError: The source does not exist.
        CheckpointError: The source cannot be had.

    Example:
        >>> recorded_publication('test_repvgg.cifar10').license
        'mit'
    """
    record = _training_record(name)
    found = _recorded_source(record) if source is None else _given_source(source)
    publication = Publication(
        name=name, source=found, record=record, variant=record.arch, use_ema=use_ema, prefix=prefix
    )
    if not (source is None or trust_source or _is_known(record, found.sha256)):
        return replace(publication, vouched=False)
    dataset = next((m.dataset for m in (*record.measured, *record.published)), None)
    return replace(
        publication,
        license=record.license,
        origin=record.origin,
        recipe=record.recipe,
        dataset=dataset,
        published=record.published,
        measured=record.measured,
        label_names=_LABELS.get(dataset or '', ()),
    )


def own_publication(
    name: str,
    source: str | Path,
    *,
    base: str | None = None,
    preprocessing: Mapping[str, Any] = _NOTHING,
    dataset: str | None = None,
    top1_pct: float | None = None,
    top5_pct: float | None = None,
    labels: str | Path | None = None,
    **fields: Any,
) -> Publication:
    """Describe weights of the user's own.

    Args:
        name: Name of the training form, as `arch.tag`.
        source: Checkpoint file of any layout, model folder, Hub repository `owner/name`, or name of the manifest.
        base: What they were fine-tuned from: a timm model name, whose preprocessing is the default one then, or a Hub
            repository.
        preprocessing: Fields of timm's `pretrained_cfg` to set.
        dataset: Name of the data set, or its id on the Hub.
        top1_pct: Accuracy on that data set.
        top5_pct: Accuracy of the five best classes.
        labels: File of class names, see `read_labels`.
        fields: Further fields of `Publication`.

    Returns:
        The description.

    Raises:
        ValueError: The name is taken by the manifest or ends as those of deploy forms do, the base is unknown, or
            there is accuracy without a data set or an impossible one.
        FileNotFoundError: The source or the file of labels does not exist.
        CheckpointError: The source cannot be had.

    Example:
        >>> own = own_publication('repvgg_a0.flowers', 'test_repvgg.cifar10', dataset='flowers', top1_pct=92.5)
        >>> own.names
        ('repvgg_a0.flowers', 'repvgg_a0.flowers_deploy')
    """
    if name in read_manifest():
        raise ValueError(f'{name!r} is a name of the manifest; choose another one, or publish it without --name')
    if name.endswith(DEPLOY_SUFFIX):
        raise ValueError(f'{name!r} ends in {DEPLOY_SUFFIX!r}; both forms are published, so leave that out')
    top1, top5 = (None if figure is None else float(figure) for figure in (top1_pct, top5_pct))
    if (top1, top5) != (None, None) and (dataset is None or top1 is None):
        raise ValueError('accuracy is that of --top1 on a data set; give both --dataset and --top1')
    for figure in (top1, top5):
        if figure is not None and not 0 <= figure <= 100:
            raise ValueError(f'an accuracy of {figure:g} % is not between 0 and 100')
    if top1 is not None and top5 is not None and top5 < top1:
        raise ValueError(
            f'top-5 of {top5:g} % is less than top-1 of {top1:g} %, and counts each image that top-1 counts'
        )
    measured: tuple[Metrics, ...] = ()
    if top1 is not None:
        said = 'told by the publisher'
        measured = (Metrics(dataset=str(dataset), top1_pct=top1, top5_pct=top5, source=said, source_url=None),)
    names, descriptions = read_labels(labels) if labels else ((), {})
    return Publication(
        name=name,
        source=_given_source(source),
        base_model=base,
        preprocessing=_preprocessing_of(base) | dict(preprocessing),
        dataset=dataset,
        measured=measured,
        label_names=names,
        label_descriptions=descriptions,
        **fields,
    )


def read_labels(path: str | Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """Read the names of classes.

    Args:
        path: A text file with a name in each line, in the order of the logits. A description may follow behind a tab.

    Returns:
        The names, and the descriptions by name.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no text, a line is empty, or a name occurs twice.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / 'labels.txt'
        >>> _ = path.write_text(f'daisy{chr(9)}white petals{chr(10)}rose')
        >>> read_labels(path)
        (('daisy', 'rose'), {'daisy': 'white petals'})
    """
    try:
        text = Path(path).read_text('utf-8-sig').rstrip()
    except UnicodeDecodeError as error:
        raise ValueError(f'{str(path)!r} is no text in UTF-8 ({error}); a label in each line names a class') from error
    lines = [line.split('\t', 1) for line in text.splitlines()]
    names = tuple(line[0].strip() for line in lines)
    for number, name in enumerate(names, start=1):
        if not name or name in names[: number - 1]:
            what = f'repeats {name!r}' if name else 'is empty'
            raise ValueError(f'line {number} of {str(path)!r} {what}; a label in each line names a class')
    return names, {line[0].strip(): line[1].strip() for line in lines if len(line) > 1}


def _preprocessing_of(base: str | None) -> dict[str, Any]:
    """The preprocessing of a timm model name; a Hub repository gives none."""
    if base is None or '/' in base:
        return {}
    known = [record.name for record in read_manifest().values()]
    if base not in known and base not in VARIANTS:
        raise ValueError(
            f'unknown base {base!r};{suggestion(base, [*VARIANTS, *known])} it is a name of the zoo or owner/name'
        )
    cfg = cast('PretrainedCfg', timm.get_pretrained_cfg(base))
    return {key: getattr(cfg, key) for key in ('input_size', 'crop_pct', 'interpolation', 'mean', 'std')}


def _recorded_source(record: WeightsRecord) -> Source:
    if not record.has_source:
        how = (
            f'get {record.upstream} from {record.origin}, and pass --from {record.upstream}'
            if record.upstream
            else 'pass a checkpoint with --from'
        )
        raise ValueError(f'the manifest knows no file of {record.name}; {how}')
    cfg = cast('PretrainedCfg', timm.get_pretrained_cfg(record.name))
    path = locate(cfg, use_override_dir=False)
    return Source(path=path, title=record.hub_ref or path.name, model=str(path))


def _given_source(source: str | Path) -> Source:
    text, path = str(source), Path(source)
    if text and path.is_dir():
        weights = weights_in(path)
        return Source(path=weights, title=weights.name, model=text)
    if text and path.is_file():
        return Source(path=path, title=path.name, model=text)
    hub_ref = text.removeprefix('hf-hub:')
    if not path.exists() and is_hub_ref(hub_ref) and not text.endswith(FILE_SUFFIXES):
        return Source(path=download_weights(hub_ref), title=hub_ref, model=f'hf-hub:{hub_ref}')
    if record := read_manifest().get(text):
        return _recorded_source(record)
    raise FileNotFoundError(f'{text!r} is no checkpoint file, no model folder and no Hub repository')


def _is_known(record: WeightsRecord, sha256: str) -> bool:
    """Compare a hash with the record's, or with the digits of it in the record's address."""
    digits = sha256_prefix(Path(record.url).name) if record.url else None
    return sha256 == record.sha256 or bool(digits and sha256.startswith(digits))


def _training_record(name: str) -> WeightsRecord:
    names: Sequence[str] = [record.name for record in read_manifest().values() if record.form == 'training']
    if name in names:
        return read_manifest()[name]
    if name.removesuffix(DEPLOY_SUFFIX) in names:
        raise ValueError(f'{name!r} names the deploy form only; {name.removesuffix(DEPLOY_SUFFIX)!r} publishes both')
    raise ValueError(f'unknown weights {name!r};{suggestion(name, names)} there are: {", ".join(names)}')
