"""Tables of the variants and of the weights, for the command line and for the pages."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence

from ..pretrained.manifest import DEPLOY_SUFFIX, Metrics, WeightsRecord, read_manifest
from ..variants import VARIANTS

__all__ = ['HEADER', 'LEGEND', 'markdown_table', 'reproduction_lines', 'variant_rows', 'weights_page']

HEADER = ('variant', 'train M', 'deploy M', 'GMACs', 'px', 'top-1 %', 'train', 'deploy')
LEGEND = (
    'train M, deploy M: parameters of either form, in millions. GMACs: multiply-adds of the deploy form at px pixels. '
    'top-1 %: as published, on ImageNet-1k. train, deploy: where the weights of either form are: on the Hub, bundled '
    '(CIFAR-10), a fold that loading makes of the training weights, or in the official release of .pth files only.'
)

_WEIGHTS_HEADER = (
    'weights',
    'form',
    'where',
    'parameters',
    'bytes',
    'sha256 begins',
    'published top-1 %',
    'measured top-1 %',
    'forms differ by (float64 / float32)',
    'licence',
)
_TEXT_COLUMNS = (
    {'', 'variant', 'train', 'deploy', 'weights', 'form', 'where', 'sha256 begins', 'licence'}
    | {
        'published top-1 %',
        'measured top-1 %',
    }
    | {'model', 'work', 'runtime', 'dtype', 'layout', 'rival'}
)
_PAGE_INTRODUCTION = """\
# The weights

One line for each `arch.tag` that `timm.create_model(…, pretrained=True)` takes, from [manifest.json](manifest.json),
which `repvgg-zoo publish` keeps up to date together with this page. Published figures are of whom the brackets name,
on ImageNet-1k; measured ones are the project's own, on CIFAR-10. The forms' difference is that of the logits, relative
to the largest, when the weights were published. A *fold* is made at load from the training form. How the bundled
weights were trained: [test_repvgg.cifar10.md](test_repvgg.cifar10.md).
"""


def variant_rows() -> Iterator[tuple[str, ...]]:
    """A row under `HEADER` for each variant; a cell is empty where nobody published a figure."""
    manifest = read_manifest()
    for arch in VARIANTS:
        training = next(r for r in manifest.values() if r.arch == arch and r.form == 'training')
        deploy = manifest[training.name + DEPLOY_SUFFIX]
        yield (
            arch,
            f'{training.params / 1e6:.2f}',
            f'{deploy.params / 1e6:.2f}',
            f'{deploy.gmacs:.3f}',
            str(training.preprocessing.input_px),
            f'{training.published[0].top1_pct:.2f}' if training.published else '',
            _whereabouts(training),
            _whereabouts(deploy),
        )


def _whereabouts(record: WeightsRecord) -> str:
    if record.file:
        return 'bundled'
    if record.hub_id:
        return 'Hub'
    return '.pth' if record.upstream else 'fold'


def markdown_table(rows: Iterable[Sequence[str]], header: Sequence[str] = HEADER) -> str:
    """Rows under a header as a Markdown table, figures to the right."""
    lines = [header, ['---' if title in _TEXT_COLUMNS else '---:' for title in header], *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def weights_page(records: Iterable[WeightsRecord]) -> str:
    """The page of all weights, `weights/README.md`."""
    return f'{_PAGE_INTRODUCTION}\n{markdown_table(map(_weights_row, records), _WEIGHTS_HEADER)}\n'


def reproduction_lines(*, imagenet: str, cifar10: str) -> Iterator[str]:
    """Shell lines that evaluate the weights of every variant by timm's `validate.py`, and the accuracy to expect.

    The arguments are the folders of the data sets. `validate.py` is in timm's repository, not in its wheel.
    """
    data = {'ImageNet-1k': shlex.quote(imagenet), 'CIFAR-10': f'{shlex.quote(cifar10)} --split test'}
    for record in read_manifest().values():
        if record.form != 'training':
            continue
        metrics = (*record.published, *record.measured)
        yield f'# {record.name}: top-1 % {_metrics(metrics) or "nobody has published it"}'
        if not (record.hub_id or record.file):
            yield f'# needs {record.upstream} of the official release; the command tells how to use it'
        data_dir = data[metrics[0].dataset if metrics else 'ImageNet-1k']
        yield f'repvgg-zoo run validate.py --data-dir {data_dir} --model {record.name} --pretrained'


def _weights_row(record: WeightsRecord) -> tuple[str, ...]:
    check = record.fold_check
    return (
        record.name,
        record.form,
        _place(record),
        f'{record.params:,}',
        '' if record.size_bytes is None else f'{record.size_bytes:,}',
        '' if record.sha256 is None else f'`{record.sha256[:16]}`',
        _metrics(record.published),
        _metrics(record.measured),
        '' if check is None else f'{check.float64_rel_diff:.1e} / {check.float32_rel_diff:.1e}',
        record.license,
    )


def _place(record: WeightsRecord) -> str:
    hub = record.hub_id and f'[{record.hub_id}](https://huggingface.co/{record.hub_id})'
    revision = record.revision and f'at `{record.revision[:12]}`'
    bundled = record.file and f'[bundled]({record.file})'
    if places := ', '.join(filter(None, (bundled, hub, revision))):
        return places
    if record.available is not record and record.available.hub_id:
        return f'fold of {record.training_name}'
    return f'nowhere yet; the official release has {record.upstream}'


def _metrics(metrics: Sequence[Metrics]) -> str:
    return ', '.join(f'{m.top1_pct:g} ({m.source})' for m in metrics)
