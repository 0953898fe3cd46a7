"""RepOptimizer: the plain network, trained as if it had constant-scale branches (arXiv 2205.15242)."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from ..blocks.multi_branch import MultiBranchBlock
from ..reparam.fold import exact_dtype

__all__ = ['rep_optimizer']


class _Equivalent(NamedTuple):
    """Multipliers and constant part of a plain kernel, each `(C_out, C_in / groups, 3, 3)`.

    By them the kernel takes the steps of a constant-scale block with scales s (3x3) and t (1x1).
    """

    sgd: Tensor
    """s² + t² at the centre tap, s² elsewhere."""
    adamw: Tensor
    """|s| + |t| at the centre tap, |s| elsewhere."""
    constant: Tensor
    """The kernel of the identity branch. Weight decay does not act on it."""


@torch.no_grad()
def rep_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, like: nn.Module, *, load: bool = True
) -> torch.optim.Optimizer:
    """Make an optimizer train a plain model step for step as it would train a constant-scale one (RepOptimizer).

    A constant-scale block computes BN(s · 3x3(x) + t · 1x1(x) + u · x) with fixed scales s, t, u of each channel
    (arXiv 2205.15242, section 3.1). Its kernel is W = s · W3 + t · W1 + u · I. The kernel of a plain block takes the
    same steps under these conditions (section 3.2 and appendix A):

    - With SGD, gradients are multiplied by s² + t² at the centre tap, and by s² elsewhere.
    - With AdamW, updates are multiplied by |s| + |t| at the centre tap, and by |s| elsewhere.
    - Weight decay does not act on u · I, because the identity branch of `csla` is constant. The authors' code has
      1 + s² + t² on the diagonal instead, as if that branch were trained.

    The steps are equal up to rounding. With AdamW they are also equal only up to its `eps`, which the branches compare
    to gradients of other sizes. Gradients are multiplied in place in `step()`, with a closure (as from Lightning) after
    it has computed them. Whatever reads gradients between `backward()` and `step()` sees those of the plain kernels:
    `clip_grad_norm_`, Lightning's `gradient_clip_val` and a gradient scaler that looks for overflow. Their norm is not
    that of the branches, so a limit that was found for these clips more or less often here.

    Schedules work, and the optimizer's state is saved and loaded as usual. The state does not hold the multipliers.
    Call this again, with `load=False`, after you make the optimizer anew or copy it.

    Args:
        optimizer: `torch.optim.SGD` or `torch.optim.AdamW` over the parameters of `model`.
        model: A model with `block='plain'`, which may be compiled or wrapped in DDP.
        like: The same variant with `block='csla'`. Its scales make the multipliers. To search for scales
            (section 3.3), let those of another such model require gradients, train it on any data set, and copy them.
        load: Give the model the kernels, normalisation and classifier of `like` to start from. Pass False to resume.

    Returns:
        The optimizer.

    Raises:
        TypeError: The optimizer is of another class.
        ValueError: One of four cases:

            - `model` has no `plain` blocks, or `like` no `csla` blocks,
            - the models differ in variant, input channels or eps,
            - the optimizer is fused or maximizes,
            - the optimizer lacks a kernel of the model that requires gradients.

    Example:
        >>> import timm, torch, repvgg_zoo
        >>> model = timm.create_model('test_repvgg', block='plain')
        >>> like = timm.create_model('test_repvgg', block='csla')
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> optimizer = repvgg_zoo.rep_optimizer(optimizer, model, like)
        >>> logits = model(torch.ones(2, 3, 32, 32))
        >>> logits.sum().backward()
        >>> optimizer.step()
    """
    for option in ('fused', 'maximize'):
        if any(group.get(option) for group in optimizer.param_groups):
            raise ValueError(
                f'the optimizer was made with {option}=True, which rep_optimizer cannot correct; leave the option out'
            )
    if type(optimizer) not in (torch.optim.SGD, torch.optim.AdamW):
        raise TypeError(
            f'the optimizer is a {type(optimizer).__name__}; it can be torch.optim.SGD or torch.optim.AdamW'
        )
    model, like = unwrap_model(model), unwrap_model(like)
    plain, scaled = _blocks(model, 'plain'), _blocks(like, 'csla')
    if plain.keys() != scaled.keys() or not plain:
        raise ValueError(
            "the models must be of one variant, with block='plain' and like=… with block='csla'; there are "
            f'{len(plain)} plain blocks in {type(model).__name__} and {len(scaled)} constant-scale ones in '
            f'{type(like).__name__}'
        )
    kernels = {path: block.branches.kxk.conv.weight for path, block in plain.items()}
    for path, block in plain.items():
        ours = tuple(kernels[path].shape), block.branches.kxk.bn.eps
        theirs = tuple(scaled[path].branches.kxk.branch.conv.weight.shape), scaled[path].get_submodule('norm').eps
        if ours != theirs:
            raise ValueError(
                'the models must be of one variant, take the same images and normalise alike; the kernel and eps of '
                f'{path or "the block"} are {ours} and {theirs}'
            )
    equivalents = {kernel: _equivalent(scaled[path], kernel) for path, kernel in kernels.items()}
    held = {id(parameter) for group in optimizer.param_groups for parameter in group['params']}
    if missing := [path for path, kernel in kernels.items() if kernel.requires_grad and id(kernel) not in held]:
        raise ValueError(
            f'the optimizer lacks {len(missing)} of the {len(kernels)} kernels of the model, first that of '
            f'{missing[0] or "the block"}; give it all parameters that require gradients'
        )
    if load:
        _load(model, like, scaled)
    for handle in _hooks.pop(optimizer, ()):
        handle.remove()
    before: _Before = {}
    if type(optimizer) is torch.optim.SGD:
        prepare = partial(_multiply_gradients, equivalents)
        hooks = [optimizer.register_step_pre_hook(partial(_once_there_are_gradients, prepare))]
    else:
        prepare = partial(_remember, equivalents, before)
        hooks = [
            optimizer.register_step_pre_hook(partial(_once_there_are_gradients, prepare)),
            optimizer.register_step_post_hook(partial(_multiply_updates, equivalents, before)),
        ]
    _hooks[optimizer] = hooks
    return optimizer


_hooks: WeakKeyDictionary[torch.optim.Optimizer, list[Any]] = WeakKeyDictionary()
"""The hooks of each optimizer, which a second call replaces."""


def _load(model: nn.Module, like: nn.Module, scaled: dict[str, MultiBranchBlock]) -> None:
    """Load all of `like` into the model, except heads of another size and heads that `like` lacks."""
    state_dict = {
        key: value
        for key, value in like.state_dict().items()
        if '.branches.' not in f'.{key}' and '.identity.' not in f'.{key}'
    }
    for path, block in scaled.items():
        prefix = f'{path}.' if path else ''
        exact = exact_dtype(block.branches['kxk'].scale)
        state_dict[f'{prefix}branches.kxk.conv.weight'] = block.sum_of_branches(exact)[0]
        for name in block.get_submodule('norm').state_dict():
            state_dict[f'{prefix}branches.kxk.bn.{name}'] = state_dict.pop(f'{prefix}norm.{name}')
    own = model.state_dict()
    misfits = [key for key in own if key not in state_dict or state_dict[key].shape != own[key].shape]
    if others := [key for key in misfits if not _HEAD.search(key)]:
        raise ValueError(
            f'the models must be of one variant; they differ in {others[0]} (load=False takes only the multipliers)'
        )
    model.load_state_dict({key: own[key] if key in misfits else state_dict[key] for key in own})


_HEAD = re.compile(r'(?:^|\.)(?:head|aux_heads\.\d+)\.')


def _once_there_are_gradients(
    prepare: Callable[[torch.optim.Optimizer], None],
    optimizer: torch.optim.Optimizer,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Prepare a step now, or with a closure right after it: `step()` calls it, and then moves the parameters."""
    closure = args[1] if len(args) > 1 else kwargs.get('closure')
    if closure is None:
        prepare(optimizer)
        return None

    def closure_then_prepare() -> Any:
        loss = closure()
        prepare(optimizer)
        return loss

    return (optimizer, closure_then_prepare), {}


