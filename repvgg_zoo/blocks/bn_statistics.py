"""Running statistics of blocks that are those of data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..reparam.evaluation import evaluating
from ..reparam.fold import BATCH_NORMS, BNStats, exact_dtype
from .batches import images_of
from .branch_sum import BranchSum

__all__ = ['match_bn_statistics']


@torch.no_grad()
def match_bn_statistics(module: nn.Module, batches: Iterable[Any]) -> None:
    """Set the running statistics of every block to those of data, and keep the outputs of eval mode.

    γ' = s · sqrt(σ'² + ε) and β' = t + μ' · s make up for the new mean μ' and variance σ'². The layer had the scale s
    and the shift t. In train mode the outputs on such data are then near those of eval mode.

    Args:
        module: Any module with training-form blocks of this package.
        batches: Batches of input, as tensors `(N, C, H, W)` or as tuples that begin with one.

    Raises:
        TypeError: `batches` holds something else than tensors.
        ValueError: One of five cases, each of which leaves the module as it was:

            - the module has no block of the training form,
            - it has a block that `prepare_qat` prepared,
            - `batches` holds no images, or tensors that are not `(N, C, H, W)`, not of floats or not finite,
            - a normalisation layer sees fewer than two pixels,
            - the statistics are not finite.

    Example:
        >>> import timm, torch, repvgg_zoo
        >>> model = timm.create_model('test_repvgg')
        >>> repvgg_zoo.match_bn_statistics(model, [torch.randn(2, 3, 32, 32) for _ in range(2)])
        >>> bool(model.stem.conv_1x1.bn.running_mean.any())
        True
    """
    blocks = [m for m in module.modules() if isinstance(m, BranchSum) and not m.is_deploy()]
    if not blocks:
        raise ValueError(f'no block of the training form in {type(module).__name__}')
    if any(getattr(block, 'quantizer', None) is not None for block in blocks):
        raise ValueError('the blocks are of prepare_qat and run no branches; match the statistics before prepare_qat')
    norms = [
        norm
        for block in blocks
        for norm in block.modules()
        if isinstance(norm, BATCH_NORMS) and norm.affine and norm.track_running_stats
    ]
    seen = {norm: _Moments() for norm in norms}
    handles = [norm.register_forward_pre_hook(seen[norm].see) for norm in norms]
    device = next(module.parameters()).device
    try:
        with evaluating(module), torch.compiler.set_stance('force_eager'):  # compiled code does not see hooks
            for batch in images_of(batches) if norms else ():
                module(batch.to(device))
    finally:
        for handle in handles:
            handle.remove()
    if unseen := sum(moments.count < 2 for moments in seen.values()):
        raise ValueError(f'{unseen} of {len(seen)} normalisation layers saw no more than one pixel of the batches')
    statistics = {norm: moments.mean_and_var(BNStats.of(norm).var.dtype) for norm, moments in seen.items()}
    if infinite := sum(not bool(var.isfinite().all()) for _, var in statistics.values()):
        raise ValueError(
            f'{infinite} of {len(seen)} normalisation layers have statistics of the batches that are not finite; look '
            'for NaN and infinite pixels, and for images that are not prepared as in training'
        )
    for norm, (mean, var) in statistics.items():
        stats = BNStats.of(norm)
        scale, shift = stats.scale_shift(exact_dtype(stats.var))
        stats.mean.copy_(mean)
        stats.var.copy_(var)
        norm.weight.copy_(scale * (stats.var.to(scale) + norm.eps).sqrt())
        norm.bias.copy_(shift + stats.mean.to(scale) * scale)


class _Moments:
    """Mean, and sum of squared distances from it, of each channel over batches (Chan, Golub and LeVeque 1983)."""

    count = 0
    mean: Any = 0.0  # a tensor on the device of the batches, once there was one
    sum_of_squares: Any = 0.0

    def see(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].to(exact_dtype(inputs[0])).transpose(0, 1).flatten(1)
        count, mean = values.shape[1], values.mean(1)
        total, distance = self.count + count, mean - self.mean
        self.sum_of_squares = (
            self.sum_of_squares
            + (values - mean[:, None]).square().sum(1)
            + distance.square() * (self.count * count / total)
        )
        self.mean = self.mean + distance * (count / total)
        self.count = total

    def mean_and_var(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.mean.to(dtype), (self.sum_of_squares / (self.count - 1)).to(dtype)
