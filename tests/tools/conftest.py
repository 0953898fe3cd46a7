"""A model of unusual sizes, and a training checkpoint of it as a file."""

import pytest
import timm
import torch
from helpers import randomise


@pytest.fixture
def model():
    return randomise(timm.create_model('test_repvgg', num_classes=7, in_chans=4), px=32, in_chans=4)


@pytest.fixture
def checkpoint(model, tmp_path):
    torch.save(
        {'state_dict': {f'module.{key}': value for key, value in model.state_dict().items()}}, tmp_path / 'c.pth'
    )
    return tmp_path / 'c.pth'
