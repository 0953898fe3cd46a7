"""Training with the 1x1 branch computed again in the backward pass, against autograd through the branches."""

import copy

import pytest
import timm
import torch
from conftest import images, rel_diff
from test_branches import branches, taken  # noqa: F401
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from repvgg_zoo import RepVGGBlock

BLOCKS = {
    'identity': dict(in_chs=8, out_chs=8),
    'more channels': dict(in_chs=6, out_chs=10),
    'stride': dict(in_chs=6, out_chs=6, stride=2),
    'groups': dict(in_chs=8, out_chs=8, groups=2),
    'groups and stride': dict(in_chs=8, out_chs=12, groups=4, stride=2),
    'dilation': dict(in_chs=8, out_chs=8, dilation=2),
    'three channels': dict(in_chs=3, out_chs=8, stride=2),
}
LAYOUTS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}


def block(kind: str = 'identity', *, dtype: torch.dtype = torch.float64, **kwargs) -> RepVGGBlock:
    torch.manual_seed(0)
    made = RepVGGBlock(**(BLOCKS[kind] | kwargs)).to(dtype)
    for norm in made.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.affine:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    return made


def batch(made: RepVGGBlock, px: int = 9, dtype: torch.dtype = torch.float64) -> Tensor:
    return images(3, px, in_chans=made.conv_kxk.conv.in_channels, dtype=dtype)


def step(made: nn.Module, x: Tensor) -> Tensor:
    """A loss that no output is indifferent to, and its gradients."""
    y = made(x)
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() + y.square().mean()
    loss.backward()
    return y.detach()


def assert_same_training(found: nn.Module, expected: nn.Module) -> None:
    for (name, p), q in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        # Float64. Kernels before a normalisation have gradients that cancel, so the largest of all is the measure.
        if p.grad is not None:
            assert (p.grad - q.grad).abs().max() <= 1e-12 * q.grad.abs().max() + 1e-12, name
    for (name, a), b in zip(found.named_buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13, msg=name)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('kind', BLOCKS)
def test_gradients_and_statistics(kind, layout, taken):  # noqa: F811
    made = block(kind).to(memory_format=LAYOUTS[layout])
    plain = copy.deepcopy(made)
    for _ in range(2):  # the running statistics move twice, gradients add up
        x, x_plain = (batch(made).to(memory_format=LAYOUTS[layout]).requires_grad_() for _ in range(2))
        y, expected = step(made, x), branches(lambda: step(plain, x_plain))  # noqa: B023
        assert rel_diff(y, expected) < 1e-12
        assert rel_diff(x.grad, x_plain.grad) < 1e-11
    assert_same_training(made, plain)
    assert taken == [True, True]
    assert made.conv_kxk.bn.num_batches_tracked == 2


def test_other_momentum_and_eps(taken):  # noqa: F811
    made = block(norm_layer=lambda c, **dd: nn.BatchNorm2d(c, eps=0.1, momentum=0.7, **dd))
    plain = copy.deepcopy(made)
    x = batch(made)
    step(made, x)
    branches(lambda: step(plain, x))
    assert_same_training(made, plain)
    assert taken == [True]


@pytest.mark.parametrize('frozen', ['conv_kxk.conv', 'conv_1x1.conv', 'conv_1x1.bn', 'identity', 'all but identity'])
def test_frozen_parameters(frozen, taken):  # noqa: F811
    made = block()
    if frozen == 'all but identity':
        made.requires_grad_(False).identity.requires_grad_()
    else:
        made.get_submodule(frozen).requires_grad_(False)
    plain = copy.deepcopy(made)
    x = batch(made)  # needs no gradient either
    step(made, x)
    branches(lambda: step(plain, x))
    assert_same_training(made, plain)
    assert taken == [True]


def test_whole_model(taken):  # noqa: F811
    made = timm.create_model('test_repvgg').double().train()
    plain = copy.deepcopy(made)
    x = images(4, 32, dtype=torch.float64)
    y, expected = step(made, x), branches(lambda: step(plain, x))
    assert rel_diff(y, expected) < 1e-11
    for p, q in zip(made.parameters(), plain.parameters(), strict=True):
        assert rel_diff(p.grad, q.grad) < 1e-10
    assert all(taken)


@pytest.mark.parametrize('kind', ['identity', 'stride'])
def test_second_derivatives(kind, taken):  # noqa: F811
    """A penalty on the gradient, as gradient-penalised training has it."""
    made = block(kind)
    plain = copy.deepcopy(made)

    def penalised(model: RepVGGBlock) -> Tensor:
        x = batch(model).requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        return x.grad

    assert rel_diff(penalised(made), branches(lambda: penalised(plain))) < 1e-11
    for p, q in zip(made.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or (p.grad - q.grad).abs().max() <= 1e-10 * q.grad.abs().max() + 1e-10
    assert taken == [True]


@pytest.mark.parametrize('reentrant', [False, True])
def test_gradient_checkpointing(reentrant, taken):  # noqa: F811
    made = block()
    plain = copy.deepcopy(made)
    x, x_plain = (batch(made).requires_grad_() for _ in range(2))
    checkpoint(made, x, use_reentrant=reentrant).square().sum().backward()
    branches(lambda: checkpoint(plain, x_plain, use_reentrant=reentrant).square().sum().backward())
    assert rel_diff(x.grad, x_plain.grad) < 1e-11
    assert_same_training(made, plain)
    assert all(taken)


def test_two_backward_passes():
    made = block()
    x = batch(made).requires_grad_()
    loss = made(x).square().sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, x)[0], first)


def test_input_that_changes_before_the_backward_pass_is_an_error():
    made = block()
    x = batch(made)
    loss = made(x).sum()
    x.mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        loss.backward()


def test_a_batch_without_statistics_is_pytorchs_error():
    made = block()
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        made(images(1, 1, in_chans=8, dtype=torch.float64))


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(norm_layer=nn.SyncBatchNorm),
        dict(norm_layer=lambda c, **dd: nn.BatchNorm2d(c, momentum=None, **dd)),
        dict(norm_layer=lambda c, **dd: nn.BatchNorm2d(c, affine=False, **dd)),
        dict(padding_mode='reflect'),
        dict(drop_path_rate=0.5),
        dict(drop_block=nn.Dropout2d),
    ],
    ids=['SyncBN', 'cumulative average', 'no affine', 'reflect', 'drop path', 'drop block'],
)
def test_other_training_takes_the_branches(kwargs, taken):  # noqa: F811
    made = block(**kwargs)
    plain = copy.deepcopy(made)
    x = batch(made)
    try:
        torch.manual_seed(0)
        y = made(x)
        torch.manual_seed(0)
        assert torch.equal(y, branches(lambda: plain(x)))
    except ValueError as error:
        assert 'SyncBatchNorm' in str(error)  # noqa: PT017  on CPUs it is for evaluation alone
    assert taken == [False]


def test_mixed_precision_takes_the_branches(taken):  # noqa: F811
    made = block(dtype=torch.float32)
    x = batch(made, dtype=torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        made(x).sum().backward()
    block(dtype=torch.bfloat16)(x.bfloat16())
    assert taken == [False, False]
