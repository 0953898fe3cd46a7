"""Builds the model folders of both forms of a checkpoint."""

from __future__ import annotations

import filecmp
import re
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import timm
import torch
from huggingface_hub.utils import validate_repo_id
from timm.models import PretrainedCfg, byobnet
from torch import Tensor

from ...checkpoints.errors import CheckpointError
from ...checkpoints.files import FILE_SUFFIXES
from ...model import RepVGG
from ...pretrained.hub import WEIGHT_FILES, download_weights, sha256_of
from ...pretrained.load import assign, convert_form, read
from ...pretrained.locate import locate, weights_in
from ...pretrained.manifest import DEPLOY_SUFFIX, FoldCheck, WeightsRecord, read_manifest
from ...reparam.evaluation import disable_fast_path
from ...reparam.tolerance import MAX_REL_DIFF, rel_diff
from ...variants import suggestion
from ..atomic import new_folder
from ..console import Track, no_progress
from ..convert import MODEL_FILES, open_model, save_model
from ..verify import float64_rel_diff, images_for
from .cards import model_card
from .upload import CARD

__all__ = ['Published', 'build_folders']

_HUB_REF = re.compile(r'(hf-hub:)?\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?')


@dataclass(frozen=True, kw_only=True)
class Published:
    """A model folder, and the record that describes it."""

    record: WeightsRecord
    folder: Path


def build_folders(
    name: str,
    source: str | Path | None = None,
    *,
    owner: str,
    out: str | Path | None = None,
    replace_existing: bool = False,
    images: str | Path | None = None,
    track: Track = no_progress,
) -> tuple[Published, Published]:
    """Write the model folders of both forms of a checkpoint: weights, timm's configuration and a model card.

    The files are read again and compared before the folders take their names. If a folder holds the same weights and
    configuration already, it keeps its card with the figures that were measured then.

    Args:
        name: `arch.tag` of the training form.
        source: Checkpoint file of any layout, model folder, or Hub repository `owner/name`; by default what the
            manifest names.
        owner: Hub account that the folders are meant for.
        out: Folder for both; `owner` by default.
        replace_existing: Replace model folders that hold other weights.
        images: Folder of images to compare the forms on; random images by default.
        track: Shows the progress of the comparison.

    Returns:
        The training form and the deploy form.

    Raises:
        ValueError: The manifest has no such name, or the owner can be none.
        FileNotFoundError: The source does not exist.
        CheckpointError: The checkpoint is of another variant or of the deploy form, or the fold is wrong.
        FileExistsError: A folder holds other weights, or files that no model folder holds.

    Example:
        >>> import tempfile
        >>> training, deploy = build_folders('test_repvgg.cifar10', owner='me', out=tempfile.mkdtemp())
        >>> sorted(path.name for path in deploy.folder.iterdir())
        ['README.md', 'config.json', 'model.safetensors']
        >>> deploy.record.hub_id
        'me/test_repvgg.cifar10_deploy'
    """
    records = _training_record(name), read_manifest()[name + DEPLOY_SUFFIX]
    for record in records:
        validate_repo_id(f'{owner}/{record.name}')
    folders = [Path(out or owner) / record.name for record in records]
    path, source_name = _locate(records[0], source)
    origin = f'{source_name}, sha256 `{sha256_of(path)}`'
    with ExitStack() as stack:
        owned = (*MODEL_FILES, CARD)
        new = [stack.enter_context(new_folder(folder, overwrite=True, owned=owned)) for folder in folders]
        _write_training_form(records[0], path, new[0])
        check = _fold(records[1], new, images, track)
        described = [_describe(record, folder, owner, check) for record, folder in zip(records, new, strict=True)]
        for record, folder in zip(described, new, strict=True):
            card = model_card(record, owner=owner, source=origin, in_timm=hasattr(byobnet, record.arch))
            (folder / CARD).write_text(str(card), 'utf-8')
        if not replace_existing:
            for folder, partial in zip(folders, new, strict=True):
                _keep_existing(folder, partial)
    training, deploy = (Published(record=r, folder=folder) for r, folder in zip(described, folders, strict=True))
    return training, deploy


def _locate(record: WeightsRecord, source: str | Path | None) -> tuple[Path, str]:
    """Find the file of a source, and what a card may call it."""
    if source is None:
        path = locate(cast('PretrainedCfg', timm.get_pretrained_cfg(record.name)), use_override_dir=False)
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
        raise CheckpointError(f'{str(path)!r} is of the deploy form; both forms are made from the training form')
    model = cast(
        'RepVGG',
        timm.create_model(
            record.name,
            num_classes=record.preprocessing.num_classes,
            aux_heads=any(key.startswith('aux_heads.') for key in checkpoint.state_dict) or None,
            device='meta',
        ),
    )
    assign(model, convert_form(checkpoint, model))
    model._model_args = {}  # aux_heads=True is for the user to ask for; the file has their weights
    save_model(model, folder)


def _fold(deploy_record: WeightsRecord, folders: Sequence[Path], images: str | Path | None, track: Track) -> FoldCheck:
    """Fold the training form of the first folder into the second folder, and compare both forms.

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
    float32 = rel_diff(deploy, training)
    if not (float64 <= MAX_REL_DIFF[torch.float64] and float32 <= MAX_REL_DIFF[torch.float32]):
        raise CheckpointError(
            f'the two forms of {name} differ by {float64:.1e} of the largest logit in float64 and {float32:.1e} in '
            f'float32, more than {MAX_REL_DIFF[torch.float64]:.0e} and {MAX_REL_DIFF[torch.float32]:.0e}, so nothing '
            'is written'
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
    """Keep the card of a folder that holds the same weights. Raises `FileExistsError` if it holds others."""
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
        raise ValueError(f'{name!r} names the deploy form only; {name.removesuffix(DEPLOY_SUFFIX)!r} publishes both')
    raise ValueError(f'unknown weights {name!r};{suggestion(name, names)} there are: {", ".join(names)}')
