"""Checkpoints of over-parameterized networks, as folders of the plain network."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from helpers import images, randomise, rel_diff
from timm.utils import CheckpointSaver, ModelEmaV3

from repvgg_zoo import CheckpointError, register_overparameterized
from repvgg_zoo.pretrained.manifest import weights_dir
from repvgg_zoo.tools.convert import convert
from repvgg_zoo_cli import main

PX = 64
X = images(2, px=PX, in_chans=1)
OPTIONS = dict(
    in_chans=1, num_classes=7, gp='max', input_size=None, img_size=PX, mean=[0.5], std=[0.25], crop_pct=1.0,
    interpolation='', bn_eps=None, model_kwargs=dict(stem_type='deep', stem_width=8), drop=0.1,
)  # fmt: skip


@pytest.fixture
def network(own_registry):
    """An over-parameterized network as train.py creates it, and its average."""
    name = register_overparameterized('test_resnet', where='layer*')
    model_args = dict(in_chans=1, num_classes=7, global_pool='max', drop_rate=0.1, **OPTIONS['model_kwargs'])
    model = randomise(timm.create_model(name, **model_args), px=PX, in_chans=1)
    average = ModelEmaV3(model)
    randomise(average.module, seed=1, px=PX, in_chans=1)
    return model, average


@pytest.fixture
def checkpoint(network, tmp_path):
    """What train.py saves."""
    model, average = network
    args = argparse.Namespace(model='test_resnet_acb', **OPTIONS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    CheckpointSaver(model, optimizer, args, average, checkpoint_dir=tmp_path).save_checkpoint(0)
    return tmp_path / 'last.pth.tar'


def load(folder):
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


@pytest.mark.parametrize('use_ema', [True, False])
def test_convert_checkpoint_of_training_gives_plain_network(use_ema, checkpoint, network, tmp_path):
    model, average = network
    returned = convert(checkpoint, tmp_path / 'out', use_ema=use_ema)
    loaded = load(tmp_path / 'out')
    expected = (average.module if use_ema else model)(X)
    assert rel_diff(loaded(X), expected) < 1e-4  # float32 over ten layers
    assert torch.equal(loaded(X), returned(X))
    plain = timm.create_model('test_resnet', in_chans=1, num_classes=7, global_pool='max', **OPTIONS['model_kwargs'])
    assert list(loaded.state_dict()) == list(plain.state_dict())
    assert type(loaded) is type(plain)


def test_convert_checkpoint_of_training_tells_its_preprocessing(checkpoint, tmp_path, capsys):
    assert main(['convert', str(checkpoint), str(tmp_path / 'out')]) == 0
    assert 'wrote test_resnet, branches folded, 7 classes, to' in capsys.readouterr().out
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['architecture'] == 'test_resnet'
    assert config['num_classes'] == 7
    assert 'num_classes' not in config['model_args']  # transformers passes the other one too
    cfg = config['pretrained_cfg']
    assert (cfg['input_size'], cfg['mean'], cfg['std'], cfg['crop_pct']) == ([1, PX, PX], [0.5], [0.25], 1.0)
    assert 'license' not in cfg  # that of other weights
    assert 'tag' not in cfg


def test_convert_bare_file_needs_the_name_and_the_arguments(network, tmp_path):
    model, _ = network
    weights = {f'net.module.{key}': value for key, value in model.state_dict().items()}
    torch.save(weights | {'other.weight': torch.zeros(1)}, tmp_path / 'bare.pth')
    kwargs = dict(variant='test_resnet_acb', prefix='net')
    with pytest.raises(CheckpointError, match=r'does not fit test_resnet with branches of acb: .*conv1\.0\.weight'):
        convert(tmp_path / 'bare.pth', tmp_path / 'out', **kwargs)
    model_kwargs = dict(in_chans=1, global_pool='max', **OPTIONS['model_kwargs'])
    convert(tmp_path / 'bare.pth', tmp_path / 'out', **kwargs, model_kwargs=model_kwargs)
    assert rel_diff(load(tmp_path / 'out')(X), model(X)) < 1e-4
    with pytest.raises(ValueError, match=r"test_resnet does not take \{'depth': 3\}: .*unexpected keyword"):
        convert(tmp_path / 'bare.pth', tmp_path / 'o', **kwargs, model_kwargs=dict(depth=3))


def test_convert_folder_with_weights_of_wrapped_network(network, tmp_path):
    model, _ = network
    (tmp_path / 'run').mkdir()
    weights = {f'module.{key}': value for key, value in model.state_dict().items()}
    torch.save({'state_dict': weights, 'args': argparse.Namespace(**OPTIONS)}, tmp_path / 'run' / 'pytorch_model.bin')
    convert(tmp_path / 'run', tmp_path / 'out', variant='test_resnet_acb')
    assert rel_diff(load(tmp_path / 'out')(X), model(X)) < 1e-4


def test_convert_network_with_branches_of_its_own(own_registry, tmp_path):
    name = register_overparameterized('hrnet_w18_small', where='stage2.0.branches.0.*.conv1')
    model = randomise(timm.create_model(name), px=PX)
    torch.save(model.state_dict(), tmp_path / 'bare.pth')
    convert(tmp_path / 'bare.pth', tmp_path / 'out', variant=name)
    x = images(px=PX)
    assert rel_diff(load(tmp_path / 'out')(x), model(x)) < 1e-4


def test_convert_bare_file_without_a_name_raises(network, tmp_path):
    torch.save(network[0].state_dict(), tmp_path / 'bare.pth')
    with pytest.raises(CheckpointError, match=r'but another network with branches .*like --model resnet18_acb'):
        convert(tmp_path / 'bare.pth', tmp_path / 'out')


def test_convert_checkpoint_of_repvgg_with_options_keeps_its_form(tmp_path):
    model = randomise(timm.create_model('test_repvgg'), px=32)
    args = argparse.Namespace(model='test_repvgg', **OPTIONS)
    torch.save({'arch': 'test_repvgg', 'args': args, 'state_dict': model.state_dict()}, tmp_path / 'last.pth.tar')
    assert not convert(tmp_path / 'last.pth.tar', tmp_path / 'out').deploy


@pytest.mark.parametrize('option', [dict(form='training'), dict(unfold=True), dict(block='acb')])
def test_convert_option_of_other_forms_raises(option, checkpoint, tmp_path):
    with pytest.raises(ValueError, match='holds test_resnet with branches of acb, which are folded; leave out unfold'):
        convert(checkpoint, tmp_path / 'out', **option)
    assert not (tmp_path / 'out').exists()


def test_convert_weights_without_branches_or_of_others_raises(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match='does not fit test_resnet with branches of dbb'):
        convert(checkpoint, tmp_path / 'out', variant='test_resnet_dbb')
    torch.save(timm.create_model('test_resnet').state_dict(), tmp_path / 'plain.pth')
    with pytest.raises(CheckpointError, match='holds no branches of acb; if it is the plain test_resnet'):
        convert(tmp_path / 'plain.pth', tmp_path / 'out', variant='test_resnet_acb')
    assert not (tmp_path / 'out').exists()


SCRIPTS = os.environ.get('REPVGG_ZOO_TIMM_SCRIPTS', '')
"""A folder with timm's train.py and validate.py, which its wheel lacks."""
REPORT = """
import json, sys
import timm, torch
model = timm.create_model(sys.argv[1], pretrained=True).eval()
x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
print(json.dumps([model(x).tolist(), 'repvgg_zoo' in sys.modules, sum(p.numel() for p in model.parameters())]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not SCRIPTS, reason='REPVGG_ZOO_TIMM_SCRIPTS names no folder with train.py and validate.py of timm')
def test_train_resume_validate_and_convert_with_scripts_of_timm(tmp_path, own_registry):
    for name in ('train.py', 'validate.py'):
        shutil.copy(Path(SCRIPTS) / name, tmp_path)
    launcher = [sys.executable, '-m', 'repvgg_zoo', 'run', '--overparameterize', 'test_resnet:acb']
    options = [
        '--model', 'test_resnet_acb', '--data-dir', weights_dir() / 'cifar10', '--device', 'cpu', '--workers', 0,
        '-b', 100, '--img-size', 32, '--num-classes', 10,
    ]  # fmt: skip
    train = [
        *launcher, 'train.py', *options, '--val-split', 'validation', '--warmup-epochs', 0, '--lr', 0.01,
        '--output', 'runs', '--model-ema', '--model-ema-decay', 0.9,
    ]  # fmt: skip
    validate = [*launcher, 'validate.py', *options, '--split', 'validation', '--use-ema']

    def run(*command):
        done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(*train, '--epochs', 1, '--experiment', 'first')
    run(*train, '--epochs', 2, '--experiment', 'second', '--resume', 'runs/first/last.pth.tar')
    last = tmp_path / 'runs' / 'second' / 'last.pth.tar'
    of_branches = json.loads(run(*validate, '--checkpoint', last).partition('--result')[2])
    convert(last, tmp_path / 'plain')
    validate_plain = [sys.executable, 'validate.py', '--model', 'local-dir:plain', *options[2:], '--pretrained']
    of_plain = json.loads(run(*validate_plain, '--split', 'validation').partition('--result')[2])
    assert of_plain['top1'] == pytest.approx(of_branches['top1'], abs=0.2)  # one image of 500 may be on the edge
    assert of_plain['param_count'] < of_branches['param_count']

    register_overparameterized('test_resnet')
    model = timm.create_model('test_resnet_acb', num_classes=10, checkpoint_path=last).eval()
    logits, knows_zoo, parameters = json.loads(run(sys.executable, '-c', REPORT, 'local-dir:plain'))
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert rel_diff(torch.tensor(logits), model(x)) < 1e-4  # float32 over ten layers
    assert not knows_zoo
    assert parameters == sum(p.numel() for p in timm.create_model('test_resnet', num_classes=10).parameters())
