"""`pretrained=True` by every way that timm has, and what happens where no weights can be had."""

import copy
import json
import shutil
import weakref

import huggingface_hub.constants
import pytest
import timm
import torch
from helpers import create_model, images, randomise, rel_diff, run_branches
from safetensors.torch import load_file, save_file

from repvgg_zoo import CheckpointError, RepVGG, load_checkpoint
from repvgg_zoo.blocks.base import ReparamBlock
from repvgg_zoo.checkpoints.files import read_checkpoint
from repvgg_zoo.pretrained import load
from repvgg_zoo.pretrained.load import adapt_inputs_and_classifier, assign, convert_form, load_pretrained, read
from repvgg_zoo.pretrained.manifest import read_manifest


@pytest.fixture(scope='module')
def model():
    return timm.create_model('test_repvgg', pretrained=True).eval()


@pytest.fixture
def x():
    return images(2, px=32)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty Hub cache, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    return tmp_path / 'hub'


def put_into_cache(cache, repo_id, files):
    repo = cache / f'models--{repo_id.replace("/", "--")}'
    snapshot = repo / 'snapshots' / ('0' * 40)
    snapshot.mkdir(parents=True)
    (repo / 'refs').mkdir()
    (repo / 'refs' / 'main').write_text('0' * 40)
    for file in files:
        shutil.copy(file, snapshot)


# -------------------------------------------------------------------------------------- bundled weights


def test_pretrained_bundled_tags_have_their_form(model, x):
    assert model.variant.name == 'test_repvgg'
    assert not model.deploy
    deployed = timm.create_model('test_repvgg.cifar10_deploy', pretrained=True).eval()
    assert deployed.deploy
    assert rel_diff(deployed(x), model(x)) < 1e-5
    folded = timm.create_model('test_repvgg', pretrained=True, deploy=True).eval()
    assert all(torch.equal(folded.state_dict()[key], value) for key, value in deployed.state_dict().items())


def test_load_training_weights_into_deploy_model_releases_branches_block_by_block(monkeypatch):
    """So that loading needs the memory of the file, and of one block more."""
    alive, folded, addresses = weakref.WeakValueDictionary(), [], set()
    fold = ReparamBlock.fold_state_dict

    def spy_read(path, **kwargs):
        state_dict = read_checkpoint(path, **kwargs)
        alive.update(state_dict)
        addresses.update(value.data_ptr() for value in state_dict.values())
        return state_dict

    def spy_fold(block, state_dict, prefix):
        if any(key.startswith(f'{prefix}conv_kxk') for key in state_dict):
            fold(block, state_dict, prefix)
            folded.append(prefix)
            assert not [key for key in alive if key.startswith(tuple(folded))]
            assert 'head.fc.weight' in alive

    monkeypatch.setattr('repvgg_zoo.pretrained.load.read_checkpoint', spy_read)
    monkeypatch.setattr(ReparamBlock, 'fold_state_dict', spy_fold)
    model = timm.create_model('test_repvgg', pretrained=True, deploy=True)
    assert len(folded) == 1 + sum(model.variant.depths)
    assert model.head.fc.weight.data_ptr() in addresses  # taken over, not copied


@pytest.mark.parametrize('name', ['test_repvgg.cifar10', 'test_repvgg.cifar10_deploy'])
def test_pretrained_tensors_are_the_models_own(name, tmp_path):
    model = timm.create_model(name, pretrained=True, num_classes=7)
    tensors = [*model.parameters(), *model.buffers()]
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
    assert all(t.device.type == 'cpu' and t.is_contiguous() for t in tensors)
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)
    save_file(model.state_dict(), tmp_path / 'whole.safetensors')


def test_pretrained_buffers_that_no_file_holds_are_made(model, x):
    class Norm(torch.nn.BatchNorm2d):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.register_buffer('one', torch.ones((), device=kwargs.get('device')), persistent=False)

        def forward(self, x):
            return super().forward(x) * self.one

    other = timm.create_model('test_repvgg', pretrained=True, norm_layer=Norm).eval()
    assert torch.equal(other(x), run_branches(lambda: model(x)))


def test_pretrained_dtype_is_kept():
    assert timm.create_model('test_repvgg', pretrained=True, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_pretrained_channels_last_file_loads_contiguous(model, x, tmp_path):
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    torch.save(last.state_dict(), tmp_path / 'x.pth')
    loaded = timm.create_model(
        'test_repvgg', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'x.pth'))
    )
    for key, value in model.state_dict().items():
        assert loaded.state_dict()[key].stride() == value.stride()
    assert torch.equal(loaded.eval()(x), model(x))


