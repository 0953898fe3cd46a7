"""Model cards: what they say, and that their code runs."""

import io
import re
import urllib.request

import pytest
import timm
import torch
from helpers import TIMM_NAMES, randomise
from huggingface_hub import RepoCard

from repvgg_zoo.pretrained.manifest import FoldCheck, read_manifest, weights_dir
from repvgg_zoo.tools.publish.card_usage import SAMPLE_IMAGE_URL
from repvgg_zoo.tools.publish.cards import model_card
from repvgg_zoo.tools.publish.facts import facts_of
from repvgg_zoo.tools.publish.folders import build_folders
from repvgg_zoo.tools.publish.publication import own_publication, recorded_publication
from repvgg_zoo.tools.publish.push import push_folders
from repvgg_zoo_cli import main

NAME = 'test_repvgg.cifar10'
CHECK = FoldCheck(float64_rel_diff=1e-15, float32_rel_diff=2e-7, images=8, top1_agreement_pct=None)


def card_of(publication, *, deploy=False, **create):
    model = timm.create_model(publication.variant, deploy=deploy, device='meta', **create).eval()
    card = model_card(publication, facts_of(model), CHECK, owner='zoo', sha256='0' * 64, size_bytes=1234)
    return RepoCard(str(card))


@pytest.fixture
def file(tmp_path):
    torch.save({}, tmp_path / 'weights.pth')
    return tmp_path / 'weights.pth'


@pytest.mark.parametrize('name', [name for name, record in read_manifest().items() if record.form == 'training'])
def test_model_card_of_trusted_source_says_what_manifest_knows(name, file):
    record = read_manifest()[name]
    publication = recorded_publication(name, file, trust_source=True)
    for deploy in (False, True):
        card = card_of(publication, deploy=deploy)
        assert (card.data.license, card.data.library_name) == (record.license, 'timm')
        assert card.data.pipeline_tag == 'image-classification'
        values = [
            (result.get('source', {}).get('url'), metric['value'])
            for model in card.data.get('model-index') or []
            for result in model['results']
            for metric in result['metrics']
        ]
        metrics = (*record.published, *record.measured)
        expected = [(m.source_url, v) for m in metrics for v in (m.top1_pct, m.top5_pct) if v is not None]
        assert sorted(values, key=str) == sorted(expected, key=str)
        plain = record.arch in TIMM_NAMES and not deploy
        assert ('Plain timm loads this model' in card.text) == plain
        assert ('import repvgg_zoo' in card.text.split('### Folding')[0]) != plain
        for text in (f'hf-hub:zoo/{name}{"_deploy" * deploy}', '1,234 bytes', '0' * 64, '1.0e-15', record.origin):
            assert text in card.text
        assert record.recipe is None or record.recipe in card.text


@pytest.mark.parametrize('name', ['repvgg_a0.rvgg_in1k', 'repvgg_b1g2.rvgg_in1k'])
def test_model_card_of_unknown_file_claims_nothing(name, file):
    """Any weights of the right shape could be in it."""
    record = read_manifest()[name]
    card = card_of(recorded_publication(name, file))
    assert card.data.get('model-index') is None
    assert card.data.get('license') is None
    assert card.data.get('datasets') is None
    text, comparison = card.text.split('## Model Comparison')
    for metrics in record.published:
        assert f'{metrics.top1_pct:g}' not in text
    assert name not in comparison
    assert record.origin not in card.text
    assert 'Nobody has told the accuracy' in card.text
    assert 'nothing vouches' in card.text


def test_recorded_publication_known_hash_vouches(own_weights, tmp_path):
    path = read_manifest()[NAME].path
    copy = tmp_path / 'copy.safetensors'
    copy.write_bytes(path.read_bytes())
    assert recorded_publication(NAME, copy).published + recorded_publication(NAME, copy).measured
    copy.write_bytes(path.read_bytes()[:-1] + b'\x7f')
    assert not recorded_publication(NAME, copy).vouched


def test_model_card_of_own_weights_says_what_the_user_told(file, tmp_path):
    labels = tmp_path / 'labels.txt'
    labels.write_text('daisy\tbellis perennis\nrose\ntulip\n')
    publication = own_publication(
        'repvgg_a0.flowers',
        file,
        variant='repvgg_a0',
        base='repvgg_a0.rvgg_in1k',
        dataset='me/flowers',
        top1_pct=93.25,
        labels=labels,
        license='cc-by-4.0',
    )
    card = card_of(publication, num_classes=3)
    assert (card.data.license, card.data.datasets) == ('cc-by-4.0', ['me/flowers'])
    assert card.data.base_model == read_manifest()['repvgg_a0.rvgg_in1k'].hub_id
    (model,) = card.data['model-index']
    assert [m['value'] for r in model['results'] for m in r['metrics']] == [93.25]
    assert 'daisy, rose, tulip' in card.text
    assert "['label_names'][index]" in card.text
    assert 'topk(3)' in card.text
    assert read_manifest()['repvgg_a0.rvgg_in1k'].origin not in card.text


