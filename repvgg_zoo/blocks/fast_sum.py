"""The branches of a block, and faster ways to sum them where nothing can tell the difference.

Two of them, in eager mode on CPUs:

- With fixed statistics and without gradients the branches are folded for this one call (arXiv 2101.03697,
  section 3.3), which costs some per cent of a batch. Nothing is remembered, so nothing can be out of date.
- With the statistics of the batch, `train_branches` computes the 1x1 branch again in the backward pass.

Whatever else there is, takes the branches themselves: hooks on them, stochastic depth, frozen or synchronised
statistics and mixed precision in training, scripting, tracing, export, compilation, functional transforms. What is
patched into PyTorch's own classes, rather than into a module, is not seen.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropBlock2d, DropPath
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.nn.utils.weight_norm import WeightNorm

from ..reparam.fold import BNStats, fold_block
from .recompute import train_branches

__all__ = [
    'ConvNorm',
    'evaluating',
    'full_precision',
    'is_centred',
    'one_by_one',
    'refresh_kernels',
    'subsample',
    'sum_branches',
]

_one_by_one = ContextVar('one_by_one', default=False)

_MIN_PIXELS_TO_FOLD = 1024
"""Pixels of the output, over the batch, from which on folding takes less time than what it spares.

Both grow with the product of input and output channels, so one number holds for every block.
"""


class ConvNorm(nn.Sequential):
    """A convolution without bias, then normalisation: `(N, C_in, H, W)` to `(N, C_out, H', W')`."""

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int,
        *,
        norm_layer: Callable[..., nn.Module],
        device: Any = None,
        dtype: Any = None,
        **conv_kwargs: Any,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        conv = nn.Conv2d(in_chs, out_chs, kernel_size, bias=False, **conv_kwargs, **dd)
        super().__init__(OrderedDict(conv=conv, bn=norm_layer(out_chs, **dd)))


@contextmanager
def one_by_one() -> Iterator[None]:
    """Run the branches themselves meanwhile, in this thread: for comparisons of the two forms, above all."""
    token = _one_by_one.set(True)
    try:
        yield
    finally:
        _one_by_one.reset(token)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode meanwhile, branches one by one and without gradients; every submodule's mode is kept."""
    modes = {submodule: submodule.training for submodule in module.modules()}
    module.eval()
    try:
        with torch.no_grad(), one_by_one():
            yield
    finally:
        for submodule in module.modules():
            submodule.training = modes.get(submodule, module.training)


def refresh_kernels(module: nn.Module) -> None:
    """Compute anew what pruning and weight normalisation by hooks compute before each forward pass.

    A step of an optimizer since then has changed what they compute from.
    """
    if hooks := [(hook, m) for m in module.modules() for hook in m._forward_pre_hooks.values()]:
        from torch.nn.utils.prune import BasePruningMethod

        for hook, submodule in hooks:
            if isinstance(hook, (BasePruningMethod, WeightNorm)):
                hook(submodule, ())


def full_precision(module: nn.Module) -> AbstractContextManager[Any]:
    """Without autocast on a module's device meanwhile: kernels are computed as precisely as their parameters."""
    kind = next(module.parameters()).device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def subsample(x: Tensor, stride: int) -> Tensor:
    """Every stride-th pixel, which is all that a strided 1x1 convolution reads.

    Reading them first spares the backward pass of a strided 1x1 convolution over three channels_last channels,
    which corrupts memory in PyTorch 2.14 on some x86 CPUs. A pool of one pixel, unlike a slice, gets its size
    from the convolution's formula, without which torch.export cannot tell that the branches fit together.
    """
    return x if stride == 1 else F.avg_pool2d(x, 1, stride)


