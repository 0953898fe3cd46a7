"""The switch to the deploy form, for any module that holds RepVGG blocks: plan, prove, fold, verify, undo."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Protocol, TypeAlias, TypeVar, cast, runtime_checkable

import torch
from torch import nn

from .comparison import check_equal, largest_difference
from .conv_bn import plan_pairs
from .evaluation import eval_outputs
from .fold import FoldError
from .foreign import MULTI_BRANCH_KEY, ForeignBlock
from .geometry import GATHER, Geometry
from .pairs import sample_of
from .stale_optimizers import forget_replaced, remember_replaced
from .tolerance import MAX_REL_DIFF
from .transplant import is_folded
from .trial import KnownFold, find_known_blocks

__all__ = ['Foldable', 'switch_to_deploy']

_logger = logging.getLogger(__name__)
ModuleT = TypeVar('ModuleT', bound=nn.Module)
Plan: TypeAlias = Callable[[], Callable[[], None]]
"""Carries a fold out, and returns a function that undoes it."""


class Replaced(Protocol):
    """A module that took the place of others, and can put them back."""

    def plan_fold(self, root: nn.Module) -> Plan:
        """Check everything, and return what puts the others back into `root` with what they are now."""


@runtime_checkable
class Foldable(Protocol):
    """A block that folds: this package's blocks, and adapters around those of others."""

    branch_names: tuple[str, ...]
    """The attributes of the block that hold the branches."""
    conv_name: str
    """The attribute that holds the folded convolution."""

    def is_deploy(self) -> bool:
        """Tell whether the branches are folded already."""

    def needs_proof(self) -> bool:
        """Tell whether the block may compute something else than the sum of its branches."""

    def check_foldable(self) -> None:
        """Raise `FoldError` if the fold would fail or be wrong."""

    def geometry(self) -> Geometry:
        """Return the geometry of the folded convolution."""

    def folded_conv(self) -> nn.Conv2d:
        """Make the convolution that the branches are in eval mode."""


@torch.inference_mode(False)  # parameters that are made in inference mode can never be trained
def switch_to_deploy(module: ModuleT, *, verify: Any = None, conv_bn: bool = False, sample: Any = None) -> ModuleT:
    """Fold every re-parameterizable block inside a module into one convolution, in place.

    The blocks may be RepVGG blocks of this package, of timm, of the official code or of mmpretrain, the blocks that
    other networks of timm fold by a method of their own (MobileOne, FastViT, RepViT, LeViT, …), and those of RT-DETR
    in transformers, wherever they are: a bare block, a classifier, a segmentation network, a feature extractor, a DDP
    or compiled module. A network that `overparameterize` gave branches gets its own modules back, and blocks of its own
    stay. Blocks of the deploy form stay as they are, so a second call does nothing. The fold takes the
    running statistics in either mode, so the deploy form computes what `eval()` computed (arXiv 2101.03697, section
    3.3). It is computed in float64 and rounded once, to the dtype of the parameters.

    Optimizers, averages and DDP wrappers that were made before still hold the old parameters: make them anew if
    training goes on. The `step()` of such an optimizer raises `RuntimeError`. To serve without a gap, switch a copy.

    Args:
        module: Any module with blocks.
        verify: An input of the module. Both forms then run on it in eval mode, and the largest difference is logged. A
            tuple holds several arguments, a mapping holds arguments by name.
        conv_bn: Fold, too, every batch normalisation that reads the output of one convolution, which nothing else
            reads, in any network. An activation inside the norm stays at its place. The module runs once, on `sample`,
            else on `verify`, else on random pixels.
        sample: An input for `conv_bn`, as for `verify`.

    Returns:
        The module.

    Raises:
        FoldError: A block cannot be folded, or `verify` found a difference that rounding does not explain. The module
            is then as it was. With `verify`, any other error leaves it as it was too. Without, running out of memory
            can leave it half switched, because the branches are released block by block.
        ValueError: There is no such block in the module, or one in a traced, scripted or exported graph; the outputs
            hold nothing to verify; or there is no input for `conv_bn`.

    Example:
        >>> import timm, repvgg_zoo
        >>> model = timm.create_model('test_repvgg', pretrained=True)
        >>> model = repvgg_zoo.switch_to_deploy(model, verify=torch.ones(1, 3, 32, 32))
        >>> model.stem.reparam_conv
        Conv2d(3, 32, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
        >>> resnet = repvgg_zoo.switch_to_deploy(timm.create_model('test_resnet').eval(), conv_bn=True)
        >>> resnet.layer1[0].bn1
        Identity()
    """
    if sample is not None and not conv_bn:
        raise ValueError('sample= is the input for conv_bn=True; to compare both forms, give verify=')
    _refuse_graphs_and_shards(module)
    if conv_bn:
        sample = verify if sample is None else sample
        sample = sample_of(module) if sample is None else sample
    plans, folds_in_train_mode = _plan(module, conv_bn=conv_bn, sample=sample)
    if conv_bn and verify is None:  # other code may hold or read the layers, which only a run shows
        verify = sample
    if folds_in_train_mode:
        _warn_of_train_mode()
    if not plans:
        return module
    reference = None if verify is None else eval_outputs(module, verify)
    if reference == []:
        raise ValueError(
            f'verify= compares tensors of floating-point numbers, and {type(module).__name__} returns none, in tuples, '
            'lists and mappings; leave verify out'
        )
    undo = []
    try:
        while plans:
            restore = plans.pop(0)()
            if reference is not None:  # otherwise the branches are released now
                undo.append(restore)
        if reference is not None:
            check_equal(reference, eval_outputs(module, verify), names=('training form', 'deploy form'))
    except BaseException:
        for restore in reversed(undo):
            restore()
        raise
    for submodule in module.modules():
        if callable(finish := getattr(type(submodule), '_on_switch_to_deploy', None)):
            finish(submodule)
        if isinstance(submodule, nn.parallel.DistributedDataParallel) and next(submodule.buffers(), None) is None:
            submodule.broadcast_buffers = False  # DDP fails to broadcast none if it had some when it was made
    return module


