"""Builds the model folders of both forms of a checkpoint."""

from __future__ import annotations

import filecmp
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import timm
import torch
from huggingface_hub.utils import validate_repo_id
from torch import Tensor

from ...checkpoints.errors import CheckpointError
from ...checkpoints.state_dicts import Form
from ...model import RepVGG
from ...pretrained.hub import WEIGHT_FILES, sha256_of
from ...pretrained.load import assign, convert_form, read
from ...pretrained.manifest import DEPLOY_SUFFIX, FoldCheck, WeightsRecord, read_manifest
from ...reparam.evaluation import disable_fast_path
from ...reparam.tolerance import MAX_REL_DIFF, max_rel_diff, rel_diff
from ...variants import VARIANTS
from ..atomic import put_in_place, workspace
from ..console import Track, no_progress
from ..convert import open_model
from ..model_folder import save_model
from ..own_files import MARKER, check_replaceable, foreign_entries
from ..reference import REFERENCE, write_reference
from ..verify import float64_rel_diff, images_for
from .cards import CARD, is_same_card, model_card
from .facts import ModelFacts, facts_of
from .preprocessing import check_preprocessing
from .publication import Publication

__all__ = ['Published', 'build_folders']


@dataclass(frozen=True, kw_only=True)
class Published:
    """A model folder, and what a record of it says."""

    name: str
    form: Form
    folder: Path
    hub_id: str
    """The repository that the folder is meant for."""
    sha256: str
    """That of the weights."""
    size_bytes: int
    fold_check: FoldCheck
    in_manifest: bool
    """These are the weights that the manifest describes under this name."""
    edited_card: bool = False
    """The card is the user's, and stays as it is."""
    uploaded: bool | None = None
    """Something was uploaded. None before the push."""


def build_folders(
    publication: Publication,
    *,
    owner: str,
    out: str | Path | None = None,
    replace_existing: bool = False,
    images: str | Path | None = None,
    device: str = 'cpu',
    track: Track = no_progress,
) -> tuple[Published, Published]:
    """Write the model folders of both forms of a checkpoint.

    Each holds the weights, timm's configuration, a model card and reference outputs. The files are read again and
    compared before the folders take their names. A folder that holds the same already stays as it is, with the
    figures that were measured then. A card that the user edited stays too, as long as the weights are the same.

    Args:
        publication: What to publish.
        owner: Hub account that the folders are meant for.
        out: Folder for both; `owner` by default.
        replace_existing: Replace model folders that hold something else.
        images: Folder of images to compare the forms on; random images by default.
        device: Where to compare the forms. What is written is computed on the CPU, so it is the same on each device.
        track: Shows the progress of the comparison.

    Returns:
        The training form and the deploy form.

    Raises:
        ValueError: The name or the owner can be none, the labels are not as many as the classes, or timm cannot prepare
            images as the publication says.
        CheckpointError: The checkpoint is of another variant or of the deploy form, or the fold is wrong.
        FileExistsError: A folder holds other weights or another card, or files that an earlier run did not write.

    Example:
        >>> import tempfile
        >>> from repvgg_zoo.tools.publish.publication import recorded_publication
        >>> publication = recorded_publication('test_repvgg.cifar10')
        >>> training, deploy = build_folders(publication, owner='me', out=tempfile.mkdtemp())
        >>> sorted(path.name for path in deploy.folder.glob('[!.]*'))
        ['README.md', 'config.json', 'model.safetensors', 'test']
        >>> deploy.hub_id
        'me/test_repvgg.cifar10_deploy'
    """
    for name in publication.names:
        validate_repo_id(f'{owner}/{name}')
    folders = [Path(out or owner) / name for name in publication.names]
    for folder in folders:
        if replace_existing or folder.is_symlink() or not folder.is_dir():
            check_replaceable(folder, overwrite=True, ignore=(CARD,))
    with ExitStack() as stack:
        new = [stack.enter_context(workspace(folder)) for folder in folders]
        model = _open(publication)
        if publication.record is None:
            publication = _with_defaults(publication, model.pretrained_cfg)
        _describe_model(model, publication)
        save_model(model, new[0])
        del model
        check, facts = _fold(publication, new, images, device, track)
        published = [
            _describe(publication, new[index], folders[index], owner, check, facts[index]) for index in range(2)
        ]
        kept = [_is_kept(folders[index], new[index], replace_existing=replace_existing) for index in range(2)]
        for index in range(2):
            if not kept[index]:
                put_in_place(new[index], folders[index], overwrite=True)
    training, deploy = (replace(item, edited_card=CARD in foreign_entries(item.folder)) for item in published)
    return training, deploy


