"""From a checkpoint to two model folders, and to two repositories: the folders, and the whole way through the Hub."""

import contextlib
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
from helpers import TIMM_NAMES, images, logits, official, randomise, rel_diff
from hub_server import hub_server
from huggingface_hub import RepoCard
from safetensors import safe_open
from safetensors.torch import save_file

import repvgg_zoo
from repvgg_zoo import VARIANTS, CheckpointError
from repvgg_zoo.pretrained.locate import locate
from repvgg_zoo.pretrained.manifest import FoldCheck, read_manifest, weights_dir
from repvgg_zoo.repvgg import _pretrained_cfg
from repvgg_zoo.tools.convert import convert
from repvgg_zoo.tools.publish.cards import model_card
from repvgg_zoo.tools.publish.folders import build_folders
from repvgg_zoo.tools.publish.manifest_file import write_manifest
from repvgg_zoo.tools.publish.publish import names_to_publish, publish, push_folders
from repvgg_zoo.tools.publish.upload import HubError, push_folder
from repvgg_zoo.tools.publish.weights_page import weights_page
from repvgg_zoo_cli import main

ROOT = Path(__file__).parents[2]
NAME = 'test_repvgg.cifar10'
FILES = ['README.md', 'config.json', 'model.safetensors']


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


# ----------------------------------------------------------------------------------------------- folders


def test_build_folders_gives_two_complete_folders(own_weights, tmp_path):
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


def test_build_folders_twice_gives_same_bytes(own_weights, tmp_path):
    for out in ('a', 'b', 'b'):
        build_folders(NAME, owner='zoo', out=tmp_path / out)
    assert tree(tmp_path / 'a') == tree(tmp_path / 'b')


def test_build_folders_bundled_weights_are_bundled_files(own_weights, tmp_path):
    for item in build_folders(NAME, owner='zoo', out=tmp_path):
        assert (item.folder / 'model.safetensors').read_bytes() == item.record.path.read_bytes()


def test_build_folders_other_folder_needs_replace(own_weights, tmp_path):
    build_folders(NAME, owner='zoo', out=tmp_path)
    whole = tree(tmp_path)
    (tmp_path / f'{NAME}_deploy' / 'config.json').write_text('{}')
    before = tree(tmp_path)
    with pytest.raises(FileExistsError, match=r'_deploy.* holds another config\.json, or none; .*--replace'):
        build_folders(NAME, owner='zoo', out=tmp_path)
    assert tree(tmp_path) == before
    build_folders(NAME, owner='zoo', out=tmp_path, replace_existing=True)
    assert tree(tmp_path) == whole


def test_build_folders_foreign_file_raises(own_weights, tmp_path):
    build_folders(NAME, owner='zoo', out=tmp_path)
    path = tmp_path / NAME / 'training' / 'labels.csv'
    path.parent.mkdir()
    path.write_text('mine')
    before = tree(tmp_path)
    for replace in (False, True):
        with pytest.raises(
            FileExistsError, match=r"holds 'training/labels\.csv', which is not one of the files to replace"
        ):
            build_folders(NAME, owner='zoo', out=tmp_path, replace_existing=replace)
    assert tree(tmp_path) == before


def test_build_folders_same_weights_keeps_card(own_weights, tmp_path):
    """Its figures depend on the machine and on the images that the forms were compared on."""
    (tmp_path / NAME).mkdir()  # an empty folder is as good as none
    build_folders(NAME, owner='zoo', out=tmp_path)
    before = tree(tmp_path)
    build_folders(NAME, owner='zoo', out=tmp_path, images=weights_dir() / 'cifar10' / 'validation' / 'cat')
    assert tree(tmp_path) == before


def test_build_folders_real_images_are_compared(own_weights, tmp_path):
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


def test_build_folders_wrong_fold_writes_nothing(own_weights, tmp_path, monkeypatch):
    switch = repvgg_zoo.RepVGG.switch_to_deploy

    def wrong(model):
        switch(model).head.fc.bias.data += 1
        return model

    with monkeypatch.context() as patch:
        patch.setattr('repvgg_zoo.tools.publish.folders.float64_rel_diff', lambda model, x: 2e-9)
        with pytest.raises(CheckpointError, match=r'differ by 2\.0e-09 .* in float64'):
            build_folders(NAME, owner='zoo', out=tmp_path / 'out')
    with monkeypatch.context() as patch:
        patch.setattr(repvgg_zoo.RepVGG, 'switch_to_deploy', wrong)
        with pytest.raises(CheckpointError, match=r'e-\d\d in float32, more than'):
            build_folders(NAME, owner='zoo', out=tmp_path / 'out')
    with monkeypatch.context() as patch:
        patch.setattr('repvgg_zoo.tools.publish.folders.rel_diff', lambda a, b: float('nan'))
        with pytest.raises(CheckpointError, match=r'nan in float32'):
            build_folders(NAME, owner='zoo', out=tmp_path / 'out')
    assert tree(tmp_path / 'out') == {}


