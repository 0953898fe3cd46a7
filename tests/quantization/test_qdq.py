"""INT8 models as ONNX files with their own integers and ranges."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from helpers import create_model, deployed_with_weights, images, rel_diff

from repvgg_zoo import RepVGGBlock, prepare_qat
from repvgg_zoo.quantization.layers import codes_of_layer
from repvgg_zoo.quantization.qat import quantized_layers
from repvgg_zoo.quantization.qdq import export_qdq

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxscript')


def exported(path, **options):
    model = prepare_qat(deployed_with_weights(), [images(8, 32)], **options)
    export_qdq(model, path, images(1, 32))
    return model


@pytest.mark.parametrize('symmetric', [False, True])
@pytest.mark.parametrize('full_range', [False, True])
def test_qdq_file_holds_the_codes_and_the_ranges(tmp_path, symmetric, full_range):
    model = exported(tmp_path / 'int8.onnx', symmetric=symmetric, full_range=full_range)
    graph = onnx.load(tmp_path / 'int8.onnx').graph
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    layers = {f'{path}.reparam_conv': layer for path, layer in quantized_layers(model).items() if path != 'head.fc'}
    for path, layer in layers.items():
        [conv] = [node for node in graph.node if node.op_type == 'Conv' and f'{path}.weight' in node.input[1]]
        values, scale, zero = (tensors[name] for name in made_by[conv.input[1]].input)
        codes = codes_of_layer(layer)
        assert np.array_equal(values, codes.values.numpy())
        assert np.array_equal(scale, codes.scale.numpy())
        assert values.dtype == zero.dtype == np.int8
        assert not zero.any()
        assert made_by[conv.input[1]].attribute[0].i == 0  # one scale an output channel
        quantize = made_by[made_by[conv.input[0]].input[0]]
        assert quantize.op_type == 'QuantizeLinear'
        scale, zero = (tensors[name] for name in quantize.input[1:])
        assert scale == np.float32(layer.quantizer.input.scale)
        assert zero.dtype == (np.int8 if symmetric else np.uint8)
        assert zero == layer.quantizer.input.zero_point
        assert zero == 0 or not symmetric
    assert max(abs(v).max() for v in tensors.values() if v.dtype == np.int8 and v.ndim > 1) == (
        127 if full_range else 63
    )
    count = Counter(node.op_type for node in graph.node)
    assert (count['Conv'], count['Gemm'], count['QuantizeLinear'], count['DequantizeLinear']) == (11, 1, 12, 24)


@pytest.mark.parametrize('runtime', ['onnxruntime', 'openvino'])
def test_qdq_runtimes_compute_what_pytorch_does(tmp_path, runtime):
    pytest.importorskip(runtime)
    model = exported(tmp_path / 'int8.onnx')
    for count in (1, 5):
        x = images(count, 32, seed=3)
        if runtime == 'onnxruntime':
            import onnxruntime

            found = onnxruntime.InferenceSession(tmp_path / 'int8.onnx').run(None, {'x': x.numpy()})[0]
        else:
            import openvino

            compiled = openvino.compile_model(tmp_path / 'int8.onnx', config={'INFERENCE_PRECISION_HINT': 'f32'})
            found = compiled(x.numpy())[0]
        with torch.no_grad():
            expected = model(x)
        # sums in other orders move some inputs to the next code; float32 is this far:
        assert rel_diff(torch.from_numpy(found), expected) < 0.03 < rel_diff(deployed_with_weights()(x), expected)


def test_qdq_model_stays_as_it_is(tmp_path):
    model = exported(tmp_path / 'int8.onnx')
    assert len(quantized_layers(model)) == 12


def test_qdq_impossible_model_raises(tmp_path):
    path, x = tmp_path / 'int8.onnx', images(1, 32)
    with pytest.raises(ValueError, match='has no quantizers; prepare_qat'):
        export_qdq(deployed_with_weights(), path, x)
    with pytest.raises(ValueError, match="block 'stem' has branches; call switch_to_deploy"):
        export_qdq(prepare_qat(create_model('test_repvgg'), [x]), path, x)
    assert not path.exists()


def test_qdq_block_and_linear_layer_that_are_used_twice(tmp_path):
    pytest.importorskip('onnxruntime')
    import onnxruntime

    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.fc = RepVGGBlock(3, 3, deploy=True), torch.nn.Linear(3, 3)

        def forward(self, x):
            return self.fc(self.fc(self.block(self.block(x)).mean((2, 3))))

    torch.manual_seed(0)
    x = images(4, 8)
    model = prepare_qat(Twice().eval(), [x])
    export_qdq(model, tmp_path / 'int8.onnx', x[:1])
    found = onnxruntime.InferenceSession(tmp_path / 'int8.onnx').run(None, {'x': x.numpy()})[0]
    assert rel_diff(torch.from_numpy(found), model(x)) < 0.02  # of 8 bits


@pytest.mark.parametrize('factor', [1, 3])
def test_qdq_layers_share_an_input_of_one_range(tmp_path, factor):
    pytest.importorskip('onnxruntime')
    import onnxruntime

    class Parallel(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (RepVGGBlock(3, 3, deploy=True) for _ in range(2))

        def forward(self, x):
            return self.first(x) + self.second(x)

    torch.manual_seed(0)
    x = images(4, 8)
    model = prepare_qat(Parallel().eval(), [x])
    model.second.quantizer.input.running_high *= factor
    export_qdq(model, tmp_path / 'int8.onnx', x[:1])
    count = Counter(node.op_type for node in onnx.load(tmp_path / 'int8.onnx').graph.node)
    assert count['QuantizeLinear'] == (1 if factor == 1 else 2)
    found = onnxruntime.InferenceSession(tmp_path / 'int8.onnx').run(None, {'x': x.numpy()})[0]
    assert rel_diff(torch.from_numpy(found), model(x)) < 1e-5  # the same codes, other sums


def test_qdq_layer_that_is_not_in_the_graph_raises_and_writes_nothing(tmp_path):
    model = torch.nn.Sequential(RepVGGBlock(3, 3, deploy=True), torch.nn.Linear(8, 3)).eval()
    prepare_qat(model, [images(2, 8)])
    (tmp_path / 'int8.onnx').write_text('before')
    with pytest.raises(ValueError, match=r"reads '1.weight'.* name it in keep_float of prepare_qat"):
        export_qdq(model, tmp_path / 'int8.onnx', images(1, 8))
    assert (tmp_path / 'int8.onnx').read_text() == 'before'
    assert len(list(tmp_path.iterdir())) == 1
