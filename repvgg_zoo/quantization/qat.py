"""Quantization-aware training of a RepVGG, on the kernels that the fold will give."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable
from typing import Any, Literal, TypeVar, cast

import torch
from torch import nn

from ..blocks.base import ReparamBlock
from ..blocks.batches import images_of
from ..blocks.unfold import replace_modules
from ..reparam.evaluation import evaluating
from .inputs import InputQuantizer
from .layers import BlockQuantizer, LayerQuantizer, QuantizedLinear
from .weights import FULL_RANGE, HALF_RANGE

__all__ = ['fix_ranges', 'prepare_qat', 'quantized_layers', 'roundable_layers', 'without_quantizers']

ModuleT = TypeVar('ModuleT', bound=nn.Module)


def prepare_qat(
    model: ModuleT,
    calibration: Iterable[Any],
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
        calibration: A few batches `(N, C, H, W)` of training images, as the model takes them, or tuples that begin with
            one. Their extremes are the first ranges.
        norms: `fixed` trains with the running statistics as they are. `moving` runs the branches of each block beside,
            which moves their statistics, and trains with the moved ones. It costs as much again.
        symmetric: Round inputs about 0 too, without zero points, as TensorRT wants it, which also takes `full_range`.
            Behind a ReLU half of the codes are lost then.
        full_range: Let weights use all 8 bits instead of 7, for processors with VNNI or AMX, ARM and GPUs.
        keep_float: Paths of blocks, or of their convolutions, and of linear layers that stay as they are.

    Returns:
        The model.

    Raises:
        TypeError: A batch of the calibration is neither a tensor nor a tuple that begins with one.
        ValueError: There is no RepVGG block, no layer to keep at a path, or nothing else than what is kept; a layer is
            not in float32, has weights that are not finite, or drops branches in training; the model is prepared
            already; or the calibration has no images, or some that are not finite. The model is as it was then.

    Example:
        >>> import timm, torch, repvgg_zoo
        >>> model = timm.create_model('test_repvgg', pretrained=True)
        >>> model = repvgg_zoo.prepare_qat(model, [torch.randn(8, 3, 32, 32)])
        >>> model.train()(torch.randn(8, 3, 32, 32)).sum().backward()
        >>> model = repvgg_zoo.switch_to_deploy(model.eval())
    """
    if norms not in ('fixed', 'moving'):
        raise ValueError(f"norms is {norms!r}; it takes 'fixed' or 'moving'")
    _refuse_prepared(model)
    layers = _chosen(model, keep_float)
    largest_code = FULL_RANGE if full_range else HALF_RANGE
    linears: dict[nn.Module, nn.Module] = {
        layer: QuantizedLinear(layer, symmetric=symmetric, largest_code=largest_code)
        for layer in layers
        if isinstance(layer, nn.Linear)
    }
    blocks = [layer for layer in layers if isinstance(layer, ReparamBlock)]
    try:
        for block in blocks:
            device = next(block.parameters()).device
            block.quantizer = BlockQuantizer(
                symmetric=symmetric, largest_code=largest_code, moves_statistics=norms == 'moving', device=device
            ).train(block.training)
        replace_modules(model, linears)
        _calibrate(model, calibration)
    except BaseException:
        for block in blocks:
            block.quantizer = None
        replace_modules(model, {quantized: linear for linear, quantized in linears.items()})
        raise
    return model


def fix_ranges(model: nn.Module, *, are_fixed: bool = True) -> None:
    """Keep the ranges of inputs from now on, in train mode too, as is usual for the last epochs.

    A checkpoint does not keep this. Call it again after a resume.

    Args:
        model: A model of `prepare_qat`.
        are_fixed: False lets the ranges move again.

    Raises:
        ValueError: The model has no quantizers.

    Example:
        >>> import timm, torch, repvgg_zoo
        >>> model = repvgg_zoo.prepare_qat(timm.create_model('test_repvgg'), [torch.randn(8, 3, 32, 32)])
        >>> fix_ranges(model)
    """
    quantizers = _input_quantizers(model)
    if not quantizers:
        raise ValueError(f'{type(model).__name__} has no quantizers; prepare_qat() makes them')
    for quantizer in quantizers:
        quantizer.is_fixed = are_fixed


