"""Comparison of models and checkpoints."""

import pytest
import timm
import torch
from helpers import randomise

from repvgg_zoo import CheckpointError
from repvgg_zoo.pretrained.manifest import weights_dir
from repvgg_zoo.tools.convert import convert, open_model
from repvgg_zoo.tools.publish.folders import build_folders
from repvgg_zoo.tools.publish.publication import recorded_publication
from repvgg_zoo.tools.verify import compare, images_for, verify
from repvgg_zoo_cli import main


def test_verify_both_forms_are_same():
    results = verify('test_repvgg', images=weights_dir() / 'cifar10' / 'validation' / 'cat')
    assert list(results) == ['float32', 'float64']
    assert all(result.same and result.images == 50 and result.top1_agreement_pct == 100 for result in results.values())
    assert results['float64'].max_abs_diff < results['float32'].max_abs_diff < 1e-4


def test_verify_two_files_are_same(checkpoint, tmp_path):
    convert(checkpoint, tmp_path / 'deploy', form='deploy')
    assert all(result.same for result in verify(checkpoint, tmp_path / 'deploy').values())


@pytest.fixture
def larger_network(tmp_path):
    """A custom architecture in a checkpoint of a larger network, with an average; the command line that reads it."""
    numbers = dict(depths=(1, 1, 1, 1), strides=(1, 1, 2, 2, 2))
    plain, average = (
        {f'model.{key}': value for key, value in timm.create_model('test_repvgg', **numbers).state_dict().items()}
        for _ in range(2)
    )
    other = {'criterion.weight': torch.ones(3)}
    torch.save({'state_dict': plain | other, 'state_dict_ema': average | other}, tmp_path / 'c.ckpt')
    arguments = ['--variant', 'test_repvgg', '--prefix', 'model.', '--no-ema', '--model-kwargs']
    return tmp_path / 'c.ckpt', [*arguments, *(f'{key}={value}' for key, value in numbers.items())], plain


def test_commands_all_take_the_arguments_that_errors_advise(larger_network, tmp_path, capsys):
    path, arguments, plain = larger_network
    out, own = str(tmp_path / 'out'), ['--name', 'test_repvgg.mine', '--owner', 'me']
    for command in (
        ['verify', str(path)],
        ['convert', str(path), f'{out}/converted'],
        ['publish', '--from', str(path), *own, '--out', out],
    ):
        assert main([*command, *arguments]) == 0, capsys.readouterr().err
    for folder in ('converted', 'test_repvgg.mine'):
        written = timm.create_model(f'local-dir:{out}/{folder}', pretrained=True).state_dict()
        assert {f'model.{key}': value.tolist() for key, value in written.items()} == {
            key: value.tolist() for key, value in plain.items()
        }


def test_verify_opens_the_model_once(monkeypatch, tmp_path):
    opened = []

    def spy(source, **options):
        opened.append(source)
        return open_model(source, **options)

    build_folders(recorded_publication('test_repvgg.cifar10'), owner='me', out=tmp_path)
    monkeypatch.setattr('repvgg_zoo.tools.verify.open_model', spy)
    assert main(['verify', str(tmp_path / 'test_repvgg.cifar10')]) == 0
    assert len(opened) == 1


def test_compare_other_weights_gives_difference(model):
    other = randomise(timm.create_model('test_repvgg', num_classes=7, in_chans=4), px=32, in_chans=4, seed=5)
    result = compare(model, other, images_for(model), dtype=torch.float64)
    assert not result.same
    x = torch.cat(list(images_for(model)))
    expected = (model.double()(x.double()) - other.double()(x.double())).abs().max().item()
    assert result.max_abs_diff == pytest.approx(expected)
    assert result.max_rel_diff == pytest.approx(expected / model(x.double()).abs().max().item())


def test_compare_nan_is_not_same(model):
    other = timm.create_model('test_repvgg', num_classes=7, in_chans=4)
    other.head.fc.bias.data[0] = float('nan')
    assert not compare(model, other, images_for(model), dtype=torch.float32).same
    assert not compare(other, other, images_for(model), dtype=torch.float32).same


def test_compare_other_shapes_raises(model):
    with pytest.raises(ValueError, match='4 channels to 7 classes, and 3 channels to 10 classes'):
        compare(model, timm.create_model('test_repvgg'), images_for(model), dtype=torch.float32)


def test_verify_deploy_form_without_other_raises():
    with pytest.raises(CheckpointError, match='no other form'):
        verify('test_repvgg.cifar10_deploy')


def test_verify_images_of_other_channels_raises(checkpoint):
    with pytest.raises(ValueError, match='the model takes 4'):
        verify(checkpoint, images=weights_dir() / 'cifar10' / 'validation' / 'cat')


def test_verify_missing_images_raises():
    with pytest.raises(FileNotFoundError, match='no folder of images'):
        verify('test_repvgg', images='nowhere')
