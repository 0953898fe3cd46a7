"""Torch files with more than tensors: read without running their code, or refused with a remedy."""

import argparse
import collections
import datetime
import functools
import pathlib
import sys
import types

import numpy as np
import pytest
import timm
import torch
from torch import nn

from repvgg_zoo import CheckpointError, load_checkpoint
from repvgg_zoo.checkpoints.files import read_checkpoint


@pytest.fixture(scope='module')
def state_dict():
    return timm.create_model('test_repvgg', pretrained=True).state_dict()


@pytest.fixture
def foreign(monkeypatch):
    """A package that is there when a file is written, and gone when it is read."""
    package = types.ModuleType('gone')

    class Config(dict):  # as yacs.config.CfgNode and mmengine's ConfigDict: items and attributes
        pass

    class History:  # as mmengine's HistoryBuffer and omegaconf's nodes
        def __init__(self):
            self.values = np.arange(3)

    class Steps(list):
        pass

    for made in (Config, History, Steps):
        made.__module__, made.__qualname__ = 'gone', made.__name__
        setattr(package, made.__name__, made)
    monkeypatch.setitem(sys.modules, 'gone', package)
    config = Config(lr=0.1, nested=Config(a=[1]))
    config.frozen = True
    yield {'config': config, 'history': {'loss': History()}}
    monkeypatch.delitem(sys.modules, 'gone', raising=False)


OBJECTS = {
    'numpy scalar': np.float64(0.9),
    'numpy array': np.arange(3),
    'path': pathlib.Path('runs/a'),
    'arguments': argparse.Namespace(lr=0.1, out=pathlib.Path('runs')),
    'date': datetime.datetime(2026, 1, 1),
    'deque': collections.deque([1, 2], maxlen=5),
    'default dict': collections.defaultdict(list, {'a': [1]}),
    'partial': functools.partial(print, 'x'),
    'keys': {np.int64(3): 1, pathlib.Path('a'): 2},
}


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
@pytest.mark.parametrize('kind', OBJECTS)
def test_read_objects_beside_the_weights_are_left_out(kind, zipped, state_dict, tmp_path):
    content = {'extra': OBJECTS[kind], 'state_dict': state_dict, 'again': OBJECTS[kind]}
    torch.save(content, tmp_path / 'x.pth', _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(tmp_path / 'x.pth')
    assert all(torch.equal(read[key], value) for key, value in state_dict.items())


def test_read_module_beside_the_weights_is_left_out(state_dict, tmp_path):
    """As in the hyperparameters of Lightning."""
    torch.save({'hyper_parameters': {'loss': nn.CrossEntropyLoss()}, 'state_dict': state_dict}, tmp_path / 'x.ckpt')
    assert read_checkpoint(tmp_path / 'x.ckpt').keys() == state_dict.keys()


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'legacy'])
def test_read_objects_of_a_package_that_is_not_installed(foreign, zipped, state_dict, tmp_path, monkeypatch):
    torch.save(foreign | {'state_dict': state_dict}, tmp_path / 'x.pth', _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, 'gone')
    assert read_checkpoint(tmp_path / 'x.pth').keys() == state_dict.keys()


def test_read_class_that_the_user_allows_is_read_as_itself(state_dict, tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(argparse.Namespace, '__setstate__', lambda self, state: built.append(state), raising=False)
    torch.save({'args': argparse.Namespace(lr=0.1), 'state_dict': state_dict}, tmp_path / 'x.pth')
    read_checkpoint(tmp_path / 'x.pth')
    assert not built
    with torch.serialization.safe_globals([argparse.Namespace]):
        read_checkpoint(tmp_path / 'x.pth')
        assert argparse.Namespace in torch.serialization.get_safe_globals()
    assert built == [{'lr': 0.1}]


@pytest.mark.parametrize('wrap', [lambda m: m, lambda m: {'model': m, 'epoch': 3}], ids=['bare', 'in a dict'])
def test_read_whole_module_raises_with_the_two_lines(wrap, tmp_path):
    torch.save(wrap(timm.create_model('test_repvgg')), tmp_path / 'x.pth')
    with pytest.raises(
        CheckpointError, match=r'(?s)whole module \(repvgg_zoo\..*weights_only=False\)\n.*state_dict\(\)'
    ) as error:
        load_checkpoint(timm.create_model('test_repvgg'), tmp_path / 'x.pth')
    assert 'RepVGG' in str(error.value)


def test_read_torchscript_raises_with_the_remedy(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / 'x.pt')
    with pytest.raises(
        CheckpointError, match=r'TorchScript archive; save its weights, by torch\.save\(torch\.jit\.load'
    ):
        load_checkpoint(timm.create_model('test_repvgg'), tmp_path / 'x.pt')


class Command:
    def __reduce__(self):
        import os

        return os.system, ('touch ran',)


def test_read_file_that_runs_a_program_is_named_and_runs_nothing(state_dict, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({'state_dict': state_dict, 'evil': Command()}, 'x.pth')
    with pytest.raises(CheckpointError, match=r'x\.pth.* calls (posix|nt)\.system, which runs programs'):
        load_checkpoint(timm.create_model('test_repvgg'), 'x.pth')
    assert not (tmp_path / 'ran').exists()


def test_read_file_without_weights_tells_what_it_holds(tmp_path):
    torch.save({'epoch': 1, 'network': {'a': 1}}, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=r'holds no state dict.*; it holds epoch, network'):
        read_checkpoint(tmp_path / 'x.pth')
