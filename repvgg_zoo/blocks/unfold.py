"""The way back from one convolution to branches that compute the same, to train on."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from timm.layers import get_norm_layer
from torch import Tensor, nn

from .._compat import copy_hooks, has_hooks
from ..checkpoints.state_dicts import StateDict, check_fit
from ..reparam.evaluation import evaluating
from ..reparam.fold import BATCH_NORMS, BNStats, FoldError, centred_kernel, exact_dtype, norm_scale, safe_divide
from ..reparam.geometry import as_pair, geometry_of
from ..reparam.stale_optimizers import remember_replaced
from .base import ReparamBlock
from .factory import block_type
from .fast_paths import full_precision

__all__ = ['match_bn_statistics', 'set_equivalent_kernel_bias', 'unfold', 'unfold_state_dict']

_NOISE = 0.1
"""Size of the random part of each branch, relative to the kernel that the branches share."""

_GAIN = 3.0
"""Size of a kernel in front of its normalisation, relative to its size behind.

The larger a normalised kernel, the less a step of training turns it: by 1 / gain². With a gain of 1, fine-tuning the
bundled weights for four epochs ended a point below the same from their training form; with 3 and with 10 it was on a
par.
"""


@torch.inference_mode(False)  # parameters that are made in inference mode can never be trained
def unfold(
    module: nn.Module,
    *,
    block: str = 'repvgg',
    batches: Iterable[Any] | None = None,
    norm_layer: str | Callable[..., nn.Module] | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Give every deploy-form block inside a module its branches back, in place: the way back from `switch_to_deploy`.

    In eval mode the module computes what it computed. The branches share the kernel; a tenth of their size is random,
    so that branches of one kind learn different things. Without `batches`, the normalisation layers have mean 0 and
    variance 1, so the outputs in train mode are others at first. The branches have no stochastic depth and no
    DropBlock, because the deploy form does not keep them. Make optimizers anew: the `step()` of one that holds the old
    parameters raises `RuntimeError`.

    Args:
        module: Any module with deploy-form blocks of this package.
        block: The block type, a name of `repvgg_zoo.BLOCKS`.
        batches: A few batches of the training data, as tensors or as tuples that begin with one, for
            `match_bn_statistics`. All are held in memory, so take only a few of a loader, by `itertools.islice`.
        norm_layer: Batch normalisation of the branches, a layer or timm's name of it; by default `nn.BatchNorm2d` with
            the eps that the blocks were made with.
        generator: Draws the random part, on the CPU; by default torch's own generator does.

    Returns:
        The module, or the new block if the module is a bare block.

    Raises:
        ValueError: One of six cases, each of which leaves the module as it was:

            - the module has no block of this package,
            - it has a block of the training form,
            - it has a block that was compiled by itself, or whose convolution was changed by hand,
            - `block` is unknown,
            - `batches` holds no images, too few pixels, or pixels that are not finite,
            - `batches` holds tensors that are not `(N, C, H, W)`.
        TypeError: `batches` holds something else than tensors.

    Example:
        >>> import timm, repvgg_zoo
        >>> model = timm.create_model('test_repvgg.cifar10_deploy', pretrained=True)
        >>> model = repvgg_zoo.unfold(model, block='acb')
        >>> list(model.stem.branches)
        ['kxk', 'kx1', '1xk']
    """
    make = block_type(block)
    make_norm: Callable[..., nn.Module] | None = get_norm_layer(norm_layer)
    found = {path: m for path, m in module.named_modules() if isinstance(m, ReparamBlock)}
    if not found:
        raise ValueError(f'no block of this package in {type(module).__name__}')
    if training := [path or 'the module' for path, m in found.items() if m.reparam_conv is None]:
        raise ValueError(f'{training[0]} is of the training form; switch_to_deploy() comes first')
    if compiled := [path for path in found if path.rpartition('.')[2] == '_orig_mod']:
        raise ValueError(
            f'{compiled[0].rpartition(".")[0] or "the module"} is a block that was compiled by itself, and its '
            'compiled code would go on with the old block; unfold first, then compile'
        )
    images = None if batches is None else _images(batches)
    convs = {folded: conv for folded in found.values() if (conv := folded.reparam_conv) is not None}
    unfolded: dict[nn.Module, nn.Module] = {
        folded: _training_form(folded, conv, make, make_norm, generator) for folded, conv in convs.items()
    }
    whole = unfolded.get(module, module)
    _replace(module, unfolded)
    if images is not None:
        try:
            match_bn_statistics(whole, images)
        except BaseException:
            _replace(module, {made: folded for folded, made in unfolded.items()})
            raise
    remember_replaced(parameter for conv in convs.values() for parameter in conv.parameters())
    for submodule in whole.modules():
        if callable(finish := getattr(submodule, '_on_unfold', None)):
            finish(block)
    return whole


