"""What tests share: models with realistic statistics, foreign layouts, and how far two outputs are apart."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, SEModule
from torch import Tensor, nn

import repvgg_zoo
from repvgg_zoo import VARIANTS
from repvgg_zoo.blocks.base import ReparamBlock
from repvgg_zoo.quantization.equalize import neighbours, rescale
from repvgg_zoo.reparam.evaluation import disable_fast_path
from repvgg_zoo.reparam.tolerance import rel_diff as rel_diff

TIMM_NAMES = [name for name in repvgg_zoo.VARIANTS if hasattr(timm.models.byobnet, name)]
LARGE = {'repvgg_b2', 'repvgg_b3', 'repvgg_b3g2', 'repvgg_b3g4', 'repvgg_d2se', 'repvggplus_l2pse'}
"""Variants whose tests take many seconds."""
FORMS = pytest.mark.parametrize('deploy', [False, True], ids=['training', 'deploy'])
DEVICE_VARIABLE = 'REPVGG_ZOO_TEST_DEVICE'
MovableT = TypeVar('MovableT', Tensor, nn.Module)


def device_of_tests() -> torch.device:
    """As given by `pytest --device` or the environment variable."""
    return torch.device(os.environ.get(DEVICE_VARIABLE, 'cpu'))


def to_device(given: MovableT) -> MovableT:
    """Move what was made on the CPU, from its seeded generator, to the device of the tests."""
    return given.to(device_of_tests())


def create_model(name: str, **kwargs: Any) -> nn.Module:
    """timm's, on the device of the tests."""
    return to_device(timm.create_model(name, **kwargs))


def params(names: list[str]) -> list:
    """Test parameters, two of the large variants marked slow and the others exhaustive."""
    marks = {
        name: pytest.mark.slow if name in ('repvgg_b3', 'repvgg_d2se') else pytest.mark.exhaustive for name in LARGE
    }
    return [pytest.param(name, marks=marks[name]) if name in marks else name for name in names]


ABLATIONS = {'plain_delta', 'no_identity', 'no_1x1', 'no_identity_bn', 'bn_after'}
"""Block types that are made of branches as others are: those of plain, mobileone, repvgg, qarepvgg and csla."""


def block_params(names: Iterable[str]) -> list:
    """Test parameters, the ablations marked exhaustive."""
    return [pytest.param(name, marks=pytest.mark.exhaustive) if name in ABLATIONS else name for name in names]


@torch.no_grad()
def randomise(model: nn.Module, *, seed: int = 0, px: int = 64, in_chans: int = 3) -> nn.Module:
    """Give every normalisation layer its own affine parameters and statistics.

    Returns the model in eval mode, on the device of the tests.

    With fresh statistics (mean 0, variance 1, scale 1, shift 0) nearly every wrong fold passes. The
    statistics are those of a random batch, disturbed, so that activations keep their size in nets of
    any depth.
    """
    generator = torch.Generator().manual_seed(seed)
    to_device(model)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator).to(like) * (high - low) + low

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        if norm.affine:
            norm.weight.copy_(uniform(norm.weight, 0.3, 1.2))
            norm.weight[::7] *= -1
            norm.bias.copy_(uniform(norm.bias, -0.3, 0.3))
    model.train()(torch.randn(2, in_chans, px, px, generator=generator).to(next(model.parameters())))
    for norm in norms:
        norm.momentum = 0.1
        norm.running_mean += uniform(norm.running_mean, -0.1, 0.1)
        norm.running_var *= uniform(norm.running_var, 0.7, 1.4)
        norm.running_var += 0.1 * norm.running_var.mean()  # a channel that the batch left silent is not amplified
    return model.eval()