@pytest.mark.parametrize(
    ('licence', 'fields'),
    [('Apache-2.0', ['license: apache-2.0']), ('Acme: v2', ['license: other', "license_name: 'Acme: v2'"]), (None, [])],
)
def test_model_card_licence_is_one_that_the_hub_takes(file, licence, fields):
    card = card_of(own_publication('repvgg_a0.mine', file, variant='repvgg_a0', license=licence))
    assert [line for line in str(card).split('---')[1].splitlines() if line.startswith('license')] == fields
    assert f'- **Licence:** {licence or "not told"}\n' in card.text


@pytest.mark.parametrize('create', [dict(block='acb'), dict(depths=(1, 1, 1, 1)), dict(strides=(1, 1, 2, 2, 2))])
def test_model_card_of_what_timm_does_not_know_says_so(file, create):
    card = card_of(own_publication('repvgg_a0.mine', file, variant='repvgg_a0'), **create)
    what = 'training-time block' if 'block' in create else 'architecture'
    assert f'Plain timm does not know this {what}' in card.text


def test_facts_of_both_forms_agree_with_timms_table():
    """Its benchmark has 9.11 M parameters and 3.59 M activations, and 1.52 GMACs with those of the BN."""
    training, deploy = (
        facts_of(timm.create_model('repvgg_a0', deploy=deploy, device='meta').eval()) for deploy in (False, True)
    )
    assert (training.params, round(training.gmacs, 2), round(training.activations / 1e6, 2)) == (9108968, 1.51, 3.59)
    # 3x3 only: half the feature maps, and the logits
    assert deploy.activations == (training.activations - 1000) // 2 + 1000
    assert deploy.gmacs == pytest.approx(read_manifest()['repvgg_a0.rvgg_in1k'].gmacs, abs=1e-6)
    assert training.feature_shapes[-1] == (1, 1280, 7, 7)


@pytest.fixture
def sample_image(monkeypatch):
    """Stands in for the picture that the snippets get from the web."""
    picture = next(weights_dir().glob('cifar10/validation/bird/*.jpg')).read_bytes()
    asked = []

    def urlopen(url):
        asked.append(url)
        return io.BytesIO(picture)

    monkeypatch.setattr(urllib.request, 'urlopen', urlopen)
    return asked


@pytest.mark.parametrize('form', ['training', 'deploy'])
def test_model_card_code_runs_as_written(hub, own_weights, tmp_path, form, sample_image, capsys):
    published = build_folders(recorded_publication(NAME), owner='zoo', out=tmp_path / 'out')
    push_folders(published)
    card = (published[form == 'deploy'].folder / 'README.md').read_text()
    snippets = re.findall(r'```(python|console)\n(.*?)```', card, re.DOTALL)
    assert [language for language, _ in snippets] == ['python'] * (3 + (form == 'training')) + ['console']
    for language, code in snippets:
        if language == 'console':
            assert main(code.split()[1:]) == 0
        else:
            namespace = {}
            exec(code, namespace)  # noqa: S102
            assert isinstance(namespace['model'], torch.nn.Module)
    said = capsys.readouterr().out
    assert re.search(r'^\d+\.\d % bird$', said, re.MULTILINE)
    shapes = re.findall(r'^#   (\[.*\])$', card, re.MULTILINE)
    assert re.findall(r'^(\[1, .*\])$', said, re.MULTILINE) == shapes
    assert 'relative difference from the reference outputs' in said
    assert set(sample_image) == {SAMPLE_IMAGE_URL}


def test_model_card_code_for_other_channels_runs(hub, tmp_path):
    model = randomise(timm.create_model('test_repvgg', num_classes=3, in_chans=4), px=32, in_chans=4)
    torch.save(model.state_dict(), tmp_path / 'c.pth')
    published = build_folders(own_publication('test_repvgg.four', tmp_path / 'c.pth'), owner='zoo', out=tmp_path)
    push_folders(published)
    for item in published:
        for code in re.findall(r'```python\n(.*?)```', (item.folder / 'README.md').read_text(), re.DOTALL):
            exec(code, {})  # noqa: S102


def test_model_card_of_both_forms_differ_in_form_only(file):
    publication = recorded_publication(NAME, file, trust_source=True)
    training, deploy = (card_of(publication, deploy=deploy) for deploy in (False, True))
    assert 'This is the training form' in training.text
    assert 'This is the deploy form' in deploy.text
    assert '### Folding' not in deploy.text
