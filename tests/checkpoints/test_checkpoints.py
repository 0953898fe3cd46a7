"""Files, layouts, forms and misfits."""

import argparse
import copy
import os
import pickle

import pytest
import safetensors
import timm
import torch
from helpers import LAYOUTS, OFFICIAL, images, randomise, rel_diff, rename
from safetensors.torch import load_file, save_file

import repvgg_zoo
from repvgg_zoo import CheckpointError, FoldError, load_checkpoint
from repvgg_zoo.checkpoints import files, layouts
from repvgg_zoo.checkpoints.files import read_checkpoint
from repvgg_zoo.checkpoints.layouts import to_timm_layout
from repvgg_zoo.checkpoints.state_dicts import check_fit, form_of, identify_variant


@pytest.fixture(scope='module')
def model():
    return randomise(timm.create_model('test_repvgg'), px=32)


@pytest.fixture
def state_dict(model):
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def fresh(**kwargs):
    return timm.create_model('test_repvgg', **kwargs).eval()


def fold(state_dict, name='test_repvgg'):
    folded = dict(state_dict)
    timm.create_model(name, device='meta').fold_state_dict(folded)
    return folded


# --------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize(
    'table', [table for table in LAYOUTS.values() if table], ids=[n for n in LAYOUTS if LAYOUTS[n]]
)
@pytest.mark.parametrize('name', ['test_repvgg', 'repvgg_d2se'])
@pytest.mark.parametrize('deploy', [False, True])
def test_to_timm_layout_foreign_keys_translates(table, name, deploy):
    expected = timm.create_model(name, device='meta', deploy=deploy).state_dict()
    foreign = rename(expected, table)
    assert foreign.keys().isdisjoint(key for key in expected if not key.startswith('head.'))
    translated = to_timm_layout(foreign)
    assert translated.keys() == expected.keys()
    assert all(translated[key] is value for key, value in expected.items())


@pytest.mark.parametrize('table', LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.', 'module._orig_mod.', '_orig_mod.module.'])
def test_load_wrapper_prefixes_are_stripped(state_dict, model, table, prefix):
    foreign = {prefix + key: value for key, value in rename(state_dict, table).items()}
    loaded = fresh()
    loaded.load_state_dict(foreign)
    assert torch.equal(loaded(images(px=32)), model(images(px=32)))


def test_load_wrapper_prefix_inside_key_raises(state_dict):
    with pytest.raises(RuntimeError, match=r'stem\.module\.conv_kxk'):
        fresh().load_state_dict({key.replace('stem.', 'stem.module.'): v for key, v in state_dict.items()})


def test_load_without_batch_counters_fills_them_in(state_dict, model):
    old = {key: value for key, value in state_dict.items() if not key.endswith('num_batches_tracked')}
    loaded = fresh()
    loaded.load_state_dict(old)
    assert loaded.state_dict().keys() == state_dict.keys()


def test_to_timm_layout_unknown_key_raises(state_dict):
    foreign = rename(state_dict, OFFICIAL) | {'stage1.0.rbr_third.weight': torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r'official RepVGG with unknown keys: stage1\.0\.rbr_third\.weight'):
        to_timm_layout(foreign)


def test_to_timm_layout_other_architecture_raises():
    with pytest.raises(CheckpointError, match='none of the known layouts'):
        to_timm_layout(timm.create_model('resnet18', device='meta').state_dict())


def test_load_part_of_state_dict_reports_missing_keys(state_dict):
    classifier = {key: value for key, value in state_dict.items() if key.startswith('head.')}
    result = fresh().load_state_dict(classifier, strict=False)
    assert not result.unexpected_keys
    needed = {key for key in state_dict if not key.endswith('num_batches_tracked')}
    assert set(result.missing_keys) == needed - classifier.keys()
    with pytest.raises(RuntimeError, match='Missing key'):
        fresh().load_state_dict({})


# ----------------------------------------------------------------------------------------------- forms


def test_fold_shared_kernels_gives_each_block_its_own(state_dict, model):
    """As tied weights in a torch file are."""
    first, second = 'stages.1.1.conv_kxk.conv.weight', 'stages.1.2.conv_kxk.conv.weight'
    state_dict[second] = state_dict[first]
    model = copy.deepcopy(model)
    model.load_state_dict(state_dict)
    folded, expected = fold(state_dict), model.switch_to_deploy().state_dict()
    assert all(torch.equal(folded[key], value) for key, value in expected.items())
    kernels = [value.data_ptr() for key, value in folded.items() if key.endswith('reparam_conv.weight')]
    assert len(set(kernels)) == len(kernels)


def test_form_of_tells_forms_and_refuses_a_mixture(state_dict):
    assert form_of(state_dict) == 'training'
    folded = fold(state_dict)
    assert form_of(folded) == 'deploy'
    mixed = {k: v for k, v in state_dict.items() if not k.startswith('stem.')} | {
        k: v for k, v in folded.items() if k.startswith('stem.')
    }
    with pytest.raises(CheckpointError, match='blocks of both forms'):
        form_of(mixed)


def test_load_training_weights_into_deploy_model_folds(state_dict, model):
    deployed = fresh(deploy=True)
    deployed.load_state_dict(state_dict)
    assert rel_diff(deployed(images(px=32)), model(images(px=32))) < 1e-5


@pytest.mark.parametrize('name', ['test_repvgg', 'repvgg_d2se', 'repvgg_b1g2', 'repvggplus_l2pse'])
def test_fold_state_dict_equals_switch(name):
    if name == 'test_repvgg':
        model = randomise(timm.create_model(name), px=32)
        folded = fold(model.state_dict(), name)
        switched = model.switch_to_deploy().state_dict()
        assert all(torch.equal(folded[key], value) for key, value in switched.items())
    else:
        model = timm.create_model(name)
        folded = fold(model.state_dict(), name)
        assert folded.keys() == timm.create_model(name, device='meta', deploy=True).state_dict().keys()


def test_fold_negative_variance_raises(state_dict):
    state_dict['stages.0.1.identity.running_var'][3] = -1
    with pytest.raises(FoldError, match=r"block 'stages\.0\.1': .*running variance -1\.0 in channel 3"):
        fold(state_dict)


def test_fold_incomplete_block_raises(state_dict):
    del state_dict['stem.conv_1x1.bn.running_mean']
    with pytest.raises(CheckpointError, match=r"(?s)block 'stem': .*conv_1x1\.bn\.running_mean"):
        fold(state_dict)


def test_load_deploy_weights_into_training_model_raises(state_dict, tmp_path):
    save_file(fold(state_dict), tmp_path / 'deploy.safetensors')
    for load in (
        lambda: load_checkpoint(fresh(), tmp_path / 'deploy.safetensors'),
        lambda: fresh(checkpoint_path=tmp_path / 'deploy.safetensors'),
        lambda: fresh(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'deploy.safetensors'))),
    ):
        with pytest.raises(CheckpointError, match='deploy=True'):
            load()


