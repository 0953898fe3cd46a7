"""The switch, for whatever holds blocks and however it is wrapped."""

import copy
import logging
import types
import warnings

import pytest
import timm
import torch
import torch.nn.utils.prune
from helpers import create_model, images, randomise, rel_diff, run_branches, to_device
from timm.layers import ScaledStdConv2d, StdConv2d
from timm.models import byobnet
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import repvgg_zoo
from repvgg_zoo import FoldError, RepVGGBlock, switch_to_deploy
from repvgg_zoo.blocks import branch_sum
from repvgg_zoo.blocks.factory import block_type
from repvgg_zoo.reparam import comparison, switch
from repvgg_zoo.reparam.foreign import repvgg_blocks

pytestmark = pytest.mark.device


@pytest.fixture
def model():
    return randomise(create_model('test_repvgg').double(), px=32)


@pytest.fixture
def x():
    return images(2, px=32, dtype=torch.float64)


def is_deployed(module: nn.Module) -> bool:
    return not any(isinstance(m, nn.BatchNorm2d) for m in module.modules())


def test_switch_twice_changes_nothing_more(model, x):
    before = model(x)
    assert model.switch_to_deploy() is model
    folded = copy.deepcopy(model.state_dict())
    assert model.switch_to_deploy() is model
    assert model.reparameterize() is model
    assert all(torch.equal(folded[key], value) for key, value in model.state_dict().items())
    assert rel_diff(model(x), before) < 1e-12


def test_switch_model_leaves_no_branches_or_buffers(model):
    model.switch_to_deploy()
    assert {key.split('.')[-2] for key in model.state_dict()} == {'reparam_conv', 'fc'}
    assert not list(model.buffers())


def test_switch_block_as_root_keeps_the_outputs(x):
    block = randomise(RepVGGBlock(3, 8).double(), px=32)
    before = block(x)
    assert switch_to_deploy(block) is block
    assert rel_diff(block(x), before) < 1e-12


@pytest.mark.parametrize('wrap', [lambda m: m, lambda m: to_device(byobnet.repvgg_a0())], ids=['ours', 'timm'])
def test_switch_any_module_leaves_no_none_children(model, wrap):
    """As one that is built in the deploy form: libraries that walk over modules trip over None."""
    module = switch_to_deploy(wrap(model))
    assert None not in (child for m in module.modules() for child in m._modules.values())


def test_switch_undone_leaves_the_modules_unchanged(model, x, monkeypatch):
    before = [name for name, _ in model.named_modules()]
    monkeypatch.setattr(comparison, 'max_rel_diff', lambda *_: -1)
    with pytest.raises(FoldError):
        model.switch_to_deploy(verify=x)
    assert [name for name, _ in model.named_modules()] == before
    assert model.stem.__dict__.keys() == RepVGGBlock(3, 48).__dict__.keys()


