"""What can be counted without a clock: bytes kept for the backward pass, operators, tensors, what importing does."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from helpers import TIMM_NAMES, images, run_branches
from torch.utils._python_dispatch import TorchDispatchMode

from repvgg_zoo import VARIANTS, RepVGGBlock
from repvgg_zoo.tools.benchmark.cases import saved_bytes

BLOCKS = {
    'identity': dict(in_chs=8, out_chs=8),
    'more channels': dict(in_chs=4, out_chs=12),
    'stride': dict(in_chs=8, out_chs=8, stride=2),
    'groups': dict(in_chs=8, out_chs=8, groups=4),
}


def test_training_saves_two_thirds_of_timms_bytes():
    x = images(px=224)
    ours, theirs = timm.create_model('repvgg_a0'), timm.models.byobnet.repvgg_a0()
    assert not isinstance(theirs, type(ours))
    ratio = saved_bytes(ours, x) / saved_bytes(theirs, x)
    assert 0.6 < ratio <= 0.67  # outputs of block and 3x3 convolution, where timm has that of the 1x1 one too


@pytest.mark.parametrize('needs_grad', [False, True], ids=['images', 'features'])
@pytest.mark.parametrize('kind', BLOCKS)
def test_block_training_saves_two_outputs(kind, needs_grad):
    block = RepVGGBlock(**BLOCKS[kind])
    x = images(2, 9, in_chans=BLOCKS[kind]['in_chs']).requires_grad_(needs_grad)
    y = block(x)
    assert y.requires_grad
    output_bytes = y.nbytes
    norms = 2 + (block.identity is not None)
    # mean and 1 / sqrt(σ² + ε) of each norm in float32, the counts of batches, and what the allocator rounds up
    statistics_bytes = norms * (2 * BLOCKS[kind]['out_chs'] * 4 + 64)
    assert saved_bytes(block, x) <= 2 * output_bytes + statistics_bytes
    assert run_branches(lambda: saved_bytes(block, x)) > 2.9 * output_bytes


def test_frozen_model_evaluation_saves_nothing():
    model = timm.create_model('test_repvgg').requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(pytest.fail, lambda tensor: tensor):
        assert not model.eval()(images(px=64)).requires_grad


@pytest.mark.parametrize('name', VARIANTS)
def test_deploy_graph_has_one_convolution_and_activation_per_block(name):
    model = timm.create_model(name, deploy=True, device='meta').eval()
    graph = torch.export.export(model, (torch.empty(1, 3, 64, 64, device='meta'),)).graph
    called = [node.target.overloadpacket.__name__ for node in graph.nodes if node.op == 'call_function']
    squeeze = ['mean', 'conv2d', 'relu_', 'conv2d', 'sigmoid', 'mul']
    block = {
        None: ['conv2d', 'relu_'],
        'before_act': ['conv2d', *squeeze, 'relu_'],
        'after_act': ['conv2d', 'relu_', *squeeze],
    }[VARIANTS[name].se and VARIANTS[name].se.position]
    blocks = 1 + sum(VARIANTS[name].depths)
    assert called == block * blocks + ['adaptive_avg_pool2d', 'flatten', 'dropout', 'linear']


def test_training_graph_has_two_convolutions_per_block():
    model = timm.create_model('repvgg_a0', device='meta').eval()
    graph = torch.export.export(model, (torch.empty(1, 3, 64, 64, device='meta'),)).graph
    called = [node.target.overloadpacket.__name__ for node in graph.nodes if node.op == 'call_function']
    assert called.count('conv2d') == 2 * 22
    assert called.count('batch_norm') == 2 * 22 + 17  # blocks that keep the shape: all but the stem and one a stage


@pytest.mark.parametrize('name', VARIANTS)
def test_deploy_form_has_two_tensors_per_layer_and_no_buffers(name):
    model = timm.create_model(name, deploy=True, device='meta')
    layers = (1 + sum(VARIANTS[name].depths)) * (3 if VARIANTS[name].se else 1) + 1
    assert len(list(model.parameters())) == 2 * layers
    assert list(model.buffers()) == []


def test_switched_model_has_tensors_of_deploy_form():
    switched = timm.create_model('test_repvgg').eval().switch_to_deploy()
    built = timm.create_model('test_repvgg', deploy=True, device='meta')
    assert [(k, t.shape) for k, t in switched.named_parameters()] == [(k, t.shape) for k, t in built.named_parameters()]
    assert list(switched.buffers()) == []


@pytest.mark.parametrize('name', TIMM_NAMES)
def test_training_form_has_tensors_of_timm(name):
    ours = timm.create_model(name, device='meta')
    theirs = getattr(timm.models.byobnet, name)(device='meta')
    assert [(k, t.shape) for k, t in ours.named_parameters()] == [(k, t.shape) for k, t in theirs.named_parameters()]
    assert [(k, t.shape) for k, t in ours.named_buffers()] == [(k, t.shape) for k, t in theirs.named_buffers()]


IMPORT = """
import json, logging, random, signal, sys, threading, warnings
import timm, torch
import numpy

def state():
    return [
        torch.get_num_threads(), torch.get_num_interop_threads(), threading.active_count(),
        str(torch.get_default_dtype()), str(torch.get_default_device()),
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled('cpu'),
        torch.are_deterministic_algorithms_enabled(), torch.backends.mkldnn.enabled,
        torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision(), torch.cuda.is_initialized(),
        torch.get_rng_state().tolist(), str(random.getstate()), str(numpy.random.get_state()),
        len(warnings.filters), logging.getLogger().level, str(signal.getsignal(signal.SIGINT)),
    ]

before, modules = state(), set(sys.modules)
import repvgg_zoo
new = {name.partition('.')[0] for name in set(sys.modules) - modules}
changed = [i for i, (a, b) in enumerate(zip(before, state())) if a != b]
print(json.dumps([changed, sorted(new - set(sys.stdlib_module_names))]))
"""


def test_import_changes_no_global_state():
    done = subprocess.run([sys.executable, '-W', 'error::UserWarning', '-c', IMPORT], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '')
    changed, new = json.loads(done.stdout)  # and nothing else was printed
    assert changed == []
    assert new == ['repvgg_zoo']


@pytest.mark.parametrize('name', ['repvgg_a0', 'repvgg_b1g4'])
def test_deploy_form_runs_operators_of_timms_fused_model(name):
    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    x, lists = torch.randn(1, 3, 64, 64), []
    theirs = timm.utils.reparameterize_model(getattr(timm.models.byobnet, name)().eval(), inplace=True)
    for model in (timm.create_model(name, deploy=True).eval(), theirs):
        called: list[str] = []
        with torch.no_grad(), Operators():
            model(x)
        lists.append(called)
    assert lists[0] == lists[1]
