"""A convolution of any network as a sum of branches, and the way back to the convolution that it was."""

# no `from __future__ import annotations`: graphs of torch.fx could not be scripted

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from timm.layers import Conv2dSame, pad_same
from torch import Tensor, nn

from .._compat import copy_hooks, has_hooks
from ..blocks.block_types import BRANCH_TYPES
from ..blocks.branch_sum import BranchSum
from ..blocks.branches import Branch, ConvSpec
from ..blocks.fast_paths import full_precision
from ..blocks.set_kernel import set_equivalent_kernel_bias
from ..reparam.fold import BNStats, FoldError, KernelBias, exact_dtype, fold_exactly
from ..reparam.geometry import as_pair, is_channels_last, padding_of
from ..reparam.stale_optimizers import forget_replaced, remember_replaced
from ..reparam.transplant import mark_folded, places_of

__all__ = ['NormTail', 'OverparameterizedConv2d']


class NormTail(nn.Module):
    """What is left of a norm whose normalisation has moved into branches: dropout and activation, by timm's names.

    The keys of the activation's parameters are those that they were.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        children = dict(norm.named_children())
        self.drop = children.get('drop', nn.Identity())
        self.act = children.get('act', nn.Identity())
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Drop and activate."""
        return self.act(self.drop(x))

    @torch.jit.unused
    def parts(self, norm: nn.Module) -> dict[str, nn.Module]:
        """Return dropout and activation by name, if the norm has a place for them."""
        return {name: getattr(self, name) for name in ('drop', 'act') if hasattr(norm, name)}

    @torch.jit.unused
    def adds_to(self, norm: nn.Module) -> bool:
        """Tell whether there is a dropout or an activation for which the norm has no place."""
        others = {'drop', 'act'} - self.parts(norm).keys()
        return not all(isinstance(getattr(self, name), nn.Identity) for name in others)


class _Original(NamedTuple):
    """The modules that the fold puts back; a tuple, so that they are no children. They hold no kernel meanwhile."""

    conv: nn.Conv2d
    norm: Any
    tail: NormTail | None
    """What stands in the place of the norm; None if the norm itself does."""


