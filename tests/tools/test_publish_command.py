"""What `repvgg-zoo publish` understands: weights of the user's own, and the folder of the official release."""

import json
import re

import pytest
import timm
import torch
from helpers import images, randomise, rel_diff
from timm.data import create_transform
from timm.models import save_for_hf
from torchvision.transforms import InterpolationMode

from repvgg_zoo.pretrained.manifest import read_manifest, weights_dir
from repvgg_zoo.tools.convert import convert
from repvgg_zoo.tools.publish import publish as command
from repvgg_zoo.tools.publish.preprocessing import INTERPOLATIONS
from repvgg_zoo.tools.publish.publication import own_publication, read_labels
from repvgg_zoo_cli import main

OWN = ('--owner', 'me', '--out', 'out')
UPSTREAM = [r for r in read_manifest().values() if r.form == 'training' and r.upstream]
WITHOUT_SOURCE = [r for r in UPSTREAM if not r.has_source]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ('create', 'arguments'),
    [
        (dict(block='acb'), ['--model', 'test_repvgg']),
        (
            dict(depths=(1, 1, 1, 1), strides=(1, 1, 2, 2, 2)),
            ['--model', 'test_repvgg', '--model-kwargs', 'depths=(1, 1, 1, 1)', 'strides=(1, 1, 2, 2, 2)'],
        ),
    ],
    ids=['block', 'numbers'],
)
def test_publish_own_architecture_loads_from_both_folders(here, create, arguments):
    model = randomise(timm.create_model('test_repvgg', num_classes=5, **create), px=32)
    torch.save(model.state_dict(), 'c.pth')
    assert main(['publish', '--from', 'c.pth', '--name', 'test_repvgg.mine', *arguments, *OWN]) == 0
    x = images(2, px=32)
    for suffix in ('', '_deploy'):
        folder = here / 'out' / f'test_repvgg.mine{suffix}'
        loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
        assert rel_diff(loaded(x), model(x)) < 1e-5
        assert 'Plain timm does not know this' in (folder / 'README.md').read_text()


def test_publish_own_folder_keeps_its_configuration(here):
    """A model folder describes its weights itself: the block, the labels and the preprocessing."""
    model = randomise(timm.create_model('test_repvgg', num_classes=2, block='dbb'), px=32)
    torch.save(model.state_dict(), 'c.pth')
    (here / 'labels.txt').write_text('no\nyes\tof course')
    first = ['publish', '--from', 'c.pth', '--model', 'test_repvgg', '--block', 'dbb', '--name', 'test_repvgg.a', *OWN]
    assert main([*first, '--label-names', 'labels.txt', '--crop-pct', '0.8', '--mean', '0.1', '0.2', '0.3']) == 0
    assert main(['publish', '--from', 'out/test_repvgg.a', '--name', 'test_repvgg.b', *OWN]) == 0
    for name in ('test_repvgg.a', 'test_repvgg.b', 'test_repvgg.b_deploy'):
        config = json.loads((here / 'out' / name / 'config.json').read_text())
        assert config['label_names'] == ['no', 'yes']
        assert config['label_descriptions'] == {'yes': 'of course'}
        assert config['pretrained_cfg']['crop_pct'] == 0.8
        assert config['pretrained_cfg']['mean'] == [0.1, 0.2, 0.3]
        assert 'license' not in config['pretrained_cfg']
    assert json.loads((here / 'out' / 'test_repvgg.b' / 'config.json').read_text())['model_args']['block'] == 'dbb'


@pytest.mark.parametrize('by', ['save_for_hf', 'convert'])
def test_publish_folder_gives_labels_and_licence_to_card(here, by):
    model = timm.create_model('test_repvgg', num_classes=2)
    model.pretrained_cfg['license'] = 'cc-by-4.0'
    told = dict(label_names=['no', 'yes'], label_descriptions={'yes': 'of course'})
    save_for_hf(model, 'folder', model_config=dict(told))
    if by == 'convert':
        convert('folder', 'converted')
    command = ['publish', '--from', 'folder' if by == 'save_for_hf' else 'converted', *OWN]
    assert main([*command, '--name', 'test_repvgg.a']) == 0
    for name in ('test_repvgg.a', 'test_repvgg.a_deploy'):
        card = (here / 'out' / name / 'README.md').read_text()
        assert 'license: cc-by-4.0\n' in card
        assert '**Classes:** 2: no, yes\n' in card
        assert "['label_names'][index]" in card
        config = json.loads((here / 'out' / name / 'config.json').read_text())
        assert config['pretrained_cfg']['license'] == 'cc-by-4.0'
        assert {key: config[key] for key in told} == told
    (here / 'labels.txt').write_text('nein\nja')
    assert main([*command, '--name', 'test_repvgg.b', '--label-names', 'labels.txt', '--license', 'mit']) == 0
    card = (here / 'out' / 'test_repvgg.b' / 'README.md').read_text()
    assert 'license: mit\n' in card
    assert '**Classes:** 2: nein, ja\n' in card
    config = json.loads((here / 'out' / 'test_repvgg.b' / 'config.json').read_text())
    assert (config['label_names'], config['pretrained_cfg']['license']) == (['nein', 'ja'], 'mit')
    assert 'label_descriptions' not in config


