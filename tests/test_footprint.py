"""What can be counted without a clock: bytes kept for the backward pass, operators, tensors, what importing does."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from conftest import TIMM_NAMES

from repvgg_zoo import VARIANTS
from repvgg_zoo.benchmark.cases import Case
from repvgg_zoo.benchmark.models import ModelName

SMALL = ['test_repvgg', 'repvgg_a0', 'repvgg_b1g4', 'repvgg_d2se']


def saved_bytes(name: str) -> int:
    return Case(model=ModelName.parse(name), form='training').saved_bytes()


@pytest.mark.parametrize('name', ['repvgg_a0', 'repvgg_b1g4'])
def test_training_keeps_two_thirds_of_what_timm_keeps(name):
    ratio = saved_bytes(name) / saved_bytes(f'timm:{name}')
    assert ratio == pytest.approx(2 / 3, abs=0.01)  # input and 3x3 output of a block, without the 1x1 output


@pytest.mark.parametrize('name', SMALL)
def test_deploy_graph_has_one_convolution_and_one_activation_a_block(name):
    model = timm.create_model(name, deploy=True, device='meta').eval()
    nodes = [node for node in torch.fx.symbolic_trace(model).graph.nodes if node.op not in ('placeholder', 'output')]
    kinds = [type(model.get_submodule(node.target)).__name__ for node in nodes if node.op == 'call_module']
    blocks = 1 + sum(VARIANTS[name].depths)
    squeezed = VARIANTS[name].se is not None
    assert kinds.count('Conv2d') == blocks * (3 if squeezed else 1)
    assert kinds.count('ReLU') == blocks * (2 if squeezed else 1)
    assert not any('BatchNorm' in kind for kind in kinds)
    exported = torch.export.export(timm.create_model(name, deploy=True).eval(), (torch.randn(1, 3, 64, 64),))
    called = [node.target for node in exported.graph.nodes if node.op == 'call_function']
    if not squeezed:  # pool, flatten, dropout, linear and the like behind the blocks
        assert len(called) <= 2 * blocks + 4


@pytest.mark.parametrize('name', SMALL)
def test_deploy_form_has_two_tensors_a_layer_and_no_buffers(name):
    model = timm.create_model(name, deploy=True, device='meta')
    layers = 1 + sum(VARIANTS[name].depths)
    assert len(list(model.parameters())) == 2 * (layers * (3 if VARIANTS[name].se else 1) + 1)
    assert list(model.buffers()) == []


@pytest.mark.parametrize('name', TIMM_NAMES)
def test_training_form_has_the_tensors_of_timm(name):
    ours = timm.create_model(name, device='meta')
    theirs = getattr(timm.models.byobnet, name)(device='meta')
    assert [(k, t.shape) for k, t in ours.named_parameters()] == [(k, t.shape) for k, t in theirs.named_parameters()]
    assert [(k, t.shape) for k, t in ours.named_buffers()] == [(k, t.shape) for k, t in theirs.named_buffers()]


def test_importing_does_nothing_but_register():
    code = """
import json, sys, threading
import timm, torch
before = set(sys.modules)
state = lambda: [torch.get_num_threads(), str(torch.get_default_dtype()), torch.is_grad_enabled(),
                 torch.get_rng_state().sum().item(), threading.active_count(), str(torch.get_default_device())]
at_first = state()
import repvgg_zoo
new = {name.partition('.')[0] for name in set(sys.modules) - before}
print(json.dumps([at_first == state(), sorted(new - set(sys.stdlib_module_names))]))
"""
    done = subprocess.run([sys.executable, '-W', 'error::UserWarning', '-c', code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '')
    unchanged, new = json.loads(done.stdout)  # and nothing else was printed
    assert unchanged
    assert new == ['repvgg_zoo']
