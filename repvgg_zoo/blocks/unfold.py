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
from ..reparam.fold import FoldError
from ..reparam.geometry import as_pair, geometry_of
from ..reparam.stale_optimizers import remember_replaced
from .base import ReparamBlock
from .batches import images_of
from .bn_statistics import match_bn_statistics
from .factory import block_type
from .set_kernel import set_equivalent_kernel_bias

__all__ = ['replace_modules', 'unfold', 'unfold_state_dict']


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
        ValueError: One of seven cases, each of which leaves the module as it was:

            - the module has no block of this package,
            - it has a block that `prepare_qat` prepared,
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
    if prepared := [path or 'the module' for path, m in found.items() if m.quantizer is not None]:
        raise ValueError(f'{prepared[0]} is of prepare_qat; unfold first, then prepare the model')
    if compiled := [path for path in found if path.rpartition('.')[2] == '_orig_mod']:
        raise ValueError(
            f'{compiled[0].rpartition(".")[0] or "the module"} is a block that was compiled by itself, and its '
            'compiled code would go on with the old block; unfold first, then compile'
        )
    images = None if batches is None else list(images_of(batches))
    convs = {folded: conv for folded in found.values() if (conv := folded.reparam_conv) is not None}
    unfolded: dict[nn.Module, nn.Module] = {
        folded: _training_form(folded, conv, make, make_norm, generator) for folded, conv in convs.items()
    }
    whole = unfolded.get(module, module)
    replace_modules(module, unfolded)
    if images is not None:
        try:
            match_bn_statistics(whole, images)
        except BaseException:
            replace_modules(module, {made: folded for folded, made in unfolded.items()})
            raise
    remember_replaced(parameter for conv in convs.values() for parameter in conv.parameters())
    for submodule in whole.modules():
        if callable(finish := getattr(submodule, '_on_unfold', None)):
            finish(block)
    return whole


def replace_modules(module: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replace modules inside a module, wherever they stand."""
    for path, old in list(module.named_modules(remove_duplicate=False)):
        if old in replacements and path:
            parent, _, name = path.rpartition('.')
            setattr(module.get_submodule(parent), name, replacements[old])


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
