"""What the command line shows while something takes long, as the library sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

__all__ = ['Track']

Track: TypeAlias = Callable[..., Iterable[Any]]
"""Wraps an iterable with a progress bar: `track(iterable, description=…, total=…)`."""
