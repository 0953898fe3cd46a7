"""Weight decay as the paper and the official code have it, and optimizers after a switch."""

import copy
import functools

import pytest
import torch
from helpers import create_model, images, official, randomise, to_device
from timm.optim import create_optimizer_v2
from torch import nn

import repvgg_zoo
from repvgg_zoo import equivalent_kernel_l2, load_checkpoint, param_groups, switch_to_deploy

pytestmark = pytest.mark.device


@pytest.fixture
def model():
    return create_model('test_repvgg')


def names_in(model, group):
    ids = {id(parameter) for parameter in group['params']}
    return {name for name, parameter in model.named_parameters() if id(parameter) in ids}


def test_param_groups_by_default_decay_kernels_and_identity_scales(model):
    decayed, others = param_groups(model)
    assert names_in(model, others) == {
        name for name, _ in model.named_parameters() if name.endswith('bias') or '.bn.' in name
    }
    assert {n for n, p in model.named_parameters() if p.ndim == 1} & names_in(model, decayed) == {
        name for name, _ in model.named_parameters() if name.endswith('identity.weight')
    }
    assert len(decayed['params']) + len(others['params']) == len(list(model.parameters()))
    model.stem.requires_grad_(False)
    assert not any(n.startswith('stem') for g in param_groups(model) for n in names_in(model, g))


def test_param_groups_given_to_timm_set_the_weight_decay(model):
    optimizer = create_optimizer_v2(model, 'sgd', lr=0.1, weight_decay=1e-4, param_group_fn=param_groups)
    assert [group['weight_decay'] for group in optimizer.param_groups] == [1e-4, 0]


def test_param_groups_without_decay_kernels_leaves_out_convolutions(model):
    decayed, _ = param_groups(model, decay_kernels=False)
    assert not any('conv' in name for name in names_in(model, decayed))
    assert 'head.fc.weight' in names_in(model, decayed)


@pytest.mark.cpu
def test_equivalent_kernel_l2_equals_the_official_one(tmp_path):
    from repvgg_pytorch.repvgg import RepVGGBlock as OfficialBlock

    theirs = randomise(official('repvgg_a0').double())
    torch.save(theirs.state_dict(), tmp_path / 'official.pth')
    ours = load_checkpoint(create_model('repvgg_a0').double(), tmp_path / 'official.pth')
    loss = sum(block.get_custom_L2() for block in theirs.modules() if isinstance(block, OfficialBlock))
    loss.backward()
    equivalent_kernel_l2(ours).backward()
    assert equivalent_kernel_l2(ours).item() == pytest.approx(loss.item(), rel=1e-12)
    expected = theirs.stage2[1].rbr_1x1.conv.weight.grad
    torch.testing.assert_close(ours.stages[1][1].conv_1x1.conv.weight.grad, expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match='no block with the two convolution branches of RepVGG in RepVGG'):
        equivalent_kernel_l2(ours.eval().switch_to_deploy())


def test_equivalent_kernel_l2_without_affine_equals_unit_scales():
    norm_layer = functools.partial(nn.BatchNorm2d, affine=False)
    model = create_model('test_repvgg', norm_layer=norm_layer).double()
    model_affine = create_model('test_repvgg').double()
    model_affine.load_state_dict(model.state_dict(), strict=False)
    assert equivalent_kernel_l2(model).item() == pytest.approx(equivalent_kernel_l2(model_affine).item(), rel=1e-12)


def step(model, optimizer):
    model(images(2, px=32)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize('opt', ['sgd', 'adamw', 'lookahead_adam'])
def test_step_after_switch_raises(model, opt):
    optimizer = create_optimizer_v2(model, opt, lr=0.01)
    step(model, optimizer)
    model.eval().switch_to_deploy()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r'parameters of this \w+ were replaced by switch_to_deploy'):
        step(model, optimizer)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    step(model, create_optimizer_v2(model, opt, lr=0.01))
    assert not torch.equal(model.stem.reparam_conv.weight, before['stem.reparam_conv.weight'])


def test_step_of_another_model_after_switch_works(model):
    other = to_device(nn.Linear(2, 2))
    optimizer = torch.optim.SGD([*other.parameters(), *copy.deepcopy(model).parameters()], lr=0.1)
    model.eval().switch_to_deploy()
    optimizer.step()


def test_step_after_undone_switch_works(model, monkeypatch):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monkeypatch.setattr('repvgg_zoo.reparam.comparison.max_rel_diff', lambda *_: -1)
    with pytest.raises(repvgg_zoo.FoldError):
        switch_to_deploy(model, verify=images(1, px=32))
    step(model, optimizer)


def test_switch_old_parameters_are_released(model):
    import gc
    import weakref

    kernel = weakref.ref(model.stem.conv_kxk.conv.weight)
    model.eval().switch_to_deploy()
    gc.collect()
    assert kernel() is None


def test_param_groups_other_block_type_decays_identity_scales():
    model = create_model('test_repvgg', block='no_1x1')
    decayed = {id(parameter) for parameter in param_groups(model)[0]['params']}
    block = model.stages[0][1]
    assert id(block.identity.bn.weight) in decayed
    assert id(block.branches['kxk'].bn.weight) not in decayed
    assert id(block.branches['kxk'].conv.weight) in decayed
