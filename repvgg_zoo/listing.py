"""The table of variants, for the command line and the README."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .complexity import count_gmacs, count_params
from .manifest import DEPLOY_SUFFIX, WeightsRecord, read_manifest
from .variants import VARIANTS, Variant

__all__ = ['HEADER', 'LEGEND', 'VariantRow', 'markdown_table', 'variant_rows']

HEADER = ('variant', 'train M', 'deploy M', 'GMACs', 'px', 'top-1 %', 'train', 'deploy')
LEGEND = (
    'train M, deploy M: parameters of either form, in millions. GMACs: multiply-adds of the deploy form at px pixels. '
    'top-1 %: as published, on ImageNet-1k. train, deploy: where the weights of either form are: on the Hub as '
    'timm/VARIANT.rvgg_in1k, bundled (CIFAR-10), a fold that loading makes of the training weights, or in the '
    'official release of .pth files only.'
)


@dataclass(frozen=True, kw_only=True)
class VariantRow:
    """What there is to say about a variant."""

    variant: Variant
    params_train: int
    params_deploy: int
    gmacs: float
    """Of the deploy form, at the size that the weights expect."""
    training: WeightsRecord
    deploy: WeightsRecord

    def cells(self) -> tuple[str, ...]:
        """One text for each column of `HEADER`; empty where nobody published a figure."""
        published = self.training.published
        return (
            self.variant.name,
            f'{self.params_train / 1e6:.2f}',
            f'{self.params_deploy / 1e6:.2f}',
            f'{self.gmacs:.3f}',
            str(self.training.preprocessing.input_px),
            f'{published[0].top1_pct:.2f}' if published else '',
            _whereabouts(self.training),
            _whereabouts(self.deploy),
        )


def variant_rows() -> Iterator[VariantRow]:
    """A row for each variant, with its first training weights and their fold."""
    manifest = read_manifest()
    for variant in VARIANTS.values():
        training = next(r for r in manifest.values() if r.arch == variant.name and r.form == 'training')
        classes = training.preprocessing.num_classes
        yield VariantRow(
            variant=variant,
            params_train=count_params(variant, deploy=False, num_classes=classes),
            params_deploy=count_params(variant, deploy=True, num_classes=classes),
            gmacs=count_gmacs(variant, input_px=training.preprocessing.input_px, num_classes=classes),
            training=training,
            deploy=manifest[training.name + DEPLOY_SUFFIX],
        )


def _whereabouts(record: WeightsRecord) -> str:
    if record.file:
        return 'bundled'
    if record.hub_id:
        return 'Hub'
    return '.pth' if record.upstream else 'fold'


def markdown_table(rows: Iterable[Sequence[str]]) -> str:
    """Rows under `HEADER` as a Markdown table."""
    lines = [HEADER, ['---', *['---:'] * 5, '---', '---'], *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)
