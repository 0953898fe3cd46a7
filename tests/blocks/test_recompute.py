"""Training with 1x1 branches computed again in the backward pass, against autograd that keeps their outputs."""

import copy
from collections.abc import Callable

import pytest
import torch
from helpers import block_params, create_model, device_of_tests, images, rel_diff, run_branches, to_device
from timm.layers import DropBlock2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from repvgg_zoo import BLOCKS as BLOCKS_OF_ALL_TYPES
from repvgg_zoo import RepVGGBlock
from repvgg_zoo.blocks import branch_sum
from repvgg_zoo.blocks.branches import parallel
from repvgg_zoo.blocks.factory import block_type

pytestmark = pytest.mark.device

BLOCKS = {
    'identity': dict(in_chs=8, out_chs=8),
    'no identity': dict(in_chs=8, out_chs=8, identity=False),
    'more channels': dict(in_chs=6, out_chs=10),
    'stride': dict(in_chs=6, out_chs=6, stride=2),
    'groups': dict(in_chs=8, out_chs=8, groups=2),
    'one group a channel': dict(in_chs=8, out_chs=8, groups=8),
    'groups and stride': dict(in_chs=8, out_chs=12, groups=4, stride=2),
    'dilation': dict(in_chs=8, out_chs=8, dilation=2),
    'dilation and stride': dict(in_chs=8, out_chs=8, dilation=2, stride=2),
    'three channels': dict(in_chs=3, out_chs=8, stride=2),
}
LAYOUTS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}


def block(kind: str = 'identity', *, dtype: torch.dtype = torch.float64, **kwargs) -> RepVGGBlock:
    torch.manual_seed(0)
    made = RepVGGBlock(**(BLOCKS[kind] | kwargs)).to(device_of_tests(), dtype)
    for norm in made.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.affine:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    return made


def batch(made: RepVGGBlock, px: int = 9, dtype: torch.dtype = torch.float64) -> Tensor:
    return images(3, px, in_chans=made.conv_kxk.conv.in_channels, dtype=dtype)


def loss_of(y: Tensor) -> Tensor:
    """A loss that no output is indifferent to."""
    return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)).sum() + y.square().mean()


def step(made: nn.Module, x: Tensor) -> Tensor:
    y = made(x)
    loss_of(y).backward()
    return y.detach()


def assert_same_training(found: nn.Module, expected: nn.Module) -> None:
    """All gradients and buffers."""
    for (name, p), q in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        # Float64. Kernels before a normalisation have gradients that cancel, hence the absolute term.
        if p.grad is not None:
            assert (p.grad - q.grad).abs().max() <= 1e-12 * q.grad.abs().max() + 1e-12, name
    for (name, a), b in zip(found.named_buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13, msg=name)  # float64


# ------------------------------------------------------------------------------------------------ one block


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('kind', block_params(BLOCKS))
def test_recompute_two_steps_gives_equal_gradients_and_statistics(kind, layout, fast_path_calls):
    made = block(kind).to(memory_format=LAYOUTS[layout])
    plain = copy.deepcopy(made)
    for _ in range(2):  # the running statistics move twice, gradients add up; images of 9 x 8 pixels
        x, x_plain = (batch(made)[..., 1:].to(memory_format=LAYOUTS[layout]).requires_grad_() for _ in range(2))
        y, expected = step(made, x), run_branches(lambda: step(plain, x_plain))  # noqa: B023
        assert rel_diff(y, expected) < 1e-12  # float64
        assert rel_diff(x.grad, x_plain.grad) < 1e-11  # float64
    assert_same_training(made, plain)
    assert fast_path_calls == [True, True]
    assert made.conv_kxk.bn.num_batches_tracked == 2


@pytest.mark.parametrize('kwargs', [dict(), dict(stride=2, groups=2)], ids=str)
def test_recompute_finite_differences_give_equal_gradients(kwargs):
    """First and second ones."""
    made = block(in_chs=2, out_chs=2, **kwargs)

    def output(*_: Tensor) -> Tensor:
        return made.run_branches(x)

    x = images(2, 3, in_chans=2, dtype=torch.float64).requires_grad_()
    torch.manual_seed(0)  # of the directions
    assert torch.autograd.gradcheck(output, (x, *made.parameters()), fast_mode=True)
    assert torch.autograd.gradgradcheck(output, (x, *made.parameters()), fast_mode=True)