def _open(publication: Publication) -> RepVGG:
    """Build the training form."""
    source, record = publication.source, publication.record
    if record is not None:
        model = _open_recorded(publication, record)
    else:
        model = open_model(
            source.model,
            variant=publication.variant,
            block=publication.block,
            use_ema=publication.use_ema,
            prefix=publication.prefix,
            model_kwargs=publication.model_kwargs,
        )
    if model.deploy:
        raise CheckpointError(f'{source.title} is of the deploy form; both forms are made from the training form')
    if model.num_classes == 0:
        raise CheckpointError(f'{source.title} has no classifier; what is published here are image classifiers')
    return model


def _with_defaults(publication: Publication, cfg: Mapping[str, Any]) -> Publication:
    """Take over what a model folder tells of its weights, and the user does not."""
    publication = replace(publication, license=publication.license or cfg.get('license'))
    names = cfg.get('label_names')
    if publication.label_names or not isinstance(names, (list, tuple)):  # timm also takes a mapping that has gaps
        return publication
    return replace(publication, label_names=tuple(names), label_descriptions=cfg.get('label_descriptions') or {})


def _open_recorded(publication: Publication, record: WeightsRecord) -> RepVGG:
    """Build the model of a record, with its auxiliary heads if the file has their weights."""
    checkpoint = read(publication.source.path, use_ema=publication.use_ema, prefix=publication.prefix)
    model = cast(
        'RepVGG',
        timm.create_model(
            publication.name,
            num_classes=record.preprocessing.num_classes,
            aux_heads=any(key.startswith('aux_heads.') for key in checkpoint.state_dict) or None,
            deploy=checkpoint.form == 'deploy',
            device='meta',
        ),
    )
    assign(model, convert_form(checkpoint, model))
    model._model_args = {}  # aux_heads=True is for the user to ask for; the file has their weights
    return model