def test_pretrained_shared_storage_is_taken_apart(model, tmp_path):
    flat = torch.cat([value.flatten().float() for value in model.state_dict().values()])
    values = flat.split([value.numel() for value in model.state_dict().values()])
    shared = {k: v.view(like.shape) for v, (k, like) in zip(values, model.state_dict().items(), strict=True)}
    torch.save(shared, tmp_path / 'x.pth')
    overlay = dict(file=str(tmp_path / 'x.pth'))
    loaded = timm.create_model('test_repvgg', pretrained=True, pretrained_cfg_overlay=overlay)
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in loaded.state_dict().values())
    assert all(torch.equal(t, model.state_dict()[key]) for key, t in loaded.state_dict().items())


def test_pretrained_deploy_tag_into_training_model_raises():
    with pytest.raises(CheckpointError, match='deploy=True'):
        timm.create_model('test_repvgg.cifar10_deploy', pretrained=True, deploy=False)


@pytest.mark.parametrize('deploy', [False, True])
@pytest.mark.parametrize('in_chans', [1, 3, 4, 6])
def test_pretrained_other_in_chans_adapts_as_timm(model, in_chans, deploy):
    state_dict = dict(model.state_dict())
    for key in ('stem.conv_kxk.conv.weight', 'stem.conv_1x1.conv.weight'):
        state_dict[key] = timm.models.adapt_input_conv(in_chans, state_dict[key])
    expected = timm.create_model('test_repvgg', in_chans=in_chans).eval()
    expected.load_state_dict(state_dict)
    adapted = timm.create_model('test_repvgg', pretrained=True, in_chans=in_chans, deploy=deploy).eval()
    x = images(2, px=32, in_chans=in_chans)
    assert rel_diff(adapted(x), expected(x)) < 1e-5


@pytest.mark.parametrize('deploy', [False, True])
@pytest.mark.parametrize('num_classes', [0, 7])
def test_pretrained_other_classes_keep_the_features(model, x, num_classes, deploy):
    other = timm.create_model('test_repvgg', pretrained=True, num_classes=num_classes, deploy=deploy).eval()
    assert rel_diff(other.forward_features(x), model.forward_features(x)) < 1e-5
    assert other(x).shape == (2, num_classes or 96)


@pytest.mark.parametrize('deploy', [False, True])
@pytest.mark.parametrize('feature_cls', [None, 'getter'])
def test_pretrained_features_only_equals_intermediates(model, x, deploy, feature_cls):
    features = timm.create_model(
        'test_repvgg', pretrained=True, features_only=True, out_indices=(1, 4), deploy=deploy, feature_cls=feature_cls
    ).eval()
    expected = model.forward_intermediates(x, indices=(1, 4), intermediates_only=True)
    for a, b in zip(features(x), expected, strict=True):
        assert rel_diff(a, b) < 1e-5
    assert features.feature_info.channels() == [32, 96]


def test_pretrained_flipped_byte_raises(tmp_path, monkeypatch):
    record = read_manifest()['test_repvgg.cifar10']
    content = bytearray(record.path.read_bytes())
    content[-1] ^= 1
    (tmp_path / record.file).write_bytes(content)
    monkeypatch.setattr('repvgg_zoo.pretrained.manifest.weights_dir', lambda: tmp_path)
    cfg = timm.get_pretrained_cfg('test_repvgg.cifar10')
    cfg.file = str(record.path)
    with pytest.raises(CheckpointError, match=r'is not the file that was published as test_repvgg\.cifar10.*sha256'):
        load_pretrained(timm.create_model('test_repvgg'), cfg)


# ------------------------------------------------------------------------------------------- the pipeline


def test_load_identifies_once(monkeypatch):
    calls = []
    for name in ('to_timm_layout', 'form_of', 'blocks_with_keys', 'read_checkpoint'):
        real = getattr(load, name)
        monkeypatch.setattr(load, name, lambda *a, name=name, real=real, **k: calls.append(name) or real(*a, **k))
    for kwargs in (dict(), dict(deploy=True), dict(unfold=True, block='acb'), dict(in_chans=1, num_classes=3)):
        calls.clear()
        timm.create_model('test_repvgg', pretrained=True, **kwargs)
        assert sorted(calls) == ['blocks_with_keys', 'form_of', 'read_checkpoint', 'to_timm_layout']


