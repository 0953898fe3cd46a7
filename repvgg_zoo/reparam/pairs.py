"""Convolutions and the normalisation behind them, found by what is computed.

The order of modules does not tell which norm follows which convolution. One forward pass does: a convolution and a
norm are a pair if the norm reads the output of the convolution, and nothing else does.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._compat import TorchDispatchMode
from .evaluation import call, evaluating, tensors_in

__all__ = ['ConvUse', 'conv_norm_pairs', 'sample_of', 'uses_of_convs']

_NORM_ATTRIBUTES = ('running_mean', 'running_var')


@dataclass(frozen=True, kw_only=True)
class ConvUse:
    """What a forward pass does with a convolution."""

    path: str
    conv: nn.Conv2d
    calls: int
    """Number of times that it is called."""
    norm: str | None
    """Path of the norm that reads the output, if nothing else reads it and the norm runs once."""
    shared_with: str | None
    """Another path of the same module or of a module with the same kernel."""
    kernel_reader: str | None
    """What reads the kernel without calling the convolution."""


def conv_norm_pairs(module: nn.Module, sample: Any) -> dict[str, str]:
    """Find the convolutions whose output is read by one norm and by nothing else.

    Args:
        module: Any module. It runs once, in eval mode and without gradients.
        sample: An input of the module. A tuple holds several arguments, a mapping holds arguments by name.

    Returns:
        Paths of norms by the paths of their convolutions.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> conv_norm_pairs(net, torch.ones(1, 3, 8, 8))
        {'0': '1'}
    """
    uses = uses_of_convs(module, sample)
    return {use.path: use.norm for use in uses if use.norm is not None and use.shared_with is None}


def sample_of(module: nn.Module) -> Tensor:
    """Make random pixels for a module: of the size that a timm model names, else of 64 x 64 pixels.

    Raises:
        ValueError: The module has no convolution, so that nothing tells the number of channels.
    """
    convs = {path: m for path, m in module.named_modules() if isinstance(m, nn.Conv2d)}
    if not convs:
        raise ValueError(f'no convolution in {type(module).__name__}')
    config: Any = getattr(module, 'pretrained_cfg', None) or {}
    config = config if isinstance(config, Mapping) else vars(config)
    first = next(iter(convs.values()))
    chs, height, width = config.get('input_size') or (first.in_channels, 64, 64)
    named = config.get('first_conv') or ()
    # TResNet's first convolution reads blocks of pixels, which a layer of timm makes
    blocks: list[Any] = [layer for layer in module.modules() if type(layer).__name__ == 'SpaceToDepth']
    pixels = blocks[0].bs ** 2 if blocks else 1
    for path in [named] if isinstance(named, str) else named:
        chs = convs[path].in_channels // pixels if path in convs else chs  # the model may be made for other inputs
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, chs, height, width, generator=generator, device='cpu')
    return x.to(like.device).to(like.dtype)


def uses_of_convs(module: nn.Module, sample: Any) -> list[ConvUse]:
    """Run a module once, in eval mode and without gradients, and tell what becomes of every convolution's output.

    Args:
        module: Any module.
        sample: As for `conv_norm_pairs`.

    Returns:
        All modules of class `nn.Conv2d` or of a class derived from it, in the order of the modules.
    """
    convs = {path: m for path, m in module.named_modules() if isinstance(m, nn.Conv2d)}
    norms = {path: m for path, m in module.named_modules() if all(hasattr(m, name) for name in _NORM_ATTRIBUTES)}
    readers = _Readers({path: conv.weight for path, conv in convs.items() if isinstance(conv.weight, Tensor)})
    handles = []
    for path, conv in convs.items():
        handles.append(conv.register_forward_pre_hook(readers.enter(path)))
        handles.append(conv.register_forward_hook(readers.leave_conv(path), always_call=True))
    for path, norm in norms.items():
        handles.append(norm.register_forward_pre_hook(readers.enter(path)))
        handles.append(norm.register_forward_hook(readers.leave_norm, always_call=True))
    for path, layer in module.named_modules():
        if next(layer.children(), None) is None and path not in convs and path not in norms:
            handles.append(layer.register_forward_pre_hook(readers.note(path, layer)))
    try:
        with evaluating(module), readers:
            outputs = call(module, sample)
    finally:
        for handle in handles:
            handle.remove()
    for tensor in tensors_in(outputs):
        readers.read(tensor, 'the output of the model')
    shared = _shared_paths(module, convs)
    return [
        ConvUse(
            path=path,
            conv=conv,
            calls=readers.calls[path],
            norm=_only_norm(readers, path, norms),
            shared_with=shared.get(path),
            kernel_reader=readers.kernel_readers.get(path),
        )
        for path, conv in convs.items()
    ]


def _only_norm(readers: _Readers, path: str, norms: Mapping[str, nn.Module]) -> str | None:
    found = readers.readers[path]
    if readers.calls[path] != 1 or len(set(found)) != 1 or found[0] not in norms:
        return None
    return found[0] if readers.calls[found[0]] == 1 else None


def _shared_paths(module: nn.Module, convs: Mapping[str, nn.Conv2d]) -> dict[str, str]:
    """Return, for each convolution that stands at two places or shares its kernel, another of these paths."""
    # held, because a computed kernel is another tensor each time, and can get the id of one that is gone
    kernels: dict[nn.Module, Tensor] = {conv: conv.weight for conv in convs.values()}
    places = defaultdict(list)
    for path, submodule in module.named_modules(remove_duplicate=False):
        if submodule in kernels:
            places[id(kernels[submodule])].append(path)
    found = {path: places[id(kernels[conv])] for path, conv in convs.items()}
    return {path: next(p for p in same if p != path) for path, same in found.items() if len(same) > 1}


class _Readers(TorchDispatchMode):
    """Notes what reads the outputs and the kernels of convolutions, down to operators that autograd does not see."""

    def __init__(self, kernels: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.readers: dict[str, list[str]] = defaultdict(list)
        self.kernel_readers: dict[str, str] = {}
        self.calls: Counter[str] = Counter()
        self._running: list[str] = []
        self._outputs: dict[int, tuple[str, Tensor]] = {}  # held, or another tensor would get the id
        self._kernels = {id(kernel): (path, kernel) for path, kernel in kernels.items()}  # held, too

    def enter(self, path: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.calls[path] += 1
            self._running.append(path)

        return hook

    def leave_conv(self, path: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            self._running.pop()
            if isinstance(output, Tensor):
                self._outputs[id(output)] = (path, output)

        return hook

    def leave_norm(self, _: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._running.pop()

    def note(self, path: str, layer: nn.Module) -> Any:
        """Count a layer as a reader that may do nothing in eval mode, such as dropout."""

        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if not isinstance(layer, nn.Identity):
                for tensor in tensors_in(inputs):
                    self.read(tensor, path)

        return hook

    def read(self, tensor: Tensor, reader: str) -> None:
        if (found := self._outputs.get(id(tensor))) is not None:
            self.readers[found[0]].append(reader)
        path, _ = self._kernels.get(id(tensor), (None, None))
        if path is not None and path not in self._running:
            self.kernel_readers[path] = reader

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        reader = self._running[-1] if self._running else str(func)
        for tensor in tensors_in((args, kwargs)):
            self.read(tensor, reader)
        return func(*args, **kwargs)
