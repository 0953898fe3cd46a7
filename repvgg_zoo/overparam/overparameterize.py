"""Give the convolutions of any network the branches of a block type."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from ..blocks.batches import images_of
from ..blocks.bn_statistics import match_bn_statistics
from ..blocks.factory import block_type
from ..reparam.comparison import check_equal
from ..reparam.evaluation import eval_outputs
from ..reparam.fold import FoldError
from ..reparam.pairs import sample_of
from .candidates import Candidate, candidates, refusal
from .conv import OverparameterizedConv2d

__all__ = ['Where', 'overparameterize']

_logger = logging.getLogger(__name__)
ModuleT = TypeVar('ModuleT', bound=nn.Module)

Where: TypeAlias = str | Sequence[str] | Callable[[str, nn.Conv2d], bool] | Mapping[str, str] | None
"""Patterns of paths, a function of path and convolution, or block types by patterns of paths."""


@torch.inference_mode(False)  # parameters that are made in inference mode can never be trained
def overparameterize(
    module: ModuleT,
    block: str = 'acb',
    *,
    where: Where = None,
    sample: Any = None,
    batches: Iterable[Any] | None = None,
) -> ModuleT:
    """Replace convolutions of a network by sums of branches that compute the same, in place.

    The network then trains with richer blocks, as ACNet, DBB or DO-Conv have it, and starts from the weights that it
    has. `switch_to_deploy` folds it back to its own modules, with its own keys. Only convolutions with a kernel of more
    than one pixel and of odd size are replaced. Block types that normalise their branches replace a convolution
    together with the batch normalisation behind it; one run of the network finds these pairs. `plain`, `doconv`,
    `expand`, `dirac`, `csla` and `bn_after` need no norm, and so also fit networks whose norms come first.

    Optimizers that were made before still hold the old parameters: make them anew. Their `step()` raises
    `RuntimeError`.

    Args:
        module: Any network that is not compiled, scripted, traced or wrapped.
        block: The block type, a name of `repvgg_zoo.BLOCKS`.
        where: The convolutions to replace, by default all that can be. A string is a pattern of their paths, such as
            `'layer1.*'`, and there may be several. A function takes a path and a convolution, and returns True or
            False. A mapping from patterns to block types replaces `block`. The first pattern that matches counts.
        sample: An input of the network. A tuple holds several arguments, a mapping holds arguments by name. By default
            it is made of random pixels, of the size that a timm model names, else of 64 x 64 pixels.
        batches: A few batches of the training data, for `match_bn_statistics`.

    Returns:
        The module.

    Raises:
        ValueError: One of five cases, each of which leaves the module as it was:

            - `block` is unknown,
            - no convolution can be replaced, or none that a pattern of `where` selects,
            - the network is compiled, scripted, traced or wrapped, or is only one convolution,
            - the network does not run on the sample, or gives nothing to compare,
            - with branches it does not run, does not call them, or gives other outputs.
        TypeError: `where` or `batches` holds something else than what it takes.

    Example:
        >>> import timm, torch, repvgg_zoo
        >>> model = timm.create_model('test_resnet')
        >>> model = repvgg_zoo.overparameterize(model, 'acb', where='layer1.*')
        >>> list(model.layer1[0].conv1.branches)
        ['kxk', 'kx1', '1xk']
        >>> model = repvgg_zoo.switch_to_deploy(model.eval())
        >>> list(model.state_dict()) == list(timm.create_model('test_resnet').state_dict())
        True
    """
    for name in (block, *_patterns(where, block).values()):
        block_type(name)
    _refuse_wrappers(module)
    images = None if batches is None else list(images_of(batches))
    sample = sample_of(module) if sample is None else sample
    before = _outputs(module, sample)
    found = candidates(module, sample)
    chosen = _choose(found, block, where, name=type(module).__name__)
    made_at: dict[str, OverparameterizedConv2d] = {}
    undo = []
    try:
        for candidate, name in chosen:
            made = OverparameterizedConv2d(candidate.use.conv, candidate.norm, name)
            undo.append(made.put_in(module))
            made_at[candidate.path] = made
        check_equal(before, _outputs_with_branches(module, sample, made_at), names=('network', 'network with branches'))
        if images is not None:
            match_bn_statistics(module, images)
    except BaseException as error:
        for restore in reversed(undo):
            restore()
        if isinstance(error, FoldError):
            raise ValueError(str(error)) from None
        raise
    for made in made_at.values():
        made.release_original()
    return module


def _refuse_wrappers(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        raise ValueError('the module is one convolution, which cannot be replaced in place; put it into nn.Sequential')
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    for path, submodule in module.named_modules():
        name = f'{path or "the module"} is a {type(submodule).__name__}'
        if isinstance(submodule, (torch.jit.ScriptModule, torch.fx.GraphModule)):
            raise ValueError(f'{name}, whose graph is fixed; replace convolutions before scripting or tracing')
        if isinstance(submodule, wrappers):
            raise ValueError(f'{name}, which holds the old parameters; replace convolutions first, then wrap')
        if path.rpartition('.')[2] == '_orig_mod':
            raise ValueError(f'{path!r} is compiled; replace convolutions first, then compile')


def _outputs(module: nn.Module, sample: Any) -> list[Tensor]:
    name = type(module).__name__
    try:
        outputs = eval_outputs(module, sample)
    except Exception as error:  # code of others may raise errors of any class
        raise ValueError(
            f'{name} does not run on the sample ({type(error).__name__}: {error}); give an input that it takes by '
            'sample=, as a tensor, as a tuple of arguments, or as a mapping of arguments by name'
        ) from error
    if not outputs:
        raise ValueError(
            f'{name} returns no floating-point tensors for the sample, in tuples, lists, mappings and dataclasses, so '
            'nothing shows that it stays the same; replace the convolutions of a part that does'
        )
    if not all(bool(output.isfinite().all()) for output in outputs):
        raise ValueError(f'{name} gives infinite or NaN outputs for the sample; look at its weights')
    return outputs


def _outputs_with_branches(
    module: nn.Module, sample: Any, made_at: Mapping[str, OverparameterizedConv2d]
) -> list[Tensor]:
    """Run the changed network; raise `ValueError` if it does not call what was put in, or reads what is gone."""
    calls: Counter[nn.Module] = Counter()
    placed = {path: [m for m in (made, made.original.tail) if m is not None] for path, made in made_at.items()}
    handles = [
        m.register_forward_pre_hook(lambda called, _: calls.update([called]))
        for parts in placed.values()
        for m in parts
    ]
    try:
        outputs = eval_outputs(module, sample)
    except Exception as error:  # code of others may raise errors of any class
        raise ValueError(
            f'{type(module).__name__} does not run with branches ({type(error).__name__}: {error}); it may read what '
            'only a convolution or a norm has. Leave that layer out by where='
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    for path, parts in placed.items():
        if any(calls[part] != 1 for part in parts):
            raise ValueError(
                f'{type(module).__name__} does not call what takes the place of {path!r}: it holds its layers in '
                'another place, too, such as a list; leave that layer out by where='
            )
    return outputs


def _choose(found: list[Candidate], block: str, where: Where, *, name: str) -> list[tuple[Candidate, str]]:
    """Return the convolutions to replace, each with a block type; raise if a pattern gives none."""
    patterns = _patterns(where, block)
    chosen: list[tuple[Candidate, str]] = []
    refused: list[tuple[str, str]] = []
    used = dict.fromkeys(patterns, 0)
    for candidate in found:
        if callable(where) and not where(candidate.path, candidate.use.conv):
            continue
        pattern = next((p for p in patterns if fnmatchcase(candidate.path, p)), None)
        if pattern is None:
            continue
        if (reason := refusal(candidate, patterns[pattern])) is None:
            chosen.append((candidate, patterns[pattern]))
            used[pattern] += 1
        else:
            refused.append((candidate.path, reason))
    for path, reason in refused:
        _logger.info('overparameterize: %s stays as it is: %s', path, reason)
    for pattern, count in used.items():
        if not count:
            raise ValueError(_nothing_found(found, refused, pattern, where, name))
    _logger.info('overparameterize: %d of %d convolutions of %s have branches', len(chosen), len(found), name)
    return chosen


def _patterns(where: Where, block: str) -> dict[str, str]:
    """Return block types by patterns of paths."""
    if where is None or callable(where):
        return {'*': block}
    if isinstance(where, str):
        return {where: block}
    patterns = dict(where) if isinstance(where, Mapping) else dict.fromkeys(_as_tuple(where), block)
    if not patterns:
        raise ValueError('where= is empty; leave it out to replace all convolutions that can be replaced')
    if other := [pattern for pattern in patterns if not isinstance(pattern, str)]:
        raise TypeError(f'where= holds {other[0]!r}; it takes patterns of paths, like layer1.*')
    return patterns


def _as_tuple(where: Any) -> tuple[Any, ...]:
    if not isinstance(where, Iterable):
        raise TypeError(f'where={where!r} is no pattern, list of patterns, function or mapping')
    return tuple(where)


def _nothing_found(
    found: list[Candidate], refused: list[tuple[str, str]], pattern: str, where: Where, name: str
) -> str:
    asked = '' if where is None else f' that where={where if callable(where) else pattern!r} selects'
    matching = [(path, reason) for path, reason in refused if fnmatchcase(path, pattern)]
    if matching:
        path, reason = matching[0]
        others = f' (and {len(matching) - 1} more like it)' if len(matching) > 1 else ''
        return f'{name} has no convolution{asked} which can be replaced. {path!r} stays{others}: {reason}'
    if not found:
        return f'{name} has no convolution with a kernel of more than one pixel'
    if not callable(where) and any(fnmatchcase(candidate.path, pattern) for candidate in found):
        return f'all convolutions{asked} are selected by an earlier pattern; put narrow patterns first'
    return f'{name} has no convolution{asked}; there are {len(found)}, from {found[0].path!r} to {found[-1].path!r}'
