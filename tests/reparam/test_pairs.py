from __future__ import annotations

import weakref

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from repvgg_zoo.reparam.pairs import _Readers, conv_norm_pairs, sample_of, uses_of_convs


class _Net(nn.Module):
    """A convolution, a norm and an unused norm between them in the order of the modules."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.conv, self.other, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


PIXELS = torch.ones(1, 3, 6, 6)


def test_conv_norm_pairs_finds_the_norm_that_is_called_not_the_next_module():
    assert conv_norm_pairs(_Net(lambda m, x: F.relu(m.norm(m.conv(x)))), PIXELS) == {'conv': 'norm'}


@pytest.mark.parametrize(
    'forward',
    [
        lambda m, x: (y := m.conv(x)) + m.norm(y),
        lambda m, x: m.norm(y := m.conv(x)) + y.detach().mean(),
        lambda m, x: (m.norm(y := m.conv(x)), y),
        lambda m, x: {'features': [y := m.conv(x)], 'logits': m.norm(y)},
        lambda m, x: m.norm(m.conv(x).relu_()),
        lambda m, x: m.norm(m.conv(x)) + m.other(m.conv(x)),
        lambda m, x: m.norm(m.norm(m.conv(x))),
        lambda m, x: m.other(y := m.conv(x)) + m.norm(y),
        lambda m, x: m.conv(x),
    ],
    ids=['sum', 'detached', 'returned', 'in-a-mapping', 'in-place', 'twice', 'norm-twice', 'two-norms', 'no-norm'],
)
def test_conv_norm_pairs_other_reader_is_no_pair(forward):
    assert conv_norm_pairs(_Net(forward), PIXELS) == {}


def test_conv_norm_pairs_of_one_kernel_at_two_places_are_none():
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    assert conv_norm_pairs(net, torch.ones(1, 3, 8, 8)) == {'0': '1', '2': '3'}
    net[2].weight = net[0].weight
    assert conv_norm_pairs(net, torch.ones(1, 3, 8, 8)) == {}
    assert [use.shared_with for use in uses_of_convs(net, torch.ones(1, 3, 8, 8))] == ['2', '0']


def test_uses_of_convs_tells_calls_and_readers_of_the_kernel():
    net = _Net(lambda m, x: m.norm(F.conv2d(x, m.conv.weight)))
    (use,) = uses_of_convs(net, PIXELS)
    assert use.calls == 0
    assert use.norm is None
    assert 'convolution' in use.kernel_reader


def test_uses_of_convs_leaves_mode_statistics_and_hooks():
    net = _Net(lambda m, x: m.norm(m.conv(x))).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    uses_of_convs(net, PIXELS)
    assert net.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not net.conv._forward_hooks
    assert not net.conv._forward_pre_hooks


def test_uses_of_convs_takes_several_arguments():
    net = _Net(lambda m, x: m.norm(m.conv(x)))
    net.run = lambda m, x, scale: m.norm(m.conv(x * scale))
    net.forward = lambda x, scale: net.run(net, x, scale)
    assert [use.norm for use in uses_of_convs(net, (PIXELS, 2.0))] == ['norm']
    assert [use.norm for use in uses_of_convs(net, {'x': PIXELS, 'scale': 2.0})] == ['norm']


@pytest.mark.parametrize(
    ('name', 'spatial', 'paired'),
    [('resnet18', 17, 17), ('efficientnet_b0', 17, 17), ('repvit_m0_9', 28, 28), ('convnext_atto', 16, 0)],
)
def test_uses_of_convs_of_timm_networks_finds_every_pair(name, spatial, paired):
    uses = uses_of_convs(timm.create_model(name), torch.ones(1, 3, 64, 64))
    uses = [use for use in uses if max(use.conv.kernel_size) > 1]
    assert (len(uses), sum(use.norm is not None for use in uses)) == (spatial, paired)


@pytest.mark.parametrize(
    ('make', 'shape'),
    [
        (lambda: timm.create_model('test_resnet'), (1, 3, 160, 160)),
        (lambda: timm.create_model('test_resnet', in_chans=5), (1, 5, 160, 160)),
        (lambda: timm.create_model('test_repvgg', in_chans=1), (1, 1, 32, 32)),
        (lambda: timm.create_model('csatv2'), (1, 3, 512, 512)),  # its first convolution does not read the image
        (lambda: timm.create_model('tresnet_m', in_chans=1), (1, 1, 224, 224)),  # 16 channels of blocks of pixels
        (lambda: nn.Sequential(nn.Conv2d(7, 4, 3)), (1, 7, 64, 64)),
    ],
)
def test_sample_of_has_the_channels_and_size_of_the_model(make, shape):
    assert sample_of(make()).shape == shape


def test_sample_of_without_convolutions_raises():
    with pytest.raises(ValueError, match='no convolution in Linear'):
        sample_of(nn.Linear(2, 2))


def test_uses_of_computed_kernels_are_their_own():
    """A computed kernel is a new tensor each time, and another one may get its id."""
    net = nn.Sequential(*(weight_norm(nn.Conv2d(3, 3, 1)) for _ in range(20)), nn.BatchNorm2d(3))
    for use in uses_of_convs(net, PIXELS):
        assert (use.shared_with, use.kernel_reader) == (None, None)


def test_kernels_that_are_looked_for_are_held():
    kernel = torch.ones(1)
    is_alive = weakref.ref(kernel)
    readers = _Readers({'conv': kernel})
    del kernel
    assert is_alive() is not None
    readers.read(is_alive(), 'reader')
    assert readers.kernel_readers == {'conv': 'reader'}
