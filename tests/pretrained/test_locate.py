"""The folder that `REPVGG_ZOO_WEIGHTS` names."""

import pytest
import timm

from repvgg_zoo import CheckpointError
from repvgg_zoo.pretrained.locate import locate, weights_in

NAME = 'test_repvgg.cifar10'


@pytest.fixture
def override(tmp_path, monkeypatch):
    folder = tmp_path / 'zoo'
    folder.mkdir()
    monkeypatch.setenv('REPVGG_ZOO_WEIGHTS', str(folder))
    return folder


@pytest.mark.parametrize('suffix', ['', '_deploy'])
def test_locate_override_folder_goes_first(override, suffix):
    (override / NAME).mkdir()
    (override / NAME / 'model.safetensors').touch()
    assert locate(timm.get_pretrained_cfg(NAME + suffix)) == override / NAME / 'model.safetensors'


@pytest.mark.parametrize('name', [NAME, NAME + '_deploy'])
def test_locate_override_that_is_a_file_raises(override, name):
    (override / name).touch()
    with pytest.raises(CheckpointError, match=rf"{name}', in the folder that REPVGG_ZOO_WEIGHTS names, is no folder"):
        locate(timm.get_pretrained_cfg(NAME + '_deploy'))


def test_locate_override_that_is_a_broken_link_raises(override):
    (override / NAME).symlink_to('/nowhere/at/all')
    with pytest.raises(
        CheckpointError, match="is a broken link to '/nowhere/at/all'; delete it, or make a model folder"
    ):
        locate(timm.get_pretrained_cfg(NAME))


@pytest.mark.parametrize('name', ['model.safetensors', 'pytorch_model.bin'])
def test_weights_in_folder_with_broken_link_raises(tmp_path, name):
    (tmp_path / name).symlink_to('/nowhere')
    with pytest.raises(CheckpointError, match=rf"{name}' is a broken link to '/nowhere'"):
        weights_in(tmp_path)


def test_weights_in_folder_prefers_safetensors(tmp_path):
    for name in ('pytorch_model.bin', 'model.safetensors'):
        (tmp_path / name).touch()
        assert weights_in(tmp_path) == tmp_path / name
