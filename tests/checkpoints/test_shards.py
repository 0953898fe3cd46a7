"""Weights in several files, by their index."""

import json

import pytest
import timm
import torch
from helpers import FORMS
from safetensors.torch import save_file

from repvgg_zoo import CheckpointError, load_checkpoint


@pytest.fixture(scope='module')
def state_dict():
    return timm.create_model('test_repvgg', pretrained=True).state_dict()


@pytest.fixture(params=['model.safetensors', 'pytorch_model.bin'])
def index(request, state_dict, tmp_path):
    """An index and two files, as huggingface_hub and accelerate write them."""
    stem, suffix = request.param.rsplit('.', 1)
    places = {}
    for number, keys in enumerate([list(state_dict)[:50], list(state_dict)[50:]], start=1):
        name = f'{stem}-0000{number}-of-00002.{suffix}'
        part = {key: state_dict[key] for key in keys}
        save_file(part, tmp_path / name) if suffix == 'safetensors' else torch.save(part, tmp_path / name)
        places |= dict.fromkeys(keys, name)
    path = tmp_path / f'{request.param}.index.json'
    path.write_text(json.dumps({'metadata': {'total_size': 1}, 'weight_map': places}))
    return path


@FORMS
def test_load_index_or_its_folder(index, state_dict, deploy):
    for source in (index, index.parent):
        loaded = load_checkpoint(timm.create_model('test_repvgg', deploy=deploy), source)
        assert torch.equal(loaded.state_dict()['head.fc.weight'], state_dict['head.fc.weight'])


@pytest.mark.parametrize(
    ('change', 'match'),
    [
        (lambda index: '{}', 'no index of weights'),
        (lambda index: '[', 'no index of weights'),
        (lambda index: index.replace('00002-of', '00003-of'), 'files that are not there: .*00003-of-00002'),
        (lambda index: index.replace('"stem', '"gone.stem', 1), 'lack gone.stem'),
        (lambda index: index.replace(': "', ': "../', 2), 'not in its folder: \\.\\./'),
    ],
)
def test_load_wrong_index_raises(index, change, match):
    index.write_text(change(index.read_text()))
    with pytest.raises(CheckpointError, match=match):
        load_checkpoint(timm.create_model('test_repvgg'), index)
