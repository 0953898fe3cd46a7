"""INT8: what is written, what the report says, and the parts that can be checked by hand."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import timm
import torch
from helpers import images, rel_diff
from timm.data import create_dataset, create_transform, resolve_model_data_config

from repvgg_zoo import VARIANTS
from repvgg_zoo.pretrained.manifest import weights_dir
from repvgg_zoo.tools.console import no_progress
from repvgg_zoo.tools.model_folder import save_model
from repvgg_zoo.tools.quantize import (
    _dataset,
    _evenly_spaced,
    _fake_quantized_input,
    _fake_quantized_weight,
    equalize,
    layer_errors,
    quantize,
)
from repvgg_zoo_cli import main

TRAIN, VALIDATION = (weights_dir() / 'cifar10' / split for split in ('train', 'validation'))


def deployed() -> torch.nn.Module:
    return timm.create_model('test_repvgg.cifar10_deploy', pretrained=True).eval()


@torch.no_grad()
def unbalanced(seed: int = 0) -> torch.nn.Module:
    """The same function, with channels whose ranges differ a hundredfold."""
    model, generator = deployed(), torch.Generator().manual_seed(seed)
    blocks = [model.stem, *(block for stage in model.stages for block in stage)]
    for first, second in pairwise(blocks):
        scale = 10 ** (2 * torch.rand(first.reparam_conv.out_channels, generator=generator) - 1)
        first.reparam_conv.weight /= scale.view(-1, 1, 1, 1)
        first.reparam_conv.bias /= scale
        second.reparam_conv.weight *= scale.view(1, -1, 1, 1)
    return model


@pytest.fixture(scope='module')
def quantized(tmp_path_factory):
    folder = tmp_path_factory.mktemp('quantized') / 'out'
    return folder, quantize('test_repvgg', folder, images=VALIDATION, calibration=TRAIN, track=no_progress)


def test_quantize_command_takes_the_arguments_of_bare_files(monkeypatch, tmp_path, capsys):
    def open_model(source, **options):
        raise ValueError(f'{options}')

    monkeypatch.setattr('repvgg_zoo.tools.quantize.open_model', open_model)
    options = ['--prefix', 'model.', '--no-ema', '--model-kwargs', 'width=2']
    assert main(['quantize', 'c.pth', str(tmp_path / 'out'), '--images', str(VALIDATION), *options]) == 1
    said = capsys.readouterr().err
    assert all(text in said for text in ("'prefix': 'model.'", "'use_ema': False", "'model_kwargs': {'width': 2}"))


def test_quantize_top1_loses_at_most_one_point(quantized):
    _, report = quantized
    model, dataset = deployed(), create_dataset('', root=str(VALIDATION))
    dataset.transform = create_transform(**resolve_model_data_config(model))
    x, labels = zip(*(dataset[index] for index in range(len(dataset))), strict=True)
    with torch.inference_mode():
        right = (model(torch.stack(x)).argmax(1) == torch.tensor(labels)).double().mean().item()
    assert report.float32_top1_pct == pytest.approx(100 * right, abs=0.21)  # of 500 images, one may be a near tie
    assert report.int8_top1_pct >= report.float32_top1_pct - 2.2  # one point, and two standard errors of 0.6 on 500
    assert report.same_top_class_pct > 96
    assert report.images == 500
    assert report.calibration_images == 300


def test_quantize_weights_have_eight_bits(quantized):
    import onnx

    folder, report = quantized
    assert 3.3 < report.float32_bytes / report.int8_bytes <= 4
    assert (folder / 'model.onnx').stat().st_size == report.int8_bytes
    tensors = {tensor.name: tensor for tensor in onnx.load(folder / 'model.onnx').graph.initializer}
    kernels = [t for t in tensors.values() if len(t.dims) == 4]
    assert len(kernels) == 11
    assert {onnx.TensorProto.DataType.Name(kernel.data_type) for kernel in kernels} == {'INT8'}


def largest_weights(path):
    """Return the largest absolute 8-bit weight of each layer."""
    import onnx

    tensors = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]
    return [abs(weights.astype(int)).max() for weights in tensors if weights.dtype == np.int8 and weights.ndim > 1]


def test_quantize_two_products_fit_into_16_bits(quantized):
    """So many does an x86 processor without VNNI add, and ONNX Runtime lets the sum saturate."""
    folder, report = quantized
    largest = largest_weights(folder / 'model.onnx')
    assert len(largest) == 1 + sum(VARIANTS['test_repvgg'].depths) + 1  # stem, blocks, classifier
    assert 2 * 255 * max(largest) < 2**15
    assert not report.full_range


def test_quantize_full_range_uses_eight_bits(tmp_path):
    report = quantize('test_repvgg', tmp_path / 'out', images=VALIDATION, subset=2, full_range=True, track=no_progress)
    assert min(largest_weights(tmp_path / 'out' / 'model.onnx')) >= 127
    assert report.full_range


def test_quantize_folder_holds_model_and_report_only(quantized):
    folder, report = quantized
    assert sorted(path.name for path in folder.glob('[!.]*')) == ['model.onnx', 'report.json', 'report.md']
    content = json.loads((folder / 'report.json').read_text())
    assert content['int8_top1_pct'] == report.int8_top1_pct
    assert content['speedup'] == report.float32_latency_ms / report.int8_latency_ms
    assert len(content['sensitivity']) == 12
    text = (folder / 'report.md').read_text()
    assert f'{report.int8_top1_pct:.2f}' in text
    assert 'stages.1.3.reparam_conv' in text


def test_quantize_onnxruntime_computes_same(quantized):
    import onnxruntime

    folder, _ = quantized
    session = onnxruntime.InferenceSession(folder / 'model.onnx', providers=['CPUExecutionProvider'])
    for count in (1, 3):
        x = images(count, 32)
        logits = torch.from_numpy(session.run(None, {'x': x.numpy()})[0])
        assert logits.shape == (count, 10)
        assert rel_diff(logits, deployed()(x)) < 0.3  # eight bits over twelve layers, of noise


def test_quantize_unlabelled_images_give_no_top1(tmp_path):
    (tmp_path / 'flat').mkdir()
    for path in sorted(VALIDATION.glob('*/*.jpg'))[::50]:
        (tmp_path / 'flat' / f'{path.parent.name}-{path.name}').write_bytes(path.read_bytes())
    report = quantize('test_repvgg', tmp_path / 'out', images=tmp_path / 'flat', subset=4, track=no_progress)
    assert report.float32_top1_pct is None
    assert report.int8_top1_pct is None
    assert report.calibration_images == 4


def test_quantize_calibration_folder_is_used(tmp_path):
    photo = next(VALIDATION.glob('*/*.jpg'))
    for folder, count in (('evaluated', 3), ('calibrated', 2)):
        (tmp_path / folder).mkdir()
        for index in range(count):
            (tmp_path / folder / f'{index}.jpg').write_bytes(photo.read_bytes())
    report = quantize(
        'test_repvgg',
        tmp_path / 'out',
        images=tmp_path / 'evaluated',
        calibration=tmp_path / 'calibrated',
        track=no_progress,
    )
    assert (report.images, report.calibration_images) == (3, 2)


@pytest.mark.parametrize('other', ['.ipynb_checkpoints', '__MACOSX'])
def test_quantize_hidden_folder_is_no_class(tmp_path, other):
    for path in sorted(VALIDATION.glob('*/*.jpg'))[::50]:
        (tmp_path / 'photos' / path.parent.name).mkdir(parents=True)
        (tmp_path / 'photos' / path.parent.name / path.name).write_bytes(path.read_bytes())
    (tmp_path / 'photos' / other).mkdir()
    report = quantize('test_repvgg', tmp_path / 'out', images=tmp_path / 'photos', subset=4, track=no_progress)
    assert report.float32_top1_pct is not None


def test_quantize_class_named_as_split_is_class(tmp_path):
    for name in ('cat', 'val'):
        shutil.copytree(VALIDATION / 'cat', tmp_path / name)
    assert _dataset(tmp_path).reader.class_to_idx == {'cat': 0, 'val': 1}


def test_quantize_nested_folders_give_no_top1(tmp_path):
    for folder in sorted(VALIDATION.iterdir()):
        for part, path in enumerate(sorted(folder.glob('*.jpg'))[:10]):
            (tmp_path / 'photos' / folder.name / f'part{part}').mkdir(parents=True)
            shutil.copy(path, tmp_path / 'photos' / folder.name / f'part{part}')
    report = quantize('test_repvgg', tmp_path / 'out', images=tmp_path / 'photos', subset=4, track=no_progress)
    assert report.float32_top1_pct is None
    assert report.no_top1.endswith('with the images in them; there are 10, 0 of them with images')


def test_quantize_fewer_classes_give_no_top1(tmp_path):
    for name in ('cat', 'dog', 'frog'):
        shutil.copytree(VALIDATION / name, tmp_path / 'photos' / name)
    report = quantize('test_repvgg', tmp_path / 'out', images=tmp_path / 'photos', subset=4, track=no_progress)
    assert report.int8_top1_pct is None
    assert report.no_top1.endswith('there are 3, 3 of them with images')


def test_quantize_no_classifier_gives_no_top1(tmp_path):
    (tmp_path / 'backbone').mkdir()
    save_model(timm.create_model('test_repvgg', pretrained=True, num_classes=0, global_pool=''), tmp_path / 'backbone')
    report = quantize(tmp_path / 'backbone', tmp_path / 'out', images=VALIDATION, subset=4, track=no_progress)
    assert (report.float32_top1_pct, report.same_top_class_pct) == (None, None)
    assert 'No top-1: the model has no classifier' in report.markdown()


def test_quantize_empty_class_folder_gives_no_top1(tmp_path):
    for path in sorted(VALIDATION.glob('*/*.jpg'))[::50]:
        (tmp_path / 'photos' / path.parent.name).mkdir(parents=True)
        (tmp_path / 'photos' / path.parent.name / path.name).write_bytes(path.read_bytes())
    (tmp_path / 'photos' / 'aardvark').mkdir()
    report = quantize('test_repvgg', tmp_path / 'out', images=tmp_path / 'photos', subset=4, track=no_progress)
    assert report.float32_top1_pct is None
    assert report.no_top1.endswith('there are 11, 10 of them with images')
    assert report.no_top1 in (tmp_path / 'out' / 'report.md').read_text()


def test_quantize_unbalanced_network_needs_equalize(tmp_path):
    (tmp_path / 'model').mkdir()
    save_model(unbalanced(), tmp_path / 'model')
    lost = []
    for equalized in (False, True):
        report = quantize(
            tmp_path / 'model',
            tmp_path / 'out',
            images=VALIDATION,
            calibration=TRAIN,
            equalize_layers=equalized,
            overwrite=True,
            track=no_progress,
        )
        assert report.equalized is equalized
        lost.append(report.float32_top1_pct - report.int8_top1_pct)
    assert lost[0] > 4
    assert lost[1] < 1.6


def test_quantize_failure_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr('repvgg_zoo.tools.quantize.layer_errors', lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantize('test_repvgg', tmp_path / 'out', images=VALIDATION, subset=2, track=no_progress)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match='no folder of images'):
        quantize('test_repvgg', tmp_path / 'out', images=tmp_path / 'none', track=no_progress)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='no images in'):
        quantize('test_repvgg', tmp_path / 'out', images=tmp_path / 'empty', track=no_progress)


def test_quantize_missing_package_names_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'nncf', None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'repvgg-zoo\[quantize\]'"):
        quantize('test_repvgg', tmp_path / 'out', images=VALIDATION, track=no_progress)


def test_main_quantize_prints_both_precisions(tmp_path):
    command = [sys.executable, '-m', 'repvgg_zoo', 'quantize', 'test_repvgg', tmp_path / 'out', '--images', VALIDATION]
    done = subprocess.run([*command, '--subset', '20', '--equalize'], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert any(line.split()[:1] == ['float32'] for line in lines)
    assert any(line.split()[:1] == ['int8'] for line in lines)
    assert 'times as fast' in done.stdout
    assert 'most sensitive layers' in done.stdout
    assert 'Traceback' not in done.stderr


# ------------------------------------------------------------------------------------------------------- parts


def test_layer_errors_quantize_one_layer_at_a_time():
    model, x = deployed(), images(8, 32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    errors = layer_errors(model, x, track=no_progress)
    assert [error.rel_error for error in errors] == sorted((e.rel_error for e in errors), reverse=True)
    assert all(0 < error.rel_error < 0.2 for error in errors)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not model.stem.reparam_conv._forward_pre_hooks
    with torch.no_grad():  # one channel with a range that leaves nothing to the others, and of no consequence itself
        model.stages[1][2].reparam_conv.weight[5] *= 1000
        model.stages[1][3].reparam_conv.weight[:, 5] = 0
    assert layer_errors(model, x, track=no_progress)[0].layer == 'stages.1.3.reparam_conv'


def test_fake_quantized_values_have_eight_bits():
    weight = torch.randn(4, 3, 3, 3) * torch.tensor([1e-3, 1, 1e3, 0]).view(-1, 1, 1, 1)
    rounded = _fake_quantized_weight(weight)
    for channel in range(3):
        step = weight[channel].abs().max() / 127
        assert ((rounded[channel] - weight[channel]).abs() <= 0.501 * step).all()
        steps = rounded[channel] / step
        assert torch.allclose(steps, steps.round(), atol=1e-3)
    assert not rounded[3].any()
    x = torch.linspace(-1, 3, 1001)
    assert len(_fake_quantized_input(x).unique()) == 256
    assert not _fake_quantized_input(torch.zeros(5)).any()


def test_equalize_computes_same_with_equal_ranges():
    model, x = unbalanced().double(), images(4, 32, dtype=torch.float64)
    expected = model(x)
    assert equalize(model) is model
    assert rel_diff(model(x), expected) < 1e-9
    first, second = model.stages[1][1].reparam_conv.weight, model.stages[1][2].reparam_conv.weight
    ranges = first.abs().amax((1, 2, 3)) / second.abs().amax((0, 2, 3))
    assert ((ranges > 0.5) & (ranges < 2)).all()  # the sweeps come near it


def test_equalize_groups_and_other_activations_computes_same():
    torch.manual_seed(0)
    for name, kwargs in (('repvgg_b1g4', {}), ('repvgg_d2se', {}), ('repvgg_a0', dict(act_layer='silu'))):
        model = timm.create_model(name, deploy=True, num_classes=2, **kwargs).double().eval()
        model.stages = model.stages[:1]
        x = images(1, 32, dtype=torch.float64)
        with torch.no_grad():
            for block in (model.stem, *model.stages[0]):
                block.reparam_conv.weight *= torch.rand(block.reparam_conv.out_channels, dtype=x.dtype).view(
                    -1, 1, 1, 1
                )
            expected, before = model.forward_features(x), model.stem.reparam_conv.weight.clone()
            equalize(model)
            assert rel_diff(model.forward_features(x), expected) < 1e-9
        assert torch.equal(before, model.stem.reparam_conv.weight) == (name != 'repvgg_b1g4')
    with pytest.raises(ValueError, match='is for the deploy form'):
        equalize(timm.create_model('test_repvgg'))


def test_evenly_spaced_covers_folder():
    assert _evenly_spaced(10, 3) == [0, 3, 6]
    assert _evenly_spaced(3, 10) == [0, 1, 2]
    assert np.bincount([index // 50 for index in _evenly_spaced(500, 300)]).tolist() == [30] * 10


def test_equalize_dead_channels_stay():
    model = deployed()
    with torch.no_grad():
        conv = model.stages[1][1].reparam_conv
        conv.weight[5] *= 1e-12
        conv.bias[5] = 0.5
    x = images(8, 32)
    before = layer_errors(model, x, track=no_progress)[0].rel_error
    assert layer_errors(equalize(model), x, track=no_progress)[0].rel_error < 2 * before


def test_equalize_unread_channels_stay():
    model = deployed()
    with torch.no_grad():
        model.stages[1][2].reparam_conv.weight[:, 5] *= 1e-12
    bias = model.stages[1][1].reparam_conv.bias[5].item()
    equalize(model, sweeps=1)
    assert model.stages[1][1].reparam_conv.bias[5].item() == bias


def test_quantize_impossible_request_raises(tmp_path):
    with pytest.raises(ValueError, match='subset is 0'):
        quantize('test_repvgg', tmp_path / 'out', images=VALIDATION, subset=0, track=no_progress)
    (tmp_path / 'grey').mkdir()
    save_model(timm.create_model('test_repvgg', in_chans=1), tmp_path / 'grey')
    with pytest.raises(ValueError, match='the model takes 1'):
        quantize(tmp_path / 'grey', tmp_path / 'out', images=VALIDATION, track=no_progress)
    with pytest.raises(TypeError, match='here is a Linear'):
        equalize(torch.nn.Linear(1, 1))
