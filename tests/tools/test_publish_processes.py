"""`repvgg-zoo publish` in processes of its own, and other processes that load what it published."""

import argparse
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from helpers import TIMM_NAMES, images, logits, official, randomise, rel_diff
from hub_server import hub_server
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV3

from repvgg_zoo import VARIANTS, CheckpointError
from repvgg_zoo.pretrained.manifest import read_manifest, weights_dir
from repvgg_zoo.tools.publish.folders import build_folders
from repvgg_zoo.tools.publish.publication import recorded_publication

ROOT = Path(__file__).parents[2]
NAME = 'test_repvgg.cifar10'


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


@pytest.fixture
def checkout(tmp_path):
    """The zoo where `publish` can write into its manifest."""
    folder = tmp_path / 'zoo'
    shutil.copytree(ROOT / 'repvgg_zoo', folder / 'repvgg_zoo', ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copytree(weights_dir(), folder / 'weights', ignore=shutil.ignore_patterns('cifar10'))
    return folder


def start(checkout, server, home, *args, cwd, **env):
    path = os.pathsep.join(filter(None, (str(checkout), env.pop('PYTHONPATH', None))))
    return subprocess.Popen(
        [sys.executable, *map(str, args)],
        cwd=cwd,
        env=os.environ | server.env(home) | {'PYTHONPATH': path, 'PYTHONDONTWRITEBYTECODE': '1'} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out


PUBLISH = '-m', 'repvgg_zoo', 'publish'

LOAD = """
import sys, timm, torch
{extra}
x = torch.load(sys.argv[1])
outputs = {{}}
for name in sys.argv[3:]:
    model = timm.create_model(name, pretrained=True).eval()
    outputs[name] = getattr(model, 'deploy', None), model(x).detach()
torch.save(outputs, sys.argv[2])
assert {plugin} == ('repvgg_zoo' in sys.modules)
"""


def outputs_of(checkout, server, home, tmp_path, x, names, *, plugin=True):
    """Of models that a new process creates, whose cache is in `home`: whether each is deployed, and its logits."""
    torch.save(x, tmp_path / 'x.pt')
    code = LOAD.format(extra='import repvgg_zoo' if plugin else '', plugin=plugin)
    finish(start(checkout, server, home, '-c', code, tmp_path / 'x.pt', tmp_path / 'y.pt', *names, cwd=tmp_path))
    return torch.load(tmp_path / 'y.pt')


def test_publish_command_then_new_process_loads(checkout, tmp_path):
    with hub_server(tmp_path / 'blobs') as server:
        command = (*PUBLISH, NAME, '--owner', 'zoo')
        said = finish(start(checkout, server, tmp_path / 'home', *command, cwd=tmp_path))
        assert f'would publish as zoo/{NAME}_deploy' in said
        assert server.state() == {}
        finish(start(checkout, server, tmp_path / 'home', *command, '--push', cwd=tmp_path))
        assert list(server.state()) == [f'zoo/{NAME}', f'zoo/{NAME}_deploy']
        x = images(2, px=32)
        expected = timm.create_model(NAME, pretrained=True).eval()(x)
        names = [f'hf-hub:zoo/{NAME}', f'hf-hub:zoo/{NAME}_deploy']
        loaded = outputs_of(checkout, server, tmp_path / 'new', tmp_path, x, names)
        for name, (deploy, y) in loaded.items():
            assert deploy == name.endswith('_deploy')
            assert rel_diff(y, expected) < 1e-5


def test_publish_two_at_once_do_not_mix(checkout, tmp_path):
    for seed in (1, 2):
        torch.save(randomise(timm.create_model('repvgg_a0'), seed=seed).state_dict(), tmp_path / f'{seed}.pth')
        (tmp_path / f'tmp{seed}').mkdir()
    with hub_server(tmp_path / 'blobs') as server:
        processes = [
            start(
                checkout,
                server,
                tmp_path / 'home',
                *(*PUBLISH, 'repvgg_a0.rvgg_in1k', '--owner', 'zoo', '--from', tmp_path / f'{seed}.pth'),
                cwd=tmp_path,
                TMPDIR=str(tmp_path / f'tmp{seed}'),
            )
            for seed in (1, 2)
        ]
        errors = [process.communicate()[1] for process in processes]
    (loser,) = [error for process, error in zip(processes, errors, strict=True) if process.returncode]
    assert 'another process is writing' in loser or 'holds another model.safetensors' in loser
    assert 'Traceback' not in loser
    x = images(px=64)
    folders = [f'local-dir:{tmp_path}/zoo/repvgg_a0.rvgg_in1k{suffix}' for suffix in ('', '_deploy')]
    training, deploy = (timm.create_model(folder, pretrained=True).eval()(x) for folder in folders)
    assert rel_diff(training, deploy) < 1e-4


def train_checkpoint(folder):
    """A checkpoint that timm's train.py writes, of a model fine-tuned to five classes; returns the model's average."""
    model = randomise(timm.create_model('repvgg_a0', num_classes=5))
    ema = ModelEmaV3(model)
    optimizer = create_optimizer_v2(model, 'sgd', lr=0.1, momentum=0.9)
    model.train()(images(2)).square().mean().backward()
    optimizer.step()
    args = argparse.Namespace(model='repvgg_a0', num_classes=5, opt='sgd')
    CheckpointSaver(
        model, optimizer, args=args, model_ema=ema, checkpoint_dir=str(folder), recovery_dir=str(folder)
    ).save_checkpoint(0, metric=93.5)
    return ema.module.eval()


def test_publish_own_weights_then_new_processes_load(checkout, tmp_path):
    average = train_checkpoint(tmp_path)
    labels = ['daisy', 'dandelion', 'rose', 'sunflower', 'tulip']
    (tmp_path / 'labels.txt').write_text('\n'.join(labels))
    before = tree(checkout / 'weights')
    name = 'repvgg_a0.my_flowers'
    with hub_server(tmp_path / 'blobs') as server:
        command = (*PUBLISH, '--from', 'last.pth.tar', '--model', 'repvgg_a0', '--name', name, '--owner', 'me')
        told = ('--label-names', 'labels.txt', '--dataset', 'flowers', '--top1', '93.5', '--license', 'mit')
        finish(start(checkout, server, tmp_path / 'home', *command, '--push', *told, '--img-size', '96', cwd=tmp_path))
        assert list(server.state()) == [f'me/{name}', f'me/{name}_deploy']
        x, names = images(2), [f'hf-hub:me/{name}', f'hf-hub:me/{name}_deploy']
        loaded = outputs_of(checkout, server, tmp_path / 'new', tmp_path, x, names)
        plain = outputs_of(tmp_path, server, tmp_path / 'new', tmp_path, x, names[:1], plugin=False)
    assert tree(checkout / 'weights') == before
    assert [deploy for deploy, _ in loaded.values()] == [False, True]
    for _, y in (*loaded.values(), *plain.values()):
        assert y.shape == (2, 5)
        assert rel_diff(y, average(x)) < 1e-5
    for suffix in ('', '_deploy'):
        config = json.loads((tmp_path / 'me' / f'{name}{suffix}' / 'config.json').read_text())
        assert config['label_names'] == labels
        assert config['pretrained_cfg']['input_size'] == [3, 96, 96]
        assert config['pretrained_cfg']['tag'] == f'my_flowers{suffix}'


@pytest.mark.slow
def test_publish_mirror_serves_both_forms(own_weights, checkout, tmp_path):
    """Another implementation of the Hub, a mirror of git repositories, and both forms from it by their Hub names."""
    olah = shutil.which('olah-cli', path=Path(sys.executable).parent)
    published = build_folders(recorded_publication(NAME), owner='zoo', out=tmp_path / 'out')
    for item in published:
        repository = tmp_path / 'mirror' / 'models' / item.hub_id
        shutil.copytree(item.folder, repository)
        for command in ('init -q -b main', 'add .', '-c user.name=zoo -c user.email=zoo@localhost commit -q -m first'):
            subprocess.run(['git', *command.split()], cwd=repository, check=True)  # noqa: S607
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    (tmp_path / 'olah.toml').write_text(
        f'[basic]\nhost = "127.0.0.1"\nport = {port}\nrepos-path = "{tmp_path}/repos"\n'
        f'mirrors-path = ["{tmp_path}/mirror"]\n[accessibility]\noffline = true\n'
    )
    with subprocess.Popen(
        [olah, '-c', tmp_path / 'olah.toml', '--log-path', tmp_path / 'logs'], cwd=tmp_path
    ) as mirror:
        try:
            wait_for(port)
            x = images(2, px=32)
            expected = timm.create_model(NAME, pretrained=True).eval()(x)
            names = [f'hf-hub:{item.hub_id}' for item in published]
            endpoint = SimpleNamespace(
                env=lambda home: {'HF_ENDPOINT': f'http://127.0.0.1:{port}', 'HF_HOME': str(home)}
            )
            loaded = outputs_of(checkout, endpoint, tmp_path / 'home', tmp_path, x, names)
        finally:
            mirror.terminate()
    for name, (deploy, y) in loaded.items():
        assert deploy == name.endswith('_deploy')
        assert rel_diff(y, expected) < 1e-5


def wait_for(port, *, limit_s=60):
    end = time.monotonic() + limit_s
    while True:
        try:
            return socket.create_connection(('127.0.0.1', port)).close()
        except OSError:
            assert time.monotonic() < end, 'the mirror did not start'
            time.sleep(0.2)


@pytest.mark.exhaustive
def test_publish_killed_and_repeated_ends_as_undisturbed(checkout, tmp_path):
    """SIGKILL at ten moments spread over the run, each followed by the same command."""
    command = (*PUBLISH, NAME, '--owner', 'zoo', '--push')
    pristine = tree(checkout / 'weights')

    def end_state(server, folder):
        return server.state(), tree(folder / 'zoo'), tree(checkout / 'weights'), sorted(os.listdir(folder))

    def reset(server, folder):
        shutil.rmtree(checkout / 'weights')
        for path, content in pristine.items():
            (checkout / 'weights' / path).parent.mkdir(parents=True, exist_ok=True)
            (checkout / 'weights' / path).write_bytes(content)
        folder.mkdir()
        server.delay_s = 0.6  # so that a good part of the run is the upload

    with hub_server(tmp_path / 'blobs0') as server:
        reset(server, tmp_path / 'undisturbed')
        began = time.monotonic()
        finish(start(checkout, server, tmp_path / 'home', *command, cwd=tmp_path / 'undisturbed'))
        duration_s = time.monotonic() - began
        expected = end_state(server, tmp_path / 'undisturbed')
    generator = random.Random(0)  # noqa: S311
    kills = runs = 0
    while kills < 10:
        runs += 1
        folder = tmp_path / f'killed{runs}'
        with hub_server(tmp_path / f'blobs{runs}') as server:
            reset(server, folder)
            process = start(checkout, server, tmp_path / 'home', *command, cwd=folder)
            moment_s = duration_s * (kills + generator.random()) / 10
            try:
                process.wait(moment_s)
                duration_s = moment_s  # the machine has become faster
            except subprocess.TimeoutExpired:
                process.kill()
                kills += process.wait() == -9
            finish(start(checkout, server, tmp_path / 'home', *command, cwd=folder))
            assert end_state(server, folder) == expected
            assert server.count('POST', '/commit/') <= 4


MEASURED = """
import re, sys
from repvgg_zoo_cli import main
status = main()
print('peak_kb=' + re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])  # rusage has the parent's peak
sys.exit(status)
"""


IN_CI = {'repvgg_a0', 'repvgg_b1g2'}
"""A plain one, and one that timm has not."""


@pytest.mark.slow
@pytest.mark.parametrize(
    'arch',
    [
        pytest.param(name, marks=[] if name in IN_CI else pytest.mark.exhaustive)
        for name in VARIANTS
        if name != 'test_repvgg'
    ],
)
def test_publish_official_checkpoint_loads_from_hub(arch, checkout, tmp_path):
    """From a `.pth` of the official code to two repositories, and models that a new process creates from them."""
    with torch.no_grad():
        model, x = randomise(official(arch)), images(2)
        torch.save(model.state_dict(), tmp_path / 'official.pth')
        expected = logits(model, x)
        del model
    name = f'{arch}.rvgg_in1k'
    with hub_server(tmp_path / 'blobs') as server:
        source = ('--from', tmp_path / 'official.pth', '--trust-source')
        command = ('-c', MEASURED, 'publish', name, *source, '--owner', 'zoo', '--push')
        said = finish(start(checkout, server, tmp_path / 'home', *command, cwd=tmp_path))
        if arch == 'repvgg_b3':  # the libraries alone take 0.7 GB with a CUDA build of torch
            peak_bytes = 1024 * int(said.split('peak_kb=')[1])
            assert peak_bytes < 4 * (tmp_path / 'official.pth').stat().st_size
        assert list(server.state()) == [f'zoo/{name}', f'zoo/{name}_deploy']
        names = [name, f'{name}_deploy', f'hf-hub:zoo/{name}', f'hf-hub:zoo/{name}_deploy']
        loaded = outputs_of(checkout, server, tmp_path / 'new', tmp_path, x, names)
        plain = [f'hf-hub:zoo/{name}'] if arch in TIMM_NAMES else []
        loaded_plain = outputs_of(tmp_path, server, tmp_path / 'new', tmp_path, x, plain, plugin=False)
    for loaded_name, (deploy, y) in loaded.items():
        assert deploy == loaded_name.endswith('_deploy')
        assert rel_diff(y, expected) < 1e-4, loaded_name
    assert list(loaded_plain) == plain
    for _, y in loaded_plain.values():
        assert rel_diff(y, expected) < 1e-4
    shutil.rmtree(tmp_path)


def test_locate_error_tells_command_that_works(tmp_path):
    """The command in the error, run, makes the tag work."""
    if read_manifest()['repvgg_b2g2.rvgg_in1k'].hub_id:
        pytest.skip('published')
    with pytest.raises(CheckpointError) as caught:
        timm.create_model('repvgg_b2g2', pretrained=True)
    message = str(caught.value)
    command, variable = (
        re.search(r'`repvgg-zoo (.*?)`', message).group(1),
        re.search(r'set (\w+=\w+)', message).group(1),
    )
    torch.save(randomise(official('repvgg_b2g2')).state_dict(), tmp_path / 'RepVGG-B2g2-train.pth')
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    subprocess.run([sys.executable, '-m', 'repvgg_zoo', *command.split()], cwd=tmp_path, env=environment, check=True)
    environment |= dict([variable.split('=')])
    code = (
        'import timm, repvgg_zoo\n'
        "assert not timm.create_model('repvgg_b2g2', pretrained=True).deploy\n"
        "assert timm.create_model('repvgg_b2g2.rvgg_in1k_deploy', pretrained=True).deploy\n"
        "assert timm.create_model('local-dir:zoo/repvgg_b2g2.rvgg_in1k', pretrained=True).num_classes == 1000\n"
    )
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=environment, check=True)
