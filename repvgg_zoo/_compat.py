"""Private state of torch and timm that this package needs, in one place.

Each function says why it is needed and which test notices when it breaks. Two functions of timm are passed on as they
are: `feature_take_indices`, by which every timm network understands `out_indices` (test:
`test_forward_intermediates_any_indices_equal_the_features`), and `save_config_for_hf`, which writes the `config.json`
that timm reads (test: `test_save_model_each_block_type_loads_as_that_block`). So is torch's `TorchDispatchMode`, the
only way to see every operator that reads a tensor (test: `test_conv_norm_pairs_other_reader_is_no_pair`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from timm.models._features import feature_take_indices
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _module
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    'TorchDispatchMode',
    'copy_hooks',
    'feature_take_indices',
    'forward_pre_hooks',
    'has_hooks',
    'has_saved_tensor_hooks',
    'is_plain_eager',
    'raised_recompile_limit',
    'save_config_for_hf',
    'version_of',
]

_HOOK_TABLES = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')
_GLOBAL_HOOK_TABLES = tuple(f'_global{name}' for name in _HOOK_TABLES)
_PATCHABLE = ('forward', '_conv_forward')


def has_hooks(module: nn.Module, *, ignore: Callable[[Any], bool] | None = None) -> bool:
    """Tell whether a module has hooks, or a `forward` that was set on the instance.

    torch has no public way to ask. Test: `test_fold_for_call_hooks_on_branches_fire`.

    Args:
        module: The module.
        ignore: Tells which hooks do not count.
    """
    state = module.__dict__
    if any(name in state for name in _PATCHABLE):
        return True
    if ignore is None:
        return any(state[table] for table in _HOOK_TABLES)
    return not all(ignore(hook) for table in _HOOK_TABLES for hook in state[table].values())


def forward_pre_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """Hooks before the forward pass, among them those that compute a kernel (pruning, weight and spectral norm).

    torch has no public way to list them. Test: `test_fold_kernels_that_hooks_compute_uses_new_values`.
    """
    return list(module._forward_pre_hooks.values())


def copy_hooks(source: nn.Module, target: nn.Module) -> None:
    """Copy the hooks of a module to the module that replaces it, except hooks on state dicts.

    torch has no public way to move them. Test: `test_unfold_backward_hook_still_fires`.
    """
    names = [name for name in nn.Identity().__dict__ if 'hook' in name and 'state_dict' not in name]
    target.__dict__.update({name: source.__dict__[name] for name in names})


def is_plain_eager() -> bool:
    """Tell whether operators run as they are called.

    They do not in compilation and tracing, inside functional transforms, under modes that watch operators, and with
    global hooks. A default device is a function mode too, but changes nothing here. torch has a public way to ask only
    for compilation and tracing. Tests: `test_fold_for_call_in_a_graph_runs_the_branches`,
    `test_fold_for_call_watching_mode_sees_the_branches`, `test_fold_for_call_function_transforms_run_the_branches`,
    `test_fold_for_call_hooks_on_all_modules_fire`.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    if torch._C._len_torch_dispatch_stack():
        return False
    function_modes = map(torch._C._get_function_stack_at, range(torch._C._len_torch_function_stack()))
    if not all(isinstance(mode, DeviceContext) for mode in function_modes):
        return False
    return not any(getattr(_module, table) for table in _GLOBAL_HOOK_TABLES)


def has_saved_tensor_hooks() -> bool:
    """Tell whether hooks on saved tensors are in force, as in activation checkpointing and offloading.

    Only the innermost hooks see a tensor. torch has no public way to ask. Test:
    `test_recompute_gradient_checkpointing_gives_equal_gradients`.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place. By this number autograd finds saved tensors out of date.

    torch has no public way to ask. Test: `test_recompute_tensor_changed_before_backward_raises`.
    """
    return tensor._version


def raised_recompile_limit(limit: int) -> AbstractContextManager[None]:
    """Let torch.compile keep more than eight versions of a function: all models of one class count together.

    torch has no public way to raise the limit. Test: `test_run_benchmark_inference_rows_agree`.
    """
    import torch._dynamo  # takes a second, and only compiling needs it

    return torch._dynamo.config.patch(cache_size_limit=limit)
