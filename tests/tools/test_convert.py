"""A checkpoint to a model, and to a model folder."""

import hashlib
import inspect
import json
import logging
import subprocess
import sys

import pytest
import timm
import torch
from helpers import images, randomise, rel_diff
from safetensors.torch import save_file
from timm.models import save_for_hf

from repvgg_zoo import CheckpointError
from repvgg_zoo.tools.convert import convert, open_model
from repvgg_zoo.tools.model_folder import save_model
from repvgg_zoo.tools.verify import verify


@pytest.mark.parametrize('form', [None, 'training', 'deploy'])
def test_convert_any_form_folder_builds_same_model(checkpoint, model, form, tmp_path):
    returned = convert(checkpoint, tmp_path / 'out', form=form)
    assert sorted(path.name for path in (tmp_path / 'out').glob('[!.]*')) == ['config.json', 'model.safetensors']
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    assert loaded.deploy == returned.deploy == (form == 'deploy')
    x = images(2, px=32, in_chans=4)
    assert rel_diff(loaded(x), model(x)) < 1e-5
    again = open_model(tmp_path / 'out').eval()
    assert torch.equal(again(x), loaded(x))


def test_convert_training_form_loads_without_plugin(checkpoint, tmp_path):
    torch.save(timm.create_model('repvgg_a0', num_classes=3).state_dict(), tmp_path / 'a0.pth')
    convert(tmp_path / 'a0.pth', tmp_path / 'out')
    code = f"import timm; print(type(timm.create_model('local-dir:{tmp_path / 'out'}', pretrained=True)).__name__)"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.strip() == 'ByobNet', done.stderr
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert 'tag' not in config['pretrained_cfg']
    assert 'license' not in config['pretrained_cfg']  # nobody told it
    assert 'num_classes' in config
    assert 'num_classes' not in config.get('model_args', {})  # transformers passes the other one too


def test_convert_existing_target_needs_overwrite(checkpoint, tmp_path):
    target = tmp_path / 'out'
    convert(checkpoint, target)
    written = (target / 'model.safetensors').stat().st_mtime_ns
    with pytest.raises(FileExistsError, match='exists; choose another path'):
        convert(checkpoint, target)
    assert (target / 'model.safetensors').stat().st_mtime_ns == written
    convert(target, target, form='deploy', overwrite=True)
    assert open_model(target).deploy


def test_convert_overwrite_foreign_target_raises(checkpoint, tmp_path):
    full, link, dangling = tmp_path / 'full', tmp_path / 'link', tmp_path / 'dangling'
    full.mkdir()
    (full / 'thesis.txt').touch()
    link.symlink_to(full)
    dangling.symlink_to(tmp_path / 'nowhere')
    for target, message in (
        (full, "holds 'thesis.txt', which is not one of the files to replace"),
        (link, 'is no folder'),
        (dangling, 'is no folder'),
        (checkpoint, 'is no folder'),
    ):
        with pytest.raises(FileExistsError, match=message):
            convert(checkpoint, target, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['c.pth', 'dangling', 'full', 'link']
    assert (full / 'thesis.txt').exists()


@pytest.mark.parametrize('text', ['{}', '{', '[]', '{"architecture": 3}'])
def test_open_model_bad_configuration_raises(text, tmp_path):
    (tmp_path / 'config.json').write_text(text)
    with pytest.raises(CheckpointError, match=r'config\.json.* is no configuration of a timm model'):
        open_model(tmp_path)


def edit_config(folder, edit):
    config = json.loads((folder / 'config.json').read_text())
    edit(config)
    (folder / 'config.json').write_text(json.dumps(config))


@pytest.mark.parametrize('name', ['mobileone_s0', 'resnet10t'])
def test_open_model_other_architecture_raises(name, tmp_path):
    save_for_hf(timm.create_model(name), tmp_path)
    with pytest.raises(CheckpointError, match=f'holds {name}, a .* of timm, and no RepVGG; .*`repvgg-zoo list`'):
        open_model(tmp_path)


def test_open_unfolded_model_saved_by_timm_builds_training_form(tmp_path):
    model = timm.create_model('test_repvgg.cifar10_deploy', pretrained=True, unfold=True)
    save_for_hf(model, tmp_path)
    assert 'unfold' not in json.loads((tmp_path / 'config.json').read_text()).get('model_args', {})
    for pretrained in (False, True):
        assert not timm.create_model(f'local-dir:{tmp_path}', pretrained=pretrained).deploy


def test_convert_folder_saved_by_timm_has_classes_once(tmp_path):
    """transformers takes no second number of classes, which some versions of timm write for every model."""
    save_for_hf(timm.create_model('test_repvgg', num_classes=7), tmp_path / 'timm')
    edit_config(tmp_path / 'timm', lambda config: config.setdefault('model_args', {}).update(num_classes=7))
    convert(tmp_path / 'timm', tmp_path / 'out')
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['num_classes'] == 7
    assert 'num_classes' not in config.get('model_args', {})


KNOWS_SAVED_ARGS = 'pretrained_model_args' in inspect.getsource(timm.create_model)
OLD_TIMM = pytest.mark.skipif(not KNOWS_SAVED_ARGS, reason="this timm mixes the folder's arguments with the caller's")


@pytest.mark.parametrize('part', ['num_classes', pytest.param('model_args', marks=OLD_TIMM)])
def test_open_model_configuration_of_other_classes_raises(part, tmp_path):
    save_model(timm.create_model('test_repvgg', num_classes=7), tmp_path)
    if part == 'model_args':
        edit_config(tmp_path, lambda config: config.setdefault('model_args', {}).update(num_classes=3))
    else:
        edit_config(tmp_path, lambda config: config.update(num_classes=3))
    with pytest.raises(CheckpointError, match=r'head\.fc\.bias: \(7,\) in the checkpoint, \(3,\) in the model'):
        open_model(tmp_path)
    assert timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=5).num_classes == 5


