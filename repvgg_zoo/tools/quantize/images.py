"""Folders of images: to calibrate, to evaluate and to train on."""

from __future__ import annotations

from pathlib import Path

from timm.data import ImageDataset, create_dataset

__all__ = ['evenly_spaced', 'image_folder', 'why_no_top1']


def image_folder(folder: str | Path) -> ImageDataset:
    """Open a folder of images; raise `FileNotFoundError` if there is none, or none in it."""
    if not str(folder) or not Path(folder).is_dir():
        raise FileNotFoundError(f'no folder of images at {str(folder)!r}')
    try:
        return create_dataset('', root=str(folder), search_split=False)  # a class may be called `val`
    except RuntimeError as error:
        raise FileNotFoundError(f'no images in {str(folder)!r}') from error


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """Choose at most `wanted` of `count` indices at even distances, so that every class of a sorted folder occurs."""
    chosen = min(count, wanted)
    return [index * count // chosen for index in range(chosen)]


def why_no_top1(dataset: ImageDataset, num_classes: int) -> str | None:
    """Tell why the classes of a folder are not those of a model; return None if they are."""
    if num_classes == 0:
        return 'the model has no classifier'
    root = Path(dataset.reader.root)
    folders = {path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(('.', '__'))}
    classes = dataset.reader.class_to_idx.keys()  # the names of folders with images
    if classes == folders and len(folders) == num_classes:
        return None
    return (
        f'it takes {num_classes} folders in {root}, one for each class, with the images in them; there are '
        f'{len(folders)}, {len(classes & folders)} of them with images'
    )
