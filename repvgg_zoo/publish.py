"""From a checkpoint to two model folders, one of each form, and to two repositories on the Hub."""

from __future__ import annotations

import filecmp
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import byobnet
from torch import Tensor

from .atomic import locked, new_folder, write_text
from .cards import model_card
from .checkpoints import FILE_SUFFIXES, CheckpointError, form_of, read_checkpoint, to_timm_layout
from .compare import float64_rel_diff, images_for
from .convert import save_model
from .hub import download_weights, push_folder
from .listing import weights_page
from .manifest import DEPLOY_SUFFIX, FoldCheck, WeightsRecord, read_manifest, weights_dir, write_manifest
from .pretrained import load_state_dict, locate, weights_in
from .repvgg import RepVGG
from .variants import suggestion

__all__ = ['Published', 'build_folders', 'names_to_publish', 'push_folders']

_logger = logging.getLogger(__name__)
_MAX_FLOAT64_REL_DIFF = 1e-9
"""Some fifty layers of float64 rounding stay far below, and any wrong fold far above."""
_HUB_REF = re.compile(r'(hf-hub:)?[\w.-]+/[\w.-]+(@[\w./-]+)?')

Track = Callable[..., Iterable[Any]]


@dataclass(frozen=True, kw_only=True)
class Published:
    """A model folder, and the record that describes it."""

    record: WeightsRecord
    folder: Path

    @property
    def repo_id(self) -> str:
        return self.record.hub_id


def names_to_publish(owner: str) -> list[str]:
    """Names of the training weights whose source the manifest knows, and which are not published by `owner` yet."""
    manifest = read_manifest()

    def is_published(name: str) -> bool:
        record = manifest[name]
        return record.hub_id == f'{owner}/{name}' and record.revision is not None

    return [
        r.name
        for r in manifest.values()
        if r.form == 'training'
        and (r.hub_id or r.file)
        and not (is_published(r.name) and is_published(r.name + DEPLOY_SUFFIX))
    ]


def build_folders(
    name: str,
    source: str | Path | None = None,
    *,
    owner: str,
    out: str | Path | None = None,
    replace_existing: bool = False,
    images: str | Path | None = None,
    track: Track = lambda batches, **_: batches,
) -> tuple[Published, Published]:
    """Write the model folders of both forms of a checkpoint: weights, timm's configuration and a model card.

    Both forms are compared before anything takes its name. A folder that holds the same files already is
    left as it is.

    Args:
        name: `arch.tag` of the training form.
        source: Checkpoint file of any layout, model folder, or Hub repository `owner/name`; what the
            manifest names by default.
        owner: Hub account that the folders are meant for.
        out: Folder for the two; `owner` by default.
        replace_existing: Replace folders that hold other files.
        images: Folder of images to compare the forms on; random images by default.
        track: Wraps the batches of the comparison with a progress bar.

    Raises:
        ValueError: There is no such name.
        CheckpointError: The checkpoint is of another variant or of the deploy form, or the fold is wrong.
        FileExistsError: There is another folder already.
    """
    record = _training_record(name)
    records = record, read_manifest()[name + DEPLOY_SUFFIX]
    folders = [Path(out or owner) / r.name for r in records]
    with ExitStack() as stack:
        new = [stack.enter_context(new_folder(folder, overwrite=True)) for folder in folders]
        model = _load(record, source)
        save_model(model, new[0])
        check = _fold(model, name, images, track)
        model.pretrained_cfg['tag'] = records[1].tag
        save_model(model, new[1])
        described = [_describe(r, folder, owner, check) for r, folder in zip(records, new, strict=True)]
        for r, folder in zip(described, new, strict=True):
            card = model_card(r, owner=owner, in_timm=hasattr(byobnet, r.arch))
            (folder / 'README.md').write_text(str(card), 'utf-8')
        for folder, partial in zip(folders, new, strict=True):
            _check_replaceable(folder, partial, replace_existing)
    return tuple(Published(record=r, folder=folder) for r, folder in zip(described, folders, strict=True))


