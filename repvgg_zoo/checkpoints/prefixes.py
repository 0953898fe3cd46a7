"""What stands in front of the keys of a network: wrappers, and the attributes of a larger network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .errors import CheckpointError, abbreviate

__all__ = ['how_to_choose', 'strip_wrappers', 'take_network', 'take_prefix']

_WRAPPERS = ('module.', '_orig_mod.')
_COUNTERS_OF_AVERAGES = ('n_averaged', 'steps')
"""Keys that torch's and mmengine's averages have beside the network in `module.`."""


def strip_wrappers(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Strip DistributedDataParallel, torch.compile and averages from the front of keys.

    Example:
        >>> strip_wrappers({'n_averaged': 1, 'module._orig_mod.head.fc.bias': 2})
        {'head.fc.bias': 2}
    """
    is_average = all(key.startswith('module.') or key in _COUNTERS_OF_AVERAGES for key in state_dict)
    dropped = _COUNTERS_OF_AVERAGES if is_average else ()
    return {_without_wrappers(key): value for key, value in state_dict.items() if key not in dropped}


def take_prefix(state_dict: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Take the part of a larger network under a prefix, and strip the prefix.

    Args:
        state_dict: Without wrappers.
        prefix: What stands in front of the keys of the part, with a dot at its end.

    Raises:
        CheckpointError: No key has the prefix.

    Example:
        >>> take_prefix({'model.head.fc.bias': 1, 'criterion.weight': 2}, 'model.')
        {'head.fc.bias': 1}
    """
    prefix = _without_wrappers(prefix)
    part = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    if not part:
        fronts = dict.fromkeys(f'{key.split(".")[0]}.' for key in state_dict)
        raise CheckpointError(f'no key starts with prefix={prefix!r}; the keys start with {abbreviate(fronts)}')
    return part


def take_network(state_dict: Mapping[str, Any], prefix: str | None = None) -> dict[str, Any]:
    """Strip wrappers; with a prefix, take the part under it, and strip the wrappers of that too.

    Args:
        state_dict: What a file holds.
        prefix: What stands in front of the keys of the part, with or without a dot at its end.

    Raises:
        CheckpointError: No key has the prefix.

    Example:
        >>> take_network({'module.model.module.head.fc.bias': 1, 'module.criterion.weight': 2}, 'model')
        {'head.fc.bias': 1}
    """
    state_dict = strip_wrappers(state_dict)
    if not prefix:
        return state_dict
    return strip_wrappers(take_prefix(state_dict, prefix.removesuffix('.') + '.'))


def how_to_choose(prefixes: Iterable[str]) -> str:
    """Say how to take one part of a larger network.

    Example:
        >>> how_to_choose(['model.'])
        "take only the RepVGG with prefix='model.' (`--prefix model.` on the command line)"
    """
    options = [(repr(prefix), prefix) for prefix in prefixes]
    arguments, words = (' or '.join(texts) for texts in zip(*options, strict=True))
    return f'take only the RepVGG with prefix={arguments} (`--prefix {words}` on the command line)'


def _without_wrappers(key: str) -> str:
    while key.startswith(_WRAPPERS):
        key = key.split('.', 1)[1]
    return key
