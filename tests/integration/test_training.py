"""Training as timm's users train: distributed, in mixed precision, compiled, frozen, in channels_last."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from helpers import FORMS, images, randomise, rel_diff, run_branches
from timm.optim import create_optimizer_v2
from timm.utils.model import freeze, freeze_batch_norm_2d
from torch import nn

import repvgg_zoo


def train_step(model, x, dtype=None):
    with torch.autocast('cpu', dtype, enabled=dtype is not None):
        loss = model(x).float().square().mean()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


DISTRIBUTED = """
import sys, timm, torch, repvgg_zoo
from torch import nn
from torch.nn.parallel import DistributedDataParallel

torch.distributed.init_process_group('gloo')
rank = torch.distributed.get_rank()
state, x = torch.load(sys.argv[1])
model = timm.create_model('test_repvgg').double()
model.load_state_dict(state)
for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
    norm.eval()  # which gives each process the statistics of all images
wrapped = DistributedDataParallel(model)
wrapped(x[rank::2]).square().mean().backward()
if rank == 0:
    torch.save({name: p.grad for name, p in model.named_parameters()}, sys.argv[2])
repvgg_zoo.switch_to_deploy(wrapped)
assert model.deploy and not list(wrapped.buffers())
wrapped.eval()(x)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_ddp_two_processes_give_gradients_of_one(tmp_path):
    model = randomise(timm.create_model('test_repvgg').double(), px=32)
    x = images(4, px=32, dtype=torch.float64)
    torch.save((model.state_dict(), x), tmp_path / 'input.pt')
    (tmp_path / 'script.py').write_text(DISTRIBUTED)
    torchrun = Path(sys.executable).with_name('torchrun')
    command = [torchrun, '--standalone', '--nproc-per-node', '2', 'script.py', 'input.pt', 'output.pt']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    actual = torch.load(tmp_path / 'output.pt')
    expected = train_step(model, x)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        # DDP rounds gradients to float32 on the way, whatever the model
        assert rel_diff(actual[name], gradient) < 1e-6, name


@pytest.mark.parametrize('convert', [nn.SyncBatchNorm.convert_sync_batchnorm, timm.layers.convert_sync_batchnorm])
def test_sync_batchnorm_switch_keeps_outputs(convert):
    model = randomise(timm.create_model('test_repvgg').double(), px=32)
    x = images(2, px=32, dtype=torch.float64)
    before = model(x)
    converted = convert(copy.deepcopy(model)).eval()
    assert any(isinstance(m, nn.SyncBatchNorm) for m in converted.modules())
    assert rel_diff(converted.switch_to_deploy()(x), before) < 1e-12


@FORMS
def test_mixed_precision_gradients_have_direction_of_float32(deploy):
    model = timm.create_model('test_repvgg', deploy=deploy)
    x = images(4, px=32)
    exact = train_step(copy.deepcopy(model), x)
    actual = train_step(model, x, torch.bfloat16)
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in actual.values())
    a, b = (torch.cat([g.flatten() for g in grads.values()]) for grads in (actual, exact))
    assert nn.functional.cosine_similarity(a, b, dim=0) > 0.9  # bfloat16 has three decimals; a wrong branch is at 0


@FORMS
@pytest.mark.parametrize('name', ['test_repvgg', 'repvgg_a0'])
def test_channels_last_gives_equal_gradients(name, deploy):
    model = timm.create_model(name, deploy=deploy).double()
    x = images(2, px=32, dtype=torch.float64)
    expected = train_step(copy.deepcopy(model), x)
    model.to(memory_format=torch.channels_last)
    actual = train_step(model, x.to(memory_format=torch.channels_last))
    assert all(rel_diff(actual[key], gradient) < 1e-7 for key, gradient in expected.items() if gradient.abs().max() > 0)


@FORMS
def test_compiled_model_has_equal_gradients_and_no_graph_breaks(deploy):
    model = timm.create_model('test_repvgg', deploy=deploy)
    x = images(4, px=32)
    expected = train_step(copy.deepcopy(model), x)
    compiled = torch.compile(copy.deepcopy(model), backend='aot_eager', fullgraph=True)
    actual = train_step(compiled, x)
    for key, gradient in expected.items():
        torch.testing.assert_close(actual[f'_orig_mod.{key}'], gradient, rtol=1e-3, atol=1e-4)
    assert torch._dynamo.explain(model.eval())(x).graph_break_count == 0