class OverparameterizedConv2d(BranchSum):
    """A sum of branches in the place of a convolution, without activation. It maps what the convolution maps.

    `repvgg_zoo.overparameterize` makes it, and `repvgg_zoo.switch_to_deploy` puts the convolution back. There are three
    ways in which it goes together with the norm behind it:

    - A kernel type, such as `doconv`, has no norm of its own. The norm stays at its place.
    - A type that normalises its sum, such as `qarepvgg`, takes the norm for that. Its branches have norms too.
    - Every other type normalises each branch. The norm is removed until the fold.
    """

    branch_names = ('branches',)
    norm = None

    def __init__(self, conv: nn.Conv2d, norm: Any, block: str) -> None:
        """Make branches that compute what a convolution and its norm compute in eval mode.

        Args:
            conv: A convolution of odd kernel; see `candidates.refusal`. It is left as it is.
            norm: The norm that reads its output, or None. It is left as it is.
            block: A name of `BLOCKS`.
        """
        super().__init__()
        kind, weight = BRANCH_TYPES[block], conv.weight
        self.block = block
        self.in_channels, self.out_channels, self.groups = conv.in_channels, conv.out_channels, conv.groups
        self.kernel_size, self.stride = as_pair(conv.kernel_size), as_pair(conv.stride)
        self.padding, self.dilation = conv.padding, as_pair(conv.dilation)
        self.pads_same = isinstance(conv, Conv2dSame)  # as much as the size of its input needs
        spec = ConvSpec(
            in_chs=conv.in_channels,
            out_chs=conv.out_channels,
            kernel_size=self.kernel_size,
            stride=self.stride,
            dilation=self.dilation,
            groups=conv.groups,
            padding=(0, 0) if self.pads_same else padding_of(conv),
            padding_mode=conv.padding_mode,
            has_identity=conv.in_channels == conv.out_channels and self.stride == (1, 1),
            norm_layer=None if kind.is_kernel_type else _norm_layer_like(norm),
            dd={'device': weight.device, 'dtype': weight.dtype},
        )
        self.branches: Any = nn.ModuleDict({n: b for n, b in kind.branches(spec).items() if b is not None})
        bias = conv.bias if kind.is_kernel_type else None
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        tail = None if kind.is_kernel_type or kind.norm_after else NormTail(norm)
        self.original = _Original(conv, norm, tail)
        if not weight.requires_grad:
            self.branches.requires_grad_(False)
        for branch_norm in self.branch_norms():  # in mixed precision norms are wider than kernels
            branch_norm.to(norm.running_mean.dtype)
        self._set_kernel(conv, norm, moves_norm=tail is not None)
        if is_channels_last([weight]):
            self.to(memory_format=torch.channels_last)
        self.train(conv.training)
        branch_norms: Any = self.branch_norms()
        for branch_norm in branch_norms:  # norms may be frozen one by one
            branch_norm.train(norm.training)
            branch_norm.weight.requires_grad_(norm.weight.requires_grad)
            branch_norm.bias.requires_grad_(norm.bias.requires_grad)
            if norm.momentum is not None and norm.num_batches_tracked is not None:
                branch_norm.num_batches_tracked.copy_(norm.num_batches_tracked)

    @torch.no_grad()
    def _set_kernel(self, conv: nn.Conv2d, norm: Any, *, moves_norm: bool) -> None:
        """Set the branches. A scale of 0, with which timm begins residual branches, keeps kernels that can learn."""
        exact = exact_dtype(conv.weight)
        kernel = conv.weight.to(exact)
        norms = [branch.bn for branch in self.branches.values()]
        if not any(norms):
            set_equivalent_kernel_bias(self, kernel, None)
            return
        bias = kernel.new_zeros(len(kernel)) if conv.bias is None else conv.bias.to(exact)
        if not moves_norm:
            set_equivalent_kernel_bias(self, kernel, bias)
            return
        stats = BNStats(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
        scale, shift = (t.to(kernel) for t in stats.scale_shift(exact))
        if not all(norms):  # a branch without a norm cannot be scaled
            set_equivalent_kernel_bias(self, kernel * scale.view(-1, 1, 1, 1), bias * scale + shift)
            return
        set_equivalent_kernel_bias(self, kernel, bias)
        for branch_norm in norms:
            branch_norm.weight *= scale.to(branch_norm.weight)
            branch_norm.bias *= scale.to(branch_norm.bias)
        norms[0].bias += shift.to(norms[0].bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map what the convolution maps."""
        if self.pads_same:
            x = pad_same(x, list(self.kernel_size), list(self.stride), list(self.dilation))
        y: Tensor | None = None
        if not torch.jit.is_scripting():
            y = self.run_folded(x)
        if y is None:
            y = self.run_branches(x)
        return y

    def run_branches(self, x: Tensor) -> Tensor:
        """Run the branches one by one, and add their outputs."""
        images = [branch(x) for branch in self.branches.values()]
        y = images[0]
        for image in images[1:]:
            y = y + image
        if self.bias is not None:
            y = y + self.bias.view(-1, 1, 1).to(y.dtype)
        return y

    @torch.jit.unused
    def named_branches(self) -> dict[str, Branch]:
        """Return the branches by name. The first one can have any kernel."""
        return dict(self.branches)

    @torch.jit.unused
    def branch_norms(self) -> list[nn.Module]:
        """Return the normalisation layers inside the branches."""
        return [norm for branch in self.branches.values() for norm in branch.norms()]

    @torch.jit.unused
    def sum_of_branches(self, dtype: torch.dtype) -> KernelBias:
        """Compute the convolution that the branches are in eval mode, with the bias of the convolution before."""
        kernel, bias = super().sum_of_branches(dtype)
        return kernel, bias if self.bias is None else bias + self.bias.to(dtype)

    # Into the network, and back out of it.

    @torch.jit.unused
    def put_in(self, root: nn.Module) -> Callable[[], None]:
        """Take the places of the convolution and, for types that normalise branches, of its norm; return the undo."""
        conv, norm, tail = self.original
        places: list[tuple[nn.Module, str, nn.Module]] = [(*place, self) for place in places_of(root, conv)]
        if tail is None:
            return _replace(places)
        undo_places = _replace(places + [(*place, tail) for place in places_of(root, norm)])
        was_training, norm.training = norm.training, False  # if other code still calls it, its statistics stay

        def undo() -> None:
            norm.training = was_training
            undo_places()

        return undo

    @torch.jit.unused
    def release_original(self) -> None:
        """Release the tensors of the modules that were replaced."""
        conv, norm, tail = self.original
        remember_replaced(conv.parameters())
        conv.weight = None  # type: ignore[assignment]  # keeps the place of the key
        if tail is not None:
            remember_replaced([norm.weight, norm.bias])
            norm.weight = norm.bias = norm.running_mean = norm.running_var = None

    @torch.jit.unused
    def plan_fold(self, root: nn.Module) -> Callable[[], Callable[[], None]]:
        """Check everything that could go wrong in putting the convolution back.

        Args:
            root: The module that holds this one.

        Returns:
            A function that folds, and returns a function that undoes it.

        Raises:
            FoldError: The branches are no convolution any more, or a place is gone.
        """
        if self.needs_proof() or has_hooks(self):
            raise FoldError('it or its branches have hooks, another forward or unknown classes; remove them first')
        self.check_foldable()
        _, norm, tail = self.original
        behind = tail if tail is not None else norm if self.branch_norms() else self
        if not places_of(root, self) or not places_of(root, behind):
            raise FoldError(
                f'the {type(norm).__name__} behind it has lost its place: it was replaced, or another module than the '
                'whole network is switched. Switch the network, and replace norms (by SyncBatchNorm, say) before it '
                'gets branches'
            )
        if tail is not None and (has_hooks(tail, ignore=lambda _: True) or tail.adds_to(norm)):
            raise FoldError(f'the activation behind it was changed, for which {type(norm).__name__} has no place')
        return functools.partial(self._fold_back, root)

    @torch.jit.unused
    @torch.no_grad()
    def _fold_back(self, root: nn.Module) -> Callable[[], None]:
        """Put the convolution and the norm back, with the values that the branches are in eval mode; return the undo.

        The kernel goes into the convolution. The bias goes where the original network has one: β of the norm that
        comes back, with γ = 1, μ = 0, σ² = 1 - ε; else the bias of the convolution; else the mean μ of the norm.
        """
        conv, norm, tail = self.original
        kernels = [p for p in self.branches.parameters() if p.ndim == 4]
        dtype = kernels[0].dtype
        with full_precision(self):
            kernel, bias = fold_exactly(self._conv_bns(exact_dtype(kernels[0])))
        layout = torch.channels_last if is_channels_last(kernels) else torch.contiguous_format
        trains = any(p.requires_grad for p in kernels)
        values: dict[tuple[nn.Module, str], Any] = {
            (conv, 'weight'): _parameter(kernel.to(dtype).contiguous(memory_format=layout), trains)
        }
        places: list[tuple[nn.Module, str, nn.Module]] = [(*place, conv) for place in places_of(root, self)]
        if tail is not None:
            like = self.branch_norms()[0]
            values |= _norm_values(bias, like, norm) | {(norm, name): part for name, part in tail.parts(norm).items()}
            if conv.bias is not None:
                values[conv, 'bias'] = _parameter(torch.zeros_like(bias, dtype=dtype), conv.bias.requires_grad)
            places += [(*place, norm) for place in places_of(root, tail)]
        elif self.bias is not None:
            values[conv, 'bias'] = _parameter((bias + self.bias.to(bias)).to(dtype), self.bias.requires_grad)
        elif conv.bias is not None:
            values[conv, 'bias'] = _parameter(bias.to(dtype), conv.bias.requires_grad)
        elif self.branch_norms():
            values[norm, 'running_mean'] = (norm.running_mean.to(bias) - bias).to(norm.running_mean)
        before = {(module, name): getattr(module, name) for module, name in values}
        for (module, name), value in values.items():
            setattr(module, name, value)
        undo_places = _replace(places)
        conv.train(self.training)
        if tail is not None:
            norm.training = self.branch_norms()[0].training
            copy_hooks(tail, norm)
        mark_folded(conv)
        replaced = list(self.parameters())
        remember_replaced(replaced)

        def restore() -> None:
            forget_replaced(replaced)
            undo_places()
            for (module, name), value in before.items():
                setattr(module, name, value)

        return restore


def _norm_values(bias: Tensor, like: Any, norm: Any) -> dict[tuple[nn.Module, str], Any]:
    """Return what a norm holds whose output is its input plus a bias: γ = 1, β = b, μ = 0, σ² = 1 - ε."""
    mean = torch.zeros_like(like.running_mean)
    count = getattr(like, 'num_batches_tracked', norm.num_batches_tracked)  # a frozen norm counts nothing
    return {
        (norm, 'num_batches_tracked'): None if count is None else count.clone(),
        (norm, 'weight'): _parameter(torch.ones_like(like.weight), like.weight.requires_grad),
        (norm, 'bias'): _parameter(bias.to(like.bias), like.bias.requires_grad),
        (norm, 'running_mean'): mean,
        (norm, 'running_var'): torch.ones_like(mean) - norm.eps,
    }


def _parameter(values: Tensor, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(values.detach(), requires_grad=requires_grad)


def _norm_layer_like(norm: Any) -> Callable[..., nn.Module]:
    """Return what makes norms of the class, eps and momentum of a network's own, without its activation."""
    options = dict(eps=norm.eps, momentum=norm.momentum)
    if isinstance(norm, nn.SyncBatchNorm):
        return functools.partial(nn.SyncBatchNorm, process_group=norm.process_group, **options)
    return functools.partial(nn.BatchNorm2d, **options)


def _replace(places: Iterable[tuple[nn.Module, str, nn.Module]]) -> Callable[[], None]:
    """Put modules into places, each of which has a parent and a name; return what undoes it."""
    before = []
    for parent, name, new in places:
        before.append((parent, name, getattr(parent, name)))
        setattr(parent, name, new)

    def undo() -> None:
        for parent, name, old in before:
            setattr(parent, name, old)

    return undo
