"""Variants with other depths, widths, strides and groups."""

import argparse
import json

import pytest
import timm
import torch
from helpers import images, randomise, rel_diff
from timm.models import save_for_hf
from timm.utils import ParseKwargs

from repvgg_zoo import VARIANTS, CheckpointError
from repvgg_zoo.variants import customized

SMALL = dict(depths=(1, 2, 3, 1), width=(0.25, 0.25, 0.25, 0.5), strides=(1, 1, 2, 2, 2), groups=2)


def test_custom_architecture_has_the_given_numbers():
    model = timm.create_model('repvgg_a0', **SMALL)
    assert [len(stage) for stage in model.stages] == [1, 2, 3, 1]
    assert [info['num_chs'] for info in model.feature_info] == [16, 16, 32, 64, 256]
    assert [info['reduction'] for info in model.feature_info] == [1, 1, 2, 4, 8]
    blocks = [model.stem, *(block for stage in model.stages for block in stage)]
    assert [block.conv_kxk.conv.groups for block in blocks] == [1, 1, 2, 1, 2, 1, 2, 1]
    assert model.pretrained_cfg['pool_size'] == (28, 28)


def test_custom_architecture_small_images_has_an_identity_in_the_first_block():
    assert timm.create_model('repvgg_a0').stages[0][0].identity is None
    assert timm.create_model('repvgg_a0', strides=(1, 1, 2, 2, 2)).stages[0][0].identity is not None


@pytest.mark.parametrize('deploy', [False, True], ids=['training', 'deploy'])
@pytest.mark.parametrize('given', [SMALL, dict(strides=(1, 2, 2, 2, 2))], ids=['all', 'strides'])
def test_custom_architecture_saved_by_timm_is_read_back(given, deploy, tmp_path):
    model = randomise(timm.create_model('repvgg_a0', **given)).eval()
    if deploy:
        model.switch_to_deploy()
    save_for_hf(model, tmp_path)
    model_args = json.loads((tmp_path / 'config.json').read_text())['model_args']
    assert {field: model_args[field] for field in given} == json.loads(json.dumps(given))
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert again.variant == model.variant
    assert again.deploy == deploy
    x = images()
    assert torch.equal(again(x), model(x))


def test_custom_architecture_switch_keeps_the_outputs():
    model = randomise(timm.create_model('repvgg_a0', **SMALL)).double().eval()
    x = images().double()
    expected = model(x)
    assert rel_diff(model.switch_to_deploy()(x), expected) < 1e-12  # float64 over 8 blocks


def test_own_numbers_are_not_written_to_the_configuration():
    assert timm.create_model('repvgg_a0', depths=(2, 4, 14, 1)).variant == VARIANTS['repvgg_a0']
    assert 'depths' not in timm.create_model('repvgg_a0', depths=(2, 4, 14, 1))._model_args


def test_custom_architecture_from_the_command_line_of_timm_scripts():
    parser = argparse.ArgumentParser()
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs)
    given = parser.parse_args(['--model-kwargs', 'strides=1,1,2,2,2', 'depths=[1,1,1,1]']).model_kwargs
    variant = timm.create_model('test_repvgg', **given).variant
    assert (variant.strides, variant.depths) == ((1, 1, 2, 2, 2), (1, 1, 1, 1))


MISTAKES = [
    (dict(depths=(1, 2, 3)), r'depths of test_repvgg is \(1, 2, 3\); it takes 4 integers from 1 on'),
    (dict(depths=(1, 2, 3, 0)), 'depths of .* it takes 4 integers from 1 on'),
    (dict(depths=(1, 2, True, 1)), 'depths of .* it takes 4 integers from 1 on'),
    (dict(depths=(1, 2, 1.5, 1)), 'depths of .* it takes 4 integers from 1 on'),
    (dict(width=0.5), 'width of test_repvgg is 0.5; it takes 4 numbers above 0'),
    (dict(width=(1, 1, 1, -1)), 'width of .* it takes 4 numbers above 0'),
    (dict(width=(1, 1, 1, float('nan'))), 'width of .* it takes 4 numbers above 0'),
    (dict(width=(0.001, 1, 1, 1)), r'width of .* leaves stages of \(0, 128, 256, 512\) channels'),
    (dict(strides='1,1,2,2,2'), "strides of .* is '1,1,2,2,2'; it takes 5 integers from 1 on"),
    (dict(strides=(1, 1, 2, 2)), 'strides of .* it takes 5 integers from 1 on'),
    (dict(groups=0), 'groups of test_repvgg is 0; it takes an integer from 1 on'),
    (dict(groups=2.0), 'groups of .* it takes an integer from 1 on'),
    (dict(groups=5), 'groups of test_repvgg is 5, which does not divide the channels'),
]


@pytest.mark.parametrize(('given', 'message'), MISTAKES, ids=lambda value: str(value)[:30])
def test_custom_architecture_mistake_raises(given, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('test_repvgg', **given)


def test_auxiliary_heads_need_two_blocks_in_the_third_stage():
    with pytest.raises(ValueError, match='auxiliary heads take 2 blocks in stage 3'):
        customized(VARIANTS['repvggplus_l2pse'], depths=(1, 1, 1, 1))


def test_custom_architecture_with_weights_of_another_names_both():
    with pytest.raises(
        CheckpointError, match=r'does not fit test_repvgg with depths=.*like a checkpoint of test_repvgg'
    ):
        timm.create_model('test_repvgg', pretrained=True, depths=(1, 1, 1, 1))
