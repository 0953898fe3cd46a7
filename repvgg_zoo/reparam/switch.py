"""The switch to the deploy form, for any module that holds RepVGG blocks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..blocks.fast_sum import evaluating, is_centred, refresh_kernels
from ..checkpoints.state_dicts import FAMILY_BRANCH
from .fold import BNStats, FoldError, fold_block
from .foreign import BLOCK_NAMES, BlockNames
from .stale_optimizers import forget_folded, remember_folded

__all__ = ['switch_to_deploy']

_logger = logging.getLogger(__name__)
ModuleT = TypeVar('ModuleT', bound=nn.Module)

# Largest difference of the outputs, relative to the largest output, that rounding explains: the fold moves
# each kernel by an ulp or two, and some fifty layers amplify that a few hundred times. Half precision rounds
# every activation too. A wrong fold is off by the size of the outputs.
_MAX_RELATIVE_DIFF = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}


@torch.inference_mode(False)  # in which parameters would be made that can never be trained
def switch_to_deploy(module: ModuleT, *, verify: Any = None) -> ModuleT:
    """Fold every RepVGG block inside a module into one convolution, in place, and return the module.

    The blocks may be this package's, timm's or the official code's, wherever they are: a bare block, a
    classifier, a segmentation network, a feature extractor, a DDP or compiled module. Blocks of the deploy
    form are left alone, so a second call changes nothing. The running statistics are folded whatever the
    mode of the module, hence the deploy form gives what `eval()` gave. Optimizers, averages and DDP
    wrappers made before still hold the old parameters: make them anew if training goes on. The `step()` of
    such an optimizer raises `RuntimeError`. A thread that runs a model of this package in eval mode meanwhile
    gets the same outputs, up to rounding, or an `AttributeError`; to serve without a gap, switch a copy.

    Args:
        verify: An input of the module. If given, both forms are run on it in eval mode and the largest
            difference is logged.

    Raises:
        FoldError: A block cannot be folded, or with `verify` the forms differ by more than rounding explains
            (1e-3 of the largest output in float32). The module is then as it was before, and so it is after any
            other error if `verify` is given; without it, running out of memory can leave it half switched, since the
            branches are released one block after the other.
        ValueError: There is no RepVGG block in the module, or one in a traced, scripted or exported graph.
    """
    for path, submodule in module.named_modules():
        in_graph = isinstance(submodule, (torch.fx.GraphModule, torch.jit.ScriptModule))
        if in_graph and _has_branches(submodule):
            raise ValueError(
                f'{path or "the module"} is a {type(submodule).__name__}, whose branches are fixed in a graph; switch '
                'to the deploy form before tracing, scripting or exporting'
            )
    blocks = list(_find_blocks(module))
    if not blocks:
        raise ValueError(f'no RepVGG block in {type(module).__name__}, neither of the training nor of the deploy form')
    folds = [_plan(name, block, names) for name, block, names in blocks if not _is_deploy(block, names)]
    if not folds:
        return module
    if any(fold.block.training for fold in folds):
        _warn_of_train_mode()
    reference = None if verify is None else _eval_outputs(module, verify)
    undo = []
    try:
        for fold in folds:
            restore = fold.apply()
            if reference is not None:  # the undoing holds the branches, which are released one by one otherwise
                undo.append(restore)
        if reference is not None:
            _compare(reference, _eval_outputs(module, verify))
    except BaseException:
        for restore in undo:
            restore()
        raise
    for submodule in module.modules():
        if callable(finish := getattr(submodule, '_on_switch_to_deploy', None)):
            finish()
        if isinstance(submodule, nn.parallel.DistributedDataParallel) and next(submodule.buffers(), None) is None:
            submodule.broadcast_buffers = False  # it fails to broadcast none, and had some when it was made
    return module


@cache  # timm's own helper switches block by block
def _warn_of_train_mode() -> None:
    _logger.warning(
        'switch_to_deploy: the module is in train mode; the deploy form reproduces the outputs of eval(), '
        'not those of train(), which normalises with the statistics of the batch'
    )


class _Fold(NamedTuple):
    """A block that was found to be foldable."""

    block: nn.Module
    parts: tuple[str, ...]
    """The attributes that hold the branches."""
    reparam_conv: str
    folded_conv: Callable[[], nn.Conv2d]

    def apply(self) -> Callable[[], None]:
        """Put the folded convolution in the place of the branches; the result undoes it."""
        block = self.block
        modules, attributes = dict(block._modules), dict(block.__dict__)
        branches = [getattr(block, name, None) for name in self.parts]
        # First in, then out: RepVGGBlock.forward relies on it. `None` as a module of the block, which setattr would
        # leave of a branch, is what libraries trip over.
        block._modules[self.reparam_conv] = self.folded_conv()
        block.__dict__.pop(self.reparam_conv, None)
        for name in self.parts:
            block.__dict__[name] = None
            block._modules.pop(name, None)
        if isinstance(getattr(block, 'deploy', None), bool):  # the official blocks keep their form in a flag
            block.deploy = True
        parameters = [p for branch in branches if branch is not None for p in branch.parameters()]
        remember_folded(parameters)

        def restore() -> None:
            forget_folded(parameters)
            block.__dict__.clear()
            block.__dict__.update(attributes)
            block._modules.clear()
            block._modules.update(modules)

        return restore


def _find_blocks(module: nn.Module) -> Iterator[tuple[str, nn.Module, BlockNames | None]]:
    """Paths, blocks, and what their parts are called; blocks of the family fold themselves."""
    for path, submodule in module.named_modules():
        path = path or type(submodule).__name__
        if hasattr(submodule, 'folded_parts'):
            yield path, submodule, None
            continue
        for names in BLOCK_NAMES:
            branches = (getattr(submodule, names.conv_kxk, None), getattr(submodule, names.conv_1x1, None))
            trains = all(hasattr(branch, 'conv') and hasattr(branch, names.norm) for branch in branches)
            if trains or _is_deploy(submodule, names):
                yield path, submodule, names
                break


def _has_branches(graph: nn.Module) -> bool:
    """Whether there are blocks of the training form, which those of the family are known by the paths of in a graph."""
    if any(FAMILY_BRANCH.search(path) for path in graph.state_dict()):
        return True
    return not all(_is_deploy(block, names) for _, block, names in _find_blocks(graph))


def _is_deploy(block: nn.Module, names: BlockNames | None) -> bool:
    return isinstance(getattr(block, names.reparam_conv if names else 'reparam_conv', None), nn.Conv2d)


def _plan(path: str, block: nn.Module, names: BlockNames | None) -> _Fold:
    """Check everything that could make a fold fail, so that none fails after the first was done."""
    refresh_kernels(block)
    try:
        if names is None:
            block.check_foldable()
            return _Fold(block, block.folded_parts, 'reparam_conv', block.folded_conv)
        _check_foldable(block, names)
    except FoldError as error:
        raise FoldError(f'cannot fold block {path!r}: {error}; nothing was changed') from None
    parts = (names.conv_kxk, names.conv_1x1, names.identity)
    return _Fold(block, parts, names.reparam_conv, partial(_folded_conv, block, names))


def _check_foldable(block: nn.Module, names: BlockNames) -> None:
    kxk, point = getattr(block, names.conv_kxk), getattr(block, names.conv_1x1)
    conv = kxk.conv
    if not is_centred(conv):
        raise FoldError(
            f'its padding {conv.padding} does not centre a {conv.kernel_size} kernel of dilation {conv.dilation}'
        )
    if point.conv.kernel_size != (1, 1) or point.conv.groups != conv.groups:
        raise FoldError(f'its point convolution is {point.conv}, beside {conv}')
    for norm in (getattr(kxk, names.norm), getattr(point, names.norm), getattr(block, names.identity, None)):
        if norm is not None:
            BNStats.of(norm).check()


@torch.no_grad()
def _folded_conv(block: nn.Module, names: BlockNames) -> nn.Conv2d:
    kxk, point = getattr(block, names.conv_kxk), getattr(block, names.conv_1x1)
    identity = getattr(block, names.identity, None)
    weight, bias = fold_block(
        kxk.conv.weight,
        BNStats.of(getattr(kxk, names.norm)),
        point.conv.weight,
        BNStats.of(getattr(point, names.norm)),
        None if identity is None else BNStats.of(identity),
        bias_kxk=kxk.conv.bias,
        bias_1x1=point.conv.bias,
    )
    conv = nn.Conv2d(
        kxk.conv.in_channels,
        kxk.conv.out_channels,
        kxk.conv.kernel_size,
        stride=kxk.conv.stride,
        padding=kxk.conv.padding,
        dilation=kxk.conv.dilation,
        groups=kxk.conv.groups,
        padding_mode=kxk.conv.padding_mode,
        device='meta',
    )
    requires_grad = kxk.conv.weight.requires_grad
    conv.weight = nn.Parameter(weight, requires_grad=requires_grad)
    conv.bias = nn.Parameter(bias, requires_grad=requires_grad)
    return conv.train(block.training)


def _eval_outputs(module: nn.Module, batch: Any) -> list[Tensor]:
    """The module's outputs in eval mode, as a flat list."""
    with evaluating(module):
        return [output.detach().clone() for output in _tensors(module(batch))]


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)


def _compare(reference: list[Tensor], outputs: list[Tensor]) -> None:
    for before, after in zip(reference, outputs, strict=True):
        diff = (after.double() - before.double()).abs().max().item()
        largest = before.double().abs().max().item()
        bound = _MAX_RELATIVE_DIFF[before.dtype] * largest
        _logger.info('switch_to_deploy: largest difference %.3g, largest output %.3g', diff, largest)
        if not diff <= bound:
            raise FoldError(
                f'the deploy form differs by {diff:.3g} from the training form, of outputs up to {largest:.3g}; '
                f'in {before.dtype} rounding explains {bound:.3g}. The module is left in its training form'
            )