def images(
    count: int = 1, px: int = 64, *, in_chans: int = 3, seed: int = 1, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Drawn on the CPU, and moved to the device of the tests."""
    return to_device(torch.randn(count, in_chans, px, px, generator=torch.Generator().manual_seed(seed)).to(dtype))


MMPRETRAIN = [
    ('stem.', 'backbone.stem.'),
    *((f'stages.{s}.', f'backbone.stage_{s + 1}.') for s in range(4)),
    ('.conv_kxk.conv.', '.branch_3x3.conv.'),
    ('.conv_kxk.bn.', '.branch_3x3.norm.'),
    ('.conv_1x1.conv.', '.branch_1x1.conv.'),
    ('.conv_1x1.bn.', '.branch_1x1.norm.'),
    ('.identity.', '.branch_norm.'),
    ('.reparam_conv.', '.branch_reparam.'),
    ('.attn.fc1.', '.se_layer.conv1.conv.'),
    ('.attn.fc2.', '.se_layer.conv2.conv.'),
]
OFFICIAL = [
    ('stem.', 'stage0.'),
    *((f'stages.{s}.', f'stage{s + 1}.') for s in range(4)),
    ('.conv_kxk.', '.rbr_dense.'),
    ('.conv_1x1.', '.rbr_1x1.'),
    ('.identity.', '.rbr_identity.'),
    ('.reparam_conv.', '.rbr_reparam.'),
    ('.attn.fc1.', '.se.down.'),
    ('.attn.fc2.', '.se.up.'),
    ('head.fc.', 'linear.'),
]


LAYOUTS = {'timm': [], 'mmpretrain': MMPRETRAIN, 'official': OFFICIAL}
"""Renamings of timm's keys, by the name of the layout."""


def rename(state_dict, table):
    renamed = {}
    for key, value in state_dict.items():
        for ours, theirs in table:
            key = key.replace(ours, theirs, 1)
        renamed[key] = value
    return renamed


PLUS = 'repvggplus_l2pse'


def official(name: str) -> torch.nn.Module:
    from repvgg_pytorch.repvgg import RepVGGBlock, get_RepVGG_func_by_name
    from repvgg_pytorch.repvggplus import RepVGGplus

    if name == PLUS:
        variant = VARIANTS[PLUS]
        return RepVGGplus(variant.depths, 1000, variant.width, use_post_se=True)
    size = name.removeprefix('repvgg_').removesuffix('_cifar')
    model = get_RepVGG_func_by_name(f'RepVGG-{size[0].upper()}{size[1:]}')()
    if name.endswith('_cifar'):  # https://github.com/chenyaofo/pytorch-cifar-models: stride 1 twice, 10 classes
        stem, first = model.stage0.rbr_dense.conv.out_channels, model.stage1[0].rbr_dense.conv.out_channels
        model.stage0 = RepVGGBlock(3, stem, 3, stride=1, padding=1)
        model.stage1[0] = RepVGGBlock(stem, first, 3, stride=1, padding=1)
        model.linear = nn.Linear(model.linear.in_features, 10)
    return model


def logits(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Of the official model; the deploy form of its RepVGGplus calls auxiliary heads that it deleted."""
    if type(model).__name__ == 'RepVGGplus':
        for stage in (model.stage0, model.stage1, model.stage2, model.stage3_first, model.stage3_second, model.stage4):
            x = stage(x)
        return model.linear(model.flatten(model.gap(x)))
    return model(x)


CONFIGURATIONS = [
    dict(),
    dict(stride=2),
    dict(dilation=2),
    dict(stride=2, dilation=2),
    dict(groups=2),
    dict(groups=8),
    dict(identity=False),
    *(dict(padding_mode=mode) for mode in ('reflect', 'replicate', 'circular')),
    dict(padding_mode='reflect', dilation=2, stride=2),
    dict(norm_layer=partial(nn.BatchNorm2d, affine=False)),
    dict(norm_layer=partial(nn.BatchNorm2d, eps=0.3)),
    dict(norm_layer=partial(BatchNormAct2d, apply_act=False)),
    dict(attn_layer=SEModule),
    dict(attn_layer=SEModule, attn_last=True),
    dict(drop_path_rate=0.5),
    dict(act_layer=nn.SiLU),
]


def run_branches(run: Callable[[], Any]) -> Any:
    """What the branches give, run one after the other."""
    with disable_fast_path(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReparamBlock, 'run_folded', lambda *_: None)  # not recorded by `taken`
        return run()


def deployed_with_weights() -> torch.nn.Module:
    """The bundled model in the deploy form."""
    return timm.create_model('test_repvgg.cifar10_deploy', pretrained=True).eval()


def unbalanced_ranges(seed: int = 0) -> torch.nn.Module:
    """The same function, with channels whose ranges differ a hundredfold."""
    model, generator = deployed_with_weights(), torch.Generator().manual_seed(seed)
    for first, second in neighbours(model):
        scale = 10 ** (2 * torch.rand(first.reparam_conv.out_channels, generator=generator) - 1)
        rescale(first, second, scale)
    return model
