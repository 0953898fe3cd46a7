"""Reference outputs: the file of timm's own tests."""

import pytest
import timm
import torch
from helpers import randomise
from safetensors.torch import load_file, save_file

from repvgg_zoo import CheckpointError
from repvgg_zoo.tools.publish.folders import build_folders
from repvgg_zoo.tools.publish.publication import recorded_publication
from repvgg_zoo.tools.publish.push import push_folders
from repvgg_zoo.tools.reference import REFERENCE, check_reference, find_reference, write_reference
from repvgg_zoo.tools.verify import verify_reference
from repvgg_zoo_cli import main

NAME = 'test_repvgg.cifar10'


@pytest.fixture
def published(own_weights, tmp_path):
    return build_folders(recorded_publication(NAME), owner='zoo', out=tmp_path / 'out')


@pytest.mark.parametrize('index', [0, 1], ids=['training', 'deploy'])
def test_write_reference_holds_what_timms_test_compares(published, index):
    tensors = load_file(published[index].folder / REFERENCE)
    assert {name: tensor.dtype for name, tensor in tensors.items()} == dict.fromkeys(
        ('input', 'output', 'features', 'pre_logits'), torch.float32
    )
    model = timm.create_model(f'local-dir:{published[index].folder}', pretrained=True).eval()
    with torch.inference_mode():  # as timm's test_model_inference does
        features = model.forward_features(tensors['input'])
        found = {
            'output': model(tensors['input']),
            'features': features,
            'pre_logits': model.forward_head(features, pre_logits=True),
        }
    for name, value in found.items():
        assert torch.allclose(value, tensors[name], rtol=1e-3, atol=1e-4), name


def test_check_reference_other_weights_differ(model, tmp_path):
    write_reference(model, tmp_path)
    assert check_reference(model, tmp_path / REFERENCE).same
    model.stages[3][0].conv_kxk.bn.running_mean += 0.1
    check = check_reference(model, tmp_path / REFERENCE)
    assert not check.same
    assert all(diff > 1e-3 for diff in check.rel_diffs.values())


def test_check_reference_nan_is_not_same(model, tmp_path):
    write_reference(model, tmp_path)
    model.head.fc.bias.data[0] = float('nan')
    assert not check_reference(model, tmp_path / REFERENCE).same


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda tensors: tensors.pop('features'), 'holds no reference outputs: it lacks features'),
        (lambda tensors: tensors.update(input=torch.zeros(1, 3, 32, 32)), 'the model takes 4 channels'),
        (lambda tensors: tensors.update(output=torch.zeros(1, 9)), r'output of shape \(1, 9\), .* \(1, 7\)'),
    ],
)
def test_check_reference_of_other_model_raises(model, tmp_path, change, message):
    write_reference(model, tmp_path)
    tensors = load_file(tmp_path / REFERENCE)
    change(tensors)
    save_file(tensors, tmp_path / REFERENCE)
    with pytest.raises(CheckpointError, match=message):
        check_reference(model, tmp_path / REFERENCE)
    (tmp_path / REFERENCE).write_bytes(b'nothing')
    with pytest.raises(CheckpointError, match='cannot read the reference outputs'):
        check_reference(model, tmp_path / REFERENCE)


def test_verify_reference_of_downloaded_model_is_checked(hub, published, own_weights):
    push_folders(published)
    for item in published:
        check = verify_reference(f'hf-hub:{item.hub_id}')
        assert (check.form, check.same) == (item.form, True)
    assert hub.count('GET', f'/resolve/.*{REFERENCE}') == 2


def test_verify_command_checks_the_deploy_form_against_its_reference(published, capsys):
    folder = published[1].folder
    assert main(['verify', str(folder)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == 'the same function'
    other = randomise(timm.create_model('test_repvgg', deploy=True), px=32)
    save_file(other.state_dict(), folder / 'model.safetensors')
    assert main(['verify', str(folder)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == 'NOT the same function'


def test_verify_command_says_what_has_no_reference(capsys):
    assert main(['verify', 'test_repvgg']) == 0
    assert 'test_repvgg has no reference outputs (test/rand_tensors.safetensors)' in capsys.readouterr().out


def test_find_reference_repository_without_is_none(hub, folder):
    from repvgg_zoo.tools.publish.upload import push_folder

    push_folder(folder, 'zoo/bare')
    assert verify_reference('hf-hub:zoo/bare') is None


def test_find_reference_override_folder_asks_no_hub(hub, tmp_path, monkeypatch):
    """The weights are not those of the Hub, so the reference there is not theirs."""
    name = 'repvgg_a0.rvgg_in1k'
    (tmp_path / 'override' / name).mkdir(parents=True)
    source = timm.create_model('repvgg_a0').eval()
    save_file(source.state_dict(), tmp_path / 'override' / name / 'model.safetensors')
    monkeypatch.setenv('REPVGG_ZOO_WEIGHTS', str(tmp_path / 'override'))
    assert find_reference(name, timm.create_model(name, pretrained=True)) is None
    write_reference(source, tmp_path / 'override' / name)
    assert find_reference(name, source) is not None
    assert hub.requests == []
