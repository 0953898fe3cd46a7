"""Other devices where there is none: each tensor is made where the model is, and of a dtype that the device has.

Fake tensors have no values, a pretended device has some and no backward pass, and with another default device all runs
as ever, except what is made without `device=`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
from helpers import block_params, randomise, rel_diff
from pretended_device import pretended_device
from timm.layers import BatchNormAct2d, SEModule
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import repvgg_zoo
from repvgg_zoo import (
    BLOCKS,
    VARIANTS,
    CheckpointError,
    FoldError,
    RepVGG,
    RepVGGBlock,
    load_checkpoint,
    match_bn_statistics,
    rep_optimizer,
    unfold,
)
from repvgg_zoo.blocks.base import ReparamBlock
from repvgg_zoo.blocks.factory import block_type
from repvgg_zoo.blocks.unfold import unfold_state_dict
from repvgg_zoo.checkpoints import contents
from repvgg_zoo.reparam import fold
from repvgg_zoo.reparam.comparison import check_equal

pytestmark = pytest.mark.filterwarnings('ignore:.*non-leaf Tensor')
BLOCK = pytest.mark.parametrize('name', block_params(BLOCKS))
OPTIONS = [
    dict(),
    dict(dilation=2, groups=2),
    dict(attn_layer=SEModule, stride=2),
    dict(padding_mode='reflect', attn_layer=SEModule, attn_last=True),
]
NEAR = 1e-5
"""Some ten roundings of float32."""


def image(count: int, px: int, chs: int) -> Tensor:
    return torch.randn(count, chs, px, px, generator=torch.Generator().manual_seed(1), device='cpu')


def tensors(module: nn.Module) -> Iterable[Tensor]:
    return (*module.parameters(), *module.buffers())


def assert_all_on(kind: str, found: nn.Module | Iterable[Tensor]) -> None:
    found = tensors(found) if isinstance(found, nn.Module) else found
    assert {t.device.type for t in found} == {kind}


# ---------------------------------------------------------------------------------------------- fake tensors


@BLOCK
@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_block_made_on_a_fake_device_stays_there(name, options):
    with FakeTensorMode(allow_non_fake_inputs=True):  # timm and we make norms on the meta device to ask for their eps
        made = block_type(name)(8, 8, device='cuda', **options)
        x = torch.empty(2, 8, 33, 33, device='cuda')
        assert_all_on('cuda', made)
        assert_all_on('cuda', [made.train()(x), made.eval()(x), *made.equivalent_kernel_bias()])
        assert_all_on('cuda', made.folded_conv())
        deployed = block_type(name)(8, 8, device='cuda', deploy=True, **options)
        assert_all_on('cuda', [deployed(x), *deployed.equivalent_kernel_bias(torch.float64)])
        assert_all_on('cuda', unfold(deployed, block=name))


@pytest.mark.parametrize('name', ['repvgg_b1g4', 'repvgg_d2se', 'repvggplus_l2pse'])
def test_model_moved_to_a_fake_device_stays_there(name, monkeypatch):
    heads = dict(aux_heads=True) if name == 'repvggplus_l2pse' else {}
    variant = replace(VARIANTS[name], depths=(1, 1, 2, 1), width=(0.25,) * 4)
    made = RepVGG(variant, device='meta', **heads)
    with FakeTensorMode(allow_non_fake_inputs=True):
        made.to_empty(device='cuda')
        x = torch.empty(2, 3, 64, 64, device='cuda')
        logits = made.train()(x)
        assert_all_on('cuda', (logits[0], *logits[1]) if heads else (logits,))
        assert_all_on('cuda', [made.eval()(x), *made.forward_intermediates(x)[1]])
        monkeypatch.setattr(ReparamBlock, 'check_foldable', lambda _: None)  # it reads values
        assert_all_on('cuda', [*tensors(made.switch_to_deploy()), made(x)])
        assert_all_on('cuda', unfold(made, block='acb'))


# ----------------------------------------------------------------------------------------- a pretended device


@pytest.fixture(params=[True, False], ids=['with float64', 'without float64'])
def elsewhere(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(fold, '_WITHOUT_FLOAT64', ('cuda',))
    with pretended_device(float64=request.param) as device:
        yield device


def test_pretended_device_refuses_what_a_device_refuses():
    """Or nothing here would be tested."""
    with pretended_device(float64=False) as device:
        x = torch.ones(2, device=device)
        assert (x + 1).cpu().tolist() == [2, 2]
        with pytest.raises(RuntimeError, match='tensors of two devices'):
            x + torch.ones(2)
        for convert in (
            lambda: x.double(),
            lambda: x.to('cpu', torch.float64),
            lambda: torch.ones(2).double().to(device),
        ):
            with pytest.raises(TypeError, match='no float64'):
                convert()
        assert x.cpu().double().tolist() == [1, 1]


@BLOCK
@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_block_on_a_device_switches_and_unfolds_to_the_same(name, options, elsewhere):
    with torch.no_grad():
        made = randomise(block_type(name)(8, 8, **options), px=11, in_chans=8)
        x = image(2, 9, 8)
        expected = made(x)
        made, there = made.to(elsewhere), x.to(elsewhere)
        assert rel_diff(made(there), expected) < NEAR
        kernel, bias = made.equivalent_kernel_bias()
        made.switch_to_deploy(verify=there)
        assert rel_diff(made.reparam_conv.weight, kernel) < NEAR
        assert rel_diff(made.reparam_conv.bias, bias) < NEAR
        assert rel_diff(made(there), expected) < NEAR
        again = unfold(made, block=name, batches=[there, x])
        assert rel_diff(again(there), expected) < 10 * NEAR  # the noise is taken off the first branch again
        assert_all_on('cuda', again)


def test_switch_a_block_that_needs_proof_on_a_device_folds(elsewhere):
    with torch.no_grad():
        made = randomise(RepVGGBlock(8, 8, norm_layer=partial(BatchNormAct2d, apply_act=False)), px=11, in_chans=8)
        made.conv_kxk.register_forward_hook(lambda *_: None)
        x = image(2, 9, 8)
        expected = made(x)
        assert rel_diff(made.to(elsewhere).switch_to_deploy()(x.to(elsewhere)), expected) < NEAR


def test_switch_of_timms_model_on_a_device_folds(elsewhere):
    with torch.no_grad():
        made = randomise(timm.models.byobnet.repvgg_a0().stages[0], px=11, in_chans=48)
        x = image(2, 9, 48)
        expected = made(x)
        folded = repvgg_zoo.switch_to_deploy(made.to(elsewhere), verify=x.to(elsewhere))
        assert rel_diff(folded(x.to(elsewhere)), expected) < NEAR


@pytest.mark.parametrize('options', [dict(), dict(deploy=True)], ids=str)
def test_load_onto_a_device_gives_the_same(options, elsewhere, monkeypatch):
    monkeypatch.setattr(contents, '_is_plain', lambda tensor: True)  # a class of its own
    with torch.no_grad():
        source = timm.create_model('test_repvgg', pretrained=True).eval()
        x = image(2, 32, 3)
        expected = source(x)
        made = timm.create_model('test_repvgg', pretrained=True, device=elsewhere, **options).eval()
        assert_all_on('cuda', made)
        assert rel_diff(made(x.to(elsewhere)), expected) < 10 * NEAR  # ten layers
        made.reset_classifier(7)
        made.reset_classifier(5, 'catavgmax')
        assert_all_on('cuda', made)
        made.head = nn.Identity()
        made.reset_classifier(4)
        assert_all_on('cuda', made)


def test_unfold_state_dict_of_the_cpu_for_a_model_on_a_device_gives_the_same(elsewhere):
    with torch.no_grad():
        source = timm.create_model('test_repvgg.cifar10_deploy', pretrained=True).eval()
        x = image(2, 32, 3)
        expected = source(x)
        made = timm.create_model('test_repvgg', num_classes=10, block='dbb', device=elsewhere).eval()
        unfolded = unfold_state_dict(made, source.state_dict(), what='test_repvgg')
        assert_all_on('cuda', (value for key, value in unfolded.items() if 'branches' in key))
        again = timm.create_model('test_repvgg', num_classes=10, block='dbb').eval()
        again.load_state_dict({key: value.cpu() for key, value in unfolded.items()})
        assert rel_diff(again(x), expected) < 10 * NEAR


def test_reset_classifier_with_auxiliary_heads_on_a_device_makes_them_there(elsewhere):
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

    made = timm.create_model('test_repvgg', num_classes=3, device=elsewhere)
    made.aux_heads = nn.ModuleList([Head()]).to(elsewhere)
    made.reset_classifier(5)
    assert made.aux_heads[0].fc.out_features == 5
    assert_all_on('cuda', made)


def test_load_state_dict_of_a_device_into_the_deploy_form_folds(elsewhere):
    with torch.no_grad():
        made = randomise(block_type('csla')(8, 8), px=11, in_chans=8)
        x = image(2, 9, 8)
        expected = made(x)
        deployed = block_type('csla')(8, 8, deploy=True, device=elsewhere).eval()
        deployed.load_state_dict(made.to(elsewhere).state_dict())
        assert rel_diff(deployed(x.to(elsewhere)), expected) < NEAR


def test_match_bn_statistics_on_a_device_takes_batches_of_the_cpu(elsewhere):
    with torch.no_grad():
        made = block_type('repvgg')(8, 8).eval()
        x = image(4, 9, 8)
        expected = copy.deepcopy(made)
        match_bn_statistics(expected, [x[:2], x[2:]])
        match_bn_statistics(made.to(elsewhere), [x[:2], x[2:]])
        for key, value in made.state_dict().items():
            assert rel_diff(value, expected.state_dict()[key]) < NEAR, key


@pytest.mark.parametrize('kind', [torch.optim.SGD, torch.optim.AdamW])
def test_rep_optimizer_on_a_device_steps_as_on_the_cpu(kind, elsewhere):
    """With the scales on either device."""
    torch.manual_seed(0)
    like = block_type('csla')(8, 8)
    kernels = []
    for device, device_of_like in (('cpu', 'cpu'), (elsewhere, 'cpu'), (elsewhere, elsewhere)):
        made = block_type('plain')(8, 8).to(device)
        optimizer = kind(made.parameters(), lr=0.1, foreach=False)
        rep_optimizer(optimizer, made, copy.deepcopy(like).to(device_of_like))
        for parameter in made.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        kernels.append(made.branches['kxk'].conv.weight.detach())
    assert rel_diff(kernels[1], kernels[0]) < NEAR
    assert rel_diff(kernels[2], kernels[0]) < NEAR


# ------------------------------------------------------------------------------------ another default device


@BLOCK
@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_block_with_another_default_device_computes_the_same(name, options):
    """What is made without `device=` is on the meta device then, and meets tensors of the CPU."""
    results = []
    for context in (nullcontext(), torch.device('meta')):
        with context:
            torch.manual_seed(0)
            made = randomise_here(block_type(name)(8, 8, device='cpu', **options))
            assert_all_on('cpu', made)
            x = image(2, 41, 8).requires_grad_()  # enough pixels to fold
            with torch.no_grad():
                outputs = [made.eval()(x)]
            y = made.train()(x)
            y.square().sum().backward()
            outputs += [y.detach(), x.grad, *made.eval().equivalent_kernel_bias()]
            next(iter(made.named_branches().values())).register_forward_hook(
                lambda *_: None
            )  # the fold has to prove it
            made.switch_to_deploy(verify=x.detach())
            outputs.append(made(x.detach()))
            again = unfold(made, block=name, batches=[x.detach()], generator=torch.Generator().manual_seed(0))
            outputs.append(again(x.detach()))
            results.append([t.detach() for t in outputs])
    assert_all_on('cpu', results[1])
    assert all(rel_diff(found, expected) < NEAR for found, expected in zip(*reversed(results), strict=True))


@torch.no_grad()
def randomise_here(made: nn.Module) -> nn.Module:
    for norm in (m for m in made.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return made


def test_load_with_another_default_device_gives_the_same(tmp_path):
    source = timm.create_model('test_repvgg', pretrained=True).eval()
    weights = {key: value for key, value in source.state_dict().items() if 'num_batches' not in key}
    torch.save(weights, tmp_path / 'file.pth')
    for kwargs in (dict(), dict(deploy=True)):
        made = timm.create_model('test_repvgg', num_classes=10, **kwargs).eval()
        with torch.device('meta'):
            load_checkpoint(made, tmp_path / 'file.pth')
        assert_all_on('cpu', made)
        assert rel_diff(made(image(1, 32, 3)), source(image(1, 32, 3))) < NEAR


@pytest.mark.parametrize(('kind', 'raises'), [('cpu', True), ('cuda', False)])
def test_switch_verify_bound_of_float32_is_that_of_tf32_on_cuda(kind, raises):
    """cuDNN rounds to TF32: outputs of both forms may differ by some thousandths."""
    outputs = [torch.ones(2), torch.tensor([1.0, 1.003])]
    with pretended_device():
        before, after = (t.to(kind) for t in outputs)
        with pytest.raises(FoldError, match=r'differs by 0\.003') if raises else nullcontext():
            check_equal([before], [after], names=('before', 'after'))


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is the device')
@pytest.mark.parametrize('device', [0, 'cuda'])
def test_load_onto_a_missing_device_gives_its_own_error(device):
    with pytest.raises((RuntimeError, AssertionError), match=r'NVIDIA|CUDA') as raised:
        timm.create_model('test_repvgg', pretrained=True, device=device)
    assert not isinstance(raised.value, CheckpointError)  # the file is right
