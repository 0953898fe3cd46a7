"""What equalisation, ranges and sensitivity take: the deploy form, in float."""

from __future__ import annotations

from torch import nn

from ..blocks.branch_sum import BranchSum
from .layers import LayerQuantizer

__all__ = ['refuse_other_forms']


def refuse_other_forms(model: nn.Module) -> None:
    """Raise `ValueError` if a model has branches, or is of `prepare_qat`."""
    for path, module in model.named_modules():
        if isinstance(module, LayerQuantizer):
            raise ValueError(f'{path!r} is of prepare_qat; do this before it, or on what without_quantizers() returns')
        if isinstance(module, BranchSum) and not module.is_deploy():
            raise ValueError(f'{path!r} has branches, and this is for the deploy form; call switch_to_deploy() first')