def test_recompute_own_momentum_and_eps_gives_equal_training(fast_path_calls):
    made = block()
    for i, norm in enumerate((made.conv_kxk.bn, made.conv_1x1.bn, made.identity)):
        norm.momentum, norm.eps = (0.0, 0.7, 1.0)[i], 0.1 * (i + 1)
    plain = copy.deepcopy(made)
    x = batch(made)
    assert rel_diff(step(made, x), run_branches(lambda: step(plain, x))) < 1e-12  # float64
    assert_same_training(made, plain)
    assert fast_path_calls == [True]


@pytest.mark.parametrize('needs_grad', [False, True], ids=['images', 'features'])
@pytest.mark.parametrize('frozen', ['conv_kxk.conv', 'conv_1x1.conv', 'conv_1x1.bn', 'identity', 'all but identity'])
def test_recompute_frozen_parameters_gives_equal_gradients(frozen, needs_grad, fast_path_calls):
    made = block()
    if frozen == 'all but identity':
        made.requires_grad_(False).identity.requires_grad_()
    else:
        made.get_submodule(frozen).requires_grad_(False)
    plain = copy.deepcopy(made)
    x, x_plain = (batch(made).requires_grad_(needs_grad) for _ in range(2))
    step(made, x)
    run_branches(lambda: step(plain, x_plain))
    assert_same_training(made, plain)
    assert not needs_grad or rel_diff(x.grad, x_plain.grad) < 1e-11  # float64
    assert fast_path_calls == [needs_grad or frozen not in ('conv_1x1.conv', 'all but identity')]


@pytest.mark.parametrize('context', [torch.no_grad, torch.inference_mode])
def test_block_training_without_gradients_moves_the_statistics(context, fast_path_calls):
    """As they do when the statistics are estimated again."""
    made = block()
    plain = copy.deepcopy(made)
    with context():
        x = batch(made)
        assert rel_diff(made(x), run_branches(lambda: plain(x))) < 1e-12  # float64
    assert_same_training(made, plain)
    assert made.identity.num_batches_tracked == 1
    assert fast_path_calls == [False]


def test_recompute_drop_path_in_eval_mode_gives_equal_training(fast_path_calls):
    made = block(drop_path_rate=0.5, drop_block=DropBlock2d)
    made.drop_path.eval(), made.drop_block.eval()
    plain = copy.deepcopy(made)
    x = batch(made)
    assert rel_diff(step(made, x), run_branches(lambda: step(plain, x))) < 1e-12  # float64
    assert_same_training(made, plain)
    assert fast_path_calls == [True]


@pytest.mark.parametrize('reduce', [Tensor.sum, lambda y: y[:, :, ::2, ::3].square().sum()], ids=['sum', 'slice'])
def test_recompute_output_gradients_of_any_strides_gives_equal_gradients(reduce, fast_path_calls):
    made = block()
    made.act = nn.Identity()
    plain = copy.deepcopy(made)
    x, x_plain = (batch(made).requires_grad_() for _ in range(2))
    reduce(made(x)).backward()
    run_branches(lambda: reduce(plain(x_plain)).backward())
    assert (x.grad - x_plain.grad).abs().max() < 1e-12  # float64, where those of a sum cancel
    assert_same_training(made, plain)
    assert fast_path_calls == [True]


def test_recompute_two_images_of_one_pixel_gives_equal_training(fast_path_calls):
    made = block()
    plain = copy.deepcopy(made)
    x = batch(made, 1)
    step(made, x)
    run_branches(lambda: step(plain, x))
    assert_same_training(made, plain)
    assert fast_path_calls == [True]


