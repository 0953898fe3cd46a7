"""The plain network under RepOptimizer moves as the constant-scale network does."""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
from helpers import create_model, images, rel_diff, to_device
from torch import nn

from repvgg_zoo import rep_optimizer
from repvgg_zoo.blocks.factory import block_type

pytestmark = pytest.mark.device
STEPS = 20


def constant_scale(seed: int = 0) -> torch.nn.Module:
    """A network with scales of either sign, which an optimizer leaves as they are."""
    torch.manual_seed(seed)
    model = create_model('test_repvgg', num_classes=10, block='csla').double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith('scale'):
                parameter.normal_().requires_grad_(False)
    return model


def train(model, optimizer, schedule) -> list[float]:
    generator, losses = torch.Generator().manual_seed(1), []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group['lr'] = schedule(step)
        images = to_device(torch.randn(16, 3, 32, 32, generator=generator, dtype=torch.float64))
        labels = to_device(torch.randint(10, (16,), generator=generator))
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model.train()(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ('kind', 'options'),
    [
        (torch.optim.SGD, dict(lr=0.02, weight_decay=0.1)),
        (torch.optim.SGD, dict(lr=0.01, momentum=0.9, weight_decay=0.1, nesterov=True)),
        (torch.optim.AdamW, dict(lr=0.002, weight_decay=0.5, eps=1e-30)),  # see rep_optimizer on eps
    ],
    ids=['sgd', 'nesterov', 'adamw'],
)
def test_rep_optimizer_twenty_steps_equal_those_of_the_branches(kind, options):
    branches = constant_scale()
    plain = create_model('test_repvgg', num_classes=10, block='plain').double()
    optimizer = rep_optimizer(kind(plain.parameters(), **options), plain, branches)
    trainable = [parameter for parameter in branches.parameters() if parameter.requires_grad]
    start = plain.stem.branches.kxk.conv.weight.clone()

    def schedule(step):
        return options['lr'] * (1 - step / STEPS)

    losses = train(plain, optimizer, schedule)
    expected = train(branches, kind(trainable, **options), schedule)
    assert losses[-1] != losses[0]
    # rounding of float64; a wrong multiplier is off by a per cent after the first step
    assert losses == pytest.approx(expected, rel=1e-12)
    x = images(2, 16, dtype=torch.float64)
    assert rel_diff(plain.eval()(x), branches.eval()(x)) < 1e-6
    assert rel_diff(plain.stem.branches.kxk.conv.weight, start) > 1e-2


@pytest.mark.cpu
def test_rep_optimizer_other_optimizer_raises():
    model = create_model('test_repvgg', block='plain')
    with pytest.raises(TypeError, match=r'RMSprop; it can be torch.optim.SGD or torch.optim.AdamW'):
        rep_optimizer(torch.optim.RMSprop(model.parameters()), model, constant_scale())


@pytest.mark.parametrize('block', ['repvgg', 'csla'])
def test_rep_optimizer_other_block_raises(block):
    model = create_model('test_repvgg', block=block)
    with pytest.raises(ValueError, match="block='plain'"):
        rep_optimizer(torch.optim.SGD(model.parameters(), lr=1), model, constant_scale())


def sgd(model: torch.nn.Module, **options) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1, **options)


def test_rep_optimizer_resumed_training_gives_the_same_kernels():
    like, x = constant_scale(), images(8, 32, dtype=torch.float64)
    ended = []
    for resumed in (False, True):
        torch.manual_seed(0)
        model = create_model('test_repvgg', num_classes=10, block='plain').double()
        optimizer = rep_optimizer(sgd(model), model, like)
        for step in range(4):
            if resumed and step == 2:
                again = sgd(model)
                again.load_state_dict(optimizer.state_dict())
                optimizer = rep_optimizer(again, model, like, load=False)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        ended.append(model.stem.branches.kxk.conv.weight.clone())
    assert torch.equal(*ended)


def test_rep_optimizer_called_twice_multiplies_once():
    like, x = constant_scale(), images(8, 32, dtype=torch.float64)
    ended = []
    for times in (1, 2):
        model = create_model('test_repvgg', num_classes=10, block='plain').double()
        optimizer = sgd(model)
        for _ in range(times):
            rep_optimizer(optimizer, model, like)
        model(x).square().mean().backward()
        optimizer.step()
        ended.append(model.stem.branches.kxk.conv.weight.clone())
    assert torch.equal(*ended)


