"""From a checkpoint to two model folders, and to two repositories: the folders, and the whole way through the Hub."""

import dataclasses
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
from conftest import images, randomise, rel_diff
from hub_server import hub_server
from huggingface_hub import RepoCard
from safetensors import safe_open
from test_official import logits, official

from repvgg_zoo import VARIANTS, CheckpointError
from repvgg_zoo.cards import model_card
from repvgg_zoo.convert import convert
from repvgg_zoo.hub import HubError
from repvgg_zoo.listing import weights_page
from repvgg_zoo.manifest import FoldCheck, read_manifest, weights_dir
from repvgg_zoo.publish import build_folders, names_to_publish, push_folders

ROOT = Path(__file__).parents[1]
NAME = 'test_repvgg.cifar10'
FILES = ['README.md', 'config.json', 'model.safetensors']


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


# ----------------------------------------------------------------------------------------------- folders


def test_two_complete_model_folders(own_weights, tmp_path):
    published = build_folders(NAME, owner='zoo', out=tmp_path / 'out')
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == [NAME, f'{NAME}_deploy']
    x = images(2, px=32)
    expected = timm.create_model(NAME, pretrained=True).eval()(x)
    for item, form in zip(published, ('training', 'deploy'), strict=True):
        assert sorted(path.name for path in item.folder.iterdir()) == FILES
        loaded = timm.create_model(f'local-dir:{item.folder}', pretrained=True).eval()
        assert loaded.deploy == (form == 'deploy')
        assert rel_diff(loaded(x), expected) < 1e-5
        config = json.loads((item.folder / 'config.json').read_text())
        assert config['pretrained_cfg']['tag'] == item.record.tag
        with safe_open(item.folder / 'model.safetensors', 'pt') as file:
            assert file.metadata() == {'format': 'pt', 'architecture': 'test_repvgg', 'form': form}
        assert item.record.fold_check.float64_rel_diff < 1e-12
        assert item.record.fold_check.float32_rel_diff < 1e-5


def test_same_run_gives_the_same_bytes(own_weights, tmp_path):
    for out in ('a', 'b', 'b'):
        build_folders(NAME, owner='zoo', out=tmp_path / out)
    assert tree(tmp_path / 'a') == tree(tmp_path / 'b')


def test_bundled_files_are_what_is_published(own_weights, tmp_path):
    for item in build_folders(NAME, owner='zoo', out=tmp_path):
        assert (item.folder / 'model.safetensors').read_bytes() == item.record.path.read_bytes()


def test_other_folder_is_replaced_only_if_told(own_weights, tmp_path):
    build_folders(NAME, owner='zoo', out=tmp_path)
    card = tmp_path / f'{NAME}_deploy' / 'README.md'
    whole = card.read_text()
    card.write_text('mine')
    before = tree(tmp_path)
    with pytest.raises(FileExistsError, match=r'_deploy.* holds another README\.md; .*--replace'):
        build_folders(NAME, owner='zoo', out=tmp_path)
    assert tree(tmp_path) == before
    build_folders(NAME, owner='zoo', out=tmp_path, replace_existing=True)
    assert card.read_text() == whole


def test_real_images_are_compared(own_weights, tmp_path):
    seen = []

    def track(batches, **_):
        for batch in batches:
            seen.append(len(batch))
            yield batch

    folder = weights_dir() / 'cifar10' / 'validation' / 'cat'
    (item, _) = build_folders(NAME, owner='zoo', out=tmp_path, images=folder, track=track)
    assert (item.record.fold_check.images, item.record.fold_check.top1_agreement_pct) == (50, 100)
    assert sum(seen) == 2 * 50
    assert '50 real images, 100 % of them with the same top class' in (item.folder / 'README.md').read_text()


def test_wrong_fold_writes_nothing(own_weights, tmp_path, monkeypatch):
    monkeypatch.setattr('repvgg_zoo.publish.float64_rel_diff', lambda model, x: 2e-9)
    with pytest.raises(CheckpointError, match=r'differ by 2\.0e-09 .* in float64, more than 1e-09'):
        build_folders(NAME, owner='zoo', out=tmp_path / 'out')
    assert tree(tmp_path / 'out') == {}


