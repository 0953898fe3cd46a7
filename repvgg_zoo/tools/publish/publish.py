"""From a checkpoint to two model folders, one of each form, and to two repositories on the Hub."""

from __future__ import annotations

import filecmp
import logging
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import timm
import torch
from huggingface_hub.utils import validate_repo_id
from timm.models import byobnet
from torch import Tensor

from ...checkpoints.errors import CheckpointError
from ...checkpoints.files import FILE_SUFFIXES
from ...model import RepVGG
from ...pretrained.hub import CARD, WEIGHT_FILES, HubError, download_weights, push_folder, sha256_of
from ...pretrained.load import assign, convert_form, read
from ...pretrained.locate import locate, weights_in
from ...pretrained.manifest import DEPLOY_SUFFIX, FoldCheck, WeightsRecord, read_manifest, weights_dir, write_manifest
from ...reparam.evaluation import disable_fast_path
from ...variants import suggestion
from ..atomic import locked, new_folder, write_text
from ..convert import open_model, save_model
from ..listing import weights_page
from ..progress import Track
from ..verify import MAX_FLOAT32_REL_DIFF, float64_rel_diff, images_for, rel_diff
from .cards import model_card

__all__ = ['Published', 'build_folders', 'names_to_publish', 'publish', 'push_folders']

_logger = logging.getLogger(__name__)
_MAX_FLOAT64_REL_DIFF = 1e-9
"""Some fifty layers of float64 rounding stay far below, and any wrong fold far above."""
_HUB_REF = re.compile(r'(hf-hub:)?\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?')


@dataclass(frozen=True, kw_only=True)
class Published:
    """A model folder, and the record that describes it."""

    record: WeightsRecord
    folder: Path


def publish(
    name: str,
    source: str | Path | None = None,
    *,
    owner: str,
    out: str | Path | None = None,
    push: bool = False,
    replace_existing: bool = False,
    images: str | Path | None = None,
    track: Track = lambda batches, **_: batches,
) -> tuple[Published, Published]:
    """Write the model folders of both forms of a checkpoint, and upload them; see `build_folders`, `push_folders`."""
    if push and not os.access(weights_dir(), os.W_OK):
        raise PermissionError(f'{str(weights_dir())!r} cannot be written, so publishing could not be recorded there')
    published = build_folders(
        name, source, owner=owner, out=out, replace_existing=replace_existing, images=images, track=track
    )
    if push:
        push_folders(published, replace_existing=replace_existing)
    return published


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

    What was written is read again and compared before anything takes its name. A folder that holds the same
    weights and configuration already keeps its card, with what was measured then.

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
    records = _training_record(name), read_manifest()[name + DEPLOY_SUFFIX]
    for record in records:
        validate_repo_id(f'{owner}/{record.name}')
    folders = [Path(out or owner) / record.name for record in records]
    path, source_name = _locate(records[0], source)
    origin = f'{source_name}, sha256 `{sha256_of(path)}`'
    with ExitStack() as stack:
        new = [stack.enter_context(new_folder(folder, overwrite=True)) for folder in folders]
        _write_training_form(records[0], path, new[0])
        check = _fold(records[1], new, images, track)
        described = [_describe(record, folder, owner, check) for record, folder in zip(records, new, strict=True)]
        for record, folder in zip(described, new, strict=True):
            card = model_card(record, owner=owner, source=origin, in_timm=hasattr(byobnet, record.arch))
            (folder / CARD).write_text(str(card), 'utf-8')
        if not replace_existing:
            for folder, partial in zip(folders, new, strict=True):
                _keep_existing(folder, partial)
    return tuple(Published(record=r, folder=folder) for r, folder in zip(described, folders, strict=True))


def push_folders(published: Iterable[Published], *, replace_existing: bool = False) -> None:
    """Upload model folders to their repositories, and write into the manifest where they are.

    Raises `repvgg_zoo.hub.HubError`; what was uploaded before it stays, and is not uploaded again.
    """
    for item in published:
        if sha256_of(item.folder / WEIGHT_FILES[0]) != item.record.sha256:
            raise HubError(f'{str(item.folder / WEIGHT_FILES[0])!r} has changed since it was written; publish it again')
        revision = push_folder(item.folder, item.record.hub_id, replace=replace_existing)
        with locked(weights_dir()):
            read_manifest.cache_clear()  # another process may have published meanwhile
            records = dict(read_manifest())
            records[item.record.name] = replace(item.record, revision=revision)
            # the manifest last: it is what tells that nothing is left to do
            write_text(weights_dir() / 'README.md', weights_page(records.values()))
            write_manifest(records)
        _logger.info('%s is on the Hub at revision %s', item.record.hub_id, revision)