def _plan(module: nn.Module, *, conv_bn: bool, sample: Any) -> tuple[list[Plan], bool]:
    """Plan and check all folds; return them, and tell whether a block is in train mode.

    Raises:
        FoldError: A block cannot be folded.
        ValueError: There is nothing to fold, or no input.
    """
    blocks = list(_find_blocks(module))
    replaced = [(path, m) for path, m in module.named_modules() if _is_replaced(m)]
    known = list(find_known_blocks(module))
    if not (blocks or replaced or known or conv_bn or any(map(is_folded, module.modules()))):
        raise ValueError(
            f'no RepVGG block in {type(module).__name__}, neither of the training nor of the deploy form, and no other '
            'block that folds; conv_bn=True folds batch normalisation into the convolutions of any network'
        )
    training = [(path, block, foldable) for path, block, foldable in blocks if not foldable.is_deploy()]
    for path, block, foldable in training:
        _check(path, block, foldable)
    plans: list[Plan] = [partial(_fold, block, foldable) for _, block, foldable in training]
    touched = {m for _, block, _ in training for m in block.modules()}
    is_training = [block.training for _, block, _ in training]
    for path, stand_in in replaced:
        with _naming(path):
            plans.append(cast('Replaced', stand_in).plan_fold(module))
        touched.update(stand_in.modules())
        is_training.append(stand_in.training)
    for path, block, row in known if not replaced else []:  # a network comes back with its own layers
        with _naming(path):
            fold = KnownFold(module, block, row)
        if not fold.changes_nothing():
            plans.append(fold.apply)
            touched |= fold.touched
            is_training.append(block.training)
    if conv_bn:
        for pair in plan_pairs(module, sample, without=touched):
            plans.append(pair.apply)
            is_training.append(pair.norm.training)
    return plans, any(is_training)


@cache  # timm's own helper switches block by block
def _warn_of_train_mode() -> None:
    _logger.warning(
        'switch_to_deploy: the module is in train mode; the deploy form reproduces the outputs of eval(), '
        'not those of train(), which normalises with the statistics of the batch'
    )


def _refuse_graphs_and_shards(module: nn.Module) -> None:
    fsdp = sys.modules.get('torch.distributed.fsdp')  # nothing is sharded where it was not imported
    sharded = () if fsdp is None else (fsdp.FullyShardedDataParallel, fsdp.FSDPModule)
    for path, submodule in module.named_modules():
        name = path or 'the module'
        in_graph = isinstance(submodule, (torch.fx.GraphModule, torch.jit.ScriptModule))
        if in_graph and _is_graph_of_branches(submodule):
            raise ValueError(
                f'{name} is a {type(submodule).__name__}, whose branches are fixed in a graph; switch to the deploy '
                'form before tracing, scripting or exporting'
            )
        if isinstance(submodule, sharded) and _has_branches(submodule):
            raise FoldError(f'{name} is sharded over processes (FSDP); {GATHER}')


def _has_branches(module: nn.Module) -> bool:
    """Tell whether a module contains training-form blocks."""
    if any(map(_is_replaced, module.modules())):
        return True
    if any(not foldable.is_deploy() for _, _, foldable in _find_blocks(module)):
        return True
    return any(True for _ in find_known_blocks(module))


