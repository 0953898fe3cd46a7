"""Weights from a Hub, over HTTP on loopback, through the real client."""

import socket

import pytest
import timm
import torch
from helpers import images
from huggingface_hub import constants

from repvgg_zoo import CheckpointError, load_checkpoint
from repvgg_zoo.pretrained.hub import download_weights
from repvgg_zoo.tools.convert import open_model
from repvgg_zoo.tools.publish.upload import HubError, push_folder

ID = 'zoo/model'


def test_download_weights_twice_uses_cache(hub, folder):
    push_folder(folder, ID)
    path = download_weights(ID)
    assert path.read_bytes() == (folder / 'model.safetensors').read_bytes()
    assert str(path).startswith(constants.HF_HUB_CACHE)
    hub.fail('GET', 'resolve', status=500, times=9)
    assert download_weights(ID) == path


def test_download_weights_cache_dir_is_used(hub, folder, tmp_path):
    push_folder(folder, ID)
    assert tmp_path / 'mine' in download_weights(ID, cache_dir=tmp_path / 'mine').parents


def test_download_weights_revision_gives_that_file(hub, folder):
    first = push_folder(folder, ID).revision
    old = (folder / 'model.safetensors').read_bytes()
    (folder / 'model.safetensors').write_bytes(old[:-4] + b'\0\0\0\0')
    push_folder(folder, ID, replace=True)
    assert download_weights(f'{ID}@{first}').read_bytes() == old
    assert download_weights(ID).read_bytes() != old
    with pytest.raises(CheckpointError, match="has no revision 'nope'"):
        download_weights(f'{ID}@nope')


def test_download_weights_cut_connection_resumes(hub, folder):
    push_folder(folder, ID)
    hub.fail('GET', 'resolve', after_bytes=1 << 20)
    assert download_weights(ID).read_bytes() == (folder / 'model.safetensors').read_bytes()
    assert hub.count('GET', 'resolve') == 2


@pytest.mark.parametrize('method', ['HEAD', 'GET'])
@pytest.mark.parametrize('status', [429, 503])
def test_download_weights_busy_hub_retries(hub, folder, method, status):
    push_folder(folder, ID)
    hub.fail(method, 'resolve', status=status)
    assert download_weights(ID).read_bytes() == (folder / 'model.safetensors').read_bytes()


def test_download_weights_missing_raises(hub, folder):
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
def test_download_weights_refused_raises(hub, folder, method, status, message, monkeypatch):
    push_folder(folder, ID)
    hub.fail(method, 'resolve', status=status, times=99)
    monkeypatch.setattr('time.sleep', lambda seconds: None)
    with pytest.raises(CheckpointError, match=message):
        download_weights(ID)


def test_download_weights_always_cut_raises(hub, folder, monkeypatch):
    push_folder(folder, ID)
    hub.fail('GET', 'resolve', after_bytes=1, times=99)
    monkeypatch.setattr('time.sleep', lambda seconds: None)
    with pytest.raises(CheckpointError, match=r'cannot get model\.safetensors of zoo/model'):
        download_weights(ID)


@pytest.mark.parametrize('suffix', ['', '@'])
def test_download_weights_flipped_byte_raises(hub, folder, suffix):
    revision = push_folder(folder, ID).revision
    name = f'hf-hub:{ID}{suffix}{revision if suffix else ""}'
    timm.create_model(name, pretrained=True)
    path = download_weights(ID)
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.resolve().write_bytes(content)
    with pytest.raises(CheckpointError, match=r'model\.safetensors.* is not the file that the Hub has'):
        timm.create_model(name, pretrained=True)


def test_download_weights_offline_needs_cache(hub, folder, monkeypatch):
    push_folder(folder, ID)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(CheckpointError, match='not in the cache'):
        download_weights(ID)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    path = download_weights(ID)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert download_weights(ID) == path


@pytest.fixture
def no_network(hub, monkeypatch):
    """A function that ends the network; waiting is then an error."""

    def end():
        with socket.create_server(('127.0.0.1', 0)) as closed:
            nowhere = f'http://127.0.0.1:{closed.getsockname()[1]}'
        url = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(hub.url, nowhere)
        monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', url)
        monkeypatch.setattr(constants, 'ENDPOINT', nowhere)
        monkeypatch.setattr('time.sleep', lambda seconds: pytest.fail(f'it waited {seconds} s'))

    return end


def test_download_weights_without_network_needs_cache_and_does_not_wait(hub, folder, no_network):
    push_folder(folder, ID)
    path = download_weights(ID)
    no_network()
    assert download_weights(ID) == path
    with pytest.raises(
        CheckpointError, match=r'cannot get model\.safetensors of zoo/other .*not in the cache: .*refused'
    ):
        download_weights('zoo/other')


def test_open_model_without_network_does_not_wait(hub, no_network):
    no_network()
    with pytest.raises(CheckpointError, match=r'cannot get config\.json of zoo/other .*refused'):
        open_model('hf-hub:zoo/other')


def test_push_folder_without_network_does_not_wait(folder, no_network):
    no_network()
    with pytest.raises(HubError, match=r'cannot publish zoo/model: .*refused'):
        push_folder(folder, ID)


def test_create_model_hub_name_loads_weights(hub, folder):
    revision = push_folder(folder, ID).revision
    x = images(px=32)
    expected = load_checkpoint(timm.create_model('test_repvgg'), folder / 'model.safetensors').eval()(x)
    for name in (f'hf-hub:{ID}', f'hf-hub:{ID}@{revision}'):
        assert torch.equal(timm.create_model(name, pretrained=True).eval()(x), expected)
