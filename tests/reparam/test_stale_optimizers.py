"""Optimizers after a switch: an error where they would train nothing, and no error where they train."""

import copy

import pytest
import torch
from helpers import create_model, images, to_device
from torch import nn

import repvgg_zoo
from repvgg_zoo import switch_to_deploy

pytestmark = pytest.mark.device


def test_step_frozen_parameters_were_replaced_trains_the_head():
    model = create_model('test_repvgg', num_classes=3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith('head')
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.eval().switch_to_deploy()
    before = model.head.fc.weight.clone()
    model(images(4, 32)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, model.head.fc.weight)


def test_step_some_trained_parameters_were_replaced_raises():
    model = create_model('test_repvgg')
    model.stem.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.eval().switch_to_deploy()
    model(images(1, 32)).sum().backward()
    trained = 10 * 8 - 2 * (1 + 1 + 1)  # kernels, γ and β of ten blocks, two of them without identity
    with pytest.raises(RuntimeError, match=r'^\d+ of the \d+ parameters of this SGD were replaced') as caught:
        optimizer.step()
    assert 0 < int(str(caught.value).split()[0]) <= trained


def test_step_parameters_that_another_model_uses_trains():
    """A block that two modules hold, of which one was switched by a copy of its container."""
    block = to_device(repvgg_zoo.RepVGGBlock(3, 8))
    branches = nn.ModuleList([block.conv_kxk, block.conv_1x1])
    optimizer = torch.optim.SGD(branches.parameters(), 0.1)
    block.eval().switch_to_deploy()
    before = copy.deepcopy(branches.state_dict())
    x = images(2, 8)
    sum(branch.train()(x) for branch in branches).square().sum().backward()
    optimizer.step()
    assert not torch.equal(branches[0].bn.weight, before['0.bn.weight'])


def test_step_gradient_from_before_the_switch_raises():
    """It is no sign of use."""
    model = create_model('test_repvgg').train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(images(2, 32)).sum().backward()
    switch_to_deploy(model.eval())
    with pytest.raises(RuntimeError, match='were replaced by switch_to_deploy'):
        optimizer.step()


def test_step_after_a_copy_was_switched_trains():
    model = create_model('test_repvgg')
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    switch_to_deploy(copy.deepcopy(model).eval())
    model(images(2, 32)).sum().backward()
    optimizer.step()