def push_folders(published: Iterable[Published], *, replace_existing: bool = False) -> None:
    """Upload model folders to their repositories, and write into the manifest where they are.

    Raises `repvgg_zoo.hub.HubError`; what was uploaded before it stays, and is not uploaded again.
    """
    if not os.access(weights_dir(), os.W_OK):
        raise PermissionError(f'{str(weights_dir())!r} cannot be written, so publishing could not be recorded there')
    for item in published:
        revision = push_folder(item.folder, item.repo_id, replace=replace_existing)
        with locked(weights_dir(), wait_s=60):
            read_manifest.cache_clear()
            records = dict(read_manifest())
            records[item.record.name] = replace(item.record, revision=revision)
            write_manifest(records)
            write_text(weights_dir() / 'README.md', weights_page())
        _logger.info('%s is on the Hub at revision %s', item.repo_id, revision)


def _load(record: WeightsRecord, source: str | Path | None) -> RepVGG:
    if source is None:
        path = locate(timm.get_pretrained_cfg(record.name))
    elif Path(source).is_dir():
        path = weights_in(Path(source))
    elif _HUB_REF.fullmatch(str(source)) and not Path(source).exists() and not str(source).endswith(FILE_SUFFIXES):
        path = download_weights(str(source).removeprefix('hf-hub:'))
    else:
        path = Path(source)
    state_dict = to_timm_layout(read_checkpoint(path))
    if form_of(state_dict) == 'deploy':
        raise CheckpointError(f'{str(path)!r} is of the deploy form; both forms come from the training form alone')
    model = timm.create_model(
        record.name,
        num_classes=record.preprocessing.num_classes,
        aux_heads=any(key.startswith('aux_heads.') for key in state_dict) or None,
    ).eval()
    load_state_dict(model, state_dict)
    model._model_args = {}  # the auxiliary heads are in the file for whoever asks for them
    return model


def _fold(model: RepVGG, name: str, images: str | Path | None, track: Track) -> FoldCheck:
    """Switch a model to the deploy form, and compare the forms; raises `CheckpointError` if they differ."""
    exact = float64_rel_diff(model, next(images_for(model, images))[:1])
    if not exact <= _MAX_FLOAT64_REL_DIFF:
        raise CheckpointError(
            f'the two forms of {name} differ by {exact:.1e} of the largest logit in float64, more than '
            f'{_MAX_FLOAT64_REL_DIFF:.0e}, so nothing is written'
        )

    def logits(form: str) -> Tensor:
        batches = track(images_for(model, images), description=f'{name}: {form} form', total=None)
        with torch.inference_mode():
            return torch.cat([model(batch) for batch in batches]).double()

    training = logits('training')
    model.switch_to_deploy()
    deploy = logits('deploy')
    return FoldCheck(
        float64_rel_diff=exact,
        float32_rel_diff=((training - deploy).abs().max() / training.abs().max()).item(),
        images=len(training),
        top1_agreement_pct=100 * (training.argmax(1) == deploy.argmax(1)).double().mean().item() if images else None,
    )


def _describe(record: WeightsRecord, folder: Path, owner: str, check: FoldCheck) -> WeightsRecord:
    weights = folder / 'model.safetensors'
    with weights.open('rb') as file:
        sha256 = hashlib.file_digest(file, 'sha256').hexdigest()
    if record.file and sha256 != record.sha256:
        raise CheckpointError(
            f'{record.name} is bundled as {record.file}, and these are other weights (sha256 {sha256})'
        )
    return replace(
        record,
        hub_id=f'{owner}/{record.name}',
        revision=None,
        sha256=sha256,
        size_bytes=weights.stat().st_size,
        fold_check=check,
    )


def _check_replaceable(folder: Path, new: Path, replace_existing: bool) -> None:
    if replace_existing or not folder.exists():
        return
    names = sorted({path.name for path in (*folder.iterdir(), *new.iterdir())})
    if different := [name for name in names if not _same_file(folder / name, new / name)]:
        raise FileExistsError(
            f'{str(folder)!r} holds another {different[0]}; look at it, and pass replace (--replace) to replace it'
        )


def _same_file(a: Path, b: Path) -> bool:
    return a.is_file() and b.is_file() and filecmp.cmp(a, b, shallow=False)


def _training_record(name: str) -> WeightsRecord:
    names = [record.name for record in read_manifest().values() if record.form == 'training']
    if name in names:
        return read_manifest()[name]
    if name.removesuffix(DEPLOY_SUFFIX) in names:
        raise ValueError(f'{name!r} names the deploy form alone; {name.removesuffix(DEPLOY_SUFFIX)!r} publishes both')
    raise ValueError(f'unknown weights {name!r};{suggestion(name, names)} there are: {", ".join(names)}')
