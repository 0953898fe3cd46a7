"""INT8: what is written, what the report says, and the parts that can be checked by hand."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import timm
import torch
from helpers import deployed_with_weights, images, rel_diff, unbalanced_ranges
from timm.data import create_dataset, create_transform, resolve_model_data_config

from repvgg_zoo import VARIANTS
from repvgg_zoo.pretrained.manifest import weights_dir
from repvgg_zoo.quantization.sensitivity import layer_errors
from repvgg_zoo.tools.console import no_progress
from repvgg_zoo.tools.model_folder import save_model
from repvgg_zoo.tools.quantize.images import evenly_spaced, image_folder
from repvgg_zoo.tools.quantize.quantize import quantize
from repvgg_zoo_cli import main

FILES = ['model.onnx', 'ranges.png', 'report.json', 'report.md']
TRAIN, VALIDATION = (weights_dir() / 'cifar10' / split for split in ('train', 'validation'))


def float32(report):
    return report.precisions[0]


def int8(report):
    return report.precisions[1]


@pytest.fixture(scope='module')
def quantized(tmp_path_factory):
    folder = tmp_path_factory.mktemp('quantized') / 'out'
    return folder, quantize('test_repvgg', folder, images=VALIDATION, calibration=TRAIN, track=no_progress)


def test_quantize_command_takes_the_arguments_of_bare_files(monkeypatch, tmp_path, capsys):
    def open_model(source, **options):
        raise ValueError(f'{options}')

    monkeypatch.setattr('repvgg_zoo.tools.quantize.quantize.open_model', open_model)
    options = ['--prefix', 'model.', '--no-ema', '--model-kwargs', 'width=2']
    assert main(['quantize', 'c.pth', str(tmp_path / 'out'), '--images', str(VALIDATION), *options]) == 1
    said = capsys.readouterr().err
    assert all(text in said for text in ("'prefix': 'model.'", "'use_ema': False", "'model_kwargs': {'width': 2}"))


def test_quantize_top1_loses_at_most_one_point(quantized):
    _, report = quantized
    model, dataset = deployed_with_weights(), create_dataset('', root=str(VALIDATION))
    dataset.transform = create_transform(**resolve_model_data_config(model))
    x, labels = zip(*(dataset[index] for index in range(len(dataset))), strict=True)
    with torch.inference_mode():
        right = (model(torch.stack(x)).argmax(1) == torch.tensor(labels)).double().mean().item()
    assert float32(report).top1_pct == pytest.approx(100 * right, abs=0.21)  # of 500 images, one may be a near tie
    assert int8(report).top1_pct >= float32(report).top1_pct - 2.2  # one point, and two standard errors of 0.6 on 500
    assert int8(report).same_top_class_pct > 96
    assert report.images == 500
    assert report.calibration_images == 300


def test_quantize_weights_have_eight_bits(quantized):
    import onnx

    folder, report = quantized
    assert 3.3 < float32(report).bytes / int8(report).bytes <= 4
    assert (folder / 'model.onnx').stat().st_size == int8(report).bytes
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
    assert sorted(path.name for path in folder.glob('[!.]*')) == FILES
    content = json.loads((folder / 'report.json').read_text())
    assert content['precisions'][1]['top1_pct'] == int8(report).top1_pct
    assert content['speedup'] == float32(report).latency_ms / int8(report).latency_ms
    assert len(content['sensitivity']) == 12
    text = (folder / 'report.md').read_text()
    assert f'{int8(report).top1_pct:.2f}' in text
    assert 'stages.1.3.reparam_conv' in text
    assert content['ranges'].keys() == {'before'}
    assert len(content['ranges']['before']) == 12


def test_quantize_onnxruntime_computes_same(quantized):
    import onnxruntime

    folder, _ = quantized
    session = onnxruntime.InferenceSession(folder / 'model.onnx', providers=['CPUExecutionProvider'])
    for count in (1, 3):
        x = images(count, 32)
        logits = torch.from_numpy(session.run(None, {'x': x.numpy()})[0])
        assert logits.shape == (count, 10)
        assert rel_diff(logits, deployed_with_weights()(x)) < 0.3  # eight bits over twelve layers, of noise


def test_quantize_unlabelled_images_give_no_top1(tmp_path):
    (tmp_path / 'flat').mkdir()
    for path in sorted(VALIDATION.glob('*/*.jpg'))[::50]:
        (tmp_path / 'flat' / f'{path.parent.name}-{path.name}').write_bytes(path.read_bytes())
    report = quantize('test_repvgg', tmp_path / 'out', images=tmp_path / 'flat', subset=4, track=no_progress)
    assert float32(report).top1_pct is None
    assert int8(report).top1_pct is None
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
    assert float32(report).top1_pct is not None


def test_quantize_class_named_as_split_is_class(tmp_path):
    for name in ('cat', 'val'):
        shutil.copytree(VALIDATION / 'cat', tmp_path / name)
    assert image_folder(tmp_path).reader.class_to_idx == {'cat': 0, 'val': 1}


def test_quantize_nested_folders_give_no_top1(tmp_path):
    for folder in sorted(VALIDATION.iterdir()):
        for part, path in enumerate(sorted(folder.glob('*.jpg'))[:10]):
            (tmp_path / 'photos' / folder.name / f'part{part}').mkdir(parents=True)
            shutil.copy(path, tmp_path / 'photos' / folder.name / f'part{part}')
    report = quantize('test_repvgg', tmp_path / 'out', images=tmp_path / 'photos', subset=4, track=no_progress)
    assert float32(report).top1_pct is None
    assert report.no_top1.endswith('with the images in them; there are 10, 0 of them with images')


def test_quantize_fewer_classes_give_no_top1(tmp_path):
    for name in ('cat', 'dog', 'frog'):
        shutil.copytree(VALIDATION / name, tmp_path / 'photos' / name)
    report = quantize('test_repvgg', tmp_path / 'out', images=tmp_path / 'photos', subset=4, track=no_progress)
    assert int8(report).top1_pct is None
    assert report.no_top1.endswith('there are 3, 3 of them with images')


def test_quantize_no_classifier_gives_no_top1(tmp_path):
    (tmp_path / 'backbone').mkdir()
    save_model(timm.create_model('test_repvgg', pretrained=True, num_classes=0, global_pool=''), tmp_path / 'backbone')
    report = quantize(tmp_path / 'backbone', tmp_path / 'out', images=VALIDATION, subset=4, track=no_progress)
    assert (float32(report).top1_pct, int8(report).same_top_class_pct) == (None, None)
    assert 'No top-1: the model has no classifier' in report.markdown()


def test_quantize_empty_class_folder_gives_no_top1(tmp_path):
    for path in sorted(VALIDATION.glob('*/*.jpg'))[::50]:
        (tmp_path / 'photos' / path.parent.name).mkdir(parents=True)
        (tmp_path / 'photos' / path.parent.name / path.name).write_bytes(path.read_bytes())
    (tmp_path / 'photos' / 'aardvark').mkdir()
    report = quantize('test_repvgg', tmp_path / 'out', images=tmp_path / 'photos', subset=4, track=no_progress)
    assert float32(report).top1_pct is None
    assert report.no_top1.endswith('there are 11, 10 of them with images')
    assert report.no_top1 in (tmp_path / 'out' / 'report.md').read_text()


def spread_of(spread):
    return spread.largest / spread.smallest


def test_quantize_unbalanced_network_needs_equalize(tmp_path):
    (tmp_path / 'model').mkdir()
    save_model(unbalanced_ranges(), tmp_path / 'model')
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
        lost.append(float32(report).top1_pct - int8(report).top1_pct)
        before, *after = ([spread_of(r.weights) for r in ranges[1:-1]] for ranges in report.ranges.values())
        assert min(before) > 50
        assert [max(spreads) < 5 for spreads in after] == [True] * equalized
    assert lost[0] > 4
    assert lost[1] < 1.6


def test_quantize_keeps_the_most_sensitive_layers_in_float(tmp_path):
    import onnx

    report = quantize('test_repvgg', tmp_path / 'out', images=VALIDATION, subset=4, keep_float=2, track=no_progress)
    assert report.kept_float == tuple(error.layer for error in report.sensitivity[:2])
    tensors = {tensor.name: tensor for tensor in onnx.load(tmp_path / 'out' / 'model.onnx').graph.initializer}
    for layer in report.kept_float:
        assert tensors[f'{layer}.weight'].data_type == onnx.TensorProto.FLOAT
    assert sum(tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1 for tensor in tensors.values()) == 10
    assert f'In float32: {", ".join(report.kept_float)}.' in (tmp_path / 'out' / 'report.md').read_text()


def test_quantize_finetune_trains_an_unbalanced_network(tmp_path):
    """Without equalisation, on the 500 bundled training images."""
    (tmp_path / 'model').mkdir()
    save_model(unbalanced_ranges(), tmp_path / 'model')
    report = quantize(
        tmp_path / 'model',
        tmp_path / 'out',
        images=VALIDATION,
        calibration=TRAIN,
        finetune_on=TRAIN,
        epochs=3,
        track=no_progress,
    )
    assert [precision.name for precision in report.precisions] == ['float32', 'int8', 'int8 trained']
    float32, int8, trained = report.precisions
    assert trained.same_top_class_pct > int8.same_top_class_pct + 1
    assert float32.same_top_class_pct == 100
    assert (tmp_path / 'out' / 'model.onnx').stat().st_size == trained.bytes
    assert sorted(path.name for path in (tmp_path / 'out').glob('[!.]*')) == FILES
    assert 'Epochs of training: 3.' in (tmp_path / 'out' / 'report.md').read_text()


def test_quantize_ruinous_training_keeps_the_better_file(tmp_path):
    report = quantize(
        'test_repvgg',
        tmp_path / 'out',
        images=VALIDATION,
        subset=20,
        finetune_on=TRAIN,
        epochs=1,
        lr=0.1,
        track=no_progress,
    )
    assert [precision.name for precision in report.precisions] == ['float32', 'int8 trained', 'int8']
    assert report.trained_is_worse
    assert (tmp_path / 'out' / 'model.onnx').stat().st_size == report.precisions[-1].bytes
    assert 'the training made the model worse' in (tmp_path / 'out' / 'report.md').read_text()


@pytest.fixture
def excited(tmp_path):
    """A folder of a small network with squeeze-excite."""
    torch.manual_seed(0)
    sizes = dict(depths=(1, 1, 1, 1), width=(0.125, 0.0625, 0.0625, 0.03125))
    model = timm.create_model('repvgg_d2se', num_classes=10, **sizes)
    model.pretrained_cfg.update(input_size=(3, 32, 32), crop_pct=1.0)
    (tmp_path / 'excited').mkdir()
    save_model(model, tmp_path / 'excited')
    return tmp_path / 'excited'


def test_quantize_trains_with_the_options_it_got(tmp_path, monkeypatch):
    from repvgg_zoo.tools.quantize import quantize as module

    seen = {}

    def recorded(name, function, *args, **options):
        seen.update({(name, option): value for option, value in options.items()})
        return function(*args, **options)

    for name in ('layer_errors', 'quantize_onnx', 'prepare_qat', 'finetune'):
        monkeypatch.setattr(module, name, partial(recorded, name, getattr(module, name)))
    report = quantize(
        'test_repvgg', tmp_path / 'out', images=VALIDATION, subset=4, keep_float=2, full_range=True,
        finetune_on=TRAIN, epochs=1, lr=2e-5, track=no_progress,
    )  # fmt: skip
    assert all(seen[name, 'full_range'] is True for name in ('layer_errors', 'quantize_onnx', 'prepare_qat'))
    assert (seen['finetune', 'epochs'], seen['finetune', 'lr']) == (1, 2e-5)
    assert set(seen['prepare_qat', 'keep_float']) == set(report.kept_float)


def test_quantize_trains_to_the_same_weights_each_time(tmp_path, monkeypatch):
    from repvgg_zoo.tools.quantize import quantize as module

    trained = []

    def recorded(model, *args, **options):
        finetune(model, *args, **options)
        trained.append(torch.cat([p.detach().flatten() for p in model.parameters()]))

    finetune = module.finetune
    monkeypatch.setattr(module, 'finetune', recorded)
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        options = dict(images=VALIDATION, subset=4, finetune_on=TRAIN, epochs=1, track=no_progress)
        quantize('test_repvgg', tmp_path / str(seed), **options)
    assert torch.equal(*trained)


def test_quantize_keeps_layers_that_no_training_rounds(excited, tmp_path, monkeypatch):
    def least_first(*args, **options):
        return layer_errors(*args, **options)[::-1]  # squeeze-excite suffers least here

    monkeypatch.setattr('repvgg_zoo.tools.quantize.quantize.layer_errors', least_first)
    report = quantize(
        excited, tmp_path / 'out', images=VALIDATION, subset=4, keep_float=9, finetune_on=TRAIN, epochs=1,
        full_range=True, track=no_progress,
    )  # fmt: skip
    assert any('.attn.' in layer for layer in report.kept_float)
    assert {precision.name for precision in report.precisions} == {'float32', 'int8', 'int8 trained'}


def test_quantize_equalizes_through_squeeze_excite(excited, tmp_path):
    report = quantize(excited, tmp_path / 'out', images=VALIDATION, subset=4, equalize_layers=True, track=no_progress)
    before, after = (max(spread_of(r.weights) for r in report.ranges[when][1:-1]) for when in ('before', 'after'))
    assert after < 0.9 * before


def test_quantize_failure_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr('repvgg_zoo.tools.quantize.quantize.layer_errors', lambda *_, **__: 1 / 0)
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


def test_main_quantize_options_of_a_training_need_one(tmp_path):
    command = [sys.executable, '-m', 'repvgg_zoo', 'quantize', 'test_repvgg', tmp_path / 'out', '--images', VALIDATION]
    done = subprocess.run([*command, '--epochs', '2', '--lr', '1e-3'], capture_output=True, text=True, check=False)
    assert done.returncode
    assert '--epochs and --lr: of a training; give its images by --finetune' in done.stderr
    assert 'Traceback' not in done.stderr


def test_evenly_spaced_covers_folder():
    assert evenly_spaced(10, 3) == [0, 3, 6]
    assert evenly_spaced(3, 10) == [0, 1, 2]
    assert np.bincount([index // 50 for index in evenly_spaced(500, 300)]).tolist() == [30] * 10


def test_quantize_impossible_request_raises(tmp_path):
    for options, said in (
        (dict(subset=0), 'subset is 0; it takes a number from 1 on'),
        (dict(lr=0), 'lr is 0; it takes a number above 0'),
        (dict(lr=float('nan')), 'lr is nan; it takes a number above 0'),
        (dict(epochs=0), 'epochs is 0; it takes a number from 1 on'),
        (dict(keep_float=-1), 'keep_float is -1; it takes a number from 0 on'),
        (dict(keep_float=12, subset=2), 'keep_float is 12 of 12 layers'),
    ):
        with pytest.raises(ValueError, match=said):
            quantize('test_repvgg', tmp_path / 'out', images=VALIDATION, track=no_progress, **options)
    with pytest.raises(FileNotFoundError, match='no folder of images'):
        quantize('test_repvgg', tmp_path / 'out', images=VALIDATION, finetune_on=tmp_path / 'no', track=no_progress)
    (tmp_path / 'overflow').mkdir()
    broken = deployed_with_weights()
    broken.head.fc.weight.data *= 1e38
    save_model(broken, tmp_path / 'overflow')
    with pytest.raises(ValueError, match='gives values that are not finite on the images of the calibration'):
        quantize(tmp_path / 'overflow', tmp_path / 'out', images=VALIDATION, subset=2, track=no_progress)
    (tmp_path / 'grey').mkdir()
    save_model(timm.create_model('test_repvgg', in_chans=1), tmp_path / 'grey')
    with pytest.raises(ValueError, match='the model takes 1'):
        quantize(tmp_path / 'grey', tmp_path / 'out', images=VALIDATION, track=no_progress)