@pytest.mark.parametrize(('kind', 'px'), [('identity', 1), ('stride', 2)])
def test_recompute_one_value_per_channel_raises(kind, px):
    made = block(kind)
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        made(images(1, px, in_chans=made.conv_kxk.conv.in_channels, dtype=torch.float64))


# ---------------------------------------------------------------------------------------- the backward pass


@pytest.mark.parametrize('wanted', ['input', 'kernel'])
@pytest.mark.parametrize('kind', ['identity', 'stride'])
def test_recompute_gradient_penalty_gives_equal_gradients(kind, wanted, fast_path_calls):
    """A penalty on the gradient, as gradient-penalised training has it."""
    made = block(kind, norm_layer=lambda c, **dd: nn.BatchNorm2d(c, eps=0.1, **dd))
    made.conv_kxk.bn.bias.requires_grad_(False)
    plain = copy.deepcopy(made)

    def penalised(model: RepVGGBlock) -> Tensor:
        x = batch(model).requires_grad_()
        of = x if wanted == 'input' else model.conv_1x1.conv.weight
        (grad,) = torch.autograd.grad(loss_of(model(x)), of, create_graph=True)
        grad.square().sum().backward()
        return x.grad

    assert rel_diff(penalised(made), run_branches(lambda: penalised(plain))) < 1e-11  # float64
    for p, q in zip(made.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or (p.grad - q.grad).abs().max() <= 1e-10 * q.grad.abs().max() + 1e-10  # squared sums
    for a, b in zip(made.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)  # float64; they move once
    assert fast_path_calls == [True]


@pytest.mark.parametrize('second', [False, True])
def test_recompute_backward_under_autocast_is_not_rounded(second, device):
    """PyTorch's own backward functions are not cast there."""
    made = block(dtype=torch.float32)
    plain = copy.deepcopy(made)

    def trained(model: RepVGGBlock) -> Tensor:
        x = batch(model, dtype=torch.float32).requires_grad_()
        y = model(x)
        with torch.autocast(device.type, torch.bfloat16):
            (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=second)
        return grad

    assert rel_diff(trained(made), run_branches(lambda: trained(plain))) < 1e-5  # float32, where bfloat16 has 4e-3


def applied_twice(made: RepVGGBlock) -> Callable[[Tensor], Tensor]:
    return lambda x: made(made(x))


def tied_scales(made: RepVGGBlock) -> Callable[[Tensor], Tensor]:
    made.identity.weight = made.conv_1x1.bn.weight
    return made


def scale_of_the_input(made: RepVGGBlock) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.func.functional_call(made, {'identity.weight': x.mean((0, 2, 3))}, (x,))


@pytest.mark.parametrize('use', [applied_twice, tied_scales, scale_of_the_input])
def test_recompute_reused_inputs_gives_equal_second_derivatives(use, fast_path_calls):
    made = block()
    plain = copy.deepcopy(made)

    def penalised(model: RepVGGBlock) -> Tensor:
        x = batch(model).requires_grad_()
        run = use(model)
        grads = torch.autograd.grad(loss_of(run(x)), [x, *model.parameters()], create_graph=True, allow_unused=True)
        sum(grad.square().sum() for grad in grads if grad is not None).backward()
        return x.grad

    assert rel_diff(penalised(made), run_branches(lambda: penalised(plain))) < 1e-10  # float64, of squared sums
    assert all(fast_path_calls)


@pytest.mark.parametrize('kind', ['identity', 'stride', 'groups'])
def test_recompute_vectorized_jacobian_is_equal(kind, fast_path_calls):
    made = block(kind)
    plain = copy.deepcopy(made)

    def jacobian(model: RepVGGBlock) -> Tensor:
        return torch.autograd.functional.jacobian(lambda x: model(x).mean((0, 2, 3)), batch(model), vectorize=True)

    found, expected = jacobian(made), run_branches(lambda: jacobian(plain))
    assert (found - expected).abs().max() < 1e-13  # float64; means of what is normalised hardly move
    assert fast_path_calls == [True]


@pytest.mark.parametrize('reentrant', [False, True])
def test_recompute_gradient_checkpointing_gives_equal_gradients(reentrant, fast_path_calls):
    made = block()
    plain = copy.deepcopy(made)
    x, x_plain = (batch(made).requires_grad_() for _ in range(2))
    checkpoint(made, x, use_reentrant=reentrant).square().sum().backward()
    run_branches(lambda: checkpoint(plain, x_plain, use_reentrant=reentrant).square().sum().backward())
    assert rel_diff(x.grad, x_plain.grad) < 1e-11  # float64
    assert_same_training(made, plain)
    # nothing is kept in the first pass, and outside other hooks the second one keeps less
    assert fast_path_calls == [False, reentrant]


def test_recompute_two_backward_passes_give_the_same_gradients():
    made = block()
    x = batch(made).requires_grad_()
    loss = made(x).square().sum()
    wanted = [x, *made.parameters()]
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    assert all(map(torch.equal, torch.autograd.grad(loss, wanted), first))
    with pytest.raises(RuntimeError, match='backward through the graph a second time'):
        torch.autograd.grad(loss, wanted)


def test_recompute_two_forward_passes_give_equal_gradients(fast_path_calls):
    """The second one moves the running statistics, on which no gradient depends."""
    made = block()
    plain = copy.deepcopy(made)
    x = batch(made)

    def both(model: RepVGGBlock) -> None:
        (loss_of(model(x)) + loss_of(model(x.flip(0, 3) ** 2))).backward()

    both(made)
    run_branches(lambda: both(plain))
    assert_same_training(made, plain)
    assert fast_path_calls == [True, True]


@pytest.mark.parametrize('name', ['input', 'conv_kxk.conv.weight', 'conv_1x1.conv.weight', 'conv_1x1.bn.weight'])
def test_recompute_tensor_changed_before_backward_raises(name, fast_path_calls):
    made = block()
    x = batch(made).requires_grad_(False)
    x_of_block = x if name == 'input' else x.requires_grad_()
    loss = made(x_of_block).sum()
    with torch.no_grad():
        (x if name == 'input' else made.get_parameter(name)).mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        loss.backward()
    assert fast_path_calls == [True]


# --------------------------------------------------------------------------------------------- whole models


def test_recompute_whole_model_gives_equal_training(fast_path_calls):
    torch.manual_seed(0)
    made = create_model('test_repvgg').double().train()
    plain = copy.deepcopy(made)
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9) for model in (made, plain)]
    for seed in range(2):
        x = images(3, 17, seed=seed, dtype=torch.float64)
        for optimizer in optimizers:
            optimizer.zero_grad()
        y, expected = step(made, x), run_branches(lambda: step(plain, x))  # noqa: B023
        assert rel_diff(y, expected) < 1e-10  # float64, through eleven layers
        for (name, p), q in zip(made.named_parameters(), plain.parameters(), strict=True):
            assert rel_diff(p.grad, q.grad) < 1e-9, name  # whose gradients cancel
        for optimizer in optimizers:
            optimizer.step()
    for (name, a), b in zip(made.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=name)
    assert fast_path_calls == [True] * 22