def test_what_cannot_be_published(own_weights, tmp_path):
    torch.save(timm.create_model('test_repvgg').state_dict(), tmp_path / 'other.pth')
    torch.save(timm.create_model('test_repvgg', deploy=True).state_dict(), tmp_path / 'deploy.pth')
    for name, source, error, message in (
        ('repvgg_b4.rvgg_in1k', None, ValueError, r"unknown weights 'repvgg_b4\.rvgg_in1k'; did you mean"),
        (f'{NAME}_deploy', None, ValueError, r"'test_repvgg\.cifar10' publishes both"),
        (NAME, tmp_path / 'none.pth', FileNotFoundError, r'no checkpoint file'),
        (NAME, tmp_path / 'deploy.pth', CheckpointError, r'is of the deploy form'),
        (NAME, tmp_path / 'other.pth', CheckpointError, r'is bundled as .* other weights'),
        ('repvgg_a0.rvgg_in1k', tmp_path / 'other.pth', CheckpointError, r'does not fit repvgg_a0'),
        ('repvgg_b1g2.rvgg_in1k', None, CheckpointError, r'get RepVGG-B1g2-train\.pth'),
    ):
        with pytest.raises(error, match=message):
            build_folders(name, source, owner='zoo', out=tmp_path / 'out')
    assert tree(tmp_path / 'out') == {}


# ------------------------------------------------------------------------------------------------- cards


@pytest.mark.parametrize('name', read_manifest())
def test_card_says_what_the_manifest_knows(name):
    record = read_manifest()[name]
    check = FoldCheck(float64_rel_diff=1e-15, float32_rel_diff=2e-7, images=8, top1_agreement_pct=None)
    record = dataclasses.replace(record, sha256='0' * 64, size_bytes=1234, fold_check=check)
    card = RepoCard(str(model_card(record, owner='zoo', in_timm=True)))
    assert (card.data.license, card.data.library_name) == ('mit', 'timm')
    index = card.data.get('model-index') or []
    values = {
        (result.get('source', {}).get('url'), metric['value'])
        for model in index
        for result in model['results']
        for metric in result['metrics']
    }
    expected = {
        (m.source_url, value)
        for m in (*record.published, *record.measured)
        for value in (m.top1_pct, m.top5_pct)
        if value is not None
    }
    assert values == expected
    for text in (f'hf-hub:zoo/{name}', '1,234 bytes', '0' * 64, f'{record.params:,}', '1.0e-15', record.recipe or ''):
        assert text in card.text
    for metrics in (*record.published, *record.measured):
        assert f'{metrics.top1_pct:g} %' in card.text
        assert metrics.source in card.text


def test_weights_page_is_the_current_one():
    assert (ROOT / 'weights' / 'README.md').read_text('utf-8') == weights_page()


# ------------------------------------------------------------------------------------------- to the Hub


def test_publishing_is_recorded(hub, own_weights, tmp_path):
    published = build_folders(NAME, owner='zoo', out=tmp_path / 'out')
    push_folders(published)
    for item in published:
        record = read_manifest()[item.record.name]
        assert record.hub_id == item.repo_id == f'zoo/{item.record.name}'
        assert record.revision == hub.repositories[item.repo_id].commits[-1][0]
        assert record.sha256 == item.record.sha256
        assert record.fold_check == item.record.fold_check
        assert f'[{item.repo_id}](' in (own_weights / 'README.md').read_text()
    assert NAME not in names_to_publish('zoo')
    assert NAME in names_to_publish('other')
    pages = tree(own_weights)
    push_folders(build_folders(NAME, owner='zoo', out=tmp_path / 'out'))
    assert tree(own_weights) == pages
    assert hub.count('POST', '/commit/') == 2


def test_failed_publishing_is_not_recorded(hub, own_weights, tmp_path):
    published = build_folders(NAME, owner='forbidden', out=tmp_path / 'out')
    before = tree(own_weights)
    with pytest.raises(HubError, match='no right'):
        push_folders(published)
    assert tree(own_weights) == before


# -------------------------------------------------------------------------------- new processes, whole way


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


def test_command_publishes_and_a_new_process_loads(checkout, tmp_path):
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


@pytest.mark.slow
def test_mirror_serves_what_was_published(own_weights, checkout, tmp_path):
    """Another implementation of the Hub, a mirror of git repositories, and both forms from it by their Hub names."""
    olah = shutil.which('olah-cli', path=Path(sys.executable).parent)
    published = build_folders(NAME, owner='zoo', out=tmp_path / 'out')
    for item in published:
        repository = tmp_path / 'mirror' / 'models' / item.repo_id
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
            names = [f'hf-hub:{item.repo_id}' for item in published]
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


