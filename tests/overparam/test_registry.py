"""Over-parameterized networks under names of timm's registry."""

from __future__ import annotations

import dataclasses

import pytest
import timm
import torch
from helpers import images, randomise, rel_diff
from safetensors.torch import save_file
from timm.models import get_arch_pretrained_cfgs

from repvgg_zoo import BLOCKS, register_overparameterized, switch_to_deploy
from repvgg_zoo.overparam.conv import OverparameterizedConv2d
from repvgg_zoo.overparam.registry import parse_recipe, split_overparameterized

pytestmark = pytest.mark.usefixtures('own_registry')

PLAIN, PX = 'test_resnet', 64


def replaced(model):
    return [path for path, m in model.named_modules() if isinstance(m, OverparameterizedConv2d)]


@pytest.fixture
def weights(tmp_path):
    """A file of weights of the plain network, with 1000 classes and statistics of their own."""
    path = tmp_path / 'plain.safetensors'
    save_file(randomise(timm.create_model(PLAIN), px=PX).state_dict(), path)
    return dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))


@pytest.mark.parametrize('block', ['acb', 'doconv', 'csla'])
def test_create_registered_computes_what_plain_pretrained_network_computes(block, weights):
    name = register_overparameterized(PLAIN, block)
    assert name == f'{PLAIN}_{block}'
    model, plain = (timm.create_model(n, **weights).eval() for n in (name, PLAIN))
    x = images(2, px=PX)
    assert rel_diff(model(x), plain(x)) < 1e-4  # float32 over ten layers
    assert len(replaced(model)) == 10
    assert model.pretrained_cfg == plain.pretrained_cfg


def test_create_registered_takes_arguments_as_plain_network(weights):
    name = register_overparameterized(PLAIN)
    args = dict(num_classes=5, in_chans=1, global_pool='max')
    model, plain = (timm.create_model(n, **weights, **args).eval() for n in (name, PLAIN))
    x = images(2, px=PX, in_chans=1)
    assert model(x).shape == (2, 5)
    assert rel_diff(model.forward_features(x), plain.forward_features(x)) < 1e-4  # the classifiers are fresh


def test_create_registered_features_only_equals_plain_features(weights):
    name = register_overparameterized(PLAIN, where='layer*')
    model, plain = (timm.create_model(n, features_only=True, **weights).eval() for n in (name, PLAIN))
    assert len(replaced(model)) == 7
    for a, b in zip(model(images(px=PX)), plain(images(px=PX)), strict=True):
        assert rel_diff(a, b) < 1e-4


def test_create_registered_of_fixed_size_takes_image_size():
    name = register_overparameterized('efficientformerv2_s0', where='stem.*')
    model = timm.create_model(name, img_size=64)
    assert replaced(model) == ['stem.conv1.conv', 'stem.conv2.conv']
    assert model.eval()(images(px=64)).shape == (1, 1000)


def test_create_registered_checkpoint_path_loads_branches(tmp_path):
    name = register_overparameterized(PLAIN)
    trained = randomise(timm.create_model(name), px=PX)
    torch.save({'state_dict': trained.state_dict()}, tmp_path / 'last.pth.tar')
    x = images(px=PX)
    assert torch.equal(timm.create_model(name, checkpoint_path=tmp_path / 'last.pth.tar').eval()(x), trained(x))


@pytest.mark.parametrize('kind', ['file', 'state_dict'])
def test_create_registered_pretrained_weights_with_branches_raises(kind, tmp_path):
    """timm loads them loosely if the number of classes may differ: the network would start from random weights."""
    name = register_overparameterized(PLAIN)
    held = timm.create_model(name).state_dict()
    save_file(held, tmp_path / 'branches.safetensors')
    overlay = {'file': str(tmp_path / 'branches.safetensors')} if kind == 'file' else {'state_dict': held}
    with pytest.raises(ValueError, match=r'hold branches \(conv1\.0\.branches.*180 in all.*--initial-checkpoint'):
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay | {'num_classes': -1})


