"""Several processes and threads at once."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from helpers import images, randomise, rel_diff
from torch import nn

import repvgg_zoo
from repvgg_zoo.tools.publish.upload import push_folder


def test_processes_with_one_empty_cache(hub, folder, tmp_path):
    push_folder(folder, 'zoo/model')
    code = (
        'import timm, repvgg_zoo, torch, sys\n'
        "model = timm.create_model('hf-hub:zoo/model', pretrained=True).eval()\n"
        'torch.save(model(torch.ones(1, 3, 32, 32)), sys.argv[1])\n'
    )
    environment = os.environ | hub.env(tmp_path / 'home')
    outputs = [tmp_path / f'{number}.pt' for number in range(3)]
    processes = [subprocess.Popen([sys.executable, '-c', code, path], env=environment) for path in outputs]
    assert [process.wait(timeout=300) for process in processes] == [0, 0, 0]
    expected = repvgg_zoo.load_checkpoint(timm.create_model('test_repvgg').eval(), folder / 'model.safetensors')
    for path in outputs:
        assert torch.equal(torch.load(path), expected(torch.ones(1, 3, 32, 32)))


def test_threads_with_models_of_their_own():
    x = images(2, px=32)
    expected = timm.create_model('test_repvgg', pretrained=True).eval()(x)

    def work(number: int) -> float:
        model = timm.create_model('test_repvgg', pretrained=True, deploy=number % 3 == 0).eval()
        before = model(x)
        assert rel_diff(model.switch_to_deploy()(x), before) < 1e-4
        return rel_diff(before, expected)

    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(work, range(24))) < 1e-4  # float32


@pytest.mark.parametrize('late', [False, True], ids=['before the read', 'after the read'])
@pytest.mark.parametrize('name', ['conv_kxk', 'conv_1x1', 'identity', 'drop_block', 'drop_path', 'act'])
def test_switch_while_another_thread_reads(name, late, monkeypatch):
    """The switch falls into a forward pass where a block reads one of its modules, as another thread's may."""
    model = randomise(timm.create_model('test_repvgg').double(), px=32)
    x = images(1, px=32, dtype=torch.float64)
    expected = model(x)
    block = model.stages[1][1]
    read, reads = nn.Module.__getattr__, []

    def interrupted(self, wanted):
        falls_here = self is block and wanted == name and not reads
        if falls_here:
            reads.append(name)
        if falls_here and not late:
            model.switch_to_deploy()
        value = read(self, wanted)
        if falls_here and late:
            model.switch_to_deploy()
        return value

    monkeypatch.setattr(nn.Module, '__getattr__', interrupted)
    try:
        found, error = model(x), None
    except AttributeError as raised:
        found, error = None, str(raised)
    if late or error is None:
        assert error is None
        assert rel_diff(found, expected) < 1e-9
    else:
        assert error == f"'RepVGGBlock' object has no attribute '{name}'"
    assert model.deploy
    assert rel_diff(model(x), expected) < 1e-9
