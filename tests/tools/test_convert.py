import pytest
import timm
import torch
from helpers import images, randomise, rel_diff

from repvgg_zoo import CheckpointError
from repvgg_zoo.pretrained.manifest import weights_dir
from repvgg_zoo.tools.convert import convert, open_model, save_model
from repvgg_zoo.tools.verify import compare, images_for, verify


@pytest.fixture
def model():
    return randomise(timm.create_model('test_repvgg', num_classes=7, in_chans=4), px=32, in_chans=4)


@pytest.fixture
def checkpoint(model, tmp_path):
    torch.save(
        {'state_dict': {f'module.{key}': value for key, value in model.state_dict().items()}}, tmp_path / 'c.pth'
    )
    return tmp_path / 'c.pth'


@pytest.mark.parametrize('form', [None, 'training', 'deploy'])
def test_folder_builds_the_model_again(checkpoint, model, form, tmp_path):
    returned = convert(checkpoint, tmp_path / 'out', form=form)
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == ['config.json', 'model.safetensors']
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    assert loaded.deploy == returned.deploy == (form == 'deploy')
    x = images(2, px=32, in_chans=4)
    assert rel_diff(loaded(x), model(x)) < 1e-5
    again = open_model(tmp_path / 'out').eval()
    assert torch.equal(again(x), loaded(x))


def test_training_folder_needs_no_plugin(checkpoint, tmp_path):
    torch.save(timm.create_model('repvgg_a0', num_classes=3).state_dict(), tmp_path / 'a0.pth')
    convert(tmp_path / 'a0.pth', tmp_path / 'out')
    import json
    import subprocess
    import sys

    code = f"import timm; print(type(timm.create_model('local-dir:{tmp_path / 'out'}', pretrained=True)).__name__)"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.strip() == 'ByobNet', done.stderr
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert 'tag' not in config['pretrained_cfg']
    assert 'num_classes' in config
    assert 'num_classes' not in config.get('model_args', {})  # transformers passes the other one too


def test_existing_target_is_kept_unless_told(checkpoint, tmp_path):
    target = tmp_path / 'out'
    convert(checkpoint, target)
    written = (target / 'model.safetensors').stat().st_mtime_ns
    with pytest.raises(FileExistsError, match='exists; choose another path'):
        convert(checkpoint, target)
    assert (target / 'model.safetensors').stat().st_mtime_ns == written
    convert(target, target, form='deploy', overwrite=True)
    assert open_model(target).deploy


