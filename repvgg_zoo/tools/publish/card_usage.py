"""The code in model cards: each snippet runs as it is written."""

from __future__ import annotations

from .facts import ModelFacts

__all__ = ['SAMPLE_IMAGE_URL', 'usage']

SAMPLE_IMAGE_URL = (
    'https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/beignets-task-guide.png'
)
"""The picture of timm's own cards."""


def usage(facts: ModelFacts, repo_id: str, *, has_labels: bool) -> str:
    """Write the section on usage.

    Args:
        facts: Those of the model.
        repo_id: Its repository, `owner/name`.
        has_labels: Its `config.json` names the classes.

    Returns:
        Paragraphs and snippets, in Markdown.

    Example:
        >>> import timm
        >>> from repvgg_zoo.tools.publish.facts import facts_of
        >>> facts = facts_of(timm.create_model('test_repvgg', device='meta').eval())
        >>> usage(facts, 'me/test_repvgg.mine', has_labels=False).count('```python')
        4
    """
    parts = [
        _requirements(facts),
        '### Image Classification',
        _snippet(facts, _classify(facts, repo_id, has_labels)),
        '### Feature Map Extraction',
        _snippet(facts, _feature_maps(facts, repo_id)),
        '### Image Embeddings',
        _snippet(facts, _embeddings(facts, repo_id)),
    ]
    if facts.form == 'training':
        parts += ['### Folding', _snippet(facts, _fold(repo_id), needs_plugin=True)]
    parts += [
        '### Checking',
        f'`test/rand_tensors.safetensors` holds what the model computes from a random image, as in the repositories of '
        f'timm:\n\n```console\nrepvgg-zoo verify hf-hub:{repo_id}\n```',
    ]
    return '\n\n'.join(parts)


def _requirements(facts: ModelFacts) -> str:
    install = '`pip install repvgg-zoo` brings it.'
    if facts.in_plain_timm:
        return f'Plain timm loads this model. Folding and checking it needs the package `repvgg_zoo`: {install}'
    if facts.form == 'deploy':
        what = 'deploy form'
    else:
        what = 'training-time block' if facts.block != 'repvgg' else 'architecture'
    return f'Plain timm does not know this {what}. The package `repvgg_zoo` registers it with timm: {install}'


def _snippet(facts: ModelFacts, code: str, *, needs_plugin: bool = False) -> str:
    channels, height, width = facts.input_size
    rgb = channels == 3
    needs_plugin = needs_plugin or not facts.in_plain_timm
    imports = [
        *(['from urllib.request import urlopen', ''] if rgb else []),
        'import timm',
        'import torch',
        *(['from PIL import Image'] if rgb else []),
        *(['', 'import repvgg_zoo  # registers the model with timm'] if needs_plugin else []),
    ]
    image = (
        [
            f"image = Image.open(urlopen('{SAMPLE_IMAGE_URL}')).convert('RGB')",
            'transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))',
            'x = transform(image).unsqueeze(0)  # a batch of one',
        ]
        if rgb
        else [f'x = torch.randn(1, {channels}, {height}, {width})  # an image of {channels} channels']
    )
    create, _, run = code.partition('\n\n')
    return '\n'.join(['```python', *imports, '', create, *image, '', run, '```'])


def _create(repo_id: str, arguments: str = '') -> str:
    return f"model = timm.create_model('hf-hub:{repo_id}', pretrained=True{arguments}).eval()"


def _classify(facts: ModelFacts, repo_id: str, has_labels: bool) -> str:
    label = "model.pretrained_cfg['label_names'][index]" if has_labels else 'index'
    return f"""{_create(repo_id)}

with torch.inference_mode():
    probabilities = model(x).softmax(dim=1)
for probability, index in zip(*(t[0].tolist() for t in probabilities.topk({min(5, facts.num_classes)})), strict=True):
    print(f'{{100 * probability:.1f}} %', {label})"""


def _feature_maps(facts: ModelFacts, repo_id: str) -> str:
    shapes = '\n'.join(f'#   {list(shape)}' for shape in facts.feature_shapes)
    return f"""{_create(repo_id, ', features_only=True')}

with torch.inference_mode():
    feature_maps = model(x)
for feature_map in feature_maps:
    print(list(feature_map.shape))
{shapes}"""


def _embeddings(facts: ModelFacts, repo_id: str) -> str:
    *_, last = facts.feature_shapes
    return f"""{_create(repo_id, ', num_classes=0')}

with torch.inference_mode():
    embedding = model(x)  # [1, {facts.num_features}]
    # or, with any number of classes
    features = model.forward_features(x)  # {list(last)}
    embedding = model.forward_head(features, pre_logits=True)"""


def _fold(repo_id: str) -> str:
    return f"""{_create(repo_id)}

model.switch_to_deploy()  # the same outputs, faster; in place
with torch.inference_mode():
    logits = model(x)"""