def _replace(module: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replace modules inside a module, wherever they stand."""
    for path, old in list(module.named_modules(remove_duplicate=False)):
        if old in replacements and path:
            parent, _, name = path.rpartition('.')
            setattr(module.get_submodule(parent), name, replacements[old])


def _images(batches: Iterable[Any]) -> list[Tensor]:
    """Return the tensors of batches, and raise if there is anything else."""
    given = [batches] if isinstance(batches, Tensor) else list(batches)
    images: list[Any] = [batch[0] if isinstance(batch, (tuple, list)) and batch else batch for batch in given]
    strangers = [type(batch).__name__ for batch in images if batch is batches or not isinstance(batch, Tensor)]
    if strangers:
        raise TypeError(f'batches is an iterable of tensors or of tuples that begin with one; here is a {strangers[0]}')
    if other := [tuple(batch.shape) for batch in images if batch.dim() != 4]:
        raise ValueError(
            f'batches holds a tensor of shape {other[0]}, which is no (N, C, H, W); a single batch goes in a list'
        )
    images = [batch for batch in images if len(batch)]
    if not images:
        raise ValueError('the batches have no images; give some of the training data')
    return images


def _training_form(
    folded: ReparamBlock,
    conv: nn.Conv2d,
    make: Callable[..., ReparamBlock],
    norm_layer: Callable[..., nn.Module] | None,
    generator: torch.Generator | None,
) -> ReparamBlock:
    try:
        geometry = geometry_of(conv)
    except FoldError as error:
        raise ValueError(f'a block has no branches that compute what it computes: {error}') from None
    is_square = geometry.dilation_rows == geometry.dilation_columns and len(set(as_pair(conv.stride))) == 1
    if not is_square or geometry.inset != (0, 0) or has_hooks(conv) or type(conv) is not nn.Conv2d:
        raise ValueError(
            f'a block has no branches that compute what it computes: its {conv} has hooks, another class, less padding '
            'than half of its kernel, or another stride or dilation in one direction; put that back first'
        )
    unfolded = make(
        conv.in_channels,
        conv.out_channels,
        stride=as_pair(conv.stride)[0],
        dilation=as_pair(conv.dilation)[0],
        groups=conv.groups,
        padding_mode=conv.padding_mode,
        identity=folded.has_identity and as_pair(conv.stride) == (1, 1),
        attn_last=folded.attn_last,
        norm_layer=norm_layer or functools.partial(nn.BatchNorm2d, eps=folded.norm_eps),
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )
    set_equivalent_kernel_bias(unfolded, *folded.equivalent_kernel_bias(), generator=generator)
    if not conv.weight.requires_grad:
        unfolded.requires_grad_(False)
    if conv.weight.shape[1] > 1 and conv.weight.is_contiguous(memory_format=torch.channels_last):
        unfolded.to(memory_format=torch.channels_last)
    unfolded.attn, unfolded.act = folded.attn, folded.act
    copy_hooks(folded, unfolded)
    return unfolded.train(folded.training)


@torch.no_grad()
def set_equivalent_kernel_bias(
    block: ReparamBlock, kernel: Tensor, bias: Tensor, *, generator: torch.Generator | None = None
) -> None:
    """Set the parameters of the branches so that `equivalent_kernel_bias()` is as given: the inverse of the fold.

    The normalisation layers are reset. The branches share the kernel in equal parts, as far as their structure allows.
    The first branch can have any kernel, and so takes the rest.

    Args:
        block: A block of the training form.
        kernel: `(C_out, C_in / groups, 3, 3)`, on any device.
        bias: `(C_out,)`.
        generator: See `unfold`.
    """
    main, *others = block.named_branches().values()
    last_norms: list[Any] = [block.norm] if block.norm is not None else [branch.bn for branch in (main, *others)]
    bias_holder = last_norms[0]
    if bias_holder.bias is None:
        raise ValueError(
            f'the bias of a folded block goes into {bias_holder}, which has none; take one with affine=True'
        )
    for module in block.modules():
        if isinstance(module, BATCH_NORMS):
            module.reset_parameters()
    for norm in last_norms:
        if norm is not None:
            norm.weight /= _GAIN
    own = next(p for p in block.parameters() if p.ndim == 4)  # the weights of a file are on the CPU
    dtype = exact_dtype(own)
    kernel, bias = kernel.to(own.device, dtype), bias.to(own.device, dtype)
    with full_precision(block):
        rest = safe_divide(kernel, norm_scale(block.norm, kernel))
        share = rest / (1 + len(others))
        # of each pair of channels, because their ranges may differ much
        size = share.square().mean((2, 3), keepdim=True).sqrt()
        for branch in others:
            noise = torch.randn(share.shape, dtype=dtype, generator=generator, device='cpu').to(share.device)
            branch.set_kernel(share + _NOISE * size * noise)
        for branch in others:
            rest = rest - _padded(branch.equivalent_kernel_bias(dtype, like=rest)[0], rest)
        main.set_kernel(rest)
        bias_holder.bias += (bias - block.equivalent_kernel_bias(dtype)[1]).to(bias_holder.bias)


def _padded(kernel: Tensor, like: Tensor) -> Tensor:
    return centred_kernel(kernel, like.shape[2], like.shape[3])


@torch.no_grad()
def match_bn_statistics(module: nn.Module, batches: Iterable[Any]) -> None:
    """Set the running statistics of every block to those of data, and keep the outputs of eval mode.

    γ' = s · sqrt(σ'² + ε) and β' = t + μ' · s make up for the new mean μ' and variance σ'². The layer had the scale s
    and the shift t. In train mode the outputs on such data are then near those of eval mode.

    Args:
        module: Any module with training-form blocks of this package.
        batches: Batches of input, as tensors `(N, C, H, W)` or as tuples that begin with one.

    Raises:
        TypeError: `batches` holds something else than tensors.
        ValueError: One of four cases, each of which leaves the module as it was:

            - the module has no block of the training form,
            - `batches` holds no images, or tensors that are not `(N, C, H, W)`,
            - a normalisation layer sees fewer than two pixels,
            - the statistics are not finite.

    Example:
        >>> import timm, torch, repvgg_zoo
        >>> model = timm.create_model('test_repvgg')
        >>> repvgg_zoo.match_bn_statistics(model, [torch.randn(2, 3, 32, 32) for _ in range(2)])
        >>> bool(model.stem.conv_1x1.bn.running_mean.any())
        True
    """
    blocks = [m for m in module.modules() if isinstance(m, ReparamBlock) and m.reparam_conv is None]
    if not blocks:
        raise ValueError(f'no block of the training form in {type(module).__name__}')
    norms = [
        norm
        for block in blocks
        for norm in block.modules()
        if isinstance(norm, BATCH_NORMS) and norm.affine and norm.track_running_stats
    ]
    images = _images(batches) if norms else []
    seen = {norm: _Moments() for norm in norms}
    handles = [norm.register_forward_pre_hook(seen[norm].see) for norm in norms]
    device = next(module.parameters()).device
    try:
        with evaluating(module), torch.compiler.set_stance('force_eager'):  # compiled code does not see hooks
            for batch in images:
                module(batch.to(device))
    finally:
        for handle in handles:
            handle.remove()
    if unseen := sum(moments.count < 2 for moments in seen.values()):
        raise ValueError(f'{unseen} of {len(seen)} normalisation layers saw no more than one pixel of the batches')
    statistics = {norm: moments.mean_and_var(BNStats.of(norm).var.dtype) for norm, moments in seen.items()}
    if infinite := sum(not bool(var.isfinite().all()) for _, var in statistics.values()):
        raise ValueError(
            f'{infinite} of {len(seen)} normalisation layers have statistics of the batches that are not finite; look '
            'for NaN and infinite pixels, and for images that are not prepared as in training'
        )
    for norm, (mean, var) in statistics.items():
        stats = BNStats.of(norm)
        scale, shift = stats.scale_shift(exact_dtype(stats.var))
        stats.mean.copy_(mean)
        stats.var.copy_(var)
        norm.weight.copy_(scale * (stats.var.to(scale) + norm.eps).sqrt())
        norm.bias.copy_(shift + stats.mean.to(scale) * scale)


class _Moments:
    """Mean, and sum of squared distances from it, of each channel over batches (Chan, Golub and LeVeque 1983)."""

    count = 0
    mean: Any = 0.0  # a tensor on the device of the batches, once there was one
    sum_of_squares: Any = 0.0

    def see(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].to(exact_dtype(inputs[0])).transpose(0, 1).flatten(1)
        count, mean = values.shape[1], values.mean(1)
        total, distance = self.count + count, mean - self.mean
        self.sum_of_squares = (
            self.sum_of_squares
            + (values - mean[:, None]).square().sum(1)
            + distance.square() * (self.count * count / total)
        )
        self.mean = self.mean + distance * (count / total)
        self.count = total

    def mean_and_var(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.mean.to(dtype), (self.sum_of_squares / (self.count - 1)).to(dtype)


def unfold_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], *, what: str) -> StateDict:
    """Turn deploy-form weights in timm's layout into weights of a training-form model that computes the same.

    Args:
        model: The training-form model. It is left as it is.
        state_dict: Weights of the deploy form.
        what: Name of the model's variant, for errors.

    Raises:
        CheckpointError: The weights do not fit the model.
        ValueError: The model is on the meta device.
    """
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ValueError("branches have random parts, and the model is on device 'meta'; create it on another device")
    unfolded = copy.deepcopy(model)
    blocks = {path: block for path, block in unfolded.named_modules() if isinstance(block, ReparamBlock)}
    expected = dict(unfolded.state_dict())
    for path, block in blocks.items():
        parts = tuple(f'{path}.{name}.' for name in block.branch_names)
        expected = {key: value for key, value in expected.items() if not key.startswith(parts)}
        kernel, bias = block.equivalent_kernel_bias()
        expected |= {f'{path}.reparam_conv.weight': kernel, f'{path}.reparam_conv.bias': bias}
    check_fit(state_dict, expected, what=what)
    for path, block in blocks.items():
        kernel, bias = (state_dict[f'{path}.reparam_conv.{name}'] for name in ('weight', 'bias'))
        set_equivalent_kernel_bias(block, kernel, bias)
    rest = {key: value for key, value in state_dict.items() if '.reparam_conv.' not in f'.{key}'}
    return unfolded.state_dict() | rest
