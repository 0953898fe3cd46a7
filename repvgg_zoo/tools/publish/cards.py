"""Model cards of Hub repositories, with the sections of timm's own."""

from __future__ import annotations

import re

from huggingface_hub import RepoCard

from ...pretrained.manifest import DEPLOY_SUFFIX, FoldCheck, Metrics, WeightsRecord, read_manifest
from ..markdown import markdown_table
from .card_metadata import PAPER_ID, base_repository, card_metadata
from .card_usage import usage
from .facts import ModelFacts
from .publication import Publication

__all__ = ['CARD', 'is_same_card', 'model_card']

CARD = 'README.md'
"""Name of the model card in a model folder."""

_CITATION = """```bibtex
@inproceedings{ding2021repvgg,
  title     = {RepVGG: Making VGG-style ConvNets Great Again},
  author    = {Ding, Xiaohan and Zhang, Xiangyu and Ma, Ningning and Han, Jungong and Ding, Guiguang and Sun, Jian},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  pages     = {13733--13742},
  year      = {2021}
}
```"""

_VARYING = re.compile(
    r'their logits differed by .*? images(, [\d.]+ % of them with the same top class)?'
    r'|(?<=Converted from ).*?(?=, sha256)'
    r'|(?<=^## Model Comparison\n).*?(?=^## )',
    re.MULTILINE | re.DOTALL,
)


def model_card(
    publication: Publication, facts: ModelFacts, check: FoldCheck, *, owner: str, sha256: str, size_bytes: int
) -> RepoCard:
    """Write the card of one form of published weights.

    Args:
        publication: What is published.
        facts: Those of the model in this form.
        check: The comparison of both forms.
        owner: Hub account that both forms are published under.
        sha256: That of the weights file of this form.
        size_bytes: Its size.

    Returns:
        The card: metadata and text.

    Example:
        >>> import timm
        >>> from repvgg_zoo.tools.publish.facts import facts_of
        >>> from repvgg_zoo.tools.publish.publication import recorded_publication
        >>> facts = facts_of(timm.create_model('test_repvgg', device='meta').eval())
        >>> check = FoldCheck(float64_rel_diff=1e-15, float32_rel_diff=2e-7, images=8, top1_agreement_pct=None)
        >>> bundled = recorded_publication('test_repvgg.cifar10')
        >>> model_card(bundled, facts, check, owner='me', sha256='0' * 64, size_bytes=9).data.license
        'mit'
    """
    name = publication.names[facts.form == 'deploy']
    sections = {
        f'# Model card for {name}': _introduction(publication, facts, owner),
        '## Model Details': _details(publication, facts, sha256, size_bytes),
        '## Accuracy': _accuracy(publication),
        '## Model Usage': usage(facts, f'{owner}/{name}', has_labels=bool(publication.label_names)),
        '## The Two Forms': _forms(facts, check, f'{owner}/{publication.name}'),
        '## Model Comparison': _comparison(publication),
        '## Citation': _CITATION,
    }
    text = '\n\n'.join(f'{heading}\n\n{section}' for heading, section in sections.items())
    # a ModelCard would put all figures of one data set under the first source
    return RepoCard(f'---\n{card_metadata(publication, name).to_yaml()}\n---\n\n{text}\n')


def is_same_card(a: str, b: str) -> bool:
    """Compare what two cards say of the weights.

    The comparison of both forms varies with the machine and the images. The source has the same sha256 under any name:
    the manifest names the Hub once the weights are there. The table of other models tells nothing of these, and changes
    whenever others are published.

    Args:
        a: A card, with its metadata.
        b: Another one.

    Returns:
        True if they are the same except for these parts.

    Example:
        >>> is_same_card('their logits differed by 1e-7 on 8 images', 'their logits differed by 2e-7 on 9 images')
        True
    """
    return _VARYING.sub('', a) == _VARYING.sub('', b)


def _introduction(publication: Publication, facts: ModelFacts, owner: str) -> str:
    base = f', fine-tuned from {_linked_base(publication)}' if publication.base_model else ''
    on = f', trained on {publication.dataset}' if publication.dataset else ''
    training, deploy = (f'[{owner}/{name}](https://huggingface.co/{owner}/{name})' for name in publication.names)
    form = (
        f'This is the deploy form: every block is one 3x3 convolution, folded from the branches of the training form, '
        f'{training}.'
        if facts.form == 'deploy'
        else f'This is the training form: each block is a sum of branches. Folded for inference it is {deploy}.'
    )
    return f'A RepVGG image classifier{on}{base}. {form}'


def _linked_base(publication: Publication) -> str:
    repository = base_repository(publication)
    title = str(publication.base_model)
    return f'[{title}](https://huggingface.co/{repository})' if repository else title


