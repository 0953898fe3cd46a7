"""Several processes and threads at once."""

import copy
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import timm
import torch
from conftest import images, randomise, rel_diff
from test_hub import folder  # noqa: F401

import repvgg_zoo
from repvgg_zoo.hub import push_folder


def test_processes_with_one_empty_cache(hub, folder, tmp_path):  # noqa: F811
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


def test_switch_is_safe_while_another_thread_reads():
    """Each block is of one whole form at any moment, and both compute the same in eval mode."""
    trained = randomise(timm.create_model('test_repvgg').double(), px=32)
    x = images(1, px=32, dtype=torch.float64)
    expected = trained(x)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(20):
            model = copy.deepcopy(trained)
            differences, switched = [], threading.Event()

            def read(model=model, differences=differences, switched=switched):
                while not switched.is_set():
                    differences.append(rel_diff(model(x), expected))

            with ThreadPoolExecutor(2) as pool:
                readers = [pool.submit(read) for _ in range(2)]
                while not differences:
                    pass
                model.switch_to_deploy()
                switched.set()
                [reader.result() for reader in readers]
            assert max(differences) < 1e-9
    finally:
        sys.setswitchinterval(interval)