def test_recompute_float32_is_as_exact_as_the_branches(fast_path_calls):
    """On images whose mean is five times their deviation, where a careless variance loses most digits."""
    torch.manual_seed(0)
    model = create_model('test_repvgg').train()
    x = images(4, 32) + 5

    def gradients(model: nn.Module, x: Tensor) -> Tensor:
        step(model, x)
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    exact = run_branches(lambda: gradients(copy.deepcopy(model).double(), x.double()))
    found, expected = gradients(copy.deepcopy(model), x), run_branches(lambda: gradients(copy.deepcopy(model), x))
    # Which units are rounded to the other side of zero is chance, hence the factor.
    assert (found - exact).norm() < 3 * (expected - exact).norm() + 1e-6 * exact.norm()
    assert all(fast_path_calls)


# ------------------------------------------------------------------------------ where the branches are run

OTHER_NORMS: dict[str, Callable[..., nn.Module]] = {
    'cumulative average': lambda c, **dd: nn.BatchNorm2d(c, momentum=None, **dd),
    'no affine': lambda c, **dd: nn.BatchNorm2d(c, affine=False, **dd),
    'no statistics': lambda c, **dd: nn.BatchNorm2d(c, track_running_stats=False, **dd),
    'groups': lambda c, **dd: nn.GroupNorm(1, c, **dd),
    'synchronised': nn.SyncBatchNorm,
}