def roundable_layers(model: nn.Module) -> dict[str, ReparamBlock | nn.Linear]:
    """Return the blocks and linear layers that `prepare_qat` would round, by path.

    Example:
        >>> import timm, repvgg_zoo
        >>> list(roundable_layers(timm.create_model('test_repvgg')))[-1]
        'head.fc'
    """
    return {path: m for path, m in model.named_modules() if isinstance(m, ReparamBlock) or type(m) is nn.Linear}


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
    plain = copy.deepcopy(model)
    for parent in list(plain.modules()):
        if isinstance(parent, ReparamBlock):
            parent.quantizer = None
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantizedLinear):
                setattr(parent, name, child.float_layer())
    return plain.eval()


def _refuse_prepared(model: nn.Module) -> None:
    if prepared := [path for path, module in model.named_modules() if isinstance(module, LayerQuantizer)]:
        raise ValueError(f'{prepared[0]!r} is of prepare_qat already; prepare a model once')


def _chosen(model: nn.Module, keep_float: Collection[str]) -> list[ReparamBlock | nn.Linear]:
    """Return the layers to round, and refuse what cannot be rounded."""
    if isinstance(keep_float, str):
        raise ValueError(f'keep_float is {keep_float!r}; it takes a collection of paths')
    layers = roundable_layers(model)
    if not any(isinstance(layer, ReparamBlock) for layer in layers.values()):
        raise ValueError(
            f'no RepVGG block in {type(model).__name__}; prepare_qat is for RepVGG and networks built on it'
        )
    kept = {path.removesuffix(ReparamBlock.conv_name).removesuffix('.') for path in keep_float}
    if unknown := kept - layers.keys():
        raise ValueError(
            f'keep_float names {min(unknown)!r}, which is no RepVGG block and no linear layer; there are '
            f'{", ".join(layers)}'
        )
    chosen = {path: layer for path, layer in layers.items() if path not in kept}
    if not chosen:
        raise ValueError(f'keep_float names all {len(layers)} layers; leave some to quantize')
    for path, layer in chosen.items():
        what = f'{"block" if isinstance(layer, ReparamBlock) else "linear layer"} {path!r}'
        if {p.dtype for p in layer.parameters()} != {torch.float32}:
            raise ValueError(f'{what} is not in float32; call float(), and train in autocast for speed')
        if not all(bool(p.isfinite().all()) for p in layer.parameters()):
            raise ValueError(f'{what} has weights that are not finite')
        has_branches = isinstance(layer, ReparamBlock) and layer.reparam_conv is None
        if has_branches and not all(isinstance(drop, nn.Identity) for drop in cast('ReparamBlock', layer).drops()):
            raise ValueError(
                f'{what} has stochastic depth or DropBlock, and one convolution has no branches to drop; '
                'create the model with drop_path_rate=0'
            )
    return list(chosen.values())


def _input_quantizers(model: nn.Module) -> list[InputQuantizer]:
    return [module for module in model.modules() if isinstance(module, InputQuantizer)]


def _calibrate(model: nn.Module, calibration: Iterable[Any]) -> None:
    """Set each range to the mean of the extremes of the batches."""
    quantizers = _input_quantizers(model)
    device = next(model.parameters()).device
    momentum = quantizers[0].momentum
    with evaluating(model):
        for quantizer in quantizers:
            quantizer.train()
        for count, images in enumerate(images_of(calibration), start=1):
            for quantizer in quantizers:
                quantizer.momentum = 1 / count
            model(images.to(device))
    for quantizer in quantizers:
        quantizer.momentum = momentum
        if not bool((quantizer.running_low + quantizer.running_high).isfinite()):
            raise ValueError('activations of the calibration are not finite; look for weights that are too large')
