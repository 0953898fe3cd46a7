"""What a file may hold: dense tensors of finite numbers under string keys. Anything else leaves the model as it was."""

import struct

import pytest
import timm
import torch
from helpers import FORMS, images, randomise, rel_diff
from safetensors.torch import save_file

from repvgg_zoo import CheckpointError, FoldError, load_checkpoint
from repvgg_zoo.blocks.base import ReparamBlock
from repvgg_zoo.checkpoints.files import read_checkpoint

KEY = 'stages.0.0.conv_kxk.conv.weight'
ODD = {
    'meta': (lambda k: k.to('meta'), "on device 'meta' and has no values"),
    'sparse': (lambda k: k.to_sparse(), 'save plain dense tensors'),
    'nested': (lambda k: torch.nested.nested_tensor([k, k]), 'save plain dense tensors'),
    'quantized': (lambda k: torch.quantize_per_tensor(k, 0.1, 0, torch.qint8), 'quantized to torch.qint8'),
    'complex': (lambda k: k.to(torch.complex64), 'complex numbers'),
    'integers': (lambda k: (k * 100).to(torch.int8), r'integers \(torch.int8\)'),
    'booleans': (lambda k: k > 0, r'integers \(torch.bool\)'),
    'infinite': (lambda k: torch.full_like(k, torch.inf), 'not finite'),
    'NaN': (lambda k: torch.full_like(k, torch.nan), 'not finite'),
    'shape': (lambda k: k[:, :1].clone(), 'wrong shape'),
    'no shape': (lambda k: torch.tensor(1.0), 'single number'),
    'vector': (lambda k: torch.ones(3), 'does not fit'),
    'expanded': (lambda k: torch.zeros(1).expand(k.shape), 'expanded'),
    'text': (lambda k: 'weights', 'no tensor'),
}


@pytest.fixture(scope='module')
def model():
    return randomise(timm.create_model('test_repvgg'), px=32)


def check_refused(target, load, match):
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(CheckpointError, match=match):
        load(target)
    assert all(torch.equal(value, target.state_dict()[key]) for key, value in before.items())


@FORMS
@pytest.mark.parametrize('kind', ODD)
@pytest.mark.filterwarnings('ignore:.*(nested tensors|TypedStorage|quantiz|Sparse)')
def test_load_odd_values_raise_and_change_nothing(kind, deploy, model, tmp_path):
    make, match = ODD[kind]
    held = model.state_dict() | {KEY: make(model.state_dict()[KEY])}
    torch.save(held, tmp_path / 'odd.pth')
    check_refused(
        timm.create_model('test_repvgg', deploy=deploy), lambda m: load_checkpoint(m, tmp_path / 'odd.pth'), match
    )


@FORMS
def test_load_negative_variance_raises_and_changes_nothing(deploy, model, tmp_path):
    key = 'stages.0.0.conv_kxk.bn.running_var'
    held = model.state_dict() | {key: -model.state_dict()[key]}
    torch.save(held, tmp_path / 'odd.pth')
    check_refused(
        timm.create_model('test_repvgg', deploy=deploy),
        lambda m: load_checkpoint(m, tmp_path / 'odd.pth'),
        f'{key} holds variances below 0',
    )


@FORMS
def test_load_keys_that_are_no_strings_raise_and_change_nothing(deploy, model, tmp_path):
    torch.save(model.state_dict() | {0: torch.zeros(1)}, tmp_path / 'odd.pth')
    target = timm.create_model('test_repvgg', deploy=deploy)
    check_refused(target, lambda m: load_checkpoint(m, tmp_path / 'odd.pth'), 'keys that are no strings: 0')


@FORMS
@pytest.mark.parametrize('kind', ['meta', 'sparse', 'quantized', 'complex', 'integers', 'vector'])
@pytest.mark.filterwarnings('ignore:.*(TypedStorage|quantiz|Sparse)')
def test_load_state_dict_odd_values_raise(kind, deploy, model):
    """As through a file, except that `load_state_dict` lets torch report wrong shapes."""
    held = model.state_dict() | {KEY: ODD[kind][0](model.state_dict()[KEY])}
    target = timm.create_model('test_repvgg', deploy=deploy)
    with pytest.raises(
        RuntimeError, match='size mismatch' if (kind, deploy) == ('vector', False) else KEY.split('.')[2]
    ):
        target.load_state_dict(held)


def test_load_state_dict_assigns_meta_tensors():
    target = timm.create_model('test_repvgg')
    target.load_state_dict(timm.create_model('test_repvgg', device='meta').state_dict(), assign=True)
    assert target.device.type == 'meta'


def test_pretrained_state_dict_of_odd_values_raises(model):
    held = model.state_dict() | {KEY: model.state_dict()[KEY].to(torch.complex64)}
    with pytest.raises(CheckpointError, match='complex numbers'):
        timm.create_model('test_repvgg', pretrained=True, pretrained_cfg_overlay=dict(state_dict=held, file=None))