@pytest.mark.parametrize(
    'kwargs',
    [
        *(dict(norm_layer=norm) for norm in OTHER_NORMS.values()),
        *(dict(padding_mode=mode) for mode in ('reflect', 'replicate', 'circular')),
        dict(drop_path_rate=0.5),
        dict(drop_block=nn.Dropout2d),
    ],
    ids=[*OTHER_NORMS, 'reflect', 'replicate', 'circular', 'drop path', 'drop block'],
)
def test_recompute_other_training_gives_equal_outputs_and_gradients(kwargs, fast_path_calls):
    made = block(**kwargs)
    plain = copy.deepcopy(made)
    x = batch(made)
    for _ in range(2):
        torch.manual_seed(0)
        y = step(made, x)
        torch.manual_seed(0)
        assert torch.equal(y, run_branches(lambda: step(plain, x)))
    assert_same_training(made, plain)
    is_batch_norm = kwargs.get('norm_layer') is not OTHER_NORMS['groups']
    assert fast_path_calls == [is_batch_norm] * 2


def test_fold_for_call_norms_in_eval_mode_keeps_the_statistics(fast_path_calls):
    made = block()
    for norm in (made.conv_kxk.bn, made.conv_1x1.bn, made.identity):
        norm.eval()
    plain = copy.deepcopy(made)
    x = batch(made, 33)
    assert rel_diff(step(made, x), run_branches(lambda: step(plain, x))) < 1e-12  # float64
    assert_same_training(made, plain)
    assert made.identity.num_batches_tracked == 0
    assert fast_path_calls == [True]


def untracked(made: RepVGGBlock) -> None:
    for norm in (made.conv_kxk.bn, made.conv_1x1.bn, made.identity):
        norm.track_running_stats = False


def one_norm_twice(made: RepVGGBlock) -> None:
    made.conv_1x1.bn = made.conv_kxk.bn


@pytest.mark.parametrize('change', [untracked, one_norm_twice])
def test_recompute_other_statistics_gives_equal_training(change, fast_path_calls):
    made = block()
    change(made)
    plain = copy.deepcopy(made)
    x = batch(made)
    assert torch.equal(step(made, x), run_branches(lambda: step(plain, x)))
    assert_same_training(made, plain)
    assert fast_path_calls == [True]


def test_recompute_under_autocast_uses_the_dtype_of_the_forward_pass(fast_path_calls, device):
    made = block(dtype=torch.float32)
    plain = copy.deepcopy(made)
    x = batch(made, dtype=torch.float32)

    def mixed(model: RepVGGBlock) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            y = model(x)
        loss_of(y.float()).backward()

    mixed(made)
    run_branches(lambda: mixed(plain))
    assert_same_training(made, plain)
    assert fast_path_calls == [True]


@pytest.mark.parametrize('inside', [False, True], ids=['backward outside', 'backward inside'])
def test_recompute_two_blocks_under_autocast_gives_equal_gradients(inside, fast_path_calls, device):
    """The second one gets images in the dtype of autocast, and has kernels in float32."""
    made = nn.Sequential(block('three channels', dtype=torch.float32), block(dtype=torch.float32))
    plain = copy.deepcopy(made)

    def mixed(model: nn.Module) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(model(images(3, 9)).float())
            if inside:
                loss.backward()
        if not inside:
            loss.backward()

    mixed(made)
    run_branches(lambda: mixed(plain))
    assert_same_training(made, plain)
    assert fast_path_calls == [True, True]


def test_recompute_half_precision_is_used(fast_path_calls):
    made = block(dtype=torch.bfloat16)
    made(batch(made, dtype=torch.bfloat16)).float().sum().backward()
    with torch.no_grad():
        float_norms = block(dtype=torch.bfloat16)
        for norm in (float_norms.conv_kxk.bn, float_norms.conv_1x1.bn, float_norms.identity):
            norm.float()
        float_norms(batch(made, dtype=torch.bfloat16))
    assert fast_path_calls == [True, False]  # the second one records no gradients


