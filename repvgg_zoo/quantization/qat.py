"""Quantization-aware training of a RepVGG, on the kernels that the fold will give."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterable, Iterator
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from ..blocks.base import ReparamBlock
from ..reparam.evaluation import evaluating
from .calibration import checked
from .layers import BlockQuantizer, InputQuantizer, QuantizedLinear
from .weights import FULL_RANGE, HALF_RANGE

__all__ = ['fix_ranges', 'prepare_qat', 'quantized_layers', 'require_torchao', 'without_quantizers']

ModuleT = TypeVar('ModuleT', bound=nn.Module)


def prepare_qat(
    model: ModuleT,
    calibration: Iterable[Tensor],
    *,
    norms: Literal['fixed', 'moving'] = 'fixed',
    symmetric: bool = False,
    full_range: bool = False,
    keep_float: Collection[str] = (),
) -> ModuleT:
    """Let a model train, and be evaluated, as INT8 will compute it, in place.

    Each RepVGG block, of any type and either form, becomes one convolution of its rounded input with its rounded
    equivalent kernel: in training, too, so that gradients go through the fold into the branches. So no fold can move
    weights out of the codes that were trained ("solution B" of the official code, which describes it). Linear layers
    are rounded as well. Everything else stays in float: other convolutions, squeeze-excite, activations, pooling.

    Weights are rounded per output channel, symmetric about 0; inputs per tensor, between moving averages of their
    extremes. `repvgg_zoo.switch_to_deploy` folds the branches and keeps the codes, and `export_qdq` writes the model
    for OpenVINO, ONNX Runtime and TensorRT.

    Args:
        model: A RepVGG, or any model with RepVGG blocks inside. Load its weights first.
        calibration: A few batches `(N, C, H, W)` of training images, as the model takes them. Their extremes are the
            first ranges.
        norms: `fixed` trains with the running statistics as they are. `moving` runs the branches of each block beside,
            which moves their statistics, and trains with the moved ones. It costs as much again.
        symmetric: Round inputs about 0 too, without zero points, as TensorRT wants it. Behind a ReLU half of the codes
            are lost then.
        full_range: Let weights use all 8 bits instead of 7, for processors with VNNI or AMX, ARM and GPUs.
        keep_float: Paths of blocks, or of their convolutions, and of linear layers that stay as they are.

    Returns:
        The model.

    Raises:
        ModuleNotFoundError: torchao is not installed; it is in the extra `quantize`.
        ValueError: There is no RepVGG block, or no layer to keep at a path, a block is not in float32 or drops branches
            in training, the model is prepared already, or the calibration has no batch or values that are not finite.
            The model is as it was then.

    Example:
        >>> import timm, torch, repvgg_zoo
        >>> model = timm.create_model('test_repvgg', pretrained=True)
        >>> model = repvgg_zoo.prepare_qat(model, [torch.randn(8, 3, 32, 32)])
        >>> model.train()(torch.randn(8, 3, 32, 32)).sum().backward()
        >>> model = repvgg_zoo.switch_to_deploy(model.eval())
    """
    require_torchao()
    if norms not in ('fixed', 'moving'):
        raise ValueError(f"norms is {norms!r}; it takes 'fixed' or 'moving'")
    blocks = {path: m for path, m in model.named_modules() if isinstance(m, ReparamBlock)}
    _refuse(model, blocks)
    linears = {path: m for path, m in model.named_modules() if type(m) is nn.Linear}
    for path in keep_float:
        if blocks.pop(path.removesuffix(f'.{ReparamBlock.conv_name}'), None) is None and not linears.pop(path, None):
            raise ValueError(f'keep_float names {path!r}, which is no RepVGG block and no linear layer')
    largest_code = FULL_RANGE if full_range else HALF_RANGE
    places = [place for place in _children(model) if place[2] in linears.values()]
    try:
        for block in blocks.values():
            device = next(block.parameters()).device
            block.quantizer = BlockQuantizer(
                symmetric=symmetric, largest_code=largest_code, moves_statistics=norms == 'moving', device=device
            ).train(block.training)
        for parent, name, linear in places:
            setattr(parent, name, QuantizedLinear(linear, symmetric=symmetric, largest_code=largest_code))
        _calibrate(model, calibration)
    except BaseException:
        for block in blocks.values():
            block.quantizer = None
        for parent, name, linear in places:
            setattr(parent, name, linear)
        raise
    return model


def fix_ranges(model: nn.Module, *, are_fixed: bool = True) -> None:
    """Keep the ranges of inputs from now on, in train mode too, as is usual for the last epochs.

    Args:
        model: A model of `prepare_qat`.
        are_fixed: False lets the ranges move again.

    Example:
        >>> import timm, torch, repvgg_zoo
        >>> model = repvgg_zoo.prepare_qat(timm.create_model('test_repvgg'), [torch.randn(8, 3, 32, 32)])
        >>> fix_ranges(model)
    """
    for quantizer in _input_quantizers(model):
        quantizer.is_fixed = are_fixed
        quantizer.train(quantizer.training)


def quantized_layers(model: nn.Module) -> dict[str, ReparamBlock | QuantizedLinear]:
    """Return the blocks and linear layers that `prepare_qat` rounds, by path.

    Example:
        >>> import timm, torch, repvgg_zoo
        >>> model = repvgg_zoo.prepare_qat(timm.create_model('test_repvgg'), [torch.randn(8, 3, 32, 32)])
        >>> list(quantized_layers(model))[0]
        'stem'
    """
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, QuantizedLinear) or (isinstance(module, ReparamBlock) and module.quantizer is not None)
    }


def without_quantizers(model: ModuleT) -> ModuleT:
    """Return a copy of a model of `prepare_qat` that computes in float, with the same weights, in eval mode.

    Example:
        >>> import timm, torch, repvgg_zoo
        >>> model = repvgg_zoo.prepare_qat(timm.create_model('test_repvgg'), [torch.randn(8, 3, 32, 32)])
        >>> quantized_layers(without_quantizers(model))
        {}
    """
    plain = copy.deepcopy(model).eval()
    for parent in list(plain.modules()):
        if isinstance(parent, ReparamBlock):
            parent.quantizer = None
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantizedLinear):
                setattr(parent, name, child.float_layer())
    return plain


def require_torchao() -> None:
    """Raise `ModuleNotFoundError`, which names the extra, if torchao is not installed."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # of deprecations between torch and torchao
    try:
        import torchao.quantization.pt2e  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(f"{error}; `pip install 'repvgg-zoo[quantize]'` brings torchao") from error
    finally:
        logging.disable(level)