def test_nothing_but_a_model_folder_is_overwritten(checkpoint, tmp_path):
    full, link, dangling = tmp_path / 'full', tmp_path / 'link', tmp_path / 'dangling'
    full.mkdir()
    (full / 'thesis.txt').touch()
    link.symlink_to(full)
    dangling.symlink_to(tmp_path / 'nowhere')
    for target, message in (
        (full, "holds 'thesis.txt', which no model folder does"),
        (link, 'is no folder'),
        (dangling, 'is no folder'),
        (checkpoint, 'is no folder'),
    ):
        with pytest.raises(FileExistsError, match=message):
            convert(checkpoint, target, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['c.pth', 'dangling', 'full', 'link']
    assert (full / 'thesis.txt').exists()


@pytest.mark.parametrize('text', ['{}', '{', '[]', '{"architecture": 3}'])
def test_folder_with_a_bad_configuration(text, tmp_path):
    (tmp_path / 'config.json').write_text(text)
    with pytest.raises(CheckpointError, match=r'config\.json.* is no configuration of a timm model'):
        open_model(tmp_path)


def test_failure_leaves_nothing(tmp_path):
    before = sorted(tmp_path.iterdir())
    (tmp_path / 'bad.pth').write_bytes(b'nothing')
    with pytest.raises(CheckpointError):
        convert(tmp_path / 'bad.pth', tmp_path / 'out')
    assert sorted(tmp_path.iterdir()) == [*before, tmp_path / 'bad.pth']


def test_deploy_weights_have_no_training_form(checkpoint, tmp_path):
    convert(checkpoint, tmp_path / 'deploy', form='deploy')
    with pytest.raises(CheckpointError, match='branches are summed'):
        convert(tmp_path / 'deploy', tmp_path / 'out', form='training')
    assert not (tmp_path / 'out').exists()


def test_given_variant_must_fit(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match='does not fit repvgg_a0'):
        convert(checkpoint, tmp_path / 'out', variant='repvgg_a0')
    with pytest.raises(ValueError, match="did you mean 'repvgg_a0'"):
        convert(checkpoint, tmp_path / 'out', variant='repvgg_a00')


def test_file_of_no_known_variant(tmp_path):
    state_dict = timm.create_model('test_repvgg').state_dict()
    del state_dict['stages.0.1.conv_kxk.conv.weight']
    torch.save(state_dict, tmp_path / 'odd.pth')
    with pytest.raises(CheckpointError, match='the shapes of no known variant'):
        open_model(tmp_path / 'odd.pth')


@pytest.mark.parametrize('source', ['nothing.pth', 'some/where'])
def test_missing_source(source):
    with pytest.raises(FileNotFoundError, match='no checkpoint file'):
        open_model(source)


def test_source_by_name():
    assert open_model('test_repvgg.cifar10_deploy').deploy
    with pytest.raises(FileNotFoundError, match=r"no .* at 'repvgg_b4', and unknown variant 'repvgg_b4'; did you mean"):
        open_model('repvgg_b4')
    with pytest.raises(FileNotFoundError, match=r"unknown variant 'nope'; `repvgg-zoo list` shows all"):
        open_model('nope')


# -------------------------------------------------------------------------------------------- verifying


def test_two_forms_are_the_same_function():
    results = verify('test_repvgg', images=weights_dir() / 'cifar10' / 'validation' / 'cat')
    assert list(results) == ['float32', 'float64']
    assert all(result.same and result.images == 50 and result.top1_agreement_pct == 100 for result in results.values())
    assert results['float64'].max_abs_diff < results['float32'].max_abs_diff < 1e-4


def test_two_files(checkpoint, tmp_path):
    convert(checkpoint, tmp_path / 'deploy', form='deploy')
    assert all(result.same for result in verify(checkpoint, tmp_path / 'deploy').values())


def test_difference_is_told(model):
    other = randomise(timm.create_model('test_repvgg', num_classes=7, in_chans=4), px=32, in_chans=4, seed=5)
    result = compare(model, other, images_for(model), dtype=torch.float64)
    assert not result.same
    x = torch.cat(list(images_for(model)))
    expected = (model.double()(x.double()) - other.double()(x.double())).abs().max().item()
    assert result.max_abs_diff == pytest.approx(expected)
    assert result.max_rel_diff == pytest.approx(expected / model(x.double()).abs().max().item())


def test_nan_is_a_difference(model):
    other = timm.create_model('test_repvgg', num_classes=7, in_chans=4)
    other.head.fc.bias.data[0] = float('nan')
    assert not compare(model, other, images_for(model), dtype=torch.float32).same
    assert not compare(other, other, images_for(model), dtype=torch.float32).same


def test_models_of_other_shapes(model):
    with pytest.raises(ValueError, match='4 channels to 7 classes, and 3 channels to 10 classes'):
        compare(model, timm.create_model('test_repvgg'), images_for(model), dtype=torch.float32)


def test_deploy_form_alone_has_nothing_to_compare_with():
    with pytest.raises(CheckpointError, match='no other form'):
        verify('test_repvgg.cifar10_deploy')


def test_images_have_three_channels(checkpoint):
    with pytest.raises(ValueError, match='the model takes 4'):
        verify(checkpoint, images=weights_dir() / 'cifar10' / 'validation' / 'cat')


def test_missing_images():
    with pytest.raises(FileNotFoundError, match='no folder of images'):
        verify('test_repvgg', images='nowhere')


def test_folder_of_a_model_whose_classifier_was_replaced(tmp_path):
    model = timm.create_model('test_repvgg', num_classes=7)
    model.reset_classifier(4)
    save_model(model, tmp_path)
    assert timm.create_model(f'local-dir:{tmp_path}', pretrained=True).num_classes == 4
