"""What quantization-aware training puts into a model: quantizers of inputs, kernels and linear layers."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._compat import copy_hooks
from ..blocks.base import ReparamBlock
from ..blocks.branch_sum import convolve
from ..reparam.geometry import geometry_of
from .inputs import InputQuantizer
from .weights import Codes, codes_of, fake_quantize

__all__ = ['BlockQuantizer', 'LayerQuantizer', 'QuantizedLinear', 'codes_of_layer', 'quantizer_of']


class LayerQuantizer(nn.Module):
    """Rounds what a layer reads: its input and its weights."""

    def __init__(self, *, symmetric: bool, largest_code: int, device: torch.device) -> None:
        super().__init__()
        self.input = InputQuantizer(symmetric=symmetric, device=device)
        self.largest_code = largest_code
        codes = torch.tensor([*self.input.code_range, largest_code], dtype=torch.int16, device=device)
        self.register_buffer('codes', codes)  # so that a checkpoint tells what it was trained with
        self.register_load_state_dict_pre_hook(_refuse_other_codes)

    def weight(self, weight: Tensor) -> Tensor:
        """Round weights `(C_out, …)`."""
        return fake_quantize(weight, self.largest_code)


def _refuse_other_codes(quantizer: nn.Module, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
    errors: list[str] = others[-1]
    found, expected = state_dict.get(f'{prefix}codes'), quantizer.get_buffer('codes')
    if found is not None and found.tolist() != expected.tolist():
        errors.append(
            f'{prefix}codes are {found.tolist()} (smallest and largest of the input, largest of the weights), and the '
            f'model has {expected.tolist()}; give prepare_qat the symmetric and full_range that the weights were '
            'trained with'
        )


class BlockQuantizer(LayerQuantizer):
    """Computes the convolution of a RepVGG block with a rounded input and a rounded equivalent kernel.

    The kernel is that of the fold: computed in float64 from the branches and their running statistics, and rounded to
    the dtype of the block. So a fold changes no code.
    """

    def __init__(self, *, symmetric: bool, largest_code: int, moves_statistics: bool, device: torch.device) -> None:
        super().__init__(symmetric=symmetric, largest_code=largest_code, device=device)
        self.moves_statistics = moves_statistics

    def forward(self, x: Tensor, block: ReparamBlock) -> Tensor:
        """Compute the output of the block before attention and activation."""
        x = self.input(x)
        conv = block.reparam_conv
        if conv is not None:
            return convolve(x, self.weight(conv.weight), conv.bias, geometry_of(conv))
        if self.training and self.moves_statistics:
            with torch.no_grad():
                block.run_branches(x)
        kernel, bias = block.folded_kernel_bias()
        return convolve(x, self.weight(kernel), bias, block.geometry())


class QuantizedLinear(nn.Linear):
    """A linear layer with a rounded input and rounded weights. Its keys are those of the layer."""

    def __init__(self, linear: nn.Linear, *, symmetric: bool, largest_code: int) -> None:
        super().__init__(1, 1, bias=False, device='meta')
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.quantizer = LayerQuantizer(symmetric=symmetric, largest_code=largest_code, device=linear.weight.device)
        self.train(linear.training)
        copy_hooks(linear, self)

    def forward(self, x: Tensor) -> Tensor:
        """Map a rounded input by rounded weights."""
        return F.linear(self.quantizer.input(x), self.quantizer.weight(self.weight), self.bias)

    def float_layer(self) -> nn.Linear:
        """Return a plain layer of the same weights."""
        linear = nn.Linear(1, 1, device='meta')
        linear.in_features, linear.out_features = self.in_features, self.out_features
        linear.weight, linear.bias = self.weight, self.bias
        copy_hooks(self, linear)
        return linear


@torch.no_grad()
def codes_of_layer(layer: ReparamBlock | QuantizedLinear) -> Codes:
    """Return the weights of a layer as integers: of a block in either form, those of its one kernel."""
    if isinstance(layer, QuantizedLinear):
        weight = layer.weight
    else:
        weight = layer.folded_kernel_bias()[0] if layer.reparam_conv is None else layer.reparam_conv.weight
    return codes_of(weight, quantizer_of(layer).largest_code)


def quantizer_of(layer: ReparamBlock | QuantizedLinear) -> LayerQuantizer:
    """Return the quantizer of a prepared block or of a linear layer."""
    return cast('LayerQuantizer', layer.quantizer)
