"""From a checkpoint to two model folders, and to two repositories: the folders, and the whole way through the Hub."""

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest
import timm
import torch
from helpers import images, randomise, rel_diff
from safetensors import safe_open
from safetensors.torch import save_file

import repvgg_zoo
from repvgg_zoo import CheckpointError
from repvgg_zoo.pretrained.hub import sha256_of
from repvgg_zoo.pretrained.locate import locate
from repvgg_zoo.pretrained.manifest import read_manifest, weights_dir
from repvgg_zoo.repvgg import _pretrained_cfg
from repvgg_zoo.tools.convert import convert
from repvgg_zoo.tools.own_files import MARKER
from repvgg_zoo.tools.publish.folders import build_folders
from repvgg_zoo.tools.publish.manifest_file import write_manifest
from repvgg_zoo.tools.publish.publication import own_publication, recorded_publication
from repvgg_zoo.tools.publish.push import names_to_publish, publish, push_folders
from repvgg_zoo.tools.publish.upload import HubError, push_folder
from repvgg_zoo.tools.publish.weights_page import weights_page
from repvgg_zoo.tools.reference import REFERENCE
from repvgg_zoo_cli import main

ROOT = Path(__file__).parents[2]
NAME = 'test_repvgg.cifar10'
FILES = [MARKER, 'README.md', 'config.json', 'model.safetensors', REFERENCE]


def build(name=NAME, source=None, *, trust_source=False, **options):
    return build_folders(recorded_publication(name, source, trust_source=trust_source), **options)


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


def test_build_folders_gives_two_complete_folders(own_weights, tmp_path):
    published = build(owner='zoo', out=tmp_path / 'out')
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == [NAME, f'{NAME}_deploy']
    x = images(2, px=32)
    expected = timm.create_model(NAME, pretrained=True).eval()(x)
    for item, form in zip(published, ('training', 'deploy'), strict=True):
        assert list(tree(item.folder)) == FILES
        loaded = timm.create_model(f'local-dir:{item.folder}', pretrained=True).eval()
        assert loaded.deploy == (form == 'deploy')
        assert rel_diff(loaded(x), expected) < 1e-5
        config = json.loads((item.folder / 'config.json').read_text())
        assert config['pretrained_cfg']['tag'] == item.name.split('.')[1]
        with safe_open(item.folder / 'model.safetensors', 'pt') as file:
            assert file.metadata() == {'format': 'pt', 'architecture': 'test_repvgg', 'form': form}
        assert item.fold_check.float64_rel_diff < 1e-12
        assert item.fold_check.float32_rel_diff < 1e-5


def test_build_folders_twice_gives_same_bytes(own_weights, tmp_path):
    for out in ('a', 'b', 'b'):
        build(owner='zoo', out=tmp_path / out)
    assert tree(tmp_path / 'a') == tree(tmp_path / 'b')


def test_build_folders_bundled_weights_are_bundled_files(own_weights, tmp_path):
    for item in build(owner='zoo', out=tmp_path):
        assert (item.folder / 'model.safetensors').read_bytes() == read_manifest()[item.name].path.read_bytes()


def own(path, seed):
    torch.save(randomise(timm.create_model('test_repvgg', num_classes=5), px=32, seed=seed).state_dict(), path)
    return own_publication('test_repvgg.mine', path)


def test_build_folders_other_weights_need_replace(tmp_path):
    build_folders(own(tmp_path / 'c.pth', 1), owner='zoo', out=tmp_path / 'out')
    before = tree(tmp_path / 'out')
    other = own(tmp_path / 'c.pth', 2)
    with pytest.raises(FileExistsError, match=r'holds another model\.safetensors, or none; .*--replace'):
        build_folders(other, owner='zoo', out=tmp_path / 'out')
    assert tree(tmp_path / 'out') == before
    for out in ('out', 'new'):
        build_folders(other, owner='zoo', out=tmp_path / out, replace_existing=True)
    assert tree(tmp_path / 'out') == tree(tmp_path / 'new') != before


@pytest.mark.parametrize('name', ['README.md', 'config.json'])
def test_build_folders_edited_file_is_not_replaced(own_weights, tmp_path, name):
    build(owner='zoo', out=tmp_path)
    (tmp_path / f'{NAME}_deploy' / name).write_text('mine')
    before = tree(tmp_path)
    if name == 'README.md':  # an edited card is what its author wants to push
        for replace in (False, True):
            assert [item.edited_card for item in build(owner='zoo', out=tmp_path, replace_existing=replace)] == [
                False,
                True,
            ]
    else:
        with pytest.raises(
            FileExistsError, match=rf'_deploy.* holds {name!r}, which is not one of the files to replace'
        ):
            build(owner='zoo', out=tmp_path, replace_existing=True)
        with pytest.raises(FileExistsError, match=r'holds another config\.json'):
            build(owner='zoo', out=tmp_path)
    assert tree(tmp_path) == before


