"""The blocks of other networks that fold: whole networks, and what a fold keeps."""

import copy
from collections import OrderedDict
from typing import Any

import pytest
import timm
import torch
from helpers import images, randomise, rel_diff
from timm.models import byobnet, efficientvit_msra, fastvit, ghostnet, levit, nextvit, repghost, repvit, shvit
from timm.utils.model import reparameterize_model
from torch import nn

from repvgg_zoo import FoldError, switch_to_deploy
from repvgg_zoo.reparam import comparison
from repvgg_zoo.reparam.foreign import KNOWN_BLOCKS
from repvgg_zoo.reparam.trial import find_known_blocks

TINY_VIT = dict(embed_dims=(16, 32, 48, 64), depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4))
FAST = {
    'efficientvit_m0': (224, {}),
    'fastvit_mci0': (64, dict(layers=(1, 1, 1, 1))),
    'fastvit_t8': (64, {}),
    'levit_128s': (224, {}),
    'mobileone_s0': (64, {}),
    'nextvit_small': (64, dict(depths=(1, 2, 5, 2))),
    'repghostnet_050': (64, {}),
    'repvit_m0_9': (64, {}),
    'shvit_s1': (64, {}),
    'tiny_vit_5m_224': (64, TINY_VIT),
}
"""Networks by timm's name, with a size in pixels and options that make them small."""
SLOW = {
    'lcnetv2_small': (64, {}),
    'iformer_t': (64, {}),
    'efficientvim_m1': (64, {}),
    'ghostnetv3_050': (64, {}),
    'levit_conv_128s': (224, {}),
    'mobileone_s4': (64, {}),
    'nextvit_base': (64, {}),
    'repvit_m1_1': (64, {}),
    'repvit_m1': (64, {}),
    'lcnetv2_base': (64, {}),
    'fastvit_sa12': (64, {}),
}
NETS = pytest.mark.parametrize(
    ('name', 'px', 'options'),
    [
        pytest.param(name, *rest, marks=[pytest.mark.exhaustive] if name in SLOW else [], id=name)
        for name, rest in (FAST | SLOW).items()
        if timm.is_model(name)  # older releases of timm lack some
    ],
)


def models(name: str) -> Any:
    """Import a module of timm that older releases lack."""
    return pytest.importorskip(f'timm.models.{name}')


def count_norms(module: nn.Module) -> int:
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_known_ghostnet_folds_exactly():
    cfgs = [[[3, 16, 16, 0, 1]], [[3, 48, 24, 0, 2], [3, 72, 24, 0.25, 1]], [[5, 72, 40, 0.25, 2]]]
    model = randomise(ghostnet.GhostNet(cfgs, width=0.5, version='v3', num_classes=10).double())
    x = images(1, dtype=torch.float64)
    before = model(x)
    theirs = reparameterize_model(model)
    assert rel_diff(switch_to_deploy(model)(x), before) < 1e-12
    assert list(model.state_dict()) == list(theirs.state_dict())


@NETS
def test_known_network_folds_exactly_and_as_timm(name, px, options):
    model = randomise(timm.create_model(name, **options).double(), px=px)
    theirs = reparameterize_model(model)
    x = images(1, px=px, dtype=torch.float64)
    with torch.no_grad():
        before = model(x)
        parameters, norms = count_parameters(model), count_norms(model)
        assert switch_to_deploy(model) is model
        assert rel_diff(model(x), before) < 1e-12
    assert count_parameters(model) < parameters
    assert count_norms(model) < norms
    state, expected = model.state_dict(), theirs.state_dict()
    assert list(state) == list(expected)
    assert [v.shape for v in state.values()] == [v.shape for v in expected.values()]
    modules = list(model.modules())
    switch_to_deploy(model)
    assert modules == list(model.modules())
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


DTYPES = pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)


def assert_rounds_once(model, dtype):
    exact = switch_to_deploy(copy.deepcopy(model).double())
    switch_to_deploy(model)
    expected = exact.to(dtype).state_dict()
    for key, value in model.state_dict().items():
        assert value.dtype == (torch.int64 if key.endswith('num_batches_tracked') else dtype)
        assert torch.equal(value, expected[key]), key