@pytest.mark.parametrize('plain', ['resnet18', 'resnet18.tv_in1k', 'resnext101_32x4d.untrained'])
def test_register_carries_weights_and_preprocessing_of_every_tag(plain):
    name, arch = register_overparameterized(plain, 'dbb'), plain.split('.')[0]
    cfgs = {full.replace(name, arch): cfg for full, cfg in get_arch_pretrained_cfgs(name).items()}
    assert {full: dataclasses.replace(cfg, architecture=arch) for full, cfg in cfgs.items()} == (
        get_arch_pretrained_cfgs(arch)
    )
    assert timm.get_pretrained_cfg(name).tag == timm.get_pretrained_cfg(plain).tag
    assert timm.models.is_model_pretrained(name) == timm.models.is_model_pretrained(plain)


def test_create_registered_with_tag_takes_its_preprocessing():
    register_overparameterized('resnet18.tv_in1k', 'plain', where='layer1.0.conv1')
    for full, tag in (('resnet18_plain', 'tv_in1k'), ('resnet18_plain.a1_in1k', 'a1_in1k')):
        model = timm.create_model(full)
        assert model.pretrained_cfg == timm.create_model(f'resnet18.{tag}').pretrained_cfg
        assert timm.data.resolve_model_data_config(model)['crop_pct'] == (0.875 if tag == 'tv_in1k' else 0.95)


def test_create_registered_given_its_own_configuration_is_the_plain_architecture():
    """timm resolves it before it creates a model for a given input size."""
    name = register_overparameterized(PLAIN)
    model = timm.create_model(name, pretrained_cfg=timm.get_pretrained_cfg(name))
    assert model.pretrained_cfg == timm.create_model(PLAIN).pretrained_cfg


def test_switched_network_is_the_plain_one_for_timm(tmp_path):
    model = randomise(timm.create_model(register_overparameterized(PLAIN), num_classes=5), px=PX)
    x = images(2, px=PX)
    expected = model(x)
    timm.models.save_for_hf(switch_to_deploy(model), tmp_path)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert loaded.pretrained_cfg['architecture'] == PLAIN
    assert rel_diff(loaded(x), expected) < 1e-4


def test_register_twice_changes_nothing_and_other_paths_raise():
    register_overparameterized(PLAIN)
    entry_point = timm.models.model_entrypoint(f'{PLAIN}_acb')
    assert register_overparameterized(PLAIN) == f'{PLAIN}_acb'
    assert timm.models.model_entrypoint(f'{PLAIN}_acb') is entry_point
    with pytest.raises(
        ValueError, match=r"test_resnet:acb:layer1\.\*: 'test_resnet_acb' is registered already, for test_resnet:acb$"
    ):
        register_overparameterized(PLAIN, where='layer1.*')


@pytest.mark.parametrize(
    ('name', 'block', 'said'),
    [
        ('resnet19', 'acb', "unknown model 'resnet19'; did you mean 'resnet18'"),
        ('resnet18', 'abc', "unknown block 'abc'; did you mean 'acb'"),
        ('resnet18.a4_in1k', 'acb', "resnet18 has no weights tagged 'a4_in1k'; did you mean 'a"),
        ('repvgg_a0', 'acb', 'repvgg_a0 has such blocks itself: create it with block='),
    ],
)
def test_register_unknown_name_raises(name, block, said):
    with pytest.raises(ValueError, match=said):
        register_overparameterized(name, block)
    assert not timm.is_model(f'{name.split(".")[0]}_{block}')


def test_register_name_of_another_model_raises(monkeypatch):
    monkeypatch.setitem(timm.models._registry._model_entrypoints, 'resnet18_acb', lambda: None)
    with pytest.raises(ValueError, match="'resnet18_acb' is a model already"):
        register_overparameterized('resnet18')


@pytest.mark.parametrize('text', ['resnet18', 'resnet18:', ':acb', '', 'resnet18:acb:', 'resnet18::layer1.*'])
def test_parse_recipe_of_another_form_raises(text):
    with pytest.raises(ValueError, match='is not of the form NAME:BLOCK'):
        parse_recipe(text)


@pytest.mark.parametrize('block', BLOCKS)
def test_split_overparameterized_finds_every_block(block):
    assert split_overparameterized(f'resnet18_{block}') == ('resnet18', block)
    assert split_overparameterized(f'resnet18_{block}.a1_in1k') == ('resnet18', block)
    assert split_overparameterized(f'repvgg_a0_{block}') is None
    assert split_overparameterized(f'nothing_{block}') is None


def test_split_overparameterized_is_no_name_that_timm_has():
    assert [name for name in timm.list_models() if split_overparameterized(name)] == []
