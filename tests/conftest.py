"""Shared helpers: models with realistic statistics, and how far two outputs are apart."""

from __future__ import annotations

import shutil

import pytest
import timm
import torch
from hub_server import TOKEN, hub_server
from huggingface_hub import constants
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

import repvgg_zoo
from repvgg_zoo import blocks
from repvgg_zoo.manifest import read_manifest, weights_dir

settings.register_profile(
    'zoo',  # without a clock: machines may be busy
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile('zoo')

TIMM_NAMES = [name for name in repvgg_zoo.VARIANTS if hasattr(timm.models.byobnet, name)]
LARGE = {'repvgg_b2', 'repvgg_b3', 'repvgg_b3g2', 'repvgg_b3g4', 'repvgg_d2se', 'repvggplus_l2pse'}
"""Variants whose tests take many seconds."""
FORMS = pytest.mark.parametrize('deploy', [False, True], ids=['training', 'deploy'])


def params(names: list[str]) -> list:
    """Test parameters, the large variants marked slow."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in names]


@torch.no_grad()
def randomise(model: nn.Module, *, seed: int = 0, px: int = 64, in_chans: int = 3) -> nn.Module:
    """Give every normalisation layer its own affine parameters and statistics; returns the model in eval mode.

    With fresh statistics (mean 0, variance 1, scale 1, shift 0) nearly every wrong fold passes. The
    statistics are those of a random batch, disturbed, so that activations keep their size in nets of
    any depth.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator).to(like) * (high - low) + low

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        if norm.affine:
            norm.weight.copy_(uniform(norm.weight, 0.3, 1.2))
            norm.weight[::7] *= -1
            norm.bias.copy_(uniform(norm.bias, -0.3, 0.3))
    dtype = next(model.parameters()).dtype
    model.train()(torch.randn(2, in_chans, px, px, generator=generator).to(dtype))
    for norm in norms:
        norm.momentum = 0.1
        norm.running_mean += uniform(norm.running_mean, -0.1, 0.1)
        norm.running_var *= uniform(norm.running_var, 0.7, 1.4)
        norm.running_var += 0.1 * norm.running_var.mean()  # a channel that the batch left silent is not amplified
    return model.eval()


def images(
    count: int = 1, px: int = 64, *, in_chans: int = 3, seed: int = 1, dtype: torch.dtype = torch.float32
) -> Tensor:
    return torch.randn(count, in_chans, px, px, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rel_diff(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value of b."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


@pytest.fixture
def taken(monkeypatch) -> list[bool]:
    """Of each block of the training form that runs, whether it takes a faster way than branch by branch."""
    taken, real = [], blocks.sum_branches

    def spy(*args, **kwargs):
        y = real(*args, **kwargs)
        taken.append(y is not None)
        return y

    monkeypatch.setattr(blocks, 'sum_branches', spy)
    return taken


@pytest.fixture
def own_weights(tmp_path, monkeypatch):
    """A manifest, with the bundled weights, that a test can write to."""
    folder = tmp_path / 'weights'
    folder.mkdir()
    for path in weights_dir().iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    monkeypatch.setattr('repvgg_zoo.manifest.weights_dir', lambda: folder)
    monkeypatch.setattr('repvgg_zoo.publish.weights_dir', lambda: folder)
    read_manifest.cache_clear()
    yield folder
    monkeypatch.undo()
    read_manifest.cache_clear()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on loopback that huggingface-hub's client in this process talks to, with an empty cache."""
    with hub_server(tmp_path / 'blobs') as server:
        url = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', url)
        monkeypatch.setattr(constants, 'ENDPOINT', server.url)
        monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
        monkeypatch.setattr('repvgg_zoo.hub._WAITS_S', (0, 0))
        monkeypatch.setenv('HF_TOKEN', TOKEN)
        yield server