@pytest.mark.exhaustive
@DTYPES
@NETS
def test_known_network_in_less_precision_rounds_once(name, px, options, dtype):
    torch.manual_seed(0)
    assert_rounds_once(randomise(timm.create_model(name, **options), px=px).to(dtype), dtype)


BLOCKS = {
    'mobileone': lambda: byobnet.MobileOneBlock(8, 8, num_conv_branches=2),
    'mobileone of fastvit': lambda: fastvit.MobileOneBlock(4, 8, 3, stride=2, use_se=True, num_conv_branches=1),
    'mixer': lambda: fastvit.RepMixer(8),
    'large kernel': lambda: fastvit.ReparamLargeKernelConv(8, 16, 7, 2, 1, small_kernel=3),
    'position': lambda: fastvit.RepConditionalPosEnc(8, spatial_shape=(7, 7)),
    'ghost': lambda: ghostnet.GhostBottleneckV3(8, 12, 8, stride=2, se_ratio=0.25, mode='shortcut'),
    'ghost module': lambda: ghostnet.GhostModuleV3(8, 12, act_layer=nn.ReLU, mode='original'),
    'repghost': lambda: repghost.RepGhostModule(8, 12),
    'nextvit convolution': lambda: nextvit.NextConvBlock(32, 64),
    'nextvit transformer': lambda: nextvit.NextTransformerBlock(32, 128, 0.0, sr_ratio=2),
    'repvit': lambda: repvit.RepVggDw(8, 3),
    'repvit legacy': lambda: repvit.RepVggDw(8, 3, legacy=True),
    'layer': lambda: efficientvit_msra.ConvNorm(8, 12, 3, 1, 1),
    'levit layer': lambda: levit.ConvNorm(8, 12, 3, 2, 1),
    'efficientvim': lambda: models('efficientvim').PatchMerging(8, 12),
    'lcnet': lambda: models('lcnetv2').RepDepthwiseSeparable(8, 12, dw_kernel_size=5, use_rep=True),
    'iformer position': lambda: models('iformer').RepCPE(8),
    'residual': lambda: shvit.Residual(shvit.Conv2dNorm(8, 8, 3, 1, 1, groups=8)),
}