class Segmenter(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.decoder = encoder, nn.Conv2d(96, 2, 1).double()

    def forward(self, x):
        return {'mask': self.decoder(self.encoder(x)[-1]), 'sizes': [x.shape]}


def test_switch_backbone_of_a_larger_network_keeps_the_outputs(x):
    encoder = create_model('test_repvgg', features_only=True).double()
    for norm in (m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.uniform_(norm.running_mean, -1, 1)
    network = to_device(Segmenter(encoder)).eval()
    before = network(x)['mask']
    assert switch_to_deploy(network, verify=x) is network
    assert is_deployed(network)
    assert rel_diff(network(x)['mask'], before) < 1e-12


def test_switch_model_of_timm_keeps_the_outputs(model):
    theirs = byobnet.repvgg_a0().double()
    randomise(theirs)
    x = images(dtype=torch.float64)
    before = theirs(x)
    assert switch_to_deploy(theirs) is theirs
    assert rel_diff(theirs(x), before) < 1e-9
    assert not any('id_tensor' in name for name, _ in theirs.named_buffers())
    create_model('repvgg_a0', deploy=True).double().load_state_dict(theirs.state_dict())


def test_reparameterize_model_of_timm_folds_a_copy(model, x):
    before = model(x)
    copied = timm.utils.reparameterize_model(model)
    assert is_deployed(copied)
    assert copied.deploy
    assert not model.deploy
    assert rel_diff(copied(x), before) < 1e-12
    assert copied._model_args['deploy'] is True


def test_switch_compiled_module_keeps_the_outputs(model, x):
    compiled = torch.compile(model, backend='eager')
    before = compiled(x)
    assert switch_to_deploy(compiled) is compiled
    assert is_deployed(model)
    assert rel_diff(compiled(x), before) < 1e-12


@pytest.mark.cpu
def test_switch_distributed_module_keeps_the_outputs(model, x, tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        before = wrapped(x)
        assert switch_to_deploy(wrapped) is wrapped
        assert rel_diff(wrapped(x), before) < 1e-12
    finally:
        torch.distributed.destroy_process_group()


def test_switch_average_of_weights_folds_its_own_copy(model, x):
    """An average holds a copy of the model, so it is switched on its own."""
    average = timm.utils.ModelEmaV3(model)
    before = average.module(x)
    model.switch_to_deploy()
    assert not average.module.deploy
    assert switch_to_deploy(average) is average
    assert rel_diff(average.module(x), before) < 1e-12


@pytest.mark.cpu
def test_switch_graph_raises_and_changes_nothing(model, x):
    features = create_model('test_repvgg', features_only=True, feature_cls='fx').double().eval()
    for traced in (features, torch.jit.trace(model, x), torch.jit.script(model), torch.fx.symbolic_trace(model)):
        before = traced(x)
        with pytest.raises(ValueError, match='before tracing, scripting or exporting'):
            switch_to_deploy(traced)
        after = traced(x)
        before, after = (outputs if isinstance(outputs, list) else [outputs] for outputs in (before, after))
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_switch_partly_switched_model_completes_it(model, x):
    before = model(x)
    model.stem.switch_to_deploy()
    assert not model.deploy
    assert rel_diff(model.switch_to_deploy()(x), before) < 1e-12
    assert model.deploy


def test_switch_module_without_blocks_raises():
    with pytest.raises(ValueError, match='no RepVGG block in Linear'):
        switch_to_deploy(nn.Linear(2, 2))


def test_switch_dtype_format_and_frozen_state_are_kept():
    model = create_model('test_repvgg').to(torch.bfloat16, memory_format=torch.channels_last).eval()
    for parameter in model.stages[0].parameters():
        parameter.requires_grad_(False)
    model.stages[1].train()
    model.switch_to_deploy()
    stage0, stage1 = model.stages[0][0].reparam_conv, model.stages[1][0].reparam_conv
    assert stage0.weight.dtype == stage1.bias.dtype == torch.bfloat16
    assert stage0.weight.is_contiguous(memory_format=torch.channels_last)
    assert [p.requires_grad for p in (stage0.weight, stage0.bias, stage1.weight, stage1.bias)] == [False] * 2 + [
        True
    ] * 2
    assert not stage0.training
    assert stage1.training


def test_switch_in_train_mode_folds_and_logs_once(model, x, caplog):
    expected = model(x)
    switch._warn_of_train_mode.cache_clear()
    with caplog.at_level(logging.INFO, logger='repvgg_zoo'):
        copy.deepcopy(model).train().switch_to_deploy()
        switched = model.train().switch_to_deploy()
    assert [('eval()' in r.message) for r in caplog.records] == [True]
    assert switched.training
    assert rel_diff(switched.eval()(x), expected) < 1e-12


def test_switch_half_precision_rounds_once_at_the_end(model):
    half = copy.deepcopy(model).to(torch.bfloat16)
    exact = copy.deepcopy(half).double().switch_to_deploy().state_dict()
    for key, value in half.switch_to_deploy().state_dict().items():
        assert ((value.double() - exact[key]).abs() <= 2**-8 * exact[key].abs()).all(), key


# -------------------------------------------------------------------------------- errors change nothing


def poison(norm: nn.Module, value: float) -> None:
    norm.running_var[1] = value


@pytest.mark.parametrize('value', [float('nan'), -1.0])
def test_switch_bad_variance_in_one_block_raises_and_changes_nothing(model, x, value):
    poison(model.stages[3][0].conv_1x1.bn, value)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FoldError, match=r"block 'stages.3.0': running variance .* in channel 1.*nothing was changed"):
        model.switch_to_deploy()
    assert before.keys() == model.state_dict().keys()
    assert not model.deploy


def test_switch_norm_without_running_statistics_raises():
    block = to_device(RepVGGBlock(4, 4, norm_layer=lambda c, **dd: nn.BatchNorm2d(c, track_running_stats=False, **dd)))
    with pytest.raises(FoldError, match='keeps no running statistics'):
        block.switch_to_deploy()
    assert block.reparam_conv is None


def test_switch_norm_without_eps_raises():
    class Frozen(nn.BatchNorm2d):
        pass

    block = to_device(RepVGGBlock(4, 4))
    block.identity.__class__ = Frozen
    del block.identity.eps
    with pytest.raises(FoldError, match='does not tell its eps; set it as an attribute'):
        block.switch_to_deploy()


def test_switch_norm_with_an_activation_raises():
    block = to_device(RepVGGBlock(4, 4, norm_layer=timm.layers.BatchNormAct2d))
    with pytest.raises(FoldError, match='activation'):
        block.switch_to_deploy()


def test_switch_padding_off_centre_raises():
    block = to_device(RepVGGBlock(4, 4))
    block.conv_kxk.conv.padding = (0, 0)
    with pytest.raises(FoldError, match=r'the inset of conv_kxk is \(1, 1\), that of conv_1x1 is \(0, 0\)'):
        block.switch_to_deploy()


def test_verify_right_fold_logs_the_difference(model, x, caplog):
    with caplog.at_level(logging.INFO, logger='repvgg_zoo'):
        model.switch_to_deploy(verify=x)
    assert 'largest difference' in caplog.text
    assert model.deploy


@pytest.mark.parametrize('wrap', [lambda m: m, lambda m: byobnet.repvgg_a0()], ids=['ours', 'timm'])
def test_verify_wrong_fold_raises_and_undoes_it(model, x, wrap, monkeypatch):
    module = randomise(wrap(model).double())
    x = images(2, px=64, dtype=torch.float64)
    module.train()
    module.stem.eval()
    before, state = run_branches(lambda: module.eval()(x)), module.state_dict()
    module.train()
    module.stem.eval()
    for room in (branch_sum, repvgg_blocks):
        real = room.fold_exactly
        monkeypatch.setattr(room, 'fold_exactly', lambda *a, real=real: (1.001 * real(*a)[0], real(*a)[1]))
    monkeypatch.setattr(switch, '_prove', lambda *_: None)  # which notices first
    with pytest.raises(FoldError, match='the deploy form differs by'):
        switch_to_deploy(module, verify=x)
    assert module.training
    assert not module.stem.training
    assert module.state_dict().keys() == state.keys()
    assert torch.equal(run_branches(lambda: module.eval()(x)), before)


@pytest.mark.parametrize('verify', [False, True])
@pytest.mark.parametrize('name', ['repvgg', 'acb'])
def test_switch_in_inference_mode_gives_parameters_that_train(name, verify):
    model = create_model('test_repvgg', block=name)
    with torch.inference_mode():
        model.eval().switch_to_deploy(verify=images(1, px=32) if verify else None)
    assert not torch.is_inference_mode_enabled()
    model(images(1, px=32)).sum().backward()
    model.load_state_dict(model.state_dict())
    assert model.stem.reparam_conv.weight.grad is not None


def test_verify_switch_that_fails_halfway_undoes_it(model, x, monkeypatch):
    folds, fold = [], RepVGGBlock.folded_conv

    def failing(block):
        folds.append(1)
        if len(folds) == 4:
            raise MemoryError
        return fold(block)

    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(RepVGGBlock, 'folded_conv', failing)
    with pytest.raises(MemoryError):
        model.switch_to_deploy(verify=x)
    assert model.state_dict().keys() == before.keys()
    assert not any(block.reparam_conv for block in model.modules() if isinstance(block, RepVGGBlock))


def test_switch_from_the_package_is_the_same_function():
    assert repvgg_zoo.switch_to_deploy is switch_to_deploy


# ------------------------------------------------------------------------------------- what is not what it looks like


def conv_bn(size: int) -> nn.Sequential:
    branch = nn.Sequential()
    branch.add_module('conv', nn.Conv2d(8, 8, size, padding=size // 2, bias=False))
    branch.add_module('bn', nn.BatchNorm2d(8))
    return branch


class Lookalike(nn.Module):
    """A block with the official names."""

    def __init__(self):
        super().__init__()
        self.rbr_dense, self.rbr_1x1, self.rbr_identity = conv_bn(3), conv_bn(1), nn.BatchNorm2d(8)
        self.alpha, self.norm = nn.Parameter(torch.tensor(0.5)), nn.BatchNorm2d(8)

    def forward(self, x):
        if hasattr(self, 'rbr_reparam'):
            return self.after(self.rbr_reparam(x))
        return self.after(self.combine(x))

    def after(self, y):
        return y

    def combine(self, x):
        return self.rbr_dense(x) + self.rbr_1x1(x) + self.rbr_identity(x)


class ScaledPoint(Lookalike):
    def combine(self, x):
        return self.rbr_dense(x) + self.alpha * self.rbr_1x1(x) + self.rbr_identity(x)


class ScaledSum(Lookalike):
    def combine(self, x):
        return self.alpha * super().combine(x)


class NormAfter(Lookalike):
    def combine(self, x):
        return self.norm(super().combine(x)) * 2


class ActInside(Lookalike):
    def combine(self, x):
        return self.rbr_dense(x).relu() + self.rbr_1x1(x) + self.rbr_identity(x)


class NoIdentity(Lookalike):
    def combine(self, x):
        return self.rbr_dense(x) + self.rbr_1x1(x)


class Product(Lookalike):
    def combine(self, x):
        return self.rbr_dense(x) * self.rbr_1x1(x)


class Shuffled(Lookalike):
    def combine(self, x):
        return super().combine(x).flip(1)


class NormBehindBoth(Lookalike):
    def after(self, y):
        return self.norm(y).sigmoid() * self.alpha


@pytest.mark.parametrize('kind', [ScaledPoint, ScaledSum, NormAfter, ActInside, NoIdentity, Product, Shuffled])
def test_switch_lookalike_that_computes_something_else_raises(kind):
    block = randomise(kind().double(), px=9, in_chans=8)
    x = images(2, 9, in_chans=8, dtype=torch.float64)
    before, keys = block(x), list(block.state_dict())
    with pytest.raises(FoldError, match=rf"block '{kind.__name__}'.*something else than the sum of its branches"):
        switch_to_deploy(block)
    assert torch.equal(block(x), before)
    assert list(block.state_dict()) == keys


@pytest.mark.parametrize('kind', [Lookalike, NormBehindBoth])
def test_switch_lookalike_that_computes_the_same_folds(kind):
    block = randomise(kind().double(), px=9, in_chans=8)
    x = images(2, 9, in_chans=8, dtype=torch.float64)
    before = block(x)
    assert rel_diff(switch_to_deploy(block)(x), before) < 1e-12
    assert 'rbr_dense.conv.weight' not in block.state_dict()


def test_switch_lookalike_that_cannot_be_tried_raises():
    class Two(Lookalike):
        def forward(self, x, skip):
            return super().forward(x) + skip

    with pytest.raises(
        FoldError, match=r'its Two fails on \(2, 8, 5, 5\) random pixels \(TypeError.*cannot prove that '
    ):
        switch_to_deploy(to_device(Two()))


class Adapter(nn.Module):
    """Passes the attributes of a convolution on, as adapters do."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base, self.low_rank = base, nn.Conv2d(base.in_channels, base.out_channels, 1, bias=False)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base, name)

    def forward(self, x):
        return self.base(x) + self.low_rank(x)


class AdaptedConv2d(nn.Conv2d):
    """A convolution and something more, that happens to be nothing at first."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__(base.in_channels, base.out_channels, base.kernel_size, padding=base.padding, bias=False)
        self.more = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return super().forward(x) * (1 + self.more)


class Plain(nn.Conv2d):
    """A subclass that adds nothing to what is computed, as mmcv has one."""


def replace_conv(block: nn.Module, make) -> None:
    part = block.get_submodule('conv_kxk' if isinstance(block, RepVGGBlock) else 'branches.kxk')
    part.conv = to_device(make(part.conv))


def own_block(name: str) -> nn.Module:
    return randomise(block_type(name)(8, 8).double(), px=9, in_chans=8)


@pytest.mark.parametrize('name', ['repvgg', 'acb', 'qarepvgg'])
@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda conv: Adapter(conv).double(), r'Adapter, which is no convolution; merge or remove adapters'),
        (lambda conv: AdaptedConv2d(conv).double(), r'AdaptedConv2d, which has more beside a kernel; merge or remove'),
        (
            lambda conv: ScaledStdConv2d(8, 8, 3, padding=1, bias=False).double(),
            r'ScaledStdConv2d, which has gain beside a kernel',
        ),
        (lambda conv: StdConv2d(8, 8, 3, padding=1).double(), 'something else than the sum of its branches'),
        (lambda conv: nn.Identity(), r'Identity, which is no convolution'),
    ],
    ids=['adapter', 'subclass with more', 'scaled', 'standardised', 'none'],
)
def test_switch_what_is_more_than_a_convolution_raises(name, make, message):
    block = own_block(name)
    replace_conv(block, make)
    before = list(block.state_dict())
    with pytest.raises(FoldError, match=message):
        block.switch_to_deploy()
    assert list(block.state_dict()) == before


def test_switch_subclass_that_is_a_convolution_folds():
    block, x = own_block('repvgg'), images(2, 9, in_chans=8, dtype=torch.float64)
    block.conv_kxk.conv.__class__ = Plain
    before = block(x)
    assert rel_diff(block.switch_to_deploy()(x), before) < 1e-12


@pytest.mark.cpu
def test_switch_fake_quantizers_raise():
    model = create_model('test_repvgg').train()
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig('x86')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.ao.quantization.prepare_qat(model, inplace=True)
        model(images(4, 32))
    before = copy.deepcopy(model.eval().state_dict())
    with pytest.raises(FoldError, match=r'qat\.modules\.conv\.Conv2d, which has weight_fake_quant.*merge or remove'):
        model.switch_to_deploy()
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('name', ['repvgg', 'acb'])
@pytest.mark.parametrize('register', ['register_forward_hook', 'register_forward_pre_hook'])
def test_switch_hook_that_changes_outputs_raises(name, register):
    block = own_block(name)
    part = block.conv_1x1.conv if name == 'repvgg' else block.branches['kx1'].bn
    change = (
        (lambda module, args, y: 2 * y) if register == 'register_forward_hook' else (lambda _, args: (2 * args[0],))
    )
    handle = getattr(part, register)(change)
    with pytest.raises(FoldError, match='something else than the sum of its branches'):
        block.switch_to_deploy()
    handle.remove()
    block.switch_to_deploy()


def test_switch_hook_that_only_looks_folds():
    block, shapes = own_block('repvgg'), []
    block.conv_kxk.register_forward_hook(lambda module, args, y: shapes.append(y.shape))
    x = images(2, 9, in_chans=8, dtype=torch.float64)
    before = block(x)
    assert rel_diff(block.switch_to_deploy()(x), before) < 1e-12


def test_switch_patched_forward_raises():
    block = own_block('repvgg')
    block.conv_1x1.conv.forward = lambda x: x.sigmoid()
    with pytest.raises(FoldError, match='something else than the sum of its branches'):
        block.switch_to_deploy()


def wrapped_for_checkpointing(block: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(block)


class Forwarding(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__('inner'), name)

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize('make', [lambda: create_model('test_repvgg'), byobnet.repvgg_a0], ids=['ours', 'timm'])
@pytest.mark.parametrize(
    'wrap',
    [lambda block: torch.compile(block, backend='eager'), wrapped_for_checkpointing, Forwarding],
    ids=['compiled', 'checkpointed', 'forwarding'],
)
def test_switch_wrapped_blocks_have_no_more_parameters(make, wrap):
    model = randomise(make().double())
    x = images(2, 64, dtype=torch.float64)
    before = model(x)
    wanted = sum(p.numel() for p in switch_to_deploy(copy.deepcopy(model)).parameters())
    for stage in model.stages:
        for index in range(len(stage)):
            stage[index] = wrap(stage[index])
    assert rel_diff(switch_to_deploy(model)(x), before) < 1e-9  # some twenty layers
    assert sum(p.numel() for p in model.parameters()) == wanted


@pytest.mark.parametrize('part', ['conv_kxk', 'conv_1x1', 'identity'])
def test_switch_norm_that_another_tool_fused_folds(part):
    """Tools leave an nn.Identity, and a convolution with a bias."""
    block, x = own_block('repvgg'), images(2, 9, in_chans=8, dtype=torch.float64)
    if part == 'identity':
        block.identity = nn.Identity()
    else:
        branch = block.get_submodule(part)
        branch.conv, branch.bn = fuse_conv_bn_eval(branch.conv, branch.bn), nn.Identity()
    before = block(x)
    assert rel_diff(block.switch_to_deploy()(x), before) < 1e-12


def test_switch_timms_block_fused_by_another_tool_folds():
    block = randomise(byobnet.repvgg_a0().double()).stages[0][1]
    x = images(2, 9, in_chans=48, dtype=torch.float64)
    block.conv_kxk.conv, block.conv_kxk.bn = fuse_conv_bn_eval(block.conv_kxk.conv, block.conv_kxk.bn), nn.Identity()
    before = block(x)
    assert rel_diff(switch_to_deploy(block)(x), before) < 1e-12


@pytest.mark.parametrize('make', [RepVGGBlock, lambda *a, **k: block_type('acb')(*a, **k)], ids=['repvgg', 'acb'])
def test_switch_weights_on_meta_raise(make):
    with pytest.raises(FoldError, match=r"on device 'meta' and has no values; load the weights first"):
        switch_to_deploy(nn.Sequential(make(4, 4), make(4, 4, device='meta')))


SHARDED = r'sharded over processes.*gather the full state dict .*get_model_state_dict.*switch that one'


def sharded(kind):
    from torch.distributed import fsdp, tensor

    mesh = torch.distributed.init_device_mesh('cpu', (1,))
    model = create_model('test_repvgg')
    if kind == 'FSDP':
        return fsdp.FullyShardedDataParallel(model, device_id=torch.device('cpu'))
    if kind == 'tensor parallel':
        return tensor.distribute_module(model, mesh)
    return fsdp.fully_shard(model, mesh=mesh)


@pytest.mark.cpu
@pytest.mark.parametrize('kind', ['FSDP', 'FSDP2', 'tensor parallel'])
def test_switch_sharded_module_raises(kind, tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        model = sharded(kind)
        keys = None if kind == 'FSDP' else list(model.state_dict())
        if kind == 'FSDP2':
            model.unshard()  # for the time being
        block = next(m for m in model.modules() if isinstance(m, RepVGGBlock))
        for part in (model, block) if kind == 'tensor parallel' else (model,):
            with pytest.raises(FoldError, match=SHARDED):
                switch_to_deploy(part)
        if kind != 'FSDP':
            with pytest.raises(FoldError, match=SHARDED):
                model.switch_to_deploy()
        assert keys is None or list(model.state_dict()) == keys
    finally:
        torch.distributed.destroy_process_group()


def test_switch_undone_keeps_the_order_of_parameters(model, x, monkeypatch):
    """By which optimizers find their state."""
    before = [name for name, _ in model.named_parameters()]
    monkeypatch.setattr(comparison, 'max_rel_diff', lambda *_: -1)
    with pytest.raises(FoldError):
        model.switch_to_deploy(verify=x)
    assert [name for name, _ in model.named_parameters()] == before
    assert list(model.state_dict()) == list(create_model('test_repvgg').state_dict())


def prune_half(conv):
    return nn.utils.prune.l1_unstructured(conv, 'weight', 0.5)


class Silent(Lookalike):
    """All units are below zero on small inputs."""

    def combine(self, x):
        return 2 * super().combine(x) - 30 + 30 * hasattr(self, 'rbr_reparam')

    def after(self, y):
        return y.relu()


class Saturated(Lookalike):
    def combine(self, x):
        return self.rbr_dense(x).clamp(-20, 20) + self.rbr_1x1(x) + self.rbr_identity(x)


@pytest.mark.parametrize('kind', [Silent, Saturated])
def test_switch_lookalike_that_differs_only_on_large_inputs_raises(kind):
    with pytest.raises(FoldError, match='something else than the sum of its branches'):
        switch_to_deploy(to_device(kind().double()).eval())


def test_switch_block_of_zeros_raises():
    block = to_device(Lookalike().double()).eval()
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    with pytest.raises(FoldError, match='gives only zeros on random pixels'):
        switch_to_deploy(block)


@pytest.mark.parametrize('reparametrize', [nn.utils.weight_norm, nn.utils.spectral_norm, prune_half])
def test_switch_foreign_block_with_hooked_kernel_folds(reparametrize):
    block = randomise(Lookalike().double(), px=9, in_chans=8)
    reparametrize(block.rbr_dense.conv)
    x = images(2, 9, in_chans=8, dtype=torch.float64)
    before = block(x)
    after = switch_to_deploy(block)(x)
    assert rel_diff(after, before) < 1e-12
    assert block.rbr_reparam.weight.requires_grad


class Labels(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        y = self.block(x)
        return y.mean((2, 3)), y.mean((2, 3)).argmax(1), y[:0]


def test_verify_integer_outputs_are_ignored():
    network = Labels(randomise(RepVGGBlock(8, 8), px=9, in_chans=8))
    assert switch_to_deploy(network, verify=images(2, 9, in_chans=8)).block.is_deploy()


def test_verify_nothing_to_compare_raises():
    class Namespace(Labels):
        def forward(self, x):
            return types.SimpleNamespace(y=self.block(x))

    network = to_device(Namespace(RepVGGBlock(8, 8)))
    with pytest.raises(ValueError, match='Namespace returns none'):
        switch_to_deploy(network, verify=images(2, 9, in_chans=8))
    assert not network.block.is_deploy()
