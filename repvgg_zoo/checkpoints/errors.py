"""The error of loading, and how its lists are shortened."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ['CheckpointError', 'abbreviate']


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or does not fit the model that it is loaded into."""


def abbreviate(items: Iterable[str], limit: int = 5) -> str:
    items = list(items)
    return ', '.join(items[:limit]) + (f', … ({len(items)} in all)' if len(items) > limit else '')