def test_publish_recorded_weights_from_larger_network(here, own_weights):
    state_dict = timm.create_model('test_repvgg.cifar10', pretrained=True).state_dict()
    plain, average = ({f'model.{key}': factor * v for key, v in state_dict.items()} for factor in (1, 2))
    torch.save({'state_dict': plain, 'state_dict_ema': average}, 'c.ckpt')
    command = ['publish', 'test_repvgg.cifar10', '--from', 'c.ckpt', '--no-ema', '--prefix', 'model.', *OWN]
    assert main(command) == 0  # which compares it with the bundled file


def card_on(hub, name):
    (_, files) = hub.repositories[name].commits[-1]
    return (hub.blobs / files['README.md']).read_text()


@pytest.fixture
def pushed(here, hub, capsys):
    """Weights of the user's own on the Hub, and the command that published them."""
    torch.save(timm.create_model('test_repvgg', num_classes=5).state_dict(), 'c.pth')
    command = ['publish', '--from', 'c.pth', '--name', 'test_repvgg.mine', '--dataset', 'd', *OWN, '--push']
    assert main([*command, '--top1', '90']) == 0
    assert 'published as me/test_repvgg.mine\n' in capsys.readouterr().out
    return command


def check_refused(command, error, hub, capsys):
    """It fails with that error, and neither claims nor uploads anything."""
    commits = hub.count('POST', '/commit/')
    assert main(command) == 1
    said = capsys.readouterr()
    assert 'published' not in said.out
    assert re.search(error, said.err)
    assert hub.count('POST', '/commit/') == commits


def test_publish_again_other_figures_need_replace(here, hub, pushed, capsys):
    error = r"test_repvgg\.mine' holds another README\.md, or none; .*--replace"
    check_refused([*pushed, '--top1', '91'], error, hub, capsys)
    assert main([*pushed, '--top1', '91', '--replace']) == 0
    assert 'published as me/test_repvgg.mine\n' in capsys.readouterr().out
    for suffix in ('', '_deploy'):
        assert '| d | measured | 91 |' in card_on(hub, f'me/test_repvgg.mine{suffix}')


def test_publish_again_says_that_nothing_is_new(here, hub, pushed, capsys):
    commits = hub.count('POST', '/commit/')
    assert main([*pushed, '--top1', '90']) == 0
    # the forms are compared on other images
    assert main([*pushed, '--top1', '90', '--out', 'new', '--verify-images', str(weights_dir() / 'cifar10')]) == 0
    said = capsys.readouterr().out
    assert said.count('nothing to upload, it is on the Hub already as me/test_repvgg.mine') == 4
    assert 'published' not in said
    assert 'real images' in (here / 'new' / 'test_repvgg.mine' / 'README.md').read_text()
    assert hub.count('POST', '/commit/') == commits


def test_publish_edited_card_needs_replace_and_is_uploaded(here, hub, pushed, capsys):
    card = here / 'out' / 'test_repvgg.mine' / 'README.md'
    edited = card.read_text().replace('with sizes of the deploy form', 'and mine')  # which varies in cards of ours
    card.write_text(edited)
    check_refused([*pushed, '--top1', '90'], r'README\.md\), so nothing is uploaded; .*--replace', hub, capsys)
    assert main([*pushed, '--top1', '90', '--replace']) == 0
    said = capsys.readouterr().out
    assert 'published as me/test_repvgg.mine\n' in said
    assert f'{card.relative_to(here)} stays as you edited it' in said
    assert card_on(hub, 'me/test_repvgg.mine') == card.read_text() == edited
    assert main([*pushed, '--top1', '90']) == 0
    assert 'published' not in capsys.readouterr().out


