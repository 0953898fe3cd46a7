"""Quantization-aware training on equivalent kernels."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from helpers import block_params, create_model, deployed_with_weights, images, randomise, rel_diff, unbalanced_ranges
from timm.utils import ModelEmaV3
from torch import nn

from repvgg_zoo import BLOCKS, RepVGGBlock, match_bn_statistics, prepare_qat, switch_to_deploy, unfold
from repvgg_zoo.blocks.base import ReparamBlock
from repvgg_zoo.quantization.finetune import finetune
from repvgg_zoo.quantization.inputs import InputQuantizer
from repvgg_zoo.quantization.layers import QuantizedLinear, codes_of_layer
from repvgg_zoo.quantization.qat import fix_ranges, quantized_layers, without_quantizers
from repvgg_zoo.quantization.weights import HALF_RANGE

SMALL = dict(depths=(1, 2, 1, 1), width=(0.25, 0.25, 0.25, 0.125), num_classes=5)


def small(block='repvgg', **kwargs):
    torch.manual_seed(0)
    return randomise(create_model('test_repvgg', block=block, **(SMALL | kwargs)), px=32)


def batches(count=2, **kwargs):
    return [images(4, 32, seed=seed, **kwargs) for seed in range(count)]


def codes(model):
    return {path: codes_of_layer(layer) for path, layer in quantized_layers(model).items()}


def train(model, steps=2):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.train()
    for x in batches(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model.eval()


@pytest.mark.device
@pytest.mark.parametrize('norms', ['fixed', 'moving'])
@pytest.mark.parametrize('block', block_params(BLOCKS))
def test_qat_fold_keeps_every_code_and_every_output(block, norms):
    model = prepare_qat(small(block), batches(), norms=norms)
    before = codes(model)
    train(model)
    x = images(3, 32, seed=9)
    trained, expected = codes(model), model(x)
    assert any(not torch.equal(trained[path].values, before[path].values) for path in before)
    switch_to_deploy(model)
    assert torch.equal(model(x), expected)
    for path, found in codes(model).items():
        assert torch.equal(found.values, trained[path].values)
        assert torch.equal(found.scale, trained[path].scale)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_qat_block_computes_what_its_codes_say():
    model = prepare_qat(small(), batches(), full_range=True).eval()
    block, x = model.stem, images(3, 32)
    values, scale = codes_of_layer(block)
    kernel = values.double() * scale.double().view(-1, 1, 1, 1)
    quantizer = block.quantizer.input
    integers = (x.double() / quantizer.scale).round() + quantizer.zero_point
    rounded = (integers.clamp(0, 255) - quantizer.zero_point) * quantizer.scale
    bias = block.equivalent_kernel_bias(torch.float64)[1]
    expected = nn.functional.conv2d(rounded, kernel, bias, padding=1)
    assert rel_diff(block(x).double(), expected.relu()) < 1e-5  # float32
    assert values.abs().max() == 127
    assert len(integers.unique()) > 100


def test_qat_gradients_reach_every_parameter_through_the_fold():
    model = prepare_qat(small(), batches()).train()
    model(images(4, 32)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.stem.conv_1x1.conv.weight.grad.abs().max() > 0


@pytest.mark.parametrize(('norms', 'move'), [('fixed', False), ('moving', True)])
def test_qat_norms_move_if_asked(norms, move):
    model = prepare_qat(small(), batches(), norms=norms)
    before = copy.deepcopy(model.stages[1][0].conv_kxk.bn)
    model.train()(images(4, 32))
    after = model.stages[1][0].conv_kxk.bn
    assert torch.equal(before.running_mean, after.running_mean) is not move
    assert torch.equal(before.running_var, after.running_var) is not move
    assert int(after.num_batches_tracked - before.num_batches_tracked) == move


def test_qat_moving_norms_see_the_rounded_input():
    model, plain = prepare_qat(small(), batches(), norms='moving').train(), small().train()
    x = batches()[0]
    model.stem(x)
    plain.stem.run_branches(model.stem.quantizer.eval().input(x))
    for name in ('running_mean', 'running_var'):
        found, expected = (getattr(m.stem.conv_1x1.bn, name) for m in (model, plain))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_qat_ranges_move_by_a_hundredth_and_dtypes_stay():
    model = prepare_qat(small(), batches()).train()
    quantizer = model.stem.quantizer.input
    before = quantizer.running_high.clone()
    x = 50 * images(1, 32)
    assert quantizer(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(quantizer.running_high, 0.99 * before + 0.01 * x.bfloat16().max().float())


def test_qat_ranges_move_in_train_mode_until_they_are_fixed():
    model = prepare_qat(small(), batches())
    quantizer = model.stem.quantizer.input

    def moved(run):
        before = quantizer.scale
        run()
        return quantizer.scale != before

    larger = 5 * images(4, 32)
    assert not moved(lambda: model.eval()(larger))
    assert moved(lambda: model.train()(larger))
    fix_ranges(model)
    assert not moved(lambda: model.train()(larger))
    fix_ranges(model, are_fixed=False)
    assert moved(lambda: model.train()(larger))


def test_qat_first_ranges_are_the_mean_of_the_extremes():
    low, high = torch.full((1, 3, 32, 32), -1.0), torch.full((1, 3, 32, 32), 3.0)
    model = prepare_qat(small(), [torch.cat([low, high]), torch.cat([low, 2 * high])])
    assert model.stem.quantizer.input.scale == pytest.approx((1 + 4.5) / 255)
    for x in (torch.cat([low, high]), torch.cat([-low, -high])):
        model = prepare_qat(small(), [x], symmetric=True)
        assert model.stem.quantizer.input.scale == pytest.approx(3 / 127)
        assert model.stem.quantizer.input.zero_point == 0
        assert model.stem.quantizer.codes.tolist() == [-127, 127, HALF_RANGE]
    model = prepare_qat(small(), [low])
    assert (model.stem.quantizer.input.scale, model.stem.quantizer.input.zero_point) == (pytest.approx(1 / 255), 255)


def test_qat_ranges_begin_with_the_first_input_that_is_not_0():
    """Of what a calibration leaves out, as it does heads that only training runs."""
    model = prepare_qat(small(), [torch.zeros(2, 3, 32, 32)])
    assert model.stem.quantizer.input.zero_point == 0  # of a scale that is not 0
    with torch.no_grad():
        assert model.eval()(torch.zeros(2, 3, 32, 32)).isfinite().all()
        model.train()(torch.tensor([-1.0, 3.0]).view(2, 1, 1, 1).expand(2, 3, 32, 32))
    assert model.stem.quantizer.input.scale == pytest.approx(4 / 255)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_qat_model_in_another_dtype_is_refused(dtype):
    model = prepare_qat(small().eval(), batches()).to(dtype)
    with pytest.raises(TypeError, match=f'weights of {dtype} are not rounded; keep the model in float32'):
        model(batches()[0].to(dtype))


def test_qat_leaves_subclasses_of_linear():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    net = nn.Sequential(small(), Doubled(5, 3))
    prepare_qat(net, batches())
    assert type(net[1]) is Doubled


def test_without_quantizers_is_in_eval_mode_and_computes_in_float():
    model, x = small().train(), batches()[0]
    expected = copy.deepcopy(model).eval()(x)
    plain = without_quantizers(prepare_qat(model, batches()))
    assert not any(module.training for module in plain.modules())
    assert rel_diff(plain(x), expected) < 1e-5


def test_qat_leaves_every_module_in_its_mode():
    model = small().train()
    model.stages[1].eval()
    before = {path: module.training for path, module in model.named_modules()}
    prepare_qat(model, batches())
    assert {path: module.training for path, module in model.named_modules() if path in before} == before
    prepared = prepare_qat(small().eval(), batches())
    assert not any(q.training for q in prepared.modules() if isinstance(q, InputQuantizer))


def test_qat_takes_deploy_form_and_larger_networks():
    net = nn.Sequential(small().eval().switch_to_deploy(), nn.Linear(5, 3))
    x = images(4, 32)
    expected = net(x)
    prepare_qat(net, batches(), full_range=True)
    assert 0 < rel_diff(net.eval()(x), expected) < 0.2  # eight bits over seven layers
    assert '0.head.fc' in quantized_layers(net)
    assert '1' in quantized_layers(net)
    train(net)


def test_qat_keeps_layers_in_float():
    model = prepare_qat(small().eval().switch_to_deploy(), batches(), keep_float=['stages.1.0.reparam_conv', 'head.fc'])
    assert not {'stages.1.0', 'head.fc'} & quantized_layers(model).keys()
    assert type(model.head.fc) is nn.Linear
    assert len(quantized_layers(model)) == sum(isinstance(m, ReparamBlock) for m in model.modules()) - 1


def test_qat_weights_load_into_a_prepared_model():
    model, other = (prepare_qat(small(), batches()) for _ in range(2))
    train(model)
    other.load_state_dict(model.state_dict())
    x = images(3, 32)
    assert torch.equal(other.eval()(x), model(x))


def test_qat_trains_under_autocast():
    model = prepare_qat(small(), batches())
    with torch.autocast('cpu', torch.bfloat16):
        y = model.train()(images(4, 32))
        y.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('block', ['repvgg', 'acb'])
def test_qat_training_form_loads_into_the_deploy_form(block):
    trained = train(prepare_qat(small(block), batches()))
    deployed = prepare_qat(small(block, deploy=True), batches())
    deployed.load_state_dict(trained.state_dict())
    x = images(3, 32)
    assert torch.equal(deployed.eval()(x), trained(x))


def prepared_twice():
    return prepare_qat(small(), batches())


def every_layer():
    return [path for path, m in small().named_modules() if isinstance(m, (ReparamBlock, nn.Linear))]


def with_a_nan():
    model = small()
    with torch.no_grad():
        model.stages[0][0].conv_1x1.conv.weight[0] = torch.nan
    return model


@pytest.mark.parametrize(
    ('make', 'options', 'said'),
    [
        (lambda: nn.Linear(2, 2), {}, 'no RepVGG block in Linear'),
        (lambda: timm.create_model('test_resnet'), {}, 'no RepVGG block in ResNet'),
        (prepared_twice, {}, "'stem.quantizer' is of prepare_qat already"),
        (lambda: small().bfloat16(), {}, "block 'stem' is not in float32; call float"),
        (lambda: small(drop_path_rate=0.1), {}, 'has stochastic depth or DropBlock'),
        (small, dict(norms='frozen'), "norms is 'frozen'; it takes 'fixed' or 'moving'"),
        (
            small,
            dict(keep_float=['stages.9']),
            "keep_float names 'stages.9', which is no .* there are stem",
        ),
        (small, dict(keep_float='head.fc'), "keep_float is 'head.fc'; it takes a collection"),
        (small, dict(keep_float=every_layer()), 'keep_float names all 7 layers'),
        (small, dict(calibration=[]), 'the batches have no images'),
        (small, dict(calibration=[torch.full((1, 3, 32, 32), torch.nan)]), 'batch 0 has values that are not finite'),
        (small, dict(calibration=[torch.empty(0, 3, 32, 32)]), 'the batches have no images'),
        (small, dict(calibration=[torch.ones(1, 3, 32, 32).byte()]), 'batch 0 is of torch.uint8'),
        (small, dict(calibration=[torch.full((1, 3, 32, 32), 1e38)]), 'activations of the calibration are not finite'),
        (with_a_nan, {}, "block 'stages.0.0' has weights that are not finite"),
    ],
)
def test_qat_impossible_request_raises_and_changes_nothing(make, options, said):
    model = make()
    before, mode = [(path, type(m)) for path, m in model.named_modules()], model.training
    with pytest.raises(ValueError, match=said):
        prepare_qat(model, **(dict(calibration=batches()) | options))
    assert [(path, type(m)) for path, m in model.named_modules()] == before
    assert model.training is mode


@pytest.mark.parametrize('calibration', [images(1, 32), [dict(x=1)], ['cat']])
def test_qat_calibration_of_other_types_raises(calibration):
    with pytest.raises(TypeError, match=r'the batches are one tensor|batch 0 is a (dict|str)'):
        prepare_qat(small(), calibration)


def test_qat_takes_the_batches_of_a_loader():
    loader = [(batch, torch.zeros(len(batch))) for batch in batches()]
    assert torch.equal(prepare_qat(small(), loader)(batches()[0]), prepare_qat(small(), batches())(batches()[0]))


def test_qat_ranges_stay_in_eval_mode_with_the_weights_of_a_training():
    training, evaluated = prepare_qat(small().train(), batches()), prepare_qat(small().eval(), batches())
    average = ModelEmaV3(training)
    training(batches()[0])
    average.update(training)
    evaluated.load_state_dict(training.state_dict())
    for model in (evaluated, average.module):
        before = copy.deepcopy(model.state_dict())
        model(5 * batches()[0])
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_qat_checkpointed_training_is_the_same():
    models = [prepare_qat(small(), batches()).train() for _ in range(2)]
    models[1].set_grad_checkpointing()
    for model in models:
        for x in batches():  # beyond the ranges of the calibration
            model(3 * x).square().mean().backward()
    for (name, expected), found in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-5, atol=1e-8, msg=name)
    for (name, expected), found in zip(models[0].named_buffers(), models[1].buffers(), strict=True):
        assert torch.equal(found, expected), name


@pytest.mark.parametrize('options', [dict(symmetric=True), dict(full_range=True)])
def test_qat_weights_of_other_options_are_refused(options):
    weights = prepare_qat(small(), batches()).state_dict()
    with pytest.raises(RuntimeError, match='give prepare_qat the symmetric and full_range that'):
        prepare_qat(small(), batches(), **options).load_state_dict(weights)


def test_qat_keeps_the_hooks_of_linear_layers():
    model, calls = small(), []
    model.head.fc.register_forward_hook(lambda *_: calls.append('forward'))
    prepare_qat(model, batches())
    calls.clear()
    model(batches()[0])
    without_quantizers(model)(batches()[0])
    assert calls == ['forward'] * 2


def test_qat_shared_linear_layer_is_one():
    shared = nn.Linear(5, 5)
    model = prepare_qat(nn.Sequential(small(), shared, nn.ReLU(), shared), batches())
    assert model[1] is model[3]
    assert isinstance(model[1], QuantizedLinear)


def test_prepared_model_is_exported_and_is_refused_by_what_moves_branches():
    model = prepare_qat(small().eval(), batches())
    x = batches()[0]
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match='match the statistics before prepare_qat'):
        match_bn_statistics(model, batches())
    with pytest.raises(ValueError, match='unfold first, then prepare the model'):
        unfold(switch_to_deploy(model))


def test_prepared_block_without_quantizer_is_as_before():
    block = RepVGGBlock(8, 8).eval()
    assert block.quantizer is None
    assert 'quantizer' not in dict(block.named_children())
    assert not any('quantizer' in key for key in block.state_dict())


@pytest.mark.device
def test_finetune_brings_answers_nearer():
    teacher, model = deployed_with_weights(), unbalanced_ranges()
    x = torch.cat([images(16, 32, seed=seed) for seed in range(8)])
    prepare_qat(model, [x])
    with torch.no_grad():
        expected, before = teacher(x), model.eval()(x)
    finetune(model, teacher, [(part, None) for part in x.split(16)], epochs=4, lr=1e-4)
    with torch.no_grad():
        after = model(x)
    assert not model.training
    assert rel_diff(after, expected) < 0.7 * rel_diff(before, expected)
    assert all(quantizer.is_fixed for quantizer in model.modules() if isinstance(quantizer, InputQuantizer))


def test_finetune_is_as_a_loop_of_pytorch():
    """With Adam, a cosine, a teacher in eval mode, and the divergence from the teacher's answers."""
    teacher, loader = small().train(), batches(5)
    model = prepare_qat(small().eval(), batches())
    expected = copy.deepcopy(model).train()
    finetune(model, teacher, loader, epochs=1, lr=1e-3)
    assert not teacher.training
    optimizer = torch.optim.Adam(expected.parameters(), lr=1e-3)
    for index, x in enumerate(loader):
        for group in optimizer.param_groups:
            group['lr'] = 1e-3 * (1 + math.cos(math.pi * index / 5)) / 2
        fix_ranges(expected, are_fixed=index == 4)
        with torch.no_grad():
            answers = small().eval()(x).softmax(1)
        optimizer.zero_grad()
        (answers * (answers.log() - expected(x).log_softmax(1))).sum(1).mean().backward()
        optimizer.step()
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        assert (found - wanted).abs().mean() < 1e-4  # a tenth of a step of Adam, whose signs rounding can turn