def _locate(record: WeightsRecord, source: str | Path | None) -> tuple[Path, str]:
    """The file that a source stands for, and what a card may call it."""
    if source is None:
        path = locate(timm.get_pretrained_cfg(record.name), use_override_dir=False)
        return path, record.hub_ref or path.name
    path = Path(source)
    if str(source) and path.is_dir():
        path = weights_in(path)
    elif not path.exists() and _HUB_REF.fullmatch(str(source)) and not str(source).endswith(FILE_SUFFIXES):
        hub_ref = str(source).removeprefix('hf-hub:')
        return download_weights(hub_ref), hub_ref
    if not path.is_file():
        raise FileNotFoundError(f'{str(source)!r} is no checkpoint file, no model folder and no Hub repository')
    return path, path.name


def _write_training_form(record: WeightsRecord, path: Path, folder: Path) -> None:
    checkpoint = read(path)
    if checkpoint.form == 'deploy':
        raise CheckpointError(f'{str(path)!r} is of the deploy form; both forms come from the training form alone')
    model = timm.create_model(
        record.name,
        num_classes=record.preprocessing.num_classes,
        aux_heads=any(key.startswith('aux_heads.') for key in checkpoint.state_dict) or None,
        device='meta',
    )
    assign(model, convert_form(checkpoint, model))
    model._model_args = {}  # the auxiliary heads are in the file for whoever asks for them
    save_model(model, folder)


def _fold(deploy_record: WeightsRecord, folders: Sequence[Path], images: str | Path | None, track: Track) -> FoldCheck:
    """Write the deploy form of the training form that is in the first folder into the second, and compare them.

    One model at a time is in memory. Raises `CheckpointError` if the forms differ.
    """
    name = deploy_record.training_name

    def logits(model: RepVGG) -> Tensor:
        form = 'deploy' if model.deploy else 'training'
        batches = track(images_for(model, images), description=f'{name}: {form} form', total=None)
        with torch.inference_mode(), disable_fast_path():
            return torch.cat([model(batch) for batch in batches]).double()

    model = open_model(folders[0]).eval()
    float64 = float64_rel_diff(model, next(images_for(model, images))[:1])
    training = logits(model)
    model.switch_to_deploy()
    model.pretrained_cfg['tag'] = deploy_record.tag
    save_model(model, folders[1])
    del model
    deploy = logits(open_model(folders[1]).eval())
    float32 = rel_diff(training, deploy)
    if not (float64 <= _MAX_FLOAT64_REL_DIFF and float32 <= MAX_FLOAT32_REL_DIFF):
        raise CheckpointError(
            f'the two forms of {name} differ by {float64:.1e} of the largest logit in float64 and {float32:.1e} in '
            f'float32, more than {_MAX_FLOAT64_REL_DIFF:.0e} and {MAX_FLOAT32_REL_DIFF:.0e}, so nothing is written'
        )
    same_class = (training.argmax(1) == deploy.argmax(1)).double().mean().item()
    return FoldCheck(
        float64_rel_diff=float64,
        float32_rel_diff=float32,
        images=len(training),
        top1_agreement_pct=100 * same_class if images else None,
    )


def _describe(record: WeightsRecord, folder: Path, owner: str, check: FoldCheck) -> WeightsRecord:
    weights = folder / WEIGHT_FILES[0]
    sha256 = sha256_of(weights)
    if record.file and sha256 != record.sha256:
        raise CheckpointError(f'{record.name} is bundled as {record.file}, and these are other weights: {sha256}')
    return replace(
        record,
        hub_id=f'{owner}/{record.name}',
        revision=None,
        sha256=sha256,
        size_bytes=weights.stat().st_size,
        fold_check=record.fold_check if record.fold_check and sha256 == record.sha256 else check,
    )


def _keep_existing(folder: Path, new: Path) -> None:
    """Take over the card of a folder that holds the same weights; raises `FileExistsError` if it holds others."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    for path in new.iterdir():
        if path.name != CARD and not ((folder / path.name).is_file() and filecmp.cmp(folder / path.name, path, False)):
            raise FileExistsError(
                f'{str(folder)!r} holds another {path.name}, or none; look at it, and pass replace (--replace) to '
                'replace it'
            )
    if (folder / CARD).is_file():
        shutil.copyfile(folder / CARD, new / CARD)


def _training_record(name: str) -> WeightsRecord:
    names = [record.name for record in read_manifest().values() if record.form == 'training']
    if name in names:
        return read_manifest()[name]
    if name.removesuffix(DEPLOY_SUFFIX) in names:
        raise ValueError(f'{name!r} names the deploy form alone; {name.removesuffix(DEPLOY_SUFFIX)!r} publishes both')
    raise ValueError(f'unknown weights {name!r};{suggestion(name, names)} there are: {", ".join(names)}')
