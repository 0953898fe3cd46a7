"""The tables of the variants and of their weights."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping

from ..pretrained.manifest import DEPLOY_SUFFIX, WeightsRecord, read_manifest
from ..variants import VARIANTS
from .console import print_table
from .markdown import markdown_table

__all__ = ['add_arguments', 'main', 'variant_rows', 'variants_markdown', 'weights_rows']

_VARIANTS_HEADER = ('variant', 'train M', 'deploy M', 'GMACs', 'px', 'top-1 %', 'data set', 'tags')
_VARIANTS_LEGEND = (
    'train M, deploy M: parameters of either form, in millions. GMACs: multiply-adds of the deploy form at px pixels, '
    'in 1e9. top-1 %: of the first of the weights below, as published.'
)
_WEIGHTS_HEADER = ('weights', 'px', 'top-1 %', 'train', 'deploy', 'verified')
_WEIGHTS_LEGEND = (
    'top-1 %: on ImageNet-1k (in1k), CIFAR-10 or CIFAR-100, as the tag says. train, deploy: where the weights of '
    'either form are. Hub: on the Hub; URL: at an address on the web; bundled: in this package; fold: made at load '
    'from the training weights; .pth: in the official release only; none: nowhere. verified: yes if the accuracy was '
    'measured here; no if it is published, not verified here. weights/README.md has sources and licences.'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `repvgg-zoo list`."""
    parser.add_argument('--markdown', action='store_true', help='print the table of the README: variants only')


def main(args: argparse.Namespace) -> int:
    """Run `repvgg-zoo list`."""
    records = read_manifest()
    if args.markdown:
        print(variants_markdown(records))
        return 0
    print_table(_VARIANTS_HEADER[:-2], [row[:-2] for row in variant_rows(records)])
    print(_VARIANTS_LEGEND)
    print_table(_WEIGHTS_HEADER, list(weights_rows(records)))
    print(_WEIGHTS_LEGEND)
    return 0


def variants_markdown(records: Mapping[str, WeightsRecord]) -> str:
    """Write the table of the variants in Markdown, without the places of the weights, which change.

    Args:
        records: Those of all weights, as `read_manifest` gives them.

    Returns:
        The table, without a newline at the end.

    Example:
        >>> print(variants_markdown(read_manifest()).splitlines()[0])
        | variant | train M | deploy M | GMACs | px | top-1 % | data set | tags |
    """
    return markdown_table(variant_rows(records), _VARIANTS_HEADER, text_columns=('variant', 'data set', 'tags'))


def variant_rows(records: Mapping[str, WeightsRecord]) -> Iterator[tuple[str, ...]]:
    """Describe each variant by a row: name, sizes, published accuracy, data set, tags of the training form.

    Args:
        records: Those of all weights, as `read_manifest` gives them.

    Yields:
        Cells. A cell is empty if nobody has published the figure.

    Example:
        >>> next(variant_rows(read_manifest()))
        ('repvgg_a0', '9.11', '8.31', '1.361', '224', '72.41', 'ImageNet-1k', 'rvgg_in1k, mm_in1k')
    """
    for arch in VARIANTS:
        trained = [r for r in records.values() if r.arch == arch and r.form == 'training']
        first, deploy = trained[0], records[trained[0].name + DEPLOY_SUFFIX]
        yield (
            arch,
            f'{first.params / 1e6:.2f}',
            f'{deploy.params / 1e6:.2f}',
            f'{deploy.gmacs:.3f}',
            str(first.preprocessing.input_px),
            f'{first.published[0].top1_pct:.2f}' if first.published else '',
            first.dataset,
            ', '.join(record.tag for record in trained),
        )


def weights_rows(records: Mapping[str, WeightsRecord]) -> Iterator[tuple[str, ...]]:
    """Describe all weights, both forms in a row: name, image size, accuracy, where they are, whether it was measured.

    Args:
        records: Those of all weights, as `read_manifest` gives them.

    Yields:
        Cells. A cell is empty if there is no figure.

    Example:
        >>> next(weights_rows(read_manifest()))
        ('repvgg_a0.rvgg_in1k', '224', '72.41', 'Hub', 'fold', 'no')
    """
    for training in records.values():
        if training.form == 'training':
            figures = (*training.published, *training.measured)
            yield (
                training.name,
                str(training.preprocessing.input_px),
                f'{figures[0].top1_pct:.2f}' if figures else '',
                _place(training),
                _place(records[training.name + DEPLOY_SUFFIX], fold_of=training),
                'yes' if training.measured else 'no',
            )


def _place(record: WeightsRecord, *, fold_of: WeightsRecord | None = None) -> str:
    if record.file:
        return 'bundled'
    if record.hub_id:
        return 'Hub'
    if record.url:
        return 'URL'
    if fold_of is not None and fold_of.has_source:
        return 'fold'
    return '.pth' if record.upstream else 'none'