# ------------------------------------------------------------------------------- what a file is of


@pytest.mark.parametrize('deploy', [False, True])
@pytest.mark.parametrize('name', repvgg_zoo.VARIANTS)
def test_identify_variant_every_variant_is_found(name, deploy):
    state_dict = timm.create_model(name, device='meta', deploy=deploy, num_classes=3).state_dict()
    if deploy or name == 'repvgg_a2_cifar':  # strides leave no trace there
        name = name.removesuffix('_cifar')
    assert identify_variant(state_dict).name == name


def test_check_fit_misfit_lists_what_is_wrong():
    expected = timm.create_model('repvgg_a0', device='meta').state_dict()
    state_dict = dict(timm.create_model('repvgg_b0', device='meta').state_dict())
    with pytest.raises(CheckpointError) as caught:
        check_fit(state_dict, expected, what='repvgg_a0')
    message = str(caught.value)
    assert 'does not fit repvgg_a0 (it looks like a checkpoint of repvgg_b0)' in message
    assert 'unexpected: stages.0.2.' in message
    assert 'of the wrong shape: stem.conv_kxk.conv.weight: (64, 3, 3, 3) in the checkpoint, (48, 3, 3, 3)' in message
    del state_dict['head.fc.bias']
    with pytest.raises(CheckpointError, match=r'1 missing: head\.fc\.bias'):
        check_fit(state_dict, expected, what='repvgg_a0')


def test_load_misfit_leaves_the_model_unchanged(tmp_path):
    save_file(timm.create_model('test_repvgg', num_classes=11).state_dict(), tmp_path / 'eleven.safetensors')
    model = fresh()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r'head\.fc\.weight: \(11, 96\) in the checkpoint, \(10, 96\)'):
        load_checkpoint(model, tmp_path / 'eleven.safetensors')
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


# ----------------------------------------------------------------------------------------------- files


def bare(state_dict):
    return state_dict


