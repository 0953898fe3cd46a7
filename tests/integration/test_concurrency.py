"""Several processes, and threads with a model each, at once."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import timm
import torch
from helpers import images, rel_diff

import repvgg_zoo
from repvgg_zoo.tools.publish.upload import push_folder


def test_processes_sharing_empty_cache_give_equal_outputs(hub, folder, tmp_path):
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


def test_threads_with_own_models_give_equal_outputs():
    x = images(2, px=32)
    expected = timm.create_model('test_repvgg', pretrained=True).eval()(x)

    def work(number: int) -> float:
        model = timm.create_model('test_repvgg', pretrained=True, deploy=number % 3 == 0).eval()
        before = model(x)
        assert rel_diff(model.switch_to_deploy()(x), before) < 1e-4
        return rel_diff(before, expected)

    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(work, range(24))) < 1e-4  # float32