def _refuse(model: nn.Module, blocks: dict[str, ReparamBlock]) -> None:
    if not blocks:
        raise ValueError(
            f'no RepVGG block in {type(model).__name__}; prepare_qat is for RepVGG and networks built on it'
        )
    for path, block in blocks.items():
        if block.quantizer is not None:
            raise ValueError(f'block {path!r} is prepared already; prepare a model once')
        if {p.dtype for p in block.parameters()} != {torch.float32}:
            raise ValueError(f'block {path!r} is not in float32; call float(), and train in autocast for speed')
        if block.reparam_conv is None and not all(isinstance(drop, nn.Identity) for drop in block.drops()):
            raise ValueError(
                f'block {path!r} has stochastic depth or DropBlock, and one convolution has no branches to drop; '
                'create the model with drop_path_rate=0'
            )


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            yield parent, name, child


def _input_quantizers(model: nn.Module) -> list[InputQuantizer]:
    return [module for module in model.modules() if isinstance(module, InputQuantizer)]


def _calibrate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set each range to the mean of the extremes of the batches."""
    quantizers = _input_quantizers(model)
    observers = [quantizer.fake.activation_post_process for quantizer in quantizers]
    momentum = observers[0].averaging_constant
    with evaluating(model):
        for quantizer in quantizers:
            quantizer.fake.enable_observer()
        for count, batch in enumerate(checked(batches), start=1):
            for observer in observers:
                observer.averaging_constant = 1 / count
            model(batch)
    for quantizer, observer in zip(quantizers, observers, strict=True):
        observer.averaging_constant = momentum
        quantizer.train(quantizer.training)
