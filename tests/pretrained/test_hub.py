"""Weights from a Hub and folders to it, over HTTP on loopback, through the real client."""

from types import SimpleNamespace

import pytest
import timm
import torch
from helpers import images
from huggingface_hub import constants

from repvgg_zoo import CheckpointError, load_checkpoint
from repvgg_zoo.pretrained.hub import HubError, download_weights, push_folder

ID = 'zoo/model'


def content_of(hub, repo_id):
    _, files = hub.repositories[repo_id].commits[-1]
    return {path: (hub.blobs / sha256).read_bytes() for path, sha256 in files.items() if path != '.gitattributes'}


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ----------------------------------------------------------------------------------------------- uploads


def test_folder_arrives_whole_in_one_commit(hub, folder):
    revision = push_folder(folder, ID)
    assert content_of(hub, ID) == files_of(folder)
    assert [commit[0] for commit in hub.repositories[ID].commits][1:] == [revision]
    assert hub.count('PUT', '^/lfs/') == 1


def test_same_folder_is_not_uploaded_twice(hub, folder):
    revision = push_folder(folder, ID)
    before = len(hub.requests)
    assert push_folder(folder, ID) == revision
    assert hub.requests[before:] == [('GET', f'/api/models/{ID}')]


@pytest.mark.parametrize('name', ['model.safetensors', 'config.json'])
def test_other_files_are_replaced_only_if_told(hub, folder, name):
    push_folder(folder, ID)
    state = content_of(hub, ID)
    (folder / name).write_bytes((folder / name).read_bytes()[:-1] + b' ')
    (folder / 'README.md').rename(folder / 'CARD.md')
    with pytest.raises(HubError, match=r'holds other files than .*--replace'):
        push_folder(folder, ID)
    assert content_of(hub, ID) == state
    push_folder(folder, ID, replace=True)
    assert content_of(hub, ID) == files_of(folder)


@pytest.mark.parametrize(
    ('method', 'path', 'how'),
    [
        ('GET', '^/api/models', dict(status=503)),
        ('POST', 'create', dict(status=429)),
        ('POST', 'create', dict(drop_answer=True)),
        ('POST', 'preupload', dict(status=500)),
        ('POST', 'batch', dict(drop_answer=True)),
        ('PUT', 'lfs', dict(after_bytes=1 << 20)),
        ('PUT', 'lfs', dict(status=503)),
        *(('POST', '/commit/', dict(status=status)) for status in (408, 409, 412, 429, 500, 502, 503, 504)),
        ('POST', '/commit/', dict(drop_answer=True)),
    ],
    ids=str,
)
def test_what_may_pass_is_tried_again(hub, folder, method, path, how):
    hub.fail(method, path, **how)
    push_folder(folder, ID)
    assert not hub.faults[0].times
    assert content_of(hub, ID) == files_of(folder)
    assert len(hub.repositories[ID].commits) == 2


def test_upload_that_was_cut_off_is_not_begun_anew(hub, folder):
    hub.fail('POST', '/commit/', status=500, times=3)  # as often as it is tried here
    with pytest.raises(HubError, match='cannot publish zoo/model'):
        push_folder(folder, ID)
    assert len(hub.repositories[ID].commits) == 1
    push_folder(folder, ID)
    assert hub.count('PUT', '^/lfs/') == 1


@pytest.mark.parametrize(
    ('status', 'message'),
    [(401, r'does not know you; log in with `hf auth login`'), (403, 'no right to that'), (400, 'cannot publish')],
)
def test_refusals_are_final(hub, folder, status, message):
    hub.fail('POST', 'create', status=status, times=9)
    with pytest.raises(HubError, match=message):
        push_folder(folder, ID)
    assert hub.faults[0].times == 8


def test_wrong_token(hub, folder, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'hf_wrong')
    with pytest.raises(HubError, match='HF_TOKEN'):
        push_folder(folder, ID)
    assert hub.repositories == {}


def test_no_server(folder, hub, monkeypatch):
    monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
    with pytest.raises(HubError, match='cannot publish zoo/model'):
        push_folder(folder, ID)


def test_repository_that_changes_meanwhile(hub, folder):
    """A commit of somebody else between the look at the repository and the own commit is not buried."""

    def intrude():
        repository = hub.repositories[ID]
        repository.commit(dict(repository.commits[-1][1]) | {'config.json': hub.put(b'{}')})

    hub.fail('POST', '/commit/', before=intrude)
    with pytest.raises(HubError, match='holds other files'):
        push_folder(folder, ID)
    assert content_of(hub, ID) == {'config.json': b'{}'}


def test_card_alone_is_replaced_only_if_told(hub, folder):
    revision = push_folder(folder, ID)
    (folder / 'README.md').write_text('---\nlicense: mit\n---\nOther figures.\n')
    assert push_folder(folder, ID) == revision
    assert push_folder(folder, ID, replace=True) != revision
    assert content_of(hub, ID) == files_of(folder)


def test_server_says_how_long_to_wait(hub, folder, monkeypatch):
    waits = []
    monkeypatch.setattr('repvgg_zoo.pretrained.hub.time', SimpleNamespace(sleep=waits.append))
    hub.fail('POST', '/commit/', status=429, headers={'Retry-After': '17'})
    hub.fail('POST', '/commit/', status=503, headers={'Retry-After': '86400'})
    push_folder(folder, ID)
    assert waits == [17, 300]