def _details(publication: Publication, facts: ModelFacts, sha256: str, size_bytes: int) -> str:
    config = facts.preprocessing
    _, height, width = facts.input_size
    weights = publication.origin or 'of the publisher; nothing vouches for their origin'
    rows = {
        'Model Type': 'Image classification / feature backbone',
        'Architecture': facts.variant + (f', block `{facts.block}`' if facts.form == 'training' else ', deploy form'),
        'Model Stats': [
            f'Params (M): {facts.params / 1e6:.3g}',
            f'GMACs: {facts.gmacs:.3g}',
            f'Activations (M): {facts.activations / 1e6:.3g}',
            f'Image size: {height} x {width}',
        ],
        'Preprocessing': f'crop {config["crop_pct"]:g}, {config["interpolation"]}, mean {_numbers(config["mean"])}, '
        f'standard deviation {_numbers(config["std"])}',
        'Classes': f'{facts.num_classes:,}' + (f': {_labels(publication)}' if publication.label_names else ''),
        'Dataset': publication.dataset,
        'Training': publication.recipe,
        'Weights': f'{weights}. Converted from {publication.source.title}, sha256 `{publication.source.sha256}`',
        'Licence': publication.license or 'not told',
        'Paper': f'RepVGG: Making VGG-style ConvNets Great Again, https://arxiv.org/abs/{PAPER_ID}',
        'File': f'`model.safetensors`, {size_bytes:,} bytes, sha256 `{sha256}`',
    }
    lines = []
    for title, value in rows.items():
        if isinstance(value, list):
            lines += [f'- **{title}:**', *(f'  - {item}' for item in value)]
        elif value:
            lines.append(f'- **{title}:** {value}')
    return '\n'.join(lines)


def _numbers(values: tuple[float, ...]) -> str:
    return ', '.join(f'{value:g}' for value in values)


def _labels(publication: Publication) -> str:
    """The first ten names of classes; `config.json` has all."""
    names = publication.label_names
    return ', '.join(names[:10]) + (', …' if len(names) > 10 else '')


def _accuracy(publication: Publication) -> str:
    rows = [
        (metrics.dataset, kind, f'{metrics.top1_pct:g}', _optional(metrics.top5_pct), _source(metrics))
        for kind, group in (('published', publication.published), ('measured', publication.measured))
        for metrics in group
    ]
    if not rows:
        return 'Nobody has told the accuracy of these weights.'
    return markdown_table(
        rows, ('data set', 'figure', 'top-1 %', 'top-5 %', 'source'), text_columns=('data set', 'figure', 'source')
    )


def _source(metrics: Metrics) -> str:
    return f'[{metrics.source}]({metrics.source_url})' if metrics.source_url else metrics.source


def _optional(figure: float | None) -> str:
    return '' if figure is None else f'{figure:g}'


def _forms(facts: ModelFacts, check: FoldCheck, training_id: str) -> str:
    agreement = (
        f'{check.images} random images'
        if check.top1_agreement_pct is None
        else f'{check.images} real images, {check.top1_agreement_pct:g} % of them with the same top class'
    )
    place = '' if check.device == 'cpu' else f', computed on {check.device}'
    tuning = (
        f'Fine-tune the training form, `hf-hub:{training_id}`, and fold the result with `switch_to_deploy()`.'
        if facts.form == 'deploy'
        else "Fine-tune this form, with timm's `train.py` or any other trainer, then fold it."
    )
    return (
        'Both forms compute the same function in `eval()` mode. When they were published, their logits differed by '
        f'{check.float64_rel_diff:.1e} of the largest logit in float64, and by {check.float32_rel_diff:.1e} in float32 '
        f'on {agreement}{place}. In `train()` mode the training form normalises by the batch. {tuning}'
    )


def _comparison(publication: Publication) -> str:
    """The zoo's models on the same data set, the best first; on ImageNet-1k if there are none to compare with."""
    models = _models_on(publication.dataset)
    dataset = publication.dataset if len(models) > 1 else 'ImageNet-1k'
    rows = [
        (
            f'**{record.name}**' if record.name == publication.name else _linked(record),
            f'{top1_pct:g}',
            f'{read_manifest()[record.name + DEPLOY_SUFFIX].params / 1e6:.3g}',
            f'{record.gmacs:.3g}',
            str(record.preprocessing.input_px),
        )
        for top1_pct, record in _models_on(dataset)
        # unknown weights would get the figures of their name
        if publication.vouched or record.name != publication.name
    ]
    table = markdown_table(rows, ('model', 'top-1 %', 'params (M)', 'GMACs', 'px'), text_columns=('model',))
    return f'The models of the zoo on {dataset}, with sizes of the deploy form:\n\n{table}'


def _models_on(dataset: str | None) -> list[tuple[float, WeightsRecord]]:
    """Training-form records with their first top-1 figure on a data set, the best first."""
    found = []
    for record in read_manifest().values():
        figures = [m.top1_pct for m in (*record.published, *record.measured) if m.dataset == dataset]
        if record.form == 'training' and figures:
            found.append((figures[0], record))
    return sorted(found, key=lambda pair: -pair[0])


def _linked(record: WeightsRecord) -> str:
    return f'[{record.name}](https://huggingface.co/{record.hub_id})' if record.hub_id else record.name