def test_build_folders_impossible_request_raises(own_weights, tmp_path):
    torch.save(timm.create_model('test_repvgg').state_dict(), tmp_path / 'other.pth')
    torch.save(timm.create_model('test_repvgg', deploy=True).state_dict(), tmp_path / 'deploy.pth')
    for name, source, error, message in (
        ('repvgg_b4.rvgg_in1k', None, ValueError, r"unknown weights 'repvgg_b4\.rvgg_in1k'; did you mean"),
        (f'{NAME}_deploy', None, ValueError, r"'test_repvgg\.cifar10' publishes both"),
        (
            NAME,
            tmp_path / 'none.pth',
            FileNotFoundError,
            r'none\.pth.* is no checkpoint file, no model folder and no Hub',
        ),
        (NAME, '', FileNotFoundError, r"'' is no checkpoint file"),
        (NAME, './none', FileNotFoundError, r"'\./none' is no checkpoint file"),
        (NAME, tmp_path / 'deploy.pth', CheckpointError, r'is of the deploy form'),
        (NAME, tmp_path / 'other.pth', CheckpointError, r'is bundled as .* other weights'),
        ('repvgg_a0.rvgg_in1k', tmp_path / 'other.pth', CheckpointError, r'does not fit repvgg_a0'),
    ):
        with pytest.raises(error, match=message):
            build_folders(name, source, owner='zoo', out=tmp_path / 'out')
    for owner in ('', '..', 'a/b', 'a b'):
        with pytest.raises(ValueError, match=r'[Rr]epo'):
            build_folders(NAME, owner=owner, out=tmp_path / 'out')
    assert tree(tmp_path / 'out') == {}


def test_build_folders_ignores_override_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('REPVGG_ZOO_WEIGHTS', str(tmp_path))
    (tmp_path / NAME).mkdir()
    build_folders(NAME, owner='zoo', out=tmp_path / 'out')


@pytest.mark.parametrize('revision', [False, True])
def test_build_folders_source_on_hub_is_used(hub, own_weights, tmp_path, revision):
    (training, _) = build_folders(NAME, owner='zoo', out=tmp_path / 'a')
    commit = push_folder(training.folder, 'somebody/weights')
    source = f'somebody/weights@{commit}' if revision else 'hf-hub:somebody/weights'
    (again, _) = build_folders(NAME, source, owner='zoo', out=tmp_path / 'b')
    assert again.record.sha256 == training.record.sha256
    assert f'Converted from {source.removeprefix("hf-hub:")}, sha256' in (again.folder / 'README.md').read_text()


# ------------------------------------------------------------------------------------------------- cards


@pytest.mark.parametrize('name', read_manifest())
def test_model_card_says_what_manifest_knows(name):
    record = read_manifest()[name]
    check = FoldCheck(float64_rel_diff=1e-15, float32_rel_diff=2e-7, images=8, top1_agreement_pct=None)
    record = dataclasses.replace(record, sha256='0' * 64, size_bytes=1234, fold_check=check)
    card = RepoCard(str(model_card(record, owner='zoo', source='a file', in_timm=record.arch in TIMM_NAMES)))
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
    plain = record.arch in TIMM_NAMES and record.form == 'training'
    assert ('Plain timm loads it too' in card.text) == plain
    assert ('does not know this' in card.text) != plain
    assert f'Training: {record.recipe}' in card.text or record.recipe is None
    for text in (f'hf-hub:zoo/{name}', '1,234 bytes', '0' * 64, f'{record.params:,}', '1.0e-15'):
        assert text in card.text
    for metrics in (*record.published, *record.measured):
        assert f'{metrics.top1_pct:g} %' in card.text
        assert metrics.source in card.text


