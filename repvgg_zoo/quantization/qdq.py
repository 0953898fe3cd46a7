"""A trained INT8 model as an ONNX file, with its integers and its ranges: QuantizeLinear and DequantizeLinear nodes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.base import ReparamBlock
from .inputs import InputQuantizer
from .layers import QuantizedLinear, codes_of_layer, quantizer_of
from .onnx_export import export_onnx
from .qat import quantized_layers, without_quantizers
from .weights import Codes

__all__ = ['export_qdq']


def export_qdq(model: nn.Module, path: str | Path, sample: Tensor) -> None:
    """Write a model of `prepare_qat` as ONNX, with a free batch size.

    Each convolution and linear layer reads its weights as int8, one scale for each output channel, and its input
    through a pair of QuantizeLinear and DequantizeLinear. Biases are float32. OpenVINO, ONNX Runtime and TensorRT run
    such files with integers; TensorRT wants a model of `symmetric=True`.

    Args:
        model: In the deploy form.
        path: File to write.
        sample: An input `(N, C, H, W)` of the model.

    Raises:
        ModuleNotFoundError: onnx or onnxscript are not installed; they are in the extra `quantize`.
        ValueError: The model is not of `prepare_qat`, or has branches, or a layer is not in the graph as it was.

    Example:
        >>> export_qdq(model, 'int8.onnx', torch.randn(1, 3, 224, 224))  # doctest: +SKIP
    """
    import onnx

    layers = quantized_layers(model)
    if not layers:
        raise ValueError(f'{type(model).__name__} has no quantizers; prepare_qat() makes them')
    if branched := [p for p, layer in layers.items() if isinstance(layer, ReparamBlock) and layer.reparam_conv is None]:
        raise ValueError(f'block {branched[0]!r} has branches; call switch_to_deploy() first')
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(without_quantizers(model), sample, file := Path(folder, 'float32.onnx'))
        written = onnx.load(file)
    _Writer(written.graph).quantize({_weight_name(path, layer): layer for path, layer in layers.items()})
    onnx.checker.check_model(written)
    onnx.save(written, path)


def _weight_name(path: str, layer: ReparamBlock | QuantizedLinear) -> str:
    """Return the key of a layer's weights, which is also the name of the initializer."""
    parts = [path, layer.conv_name] if isinstance(layer, ReparamBlock) else [path]
    return '.'.join([*filter(None, parts), 'weight'])


class _Writer:
    """Puts quantizers into an ONNX graph."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.nodes: list[Any] = []
        self.inputs: dict[tuple[str, float, int], str] = {}
        """Tensors that are quantized already, by their names and ranges."""

    def quantize(self, layers: dict[str, ReparamBlock | QuantizedLinear]) -> None:
        rounded: dict[str, str] = {}
        for node in list(self.graph.node):
            if len(node.input) > 1 and (name := node.input[1]) in layers:
                node.input[0] = self._input(node.input[0], quantizer_of(layers[name]).input)
                if name not in rounded:
                    rounded[name] = self._weight(name, codes_of_layer(layers[name]))
                node.input[1] = rounded[name]
            self.nodes.append(node)
        if missing := layers.keys() - rounded.keys():
            raise ValueError(
                f'no convolution and no linear layer of the ONNX graph reads {min(missing)!r}: the model does not use '
                'it, or the exporter wrote it in another way; name it in keep_float of prepare_qat'
            )
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)

    def _input(self, name: str, quantizer: InputQuantizer) -> str:
        kind = torch.int8 if quantizer.code_range[0] < 0 else torch.uint8
        key = (name, quantizer.scale, quantizer.zero_point)
        if key not in self.inputs:
            prefix = f'{name}.range{len(self.inputs)}'
            scale = self._constant(f'{prefix}.scale', torch.tensor(quantizer.scale))
            zero = self._constant(f'{prefix}.zero_point', torch.tensor(quantizer.zero_point, dtype=kind))
            integers = self._node('QuantizeLinear', [name, scale, zero], f'{prefix}.integers')
            self.inputs[key] = self._node('DequantizeLinear', [integers, scale, zero], f'{prefix}.rounded')
        return self.inputs[key]

    def _weight(self, name: str, codes: Codes) -> str:
        [old] = [tensor for tensor in self.graph.initializer if tensor.name == name]
        self.graph.initializer.remove(old)
        values = self._constant(f'{name}.integers', codes.values)
        scale = self._constant(f'{name}.scale', codes.scale.float())
        zero = self._constant(f'{name}.zero_point', torch.zeros(len(codes.scale), dtype=torch.int8))
        return self._node('DequantizeLinear', [values, scale, zero], f'{name}.rounded', axis=0)

    def _constant(self, name: str, value: Tensor) -> str:
        from onnx import numpy_helper

        self.graph.initializer.append(numpy_helper.from_array(value.cpu().numpy(), name))
        return name

    def _node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output
