"""Folders to a Hub, over HTTP on loopback, through the real client."""

from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from repvgg_zoo.tools.publish.upload import HubError, push_folder

ID = 'zoo/model'


def content_of(hub, repo_id):
    _, files = hub.repositories[repo_id].commits[-1]
    return {path: (hub.blobs / sha256).read_bytes() for path, sha256 in files.items() if path != '.gitattributes'}


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_push_folder_new_repository_one_commit(hub, folder):
    revision, uploaded = push_folder(folder, ID)
    assert uploaded
    assert content_of(hub, ID) == files_of(folder)
    assert [commit[0] for commit in hub.repositories[ID].commits][1:] == [revision]
    assert hub.count('PUT', '^/lfs/') == 1


def test_push_folder_same_files_uploads_nothing(hub, folder):
    revision, _ = push_folder(folder, ID)
    before = len(hub.requests)
    assert push_folder(folder, ID) == (revision, False)
    assert hub.requests[before:] == [('GET', f'/api/models/{ID}')]


@pytest.mark.parametrize('name', ['model.safetensors', 'config.json'])
def test_push_folder_other_files_needs_replace(hub, folder, name):
    push_folder(folder, ID)
    state = content_of(hub, ID)
    (folder / name).write_bytes((folder / name).read_bytes()[:-1] + b' ')
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
def test_push_folder_transient_fault_retries(hub, folder, method, path, how):
    hub.fail(method, path, **how)
    push_folder(folder, ID)
    assert not hub.faults[0].times
    assert content_of(hub, ID) == files_of(folder)
    assert len(hub.repositories[ID].commits) == 2


def test_push_folder_after_cut_upload_keeps_uploaded_files(hub, folder):
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
def test_push_folder_refusal_raises_at_once(hub, folder, status, message):
    hub.fail('POST', 'create', status=status, times=9)
    with pytest.raises(HubError, match=message):
        push_folder(folder, ID)
    assert hub.faults[0].times == 8


def test_push_folder_wrong_token_raises(hub, folder, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'hf_wrong')
    with pytest.raises(HubError, match='HF_TOKEN'):
        push_folder(folder, ID)
    assert hub.repositories == {}


def test_push_folder_no_server_raises(folder, hub, monkeypatch):
    monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
    with pytest.raises(HubError, match='cannot publish zoo/model'):
        push_folder(folder, ID)


def test_push_folder_foreign_commit_meanwhile_raises(hub, folder):
    """A commit of somebody else between the look at the repository and the own commit is not buried."""

    def intrude():
        repository = hub.repositories[ID]
        repository.commit(dict(repository.commits[-1][1]) | {'config.json': hub.put(b'{}')})

    hub.fail('POST', '/commit/', before=intrude)
    with pytest.raises(HubError, match='holds other files'):
        push_folder(folder, ID)
    assert content_of(hub, ID) == {'config.json': b'{}'}


def test_push_folder_other_card_needs_replace(hub, folder):
    revision, _ = push_folder(folder, ID)
    (folder / 'README.md').write_text('---\nlicense: mit\n---\nOther figures.\n')
    with pytest.raises(HubError, match=r'README\.md\), so nothing is uploaded; .*--replace'):
        push_folder(folder, ID)
    again, uploaded = push_folder(folder, ID, replace=True)
    assert uploaded
    assert again != revision
    assert content_of(hub, ID) == files_of(folder)


def test_push_folder_retry_after_waits_as_told(hub, folder, monkeypatch):
    waits = []
    monkeypatch.setattr('repvgg_zoo.pretrained.network.time', SimpleNamespace(sleep=waits.append))
    hub.fail('POST', '/commit/', status=429, headers={'Retry-After': '17'})
    hub.fail('POST', '/commit/', status=503, headers={'Retry-After': '86400'})
    push_folder(folder, ID)
    assert waits == [17, 300]


def test_push_folder_offline_does_not_retry(hub, folder, monkeypatch, caplog):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    close_session()  # huggingface-hub decides when it makes its HTTP session whether it is offline
    try:
        with pytest.raises(HubError, match=r'offline mode'):
            push_folder(folder, ID)
    finally:
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
        close_session()
    assert 'next try' not in caplog.text