@pytest.mark.parametrize('form', ['training', 'deploy'])
def test_model_card_code_runs(hub, own_weights, tmp_path, form):
    published = build_folders(NAME, owner='zoo', out=tmp_path / 'out')
    push_folders(published)
    card = (published[form == 'deploy'].folder / 'README.md').read_text()
    (tmp_path / 'repvgg_zoo').symlink_to(ROOT)
    blocks = re.findall(r'```python\n(.*?)```', card, re.DOTALL)
    for code in blocks:
        namespace = {}
        with contextlib.chdir(tmp_path):
            exec(code, namespace)  # noqa: S102
        assert isinstance(namespace['model'], torch.nn.Module)
    assert len(blocks) == 2


def test_weights_page_is_current():
    assert (ROOT / 'weights' / 'README.md').read_text('utf-8') == weights_page(read_manifest())


# ------------------------------------------------------------------------------------------- to the Hub


def test_push_folders_records_weights(hub, own_weights, tmp_path):
    published = build_folders(NAME, owner='zoo', out=tmp_path / 'out')
    push_folders(published)
    for item in published:
        record = read_manifest()[item.record.name]
        assert record.hub_id == item.record.hub_id == f'zoo/{item.record.name}'
        assert record.revision == hub.repositories[item.record.hub_id].commits[-1][0]
        assert record.sha256 == item.record.sha256
        assert record.fold_check == item.record.fold_check
        assert f'[{item.record.hub_id}](' in (own_weights / 'README.md').read_text()
    assert NAME not in names_to_publish('zoo')
    assert NAME in names_to_publish('other')
    pages = tree(own_weights)
    push_folders(build_folders(NAME, owner='zoo', out=tmp_path / 'out'))
    assert tree(own_weights) == pages
    assert hub.count('POST', '/commit/') == 2


def test_main_publish_all_continues_after_failure(hub, own_weights, tmp_path, capsys):
    """The Hub here has none of timm's repositories, so the bundled weights alone can be published."""
    command = ['publish', '--all', '--owner', 'zoo', '--out', str(tmp_path / 'out'), '--push']
    assert main(command) == 1
    said = capsys.readouterr()
    assert f'published as zoo/{NAME}' in said.out
    complaints = re.findall(r'^repvgg-zoo: there is no repository (\S+)', said.err, re.MULTILINE)
    assert complaints == [r.hub_id for r in read_manifest().values() if (r.hub_id or '').startswith('timm/')]
    before = len(hub.requests)
    assert main(command) == 1
    assert ('POST', f'/api/models/zoo/{NAME}/commit/main') not in hub.requests[before:]
    assert 'published as' not in capsys.readouterr().out


def test_push_folders_refused_records_nothing(hub, own_weights, tmp_path):
    published = build_folders(NAME, owner='forbidden', out=tmp_path / 'out')
    before = tree(own_weights)
    with pytest.raises(HubError, match='no right'):
        push_folders(published)
    assert tree(own_weights) == before


def test_push_folders_changed_folder_raises(hub, own_weights, tmp_path):
    published = build_folders(NAME, owner='zoo', out=tmp_path / 'out')
    weights = published[0].folder / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-1] + b'\x7f')
    with pytest.raises(HubError, match='has changed since it was written'):
        push_folders(published)
    assert hub.state() == {}


def test_push_folders_keeps_record_of_other_process(hub, own_weights, tmp_path):
    published = build_folders(NAME, owner='zoo', out=tmp_path / 'out')
    path = own_weights / 'manifest.json'
    content = json.loads(path.read_text())
    content['repvgg_a0.rvgg_in1k']['revision'] = 'meanwhile'
    path.write_text(json.dumps(content))
    push_folders(published)
    assert read_manifest()['repvgg_a0.rvgg_in1k'].revision == 'meanwhile'


