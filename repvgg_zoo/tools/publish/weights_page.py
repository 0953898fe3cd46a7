"""The page of all weights, `weights/README.md`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...pretrained.manifest import Metrics, WeightsRecord
from ..markdown import markdown_table

__all__ = ['top1_text', 'weights_page']

_INTRODUCTION = """\
# The weights

One line for each `arch.tag` that `timm.create_model(…, pretrained=True)` takes, from [manifest.json](manifest.json).
`repvgg-zoo publish` and `python -m repvgg_zoo.tools.tables` write both files. Published figures are those of the source
in brackets, on ImageNet-1k. Measured figures are the project's own, on CIFAR-10. The last but one column is the
difference between the logits of both forms when the weights were published, relative to the largest logit. A *fold* is
made at load from the training form. [test_repvgg.cifar10.md](test_repvgg.cifar10.md) tells how the bundled weights were
trained.
"""
_TEXT_COLUMNS = ('weights', 'form', 'where', 'sha256 begins', 'published top-1 %', 'measured top-1 %', 'licence')
_HEADER = (
    *('weights', 'form', 'where', 'parameters', 'bytes', 'sha256 begins', 'published top-1 %', 'measured top-1 %'),
    *('forms differ by (float64 / float32)', 'licence'),
)


def weights_page(records: Mapping[str, WeightsRecord]) -> str:
    """Write the page of all weights.

    Args:
        records: Those of all weights, by `arch.tag`.

    Returns:
        The page in Markdown.

    Example:
        >>> from repvgg_zoo.pretrained.manifest import read_manifest
        >>> print(weights_page(read_manifest()).splitlines()[0])
        # The weights
    """
    rows = [_row(record, records[record.training_name]) for record in records.values()]
    return f'{_INTRODUCTION}\n{markdown_table(rows, _HEADER, text_columns=_TEXT_COLUMNS)}\n'


def top1_text(metrics: Sequence[Metrics]) -> str:
    """Write top-1 figures with their sources.

    Args:
        metrics: Published or measured.

    Returns:
        One line.

    Example:
        >>> from repvgg_zoo.pretrained.manifest import read_manifest
        >>> top1_text(read_manifest()['repvgg_b1g2.rvgg_in1k'].published)
        '77.78 (arXiv 2101.03697, table 4)'
    """
    return ', '.join(f'{m.top1_pct:g} ({m.source})' for m in metrics)


def _row(record: WeightsRecord, training: WeightsRecord) -> tuple[str, ...]:
    check = record.fold_check
    return (
        record.name,
        record.form,
        _source_link(record, training),
        f'{record.params:,}',
        '' if record.size_bytes is None else f'{record.size_bytes:,}',
        '' if record.sha256 is None else f'`{record.sha256[:16]}`',
        top1_text(record.published),
        top1_text(record.measured),
        '' if check is None else f'{check.float64_rel_diff:.1e} / {check.float32_rel_diff:.1e}',
        record.license,
    )


def _source_link(record: WeightsRecord, training: WeightsRecord) -> str:
    hub = record.hub_id and f'[{record.hub_id}](https://huggingface.co/{record.hub_id})'
    revision = record.revision and f'at `{record.revision[:12]}`'
    bundled = record.file and f'[bundled]({record.file})'
    if links := ', '.join(filter(None, (bundled, hub, revision))):
        return links
    if training.has_source:
        return f'fold of {training.name}'
    return 'nowhere yet' + (f'; the official release has {record.upstream}' if record.upstream else '')
