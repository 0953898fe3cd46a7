"""The fold of a known block of another network: run on a float64 copy, prove, put the result into the block."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._compat import copy_hooks
from .comparison import largest_difference
from .evaluation import eval_outputs
from .fold import BATCH_NORMS, BNStats, FoldError
from .foreign import KNOWN_BLOCKS, KnownBlock
from .geometry import GATHER
from .kernel_hooks import refresh_kernels
from .stale_optimizers import forget_replaced, remember_replaced
from .tolerance import MAX_REL_DIFF
from .transplant import Transplant, mark_folded, places_of

__all__ = ['KnownFold', 'find_known_blocks']


def find_known_blocks(module: nn.Module) -> Iterator[tuple[str, nn.Module, KnownBlock]]:
    """Yield path, block and row of every known block of the training form that is in no other one."""
    inside: set[nn.Module] = set()
    for path, submodule in module.named_modules():
        if submodule not in inside and (row := _row_of(submodule)) is not None:
            inside.update(submodule.modules())
            yield path or type(submodule).__name__, submodule, row


def _row_of(module: nn.Module) -> KnownBlock | None:
    return next((row for row in KNOWN_BLOCKS if row.matches(module)), None)


class KnownFold:
    """A planned fold of a known block, computed and proved, and not yet put in."""

    def __init__(self, root: nn.Module, block: nn.Module, row: KnownBlock) -> None:
        """Fold a copy of a block.

        Args:
            root: The module in which the block is.
            block: The block.
            row: Its row of the table.

        Raises:
            FoldError: The block cannot be folded.
        """
        _check_values(block)
        refresh_kernels(block)
        self.block = block
        try:
            trial, originals = _float64_copy(block)
            inputs = _inputs(trial, row)
            expected = [eval_outputs(trial, x.clone()) for x in inputs]
            # new layers draw weights, for nothing
            with torch.no_grad(), torch.random.fork_rng(devices=[]), _Float64Factories(), _affine(trial):
                folded = _fold_all(trial).double().eval()
        except FoldError:
            raise
        except Exception as error:  # code of others may raise errors of any class
            raise FoldError(
                f'its {type(block).__name__} fails in its own fold or on random pixels, in float64 '
                f'({type(error).__name__}: {error}); merge or remove adapters, quantizers, hooks and frozen norms first'
            ) from error
        kept = {originals[m] for m in folded.modules() if m in originals}
        removed = [m for m in block.modules() if m not in kept]
        actual = [eval_outputs(folded, x.clone()) for x in inputs]
        _compare(expected, actual, block)
        self._places = [] if originals.get(folded) is block else places_of(root, block)
        self._transplant = Transplant(block, folded, originals)
        self.touched = {*removed, *self._transplant.changed_modules()}
        """Modules that the fold removes or changes."""

    def changes_nothing(self) -> bool:
        """Tell whether there was nothing to fold."""
        return self._transplant.is_empty()

    def apply(self) -> Callable[[], None]:
        """Put the result in; return a function that undoes it."""
        before = list(self.block.parameters())
        result, undo = self._transplant.apply()
        mark_folded(result)
        if self._places:
            copy_hooks(self.block, result)
        for parent, name in self._places:
            setattr(parent, name, result)
        left = set(result.parameters())
        replaced = [p for p in before if p not in left]
        remember_replaced(replaced)

        def restore() -> None:
            forget_replaced(replaced)
            for parent, name in self._places:
                setattr(parent, name, self.block)
            undo()

        return restore


def _check_values(block: nn.Module) -> None:
    for path, parameter in block.named_parameters():
        if hasattr(parameter, 'full_tensor'):
            raise FoldError(f'its {path} is sharded over processes; {GATHER}')
        if parameter.is_meta:
            raise FoldError(f"its {path} is on device 'meta' and has no values; load the weights first")
    for norm in block.modules():
        if isinstance(norm, BATCH_NORMS) and norm.running_mean is not None:
            BNStats.read(norm).check()


def _float64_copy(block: nn.Module) -> tuple[nn.Module, dict[nn.Module, nn.Module]]:
    """Copy a block to float64 and the CPU, in eval mode; return each module of the copy and its original, too."""
    memo: dict[int, Any] = {}
    trial = copy.deepcopy(block, memo).cpu().double().eval()
    originals = {memo[id(m)]: m for m in block.modules()}
    for path, norm in list(trial.named_modules()):
        if isinstance(norm, nn.SyncBatchNorm) and path:  # methods of others ask for nn.BatchNorm2d
            plain = _PlainBatchNorm(norm.num_features, norm.eps, affine=False, device='cpu', dtype=torch.float64)
            plain.weight, plain.bias, plain.affine = norm.weight, norm.bias, norm.affine
            plain.running_mean, plain.running_var = norm.running_mean, norm.running_var
            originals[plain] = originals[norm]
            parent, _, name = path.rpartition('.')
            setattr(trial.get_submodule(parent), name, plain.eval())
    return trial, originals


class _PlainBatchNorm(nn.BatchNorm2d):
    """Of any number of dimensions, as SyncBatchNorm is."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