def test_write_manifest_writes_page_first(hub, own_weights, tmp_path, monkeypatch):
    """Whoever is killed between the two finds the record not written, and writes both again."""
    monkeypatch.setattr('repvgg_zoo.tools.publish.manifest_file.manifest_text', lambda records: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        push_folders(build_folders(NAME, owner='zoo', out=tmp_path / 'out'))
    assert f'[zoo/{NAME}](' in (own_weights / 'README.md').read_text()
    assert read_manifest()[NAME].revision is None


def test_publish_unwritable_manifest_raises(own_weights, tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'access', lambda path, mode: False)
    with pytest.raises(PermissionError, match='publishing could not be recorded'):
        publish(NAME, owner='zoo', out=tmp_path / 'out', push=True)
    assert not (tmp_path / 'out').exists()


@pytest.fixture
def published_a0(hub, own_weights, tmp_path):
    """A tag whose weights are on the Hub alone, published in both forms."""
    torch.save(randomise(timm.create_model('repvgg_a0')).state_dict(), tmp_path / 'a0.pth')
    publish('repvgg_a0.rvgg_in1k', tmp_path / 'a0.pth', owner='zoo', out=tmp_path / 'out', push=True)
    return {record.name: _pretrained_cfg(record) for record in read_manifest().values() if record.arch == 'repvgg_a0'}


@pytest.mark.parametrize('suffix', ['', '_deploy'])
def test_locate_published_tag_is_pinned_and_checked(published_a0, hub, own_weights, suffix):
    record = read_manifest()[f'repvgg_a0.rvgg_in1k{suffix}']
    cfg = dataclasses.replace(published_a0[record.name], architecture=record.arch, tag=record.tag)
    assert cfg.hf_hub_id == f'zoo/{record.name}@{record.revision}'
    path = locate(cfg)
    assert record.revision in path.parts
    assert path.stat().st_size == record.size_bytes
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.resolve().write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        locate(cfg)
    path.resolve().write_bytes(bytes(content[:-100]) + bytes([content[-100] ^ 1]) + bytes(content[-99:]))
    write_manifest(dict(read_manifest()) | {record.name: dataclasses.replace(record, sha256='0' * 64)})
    with pytest.raises(CheckpointError, match=f'is not the file that was published as {re.escape(record.name)}'):
        locate(cfg)


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


@pytest.mark.slow
def test_publish_mirror_serves_both_forms(own_weights, checkout, tmp_path):
    """Another implementation of the Hub, a mirror of git repositories, and both forms from it by their Hub names."""
    olah = shutil.which('olah-cli', path=Path(sys.executable).parent)
    published = build_folders(NAME, owner='zoo', out=tmp_path / 'out')
    for item in published:
        repository = tmp_path / 'mirror' / 'models' / item.record.hub_id
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
            names = [f'hf-hub:{item.record.hub_id}' for item in published]
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
import re, sys
from repvgg_zoo_cli import main
status = main()
print('peak_kb=' + re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])  # rusage has the parent's peak
sys.exit(status)
"""


def test_build_folders_compares_branches(tmp_path, monkeypatch, fast_path_calls):
    """Or a wrong fold would be compared with itself, on images that are worth a fold for one call."""
    batch = torch.randn(2, 3, 128, 128)
    monkeypatch.setattr('repvgg_zoo.tools.publish.folders.images_for', lambda *_: iter([batch]))
    build_folders(NAME, owner='zoo', out=tmp_path)
    assert len(fast_path_calls) > 11
    assert not any(fast_path_calls)


IN_CI = {'repvgg_a0', 'repvgg_b1g2', 'repvgg_b3', 'repvgg_d2se', 'repvggplus_l2pse'}
"""A plain one, one that timm has not, the one whose memory is limited, and each kind of squeeze-excite."""


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
        source, x = randomise(official(arch)), images(2)
        torch.save(source.state_dict(), tmp_path / 'official.pth')
        expected = logits(source, x)
        del source
    name = f'{arch}.rvgg_in1k'
    with hub_server(tmp_path / 'blobs') as server:
        command = ('-c', MEASURED, 'publish', name, '--from', tmp_path / 'official.pth', '--owner', 'zoo', '--push')
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
    if read_manifest()['repvgg_b1g2.rvgg_in1k'].hub_id:
        pytest.skip('published')
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


def test_create_model_override_folder_goes_first(tmp_path, monkeypatch):
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
    save_file(timm.create_model('repvgg_a0').state_dict(), tmp_path / 'own' / NAME / 'model.safetensors')
    with pytest.raises(CheckpointError, match=rf'{tmp_path}/own/.*does not fit test_repvgg'):
        timm.create_model('test_repvgg', pretrained=True)
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/own' has no folder repvgg_b1g2\.rvgg_in1k"):
        timm.create_model('repvgg_b1g2', pretrained=True)
    monkeypatch.setenv('REPVGG_ZOO_WEIGHTS', str(tmp_path / 'nowhere'))
    with pytest.raises(CheckpointError, match=r"REPVGG_ZOO_WEIGHTS is '.*nowhere', which is no folder"):
        timm.create_model('test_repvgg', pretrained=True)
