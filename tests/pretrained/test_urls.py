"""Weights from an address, over HTTP on loopback, through torch.hub's function."""

import hashlib
import socket
from pathlib import Path

import pytest
import torch

from repvgg_zoo import CheckpointError
from repvgg_zoo.pretrained.urls import download_url, sha256_prefix

CONTENT = bytes(range(256)) * 1024
PREFIX = hashlib.sha256(CONTENT).hexdigest()[:8]
URL = f'https://example.org/weights/model-{PREFIX}.pth'


@pytest.fixture
def server(web):
    web.files[URL.removeprefix('https://')] = web.put(CONTENT)
    return web


@pytest.fixture
def no_sleep(monkeypatch):
    """Waiting is an error."""
    monkeypatch.setattr('time.sleep', lambda seconds: pytest.fail(f'it waited {seconds} s'))


def cached() -> list[Path]:
    return sorted((Path(torch.hub.get_dir()) / 'checkpoints').glob('*'))


def test_download_url_twice_uses_torchs_cache(server):
    path = download_url(URL)
    assert path.read_bytes() == CONTENT
    assert download_url(URL) == path
    assert cached() == [path]
    assert server.requests == [('GET', f'/web/example.org/weights/model-{PREFIX}.pth')]


def test_download_url_shows_progress(server, capfd):
    download_url(URL)
    assert '100%' in capfd.readouterr().err


def test_download_url_pair_and_cache_dir_name_the_file(server, tmp_path):
    assert download_url((URL, 'mine.pth'), cache_dir=tmp_path / 'mine') == tmp_path / 'mine' / 'mine.pth'
    assert cached() == []


def test_download_url_wrong_hash_raises_and_keeps_nothing(web):
    url = URL.replace(PREFIX, '0badc0de')
    web.files[url.removeprefix('https://')] = web.put(CONTENT)
    with pytest.raises(
        CheckpointError, match=rf'model-0badc0de\.pth gave other content .*0badc0de.*{PREFIX}.*save it as'
    ):
        download_url(url)
    assert cached() == []
    assert web.count('GET', 'model') == 2  # the first could have been cut


def test_download_url_cut_connection_is_tried_again(server):
    server.fail('GET', 'model', after_bytes=4096)
    server.fail('GET', 'model', after_bytes=8192)
    assert download_url(URL).read_bytes() == CONTENT
    assert server.count('GET', 'model') == 3


def test_download_url_always_cut_raises_and_keeps_nothing(server):
    server.fail('GET', 'model', after_bytes=4096, times=99)
    with pytest.raises(CheckpointError, match=rf'model-{PREFIX}\.pth gave other content .*the connection is cut'):
        download_url(URL)
    assert cached() == []


@pytest.mark.parametrize('status', [429, 503])
def test_download_url_busy_server_is_tried_again(server, status):
    server.fail('GET', 'model', status=status)
    assert download_url(URL).read_bytes() == CONTENT


def test_download_url_missing_file_raises_at_once(web, no_sleep):
    with pytest.raises(CheckpointError, match=rf'cannot download {URL}.*404.*get the file elsewhere and save it as'):
        download_url(URL)
    assert cached() == []
    assert web.count('GET', 'model') == 1


def test_download_url_without_network_raises_at_once(no_sleep, tmp_path):
    with socket.create_server(('127.0.0.1', 0)) as closed:
        url = f'http://127.0.0.1:{closed.getsockname()[1]}/model.pth'
    with pytest.raises(CheckpointError, match=r'cannot download .* not in the cache: .*refused'):
        download_url(url, cache_dir=tmp_path)


def test_download_url_malformed_raises(no_sleep):
    with pytest.raises(CheckpointError, match='cannot download nonsense'):
        download_url('nonsense')


def test_download_url_changed_cached_file_raises_and_names_it(server):
    path = download_url(URL)
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(CheckpointError, match=rf"{path}' is not the file that .* not {PREFIX}; delete it"):
        download_url(URL)
    path.unlink()
    assert download_url(URL).read_bytes() == CONTENT


def test_download_url_broken_link_in_cache_is_replaced(server, tmp_path):
    cache = Path(torch.hub.get_dir()) / 'checkpoints'
    cache.mkdir(parents=True)
    (cache / f'model-{PREFIX}.pth').symlink_to(tmp_path / 'nowhere')
    assert download_url(URL).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ('name', 'prefix'),
    [
        ('repvgg-A0_8xb32_in1k_20221213-60ae8e23.pth', '60ae8e23'),
        ('cifar10_repvgg_a2-09488915.pt', '09488915'),
        ('model-20221213.pth', None),  # a date
        ('model-bad.pth', None),  # a word
        ('model.pth', None),
    ],
)
def test_sha256_prefix_by_name(name, prefix):
    assert sha256_prefix(name) == prefix