@pytest.mark.cpu
def test_block_mixed_dtypes_raises_the_error_of_pytorch():
    made = block(dtype=torch.float32)
    made.identity.weight, made.identity.bias = (nn.Parameter(p.double()) for p in made.identity.parameters())
    with pytest.raises(RuntimeError, match='mixed dtype'):
        made(batch(made, dtype=torch.float32))


# ---------------------------------------------------------------------------------------------------- other blocks


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('name', [name for name in BLOCKS_OF_ALL_TYPES if name not in ('csla', 'bn_after')])
def test_recompute_each_block_type_gives_equal_training(name, layout, fast_path_calls):
    torch.manual_seed(0)
    made = to_device(block_type(name)(8, 8).double()).to(memory_format=LAYOUTS[layout])
    plain = copy.deepcopy(made)
    x, x_plain = (images(3, 9, in_chans=8, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.equal(step(made, x), run_branches(lambda: step(plain, x_plain)))
    assert rel_diff(x.grad, x_plain.grad) < 1e-11  # float64
    assert_same_training(made, plain)
    has_point = name in ('repvgg', 'dbb', 'mobileone', 'no_identity', 'no_identity_bn')
    assert fast_path_calls == [has_point]


def test_recompute_wrong_pixels_changes_the_training(monkeypatch):
    """Or this file would not test it."""
    made = block('groups and stride', in_chs=16)  # whose forward pass is PyTorch's own
    plain, x = copy.deepcopy(made), batch(made)

    def other_pixels(x, kernel, bias, *, kind, stride, groups):
        y = nn.functional.conv2d(x, kernel, groups=groups)[:, :, : (x.shape[2] + 1) // 2, 4:]
        return y.contiguous()  # cuDNN takes nothing else

    monkeypatch.setattr(parallel, '_point_conv', other_pixels)
    step(made, x)
    run_branches(lambda: step(plain, x))
    with pytest.raises(AssertionError):
        assert_same_training(made, plain)


def test_recompute_functional_call_uses_its_parameters():
    """They are back in their places before the backward pass."""
    made, other = block(), block()
    for parameter in other.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    plain, x = copy.deepcopy(other), batch(made)
    loss_of(torch.func.functional_call(made, dict(other.named_parameters()), x)).backward()
    run_branches(lambda: step(plain, x))
    for (name, p), q in zip(other.named_parameters(), plain.named_parameters(), strict=True):
        assert (p.grad - q[1].grad).abs().max() <= 1e-12 * q[1].grad.abs().max() + 1e-12, name  # float64


def test_recompute_kernel_replaced_before_backward_uses_the_old_one():
    made = block()
    plain, x = copy.deepcopy(made), batch(made)
    loss = loss_of(made(x))
    kernel = made.conv_1x1.conv.weight
    made.conv_1x1.conv.weight = nn.Parameter(torch.ones_like(kernel))
    loss.backward()
    run_branches(lambda: step(plain, x))
    assert rel_diff(kernel.grad, plain.conv_1x1.conv.weight.grad) < 1e-11  # float64
    assert rel_diff(made.conv_1x1.bn.weight.grad, plain.conv_1x1.bn.weight.grad) < 1e-11


def test_block_wrongly_folded_in_train_mode_changes_the_training(monkeypatch):
    """Folded with running statistics, a block in train mode has other outputs and leaves the statistics as they are."""
    made = block()
    plain, x = copy.deepcopy(made), batch(made, 33)
    monkeypatch.setattr(branch_sum, 'moves_statistics', lambda norm: False)
    monkeypatch.setattr(branch_sum, 'can_fold', lambda *_: True)
    y, expected = step(made, x), run_branches(lambda: step(plain, x))
    assert rel_diff(y, expected) > 1e-2
    with pytest.raises(AssertionError):
        assert_same_training(made, plain)