def test_publish_edited_card_of_other_weights_is_not_lost(here, pushed, capsys):
    """It tells of the old ones."""
    card = here / 'out' / 'test_repvgg.mine_deploy' / 'README.md'
    card.write_text('mine')
    torch.save(timm.create_model('test_repvgg', num_classes=5).state_dict(), 'c.pth')
    before = (here / 'out' / 'test_repvgg.mine' / 'README.md').read_text()
    assert main([*pushed, '--replace']) == 1
    assert "holds 'README.md', which is not one of the files to replace" in capsys.readouterr().err
    assert card.read_text() == 'mine'
    assert (here / 'out' / 'test_repvgg.mine' / 'README.md').read_text() == before


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--name', 'test_repvgg.mine'], 'say with --from where it is'),
        (['--name', 'test_repvgg.mine', '--from', 'none.pth'], 'is no checkpoint file'),
        (['--name', 'test_repvgg.cifar10', '--from', 'c.pth'], 'is a name of the manifest'),
        (['--name', 'test_repvgg.mine_deploy', '--from', 'c.pth'], "ends in '_deploy'"),
        (['--name', 'repvgg_a0.mine', '--from', 'c.pth'], 'says repvgg_a0, and the weights are of test_repvgg'),
        (['--name', 'test_repvgg.a/b', '--from', 'c.pth'], 'epo id'),
        (['--name', 'test_repvgg.mine', '--from', 'c.pth', '--top1', '90'], 'give both --dataset and --top1'),
        (['--name', 'x', '--from', 'c.pth', '--dataset', 'd', '--top1', '930'], 'not between 0 and 100'),
        (['--name', 'x', '--from', 'c.pth', '--base', 'repvgg_a9'], "unknown base 'repvgg_a9'; did you mean"),
        (['--name', 'x', '--from', 'c.pth', '--label-names', 'labels.txt'], '2 label names for 5 classes'),
        (['--name', 'x', '--from', 'c.pth', '--trust-source'], 'goes without --name'),
        (['--name', 'x', '--from', 'headless.pth'], 'has no classifier'),
        (['--name', 'x', '--from', 'deploy.pth'], 'is of the deploy form'),
        (['--name', 'x', '--from', 'c.pth', '--dataset', 'd', '--top1', '90', '--top5', '9'], 'top-5 of 9 % is less'),
        (['--name', 'x', '--from', 'c.pth', '--std', '0.2', '0.2', '0'], 'std 0.2, 0.2, 0; each value is more than 0'),
        (['--name', 'x', '--from', 'c.pth', '--std', '0.2', '0.2', 'nan'], 'std 0.2, 0.2, nan; each value'),
        (['--name', 'x', '--from', 'c.pth', '--mean', '124', '116', '104'], 'mean 124, 116, 104; each value is from 0'),
        (['--name', 'x', '--from', 'c.pth', '--mean', '0.5', '0.5'], '2 values of mean for 3 channels'),
        (['--name', 'x', '--from', 'c.pth', '--crop-pct', '87.5'], 'crop_pct 87.5; it is the part'),
        (['--name', 'x', '--from', 'c.pth', '--crop-pct', '-1'], 'crop_pct -1; it is the part'),
        (['test_repvgg.cifar10', '--license', 'mit'], '--license describes weights of your own'),
        (['test_repvgg.cifar10', '--prefix', 'model.'], 'say with --from which'),
        (['--all', '--no-ema'], 'say with --from which'),
        (['test_repvgg.cifar10', '--model', 'test_repvgg'], '--variant describes weights of your own'),
        (['test_repvgg.cifar10', '--top1', '0'], '--top1 describes weights of your own'),
        (['--all', '--from', 'c.pth'], 'goes without --from'),
        (['test_repvgg.cifar10', '--from-folder', '.'], '--from-folder goes with --all'),
        (['--all', '--from-folder', 'nowhere'], "no folder at 'nowhere'"),
    ],
)
def test_publish_mistake_says_what_to_do(here, capsys, arguments, message):
    torch.save(timm.create_model('test_repvgg', num_classes=5).state_dict(), 'c.pth')
    torch.save(timm.create_model('test_repvgg', num_classes=5, deploy=True).state_dict(), 'deploy.pth')
    torch.save(timm.create_model('test_repvgg', num_classes=0).state_dict(), 'headless.pth')
    (here / 'labels.txt').write_text('a\nb\n')
    assert main(['publish', *arguments, *OWN]) == 1
    assert message in capsys.readouterr().err
    assert not list(here.glob('out/*'))


