"""Training on two processes that share the parameters (FSDP2), and layers whose kernels are elsewhere."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from helpers import block_params, images, randomise, rel_diff, run_branches
from torch import nn

from repvgg_zoo import BLOCKS, FoldError
from repvgg_zoo.blocks.branches.chains import _ChainBranch
from repvgg_zoo.blocks.branches.kernels import _OverparameterisedBranch
from repvgg_zoo.blocks.factory import block_type

SHARDED = """
import sys, timm, torch, repvgg_zoo
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from repvgg_zoo.blocks.branches import chains, parallel
from repvgg_zoo.blocks.base import ReparamBlock

torch.distributed.init_process_group('gloo')
rank, mesh = torch.distributed.get_rank(), torch.distributed.init_device_mesh('cpu', (2,))
counts = dict(folded=0, recomputed=0)
fold, recompute = ReparamBlock.run_folded, chains.normalise_and_recompute

def spy_on_fold(*args):
    y = fold(*args)
    counts['folded'] += y is not None
    return y

def spy_on_recompute(*args):
    counts['recomputed'] += 1
    return recompute(*args)

def expect_refusal(*sharded):
    for part in sharded:
        try:
            repvgg_zoo.switch_to_deploy(part)
        except repvgg_zoo.FoldError as error:
            assert 'get_model_state_dict' in str(error)
        else:
            raise AssertionError('it was switched')

ReparamBlock.run_folded = spy_on_fold
chains.normalise_and_recompute = parallel.normalise_and_recompute = spy_on_recompute
states, steps = torch.load(sys.argv[1])
results = []
for block, sharded, checkpointing in (('repvgg', 'blocks', False), ('repvgg', 'all', True), ('dbb', 'all', False)):
    model = timm.create_model('test_repvgg', block=block).double()
    model.load_state_dict(states[block])
    model.set_grad_checkpointing(checkpointing)
    if sharded == 'blocks':
        for part in [m for m in model.modules() if isinstance(m, ReparamBlock)]:
            fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    counts.update(folded=0, recomputed=0)
    for x in steps:
        optimizer.zero_grad()
        model(x[rank]).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        logits = model.eval()(steps[0].flatten(0, 1))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    results.append((block, get_model_state_dict(model, options=options), logits, dict(counts)))
    expect_refusal(model, model.stem)
policy = ModuleWrapPolicy({repvgg_zoo.RepVGGBlock})
model = FullyShardedDataParallel(
    timm.create_model('test_repvgg'), auto_wrap_policy=policy, device_id=torch.device('cpu')
)
model(steps[0, rank].float())
expect_refusal(model, model.module, model.stem.module)  # the memory of its kernels is freed between calls
if rank == 0:
    torch.save(results, sys.argv[2])
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def train(model: nn.Module, steps: torch.Tensor) -> tuple[nn.Module, nn.Module]:
    """One model for each process, with the mean of their gradients and running statistics of their own."""
    replicas = model.train(), copy.deepcopy(model)
    optimizers = [torch.optim.SGD(replica.parameters(), lr=0.05, momentum=0.9) for replica in replicas]
    for x in steps:
        for rank, replica in enumerate(replicas):
            replica.zero_grad()
            replica(x[rank]).square().mean().backward()
        for parameters in zip(*(replica.parameters() for replica in replicas), strict=True):
            mean = sum(p.grad for p in parameters) / len(parameters)
            for p in parameters:
                p.grad = mean.clone()
        for optimizer in optimizers:
            optimizer.step()
    return replicas


def test_fully_sharded_training_gathers_and_folds_to_that_of_one_process(tmp_path):
    models = {
        block: randomise(timm.create_model('test_repvgg', block=block).double(), px=32) for block in ('repvgg', 'dbb')
    }
    steps = images(2 * 2 * 4, px=32, dtype=torch.float64).unflatten(0, (2, 2, 4))
    torch.save(({block: model.state_dict() for block, model in models.items()}, steps), tmp_path / 'input.pt')
    (tmp_path / 'script.py').write_text(SHARDED)
    torchrun = Path(sys.executable).with_name('torchrun')
    command = [torchrun, '--standalone', '--nproc-per-node', '2', 'script.py', 'input.pt', 'output.pt']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    x = steps[0].flatten(0, 1)
    trained = {block: train(model, steps)[0].eval() for block, model in models.items()}
    for block, state, logits, counts in torch.load(tmp_path / 'output.pt'):
        for key, value in trained[block].state_dict().items():
            assert rel_diff(state[key], value) < 1e-9, key  # sums in another order
        deployed = timm.create_model('test_repvgg', block=block).double().eval()
        deployed.load_state_dict(state)
        deployed.switch_to_deploy()
        with torch.no_grad():
            for found in (logits, deployed(x)):
                assert rel_diff(found, trained[block](x)) < 1e-9
        assert counts['folded'] > 0
        assert counts['recomputed'] > 0


def offload(module: nn.Module, *, recurse: bool) -> None:
    """Keep tensors of a module on the meta device between its calls. As accelerate does it, `forward` is replaced."""
    parts = list(module.modules()) if recurse else [module]
    held = {part: {**part._parameters, **part._buffers} for part in parts}
    forward = module.forward

    def put(device: str) -> None:
        for part, tensors in held.items():
            for name, value in tensors.items():
                if value is not None:
                    moved = value.to(device)
                    setattr(part, name, nn.Parameter(moved) if name in part._parameters else moved)

    def run(*args):
        put('cpu')
        try:
            return forward(*args)
        finally:
            put('meta')

    module.forward = run
    put('meta')


@pytest.mark.parametrize('name', block_params(BLOCKS))
@torch.no_grad()
def test_offloaded_layers_compute_the_same_or_raise(name):
    block = randomise(block_type(name)(8, 8), px=11, in_chans=8)
    x = images(2, 33, in_chans=8)  # enough pixels to fold
    expected = run_branches(lambda: block(x))
    reads_kernels = any(isinstance(m, (_OverparameterisedBranch, _ChainBranch)) for m in block.modules())
    whole = copy.deepcopy(block)
    offload(whole, recurse=True)
    assert rel_diff(whole(x), expected) < 1e-5  # float32
    for layer in [m for m in block.modules() if m._parameters or m._buffers]:
        offload(layer, recurse=False)
    if reads_kernels:
        with pytest.raises(RuntimeError, match=r"on meta, and its input on cpu.*preload_module_classes=\['MultiB"):
            block(x)
    else:
        assert rel_diff(block(x), expected) < 1e-5
    for switched in (block, whole):
        with pytest.raises(FoldError, match=r'bring offloaded ones back \(accelerate.hooks.remove_hook_from_submod'):
            switched.switch_to_deploy()
