"""Shared helpers: models with realistic statistics, and how far two outputs are apart."""

from __future__ import annotations

import copy
import os
import random
import shutil
import urllib.request

import numpy as np
import pytest
import timm
import torch
from helpers import DEVICE_VARIABLE, device_of_tests, randomise
from hub_server import TOKEN, ToLoopback, hub_server
from huggingface_hub import constants
from hypothesis import HealthCheck, settings
from safetensors.torch import save_file
from timm.models import _registry as timm_registry

from repvgg_zoo.blocks.base import ReparamBlock
from repvgg_zoo.blocks.branches import chains, parallel
from repvgg_zoo.overparam import registry as overparam_registry
from repvgg_zoo.pretrained.manifest import read_manifest, weights_dir

settings.register_profile(
    'zoo',  # without a clock: machines may be busy
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile('zoo')


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption('--device', help=f'run the tests that are marked device on it; default: ${DEVICE_VARIABLE} or cpu')


def pytest_configure(config: pytest.Config) -> None:
    if (given := config.getoption('--device')) is not None:
        os.environ[DEVICE_VARIABLE] = given
    if device_of_tests().type == 'cuda':
        # The tests bound rounding in float32, and TF32 has three digits. They compare runs bit by bit, and some
        # algorithms of cuDNN add up in another order each time.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On another device, leave out what is about the CPU, files, names or publishing."""
    if device_of_tests().type == 'cpu':
        return
    kept = [item for item in items if item.get_closest_marker('device') and not item.get_closest_marker('cpu')]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


@pytest.fixture(scope='session')
def device() -> torch.device:
    return device_of_tests()


def seed_generators() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed before the fixtures of a module are made: what they draw depends on no earlier test."""
    seed_generators()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed each test: what it draws depends on no fixture of its module."""
    seed_generators()


@pytest.fixture
def fast_path_calls(monkeypatch) -> list[bool]:
    """Of each block of the training form that runs, whether it takes a faster way than branch by branch."""
    calls, fold, recompute = [], ReparamBlock.run_folded, chains.normalise_and_recompute

    def spy_on_fold(*args):
        y = fold(*args)
        calls.append(y is not None)
        return y

    def spy_on_recompute(*args):
        calls[-1] = True
        return recompute(*args)

    monkeypatch.setattr(ReparamBlock, 'run_folded', spy_on_fold)
    for room in (chains, parallel):
        monkeypatch.setattr(room, 'normalise_and_recompute', spy_on_recompute)
    return calls


@pytest.fixture
def own_weights(tmp_path, monkeypatch):
    """A manifest, with the bundled weights, that a test can write to."""
    folder = tmp_path / 'weights'
    folder.mkdir()
    for path in weights_dir().iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    monkeypatch.setattr('repvgg_zoo.pretrained.manifest.weights_dir', lambda: folder)
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
        monkeypatch.setattr('repvgg_zoo.pretrained.network._WAITS_S', (0, 0))
        monkeypatch.setenv('HF_TOKEN', TOKEN)
        yield server


@pytest.fixture
def web(hub, tmp_path, monkeypatch):
    """A server on loopback in the place of all others, with an empty cache of torch.hub."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    urllib.request.install_opener(urllib.request.build_opener(ToLoopback(hub)))
    yield hub
    urllib.request.install_opener(None)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / 'model'
    folder.mkdir()
    (folder / 'README.md').write_text('---\nlicense: mit\n---\n')
    (folder / 'config.json').write_text('{"architecture": "test_repvgg", "num_classes": 10}')
    save_file(randomise(timm.create_model('test_repvgg'), px=32).state_dict(), folder / 'model.safetensors')
    return folder


@pytest.fixture
def own_registry(monkeypatch):
    """A copy of timm's registry, for names of a test alone."""
    for module in (timm_registry, overparam_registry):
        for name, value in list(vars(module).items()):
            if isinstance(value, dict | set) and not name.startswith('__'):
                own = copy.copy(value)
                if isinstance(own, dict):
                    own.update({key: copy.copy(v) for key, v in value.items() if isinstance(v, list | set)})
                monkeypatch.setattr(module, name, own)