def _is_graph_of_branches(graph: nn.Module) -> bool:
    """Tell whether a graph contains training-form blocks. Multi-branch blocks are recognised by parameter paths."""
    return any(MULTI_BRANCH_KEY.search(path) for path in graph.state_dict()) or _has_branches(graph)


def _is_replaced(module: nn.Module) -> bool:
    return hasattr(type(module), 'plan_fold')


def _find_blocks(module: nn.Module) -> Iterator[tuple[str, nn.Module, Foldable]]:
    """Yield path, block and fold protocol of every block. The class decides, because wrappers pass attributes on."""
    for path, submodule in module.named_modules():
        if _is_replaced(submodule):
            continue
        is_ours = hasattr(type(submodule), 'folded_conv')
        foldable = cast('Foldable', submodule) if is_ours else ForeignBlock.of(submodule)
        if foldable is not None:
            yield path or type(submodule).__name__, submodule, foldable


def _check(path: str, block: nn.Module, foldable: Foldable) -> None:
    with _naming(path):
        foldable.check_foldable()
        if foldable.needs_proof():
            _prove(block, foldable)


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Name the block in errors."""
    try:
        yield
    except FoldError as error:
        raise FoldError(f'cannot fold block {path!r}: {error}; nothing was changed') from None


def _prove(block: nn.Module, foldable: Foldable) -> None:
    """Fold a copy in float64, and compare both forms on a few pixels of two sizes."""
    geometry = foldable.geometry()
    px = 3 + 2 * max(geometry.dilation_rows or 1, geometry.dilation_columns or 1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, geometry.in_chs or 1, px, px, dtype=torch.float64, generator=generator, device='cpu')
    inputs, name = [x, 1e3 * x], type(block).__name__  # large ones pass what saturates, and wake what is silent
    try:
        trial = copy.deepcopy(block).cpu().double()
        expected = [eval_outputs(trial, pixels) for pixels in inputs]
        if isinstance(foldable, ForeignBlock):
            _fold(trial, ForeignBlock(trial, foldable.names))
        else:
            _fold(trial, cast('Foldable', trial))
        actual = [eval_outputs(trial, pixels) for pixels in inputs]
        differences = [largest_difference(before, after) for before, after in zip(expected, actual, strict=True)]
    except Exception as error:  # code of others may raise errors of any class
        raise FoldError(
            f'its {name} fails on {tuple(x.shape)} random pixels ({type(error).__name__}: {error}), so the fold cannot '
            'prove that it computes the sum of its branches; remove hooks and wrappers first'
        ) from error
    for diff, largest in differences:
        if not diff <= MAX_REL_DIFF[torch.float64] * largest:
            raise FoldError(
                f'its {name} computes something else than the sum of its branches: a fold would change outputs of up '
                f'to {largest:.3g} by {diff:.3g}. Merge or remove the norm, scale, activation, hook, adapter or '
                'quantizer that may be the cause'
            )
    if not any(largest for _, largest in differences):
        raise FoldError(f'its {name} gives only zeros on random pixels, which prove nothing; load its weights')


def _fold(block: nn.Module, foldable: Foldable) -> Callable[[], None]:
    """Replace the branches by the folded convolution; return a function that undoes it."""
    conv = foldable.folded_conv()
    attributes = {name: getattr(block, name, _MISSING) for name in (*foldable.branch_names, foldable.conv_name)}
    children = list(block.named_children())
    was_flagged = getattr(block, _FLAG, None)
    for name in foldable.branch_names:
        _clear(block, name)
        setattr(block, name, None)  # after delattr this is no child; a child of None breaks walks over children
    _clear(block, foldable.conv_name)
    setattr(block, foldable.conv_name, conv)
    if isinstance(was_flagged, bool):
        setattr(block, _FLAG, True)
    replaced = [p for name, child in children if name in foldable.branch_names for p in child.parameters()]
    remember_replaced(replaced)

    def restore() -> None:
        forget_replaced(replaced)
        for name in (*attributes, *(name for name, _ in children)):
            _clear(block, name)
        for name, child in children:  # in the old order, which is also the order of the parameters
            setattr(block, name, child)
        for name, value in attributes.items():
            if value is None:
                setattr(block, name, None)
        if isinstance(was_flagged, bool):
            setattr(block, _FLAG, was_flagged)

    return restore


_MISSING = object()
_FLAG = 'deploy'
"""The attribute in which the official blocks keep their form."""


def _clear(block: nn.Module, name: str) -> None:
    if hasattr(block, name):
        delattr(block, name)