def _describe_model(model: RepVGG, publication: Publication) -> None:
    """Give a model the description that `config.json` gets."""
    cfg, arch = model.pretrained_cfg, model.variant.name
    begin = publication.name.split('.')[0]
    if begin in VARIANTS and begin != arch:
        raise ValueError(f'the name {publication.name!r} says {begin}, and the weights are of {arch}; begin it so')
    cfg['tag'] = publication.name.removeprefix(f'{arch}.')
    cfg.update(publication.preprocessing)
    _, height, width = cfg['input_size']
    cfg['input_size'] = (model.in_chans, height, width)
    cfg['pool_size'] = tuple(-(-side // model.output_stride) for side in (height, width))
    check_preprocessing(model)
    cfg['license'], cfg['num_classes'] = publication.license, model.num_classes
    if labels := publication.label_names:
        if len(labels) != model.num_classes:
            raise ValueError(f'there are {len(labels)} label names for {model.num_classes} classes')
        cfg['label_names'] = list(labels)
        cfg['label_descriptions'] = dict(publication.label_descriptions) or None


def _fold(
    publication: Publication, folders: Sequence[Path], images: str | Path | None, device: str, track: Track
) -> tuple[FoldCheck, list[ModelFacts]]:
    """Fold the training form of the first folder into the second folder, and compare both forms.

    One model at a time is in memory. Raises `CheckpointError` if the forms differ.
    """
    facts = []

    def opened(folder: Path) -> RepVGG:
        model = open_model(folder).eval()
        write_reference(model, folder)
        facts.append(facts_of(model))
        return model.to(device)

    def logits(model: RepVGG) -> Tensor:
        description = f'{publication.name}: {facts[-1].form} form'
        with torch.inference_mode(), disable_fast_path():
            batches = track(images_for(model, images), description=description, total=None)
            return torch.cat([model(batch).cpu() for batch in batches]).double()

    model = opened(folders[0])
    float64 = float64_rel_diff(model, next(images_for(model, images))[:1])
    training, where = logits(model), str(model.device)
    model.cpu().switch_to_deploy()
    model.pretrained_cfg['tag'] += DEPLOY_SUFFIX
    save_model(model, folders[1])
    del model
    deploy = logits(opened(folders[1]))
    float32 = rel_diff(deploy, training)
    exact, rounded = MAX_REL_DIFF[torch.float64], max_rel_diff(torch.float32, torch.device(device))
    if not (float64 <= exact and float32 <= rounded):
        raise CheckpointError(
            f'the two forms of {publication.name} differ by {float64:.1e} of the largest logit in float64 and '
            f'{float32:.1e} in float32, more than {exact:.0e} and {rounded:.0e}, so nothing is written'
        )
    same_class = (training.argmax(1) == deploy.argmax(1)).double().mean().item()
    check = FoldCheck(
        float64_rel_diff=float64,
        float32_rel_diff=float32,
        images=len(training),
        top1_agreement_pct=100 * same_class if images else None,
        device=where,
    )
    return check, facts


def _describe(
    publication: Publication, new: Path, folder: Path, owner: str, check: FoldCheck, facts: ModelFacts
) -> Published:
    """Write the card of a folder, and return what a record of it says."""
    name = publication.names[facts.form == 'deploy']
    weights = new / WEIGHT_FILES[0]
    sha256, size_bytes = sha256_of(weights), weights.stat().st_size
    record = read_manifest().get(name)
    if record is not None and record.file and sha256 != record.sha256:
        raise CheckpointError(f'{name} is bundled as {record.file}, and these are other weights: {sha256}')
    if record is not None and record.fold_check and sha256 == record.sha256:
        check = record.fold_check
    card = model_card(publication, facts, check, owner=owner, sha256=sha256, size_bytes=size_bytes)
    (new / CARD).write_text(str(card), 'utf-8')
    return Published(
        name=name,
        form=facts.form,
        folder=folder,
        hub_id=f'{owner}/{name}',
        sha256=sha256,
        size_bytes=size_bytes,
        fold_check=check,
        in_manifest=record is not None and publication.vouched,
    )


def _is_kept(folder: Path, new: Path, *, replace_existing: bool) -> bool:
    """Tell whether a folder stays as it is.

    It does if it has what was to be written, except for what varies between machines, or if the user edited its card.
    Raises `FileExistsError` if it has something else that is not to be replaced.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return False
    names, present = (
        {path.relative_to(root).as_posix() for path in root.rglob('*') if not path.is_dir()} - {MARKER}
        for root in (new, folder)
    )
    if foreign := sorted(present - names):
        raise FileExistsError(
            f'{str(folder)!r} holds {foreign[0]!r}, which is not one of the files to replace; remove it or choose '
            'another folder (--out)'
        )
    edited_card = CARD in foreign_entries(folder)
    different = sorted(
        (name for name in names if name not in present or not _is_same(name, folder, new, edited_card)),
        key=lambda name: (name == CARD, name),  # other weights are the better reason
    )
    if different and not replace_existing:
        raise FileExistsError(
            f'{str(folder)!r} holds another {different[0]}, or none; look at it, and pass replace (--replace) to '
            'replace it'
        )
    if different:  # an edited card tells of other weights
        check_replaceable(folder, overwrite=True)
    return edited_card if replace_existing else True


def _is_same(name: str, folder: Path, new: Path, edited_card: bool) -> bool:
    if name == CARD and not edited_card:
        return is_same_card((folder / name).read_text('utf-8'), (new / name).read_text('utf-8'))
    return name in (CARD, REFERENCE) or filecmp.cmp(folder / name, new / name, False)