def test_publish_impossible_configuration_of_folder_raises(here, capsys):
    """Or nobody could prepare images for what is published."""
    convert('test_repvgg', 'folder')
    config = json.loads((here / 'folder' / 'config.json').read_text())
    for key, value, message in (
        ('interpolation', 'foo', "timm cannot prepare images as this says, because of KeyError('foo'): {'"),
        ('crop_mode', 'border', ''),
        ('crop_pct', 0, 'crop_pct 0; it is the part'),
    ):
        broken = config | {'pretrained_cfg': config['pretrained_cfg'] | {key: value}}
        (here / 'folder' / 'config.json').write_text(json.dumps(broken))
        assert main(['publish', '--from', 'folder', '--name', 'test_repvgg.mine', *OWN]) == bool(message)
        assert message in capsys.readouterr().err


def test_publish_interpolation_choices_are_those_of_timm(capsys):
    for mode in InterpolationMode:
        try:
            create_transform(32, interpolation=mode.value)
        except KeyError:
            assert mode.value not in INTERPOLATIONS
        else:
            assert mode.value in INTERPOLATIONS
    with pytest.raises(SystemExit):
        main(['publish', '--name', 'x', '--from', 'c.pth', '--interpolation', 'bicubik', *OWN])
    assert "did you mean 'bicubic'?" in capsys.readouterr().err


def test_read_labels_windows_text_gives_the_names(tmp_path):
    (tmp_path / 'labels.txt').write_bytes(b'\xef\xbb\xbfdaisy\r\nrose\r\n\r\n')
    assert read_labels(tmp_path / 'labels.txt')[0] == ('daisy', 'rose')
    (tmp_path / 'labels.txt').write_bytes(b'\x80\x81')
    with pytest.raises(ValueError, match=r'labels\.txt.* is no text in UTF-8'):
        read_labels(tmp_path / 'labels.txt')


def test_read_labels_empty_or_repeated_line_raises(tmp_path):
    for text, message in (('a\n\nb', 'line 2 .* is empty'), ('a\nb\na\tagain', "line 3 .* repeats 'a'")):
        (tmp_path / 'labels.txt').write_text(text)
        with pytest.raises(ValueError, match=message):
            read_labels(tmp_path / 'labels.txt')


def test_own_publication_base_gives_preprocessing(tmp_path):
    torch.save({}, tmp_path / 'c.pth')
    own = own_publication('x', tmp_path / 'c.pth', base='test_repvgg.cifar10', preprocessing=dict(crop_pct=0.5))
    expected = read_manifest()['test_repvgg.cifar10'].preprocessing
    assert own.preprocessing['mean'] == expected.mean
    assert own.preprocessing['crop_pct'] == 0.5
    assert own_publication('x', tmp_path / 'c.pth', base='somebody/weights').preprocessing == {}


def test_publish_all_takes_the_folder_of_the_official_release(here, capsys, monkeypatch):
    published = []
    monkeypatch.setattr(command, '_publish_and_print', lambda publication, args: published.append(publication))
    (here / 'official').mkdir()
    *present, missing = UPSTREAM
    for record in present:
        (here / 'official' / record.upstream).touch()
    assert main(['publish', '--all', '--from-folder', 'official', *OWN]) == 1
    assert [(p.name, p.source.title) for p in published] == [(r.name, r.upstream) for r in present]
    assert re.search(
        rf'{missing.name} is not published: .*{re.escape(missing.upstream)}. is missing', capsys.readouterr().err
    )
    (here / 'official' / missing.upstream).touch()
    published.clear()
    assert main(['publish', '--all', '--from-folder', 'official', '--trust-source', *OWN]) == 0
    assert [p.name for p in published] == [r.name for r in UPSTREAM]
    assert all(p.vouched for p in published)


@pytest.mark.skipif(not WITHOUT_SOURCE, reason='the manifest knows all files')
def test_publish_without_source_gives_advice_that_works(here, capsys, monkeypatch):
    record = WITHOUT_SOURCE[0]
    assert main(['publish', record.name, *OWN]) == 1
    said = capsys.readouterr().err
    assert record.origin in said
    advice = re.search(r'pass (--from .*)$', said.strip()).group(1).split()
    (here / record.upstream).touch()
    published = []
    monkeypatch.setattr(command, '_publish_and_print', lambda publication, args: published.append(publication))
    assert main(['publish', record.name, *advice, *OWN]) == 0
    assert [str(publication.source.path) for publication in published] == [record.upstream]
