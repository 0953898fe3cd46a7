"""Batch normalisation folded into the convolutions of any network."""

import copy
import logging

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import images, randomise, rel_diff
from timm.layers import BatchNormAct2d, StdConv2d
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torchvision.ops import FrozenBatchNorm2d

from repvgg_zoo import FoldError, RepVGGBlock, switch_to_deploy
from repvgg_zoo.reparam import comparison

NORMS_LEFT = {
    'test_byobnet': 0,
    'test_efficientnet': 0,
    'test_resnet': 0,
    'repghostnet_050': 0,
    'tf_mobilenetv3_small_minimal_100': 0,
}
"""Of norms that read something else than one convolution."""
EXHAUSTIVE = {
    'lcnetv2_small': 0,
    'mobilenetv3_small_050': 0,
    'tf_efficientnet_b0': 0,
    'densenet121': 62,
    'dla34': 0,
    'fastvit_t8': 0,
    'ghostnetv3_050': 0,
    'hrnet_w18_small': 0,
    'nextvit_small': 1,
    'res2net50_14w_8s': 0,
    'resnetv2_50': 17,
    'skresnet18': 0,
    'vgg11_bn': 0,
    'xception41': 0,
}


def count_norms(module: nn.Module) -> int:
    return sum(hasattr(m, 'running_var') for m in module.modules())


@pytest.fixture
def x():
    return images(2, dtype=torch.float64)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    second = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=4), BatchNormAct2d(8, act_layer=nn.SiLU))
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), second)
    return randomise(net.double())


@pytest.mark.parametrize(
    ('name', 'left'),
    [*NORMS_LEFT.items(), *(pytest.param(*item, marks=pytest.mark.exhaustive) for item in EXHAUSTIVE.items())],
)
def test_conv_bn_of_networks_folds_exactly(name, left, x):
    model = randomise(timm.create_model(name).double())
    before, parameters = model(x), sum(p.numel() for p in model.parameters())
    assert switch_to_deploy(model, conv_bn=True) is model
    assert count_norms(model) == left
    assert rel_diff(model(x), before) < 1e-12
    assert sum(p.numel() for p in model.parameters()) < parameters
    modules = list(model.modules())
    switch_to_deploy(model, conv_bn=True, sample=x)
    switch_to_deploy(model)
    assert modules == list(model.modules())


def test_conv_bn_keeps_names_activations_and_flags(x):
    net = small()
    before, kernels = net(x), [net[0], net[3][0]]
    net[0].requires_grad_(False)
    net.train()
    net[3].eval()
    switch_to_deploy(net, conv_bn=True, verify=x)
    assert [net[0], net[3][0]] == kernels
    assert type(net[1]) is nn.Identity
    assert [name for name, _ in net[3][1].named_children()] == ['act']
    assert [p.requires_grad for p in net.parameters()] == [False, False, True, True]
    assert [net[1].training, net[3][1].training, net[0].training] == [True, False, True]
    assert rel_diff(net.eval()(x), before) < 1e-12


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_conv_bn_in_less_precision_rounds_once(dtype, x):
    net = small().to(dtype).to(memory_format=torch.channels_last)
    exact = switch_to_deploy(copy.deepcopy(net).double(), conv_bn=True, sample=x)
    switch_to_deploy(net, conv_bn=True, sample=x.to(dtype))
    assert all(torch.equal(p, q.to(dtype)) for p, q in zip(net.parameters(), exact.parameters(), strict=True))
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_conv_bn_that_fails_verification_is_undone(x, monkeypatch):
    net = small()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    modules, state, parameters = list(net.modules()), copy.deepcopy(net.state_dict()), list(net.parameters())
    monkeypatch.setattr(comparison, 'max_rel_diff', lambda *_: -1)
    with pytest.raises(FoldError, match='the deploy form differs'):
        switch_to_deploy(net, conv_bn=True, verify=x)
    assert list(net.modules()) == modules
    assert all(p is q for p, q in zip(net.parameters(), parameters, strict=True))
    assert net[0].bias is None
    assert all(torch.equal(net.state_dict()[key], value) for key, value in state.items())
    optimizer.step()
    monkeypatch.undo()
    switch_to_deploy(net, conv_bn=True, verify=x)
    with pytest.raises(RuntimeError, match='were replaced by'):
        optimizer.step()


