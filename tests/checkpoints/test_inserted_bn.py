"""The deploy form with a normalisation behind each convolution, as the official `insert_bn.py` saves it."""

import pytest
import timm
import torch
from helpers import FORMS, OFFICIAL, images, randomise, rel_diff, rename
from torch import nn

from repvgg_zoo import CheckpointError, load_checkpoint


@pytest.fixture
def network():
    """A model of the deploy form with a normalisation behind each of its convolutions."""
    model = timm.create_model('test_repvgg', deploy=True)
    for block in (model.stem, *(block for stage in model.stages for block in stage)):
        conv = block.reparam_conv
        norm = nn.BatchNorm2d(conv.out_channels)
        block.reparam_conv = nn.Sequential()
        conv.bias = None
        block.reparam_conv.add_module('conv', conv)
        block.reparam_conv.add_module('bn', norm)
    return randomise(model, px=32)


@pytest.mark.parametrize('table', [OFFICIAL, []], ids=['official', 'timm'])
def test_load_inserted_bn_is_folded(network, table, tmp_path):
    torch.save(rename(network.state_dict(), table), tmp_path / 'x.pth')
    loaded = load_checkpoint(timm.create_model('test_repvgg', deploy=True), tmp_path / 'x.pth').eval()
    x = images(2, px=32)
    assert rel_diff(loaded(x), network(x)) < 1e-5  # float32
    again = timm.create_model('test_repvgg', deploy=True).eval()
    again.load_state_dict(rename(network.state_dict(), table))
    assert torch.equal(again(x), loaded(x))


@FORMS
def test_load_inserted_bn_of_half_precision_is_folded_wide(network, deploy, tmp_path):
    half = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    torch.save(half, tmp_path / 'x.pth')
    network.load_state_dict(half)
    model = timm.create_model('test_repvgg', deploy=deploy)
    loaded = load_checkpoint(model, tmp_path / 'x.pth', unfold=not deploy).eval()
    assert rel_diff(loaded(images(px=32)), network(images(px=32))) < 1e-4


def test_load_inserted_bn_out_of_range_raises(network, tmp_path):
    state_dict = network.state_dict()
    state_dict['stem.reparam_conv.bn.running_var'][1] = -1
    torch.save(state_dict, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=r'stem\.reparam_conv\.bn\.running_var holds variances below 0'):
        load_checkpoint(timm.create_model('test_repvgg', deploy=True), tmp_path / 'x.pth')
    state_dict['stem.reparam_conv.bn.running_var'][1] = 1
    del state_dict['stem.reparam_conv.bn.weight']
    torch.save(state_dict, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=r'incomplete: stem\.reparam_conv\.bn\.weight is missing'):
        load_checkpoint(timm.create_model('test_repvgg', deploy=True), tmp_path / 'x.pth')