def test_load_parameters_that_require_gradients_are_detached(model, tmp_path):
    torch.save(dict(model.named_parameters()) | dict(model.named_buffers()), tmp_path / 'x.pth')
    overlay = dict(file=str(tmp_path / 'x.pth'))
    for deploy in (False, True):
        loaded = timm.create_model('test_repvgg', pretrained=True, pretrained_cfg_overlay=overlay, deploy=deploy)
        assert all(p.is_leaf and p.grad_fn is None for p in loaded.parameters())
        assert rel_diff(loaded.eval()(images(px=32)), model(images(px=32))) < 1e-5


@FORMS
@pytest.mark.parametrize('dtype', [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
def test_load_other_floats_as_they_are(dtype, deploy, model, tmp_path):
    values = {k: v.to(dtype) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    for key, value in values.items():  # 8 bits round small variances to 0
        if key.endswith('running_var'):
            values[key] = value.float().clamp(min=0.1).to(dtype)
    torch.save(values, tmp_path / 'x.pth')
    expected = timm.create_model('test_repvgg')
    expected.load_state_dict({key: value.to(model.state_dict()[key].dtype) for key, value in values.items()})
    loaded = load_checkpoint(timm.create_model('test_repvgg', deploy=deploy), tmp_path / 'x.pth')
    assert rel_diff(loaded.eval()(images(px=32)), expected.eval()(images(px=32))) < 1e-5


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('way', ['torch', 'safetensors', 'load_state_dict'])
def test_load_half_precision_folds_wide(way, dtype, model, tmp_path):
    half = {k: v.to(dtype) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    path = tmp_path / ('x.safetensors' if way == 'safetensors' else 'x.pth')
    save_file(half, path) if way == 'safetensors' else torch.save(half, path)
    outputs = []
    for deploy in (False, True):
        target = timm.create_model('test_repvgg', deploy=deploy).eval()
        target.load_state_dict(half) if way == 'load_state_dict' else load_checkpoint(target, path)
        outputs.append(target(images(4, px=32)))
    assert rel_diff(*outputs) < 1e-5  # float32; rounded to half precision, 1e-3 and more


def test_load_values_beyond_the_models_dtype_raise(model, tmp_path):
    held = model.state_dict() | {'head.fc.weight': torch.full_like(model.state_dict()['head.fc.weight'], 1e6)}
    torch.save(held, tmp_path / 'x.pth')
    target = timm.create_model('test_repvgg').half()
    check_refused(target, lambda m: load_checkpoint(m, tmp_path / 'x.pth'), r'head\.fc\.weight .*beyond torch\.float16')


@FORMS
def test_load_other_variant_is_told_before_folding(deploy, tmp_path, monkeypatch):
    torch.save(timm.create_model('repvgg_a0', num_classes=10).state_dict(), tmp_path / 'x.pth')
    monkeypatch.setattr(ReparamBlock, 'folded_conv', lambda _: pytest.fail('folded'))
    target = timm.create_model('test_repvgg', deploy=deploy)
    check_refused(target, lambda m: load_checkpoint(m, tmp_path / 'x.pth'), 'looks like a checkpoint of repvgg_a0')


def test_read_safetensors_with_a_huge_dimension_raises(tmp_path):
    for size in (2**63, 2**64, -1):
        header = b'{"x":{"dtype":"F32","shape":[0,%d],"data_offsets":[0,0]}}' % size
        (tmp_path / 'x.safetensors').write_bytes(struct.pack('<Q', len(header)) + header)
        with pytest.raises(CheckpointError, match=r'x\.safetensors.* no safetensors file'):
            read_checkpoint(tmp_path / 'x.safetensors')


def test_fold_beyond_the_dtype_raises_and_changes_nothing(model, tmp_path):
    target = timm.create_model('test_repvgg').half()
    target.stages[1][1].conv_kxk.conv.weight.data.fill_(60000)
    target.stages[1][1].conv_kxk.bn.weight.data.fill_(100)
    with pytest.raises(
        FoldError, match=r"block 'stages\.1\.1': the folded kernel of channel 0 is not finite in torch\.float16"
    ):
        target.switch_to_deploy()
    assert not any(block.reparam_conv for block in target.modules() if isinstance(block, ReparamBlock))
    assert target.float().switch_to_deploy().deploy


@pytest.mark.parametrize('value', [torch.inf, torch.nan])
@pytest.mark.parametrize('block', ['repvgg', 'mobileone', 'acb'])
def test_fold_kernel_that_is_not_finite_raises(block, value):
    target = timm.create_model('test_repvgg', block=block)
    kernel = next(p for name, p in target.named_parameters() if name.startswith('stages.1.1.') and p.ndim == 4)
    kernel.data[2] = value
    with pytest.raises(FoldError, match=r"block 'stages\.1\.1': the folded kernel of channel 2 is not finite"):
        target.switch_to_deploy()
    assert not target.deploy