@pytest.mark.exhaustive
@FORMS
def test_inductor_channels_last_gives_equal_gradients(deploy):
    """A stem whose backward corrupts memory in channels_last does so here, where the compiler chooses the layout."""
    model = timm.create_model('repvgg_a0', deploy=deploy).double().to(memory_format=torch.channels_last)
    x = images(2, dtype=torch.float64).to(memory_format=torch.channels_last)
    expected = train_step(copy.deepcopy(model), x)
    actual = train_step(torch.compile(model, fullgraph=True), x)
    for key, gradient in expected.items():
        assert rel_diff(actual[f'_orig_mod.{key}'], gradient) < 1e-6, key  # the order of sums, through 22 layers


def test_frozen_stages_keep_values_and_requires_grad():
    model = timm.create_model('test_repvgg', pretrained=True).train()
    freeze(model, ['stem', 'stages.0', 'stages.1'])
    before = copy.deepcopy(model.state_dict())
    optimizer = create_optimizer_v2(model, 'sgd', lr=0.1)
    train_step(model, images(4, px=32))
    optimizer.step()
    for key, value in model.state_dict().items():
        frozen = key.startswith(('stem', 'stages.0', 'stages.1'))
        assert torch.equal(value, before[key]) == frozen, key
    x = images(2, px=32)
    expected = model.eval()(x)
    model.switch_to_deploy()
    assert rel_diff(model(x), expected) < 1e-4  # float32
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {
        n for n, _ in model.named_parameters() if n.startswith(('stem', 'stages.0', 'stages.1'))
    }


def test_frozen_norms_switch_keeps_outputs():
    model = randomise(timm.create_model('test_repvgg').double(), px=32)
    x = images(2, px=32, dtype=torch.float64)
    before = model(x)
    frozen = freeze_batch_norm_2d(copy.deepcopy(model))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())
    assert rel_diff(repvgg_zoo.switch_to_deploy(frozen)(x), before) < 1e-12


def test_train_mode_one_value_per_channel_raises_torchs_error():
    px = repvgg_zoo.VARIANTS['test_repvgg'].total_stride
    with pytest.raises(ValueError, match='Expected more than 1 value per channel when training'):
        timm.create_model('test_repvgg').train()(images(1, px=px))
    timm.create_model('test_repvgg', deploy=True).train()(images(1, px=px))


@FORMS
@pytest.mark.parametrize('size', [(33, 47), (17, 64), (1, 1)])
def test_odd_image_size_gives_equal_outputs_in_both_forms(deploy, size):
    model = randomise(timm.create_model('test_repvgg').double(), px=32)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = run_branches(lambda: model(x))
    actual = model.switch_to_deploy()(x) if deploy else model(x)
    assert actual.shape == (2, 10)
    assert rel_diff(actual, expected) < 1e-9


def test_drop_block_acts_in_last_two_stages_in_train_mode():
    model = timm.create_model('test_repvgg', drop_block_rate=0.5)
    dropping = [name for name, m in model.named_modules() if type(m).__name__ == 'DropBlock2d']
    assert {name.split('.')[1] for name in dropping} == {'2', '3'}
    x = images(4, px=32)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert rel_diff(copy.deepcopy(model).switch_to_deploy()(x), model(x)) < 1e-4  # float32


@FORMS
def test_reset_classifier_keeps_dtype_and_mode(deploy):
    model = timm.create_model('test_repvgg', deploy=deploy, num_classes=0).double().eval()
    model.reset_classifier(3)
    assert model(images(1, px=32, dtype=torch.float64)).shape == (1, 3)
    assert not any(m.training for m in model.modules())


def test_reset_classifier_mixed_dtypes_follows_old_classifier():
    """A classifier in float32 on a backbone in bfloat16 stays one."""
    model = timm.create_model('test_repvgg').to(torch.bfloat16)
    model.head.float()
    model.reset_classifier(3)
    assert model.head.fc.weight.dtype == torch.float32
