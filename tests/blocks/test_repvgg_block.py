import pytest
import torch
from helpers import CONFIGURATIONS, images, randomise, rel_diff, run_branches, to_device
from torch import nn

from repvgg_zoo import CheckpointError, FoldError, RepVGGBlock, switch_to_deploy
from repvgg_zoo.blocks.branches import SubsampledConv2d
from repvgg_zoo.blocks.factory import block_type

pytestmark = pytest.mark.device


def block(*args, **kwargs) -> RepVGGBlock:
    return randomise(RepVGGBlock(*args, **kwargs).double(), px=11, in_chans=args[0])


@pytest.mark.parametrize('kwargs', CONFIGURATIONS, ids=str)
@pytest.mark.parametrize('px', [10, 11])
def test_switch_repvgg_block_keeps_the_outputs(kwargs, px):
    module, x = block(8, 8, **kwargs), images(px=px, in_chans=8, dtype=torch.float64)
    before = module(x)
    assert module.switch_to_deploy() is module
    assert rel_diff(module(x), before) < 1e-12


@pytest.mark.parametrize('kwargs', CONFIGURATIONS, ids=str)
def test_load_state_dict_training_weights_into_deploy_form_folds(kwargs):
    module, x = block(8, 8, **kwargs), images(px=11, in_chans=8, dtype=torch.float64)
    deployed = to_device(RepVGGBlock(8, 8, deploy=True, **kwargs).double()).eval()
    deployed.load_state_dict(module.state_dict())
    assert rel_diff(deployed(x), module(x)) < 1e-12
    assert deployed.state_dict().keys() == module.switch_to_deploy().state_dict().keys()
    assert repr(deployed.reparam_conv) == repr(module.reparam_conv)


@pytest.mark.cpu
@pytest.mark.parametrize('name', ['repvgg', 'acb'])
@pytest.mark.parametrize('shape', [(8, 9, 1), (8, 8, 2)])
def test_block_identity_with_other_shape_raises(name, shape):
    in_chs, out_chs, stride = shape
    with pytest.raises(ValueError, match=f'here are 8 to {out_chs} channels and stride {stride}'):
        block_type(name)(in_chs, out_chs, stride=stride, identity=True)


def test_switch_sync_batch_norm_keeps_the_outputs():
    module, x = nn.Sequential(block(4, 4)), images(px=8, in_chans=4, dtype=torch.float64)
    before = module(x)
    module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    assert isinstance(module[0].identity, nn.SyncBatchNorm)
    assert rel_diff(switch_to_deploy(module)(x), before) < 1e-12


@pytest.mark.cpu
def test_block_that_changes_shape_has_no_identity():
    keeps_shape, strided, widens = RepVGGBlock(4, 4), RepVGGBlock(4, 4, stride=2), RepVGGBlock(4, 8)
    assert keeps_shape.identity is not None
    assert strided.identity is None
    assert widens.identity is None


@pytest.mark.cpu
def test_load_state_dict_deploy_weights_into_training_form_raises():
    deployed = RepVGGBlock(4, 4, deploy=True)
    with pytest.raises(CheckpointError, match='deploy=True'):
        RepVGGBlock(4, 4).load_state_dict(deployed.state_dict())


def test_block_channels_last_stem_gives_finite_gradients():
    """A strided 1x1 convolution over three channels_last channels corrupts memory in its backward pass."""
    stem = to_device(RepVGGBlock(3, 48, stride=2)).to(memory_format=torch.channels_last)
    x = images(8, 64).contiguous(memory_format=torch.channels_last)
    for _ in range(3):
        stem(x).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in stem.parameters())
    assert type(stem.conv_1x1.conv) is SubsampledConv2d


@pytest.mark.parametrize(
    ('in_chs', 'stride', 'kind'), [(3, 1, nn.Conv2d), (15, 2, SubsampledConv2d), (16, 2, nn.Conv2d)]
)
def test_block_strided_1x1_of_few_channels_is_subsampled(in_chs, stride, kind):
    """The workaround is for the shape that needs it."""
    conv = to_device(RepVGGBlock(in_chs, 8, stride=stride).double()).conv_1x1.conv
    assert type(conv) is kind
    x = images(2, 7, in_chans=in_chs, dtype=torch.float64)
    expected = nn.functional.conv2d(x, conv.weight, stride=stride)
    assert rel_diff(conv(x), expected) < 1e-14


@pytest.mark.parametrize('px', [32, 33])
def test_block_strides_set_by_hand_keeps_the_outputs(px):
    """All convolutions alike, as segmentation recipes do it; of the stem too."""
    for in_chs in (3, 16):
        made, x = randomise(RepVGGBlock(in_chs, 8, stride=2).double(), px=16, in_chans=in_chs), None
        for conv in (m for m in made.modules() if isinstance(m, nn.Conv2d)):
            conv.stride = (1, 1)
        x = images(2, px, in_chans=in_chs, dtype=torch.float64)
        before = made.train()(x)
        assert before.shape == (2, 8, px, px)
        before = made.eval()(x)
        assert rel_diff(before, run_branches(lambda: made(x))) < 1e-12  # noqa: B023
        assert rel_diff(made.switch_to_deploy()(x), before) < 1e-12


@pytest.mark.cpu
def test_switch_one_stride_set_by_hand_raises():
    made = RepVGGBlock(16, 16, stride=2)
    made.conv_kxk.conv.stride = (1, 1)
    with pytest.raises(FoldError, match=r'the stride of conv_kxk is \(1, 1\), that of conv_1x1 is \(2, 2\)'):
        made.switch_to_deploy()