class TwoReaders(nn.Module):
    """The order of modules says that the norm is that of the second convolution, and it is not."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(self.first(x)) + self.second(x)


def test_conv_bn_pairs_are_those_of_the_computation(x):
    net = randomise(TwoReaders().double())
    before, second = net(x), net.second.weight.detach().clone()
    switch_to_deploy(net, conv_bn=True, sample=x)
    assert torch.equal(net.second.weight, second)
    assert rel_diff(net(x), before) < 1e-12


class KernelIsReadTwice(TwoReaders):
    def forward(self, x):
        return self.norm(self.first(x)) + F.conv2d(x, self.first.weight)


def test_conv_bn_of_a_kernel_that_is_read_elsewhere_is_left(x):
    net = randomise(KernelIsReadTwice().double())
    before = net(x)
    switch_to_deploy(net, conv_bn=True, sample=x)
    assert count_norms(net) == 1
    assert torch.equal(net(x), before)


@pytest.mark.parametrize(
    'make', [lambda: StdConv2d(3, 8, 3), lambda: weight_norm(nn.Conv2d(3, 8, 3))], ids=['standardised', 'computed']
)
def test_conv_bn_of_computed_kernels_is_left(make, x, caplog):
    net = nn.Sequential(make(), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    randomise(net.double())
    before = net(x)
    with caplog.at_level(logging.INFO, logger='repvgg_zoo'):
        switch_to_deploy(net, conv_bn=True, sample=x)
    assert '0 and 1 are left as they are' in caplog.text
    assert count_norms(net) == 1
    assert rel_diff(net(x), before) < 1e-12


def test_conv_bn_frozen_norms_fold(x):
    net = small()
    frozen = FrozenBatchNorm2d(8).double()
    frozen.load_state_dict({k: v for k, v in net[1].state_dict().items() if k != 'num_batches_tracked'})
    net[1] = frozen
    before = net(x)
    switch_to_deploy(net, conv_bn=True, sample=x)
    assert count_norms(net) == 0
    assert rel_diff(net(x), before) < 1e-12


def test_conv_bn_hooks_on_the_norm_still_fire(x):
    net, seen = small(), []
    net[1].register_forward_hook(lambda *a: seen.append(a[2]))
    net(x)
    switch_to_deploy(net, conv_bn=True, sample=x)
    net(x)
    assert rel_diff(seen[-1], seen[0]) < 1e-12


@pytest.mark.parametrize('given', ['sample', 'keywords', 'verify'])
def test_conv_bn_takes_any_input(given, x):
    net = small()
    options = {'sample': dict(sample=x), 'keywords': dict(sample={'input': x}), 'verify': dict(verify=x)}
    switch_to_deploy(net, conv_bn=True, **options[given])
    assert count_norms(net) == 0


def test_conv_bn_of_another_number_of_channels_needs_no_sample():
    model = timm.create_model('test_resnet', in_chans=1).eval()
    switch_to_deploy(model, conv_bn=True)
    assert count_norms(model) == 0


def test_conv_bn_without_an_input_runs_random_pixels():
    net = small()
    switch_to_deploy(net, conv_bn=True)
    assert count_norms(net) == 0


def test_conv_bn_sample_without_it_raises(x):
    with pytest.raises(ValueError, match='sample= is the input for conv_bn=True'):
        switch_to_deploy(small(), sample=x)


def test_conv_bn_bad_variance_raises_and_changes_nothing(x):
    net = small()
    net[3][1].running_var[2] = -1
    modules = list(net.modules())
    with pytest.raises(FoldError, match=r"cannot fold '3\.1' into '3\.0': running variance -1\.0 in channel 2"):
        switch_to_deploy(net, conv_bn=True, sample=x)
    assert list(net.modules()) == modules
    assert net[0].bias is None


def test_conv_bn_beside_blocks_folds_both(x):
    both = randomise(nn.Sequential(RepVGGBlock(3, 8), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)).double())
    before = both(x)
    switch_to_deploy(both, conv_bn=True, verify=x)
    assert count_norms(both) == 0
    assert rel_diff(both(x), before) < 1e-12


def test_conv_bn_of_layers_that_are_held_elsewhere_raises_and_changes_nothing(x):
    class HoldsAList(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
            self.layers = (self.conv, self.norm)

        def forward(self, pixels):
            return self.layers[1](self.layers[0](pixels))

    net = randomise(HoldsAList().double())
    before = net(x)
    with pytest.raises(FoldError, match='differs by'):
        switch_to_deploy(net.train(), conv_bn=True, sample=x)
    assert count_norms(net) == 1
    assert net.norm.training
    assert torch.equal(net.eval()(x), before)


def test_conv_bn_of_layers_with_hooks_is_left(x):
    net = small()
    seen = []
    net[0].register_forward_hook(lambda *_: seen.append(1))
    before = net(x)
    seen.clear()
    switch_to_deploy(net, conv_bn=True, sample=x)
    assert rel_diff(net(x), before) < 1e-12
    assert isinstance(net[1], nn.BatchNorm2d)
