"""Inputs of layers as integers: per tensor, between extremes that training moves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ['InputQuantizer']

_MOMENTUM = 0.01
_SMALLEST_SCALE = torch.finfo(torch.float32).eps
"""Of an input that is 0 everywhere."""


class InputQuantizer(nn.Module):
    """Rounds an input to 8 bits between its usual extremes.

    In train mode the extremes are a moving average of those of the batches, as running statistics are of batch
    normalisation; the first input that is not 0 everywhere sets them. In eval mode, and once `is_fixed`, they stay.
    Gradients go straight through, except at inputs beyond the extremes.
    """

    is_fixed = False
    running_low: Tensor
    running_high: Tensor

    def __init__(self, *, symmetric: bool, device: torch.device) -> None:
        """Make it without extremes.

        Args:
            symmetric: Put the range about 0, with codes from -127 to 127 and no zero point. Otherwise codes go from 0
                to 255.
            device: Where it stands.
        """
        super().__init__()
        self.code_range = (-127, 127) if symmetric else (0, 255)
        self.momentum = _MOMENTUM
        for name in ('running_low', 'running_high'):
            self.register_buffer(name, torch.zeros((), device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Round an input."""
        if self.training and not self.is_fixed:
            self._observe(x.detach())
        return torch.fake_quantize_per_tensor_affine(x.float(), *self._scale_and_zero(), *self.code_range).to(x.dtype)

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        low, high = x.aminmax()
        momentum = torch.where(self.running_low == self.running_high, 1.0, self.momentum)
        self.running_low.lerp_(low.clamp_max(0.0).to(self.running_low), momentum)
        self.running_high.lerp_(high.clamp_min(0.0).to(self.running_high), momentum)

    def _scale_and_zero(self) -> tuple[Tensor, Tensor]:
        low, high = self.running_low.float(), self.running_high.float()
        smallest, largest = self.code_range
        if smallest < 0:
            scale = (torch.maximum(-low, high) / largest).clamp_min(_SMALLEST_SCALE)
            return scale, torch.zeros_like(scale, dtype=torch.int32)
        scale = ((high - low) / largest).clamp_min(_SMALLEST_SCALE)
        return scale, (-low / scale).round().to(torch.int32)

    @property
    def scale(self) -> float:
        """Distance of two codes."""
        return float(self._scale_and_zero()[0])

    @property
    def zero_point(self) -> int:
        """Code of 0."""
        return int(self._scale_and_zero()[1])