def test_build_folders_foreign_file_raises(own_weights, tmp_path):
    build(owner='zoo', out=tmp_path)
    path = tmp_path / NAME / 'training' / 'labels.csv'
    path.parent.mkdir()
    path.write_text('mine')
    before = tree(tmp_path)
    for replace in (False, True):
        with pytest.raises(
            FileExistsError, match=r"holds 'training/labels\.csv', which is not one of the files to replace"
        ):
            build(owner='zoo', out=tmp_path, replace_existing=replace)
    assert tree(tmp_path) == before


def test_build_folders_same_weights_keeps_card(own_weights, tmp_path):
    """Its figures depend on the machine and on the images that the forms were compared on."""
    (tmp_path / NAME).mkdir()  # an empty folder is as good as none
    build(owner='zoo', out=tmp_path)
    before = tree(tmp_path)
    build(owner='zoo', out=tmp_path, images=weights_dir() / 'cifar10' / 'validation' / 'cat')
    assert tree(tmp_path) == before


def test_build_folders_real_images_are_compared(own_weights, tmp_path):
    seen = []

    def track(batches, **_):
        for batch in batches:
            seen.append(len(batch))
            yield batch

    folder = weights_dir() / 'cifar10' / 'validation' / 'cat'
    (item, _) = build(owner='zoo', out=tmp_path, images=folder, track=track)
    assert (item.fold_check.images, item.fold_check.top1_agreement_pct) == (50, 100)
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
            build(owner='zoo', out=tmp_path / 'out')
    with monkeypatch.context() as patch:
        patch.setattr(repvgg_zoo.RepVGG, 'switch_to_deploy', wrong)
        with pytest.raises(CheckpointError, match=r'e-\d\d in float32, more than'):
            build(owner='zoo', out=tmp_path / 'out')
    with monkeypatch.context() as patch:
        patch.setattr('repvgg_zoo.tools.publish.folders.rel_diff', lambda a, b: float('nan'))
        with pytest.raises(CheckpointError, match=r'nan in float32'):
            build(owner='zoo', out=tmp_path / 'out')
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
            build(name, source, owner='zoo', out=tmp_path / 'out')
    for owner in ('', '..', 'a/b', 'a b'):
        with pytest.raises(ValueError, match=r'[Rr]epo'):
            build(owner=owner, out=tmp_path / 'out')
    assert tree(tmp_path / 'out') == {}


def test_build_folders_ignores_override_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('REPVGG_ZOO_WEIGHTS', str(tmp_path))
    (tmp_path / NAME).mkdir()
    build(owner='zoo', out=tmp_path / 'out')


@pytest.mark.parametrize('revision', [False, True])
def test_build_folders_source_on_hub_is_used(hub, own_weights, tmp_path, revision):
    (training, _) = build(owner='zoo', out=tmp_path / 'a')
    commit = push_folder(training.folder, 'somebody/weights').revision
    source = f'somebody/weights@{commit}' if revision else 'hf-hub:somebody/weights'
    (again, _) = build(source=source, owner='zoo', out=tmp_path / 'b')
    assert again.sha256 == training.sha256
    assert f'Converted from {source.removeprefix("hf-hub:")}, sha256' in (again.folder / 'README.md').read_text()


@pytest.mark.parametrize('known', [True, False])
def test_recorded_publication_hash_in_address_vouches(known, own_weights, tmp_path):
    file, manifest = tmp_path / 'tiny.pth', own_weights / 'manifest.json'
    torch.save(timm.create_model('test_repvgg').state_dict(), file)
    fields = json.loads(manifest.read_text())
    fields[NAME]['url'] = f'https://example.org/tiny-{sha256_of(file)[:8] if known else "0" * 8}.pth'
    manifest.write_text(json.dumps(fields))
    read_manifest.cache_clear()
    assert recorded_publication(NAME, file).vouched is known


def test_weights_page_is_current():
    assert (ROOT / 'weights' / 'README.md').read_text('utf-8') == weights_page(read_manifest())


# ------------------------------------------------------------------------------------------- to the Hub


def test_push_folders_records_weights(hub, own_weights, tmp_path):
    published = build(owner='zoo', out=tmp_path / 'out')
    push_folders(published)
    for item in published:
        record = read_manifest()[item.name]
        assert record.hub_id == item.hub_id == f'zoo/{item.name}'
        assert record.revision == hub.repositories[item.hub_id].commits[-1][0]
        assert record.sha256 == item.sha256
        assert record.fold_check == item.fold_check
        assert f'(https://huggingface.co/{item.hub_id})' in (own_weights / 'README.md').read_text()
    assert NAME not in names_to_publish('zoo')
    assert NAME in names_to_publish('other')
    pages = tree(own_weights)
    push_folders(build(owner='zoo', out=tmp_path / 'out'))
    assert tree(own_weights) == pages
    assert hub.count('POST', '/commit/') == 2