def test_offline_is_not_tried_again(hub, folder, monkeypatch, caplog):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    reset_sessions()
    try:
        with pytest.raises(HubError, match=r'offline mode'):
            push_folder(folder, ID)
    finally:
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
        reset_sessions()
    assert 'next try' not in caplog.text


def reset_sessions():
    """huggingface-hub decides when it makes its HTTP session whether it is offline."""
    from huggingface_hub.utils import close_session

    close_session()


# --------------------------------------------------------------------------------------------- downloads


def test_weights_arrive_and_are_cached(hub, folder):
    push_folder(folder, ID)
    path = download_weights(ID)
    assert path.read_bytes() == (folder / 'model.safetensors').read_bytes()
    assert str(path).startswith(constants.HF_HUB_CACHE)
    hub.fail('GET', 'resolve', status=500, times=9)
    assert download_weights(ID) == path


def test_cache_dir(hub, folder, tmp_path):
    push_folder(folder, ID)
    assert tmp_path / 'mine' in download_weights(ID, cache_dir=tmp_path / 'mine').parents


def test_revision_is_pinned(hub, folder):
    first = push_folder(folder, ID)
    old = (folder / 'model.safetensors').read_bytes()
    (folder / 'model.safetensors').write_bytes(old[:-4] + b'\0\0\0\0')
    push_folder(folder, ID, replace=True)
    assert download_weights(f'{ID}@{first}').read_bytes() == old
    assert download_weights(ID).read_bytes() != old
    with pytest.raises(CheckpointError, match="has no revision 'nope'"):
        download_weights(f'{ID}@nope')


def test_download_goes_on_where_it_was_cut(hub, folder):
    push_folder(folder, ID)
    hub.fail('GET', 'resolve', after_bytes=1 << 20)
    assert download_weights(ID).read_bytes() == (folder / 'model.safetensors').read_bytes()
    assert hub.count('GET', 'resolve') == 2


@pytest.mark.parametrize('method', ['HEAD', 'GET'])
@pytest.mark.parametrize('status', [429, 503])
def test_busy_hub_is_asked_again(hub, folder, method, status):
    push_folder(folder, ID)
    hub.fail(method, 'resolve', status=status)
    assert download_weights(ID).read_bytes() == (folder / 'model.safetensors').read_bytes()


def test_nothing_there(hub, folder):
    with pytest.raises(CheckpointError, match=r'no repository zoo/model on the Hub, or it is private'):
        download_weights(ID)
    (folder / 'model.safetensors').unlink()
    push_folder(folder, ID)
    with pytest.raises(CheckpointError, match=r'has no weights: neither model\.safetensors nor pytorch_model\.bin'):
        download_weights(ID)


@pytest.mark.parametrize(
    ('status', 'message'),
    [
        (401, r'cannot get model\.safetensors of zoo/model .*log in with `hf auth login`'),
        (403, r'cannot get model\.safetensors of zoo/model .*no right'),
        (429, r'cannot get model\.safetensors of zoo/model .*too many requests'),
        (500, r'cannot get model\.safetensors of zoo/model .*500'),
    ],
)
@pytest.mark.parametrize('method', ['HEAD', 'GET'])
def test_refused_download(hub, folder, method, status, message, monkeypatch):
    push_folder(folder, ID)
    hub.fail(method, 'resolve', status=status, times=99)
    monkeypatch.setattr('time.sleep', lambda seconds: None)
    with pytest.raises(CheckpointError, match=message):
        download_weights(ID)


def test_download_that_is_cut_for_ever(hub, folder, monkeypatch):
    push_folder(folder, ID)
    hub.fail('GET', 'resolve', after_bytes=1, times=99)
    monkeypatch.setattr('time.sleep', lambda seconds: None)
    with pytest.raises(CheckpointError, match=r'cannot get model\.safetensors of zoo/model'):
        download_weights(ID)


@pytest.mark.parametrize('suffix', ['', '@'])
def test_flipped_byte_in_the_cache_is_named(hub, folder, suffix):
    revision = push_folder(folder, ID)
    name = f'hf-hub:{ID}{suffix}{revision if suffix else ""}'
    timm.create_model(name, pretrained=True)
    path = download_weights(ID)
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.resolve().write_bytes(content)
    with pytest.raises(CheckpointError, match=r'model\.safetensors.* is not the file that the Hub has'):
        timm.create_model(name, pretrained=True)


def test_offline(hub, folder, monkeypatch):
    push_folder(folder, ID)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(CheckpointError, match='not in the cache'):
        download_weights(ID)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    path = download_weights(ID)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert download_weights(ID) == path


def test_hub_name_in_timm(hub, folder):
    revision = push_folder(folder, ID)
    x = images(px=32)
    expected = load_checkpoint(timm.create_model('test_repvgg'), folder / 'model.safetensors').eval()(x)
    for name in (f'hf-hub:{ID}', f'hf-hub:{ID}@{revision}'):
        assert torch.equal(timm.create_model(name, pretrained=True).eval()(x), expected)