def _blocks(model: nn.Module, name: str) -> dict[str, MultiBranchBlock]:
    blocks = {path: m for path, m in model.named_modules() if isinstance(m, MultiBranchBlock)}
    return {path: block for path, block in blocks.items() if block.block == name and block.branches is not None}


def _equivalent(block: MultiBranchBlock, like: Tensor) -> _Equivalent:
    kernel = block.branches['kxk'].equivalent_kernel_bias(like.dtype)[0]
    s, t = (block.branches[name].scale.detach().view(-1, 1, 1, 1) for name in ('kxk', '1x1'))
    sgd, adamw = s.square().expand_as(kernel).clone(), s.abs().expand_as(kernel).clone()
    sgd[:, :, 1:2, 1:2] += t.square()
    adamw[:, :, 1:2, 1:2] += t.abs()
    constant = torch.zeros_like(kernel)
    if block.identity is not None:
        constant[:, :, 1:2, 1:2] += block.identity.equivalent_kernel_bias(like.dtype, like=kernel)[0]
    return _Equivalent(sgd.to(like), adamw.to(like), constant.to(like))


def _held(optimizer: torch.optim.Optimizer, equivalents: dict[Tensor, _Equivalent]) -> Any:
    """Yield the group, the kernel and its multipliers for each kernel that the step moves."""
    for group in optimizer.param_groups:
        for kernel in group['params']:
            if kernel in equivalents and kernel.grad is not None:
                yield group, kernel, equivalents[kernel]


@torch.no_grad()
def _multiply_gradients(equivalents: dict[Tensor, _Equivalent], optimizer: torch.optim.Optimizer) -> None:
    for group, kernel, equivalent in _held(optimizer, equivalents):
        kernel.grad.mul_(equivalent.sgd).sub_(equivalent.constant, alpha=group['weight_decay'])


_Before: TypeAlias = dict[Tensor, tuple[Tensor, Any]]
"""For each kernel that a step moves: its value before the step, and lr · weight decay."""


@torch.no_grad()
def _remember(equivalents: dict[Tensor, _Equivalent], before: _Before, optimizer: torch.optim.Optimizer) -> None:
    before.clear()
    for group, kernel, _multipliers in _held(optimizer, equivalents):
        before[kernel] = kernel.clone(), group['lr'] * group['weight_decay']


@torch.no_grad()
def _multiply_updates(equivalents: dict[Tensor, _Equivalent], before: _Before, *_: Any) -> None:
    for kernel, (value, decay) in before.items():
        equivalent, decayed = equivalents[kernel], value * (1 - decay)
        kernel.copy_(decayed + decay * equivalent.constant + equivalent.adamw * (kernel - decayed))
    before.clear()
