"""Runtimes: each turns a module and a batch into a function that runs that batch.

To add a runtime, write its `prepare` function and add a row to `RUNTIMES`.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..._compat import raised_recompile_limit
from ..console import silenced

__all__ = ['RUNTIMES', 'Runtime', 'compile_openvino']

Run: TypeAlias = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """How to prepare a runtime, and what it can do."""

    prepare: Callable[[nn.Module, Tensor, str], Run]
    """Takes a float32 module in eval mode, a batch `(N, C, H, W)` and a dtype. Returns a function that runs the
    batch."""
    packages: tuple[str, ...] = ()
    """Packages that it imports, besides torch."""
    extra: str = ''
    """Optional dependency of this package that brings them."""
    is_quick: bool = False
    """Whether `repvgg-zoo benchmark --quick` measures it."""
    dtypes: tuple[str, ...] = ('float32',)
    layouts: tuple[str, ...] = ('contiguous',)
    """Layouts of the images and the weights. The runtimes besides torch compute on contiguous images."""
    max_batch: int | None = None

    @property
    def missing(self) -> list[str]:
        """Packages that are not installed."""
        return [package for package in self.packages if importlib.util.find_spec(package) is None]

    def takes(self, *, batch: int, dtype: str, layout: str) -> bool:
        """Tell whether it can run a batch of that size, dtype and layout."""
        return dtype in self.dtypes and layout in self.layouts and (self.max_batch is None or batch <= self.max_batch)


def _cast(model: nn.Module, x: Tensor, dtype: str) -> tuple[nn.Module, Tensor]:
    """Cast a model and a batch to a dtype, and the model to the batch's layout."""
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    return model.to(getattr(torch, dtype)).to(memory_format=layout), x.to(getattr(torch, dtype))


def _eager(model: nn.Module, x: Tensor, dtype: str) -> Run:
    model, x = _cast(model, x, dtype)
    return lambda: model(x)


def _compiled(model: nn.Module, x: Tensor, dtype: str, *, freezing: bool) -> Run:
    model, x = _cast(model, x, dtype)
    compiled = torch.compile(model, fullgraph=True, options={'freezing': freezing})
    with raised_recompile_limit(1000):
        compiled(x)
    return lambda: compiled(x)


def _torchscript(model: nn.Module, x: Tensor, dtype: str) -> Run:
    model, x = _cast(model, x, dtype)
    frozen = torch.jit.freeze(torch.jit.trace(model, x, check_trace=False))
    return lambda: frozen(x)


def _onnxruntime(model: nn.Module, x: Tensor, dtype: str) -> Run:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'model.onnx'
        torch.onnx.export(model, (x,), path, dynamo=True, external_data=False, verbose=False, input_names=['x'])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    inputs = {'x': x.numpy()}
    return lambda: session.run(None, inputs)[0]


def _openvino(model: nn.Module, x: Tensor, dtype: str) -> Run:
    import openvino

    exported = openvino.convert_model(model, example_input=x, input=tuple(x.shape))
    compiled, inputs = compile_openvino(exported, dtype), x.numpy()
    return lambda: compiled(inputs)[0]


def compile_openvino(model: Any, dtype: str) -> Any:
    """Compile a model by OpenVINO for low latency, with as many threads as PyTorch.

    Args:
        model: OpenVINO's model, or the path of a file that it reads.
        dtype: `float32` or `bfloat16`.

    Returns:
        OpenVINO's compiled model.

    Raises:
        ModuleNotFoundError: OpenVINO is not installed.

    Example:
        >>> compile_openvino('model.onnx', 'float32')  # doctest: +SKIP
    """
    import openvino

    settings = {
        'INFERENCE_PRECISION_HINT': {'float32': 'f32', 'bfloat16': 'bf16'}[dtype],
        'INFERENCE_NUM_THREADS': torch.get_num_threads(),
        'PERFORMANCE_HINT': 'LATENCY',
    }
    return openvino.Core().compile_model(model, 'CPU', settings)


def _ncnn(model: nn.Module, x: Tensor, dtype: str, *, winograd: bool) -> Run:
    import ncnn
    import pnnx

    net = ncnn.Net()
    net.opt.num_threads = torch.get_num_threads()
    net.opt.use_winograd_convolution = winograd
    for half in ('fp16_packed', 'fp16_storage', 'fp16_arithmetic', 'bf16_storage'):
        setattr(net.opt, f'use_{half}', False)
    with tempfile.TemporaryDirectory() as folder:
        stem = f'{folder}/model'
        files = dict(ptpath=f'{stem}.pt', ncnnparam=f'{stem}.ncnn.param', ncnnbin=f'{stem}.ncnn.bin')
        files |= dict(pnnxparam=f'{stem}.pnnx.param', pnnxbin=f'{stem}.pnnx.bin', pnnxonnx=f'{stem}.pnnx.onnx')
        files |= dict(pnnxpy=f'{stem}_pnnx.py', ncnnpy=f'{stem}_ncnn.py')
        with silenced():
            pnnx.export(model, inputs=(x,), fp16=False, **files)
        net.load_param(files['ncnnparam'])
        net.load_model(files['ncnnbin'])
    image = ncnn.Mat(x[0].numpy()).clone()

    def run() -> Any:
        extractor = net.create_extractor()
        extractor.input('in0', image)
        return extractor.extract('out0')[1].numpy()[None]

    return run


def _with(prepare: Callable[..., Run], **options: Any) -> Callable[[nn.Module, Tensor, str], Run]:
    return lambda model, x, dtype: prepare(model, x, dtype, **options)


_TORCH: dict[str, Any] = dict(dtypes=('float32', 'bfloat16'), layouts=('contiguous', 'channels_last'))
_NCNN: dict[str, Any] = dict(packages=('ncnn', 'pnnx'), extra='ncnn', max_batch=1)

RUNTIMES = {
    'eager': Runtime(prepare=_eager, is_quick=True, **_TORCH),
    'compile': Runtime(prepare=_with(_compiled, freezing=False), **_TORCH),
    'compile-freezing': Runtime(prepare=_with(_compiled, freezing=True), **_TORCH),
    'torchscript': Runtime(prepare=_torchscript, is_quick=True, **_TORCH),
    'onnxruntime': Runtime(
        prepare=_onnxruntime, packages=('onnx', 'onnxscript', 'onnxruntime'), extra='onnxruntime', is_quick=True
    ),
    'openvino': Runtime(
        prepare=_openvino, packages=('openvino',), extra='openvino', is_quick=True, dtypes=('float32', 'bfloat16')
    ),
    'ncnn': Runtime(prepare=_with(_ncnn, winograd=True), is_quick=True, **_NCNN),
    'ncnn-no-winograd': Runtime(prepare=_with(_ncnn, winograd=False), **_NCNN),
}
"""Runtimes by name: the only place that knows them."""
