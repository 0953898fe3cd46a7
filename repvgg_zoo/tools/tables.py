"""Regenerates what follows from the table of variants: `python -m repvgg_zoo.tools.tables [--check]`.

Written are `params` and `gmacs` of all records in `weights/manifest.json`, records of new variants, `weights/README.md`
and the table between `<!-- variants -->` and `<!-- /variants -->` in `README.md` and `docs/models.md`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from timm.data import DEFAULT_CROP_PCT, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..model import RepVGG
from ..pretrained.manifest import DEPLOY_SUFFIX, Preprocessing, WeightsRecord, manifest_path, read_manifest
from ..variants import VARIANTS, Variant
from .atomic import write_text
from .benchmark.cases import forward_gmacs
from .console import print_error
from .listing import variants_markdown
from .publish.manifest_file import PAGE, manifest_text
from .publish.weights_page import weights_page

__all__ = ['count_gmacs', 'count_params', 'main', 'updated_records']

_BEGIN, _END = '<!-- variants -->', '<!-- /variants -->'
_UNTRAINED_TAG = 'untrained'
"""Tag of a new variant's records, until there are weights."""


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the tables and counted fields.

    Args:
        argv: Arguments behind the program's name, by default those of the process.

    Returns:
        The exit status. With `--check`, 1 if a file is out of date.

    Raises:
        SystemExit: The arguments are wrong, or ask for help.

    Example:
        >>> main(['--check'])
        0
    """
    parser = argparse.ArgumentParser(
        prog='python -m repvgg_zoo.tools.tables',
        description='Regenerate the tables and counted fields of README.md, docs/models.md and weights/.',
    )
    parser.add_argument('--check', action='store_true', help='write nothing; exit with 1 if a file is out of date')
    args = parser.parse_args(argv)
    try:
        outdated = {path: text for path, text in _contents().items() if path.read_text('utf-8') != text}
    except (OSError, ValueError) as error:
        print_error(error)
        return 1
    for path, text in outdated.items():
        if args.check:
            print(f'{path} is out of date; run python -m repvgg_zoo.tools.tables', file=sys.stderr)
        else:
            write_text(path, text)
            print(f'wrote {path}')
    return int(args.check and bool(outdated))


def updated_records(records: Mapping[str, WeightsRecord]) -> dict[str, WeightsRecord]:
    """Count the sizes of all records again, and add two records for each variant that has none.

    Args:
        records: Those of the manifest.

    Returns:
        Records by `arch.tag`, in the order of the variants.

    Example:
        >>> updated_records(read_manifest()) == dict(read_manifest())
        True
        >>> list(updated_records({}))[:2]
        ['repvgg_a0.untrained', 'repvgg_a0.untrained_deploy']
    """
    updated: dict[str, WeightsRecord] = {}
    for variant in VARIANTS.values():
        own = [r for r in records.values() if r.arch == variant.name] or _untrained(variant)
        updated |= {record.name: _counted(record, variant) for record in own}
    return updated


@cache
def count_params(variant: Variant, *, deploy: bool, num_classes: int = 1000) -> int:
    """Count the parameters of one form, without auxiliary heads.

    Args:
        variant: The architecture.
        deploy: Count the deploy form.
        num_classes: Classes of the classifier.

    Returns:
        The number.

    Example:
        >>> count_params(VARIANTS['repvgg_a0'], deploy=True)
        8309384
    """
    model = RepVGG(variant, deploy=deploy, num_classes=num_classes, device='meta')
    return sum(parameter.numel() for parameter in model.parameters())


@cache
def count_gmacs(variant: Variant, *, input_px: int, num_classes: int = 1000) -> float:
    """Count the multiply-adds of the deploy form for one square image.

    Convolutions and the classifier count. Squeeze-excite, at most 0.02 %, does not, as in the published figures.

    Args:
        variant: The architecture.
        input_px: Side of the image.
        num_classes: Classes of the classifier.

    Returns:
        Multiply-adds in 1e9.

    Example:
        >>> count_gmacs(VARIANTS['repvgg_a0'], input_px=224)
        1.361451008
    """
    model = RepVGG(replace(variant, se=None), deploy=True, num_classes=num_classes, device='meta').eval()
    return forward_gmacs(model, torch.empty(1, model.in_chans, input_px, input_px, device='meta'))


def _counted(record: WeightsRecord, variant: Variant) -> WeightsRecord:
    px, classes = record.preprocessing.input_px, record.preprocessing.num_classes
    return replace(
        record,
        params=count_params(variant, deploy=record.form == 'deploy', num_classes=classes),
        gmacs=round(count_gmacs(variant, input_px=px, num_classes=classes), 6),
    )


def _untrained(variant: Variant) -> list[WeightsRecord]:
    """Records of a variant that nobody has trained, for ImageNet-1k at 224 px."""
    training = WeightsRecord(
        arch=variant.name,
        tag=_UNTRAINED_TAG,
        form='training',
        hub_id=None,
        revision=None,
        url=None,
        file=None,
        sha256=None,
        size_bytes=None,
        license='mit',
        origin='not trained yet',
        upstream=None,
        recipe=None,
        params=0,
        gmacs=0.0,
        preprocessing=Preprocessing(
            input_px=224,
            crop_pct=DEFAULT_CROP_PCT,
            interpolation='bilinear',
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
            num_classes=1000,
        ),
        published=(),
        measured=(),
        fold_check=None,
    )
    return [training, replace(training, tag=_UNTRAINED_TAG + DEPLOY_SUFFIX, form='deploy')]


def _contents() -> dict[Path, str]:
    """What the files should hold."""
    records = updated_records(read_manifest())
    manifest = manifest_path()
    root, table = manifest.parents[1], variants_markdown(records)
    return {
        **{page: _with_table(page, table) for page in (root / 'README.md', root / 'docs' / 'models.md')},
        manifest.with_name(PAGE): weights_page(records),
        manifest: manifest_text(records),
    }


def _with_table(page: Path, table: str) -> str:
    if not page.is_file():
        raise FileNotFoundError(f'no {str(page)!r}; the tables are those of a checkout, not of an installed package')
    before, begin, rest = page.read_text('utf-8').partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not end:
        raise ValueError(f'{str(page)!r} has no lines {_BEGIN} and {_END}; put them where the table belongs')
    return f'{before}{begin}\n{table}\n{end}{after}'


if __name__ == '__main__':
    sys.exit(main())
