"""Post-training quantization of any network."""

from __future__ import annotations

import pytest
import timm
import torch
from helpers import images, randomise, rel_diff

from repvgg_zoo import prepare_qat, switch_to_deploy
from repvgg_zoo.quantization.onnx_export import export_onnx
from repvgg_zoo.quantization.ptq import quantize_onnx
from repvgg_zoo.quantization.qdq import export_qdq
from repvgg_zoo.tools.model_folder import save_model

pytest.importorskip('nncf')
onnx, ort = pytest.importorskip('onnx'), pytest.importorskip('onnxruntime')


@pytest.fixture
def segmenter(tmp_path):
    """A small U-Net on a RepVGG, in the deploy form, with statistics of its own."""
    smp = pytest.importorskip('segmentation_models_pytorch')
    torch.manual_seed(0)
    save_model(timm.create_model('repvgg_a0', depths=(1, 2, 2, 1), width=(0.25, 0.25, 0.25, 0.125)), tmp_path)
    network = smp.Unet(f'tu-local-dir:{tmp_path}', encoder_weights=None, classes=2)
    return switch_to_deploy(randomise(network).eval())


def run(path, x):
    return torch.from_numpy(ort.InferenceSession(path).run(None, {'x': x.numpy()})[0])


def rms_error(found, expected):
    return ((found - expected).square().mean() / expected.square().mean()).sqrt().item()


@pytest.mark.parametrize('way', ['after training', 'in training'])
def test_segmentation_network_keeps_its_output(segmenter, tmp_path, way):
    x = images(4, 64)
    with torch.no_grad():
        expected = segmenter(x)
    if way == 'after training':
        export_onnx(segmenter, x[:2], tmp_path / 'float32.onnx')
        assert rel_diff(run(tmp_path / 'float32.onnx', x), expected) < 1e-5  # float32
        quantize_onnx(tmp_path / 'float32.onnx', x.split(1), tmp_path / 'int8.onnx', full_range=True)
    else:
        prepare_qat(segmenter, [x], full_range=True)
        export_qdq(segmenter, tmp_path / 'int8.onnx', x[:2])
    found = run(tmp_path / 'int8.onnx', x)
    assert found.shape == expected.shape
    assert 1e-4 < rms_error(found, expected) < 0.4  # eight bits in 30 layers of random weights: 0.16 and 0.27
    kinds = [node.op_type for node in onnx.load(tmp_path / 'int8.onnx').graph.node]
    assert kinds.count('QuantizeLinear') > 5


@pytest.mark.parametrize(
    ('calibration', 'options', 'said'),
    [
        ([images()], dict(keep_float=['encoder.nowhere']), r"no layer 'encoder\.nowhere' in"),
        ([], {}, 'the batches have no images'),
        ([images(), images() * torch.nan], {}, 'batch 1 has values that are not finite'),
    ],
)
def test_impossible_quantization_raises_and_writes_nothing(segmenter, tmp_path, calibration, options, said):
    export_onnx(segmenter, images(2, 64), tmp_path / 'float32.onnx')
    with pytest.raises(ValueError, match=said):
        quantize_onnx(tmp_path / 'float32.onnx', calibration, tmp_path / 'int8.onnx', **options)
    assert not (tmp_path / 'int8.onnx').exists()
