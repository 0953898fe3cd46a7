"""Put folded parts into a module, so that they can be taken out again.

What a method did to a copy of a module is put into the module itself: only what the method changed is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .fold import FoldError, check_finite
from .geometry import is_channels_last

__all__ = ['Transplant', 'is_folded', 'mark_folded', 'places_of', 'snapshot']

_PLAIN = (bool, int, float, str, type(None))
"""Attributes in which methods keep the form of a block."""


class Transplant:
    """A changed copy of a module, in the dtype and on the device of the module, ready to be put in.

    Modules and parameters that the method left alone stay the objects that they are, with their hooks, gradients and
    places in optimizers.
    """

    def __init__(self, live: nn.Module, changed: nn.Module, originals: Mapping[nn.Module, nn.Module]) -> None:
        """Compare, and convert what is new.

        Args:
            live: The module.
            changed: What the method made of a float64 copy of it.
            originals: The module that each module of the copy is a copy of.

        Raises:
            FoldError: A new value is not finite in the dtype of the module.
        """
        self._live, self._changed, self._originals = live, changed, originals
        kernels = [p for p in live.parameters() if p.ndim > 1] or list(live.parameters())
        self._dtype, self._device = kernels[0].dtype, kernels[0].device
        self._layout = torch.channels_last if is_channels_last(kernels) else torch.contiguous_format
        kept = {id(p) for m in changed.modules() if m in originals for p in originals[m].parameters(recurse=False)}
        lost = [p for p in live.parameters() if id(p) not in kept]
        self._requires_grad = any(p.requires_grad for p in lost if p.ndim > 1) or (
            not any(p.ndim > 1 for p in lost) and any(p.requires_grad for p in lost)
        )
        self._new: dict[tuple[nn.Module, str], nn.Parameter] = {}
        for module in changed.modules():
            original = originals.get(module)
            for name, values in module.named_parameters(recurse=False):
                old = None if original is None else getattr(original, name, None)
                if isinstance(old, Tensor) and torch.equal(old.detach().cpu().double(), values):
                    continue
                self._new[module, name] = self._converted(name, values, old)
        for module in {*originals, *changed.modules()}:  # all plans are kept until the first one is carried out
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.new_empty(0)

    def _converted(self, name: str, values: Tensor, old: Tensor | None) -> nn.Parameter:
        dtype, requires_grad = self._dtype, self._requires_grad
        if old is not None:
            dtype, requires_grad = old.dtype, old.requires_grad
        new = values.detach().to(dtype)
        check_finite(name, new)
        new = new.to(self._device)
        if new.ndim == 4:
            new = new.contiguous(memory_format=self._layout)
        return nn.Parameter(new, requires_grad=requires_grad)

    def is_empty(self) -> bool:
        """Tell whether the method changed nothing."""
        same = [self._originals.get(m) for m in self._changed.modules()] == list(self._live.modules())
        return same and not self._new

    def changed_modules(self) -> set[nn.Module]:
        """Return the modules of which a parameter gets a new value."""
        return {self._originals.get(module, module) for module, _ in self._new}

    def apply(self) -> tuple[nn.Module, Callable[[], None]]:
        """Put the changes in; return what the module has become, and a function that undoes it."""
        undo: list[Callable[[], None]] = []
        try:
            result = self._adopt(self._changed, self._live.training, undo)
        except BaseException:
            _run_backwards(undo)
            raise
        return result, lambda: _run_backwards(undo)

    def _adopt(self, changed: nn.Module, training: bool, undo: list[Callable[[], None]]) -> nn.Module:
        """Return the live module of a module of the copy, changed as that is; or that itself, if it is new."""
        live = self._originals.get(changed, changed)
        if live is changed:
            live.training = training
            for name, buffer in live.named_buffers(recurse=False):
                setattr(live, name, buffer.to(self._device, self._dtype if buffer.is_floating_point() else None))
        else:
            undo.append(snapshot(live))
        children = {name: self._adopt(child, live.training, undo) for name, child in changed.named_children()}
        old = dict(live.named_children())
        if list(children.items()) != list(old.items()):
            for name in old:
                delattr(live, name)
            for name in old.keys() - children.keys():
                if hasattr(changed, name):  # None, or an empty list
                    setattr(live, name, getattr(changed, name))
            for name, child in children.items():
                if name in vars(live):
                    delattr(live, name)
                setattr(live, name, child)
        for name, _ in changed.named_parameters(recurse=False):
            if (new := self._new.get((changed, name))) is not None:
                setattr(live, name, new)
        for name, value in vars(changed).items():
            is_state = isinstance(value, _PLAIN) and not name.startswith('_') and name != 'training'
            if is_state and live is not changed and vars(live).get(name, _MISSING) != value:
                setattr(live, name, value)
        return live


_MISSING = object()


def places_of(root: nn.Module, module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return the parents of a module, and its name in each: a module may be in two places."""
    paths = [path.rpartition('.') for path, m in root.named_modules(remove_duplicate=False) if m is module]
    if ('', '', '') in paths:
        raise FoldError(
            f'the whole module is a {type(module).__name__}, whose fold is another module; wrap it, by '
            'torch.nn.Sequential(module), and switch that'
        )
    return [(root.get_submodule(parent), name) for parent, _, name in paths]


_MARK = 'is_folded_block'


def mark_folded(module: nn.Module) -> None:
    """Mark what was folded, so that a second switch knows a model that has nothing left to fold."""
    setattr(module, _MARK, True)


def is_folded(module: nn.Module) -> bool:
    """Tell whether a module was marked so."""
    return _MARK in vars(module)


def snapshot(module: nn.Module) -> Callable[[], None]:
    """Return a function that gives a module back the attributes, children and parameters that it has now."""
    attributes: dict[str, Any] = dict(vars(module))
    tables = {name: dict(value) for name, value in attributes.items() if isinstance(value, dict)}

    def restore() -> None:
        vars(module).clear()
        vars(module).update(attributes)
        for name, entries in tables.items():  # the same tables, to which handles of hooks refer
            attributes[name].clear()
            attributes[name].update(entries)

    return restore


def _run_backwards(undo: list[Callable[[], None]]) -> None:
    for restore in reversed(undo):
        restore()