class Tail(nn.Module):
    """As the RepVGG block of RT-DETR in transformers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.activation = nn.Identity()

    def forward(self, x):
        return self.activation(self.norm(self.conv(x)))


class DetectorRepVggBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.activation = Tail(), Tail(), nn.SiLU()
        self.conv2.conv = nn.Conv2d(8, 8, 1, bias=False)

    def forward(self, x):
        return self.activation(self.conv1(x) + self.conv2(x))


class SequentialRepVggBlock(DetectorRepVggBlock):
    """LW-DETR calls two convolutions in a row so, without an activation of the block."""

    def __init__(self):
        super().__init__()
        del self.activation

    def forward(self, x):
        return self.conv2(self.conv1(x))


BLOCKS['detector'] = DetectorRepVggBlock


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    block = BLOCKS[name]()
    channels = {'nextvit convolution': 32, 'nextvit transformer': 32, 'mobileone of fastvit': 4}.get(name, 8)
    return randomise(nn.Sequential(OrderedDict(block=block, end=nn.Tanh())).double(), px=16, in_chans=channels)


def pixels_for(name: str) -> torch.Tensor:
    channels = {'nextvit convolution': 32, 'nextvit transformer': 32, 'mobileone of fastvit': 4}.get(name, 8)
    return images(2, px=16, in_chans=channels, dtype=torch.float64)


EVERY_BLOCK = pytest.mark.parametrize('name', BLOCKS)


@EVERY_BLOCK
def test_known_block_fold_keeps_outputs_and_flags(name):
    model, x = made(name), pixels_for(name)
    before = model(x)
    model.requires_grad_(False).train()
    model.end.eval()
    rng = torch.get_rng_state()
    switch_to_deploy(model, verify=x)
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.get_default_dtype() == torch.float32
    assert not any(p.requires_grad for p in model.parameters())
    assert all(m.training for m in model.block.modules())
    assert not model.end.training
    assert rel_diff(model.eval()(x), before) < 1e-12
    assert not list(find_known_blocks(model))


@DTYPES
@EVERY_BLOCK
def test_known_block_in_less_precision_rounds_once(name, dtype):
    assert_rounds_once(made(name).to(dtype), dtype)


@EVERY_BLOCK
def test_known_block_trainable_parameters_stay_trainable(name):
    model = made(name)
    assert all(p.requires_grad for p in switch_to_deploy(model).parameters())


@EVERY_BLOCK
def test_known_block_fold_that_fails_verification_is_undone(name, monkeypatch):
    model, x = made(name), pixels_for(name)
    modules, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    attributes = {m: dict(vars(m)) for m in model.modules()}
    parameters = list(model.parameters())
    monkeypatch.setattr(comparison, 'max_rel_diff', lambda *_: -1)
    with pytest.raises(FoldError, match='the deploy form differs'):
        switch_to_deploy(model, verify=x)
    assert dict(model.named_modules()) == modules
    assert list(modules) == [path for path, _ in model.named_modules()]
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    for module, before in attributes.items():
        plain = {k: v for k, v in vars(module).items() if not isinstance(v, (dict, torch.Tensor))}
        assert plain == {k: v for k, v in before.items() if not isinstance(v, (dict, torch.Tensor))}
    torch.optim.SGD(parameters, 0.1).step()  # they are in use again


@EVERY_BLOCK
def test_known_block_optimizer_of_replaced_parameters_raises(name):
    model = made(name)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    switch_to_deploy(model)
    with pytest.raises(RuntimeError, match='were replaced by'):
        optimizer.step()


@EVERY_BLOCK
@pytest.mark.parametrize('change', ['sync', 'no affine', 'channels_last'])
def test_known_block_of_other_norms_and_layouts_folds(name, change):
    model, x = made(name), pixels_for(name)
    if change == 'sync':
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif change == 'no affine':
        for norm in model.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                norm.weight = norm.bias = None
                norm.affine = False
    else:
        model.to(memory_format=torch.channels_last)
    before = model(x)
    switch_to_deploy(model)
    assert not list(find_known_blocks(model))
    assert rel_diff(model(x), before) < 1e-12
    if change == 'channels_last':
        kernels = [p for p in model.parameters() if p.ndim == 4]
        assert all(k.is_contiguous(memory_format=torch.channels_last) for k in kernels)


@pytest.mark.parametrize('name', sorted(BLOCKS.keys() - {'position'}))
def test_known_block_with_a_bad_variance_raises_and_changes_nothing(name):
    model = nn.Sequential(made(name).block, made(name))
    norm = next(m for m in model[1].modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    norm.running_var[1] = -1
    modules = list(model.modules())
    with pytest.raises(FoldError, match=r"cannot fold block '1\.block.*running variance -1\.0 in channel 1"):
        switch_to_deploy(model)
    assert list(model.modules()) == modules


def test_known_block_without_finite_weights_raises():
    model = made('position')
    model.block.pos_enc.weight.data[0] = torch.nan
    with pytest.raises(FoldError, match='not finite'):
        switch_to_deploy(model)


def test_known_block_modules_that_the_fold_leaves_stay_the_same_objects():
    model = made('ghost')
    attention, shortcut = model.block.se, list(model.block.shortcut.parameters())
    switch_to_deploy(model)
    assert model.block.se is attention
    assert all(p is q for p, q in zip(model.block.shortcut.parameters(), shortcut, strict=True))


def test_known_block_hooks_still_fire():
    model, seen = made('layer'), []
    handle = model.block.register_forward_hook(lambda *a: seen.append(a[2].shape))
    switch_to_deploy(model)
    assert type(model.block) is nn.Conv2d
    seen.clear()
    model(pixels_for('layer'))
    assert len(seen) == 1
    handle.remove()
    model(pixels_for('layer'))
    assert len(seen) == 1


def test_known_block_in_two_places_is_replaced_in_both():
    model, x = made('layer'), pixels_for('layer')
    square = randomise(nn.Sequential(efficientvit_msra.ConvNorm(8, 8, 3, 1, 1), model.end).double(), in_chans=8)
    twice = nn.Sequential(square[0], nn.ReLU(), square)
    before = twice(x)
    switch_to_deploy(twice)
    assert twice[0] is square[0]
    assert count_norms(twice) == 0
    assert rel_diff(twice(x), before) < 1e-12


def test_known_block_as_root_folds_in_place_or_says_how():
    block = made('mobileone').block
    before = block(pixels_for('mobileone'))
    assert rel_diff(switch_to_deploy(block)(pixels_for('mobileone')), before) < 1e-12
    with pytest.raises(FoldError, match=r'wrap it, by torch\.nn\.Sequential'):
        switch_to_deploy(made('layer').block)


class Scaled(efficientvit_msra.ConvNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def test_known_block_that_computes_something_else_raises():
    model = randomise(nn.Sequential(Scaled(8, 8, 3, 1, 1)), in_chans=8)
    with pytest.raises(FoldError, match="cannot fold block '0': its Scaled computes something else"):
        switch_to_deploy(model)
    assert count_norms(model) == 1


def test_known_block_lookalike_of_detectors_is_left():
    model = nn.Sequential(SequentialRepVggBlock())
    with pytest.raises(ValueError, match='no RepVGG block'):
        switch_to_deploy(model)


def test_known_block_too_large_for_half_precision_raises():
    model = made('layer').half()
    model.block.bn.weight.data[2] = 6e4
    model.block.bn.running_var[2] = 1e-6
    with pytest.raises(FoldError, match=r'the folded weight of channel 2 is not finite in torch\.float16'):
        switch_to_deploy(model)
    assert count_norms(model) == 1


def test_known_block_on_meta_raises():
    with pytest.raises(FoldError, match="is on device 'meta'"):
        switch_to_deploy(made('mixer').to('meta'))


def test_known_network_of_fresh_weights_folds():
    """Some blocks start with norms that scale by zero."""
    switch_to_deploy(timm.create_model('shvit_s1').eval(), verify=images(1))


def test_known_blocks_every_row_matches_a_block():
    names = ('efficientvim_m1', 'iformer_t', 'lcnetv2_small', 'levit_128s')
    if missing := [name for name in names if not timm.is_model(name)]:
        pytest.skip(f'timm {timm.__version__} has no {missing[0]}')
    rows = {row.name for name in names for _, _, row in find_known_blocks(timm.create_model(name, device='meta'))}
    rows |= {row.name for name in BLOCKS for _, _, row in find_known_blocks(made(name))}
    assert rows >= {row.name for row in KNOWN_BLOCKS} - {'RepViT, SHViT, iFormer: classifier'}  # inside another
    assert next(find_known_blocks(repvit.NormLinear(8, 3)))[2].name == 'RepViT, SHViT, iFormer: classifier'


@pytest.mark.exhaustive
def test_known_blocks_of_rt_detr_fold():
    transformers = pytest.importorskip('transformers')
    layers = dict(encoder_hidden_dim=16, encoder_in_channels=[16, 16, 16], d_model=16, num_queries=5)
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type='basic',
        out_features=['stage2', 'stage3', 'stage4'],
    )
    config = transformers.RTDetrConfig(
        backbone_config=backbone, encoder_attention_heads=2, decoder_attention_heads=2, decoder_layers=1, **layers
    )
    config.decoder_in_channels = [16, 16, 16]
    model, x = transformers.RTDetrModel(config).double().eval(), images(1, dtype=torch.float64)
    before = model(x).last_hidden_state
    assert count_norms(switch_to_deploy(model)) == count_norms(transformers.RTDetrModel(config)) - 24
    assert rel_diff(model(x).last_hidden_state, before) < 1e-12