def test_convert_failure_leaves_nothing(tmp_path):
    before = sorted(tmp_path.iterdir())
    (tmp_path / 'bad.pth').write_bytes(b'nothing')
    with pytest.raises(CheckpointError):
        convert(tmp_path / 'bad.pth', tmp_path / 'out')
    assert sorted(tmp_path.iterdir()) == [*before, tmp_path / 'bad.pth']


def test_convert_deploy_to_training_raises(checkpoint, tmp_path):
    convert(checkpoint, tmp_path / 'deploy', form='deploy')
    with pytest.raises(CheckpointError, match='branches are summed'):
        convert(tmp_path / 'deploy', tmp_path / 'out', form='training')
    assert not (tmp_path / 'out').exists()


def test_convert_wrong_variant_raises(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match='does not fit repvgg_a0'):
        convert(checkpoint, tmp_path / 'out', variant='repvgg_a0')
    with pytest.raises(ValueError, match="did you mean 'repvgg_a0'"):
        convert(checkpoint, tmp_path / 'out', variant='repvgg_a00')


def test_open_model_unknown_shapes_raises(tmp_path):
    state_dict = timm.create_model('test_repvgg').state_dict()
    del state_dict['stages.0.1.conv_kxk.conv.weight']
    torch.save(state_dict, tmp_path / 'odd.pth')
    with pytest.raises(CheckpointError, match='the shapes of no known variant'):
        open_model(tmp_path / 'odd.pth')


@pytest.mark.parametrize('source', ['nothing.pth', 'some/where'])
def test_open_model_missing_source_raises(source):
    with pytest.raises(FileNotFoundError, match='no checkpoint file'):
        open_model(source)


def test_open_model_name_gives_model():
    assert open_model('test_repvgg.cifar10_deploy').deploy
    with pytest.raises(FileNotFoundError, match=r"no .* at 'repvgg_b4', and unknown variant 'repvgg_b4'; did you mean"):
        open_model('repvgg_b4')
    with pytest.raises(FileNotFoundError, match=r"unknown variant 'nope'; `repvgg-zoo list` shows all"):
        open_model('nope')


def test_save_model_replaced_classifier_loads(tmp_path):
    model = timm.create_model('test_repvgg', num_classes=7)
    model.reset_classifier(4)
    save_model(model, tmp_path)
    assert timm.create_model(f'local-dir:{tmp_path}', pretrained=True).num_classes == 4