def test_main_publish_all_continues_after_failure(web, own_weights, tmp_path, capsys):
    """The servers here have no weights, so the bundled weights alone can be published."""
    command = ['publish', '--all', '--owner', 'zoo', '--out', str(tmp_path / 'out'), '--push']
    assert main(command) == 1
    said = capsys.readouterr()
    assert f'published as zoo/{NAME}' in said.out
    complaints = re.findall(r'^repvgg-zoo: there is no repository (\S+)', said.err, re.MULTILINE)
    assert complaints == [r.hub_id for r in read_manifest().values() if (r.hub_id or '').startswith('timm/')]
    before = len(web.requests)
    assert main(command) == 1
    assert ('POST', f'/api/models/zoo/{NAME}/commit/main') not in web.requests[before:]
    assert 'published as' not in capsys.readouterr().out


def test_push_folders_refused_records_nothing(hub, own_weights, tmp_path):
    published = build(owner='forbidden', out=tmp_path / 'out')
    before = tree(own_weights)
    with pytest.raises(HubError, match='no right'):
        push_folders(published)
    assert tree(own_weights) == before


def test_push_folders_changed_folder_raises(hub, own_weights, tmp_path):
    published = build(owner='zoo', out=tmp_path / 'out')
    weights = published[0].folder / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-1] + b'\x7f')
    with pytest.raises(HubError, match='has changed since it was written'):
        push_folders(published)
    assert hub.state() == {}


def test_push_folders_keeps_record_of_other_process(hub, own_weights, tmp_path):
    published = build(owner='zoo', out=tmp_path / 'out')
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
        push_folders(build(owner='zoo', out=tmp_path / 'out'))
    assert f'(https://huggingface.co/zoo/{NAME})' in (own_weights / 'README.md').read_text()
    assert read_manifest()[NAME].revision is None


def test_publish_unknown_file_is_not_recorded(hub, own_weights, tmp_path):
    """Or the manifest would lend the official accuracy to any weights of the right shape."""
    torch.save(randomise(timm.create_model('repvgg_a0')).state_dict(), tmp_path / 'a0.pth')
    publication = recorded_publication('repvgg_a0.rvgg_in1k', tmp_path / 'a0.pth')
    before = tree(own_weights)
    published = publish(publication, owner='zoo', out=tmp_path / 'out', push=True)
    assert tree(own_weights) == before
    assert list(hub.state()) == [item.hub_id for item in published]


def test_push_folders_leaves_files_of_others_on_the_hub(hub, own_weights, tmp_path):
    published = build(owner='zoo', out=tmp_path / 'out')
    push_folders(published)
    repository = hub.repositories[f'zoo/{NAME}']
    files = dict(repository.commits[-1][1]) | {'onnx/model.onnx': hub.put(b'onnx'), 'config.json': hub.put(b'{}')}
    repository.commit(files)
    push_folders(published, replace_existing=True)
    _, now = repository.commits[-1]
    assert now['onnx/model.onnx'] == files['onnx/model.onnx']
    assert now['config.json'] != files['config.json']
    assert MARKER not in now
    commits = len(repository.commits)
    push_folders(published)
    assert len(repository.commits) == commits


def test_publish_unwritable_manifest_raises(own_weights, tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'access', lambda path, mode: False)
    with pytest.raises(PermissionError, match='publishing could not be recorded'):
        publish(recorded_publication(NAME), owner='zoo', out=tmp_path / 'out', push=True)
    assert not (tmp_path / 'out').exists()


@pytest.fixture
def published_a0(hub, own_weights, tmp_path):
    """A tag whose weights are on the Hub alone, published in both forms."""
    torch.save(randomise(timm.create_model('repvgg_a0')).state_dict(), tmp_path / 'a0.pth')
    publication = recorded_publication('repvgg_a0.rvgg_in1k', tmp_path / 'a0.pth', trust_source=True)
    publish(publication, owner='zoo', out=tmp_path / 'out', push=True)
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


def test_build_folders_compares_branches(tmp_path, monkeypatch, fast_path_calls):
    """Or a wrong fold would be compared with itself, on images that are worth a fold for one call."""
    batch = torch.randn(2, 3, 128, 128)
    monkeypatch.setattr('repvgg_zoo.tools.publish.folders.images_for', lambda *_: iter([batch]))
    build(owner='zoo', out=tmp_path)
    assert len(fast_path_calls) > 11
    assert not any(fast_path_calls)


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
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/own' has no folder repvgg_b2g2\.rvgg_in1k"):
        timm.create_model('repvgg_b2g2', pretrained=True)
    monkeypatch.setenv('REPVGG_ZOO_WEIGHTS', str(tmp_path / 'nowhere'))
    with pytest.raises(CheckpointError, match=r"REPVGG_ZOO_WEIGHTS is '.*nowhere', which is no folder"):
        timm.create_model('test_repvgg', pretrained=True)
