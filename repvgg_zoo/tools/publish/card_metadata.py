"""The front matter of model cards: what the Hub reads, searches and shows in its tables."""

from __future__ import annotations

import re
from itertools import groupby
from typing import Any

from huggingface_hub import CardData, EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from ...pretrained.manifest import Metrics, read_manifest
from .licences import licence_fields
from .publication import Publication

__all__ = ['PAPER_ID', 'base_repository', 'card_metadata']

PAPER_ID = '2101.03697'
_TASK = 'image-classification'
_DATASET_IDS = {'ImageNet-1k': 'imagenet-1k', 'CIFAR-10': 'cifar10', 'CIFAR-100': 'cifar100'}
_DATASET_ID = re.compile(r'[\w.-]+(/[\w.-]+)?')


def card_metadata(publication: Publication, name: str) -> CardData:
    """Describe one form of published weights to the Hub.

    Args:
        publication: What is published.
        name: Name of the form.

    Returns:
        The front matter.

    Example:
        >>> from repvgg_zoo.tools.publish.publication import recorded_publication
        >>> card_metadata(recorded_publication('test_repvgg.cifar10'), 'test_repvgg.cifar10').pipeline_tag
        'image-classification'
    """
    datasets = {_dataset_id(m.dataset) for m in (*publication.published, *publication.measured)}
    if publication.dataset:
        datasets.add(_dataset_id(publication.dataset))
    fields: dict[str, Any] = {
        **licence_fields(publication.license),
        'library_name': 'timm',
        'pipeline_tag': _TASK,
        'tags': [_TASK, 'timm', 'repvgg', f'arxiv:{PAPER_ID}'],
        'datasets': sorted(dataset for dataset in datasets if _DATASET_ID.fullmatch(dataset)) or None,
        'base_model': base_repository(publication),
        'model-index': _model_index(publication, name),
    }
    return CardData(**fields)


def base_repository(publication: Publication) -> str | None:
    """Return the Hub repository of what the weights were fine-tuned from.

    Args:
        publication: What is published.

    Returns:
        `owner/name`, or None if nobody told or it is in none.

    Example:
        >>> from repvgg_zoo.tools.publish.publication import recorded_publication
        >>> base_repository(recorded_publication('test_repvgg.cifar10')) is None
        True
    """
    base = publication.base_model
    if base is None or '/' in base:
        return base
    records = [r for r in read_manifest().values() if base in (r.name, r.arch)]
    return next((r.hub_id for r in records if r.hub_id), None)


def _model_index(publication: Publication, name: str) -> list[dict[str, Any]] | None:
    """One result for the figures of each source."""
    results = []
    metrics = (*publication.published, *publication.measured)
    for _, group in groupby(metrics, key=lambda m: (m.source, m.dataset)):
        (entry,) = eval_results_to_model_index(name, [r for m in group for r in _eval_results(m)])
        results += entry['results']
    return [{'name': name, 'results': results}] if results else None


def _eval_results(metrics: Metrics) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=_TASK,
            task_name='Image classification',
            dataset_type=_dataset_id(metrics.dataset),
            dataset_name=metrics.dataset,
            metric_type='accuracy',
            metric_name=f'Top-{k} accuracy, %',
            metric_value=value,
            source_name=metrics.source if metrics.source_url else None,
            source_url=metrics.source_url,
        )
        for k, value in ((1, metrics.top1_pct), (5, metrics.top5_pct))
        if value is not None
    ]


def _dataset_id(dataset: str) -> str:
    return _DATASET_IDS.get(dataset, dataset)
