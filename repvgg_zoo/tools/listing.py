"""The table of the variants."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping

from ..pretrained.manifest import DEPLOY_SUFFIX, WeightsRecord, read_manifest
from ..variants import VARIANTS
from .console import print_table
from .markdown import markdown_table

__all__ = ['add_arguments', 'main', 'variant_rows', 'variants_markdown']

_HEADER = ('variant', 'train M', 'deploy M', 'GMACs', 'px', 'top-1 %', 'train', 'deploy')
_LEGEND = (
    'train M, deploy M: parameters of either form, in millions. GMACs: multiply-adds of the deploy form at px pixels, '
    'in 1e9. top-1 %: as published, on ImageNet-1k. train, deploy: where the weights of either form are. Hub: on the '
    'Hub; bundled: in this package (CIFAR-10); fold: made at load from the training weights; .pth: in the official '
    'release only; none: nowhere.'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `repvgg-zoo list`."""
    parser.add_argument('--markdown', action='store_true', help='print it in Markdown, without the last two columns')


def main(args: argparse.Namespace) -> int:
    """Run `repvgg-zoo list`."""
    if args.markdown:
        print(variants_markdown(read_manifest()))
    else:
        print_table(_HEADER, list(variant_rows(read_manifest())))
        print(_LEGEND)
    return 0


def variants_markdown(records: Mapping[str, WeightsRecord]) -> str:
    """Write the table of the variants in Markdown, without the places of the weights, which change.

    Args:
        records: Those of all weights, as `read_manifest` gives them.

    Returns:
        The table, without a newline at the end.

    Example:
        >>> print(variants_markdown(read_manifest()).splitlines()[0])
        | variant | train M | deploy M | GMACs | px | top-1 % |
    """
    return markdown_table((row[:-2] for row in variant_rows(records)), _HEADER[:-2], text_columns=('variant',))


def variant_rows(records: Mapping[str, WeightsRecord]) -> Iterator[tuple[str, ...]]:
    """Describe each variant by a row: name, sizes, published accuracy, and where the weights of both forms are.

    Args:
        records: Those of all weights, as `read_manifest` gives them.

    Yields:
        Cells. A cell is empty if nobody has published the figure.

    Example:
        >>> next(variant_rows(read_manifest()))
        ('repvgg_a0', '9.11', '8.31', '1.361', '224', '72.41', 'Hub', 'fold')
    """
    for arch in VARIANTS:
        training = next(r for r in records.values() if r.arch == arch and r.form == 'training')
        deploy = records[training.name + DEPLOY_SUFFIX]
        yield (
            arch,
            f'{training.params / 1e6:.2f}',
            f'{deploy.params / 1e6:.2f}',
            f'{deploy.gmacs:.3f}',
            str(training.preprocessing.input_px),
            f'{training.published[0].top1_pct:.2f}' if training.published else '',
            _source_kind(training),
            _source_kind(deploy, fold_of=training),
        )


def _source_kind(record: WeightsRecord, *, fold_of: WeightsRecord | None = None) -> str:
    if record.file:
        return 'bundled'
    if record.hub_id:
        return 'Hub'
    if record.upstream:
        return '.pth'
    return 'fold' if fold_of is not None and fold_of.has_source else 'none'
