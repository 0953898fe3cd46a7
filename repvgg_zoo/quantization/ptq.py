"""Post-training quantization of an ONNX file by NNCF."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from ..blocks.batches import images_of
from .onnx_export import quiet

__all__ = ['quantize_onnx']


def quantize_onnx(
    exact: str | Path,
    calibration: Iterable[Any],
    path: str | Path,
    *,
    full_range: bool = False,
    keep_float: Collection[str] = (),
) -> None:
    """Write a float32 ONNX file in INT8.

    Weights get 8 bits per output channel, activations quantizers (QDQ). NNCF corrects the biases for the shift of each
    layer's mean.

    Args:
        exact: File of `export_onnx`.
        calibration: Inputs of one image each, `(1, C, H, W)`, or tuples that begin with one.
        path: File to write.
        full_range: Let weights use all 8 bits. By default they use 7, because without VNNI or AMX, x86 processors add
            two products of 8 bits in 16 bits, and ONNX Runtime lets that saturate. The machine that runs the file
            decides, not the one that writes it.
        keep_float: Paths of layers that stay in float32.

    Raises:
        ModuleNotFoundError: nncf or onnx are not installed; they are in the extra `quantize`.
        ValueError: There is no such layer in the file, or the calibration has no images or values that are not finite.

    Example:
        >>> quantize_onnx('float32.onnx', [torch.randn(1, 3, 224, 224)], 'int8.onnx')  # doctest: +SKIP
    """
    import nncf
    import onnx

    if isinstance(keep_float, str):
        raise ValueError(f'keep_float is {keep_float!r}; it takes a collection of paths')
    model = onnx.load(exact)
    name = model.graph.input[0].name
    images = [{name: image.detach().cpu().numpy()} for image in images_of(calibration)]
    nodes = {
        node.input[1].removesuffix('.weight'): node.name
        for node in model.graph.node
        if len(node.input) > 1 and node.input[1].endswith('.weight')
    }
    if unknown := set(keep_float) - nodes.keys():
        layers = ', '.join(nodes)
        raise ValueError(f'no layer {min(unknown)!r} in {str(exact)!r}; there are {layers}')
    with quiet():
        quantized = nncf.quantize(
            model,
            nncf.Dataset(images),
            subset_size=len(images),
            ignored_scope=nncf.IgnoredScope(names=[nodes[layer] for layer in keep_float]),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                overflow_fix=nncf.OverflowFix.DISABLE if full_range else nncf.OverflowFix.ENABLE
            ),
        )
        onnx.save(quantized, path)
