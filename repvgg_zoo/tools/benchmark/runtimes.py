"""Runtimes: each turns a module and a batch into a function that runs that batch.

To add a runtime, write its `prepare` function and add a row to `RUNTIMES`.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..._compat import raised_recompile_limit
from ..console import silenced

__all__ = ['COMPILE_OPTIONS', 'DTYPES', 'RUNTIMES', 'Runtime', 'autocast', 'cast', 'compile_openvino']

DTYPES = ('float32', 'bfloat16', 'float16', 'amp_bfloat16', 'amp_float16')
"""`amp_` is float32 under autocast, as timm's benchmark calls it; the others are the dtype of weights and images."""
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
    devices: tuple[str, ...] | None = ('cpu',)
    """Types of the devices that it runs on. None for all."""
    max_batch: int | None = None

    @property
    def missing(self) -> list[str]:
        """Packages that are not installed."""
        return [package for package in self.packages if importlib.util.find_spec(package) is None]

    def refusals(
        self, *, batches: Sequence[int], dtypes: Sequence[str], layouts: Sequence[str], device: str = 'cpu'
    ) -> list[str]:
        """Say which of these batch sizes, dtypes and layouts it does not take, and if it does not run on the device."""
        said = []
        if self.devices is not None and torch.device(device).type not in self.devices:
            said.append(f'runs on --device {" or ".join(self.devices)} and not on {device}')
        if others := [dtype for dtype in dtypes if dtype not in self.dtypes]:
            said.append(f'takes {" and ".join(self.dtypes)} and not {", ".join(others)}')
        if others := [layout for layout in layouts if layout not in self.layouts]:
            said.append(f'takes {" and ".join(self.layouts)} and not {", ".join(others)}')
        if self.max_batch and (others := [str(batch) for batch in batches if batch > self.max_batch]):
            said.append(f'takes batch sizes up to {self.max_batch} and not {", ".join(others)}')
        return said


def autocast(device: str, dtype: str) -> torch.autocast:
    """Autocast for the dtypes that start with `amp_`, and nothing for others.

    Example:
        >>> with autocast('cpu', 'amp_bfloat16'):
        ...     nn.Linear(1, 1)(torch.ones(1, 1)).dtype
        torch.bfloat16
    """
    is_mixed = dtype.startswith('amp_')
    return torch.autocast(device, getattr(torch, dtype.removeprefix('amp_')) if is_mixed else None, enabled=is_mixed)


def cast(model: nn.Module, x: Tensor, dtype: str) -> tuple[nn.Module, Tensor]:
    """Cast a model and a batch to a dtype, float32 under autocast, and the model to the batch's layout.

    Example:
        >>> cast(nn.Linear(1, 1), torch.ones(1, 1), 'bfloat16')[1].dtype
        torch.bfloat16
    """
    kind = torch.float32 if dtype.startswith('amp_') else getattr(torch, dtype)
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    return model.to(kind).to(memory_format=layout), x.to(kind)


def _eager(model: nn.Module, x: Tensor, dtype: str) -> Run:
    model, x = cast(model, x, dtype)

    def run() -> Tensor:
        with autocast(x.device.type, dtype):
            return model(x)

    return run


def _compiled(model: nn.Module, x: Tensor, dtype: str, *, options: dict[str, Any]) -> Run:
    model, x = cast(model, x, dtype)
    compiled = torch.compile(model, fullgraph=True, **options)

    def run() -> Tensor:
        with autocast(x.device.type, dtype):
            return compiled(x)

    with raised_recompile_limit(1000):
        run()
    return run


def _torchscript(model: nn.Module, x: Tensor, dtype: str) -> Run:
    model, x = cast(model, x, dtype)
    frozen = torch.jit.freeze(torch.jit.trace(model, x, check_trace=False))
    return lambda: frozen(x)


def _tensorrt(model: nn.Module, x: Tensor, dtype: str) -> Run:
    import torch_tensorrt

    model, x = cast(model, x, dtype)
    compiled = torch_tensorrt.compile(model, inputs=[x], enabled_precisions={x.dtype})
    return lambda: compiled(x)


def _onnxruntime(model: nn.Module, x: Tensor, dtype: str, *, provider: str = 'CPUExecutionProvider') -> Run:
    import onnxruntime

    if provider not in (providers := onnxruntime.get_available_providers()):
        raise RuntimeError(
            f'this onnxruntime has no {provider}, only {", ".join(providers)}; onnxruntime-gpu in its place brings it'
        )
    model, x = cast(model, x, dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'model.onnx'
        torch.onnx.export(model, (x,), path, dynamo=True, external_data=False, verbose=False, input_names=['x'])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=[provider])
    binding = session.io_binding()  # the images are on the device before the clock starts
    device = ('cpu', 0) if x.device.type == 'cpu' else (x.device.type, x.device.index or 0)
    binding.bind_ortvalue_input('x', onnxruntime.OrtValue.ortvalue_from_numpy(x.numpy(force=True), *device))
    binding.bind_output(session.get_outputs()[0].name)

    def run() -> Any:
        session.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()[0]

    return run


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


COMPILE_OPTIONS: dict[str, dict[str, Any]] = {
    'compile': {},
    'compile-freezing': dict(options={'freezing': True}),
    'compile-reduce-overhead': dict(mode='reduce-overhead'),
    'compile-max-autotune': dict(mode='max-autotune'),
}
"""Arguments of `torch.compile`. The last two use CUDA graphs on a GPU."""
_TORCH: dict[str, Any] = dict(dtypes=DTYPES, layouts=('contiguous', 'channels_last'), devices=None)
_ONNX: dict[str, Any] = dict(packages=('onnx', 'onnxscript', 'onnxruntime'), extra='onnxruntime')
_ONNX_GPU: dict[str, Any] = dict(_ONNX, dtypes=('float32', 'float16'), devices=('cuda',))
_NCNN: dict[str, Any] = dict(packages=('ncnn', 'pnnx'), extra='ncnn', max_batch=1)

RUNTIMES = {
    'eager': Runtime(prepare=_eager, is_quick=True, **_TORCH),
    **{name: Runtime(prepare=_with(_compiled, options=options), **_TORCH) for name, options in COMPILE_OPTIONS.items()},
    'torchscript': Runtime(prepare=_torchscript, is_quick=True, **(_TORCH | dict(dtypes=_TORCH['dtypes'][:3]))),
    'onnxruntime': Runtime(prepare=_onnxruntime, is_quick=True, **_ONNX),
    'onnxruntime-cuda': Runtime(prepare=_with(_onnxruntime, provider='CUDAExecutionProvider'), **_ONNX_GPU),
    'onnxruntime-tensorrt': Runtime(prepare=_with(_onnxruntime, provider='TensorrtExecutionProvider'), **_ONNX_GPU),
    'torch-tensorrt': Runtime(
        prepare=_tensorrt, packages=('torch_tensorrt',), dtypes=('float32', 'float16'), devices=('cuda',)
    ),
    'openvino': Runtime(
        prepare=_openvino, packages=('openvino',), extra='openvino', is_quick=True, dtypes=('float32', 'bfloat16')
    ),
    'ncnn': Runtime(prepare=_with(_ncnn, winograd=True), is_quick=True, **_NCNN),
    'ncnn-no-winograd': Runtime(prepare=_with(_ncnn, winograd=False), **_NCNN),
}
"""Runtimes by name: the only place that knows them."""
