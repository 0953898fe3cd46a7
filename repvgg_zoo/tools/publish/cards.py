"""Model cards of Hub repositories, from the records of the manifest."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from huggingface_hub import CardData, EvalResult, RepoCard
from huggingface_hub.repocard_data import eval_results_to_model_index

from ...pretrained.manifest import Metrics, WeightsRecord
from ..markdown import markdown_table

__all__ = ['model_card']

_DATASET_IDS = {'ImageNet-1k': 'imagenet-1k', 'CIFAR-10': 'cifar10', 'CIFAR-100': 'cifar100'}
_PAPER_ID = '2101.03697'

_CITATION = """```bibtex
@inproceedings{ding2021repvgg,
  title     = {RepVGG: Making VGG-style ConvNets Great Again},
  author    = {Ding, Xiaohan and Zhang, Xiangyu and Ma, Ningning and Han, Jungong and Ding, Guiguang and Sun, Jian},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  pages     = {13733--13742},
  year      = {2021}
}
```"""


def model_card(record: WeightsRecord, *, owner: str, source: str, in_timm: bool) -> RepoCard:
    """Write the card of one published file of weights.

    Args:
        record: With the file's sha256 and size, and the comparison of both forms.
        owner: Hub account that both forms are published under.
        source: What the training form was converted from.
        in_timm: Whether timm itself has the architecture.

    Returns:
        The card: metadata and text.

    Raises:
        ValueError: The record has no comparison of the two forms.

    Example:
        >>> from dataclasses import replace
        >>> from repvgg_zoo.pretrained.manifest import FoldCheck, read_manifest
        >>> check = FoldCheck(float64_rel_diff=1e-15, float32_rel_diff=2e-7, images=8, top1_agreement_pct=None)
        >>> record = replace(read_manifest()['test_repvgg.cifar10'], fold_check=check)
        >>> model_card(record, owner='me', source='a file', in_timm=False).data.license
        'mit'
    """
    model_index: dict[str, Any] = {'model-index': _model_index(record)}  # not an identifier
    metadata = CardData(
        license=record.license,
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['timm', 'repvgg', 'image-classification', f'arxiv:{_PAPER_ID}'],
        datasets=sorted({_DATASET_IDS[m.dataset] for m in (*record.published, *record.measured)}) or None,
        **model_index,
    )
    # a ModelCard would put all figures of one data set under the first source
    return RepoCard(f'---\n{metadata.to_yaml()}\n---\n\n{_text(record, owner, source, in_timm)}\n')


def _model_index(record: WeightsRecord) -> list[dict[str, Any]] | None:
    """One result for the figures of each source."""
    results = []
    for _, metrics in groupby((*record.published, *record.measured), key=lambda m: m.source):
        (entry,) = eval_results_to_model_index(record.name, [r for m in metrics for r in _eval_results(m)])
        results += entry['results']
    return [{'name': record.name, 'results': results}] if results else None


def _eval_results(metrics: Metrics) -> list[EvalResult]:
    return [
        EvalResult(
            task_type='image-classification',
            task_name='Image classification',
            dataset_type=_DATASET_IDS[metrics.dataset],
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


def _text(record: WeightsRecord, owner: str, source: str, in_timm: bool) -> str:
    repo_id = f'{owner}/{record.name}'
    deploy = record.form == 'deploy'
    sections = {
        '': _introduction(record, owner),
        'Figures': _figures(record),
        'Use': _use(record, repo_id, needs_plugin=deploy or not in_timm),
        'Fine-tuning': _fine_tuning(record, owner),
        'Origin': _origin(record, source),
        'The two forms': _forms(record),
        'Citation': _CITATION,
    }
    return '\n\n'.join(f'## {title}\n\n{text}' if title else text for title, text in sections.items())


def _introduction(record: WeightsRecord, owner: str) -> str:
    other = (
        f'[{owner}/{record.training_name}](https://huggingface.co/{owner}/{record.training_name})'
        if record.form == 'deploy'
        else f'[{owner}/{record.name}_deploy](https://huggingface.co/{owner}/{record.name}_deploy)'
    )
    form = (
        'the deploy form: every block is one 3x3 convolution, folded from the three branches of the training form, '
        f'{other}'
        if record.form == 'deploy'
        else f'the training form: three branches in a block, each with its BN. Folded for inference, it is {other}'
    )
    return (
        f'# {record.name}\n\nA RepVGG image classifier in {form}. Architecture and training: '
        f'[RepVGG: Making VGG-style ConvNets Great Again](https://arxiv.org/abs/{_PAPER_ID}).'
    )


def _figures(record: WeightsRecord) -> str:
    p = record.preprocessing
    rows = [
        ('parameters', f'{record.params:,}'),
        ('multiply-adds of the deploy form', f'{record.gmacs:.3f} · 10⁹ at {p.input_px} px'),
        ('`model.safetensors`', f'{record.size_bytes:,} bytes, sha256 `{record.sha256}`'),
        (
            'preprocessing',
            f'{p.input_px} px, crop {p.crop_pct:g}, {p.interpolation}, mean {p.mean}, standard deviation {p.std}',
        ),
        ('classes', f'{p.num_classes:,}'),
        *((f'top-1, {m.dataset}, published', _accuracy(m)) for m in record.published),
        *((f'top-1, {m.dataset}, measured', _accuracy(m)) for m in record.measured),
    ]
    return markdown_table(rows, ('', ''), text_columns=('',))


def _accuracy(metrics: Metrics) -> str:
    top5 = '' if metrics.top5_pct is None else f' (top-5 {metrics.top5_pct:g} %)'
    source = f'[{metrics.source}]({metrics.source_url})' if metrics.source_url else metrics.source
    return f'{metrics.top1_pct:g} %{top5}, {source}'


def _use(record: WeightsRecord, repo_id: str, *, needs_plugin: bool) -> str:
    create = f"timm.create_model('hf-hub:{repo_id}', pretrained=True).eval()"
    switch = '' if record.form == 'deploy' else '\nmodel.switch_to_deploy()  # the same outputs, faster'
    plugin = f"""```python
import timm
import repvgg_zoo  # registers the zoo's models with timm

model = {create}{switch}
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```"""
    plain = (
        f'Plain timm, without `repvgg_zoo`, does not know this {"form" if record.form == "deploy" else "variant"}.'
        if needs_plugin
        else f"""Plain timm loads it too, without `repvgg_zoo`:

```python
import timm

model = {create}
```"""
    )
    hub = f"""With torch.hub, from the folder of a checkout of the zoo, the weights that its manifest names:

```python
import torch

model = torch.hub.load('repvgg_zoo', {record.arch!r}, source='local', pretrained=True, pretrained_cfg={record.tag!r})
```"""
    return '\n\n'.join((plugin, plain, hub))


def _fine_tuning(record: WeightsRecord, owner: str) -> str:
    if record.form == 'deploy':
        return f'Fine-tune the training form, {owner}/{record.training_name}, and fold the result.'
    return (
        "In timm's own `train.py`, with the zoo registered:\n\n```console\n"
        f'repvgg-zoo run train.py --data-dir DATA --model hf-hub:{owner}/{record.name} \\\n'
        '    --pretrained --num-classes 10\n```'
    )


def _origin(record: WeightsRecord, source: str) -> str:
    training = f'\n\nTraining: {record.recipe}.' if record.recipe else ''
    return f'Weights: {record.origin}, licence {record.license.upper()}. Converted from {source}.{training}'


def _forms(record: WeightsRecord) -> str:
    check = record.fold_check
    if check is None:
        raise ValueError(f'{record.name} has no fold_check; compare both forms before writing the card')
    agreement = (
        f'{check.images} random images'
        if check.top1_agreement_pct is None
        else f'{check.images} real images, {check.top1_agreement_pct:g} % of them with the same top class'
    )
    return (
        'Largest difference between the logits of the two forms, relative to the largest logit, when the weights were '
        f'published: {check.float64_rel_diff:.1e} computed in float64, {check.float32_rel_diff:.1e} in float32 on '
        f'{agreement}. Compare in `eval()` mode: in train mode the training form normalises by the batch.'
    )