def test_build_once_if_files_hold_every_tensor(monkeypatch):
    built, loaded = [], []
    init, load_state_dict = RepVGG.__init__, RepVGG.load_state_dict
    monkeypatch.setattr(RepVGG, '__init__', lambda *a, **k: built.append(k.get('device')) or init(*a, **k))
    monkeypatch.setattr(RepVGG, 'load_state_dict', lambda *a, **k: loaded.append(k) or load_state_dict(*a, **k))
    timm.create_model('test_repvgg', pretrained=True)
    assert (built, loaded) == (['meta'], [{'assign': True}])


@pytest.mark.parametrize('block', ['acb', 'plain', 'repvgg'])
def test_read_tells_form_and_block_types(block, tmp_path):
    model = timm.create_model('test_repvgg', block=block)
    for form in ('training', 'deploy'):
        save_file(model.state_dict(), tmp_path / 'file.safetensors')
        checkpoint = read(tmp_path / 'file.safetensors')
        assert checkpoint.form == form
        held = {'plain': ('plain', 'plain_delta')}.get(block, (block,))
        assert checkpoint.blocks == (held if form == 'training' else ())
        model.eval().switch_to_deploy()


def test_read_of_another_architecture_names_the_file(tmp_path):
    save_file({'fc.weight': torch.zeros(1)}, tmp_path / 'file.safetensors')
    with pytest.raises(CheckpointError, match=r'file\.safetensors.*: no RepVGG checkpoint'):
        read(tmp_path / 'file.safetensors')


def test_deploy_model_of_another_variant_names_that_of_the_file(tmp_path):
    save_file(timm.create_model('test_repvgg').state_dict(), tmp_path / 'file.safetensors')
    for device in ('meta', 'cpu'):
        model = timm.create_model('repvgg_a0', deploy=True, device=device)
        with pytest.raises(CheckpointError, match='it looks like a checkpoint of test_repvgg'):
            assign(model, convert_form(read(tmp_path / 'file.safetensors'), model))


@pytest.mark.parametrize('block', ['repvgg', 'acb', 'mobileone', 'qarepvgg', 'csla'])
def test_adapt_inputs_of_training_weights_changes_every_kernel_that_reads_images(block, x, tmp_path):
    source = randomise(timm.create_model('test_repvgg', block=block), px=32)
    save_file(source.state_dict(), tmp_path / 'file.safetensors')
    model = timm.create_model('test_repvgg', block=block, in_chans=1, num_classes=10)
    checkpoint = convert_form(read(tmp_path / 'file.safetensors'), model)
    adapt_inputs_and_classifier(checkpoint, model, timm.get_pretrained_cfg('test_repvgg.cifar10'))
    assign(model, checkpoint)
    grey = x[:, :1]
    assert rel_diff(model.eval()(grey), source(grey.expand(-1, 3, -1, -1))) < 1e-5


# ---------------------------------------------------------------------------------------- other sources


def test_pretrained_classifier_that_fits_is_loaded(tmp_path, caplog):
    """Though the registry speaks of another number of classes than the file and the model have."""
    source = timm.create_model('repvgg_a0', num_classes=10)
    save_file(source.state_dict(), tmp_path / 'mine.safetensors')
    overlay = dict(file=str(tmp_path / 'mine.safetensors'))
    loaded = timm.create_model('repvgg_a0', pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10)
    assert torch.equal(loaded.head.fc.weight, source.head.fc.weight)
    with caplog.at_level('INFO', logger='repvgg_zoo'):
        timm.create_model('repvgg_a0', pretrained=True, pretrained_cfg_overlay=overlay, num_classes=9)
    assert 'no classifier of 9 classes; it is fresh' in caplog.text


def test_pretrained_file_overlay_and_checkpoint_path_load(tmp_path):
    source = randomise(timm.create_model('test_repvgg'), px=32)
    save_file(source.state_dict(), tmp_path / 'mine.safetensors')
    x = images(px=32)
    overlay = dict(file=str(tmp_path / 'mine.safetensors'))
    for deploy in (False, True):
        for loaded in (
            timm.create_model('test_repvgg', pretrained=True, pretrained_cfg_overlay=overlay, deploy=deploy),
            timm.create_model('test_repvgg', checkpoint_path=tmp_path / 'mine.safetensors', deploy=deploy),
        ):
            assert rel_diff(loaded.eval()(x), source(x)) < 1e-5


