"""The page of all weights, `weights/README.md`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...pretrained.manifest import DEPLOY_SUFFIX, Metrics, WeightsRecord
from ..markdown import markdown_table

__all__ = ['top1_text', 'weights_page']

_INTRODUCTION = """\
# The weights

All that `timm.create_model(…, pretrained=True)` takes, from [manifest.json](manifest.json), which has the recipes too.
`repvgg-zoo publish` and `python -m repvgg_zoo.tools.tables` write both files. The deploy form of `NAME` is
`NAME_deploy`. A *fold* is made at load from the training form. Each figure leads to its source.

*no* under *verified here* means: published, not verified here. Nobody of this project has downloaded the file, compared
its two forms or measured its accuracy. Its loading is tested with a file of the same name, layout and shapes. What a
download holds is compared with the sha256 that the Hub gives, or with the first digits of it in the name of the file.
The published figures of `chenyaofo` are of the best epoch, on test images that the code of that day cropped and flipped
at random.
"""
_FILES = """\
## Files that are known

Their sha256 is checked whenever they are loaded. *differ* is the largest difference of the logits of both forms when
they were published, relative to the largest logit, computed in float64 and in float32.
[test_repvgg.cifar10.md](test_repvgg.cifar10.md) tells how the bundled weights were trained.
"""


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
    trained = [record for record in records.values() if record.form == 'training']
    sections = [_INTRODUCTION]
    header = ('weights', 'training form', 'deploy form', 'published top-1 %', 'verified here', 'licence')
    for dataset in dict.fromkeys(record.dataset for record in trained):
        rows = [_row(r, records[r.name + DEPLOY_SUFFIX]) for r in trained if r.dataset == dataset]
        sections.append(f'## {dataset}\n\n{markdown_table(rows, header, text_columns=header)}\n')
    files = [_file_row(record) for record in records.values() if record.sha256]
    columns = ('weights', 'bytes', 'sha256 begins', 'differ (float64 / float32)', 'measured top-1 %')
    text_columns = set(columns) - {'bytes'}
    sections.append(f'{_FILES}\n{markdown_table(files, columns, text_columns=text_columns)}\n')
    return '\n'.join(sections)


def top1_text(metrics: Sequence[Metrics]) -> str:
    """Write top-1 figures with their sources.

    Args:
        metrics: Published or measured.

    Returns:
        One line.

    Example:
        >>> from repvgg_zoo.pretrained.manifest import read_manifest
        >>> top1_text(read_manifest()['repvgg_b2.rvgg_in1k'].published[:1])
        '78.78 (arXiv 2101.03697, table 4)'
    """
    return ', '.join(f'{m.top1_pct:g} ({m.source})' for m in metrics)


def _row(training: WeightsRecord, deploy: WeightsRecord) -> tuple[str, ...]:
    return (
        training.name,
        _place(training) or (f'`{training.upstream}` of the official release' if training.upstream else 'nowhere yet'),
        _place(deploy) or ('fold' if training.has_source or training.upstream else 'nowhere yet'),
        ', '.join(f'[{m.top1_pct:g}]({m.source_url})' for m in training.published),
        'accuracy, both forms' if training.measured else 'forms' if training.fold_check else 'no',
        training.license,
    )


def _place(record: WeightsRecord) -> str:
    links = (
        record.file and f'[bundled]({record.file})',
        record.hub_id and f'[{record.hub_id.split("/")[0]}](https://huggingface.co/{record.hub_id}) on the Hub',
        record.revision and f'at `{record.revision[:12]}`',
        record.url and f'[URL]({record.url})',
    )
    return ', '.join(filter(None, links))


def _file_row(record: WeightsRecord) -> tuple[str, ...]:
    check = record.fold_check
    return (
        record.name,
        f'{record.size_bytes:,}',
        f'`{record.sha256 and record.sha256[:16]}`',
        '' if check is None else f'{check.float64_rel_diff:.1e} / {check.float32_rel_diff:.1e}',
        top1_text(record.measured),
    )