def sum_branches(
    x: Tensor,
    conv_kxk: nn.Module,
    conv_1x1: nn.Module,
    identity: nn.Module | None,
    drops: Iterable[nn.Module],
) -> Tensor | None:
    """The sum of a block's branches up to rounding, or None where they must be run one by one.

    `(N, C_in, H, W)` to `(N, C_out, H / stride, W / stride)`, rounded up. `drops` are the modules of stochastic
    depth and DropBlock. Gradients and running statistics come out as with the branches.
    """
    if type(x) is not Tensor or x.device.type != 'cpu' or x.dim() != 4 or x.layout is not torch.strided:
        return None
    if not _is_plain_eager():
        return None
    if not (_is_conv_norm(conv_kxk) and _is_conv_norm(conv_1x1)):
        return None
    kxk, point = conv_kxk.conv, conv_1x1.conv
    norms = [conv_kxk.bn, conv_1x1.bn] + ([] if identity is None else [identity])
    if not (_fit_together(kxk, point) and all(map(_is_fixed_by_statistics, norms)) and not any(map(_drops, drops))):
        return None

    pixels = x.shape[0] * -(-x.shape[2] // kxk.stride[0]) * -(-x.shape[3] // kxk.stride[1])
    modes = {norm.training for norm in norms}
    if modes == {False} and pixels >= _MIN_PIXELS_TO_FOLD and not _records(x, [kxk, point, *norms]):
        stats = [BNStats(bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps) for bn in norms]
        wide = torch.promote_types(kxk.weight.dtype, torch.float32)  # as the branches are summed in
        kernel, bias = fold_block(kxk.weight, stats[0], point.weight, *stats[1:], sum_dtype=wide)
        return kxk._conv_forward(x, kernel, bias)
    if modes == {True} and pixels > 1 and _trains_plainly(x, [kxk, point], norms):
        return train_branches(x, kxk, point, norms)
    return None


def _is_conv_norm(branch: nn.Module) -> bool:
    """Whether a branch is a convolution without bias and then something, and no more."""
    if type(branch) is not ConvNorm or list(branch._modules) != ['conv', 'bn'] or _is_changed(branch):
        return False
    conv = branch.conv
    return type(conv) is nn.Conv2d and type(conv.weight) is nn.Parameter and conv.bias is None and not _is_changed(conv)


def _fit_together(kxk: nn.Conv2d, point: nn.Conv2d) -> bool:
    """Whether the 1x1 kernel acts on the centre tap of the other one."""
    return (
        is_centred(kxk)
        and (point.kernel_size, point.stride, point.padding) == ((1, 1), (1, 1), (0, 0))
        and point.groups == kxk.groups
    )


def _is_fixed_by_statistics(norm: nn.Module) -> bool:
    """Whether a normalisation is linear in eval mode, with the running statistics."""
    known = type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm) and not _is_changed(norm)
    return known and norm.running_mean is not None and norm.running_var is not None


def _drops(module: nn.Module) -> bool:
    """Whether stochastic depth or DropBlock does, or may do, anything."""
    idle = type(module) is nn.Identity or (type(module) in (DropPath, DropBlock2d) and not module.training)
    return not idle or _is_changed(module)


def is_centred(conv: nn.Conv2d) -> bool:
    """Whether the padding puts the kernel's centre tap on the first pixel."""
    return conv.padding == tuple(d * (k // 2) for d, k in zip(conv.dilation, conv.kernel_size, strict=True))


def _records(x: Tensor, modules: Iterable[nn.Module]) -> bool:
    """Whether autograd would record the branches."""
    parameters = (parameter for module in modules for parameter in module.parameters())
    return torch.is_grad_enabled() and (x.requires_grad or any(parameter.requires_grad for parameter in parameters))


def _trains_plainly(x: Tensor, convs: list[nn.Conv2d], norms: list[nn.BatchNorm2d]) -> bool:
    """Whether `train_branches` does what the branches would do."""
    state = ('weight', 'bias', 'momentum', 'num_batches_tracked')
    return (
        all(type(norm) is nn.BatchNorm2d and all(getattr(norm, s) is not None for s in state) for norm in norms)
        and all(norm.track_running_stats for norm in norms)
        and len(set(norms)) == len(norms)  # the order in which they see their batches would be another one
        and all(conv.padding_mode == 'zeros' for conv in convs)
        and not torch.is_autocast_enabled('cpu')
        and x.dtype in (torch.float32, torch.float64)
        and all(parameter.dtype == x.dtype for module in (*convs, *norms) for parameter in module.parameters())
    )


def _is_plain_eager() -> bool:
    """Whether operations are run as they come, with no hook on all modules."""
    return not (
        torch.compiler.is_compiling()
        or _one_by_one.get()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )


def _is_changed(module: nn.Module) -> bool:
    """Whether a module does anything but what its class says."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or not module.__dict__.keys().isdisjoint(('forward', '_conv_forward'))
    )