def test_save_model_twice_writes_same_bytes(tmp_path):
    """safetensors orders metadata at random."""
    model = timm.create_model('test_repvgg')
    digests = set()
    for index in range(8):
        (tmp_path / str(index)).mkdir()
        save_model(model, tmp_path / str(index))
        digests.add(hashlib.sha256((tmp_path / str(index) / 'model.safetensors').read_bytes()).hexdigest())
    assert len(digests) == 1


@pytest.mark.parametrize('name', ['training/labels.csv', 'README.md', 'model.safetensors/mine'])
def test_convert_overwrite_keeps_foreign_files(checkpoint, tmp_path, name):
    path = tmp_path / 'project' / name
    path.parent.mkdir(parents=True)
    path.write_text('mine')
    with pytest.raises(FileExistsError, match=f'holds {name!r}, which is not one of the files to replace'):
        convert(checkpoint, tmp_path / 'project', overwrite=True)
    assert path.read_text() == 'mine'


@pytest.mark.parametrize('num_classes', [10, 1000])
def test_open_model_of_a_shape_that_two_variants_have_warns(num_classes, tmp_path, caplog):
    caplog.set_level(logging.WARNING)  # which other libraries raise
    model = timm.create_model('repvgg_a0_cifar', deploy=True, num_classes=num_classes)
    save_file(model.state_dict(), tmp_path / 'cifar.safetensors')
    assert open_model(tmp_path / 'cifar.safetensors').variant.name == 'repvgg_a0'
    assert ('taken for repvgg_a0; if it is repvgg_a0_cifar' in caplog.text) == (num_classes == 10)
    caplog.clear()
    assert open_model(tmp_path / 'cifar.safetensors', variant='repvgg_a0_cifar').variant.name == 'repvgg_a0_cifar'
    assert caplog.text == ''


def test_convert_custom_architecture_needs_its_numbers(tmp_path):
    small = dict(depths=(1, 2, 3, 1), strides=(1, 1, 2, 2, 2))
    model = randomise(timm.create_model('test_repvgg', **small), px=32)
    torch.save(model.state_dict(), tmp_path / 'last.pth')
    with pytest.raises(CheckpointError, match=r'shapes of no known variant.*give these as model_kwargs'):
        convert(tmp_path / 'last.pth', tmp_path / 'out')
    convert(tmp_path / 'last.pth', tmp_path / 'out', variant='test_repvgg', model_kwargs=small, form='deploy')
    x = images(2, px=32)
    assert rel_diff(open_model(tmp_path / 'out').eval()(x), model(x)) < 1e-5  # float32 over 8 blocks
    assert verify(tmp_path / 'out', tmp_path / 'last.pth')['float32'].same
    with pytest.raises(ValueError, match='knows its own arguments'):
        open_model(tmp_path / 'out', model_kwargs=small)


@pytest.mark.parametrize('kind', ['name', 'folder'])
@pytest.mark.parametrize(
    ('option', 'said'),
    [
        (dict(prefix='model.'), r'prefix \(--prefix\)'),
        (dict(use_ema=False), '--no-ema'),
        (dict(model_kwargs=dict(strides=(1, 1, 2, 2, 2))), r'model_kwargs \(--model-kwargs\)'),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else '',
)
def test_open_model_option_for_bare_files_raises_for_others(kind, option, said, tmp_path):
    if kind == 'folder':
        save_model(timm.create_model('test_repvgg'), tmp_path)
    with pytest.raises(ValueError, match=f'knows its own arguments and weights, so it takes no {said}; a bare file'):
        open_model(tmp_path if kind == 'folder' else 'test_repvgg', **option)


@pytest.mark.parametrize('name', ['me/repvgg_a0.mine', 'me/x@v1'])
def test_open_model_hub_name_without_prefix_gives_hint(name):
    with pytest.raises(FileNotFoundError, match=f"at '{name}'; if it is on the Hub, write 'hf-hub:{name}'"):
        open_model(name)


@pytest.mark.parametrize(('name', 'hint'), [('strid', "did you mean 'strides'"), ('num_classes', 'these can: depths')])
def test_open_model_argument_that_cannot_be_given_raises(name, hint, tmp_path):
    torch.save(timm.create_model('test_repvgg').state_dict(), tmp_path / 'last.pth')
    with pytest.raises(ValueError, match=f"'{name}' is no argument of a model that can be given here;.*{hint}"):
        open_model(tmp_path / 'last.pth', model_kwargs={name: 5})
