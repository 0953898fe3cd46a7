"""The commands that run models on a device: on that of `pytest --device`, or else on one that this machine lacks."""

from __future__ import annotations

import argparse
import json
import shutil

import pytest
import timm
import torch
from helpers import images
from pretended_device import pretended_device
from safetensors.torch import load_file, save_file

from repvgg_zoo.model import RepVGG
from repvgg_zoo.pretrained.manifest import weights_dir
from repvgg_zoo.quantization.sensitivity import layer_errors
from repvgg_zoo.reparam import fold
from repvgg_zoo.tools.benchmark import measure
from repvgg_zoo.tools.convert import convert, open_model
from repvgg_zoo.tools.demo import demo
from repvgg_zoo.tools.devices import add_device_argument
from repvgg_zoo.tools.publish.cards import CARD
from repvgg_zoo.tools.reference import REFERENCE, check_reference
from repvgg_zoo.tools.verify import float64_rel_diff, images_for, verify
from repvgg_zoo_cli import main

pytestmark = pytest.mark.device
NEAR = 1e-4
"""Some hundred roundings of float32, through ten layers."""


@pytest.fixture
def elsewhere(device, monkeypatch):
    """The name of a device that is not the CPU, and the devices of all that was timed."""
    timed = []
    if device.type != 'cpu':
        yield str(torch.empty(0, device=device).device), timed
        return

    def once(run, device):
        run()
        timed.append(device.type)
        return 1.0

    def save(tensors, path, metadata):
        save_file({key: value.cpu() for key, value in tensors.items()}, path, metadata)

    monkeypatch.setattr(torch.Tensor, 'backward', lambda *_: None)  # it asks the device for a stream,
    monkeypatch.setattr(measure, 'timed', once)  # and this for its events
    monkeypatch.setattr('repvgg_zoo.tools.model_folder.save_file', save)
    with pretended_device() as pretended:
        yield str(pretended), timed


@pytest.fixture
def cats(tmp_path, monkeypatch):
    """Six images of cats, and for the demo as many of each class."""
    for folder in (weights_dir() / 'cifar10').glob('*/*/'):
        copied = tmp_path / 'weights' / folder.relative_to(weights_dir())
        copied.mkdir(parents=True)
        for path in sorted(folder.iterdir())[:6]:
            shutil.copy(path, copied)
    monkeypatch.setattr(demo, 'weights_dir', lambda: tmp_path / 'weights')
    return tmp_path / 'weights' / 'cifar10' / 'validation' / 'cat'


# ------------------------------------------------------------------------------------------------------ the option


@pytest.mark.cpu
@pytest.mark.parametrize(
    'command',
    [
        'demo',
        'verify test_repvgg',
        'publish test_repvgg.cifar10 --owner me',
        'quantize test_repvgg out --images .',
        'benchmark',
    ],
)
@pytest.mark.parametrize('device', ['cuda:99', 'meta', 'gpu', 'cuda:x', 'CPU', 'cpu:1'])
def test_device_that_is_not_there_is_an_error_that_names_those_that_are(command, device, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), '--device', device])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f'argument --device: there is no device {device!r} here; there is: cpu' in said


@pytest.mark.cpu
def test_device_argument_takes_those_that_are_there(monkeypatch, capsys):
    parser = argparse.ArgumentParser()
    add_device_argument(parser)
    monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    monkeypatch.setattr('torch.cuda.device_count', lambda: 2)
    monkeypatch.setattr('torch.backends.mps.is_available', lambda: True)
    for device in ('cpu', 'cuda', 'cuda:1', 'mps'):
        assert parser.parse_args(['--device', device]).device == device
    for device in ('cpu', 'mps'):  # with the number that PyTorch takes too
        assert parser.parse_args(['--device', f'{device}:0']).device == device
    with pytest.raises(SystemExit):
        parser.parse_args(['--device', 'cuda:2'])
    assert 'there is: cpu, cuda, cuda:0, cuda:1, mps' in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- the verbs


@pytest.mark.parametrize('real', [False, True], ids=['random', 'real'])
def test_verify_on_a_device_compares_there(elsewhere, cats, real):
    name, _ = elsewhere
    expected, found = (verify('test_repvgg', images=cats if real else None, device=where) for where in ('cpu', name))
    assert next(images_for(open_model('test_repvgg').to(name))).device == torch.device(name)
    for dtype, result in found.items():
        assert (result.same, result.device, result.images) == (True, name, expected[dtype].images)
    assert all(0 < result.max_rel_diff < NEAR for result in found.values())
    assert {result.device for result in expected.values()} == {'cpu'}


def test_verify_other_model_on_a_device_is_same(elsewhere, tmp_path):
    name, _ = elsewhere
    convert('test_repvgg', tmp_path / 'deploy', form='deploy')
    assert all(result.same for result in verify('test_repvgg', tmp_path / 'deploy', device=name).values())


