"""What stands in front of keys: wrappers, the attribute of a trainer, and other parts of a larger network."""

import pytest
import timm
import torch
from helpers import LAYOUTS, images, randomise, rename

from repvgg_zoo import CheckpointError, load_checkpoint
from repvgg_zoo.checkpoints.layouts import to_timm_layout
from repvgg_zoo_cli import main


@pytest.fixture(scope='module')
def model():
    return randomise(timm.create_model('test_repvgg'), px=32)


def load(tmp_path, state_dict, *, num_classes=10, **kwargs):
    torch.save({'state_dict': state_dict}, tmp_path / 'x.ckpt')
    return load_checkpoint(timm.create_model('test_repvgg', num_classes=num_classes), tmp_path / 'x.ckpt', **kwargs)


def under(prefix, state_dict):
    return {prefix + key: value for key, value in state_dict.items()}


@pytest.mark.parametrize('table', LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    'prefix', ['model.', 'module.model.', 'model._orig_mod.', 'timm_model.', 'encoder.model.', 'backbone.', '0.']
)
def test_to_timm_layout_any_common_prefix_is_stripped(model, table, prefix):
    expected = model.state_dict()
    translated = to_timm_layout(under(prefix, rename(expected, table)))
    assert translated.keys() == expected.keys()
    assert all(translated[key] is value for key, value in expected.items() if 'num_batches' not in key)


def test_load_state_dict_common_prefix_is_stripped(model):
    loaded = timm.create_model('test_repvgg', deploy=True)
    loaded.load_state_dict(under('model.', model.state_dict()))
    assert torch.allclose(loaded.eval()(images(px=32)), model(images(px=32)), atol=1e-4)


@pytest.mark.parametrize('table', LAYOUTS.values(), ids=LAYOUTS)
def test_to_timm_layout_other_parts_are_named_with_the_option(model, table):
    network = under('module.model.', rename(model.state_dict(), table)) | {'module.criterion.weight': torch.ones(10)}
    with pytest.raises(
        CheckpointError,
        match=r"other parts than a RepVGG \(criterion\.weight\): .* prefix='model\.' "
        r'\(`--prefix model\.` on the command line\)$',
    ):
        to_timm_layout(network)
    for prefix in ('model.', 'model', 'module.model.'):
        assert to_timm_layout(network, prefix=prefix).keys() == model.state_dict().keys()


def test_to_timm_layout_mmpretrain_backbone_of_a_larger_network(model):
    network = rename(model.state_dict(), LAYOUTS['mmpretrain']) | {'decode_head.conv_seg.weight': torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"unknown keys: decode_head\.conv_seg\.weight; .*prefix='backbone\.'"):
        to_timm_layout(network)
    backbone = to_timm_layout(network, prefix='backbone')
    assert backbone.keys() == {key for key in model.state_dict() if not key.startswith('head.')}


def test_to_timm_layout_two_networks_are_named(model):
    both = under('student.', model.state_dict()) | under('teacher.', model.state_dict())
    with pytest.raises(CheckpointError, match=r"2 RepVGGs: .* prefix='student\.' or 'teacher\.'"):
        to_timm_layout(both)
    assert to_timm_layout(both, prefix='teacher.').keys() == model.state_dict().keys()


def test_to_timm_layout_prefix_that_no_key_has_raises(model):
    with pytest.raises(CheckpointError, match=r"no key starts with prefix='net\.'; the keys start with model\.$"):
        to_timm_layout(under('model.', model.state_dict()), prefix='net')


def test_load_prefix_inside_keys_raises(model, tmp_path):
    inside = {key.replace('stages.', 'stages.model.'): value for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r'unexpected: stages\.model\.0'):
        load(tmp_path, inside)


def test_load_features_without_classifier(model, tmp_path):
    """Keys of timm's `features_only=True`, as under the encoders of segmentation_models.pytorch."""
    features = timm.create_model('test_repvgg', features_only=True)
    features.load_state_dict(
        {key.replace('stages.', 'stages_', 1): v for key, v in model.state_dict().items() if 'head.' not in key}
    )
    network = under('encoder.model.', features.state_dict()) | {'decoder.weight': torch.ones(1)}
    backbone = load(tmp_path, network, prefix='encoder.', num_classes=0).eval()
    assert torch.equal(backbone.forward_features(images(px=32)), model.forward_features(images(px=32)))
    with pytest.raises(CheckpointError, match=r'no classifier .*num_classes=0'):
        load(tmp_path, network, prefix='encoder.')


def test_convert_prefix_takes_one_part(model, tmp_path, capsys):
    torch.save(under('model.', model.state_dict()) | {'criterion.weight': torch.ones(10)}, tmp_path / 'x.ckpt')
    assert main(['convert', str(tmp_path / 'x.ckpt'), str(tmp_path / 'a')]) == 1
    assert '--prefix model.' in capsys.readouterr().err
    assert main(['convert', str(tmp_path / 'x.ckpt'), str(tmp_path / 'a'), '--prefix', 'model.']) == 0
    assert timm.create_model(f'local-dir:{tmp_path / "a"}', pretrained=True).variant.name == 'test_repvgg'