CONTAINERS = {
    'bare': bare,
    'state_dict': lambda sd: {'state_dict': sd, 'epoch': 3, 'args': argparse.Namespace(lr=0.1)},
    'model': lambda sd: {'model': sd, 'optimizer': {'state': {}}},
    'average': lambda sd: {'state_dict': {k: v * 0 for k, v in sd.items()}, 'state_dict_ema': sd},
    'model average': lambda sd: {'model': {k: v * 0 for k, v in sd.items()}, 'model_ema': sd},
}


@pytest.mark.parametrize('suffix', ['.pth', '.pt', '.pth.tar', '.bin'])
@pytest.mark.parametrize('container', CONTAINERS)
def test_load_torch_file_of_any_container(state_dict, model, container, suffix, tmp_path):
    torch.save(CONTAINERS[container](state_dict), tmp_path / f'file{suffix}')
    loaded = load_checkpoint(fresh(), tmp_path / f'file{suffix}')
    assert torch.equal(loaded(images(px=32)), model(images(px=32)))


def test_load_safetensors_file(state_dict, model, tmp_path):
    save_file(state_dict, tmp_path / 'file.safetensors')
    loaded = load_checkpoint(fresh(), tmp_path / 'file.safetensors')
    assert torch.equal(loaded(images(px=32)), model(images(px=32)))


def test_read_without_ema_takes_plain_weights(state_dict, tmp_path):
    torch.save(CONTAINERS['average'](state_dict), tmp_path / 'file.pth')
    plain = read_checkpoint(tmp_path / 'file.pth', use_ema=False)
    assert plain['head.fc.weight'].abs().sum() == 0


@pytest.mark.parametrize('suffix', ['.safetensors', '.pth'])
@pytest.mark.parametrize('keep', [0, 100, 0.5, 0.99])
def test_read_truncated_file_raises(state_dict, suffix, keep, tmp_path):
    path = tmp_path / f'file{suffix}'
    save_file(state_dict, path) if suffix == '.safetensors' else torch.save(state_dict, path)
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    with pytest.raises(CheckpointError, match=rf'file{suffix}.*(truncated|no torch checkpoint)'):
        load_checkpoint(fresh(), path)
    with pytest.raises(CheckpointError, match=rf'file{suffix}'):
        fresh(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is the device')
def test_read_onto_a_missing_device_raises_its_error_or_that_of_the_file(state_dict, tmp_path):
    path = tmp_path / 'file.safetensors'
    save_file(state_dict, path)
    with pytest.raises((RuntimeError, AssertionError), match=r'NVIDIA|CUDA') as device_error:
        read_checkpoint(path, device='cuda:0')
    assert not isinstance(device_error.value, CheckpointError)
    os.truncate(path, path.stat().st_size - 5)
    with pytest.raises(CheckpointError, match=r'file\.safetensors.* is truncated'):
        read_checkpoint(path, device='cuda:0')


def test_read_onto_a_device_out_of_memory_raises_its_error_and_does_not_try_again(state_dict, tmp_path, monkeypatch):
    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def get_tensor(self, _):
            raise torch.OutOfMemoryError('CUDA out of memory')

    path, real = tmp_path / 'file.safetensors', safetensors.safe_open
    save_file(state_dict, path)
    # a tensor that the device could take by itself would be moved to it
    monkeypatch.setattr(safetensors, 'safe_open', lambda *a, device='cpu': real(*a) if device == 'cpu' else Full())
    with pytest.raises(torch.OutOfMemoryError, match='CUDA out of memory'):
        read_checkpoint(path, device='meta')


def test_read_file_truncated_meanwhile_raises(state_dict, tmp_path, monkeypatch):
    path = tmp_path / 'file.safetensors'
    save_file(state_dict, path)
    real = safetensors.safe_open
    opened = []

    def truncating(*args):
        opened.append(args)
        if len(opened) == 2:
            os.truncate(path, path.stat().st_size - 5)
        return real(*args)

    monkeypatch.setattr(safetensors, 'safe_open', truncating)
    with pytest.raises(CheckpointError, match=r'file\.safetensors.* is truncated'):
        read_checkpoint(path)


@pytest.mark.parametrize('content', [b'hello world', b'', b'\x80\x04garbage', bytes(range(256))], ids=str)
def test_read_other_file_raises(content, tmp_path):
    (tmp_path / 'file.pth').write_bytes(content)
    with pytest.raises(CheckpointError, match=r'file\.pth'):
        load_checkpoint(fresh(), tmp_path / 'file.pth')


@pytest.mark.parametrize('name', ['file', 'file.pth', 'file.bin'])
def test_read_safetensors_by_another_name(state_dict, name, tmp_path):
    save_file(state_dict, tmp_path / name)
    assert read_checkpoint(tmp_path / name).keys() == state_dict.keys()


def test_read_safetensors_any_dtype_equals_the_library(tmp_path):
    generator = torch.Generator().manual_seed(0)
    dtypes = (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.complex64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.uint16,
    )
    tensors = {
        f'{dtype}.{shape}': (torch.randn(shape, generator=generator) * 9).to(dtype)
        for dtype in dtypes
        for shape in ((), (0,), (3,), (2, 3, 1, 1))
    }
    assert len(tensors) > 3 * files._TENSORS_AT_A_TIME
    save_file(tensors, tmp_path / 'all.safetensors', metadata={'format': 'pt'})
    expected, read = load_file(tmp_path / 'all.safetensors'), read_checkpoint(tmp_path / 'all.safetensors')
    assert read.keys() == expected.keys()
    for name, value in expected.items():
        assert read[name].dtype == value.dtype
        assert read[name].shape == value.shape
        assert read[name].untyped_storage().nbytes() == value.nbytes
        assert read[name].view(-1).view(torch.uint8).equal(value.view(-1).view(torch.uint8))


def test_read_tensors_outlive_their_file(state_dict, tmp_path):
    path = tmp_path / 'x.safetensors'
    save_file(state_dict, path)
    read = read_checkpoint(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert all(torch.equal(value, state_dict[key]) for key, value in read.items())


class Exploit:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, 'w')


@pytest.mark.parametrize('protocol', ['torch', 'pickle'])
def test_read_pickle_with_code_raises_and_runs_nothing(protocol, tmp_path):
    proof = str(tmp_path / 'ran')
    if protocol == 'torch':
        torch.save({'state_dict': Exploit(proof)}, tmp_path / 'evil.pth')
    else:
        (tmp_path / 'evil.pth').write_bytes(pickle.dumps(Exploit(proof)))
    with pytest.raises(CheckpointError, match=r'evil\.pth'):
        load_checkpoint(fresh(), tmp_path / 'evil.pth')
    assert not (tmp_path / 'ran').exists()


def test_read_missing_file_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'no checkpoint file at .*nothing\.pth'):
        load_checkpoint(fresh(), tmp_path / 'nothing.pth')