@contextmanager
def _affine(trial: nn.Module) -> Iterator[None]:
    """Give norms without affine parameters ones and zeros inside the `with` block: methods of others read them."""
    norms: list[Any] = [m for m in trial.modules() if isinstance(m, BATCH_NORMS) and m.weight is None]
    for norm in norms:
        norm.weight = nn.Parameter(torch.ones(norm.num_features))
        norm.bias = nn.Parameter(torch.zeros(norm.num_features))
        norm.affine = True
    try:
        yield
    finally:
        for norm in norms:
            norm.weight = norm.bias = None
            norm.affine = False


def _fold_all(module: nn.Module) -> nn.Module:
    """Fold a block and the blocks inside it; return what it has become."""
    if (row := _row_of(module)) is not None:
        result = getattr(module, row.fold)() if isinstance(row.fold, str) else row.fold(module)
        module = module if result is None else result
    for name, child in list(module.named_children()):
        if (folded := _fold_all(child)) is not child:
            setattr(module, name, folded)
    return module


class _Float64Factories(TorchFunctionMode):
    """Makes new tensors in float64, on the CPU, in this thread: some methods of others give no dtype."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func in _FACTORIES:
            options['dtype'] = options.get('dtype') or torch.float64
            options['device'] = options.get('device') or 'cpu'
        return func(*args, **options)


_FACTORIES = (torch.empty, torch.ones, torch.zeros)


def _inputs(trial: nn.Module, row: KnownBlock) -> list[Tensor]:
    """Draw inputs that a block reads: a few pixels, more than a kernel reaches."""
    first, channels = _first_layer(trial, row)
    convs = [m for m in trial.modules() if isinstance(m, nn.Conv2d)]
    reaches = [d * (k - 1) for conv in convs for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    px = max(3 + max(reaches, default=2), row.min_px)
    if isinstance(first, nn.Linear):
        shape: tuple[int, ...] = (2, px, channels)
    elif isinstance(first, nn.Conv1d):
        shape = (2, channels, px)
    else:
        shape = (2, channels) if row.reads_features else (2, channels, px, px)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0), device='cpu')
    return [x, 1e3 * x]  # large ones pass what saturates, and wake what is silent


def _first_layer(trial: nn.Module, row: KnownBlock) -> tuple[nn.Module, int]:
    """Return the layer that reads the input, and the number of channels of that."""
    for path in row.parts:
        for layer in trial.get_submodule(path).modules():
            if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
                return layer, layer.in_channels
            if isinstance(layer, nn.Linear):
                return layer, layer.in_features
            if isinstance(layer, BATCH_NORMS):
                return layer, layer.num_features
    raise FoldError(f'none of its {", ".join(row.parts)} has channels; put back the layers that were there')


def _compare(expected: list[list[Tensor]], actual: list[list[Tensor]], block: nn.Module) -> None:
    for before, after in zip(expected, actual, strict=True):
        if [t.shape for t in before] != [t.shape for t in after]:
            raise FoldError(f'the fold of its {type(block).__name__} has outputs of other shapes; leave it as it is')
        for old, new in zip(before, after, strict=True):
            diff, largest = largest_difference([old], [new])
            if not math.isfinite(largest):
                raise FoldError(f'its {type(block).__name__} gives values that are not finite; load its weights')
            if not diff <= MAX_REL_DIFF[torch.float64] * largest:
                raise FoldError(
                    f'its {type(block).__name__} computes something else than its parts: a fold would change outputs '
                    f'of up to {largest:.3g} by {diff:.3g}. Merge or remove the norm, scale, activation, hook, adapter '
                    'or quantizer that may be the cause'
                )
