"""Exports of both forms, run and compared."""

import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from helpers import FORMS, images, randomise, rel_diff

ROUNDING = 1e-4
"""Relative; a runtime adds up in another order in float32, which some ten layers amplify."""


@pytest.fixture
def model(deploy):
    model = randomise(timm.create_model('test_repvgg'), px=32)
    return model.switch_to_deploy() if deploy else model


SIZES = [(1, 32, 32), (3, 64, 48), (2, 33, 47)]


@FORMS
def test_torch_export_dynamic_batch_and_size_gives_equal_outputs(model, deploy, tmp_path):
    dim = torch.export.Dim
    shapes = {'x': {0: dim('batch'), 2: dim('height', min=17), 3: dim('width', min=17)}}
    program = torch.export.export(model, (images(2, px=32),), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / 'model.pt2')
    exported = torch.export.load(tmp_path / 'model.pt2').module()
    for batch, height, width in SIZES:
        x = torch.randn(batch, 3, height, width)
        torch.testing.assert_close(exported(x), model(x))


@FORMS
def test_torchscript_saved_and_loaded_gives_equal_outputs(model, deploy, tmp_path):
    x = images(2, px=32)
    for number, scripted in enumerate((torch.jit.script(model), torch.jit.trace(model, x))):
        scripted.save(tmp_path / f'{number}.pt')
        loaded = torch.jit.load(tmp_path / f'{number}.pt')
        for batch, height, width in SIZES:
            x = torch.randn(batch, 3, height, width)
            torch.testing.assert_close(loaded(x), model(x))


@FORMS
def test_onnx_dynamic_axes_gives_equal_outputs(model, deploy, tmp_path):
    pytest.importorskip('onnxscript')
    onnxruntime = pytest.importorskip('onnxruntime')
    path = tmp_path / 'model.onnx'
    dim = torch.export.Dim
    shapes = {'x': {0: dim('batch'), 2: dim('height', min=17), 3: dim('width', min=17)}}
    torch.onnx.export(model, (images(2, px=32),), path, dynamo=True, dynamic_shapes=shapes)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    for batch, height, width in SIZES:
        x = torch.randn(batch, 3, height, width)
        (actual,) = session.run(None, {name: x.numpy()})
        assert rel_diff(torch.from_numpy(actual), model(x)) < ROUNDING


TAGS = pytest.mark.parametrize('tag', ['test_repvgg.cifar10', 'test_repvgg.cifar10_deploy'])


def timmx(tmp_path, *args):
    pytest.importorskip('timmx')
    command = [sys.executable, '-m', 'repvgg_zoo', 'run', 'timmx', 'export', *map(str, args), '--pretrained']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def expected(tag):
    x = images(1, px=32)
    return x, timm.create_model(tag, pretrained=True).eval()(x)


@pytest.mark.slow
@TAGS
def test_timmx_onnx_gives_equal_outputs(tag, expected, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    timmx(tmp_path, 'onnx', tag, '--output', 'model.onnx', '--dynamic-batch', '--batch-size', 2)
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx', providers=['CPUExecutionProvider'])
    x, logits = expected
    (actual,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert rel_diff(torch.from_numpy(actual), logits) < ROUNDING


@pytest.mark.slow
@TAGS
def test_timmx_openvino_gives_equal_outputs(tag, expected, tmp_path):
    openvino = pytest.importorskip('openvino')
    timmx(tmp_path, 'openvino', tag, '--output', 'model.xml')
    compiled = openvino.compile_model(tmp_path / 'model.xml', 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    x, logits = expected
    actual = next(iter(compiled(x.numpy()).values()))
    assert rel_diff(torch.from_numpy(np.asarray(actual)), logits) < 1e-2  # its weights are stored in float16


@pytest.mark.slow
@TAGS
def test_timmx_ncnn_gives_equal_outputs(tag, expected, tmp_path):
    ncnn = pytest.importorskip('ncnn')
    timmx(tmp_path, 'ncnn', tag, '--output', 'model')
    net = ncnn.Net()
    net.opt.use_fp16_arithmetic = net.opt.use_bf16_storage = False
    (param,), (weights,) = (list((tmp_path / 'model').glob(f'*.ncnn.{suffix}')) for suffix in ('param', 'bin'))
    net.load_param(str(param))
    net.load_model(str(weights))
    x, logits = expected
    extractor = net.create_extractor()
    extractor.input('in0', ncnn.Mat(x[0].numpy()))
    _, actual = extractor.extract('out0')
    assert rel_diff(torch.from_numpy(np.array(actual)), logits[0]) < 1e-2  # its weights are stored in float16


@FORMS
def test_fx_graph_of_model_and_block_is_scripted(deploy):
    """TorchScript reads the annotations that the graph takes over from `forward`."""
    model, x = timm.create_model('test_repvgg', deploy=deploy).eval(), images(2, 32)
    for module in (model, model.stem):
        graph = torch.fx.symbolic_trace(module)
        with torch.no_grad():
            assert rel_diff(torch.jit.script(graph)(x), module(x)) < ROUNDING