@pytest.mark.parametrize('content', [[1, 2], {}, {'state_dict': {'a': 1}}, torch.zeros(2)], ids=str)
def test_read_file_without_state_dict_raises(content, tmp_path):
    torch.save(content, tmp_path / 'file.pth')
    with pytest.raises(CheckpointError, match='holds no state dict'):
        load_checkpoint(fresh(), tmp_path / 'file.pth')


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_load_half_precision_file_into_deploy_model_folds_wide(dtype, model, tmp_path):
    half = {k: v.to(dtype) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    torch.save(half, tmp_path / 'half.pth')
    training, deploy = (load_checkpoint(fresh(deploy=d), tmp_path / 'half.pth').eval() for d in (False, True))
    x = images(4, 32)
    assert rel_diff(deploy(x), training(x)) < 1e-5  # float32; rounded to half precision, 1e-3 and more


def test_load_training_weights_without_an_identity_into_deploy_model_raises(state_dict):
    for key in [key for key in state_dict if key.startswith('stages.1.1.identity')]:
        del state_dict[key]
    with pytest.raises(CheckpointError, match=r"block 'stages\.1\.1': the weights have no identity branch"):
        fresh(deploy=True).load_state_dict(state_dict)


def test_load_training_weights_with_one_identity_too_many_raises(state_dict):
    for key in [key for key in state_dict if key.startswith('stages.1.1.identity')]:
        state_dict[key.replace('1.1.identity', '1.0.identity')] = state_dict[key]
    with pytest.raises(CheckpointError, match=r"block 'stages\.1\.0': the weights have an identity branch"):
        fresh(deploy=True).load_state_dict(state_dict)


def test_load_norm_without_counter_takes_its_own_state_dict():
    class Norm(torch.nn.BatchNorm2d):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            del self.num_batches_tracked

    model = fresh(norm_layer=Norm)
    model.load_state_dict(model.state_dict())


def test_every_layout_is_tested():
    names = {layout.name.removesuffix(' RepVGG') for layout in layouts._FOREIGN_LAYOUTS}
    assert names - {'official RepVGGplus'} == LAYOUTS.keys() - {
        'timm'
    }  # whose halves and heads have tests of their own