@pytest.mark.slow
def test_killed_publish_ends_as_an_undisturbed_one(checkout, tmp_path):
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
    kills = 0
    for index in range(1, 11):
        folder = tmp_path / f'killed{index}'
        with hub_server(tmp_path / f'blobs{index}') as server:
            reset(server, folder)
            process = start(checkout, server, tmp_path / 'home', *command, cwd=folder)
            time.sleep(duration_s * (index - generator.random()) / 10)
            process.kill()
            kills += process.wait() == -9
            finish(start(checkout, server, tmp_path / 'home', *command, cwd=folder))
            assert end_state(server, folder) == expected
            assert server.count('POST', '/commit/') <= 4
    assert kills >= 7


MEASURED = """
import resource, sys
from repvgg_zoo.cli import main
status = main()
print(f'peak_kb={resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}')
sys.exit(status)
"""
TIMM_NAMES = {name for name in VARIANTS if hasattr(timm.models.byobnet, name)}


@pytest.mark.slow
@pytest.mark.parametrize('arch', [name for name in VARIANTS if name != 'test_repvgg'])
def test_official_checkpoint_to_the_hub_and_back(arch, checkout, tmp_path):
    """From a `.pth` of the official code to two repositories, and models that a new process creates from them."""
    with torch.no_grad():
        source, x = randomise(official(arch)), images(2)
        torch.save(source.state_dict(), tmp_path / 'official.pth')
        expected = logits(source, x)
        del source
    name = f'{arch}.rvgg_in1k'
    with hub_server(tmp_path / 'blobs') as server:
        command = ('-c', MEASURED, 'publish', name, '--from', tmp_path / 'official.pth', '--owner', 'zoo', '--push')
        said = finish(start(checkout, server, tmp_path / 'home', *command, cwd=tmp_path))
        if arch == 'repvgg_b3':  # the libraries alone take 0.9 GB with a CUDA build of torch, twice these weights
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


def test_how_to_get_official_weights_is_a_way(tmp_path):
    """The command in the error, run, makes the tag work."""
    with pytest.raises(CheckpointError) as caught:
        timm.create_model('repvgg_b1g2', pretrained=True)
    message = str(caught.value)
    command, variable = (
        re.search(r'`repvgg-zoo (.*?)`', message).group(1),
        re.search(r'set (\w+=\w+)', message).group(1),
    )
    torch.save(randomise(official('repvgg_b1g2')).state_dict(), tmp_path / 'RepVGG-B1g2-train.pth')
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    subprocess.run([sys.executable, '-m', 'repvgg_zoo', *command.split()], cwd=tmp_path, env=environment, check=True)
    environment |= dict([variable.split('=')])
    code = (
        'import timm, repvgg_zoo\n'
        "assert not timm.create_model('repvgg_b1g2', pretrained=True).deploy\n"
        "assert timm.create_model('repvgg_b1g2.rvgg_in1k_deploy', pretrained=True).deploy\n"
        "assert timm.create_model('local-dir:zoo/repvgg_b1g2.rvgg_in1k', pretrained=True).num_classes == 1000\n"
    )
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=environment, check=True)


def test_own_folder_goes_first(tmp_path, monkeypatch):
    source = randomise(timm.create_model('test_repvgg'), px=32)
    torch.save(source.state_dict(), tmp_path / 'mine.pth')
    convert(tmp_path / 'mine.pth', tmp_path / 'own' / NAME)
    monkeypatch.setenv('REPVGG_ZOO_WEIGHTS', str(tmp_path / 'own'))
    x = images(px=32)
    assert torch.equal(timm.create_model('test_repvgg', pretrained=True).eval()(x), source(x))
    assert rel_diff(timm.create_model(f'{NAME}_deploy', pretrained=True).eval()(x), source(x)) < 1e-5
    bundled = str(weights_dir() / f'{NAME}_deploy.safetensors')
    overlay = dict(file=bundled)
    explicit = timm.create_model('test_repvgg', pretrained=True, deploy=True, pretrained_cfg_overlay=overlay).eval()
    assert rel_diff(explicit(x), source(x)) > 0.1
    monkeypatch.setenv('REPVGG_ZOO_WEIGHTS', str(tmp_path / 'nowhere'))
    with pytest.raises(CheckpointError, match=r"REPVGG_ZOO_WEIGHTS is '.*nowhere', which is no folder"):
        timm.create_model('test_repvgg', pretrained=True)