@pytest.mark.cpu
def test_rep_optimizer_unsupported_options_raise():
    like = constant_scale()
    model = create_model('test_repvgg', num_classes=10, block='plain').double()
    for option in ('fused', 'maximize'):
        with pytest.raises(ValueError, match=f'made with {option}=True'):
            rep_optimizer(sgd(model, **{option: True}), model, like)
    with pytest.raises(ValueError, match='the optimizer lacks 11 of the 11 kernels of the model, first that of stem;'):
        rep_optimizer(sgd(like), model, like)


@pytest.mark.parametrize('kind', [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize(
    'step',
    [
        lambda optimizer, closure: optimizer.step(closure),
        lambda optimizer, closure: optimizer.step(closure=closure),
        lambda optimizer, closure: (closure(), optimizer.step(None))[0],
    ],
    ids=['argument', 'keyword', 'None'],
)
def test_rep_optimizer_closure_gives_the_same_steps(kind, step):
    like = constant_scale()

    def train_three_steps(step):
        torch.manual_seed(0)
        model = create_model('test_repvgg', num_classes=10, block='plain').double()
        optimizer = rep_optimizer(kind(model.parameters(), lr=0.01, weight_decay=0.1), model, like)

        def closure():
            optimizer.zero_grad()
            loss = model(images(2, px=32, dtype=torch.float64)).square().mean()
            loss.backward()
            return loss

        losses = [step(optimizer, closure).item() for _ in range(3)]
        return losses, model.stem.branches.kxk.conv.weight

    def step_after(optimizer, closure):
        loss = closure()
        optimizer.step()
        return loss

    (losses, kernel), (expected_losses, expected) = train_three_steps(step), train_three_steps(step_after)
    assert losses == expected_losses
    assert torch.equal(kernel, expected)


@pytest.mark.parametrize('load', [False, True])
@pytest.mark.parametrize('kwargs', [dict(in_chans=1), dict(norm_layer=partial(nn.BatchNorm2d, eps=1e-2))], ids=str)
def test_rep_optimizer_other_variant_raises_and_changes_nothing(kwargs, load):
    model = create_model('test_repvgg', block='plain').double()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = sgd(model)
    like = create_model('test_repvgg', block='csla', **kwargs).double()
    with pytest.raises(
        ValueError, match=r'one variant.* the kernel and eps of stem are \(\(32, 3, 3, 3\), 1e-05\) and'
    ):
        rep_optimizer(optimizer, model, like, load=load)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not optimizer._optimizer_step_pre_hooks


def test_rep_optimizer_bare_block_loads_the_kernels():
    model, like = (to_device(block_type(name)(4, 4).double()) for name in ('plain', 'csla'))
    rep_optimizer(sgd(model), model, like)
    x = images(2, 8, in_chans=4, dtype=torch.float64)
    assert rel_diff(model(x), like(x)) < 1e-12


@pytest.mark.cpu
def test_rep_optimizer_wrapped_models_train_the_same():
    ended = []
    for wrap in (lambda model: model, torch.compile, torch.nn.DataParallel):
        like = wrap(constant_scale())
        model = create_model('test_repvgg', num_classes=10, block='plain').double()
        optimizer = rep_optimizer(sgd(model), wrap(model), like)
        model(to_device(torch.ones(2, 3, 32, 32, dtype=torch.float64))).square().mean().backward()
        optimizer.step()
        ended.append(model.stem.branches.kxk.conv.weight)
    assert torch.equal(ended[0], ended[1])
    assert torch.equal(ended[0], ended[2])


@pytest.mark.parametrize('classes', [(0, 10), (10, 0)])
def test_rep_optimizer_without_a_classifier_loads_the_features(classes):
    model, like = (
        create_model('test_repvgg', num_classes=count, block=block).double()
        for count, block in zip(classes, ('plain', 'csla'), strict=True)
    )
    rep_optimizer(sgd(model), model, like)
    x = images(2, 32, dtype=torch.float64)
    assert rel_diff(model.eval().forward_features(x), like.eval().forward_features(x)) < 1e-12


def test_rep_optimizer_other_classes_keeps_the_head():
    like = create_model('test_repvgg', num_classes=7, block='csla').double()
    model = create_model('test_repvgg', num_classes=10, block='plain').double()
    head = model.head.fc.weight.clone()
    rep_optimizer(sgd(model), model, like)
    assert torch.equal(model.head.fc.weight, head)
    kernel = like.stem.sum_of_branches(torch.float64)[0]
    assert torch.equal(model.stem.branches.kxk.conv.weight, kernel)


def test_rep_optimizer_before_the_first_step_gives_equal_outputs():
    like, x = constant_scale(), images(2, 32, dtype=torch.float64)
    for _ in range(2):
        like(to_device(torch.randn(8, 3, 32, 32, dtype=torch.float64)))
    with torch.no_grad():
        for norm in (m for m in like.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_()
    model = create_model('test_repvgg', num_classes=10, block='plain').double()
    rep_optimizer(sgd(model), model, like)
    assert rel_diff(model.eval()(x), like.eval()(x)) < 1e-12


def with_an_auxiliary_head(model: nn.Module, classes: int) -> nn.Module:
    model.aux_heads = nn.ModuleList([nn.Sequential(nn.Linear(4, classes))])
    return model


@pytest.mark.cpu
def test_rep_optimizer_difference_outside_heads_raises():
    plain, like = (partial(timm.create_model, 'test_repvgg', block=block) for block in ('plain', 'csla'))
    for model, other in (
        (with_an_auxiliary_head(plain(), 3), like()),
        (with_an_auxiliary_head(plain(), 3), with_an_auxiliary_head(like(), 7)),
        (nn.Sequential(plain(num_classes=3)), nn.Sequential(like(num_classes=7))),
    ):
        rep_optimizer(sgd(model), model, other)
    model, other = nn.Sequential(plain(), nn.Linear(1000, 2)), nn.Sequential(like(), nn.Linear(1000, 3))
    with pytest.raises(ValueError, match=r'one variant; they differ in 1.weight \(load=False'):
        rep_optimizer(sgd(model), model, other)
    rep_optimizer(sgd(model), model, other, load=False)
    deeper = timm.create_model('repvgg_a0', block='csla', device='meta')
    with pytest.raises(ValueError, match='there are 11 plain blocks in RepVGG and 22 constant-scale ones in RepVGG'):
        rep_optimizer(sgd(model := plain()), model, deeper)


@pytest.mark.parametrize('kind', [torch.optim.SGD, torch.optim.AdamW])
def test_rep_optimizer_frozen_kernels_stay_unchanged(kind):
    ended = []
    for held in (True, False):
        model, like = (create_model('test_repvgg', block=block).double() for block in ('plain', 'csla'))
        model.stem.requires_grad_(False)
        parameters = [p for p in model.parameters() if held or p.requires_grad]
        optimizer = rep_optimizer(kind(parameters, lr=0.01, weight_decay=0.1), model, constant_scale_of(like))
        before = model.stem.branches.kxk.conv.weight.clone()
        model(to_device(torch.ones(2, 3, 32, 32, dtype=torch.float64))).square().mean().backward()
        optimizer.step()
        assert torch.equal(model.stem.branches.kxk.conv.weight, before)
        ended.append(model.stages[0][0].branches.kxk.conv.weight.clone())
    assert torch.equal(*ended)


@torch.no_grad()
def constant_scale_of(model: nn.Module) -> nn.Module:
    """A model with the values that depend on the shapes alone."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def test_rep_optimizer_hook_that_drops_gradients_gives_the_same_step():
    ended = []
    for drops in (False, True):
        model, like = (create_model('test_repvgg', block=block).double() for block in ('plain', 'csla'))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        if drops:
            optimizer.register_step_post_hook(lambda optimizer, *_: optimizer.zero_grad())
        rep_optimizer(optimizer, model, constant_scale_of(like))
        model(to_device(torch.ones(2, 3, 32, 32, dtype=torch.float64))).square().mean().backward()
        optimizer.step()
        ended.append(model.stem.branches.kxk.conv.weight.clone())
    assert torch.equal(*ended)


def test_rep_optimizer_after_a_failed_step_multiplies_nothing():
    model, like = (create_model('test_repvgg', block=block).double() for block in ('plain', 'csla'))
    optimizer = rep_optimizer(torch.optim.AdamW(model.parameters()), model, like)
    model(to_device(torch.ones(2, 3, 32, 32, dtype=torch.float64))).square().mean().backward()

    def fail(*_):
        raise KeyboardInterrupt

    failing = optimizer.register_step_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    failing.remove()
    model.stem.requires_grad_(False)
    optimizer.zero_grad()
    with torch.no_grad():
        model.stem.branches.kxk.conv.weight.fill_(1)
    optimizer.step()
    assert (model.stem.branches.kxk.conv.weight == 1).all()
