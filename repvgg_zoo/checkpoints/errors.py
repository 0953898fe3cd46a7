"""The error of loading, and lists of keys in messages."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ['CheckpointError', 'abbreviate']


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or does not fit the model that it is loaded into.

    Example:
        >>> import timm, repvgg_zoo
        >>> model, deployed = (timm.create_model('test_repvgg', deploy=deploy) for deploy in (False, True))
        >>> try:
        ...     model.load_state_dict(deployed.state_dict())
        ... except repvgg_zoo.CheckpointError as error:
        ...     print(error)  # doctest: +ELLIPSIS
        deploy-form weights do not go into a training-form model ...
    """


def abbreviate(items: Iterable[str], limit: int = 5) -> str:
    """Join the first few items, and tell how many there are if some are left out.

    Example:
        >>> abbreviate('abcd', limit=2)
        'a, b, … (4 in all)'
    """
    items = list(items)
    return ', '.join(items[:limit]) + (f', … ({len(items)} in all)' if len(items) > limit else '')