def test_pretrained_state_dict_overlay_is_copied(x):
    source = randomise(timm.create_model('test_repvgg'), px=32)
    overlay = dict(state_dict=source.state_dict(), file=None)
    loaded = timm.create_model('test_repvgg', pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(loaded.eval()(x), source(x))
    with torch.no_grad():
        loaded.head.fc.bias += 1
    assert not torch.equal(loaded(x), source(x))


@pytest.mark.parametrize('name', ['mine.safetensors', 'renamed.safetensors'])
def test_pretrained_url_is_downloaded(tmp_path, name, x):
    source = randomise(timm.create_model('test_repvgg'), px=32)
    save_file(source.state_dict(), tmp_path / 'mine.safetensors')
    url = (tmp_path / 'mine.safetensors').as_uri()
    overlay = dict(url=url if name in url else (url, name), file=None)  # timm takes a pair of URL and file name too
    loaded = timm.create_model(
        'test_repvgg', pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path / 'cache'
    )
    assert torch.equal(loaded.eval()(x), source(x))
    assert (tmp_path / 'cache' / name).exists()


@pytest.mark.parametrize('deploy', [False, True])
def test_pretrained_folder_that_timm_saved_loads(tmp_path, deploy, x):
    source = randomise(timm.create_model('test_repvgg', num_classes=7), px=32)
    expected = source(x)
    if deploy:
        source.switch_to_deploy()
    timm.models.save_for_hf(source, tmp_path / 'saved', model_args=source._model_args, safe_serialization=True)
    config = json.loads((tmp_path / 'saved' / 'config.json').read_text())
    assert config.get('model_args', {}).get('deploy') == (True if deploy else None)
    assert config['pretrained_cfg']['first_conv'] == (
        'stem.reparam_conv' if deploy else ['stem.conv_kxk.conv', 'stem.conv_1x1.conv']
    )
    loaded = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True).eval()
    assert loaded.deploy == deploy
    assert loaded.num_classes == 7
    assert rel_diff(loaded(x), expected) < 1e-5
    fewer = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True, num_classes=2, in_chans=1).eval()
    assert fewer(x[:, :1]).shape == (2, 2)


def test_pretrained_folder_without_weights_raises(tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps({'architecture': 'test_repvgg', 'pretrained_cfg': {}}))
    with pytest.raises(CheckpointError, match=r'no weights in .*neither model\.safetensors nor'):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True)


# ------------------------------------------------------------------------------------- onto another device


def assert_all_on(device, model):
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {device.type}


@pytest.mark.device
@pytest.mark.parametrize('deploy', [False, True], ids=['training', 'deploy'])
@pytest.mark.parametrize('saved_on', ['cpu', 'device'])
@pytest.mark.parametrize('suffix', ['.safetensors', '.pth'])
def test_create_on_a_device_from_a_file_computes_the_same_there(suffix, saved_on, deploy, tmp_path, device):
    """A torch file tells where its tensors were, and the model decides where they go."""
    source = randomise(timm.create_model('test_repvgg', num_classes=10), px=32)
    expected = source(images(2, px=32))
    save = {'.safetensors': save_file, '.pth': torch.save}[suffix]
    save(source.to('cpu' if saved_on == 'cpu' else device).state_dict(), tmp_path / f'mine{suffix}')
    path = tmp_path / f'mine{suffix}'
    loaded = timm.create_model('test_repvgg', checkpoint_path=path, num_classes=10, deploy=deploy, device=device)
    assert_all_on(device, loaded)
    assert rel_diff(loaded.eval()(images(2, px=32)), expected) < 1e-5  # float32, some ten layers
    moved = load_checkpoint(create_model('test_repvgg', num_classes=10, deploy=deploy), path)
    assert_all_on(device, moved)
    assert rel_diff(moved.eval()(images(2, px=32)), expected) < 1e-5


