"""The fold of a normalisation into the convolution before it, in any network: W' = W · γ / sqrt(σ² + ε)."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from .._compat import has_hooks
from .comparison import largest_difference
from .evaluation import eval_outputs
from .fold import BNStats, FoldError, check_finite, exact_dtype
from .geometry import check_has_values
from .pairs import uses_of_convs
from .stale_optimizers import forget_replaced, remember_replaced
from .tolerance import MAX_REL_DIFF
from .transplant import mark_folded, places_of, snapshot

__all__ = ['PairFold', 'plan_pairs']

_logger = logging.getLogger(__name__)
_KEPT = ('drop', 'act')
"""Parts of a normalisation that come after it."""


def plan_pairs(module: nn.Module, sample: Any, *, without: Collection[nn.Module]) -> Iterator[PairFold]:
    """Plan the fold of each convolution whose output one norm reads and nothing else.

    Args:
        module: Any module.
        sample: An input, as for `pairs.conv_norm_pairs`.
        without: Modules that are folded otherwise.

    Raises:
        FoldError: Values of a pair are out of range or not here.
    """
    for use in uses_of_convs(module, sample):
        if use.norm is None or use.shared_with is not None or use.kernel_reader is not None:
            continue
        norm = module.get_submodule(use.norm)
        if use.conv in without or norm in without:
            continue
        try:
            reason = _not_plain(use.conv, norm) or _not_proved(use.conv, norm)
            if reason is None:
                yield PairFold(module, use.conv, norm)
        except FoldError as error:
            raise FoldError(f'cannot fold {use.norm!r} into {use.path!r}: {error}; nothing was changed') from None
        if reason is not None:
            _logger.info('switch_to_deploy: %s and %s are left as they are: %s', use.path, use.norm, reason)


class PairFold:
    """A planned fold of a normalisation into a convolution, computed, and not yet put in."""

    def __init__(self, root: nn.Module, conv: nn.Conv2d, norm: nn.Module) -> None:
        """Compute the fold; raise `FoldError` if its values are out of range."""
        self._conv, self.norm, self._places = conv, norm, places_of(root, norm)
        self._kernel, self._bias = _folded(conv, norm)

    def apply(self) -> Callable[[], None]:
        """Put the fold in; return a function that undoes it."""
        conv, undo = self._conv, snapshot(self._conv)
        replaced = [*conv.parameters(), *self.norm.parameters()]
        kept = set(self.norm.get_submodule('act').parameters()) if hasattr(self.norm, 'act') else set()
        replaced = [p for p in replaced if p not in kept]
        conv.weight, conv.bias = self._kernel, self._bias
        mark_folded(conv)
        rest = _rest(self.norm)
        for parent, name in self._places:
            setattr(parent, name, rest)
        norm = self.norm
        was_training, norm.training = norm.training, False  # if other code still calls it, its statistics stay
        remember_replaced(replaced)

        def restore() -> None:
            forget_replaced(replaced)
            norm.training = was_training
            for parent, name in self._places:
                setattr(parent, name, norm)
            undo()

        return restore


@torch.no_grad()
def _folded(conv: nn.Conv2d, norm: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """W' = W · scale, b' = b · scale + shift, computed in float64, in the dtype of the kernel."""
    exact = exact_dtype(conv.weight)
    scale, shift = (t.to(conv.weight.device) for t in BNStats.read(norm).scale_shift(exact))
    kernel = (conv.weight.to(exact) * scale.view(-1, 1, 1, 1)).to(conv.weight.dtype)
    bias = (shift if conv.bias is None else shift + conv.bias.to(exact) * scale).to(conv.weight.dtype)
    for name, values in (('kernel', kernel), ('bias', bias)):
        check_finite(name, values)
    requires_grad = conv.weight.requires_grad
    return nn.Parameter(kernel, requires_grad=requires_grad), nn.Parameter(bias, requires_grad=requires_grad)


def _rest(norm: nn.Module) -> nn.Module:
    """Return what a norm does after it has normalised: timm's drop and act by name."""
    parts = [
        (name, part) for name, part in norm.named_children() if name in _KEPT and not isinstance(part, nn.Identity)
    ]
    rest = nn.Sequential(OrderedDict(parts)) if parts else nn.Identity()
    rest.training = norm.training
    return rest


def _not_plain(conv: nn.Conv2d, norm: Any) -> str | None:
    """Tell why a pair is more than a convolution and a batch normalisation; None if it is not."""
    if is_parametrized(conv) or 'weight' not in dict(conv.named_parameters(recurse=False)):
        return 'the kernel is computed from other parameters'
    if has_hooks(conv) or has_hooks(norm):
        return 'they have hooks, which would see other values'
    if norm.running_mean is None or any(name not in _KEPT for name, _ in norm.named_children()):
        return f'{type(norm).__name__} is no batch normalisation of fixed statistics'
    return None


def _not_proved(conv: nn.Conv2d, norm: nn.Module) -> str | None:
    """Tell how far the fold is from what the two compute; None if it is exact."""
    check_has_values(conv.weight, 'convolution')
    BNStats.read(norm).check()
    try:
        diff, largest = _difference(conv, norm)
    except Exception as error:  # code of others may raise errors of any class
        return f'they fail on random pixels in float64 ({type(error).__name__}: {error})'
    if not diff <= MAX_REL_DIFF[torch.float64] * largest:
        return f'a fold would change outputs of up to {largest:.3g} by {diff:.3g}'
    return None


def _difference(conv: nn.Conv2d, norm: nn.Module) -> tuple[float, float]:
    """Fold a copy in float64; return the largest difference on random pixels and the largest output."""
    conv, norm = copy.deepcopy(conv).cpu().double(), copy.deepcopy(norm).cpu().double()
    px = max(d * (k - 1) + 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, conv.in_channels, px, px, dtype=torch.float64, generator=generator, device='cpu')
    before = eval_outputs(nn.Sequential(conv, norm), x)
    conv.weight, conv.bias = _folded(conv, norm)
    return largest_difference(before, eval_outputs(nn.Sequential(conv, _rest(norm)), x))
