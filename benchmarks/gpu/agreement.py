"""Both forms of every variant, in every dtype and layout, against the branches in float64."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import timm
import torch
from torch import nn

from repvgg_zoo.reparam.evaluation import disable_fast_path
from repvgg_zoo.reparam.tolerance import rel_diff

LAYOUTS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
DTYPES = {'float32': torch.float32, 'tf32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
FORMS = ('branches', 'folded for the call', 'deploy')


def agreement(names: Iterable[str], device: str, *, px: int) -> list[dict[str, Any]]:
    """Largest differences from the branches in float64, relative to the largest output."""
    return [row for name in names for row in _of_variant(name, torch.device(device), px)]


@torch.no_grad()
def _of_variant(name: str, device: torch.device, px: int) -> Iterator[dict[str, Any]]:
    model = calibrated(timm.create_model(name, device=device), px)
    deploy = copy.deepcopy(model).switch_to_deploy()
    x = torch.randn(2, 3, px, px, generator=torch.Generator().manual_seed(1)).to(device)
    with disable_fast_path():
        expected = copy.deepcopy(model).double()(x.double())
    for dtype, kind in DTYPES.items():
        if dtype == 'tf32' and device.type != 'cuda':
            continue
        for layout, memory_format in LAYOUTS.items():
            row: dict[str, Any] = {'model': name, 'dtype': dtype, 'layout': layout}
            for form in FORMS:
                net = copy.deepcopy(deploy if form == 'deploy' else model).to(kind).to(memory_format=memory_format)
                with disable_fast_path() if form == 'branches' else nullcontext(), tf32(allowed=dtype == 'tf32'):
                    row[form] = rel_diff(net(x.to(kind).contiguous(memory_format=memory_format)), expected)
            yield row


@contextmanager
def tf32(*, allowed: bool) -> Iterator[None]:
    """Let cuDNN and cuBLAS round float32 to TF32 inside the `with` block, or forbid it."""
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    kept = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = allowed
    try:
        yield
    finally:
        for backend, value in zip(backends, kept, strict=True):
            backend.allow_tf32 = value


@torch.no_grad()
def calibrated(model: nn.Module, px: int) -> nn.Module:
    """Give norms an affine part of their own and the statistics of a random batch. With fresh ones wrong folds pass."""
    generator = torch.Generator().manual_seed(0)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        norm.weight.copy_(0.5 + torch.rand(norm.weight.shape, generator=generator))
        norm.bias.copy_(0.4 * torch.rand(norm.bias.shape, generator=generator) - 0.2)
    model.train()(torch.randn(4, 3, px, px, generator=generator).to(norms[0].weight))
    for norm in norms:
        norm.momentum = 0.1
        norm.running_var += 0.1 * norm.running_var.mean()  # a channel that the batch left silent is not amplified
    return model.eval()