@pytest.mark.device
@pytest.mark.parametrize(
    'kwargs',
    [
        dict(),
        dict(deploy=True),
        dict(deploy=True, in_chans=1, num_classes=7),
        dict(unfold=True, block='acb', in_chans=1),
        dict(features_only=True),
        dict(dtype=torch.bfloat16),
    ],
    ids=str,
)
def test_pretrained_on_a_device_equals_that_of_the_cpu(kwargs, device):
    torch.manual_seed(0)
    expected = timm.create_model('test_repvgg', pretrained=True, **kwargs).eval()
    torch.manual_seed(0)
    loaded = timm.create_model('test_repvgg', pretrained=True, **kwargs, device=device).eval()
    assert_all_on(device, loaded)
    theirs = expected.state_dict()
    for key, value in loaded.state_dict().items():
        # the generator of the device draws a new classifier, and branches to unfold; folded weights are rounded once
        assert value.shape == theirs[key].shape
        is_drawn = 'unfold' in kwargs or (key.startswith('head') and 'num_classes' in kwargs)
        if not is_drawn:
            torch.testing.assert_close(value.cpu(), theirs[key])
    x = images(2, px=32, in_chans=kwargs.get('in_chans', 3), dtype=kwargs.get('dtype', torch.float32))
    y = loaded(x)
    assert isinstance(y, (torch.Tensor, list))
    if 'unfold' in kwargs:  # whatever the branches, their sum is the kernel that was loaded
        assert rel_diff(y.cpu(), expected(x.cpu())) < 1e-5  # float32, summed in another order


# ----------------------------------------------------------------------------------------------- the Hub


def test_pretrained_hub_cache_serves_tags_and_names(hub_cache, tmp_path):
    source = randomise(timm.create_model('repvgg_a0'))
    timm.models.save_for_hf(source, tmp_path / 'saved', safe_serialization=True)
    put_into_cache(hub_cache, 'timm/repvgg_a0.rvgg_in1k', (tmp_path / 'saved').iterdir())
    x = images()
    expected = source(x)
    for name, deploy in (
        ('repvgg_a0', False),
        ('repvgg_a0.rvgg_in1k', False),
        ('repvgg_a0.rvgg_in1k_deploy', True),
        ('hf-hub:timm/repvgg_a0.rvgg_in1k', False),
    ):
        loaded = timm.create_model(name, pretrained=True).eval()
        assert loaded.deploy == deploy
        assert rel_diff(loaded(x), expected) < 1e-4
    folded = timm.create_model('hf-hub:timm/repvgg_a0.rvgg_in1k', pretrained=True, deploy=True).eval()
    assert folded.deploy
    assert rel_diff(folded(x), expected) < 1e-4


def test_pretrained_cache_dir_is_used(hub_cache, tmp_path):
    source = timm.create_model('repvgg_a0')
    save_file(source.state_dict(), tmp_path / 'model.safetensors')
    put_into_cache(tmp_path / 'mine', 'timm/repvgg_a0.rvgg_in1k', [tmp_path / 'model.safetensors'])
    loaded = timm.create_model('repvgg_a0', pretrained=True, cache_dir=tmp_path / 'mine')
    assert torch.equal(
        loaded.state_dict()['head.fc.weight'], load_file(tmp_path / 'model.safetensors')['head.fc.weight']
    )


@pytest.mark.parametrize('name', ['repvgg_a0.rvgg_in1k', 'repvgg_a0.rvgg_in1k_deploy'])
def test_pretrained_offline_without_cache_raises(name, hub_cache):
    with pytest.raises(
        CheckpointError, match=r'cannot get model\.safetensors of timm/repvgg_a0\.rvgg_in1k from the Hub'
    ):
        timm.create_model(name, pretrained=True)


@pytest.mark.parametrize('name', ['repvgg_b2g2', 'repvggplus_l2pse.rvgg_in1k_deploy'])
def test_pretrained_unpublished_weights_raise(name):
    with pytest.raises(CheckpointError, match=r'nobody has published weights of .*; get RepVGG.*\.pth from'):
        timm.create_model(name, pretrained=True)


def test_pretrained_other_variant_raises(tmp_path):
    save_file(timm.create_model('test_repvgg', num_classes=1000).state_dict(), tmp_path / 'model.safetensors')
    overlay = dict(file=str(tmp_path / 'model.safetensors'))
    for kwargs in (dict(), dict(num_classes=5)):  # timm itself is lenient once the classes differ
        with pytest.raises(
            CheckpointError, match=r'does not fit repvgg_a0 \(it looks like a checkpoint of test_repvgg\)'
        ):
            timm.create_model('repvgg_a0', pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