@pytest.mark.cpu
def test_verify_on_a_device_without_float64_compares_float64_on_the_cpu(monkeypatch):
    monkeypatch.setattr(fold, '_WITHOUT_FLOAT64', ('cuda',))
    with pretended_device(float64=False) as device:
        results = verify('test_repvgg', device=str(device))
        model = open_model('test_repvgg').to(device).eval()
        assert float64_rel_diff(model, next(images_for(model))) < 1e-12
    assert [(result.device, result.same) for result in results.values()] == [('cuda:0', True), ('cpu', True)]


def test_verify_command_on_a_device_says_where(elsewhere, capsys, monkeypatch):
    name, _ = elsewhere
    monkeypatch.setattr('repvgg_zoo.tools.devices.available_device', str)
    assert main(['verify', 'test_repvgg', '--device', name]) == 0
    said = capsys.readouterr().out
    assert f'float32, {name} ' in said
    assert f'float64, {name} ' in said
    assert main(['verify', 'test_repvgg']) == 0
    assert name not in capsys.readouterr().out


def test_publish_on_a_device_writes_the_same_files_and_says_where_it_compared(
    elsewhere, cats, tmp_path, monkeypatch, capsys
):
    name, _ = elsewhere
    switched, switch = [], RepVGG.switch_to_deploy

    def spy(model):
        switched.append(model.device.type)
        return switch(model)

    monkeypatch.setattr(RepVGG, 'switch_to_deploy', spy)
    monkeypatch.setattr('repvgg_zoo.tools.devices.available_device', str)
    command = ['publish', 'test_repvgg.cifar10', '--owner', 'me', '--verify-images', str(cats), '--out']
    assert main([*command, str(tmp_path / 'cpu')]) == 0
    assert name not in capsys.readouterr().out
    assert main([*command, str(tmp_path / 'there'), '--device', name]) == 0
    assert f' in float32, on {name}\n' in capsys.readouterr().out
    assert switched == ['cpu', 'cpu']  # kernels may differ in the last bit elsewhere
    for form in ('test_repvgg.cifar10', 'test_repvgg.cifar10_deploy'):
        here, there = (tmp_path / where / form for where in ('cpu', 'there'))
        for file in ('model.safetensors', 'config.json', REFERENCE):
            assert (here / file).read_bytes() == (there / file).read_bytes()
        assert f' 100 % of them with the same top class, computed on {name}. In `t' in (there / CARD).read_text('utf-8')
        assert 'computed on' not in (here / CARD).read_text('utf-8')
        assert check_reference(open_model(there).to(name).eval(), there / REFERENCE).same


@pytest.mark.usefixtures('cats')
def test_demo_on_a_device_learns_and_runs_there(elsewhere, tmp_path, monkeypatch, capsys):
    name, timed = elsewhere
    monkeypatch.setattr(demo, '_EPOCHS', 1)
    monkeypatch.setattr('repvgg_zoo.tools.devices.available_device', str)
    evaluated, evaluate = [], demo._evaluate

    def spy(model, *args, **kwargs):
        evaluated.append(model.device)
        return evaluate(model, *args, **kwargs)

    monkeypatch.setattr(demo, '_evaluate', spy)
    out = tmp_path / 'out'
    assert main(['demo', '--out', str(out), '--device', name]) == 0
    assert f'per image, {name}' in capsys.readouterr().out
    assert set(timed) <= {torch.device(name).type}
    assert evaluated == 5 * [torch.device(name)]
    assert all(value.device.type == 'cpu' for value in load_file(out / 'training' / 'model.safetensors').values())


def test_quantize_layer_errors_on_a_device_are_those_of_the_cpu(elsewhere):
    name, _ = elsewhere
    model, x = timm.create_model('test_repvgg.cifar10_deploy', pretrained=True).eval(), images(4, 32).cpu()
    expected = {error.layer: error.rel_error for error in layer_errors(model, x)}
    found = layer_errors(model.to(name), x.to(name))
    assert {error.layer for error in found} == expected.keys()
    for error in found:  # a value at the edge of two steps may be rounded to either
        assert error.rel_error == pytest.approx(expected[error.layer], rel=0.2)


@pytest.mark.cpu
def test_quantize_command_on_a_device_says_where(elsewhere, cats, tmp_path, monkeypatch, capsys):
    name, _ = elsewhere
    pytest.importorskip('nncf')
    monkeypatch.setattr('repvgg_zoo.tools.devices.available_device', str)
    monkeypatch.setattr('repvgg_zoo.tools.quantize.measure.time_rounds', lambda runs, **_: [[1.0]] * len(runs))
    out = tmp_path / 'out'
    command = ['quantize', 'test_repvgg', str(out), '--images', str(cats), '--subset', '8', '--device', name]
    assert main(command) == 0, capsys.readouterr().err
    assert f'relative error of the logits on {name}: ' in capsys.readouterr().out
    assert f'only one layer is quantized on {name}:' in (out / 'report.md').read_text()
    assert json.loads((out / 'report.json').read_text())['sensitivity_device'] == name