@pytest.mark.parametrize('deploy', [False, True])
def test_finetune_impossible_request_raises(deploy):
    teacher = small(deploy=deploy)
    model = prepare_qat(copy.deepcopy(teacher), batches())
    with pytest.raises(ValueError, match='RepVGG has no quantizers'):
        finetune(copy.deepcopy(teacher), teacher, batches(), epochs=1)
    with pytest.raises(ValueError, match='not finite after 0 steps; look for NaN in the images'):
        finetune(model, teacher, [(x * torch.nan, None) for x in batches()], epochs=1)
    model = prepare_qat(copy.deepcopy(teacher), batches())
    with pytest.raises(ValueError, match='there are no batches'):
        finetune(model, teacher, [], epochs=1)
    with pytest.raises(ValueError, match='the model is its own teacher'):
        finetune(model, model, batches(), epochs=1)
    for options in (dict(epochs=0), dict(epochs=-1), dict(epochs=1, lr=0), dict(epochs=1, lr=math.inf)):
        with pytest.raises(ValueError, match='they take an integer from 1 on and a number above 0'):
            finetune(model, teacher, batches(), **options)
    with pytest.raises(ValueError, match='take a lower lr than 1e'):
        finetune(model, teacher, [(x, None) for x in batches(20)], epochs=5, lr=1e30)
