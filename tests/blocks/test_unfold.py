"""Branches from one convolution: the same function in eval mode, near it in train mode, and as good to train on."""

from __future__ import annotations

import copy
import functools
import statistics
from itertools import pairwise

import pytest
import timm
import torch
from helpers import block_params, create_model, images, randomise, rel_diff, to_device
from timm.data import create_dataset, create_transform, resolve_model_data_config
from timm.layers import SEModule
from torch import nn

from repvgg_zoo import BLOCKS, CheckpointError, RepVGGBlock, load_checkpoint, match_bn_statistics, unfold
from repvgg_zoo.pretrained.manifest import weights_dir
from repvgg_zoo.tools.convert import convert

pytestmark = pytest.mark.device
F64 = torch.float64
BLOCK = pytest.mark.parametrize('block', block_params(BLOCKS))


@pytest.fixture(scope='module')
def folded():
    """Trained weights in the deploy form."""
    return create_model('test_repvgg.cifar10_deploy', pretrained=True).double().eval()


@pytest.fixture(scope='module')
def photos():
    """`(100, 3, 32, 32)`, ten of each class."""
    model = timm.create_model('test_repvgg')
    dataset = create_dataset('', root=str(weights_dir() / 'cifar10' / 'train'))
    dataset.transform = create_transform(**resolve_model_data_config(model))
    return to_device(torch.stack([dataset[index][0] for index in range(0, len(dataset), 5)]).double())


@BLOCK
def test_unfold_each_block_type_keeps_the_outputs(block, folded, photos):
    expected, keys = folded(photos), folded.state_dict().keys()
    model = unfold(copy.deepcopy(folded), block=block)
    assert not model.deploy
    assert not model.training
    like = timm.create_model('test_repvgg', num_classes=10, block=block)
    assert model.state_dict().keys() == like.state_dict().keys()
    assert rel_diff(model(photos), expected) < 1e-9
    assert rel_diff(model.switch_to_deploy()(photos), expected) < 1e-9
    assert model.state_dict().keys() == keys


@BLOCK
def test_unfold_with_batches_brings_train_mode_near_eval_mode(block, folded, photos):
    expected = folded(photos)
    model = unfold(copy.deepcopy(folded), block=block, batches=[photos[:40], (photos[40:], None)])
    assert rel_diff(model(photos), expected) < 1e-9
    assert rel_diff(model.train()(photos), expected) < 0.02  # variances of a batch are those of a sample less 1 / n
    plain = unfold(copy.deepcopy(folded), block=block)
    assert rel_diff(plain.train()(photos), expected) > 0.5


@BLOCK
def test_unfold_each_block_type_gives_every_branch_a_part(block, folded):
    """Neither is a branch left out, nor do branches of one kind begin alike, which they would be for ever."""
    model = unfold(copy.deepcopy(folded), block=block)
    module = model.stages[0][1]
    if isinstance(module, RepVGGBlock):
        kernels = [module.conv_kxk.conv.weight, module.conv_1x1.conv.weight]
    else:
        kernels = [branch.equivalent_kernel_bias(torch.float64)[0] for branch in module.named_branches().values()]
    whole = module.equivalent_kernel_bias()[0]
    for index, kernel in enumerate(kernels):
        assert kernel.norm() > 0.01 * whole.norm()
        for other in kernels[:index]:
            assert kernel.shape != other.shape or rel_diff(kernel, other) > 0.01


def test_unfold_with_batches_sets_the_statistics_of_the_data(folded, photos):
    model = unfold(copy.deepcopy(folded), batches=[photos[:30], photos[30:]])
    seen = []
    model.stages[0][1].conv_1x1.bn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.enable_grad():  # the branches are then run one by one
        model(photos)
    values = seen[0].transpose(0, 1).flatten(1)
    bn = model.stages[0][1].conv_1x1.bn
    assert rel_diff(bn.running_mean, values.mean(1)) < 1e-9
    assert rel_diff(bn.running_var, values.var(1)) < 1e-9


def test_unfold_part_of_a_network_or_bare_block_keeps_the_outputs(folded, photos):
    larger = nn.Sequential(nn.Identity(), copy.deepcopy(folded))
    assert unfold(larger, block='acb') is larger
    assert rel_diff(larger(photos), folded(photos)) < 1e-9
    block = copy.deepcopy(folded.stages[0][1])
    x = images(2, 8, in_chans=block.reparam_conv.in_channels, dtype=F64)
    assert rel_diff(unfold(copy.deepcopy(block))(x), block(x)) < 1e-9


@pytest.mark.cpu
def test_unfold_dilated_model_has_the_keys_of_the_training_form():
    model = timm.create_model('test_repvgg', output_stride=8, deploy=True)
    expected = timm.create_model('test_repvgg', output_stride=8).state_dict().keys()
    assert unfold(model).state_dict().keys() == expected


@BLOCK
@pytest.mark.parametrize(
    'kwargs',
    [
        dict(groups=4, dilation=2),
        dict(stride=2, padding_mode='reflect'),
        dict(identity=False, padding_mode='circular', dilation=2),
        dict(attn_layer=SEModule, attn_last=True),
        dict(attn_layer=SEModule, groups=2),
    ],
    ids=str,
)
def test_unfold_block_of_any_shape_keeps_the_outputs(block, kwargs):
    folded = to_device(RepVGGBlock(8, 8, deploy=True, **kwargs).double()).eval()
    x = images(2, 9, in_chans=8, dtype=F64)
    expected = folded(x)
    unfolded = unfold(copy.deepcopy(folded), block=block)
    assert rel_diff(unfolded(x), expected) < 1e-9
    assert repr(unfolded.switch_to_deploy().reparam_conv) == repr(folded.reparam_conv)


def test_unfold_frozen_model_stays_frozen(folded):
    model = unfold(copy.deepcopy(folded).requires_grad_(False))
    assert not any(parameter.requires_grad for parameter in model.parameters())


@BLOCK
def test_unfold_under_autocast_is_not_rounded(block, folded, photos):
    with torch.autocast(photos.device.type, torch.bfloat16):
        model = unfold(copy.deepcopy(folded).float(), block=block)
        kernel = model.stages[0][1].equivalent_kernel_bias()[0]
    exact = folded.stages[0][1].reparam_conv.weight
    assert rel_diff(kernel, exact) < 1e-5  # float32, where bfloat16 has 4e-3
    assert rel_diff(model(photos.float()), folded(photos)) < 1e-4


@pytest.mark.parametrize(
    'batches',
    [
        [torch.zeros(2, 1, 32, 32)],
        [torch.zeros(1, 3, 8, 8)],
        [torch.zeros(2, 3, 32, 32, dtype=torch.int64)],
        [torch.zeros(2, 3, 32, 32), torch.full((2, 3, 32, 32), torch.nan)],
    ],
    ids=['channels', 'pixels', 'dtype', 'nan'],
)
def test_unfold_bad_batches_raises_and_changes_nothing(folded, photos, batches):
    model = copy.deepcopy(folded).float()
    before, blocks = model(photos.float()), [model.stem, *(block for stage in model.stages for block in stage)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.raises((RuntimeError, ValueError)):
        unfold(model, block='acb', batches=batches)
    assert [model.stem, *(block for stage in model.stages for block in stage)] == blocks
    assert model.deploy
    assert model.block == 'repvgg'
    assert torch.equal(model(photos.float()), before)
    optimizer.step()  # which holds parameters of the model still
    unfold(model, block='acb', batches=[photos.float()])


@pytest.mark.parametrize('place', [0, 1])
def test_unfold_empty_batch_is_ignored(folded, photos, place):
    batches, made = [photos], []
    batches.insert(place, photos[:0])
    for given in (batches, [photos]):
        torch.manual_seed(0)
        made.append(unfold(copy.deepcopy(folded), block='acb', batches=given))
    ours, expected = (model.state_dict() for model in made)
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


def test_unfold_with_batches_leaves_no_hooks(folded, photos):
    model = unfold(copy.deepcopy(folded), block='acb', batches=[photos])
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.cpu
def test_unfold_block_with_attention_keeps_it():
    model = timm.create_model('repvgg_d2se', deploy=True, device='meta')
    squeeze = model.stages[0][0].attn
    model.stages = model.stages[:1]
    unfold(model)
    assert model.stages[0][0].attn is squeeze


@pytest.mark.cpu
def test_unfold_bad_arguments_raises(folded):
    with pytest.raises(ValueError, match=r'no block of this package in Linear'):
        unfold(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r'stem is of the training form; switch_to_deploy\(\) comes first'):
        unfold(timm.create_model('test_repvgg'))
    with pytest.raises(ValueError, match=r"unknown block 'abc'; did you mean 'acb'"):
        unfold(copy.deepcopy(folded), block='abc')
    for block in (None, ['acb']):
        with pytest.raises(ValueError, match=r'unknown block .* it can be: repvgg, plain'):
            unfold(copy.deepcopy(folded), block=block)
    for batches, error, message in (
        ([], ValueError, 'the batches have no images'),
        ([torch.zeros(0, 3, 32, 32)], ValueError, 'the batches have no images'),
        ([{'x': 1}], TypeError, 'batch 0 is a dict'),
        ([()], TypeError, 'batch 0 is a tuple'),
        ([torch.tensor(1.0)], ValueError, r'shape \(\)'),
        (torch.zeros(2, 3, 32, 32), TypeError, 'the batches are one tensor'),
        ((torch.zeros(2, 3, 32, 32), torch.zeros(2)), ValueError, r'shape \(2,\), .* a single batch goes in a list'),
    ):
        model = copy.deepcopy(folded)
        with pytest.raises(error, match=message):
            unfold(model, batches=batches)
        assert model.deploy
    with pytest.raises(ValueError, match="on device 'meta'"):
        timm.create_model('test_repvgg', pretrained=True, block='acb', unfold=True, device='meta')
    for missing in ('affine', 'track_running_stats'):
        norm_layer = functools.partial(nn.BatchNorm2d, **{missing: False})
        match_bn_statistics(timm.create_model('test_repvgg', norm_layer=norm_layer), [])  # which has nothing to set
    with pytest.raises(ValueError, match='no block of the training form in RepVGG'):
        match_bn_statistics(folded, [images(dtype=F64)])
    model = copy.deepcopy(folded)
    model.stem = torch.compile(model.stem, backend='eager')
    with pytest.raises(ValueError, match=r'stem is a block that was compiled by itself.* unfold first'):
        unfold(model, block='acb')
    with pytest.raises(ValueError, match='the module is a block that was compiled by itself'):
        unfold(model.stem)


@pytest.mark.cpu
def test_convert_training_weights_with_unfold_keeps_the_branches(tmp_path):
    branches = timm.create_model('test_repvgg.cifar10', pretrained=True).stem.state_dict()
    kept = convert('test_repvgg.cifar10', tmp_path / 'kept', unfold=True).stem.state_dict()
    assert all(torch.equal(value, branches[key]) for key, value in kept.items())
    assert convert('test_repvgg.cifar10', tmp_path / 'others', unfold=True, block='acb').block == 'acb'


def test_unfold_norm_layer_by_name_is_used(folded):
    model = unfold(copy.deepcopy(folded), norm_layer='batchnorm2d')
    assert type(model.stem.conv_kxk.bn) is nn.BatchNorm2d


def test_unfold_backward_hook_still_fires(folded):
    model, fired = copy.deepcopy(folded), []
    model.stages[0][0].register_full_backward_hook(lambda *_: fired.append(1))
    unfold(model, block='acb')
    model(images(2, px=32, dtype=F64)).sum().backward()
    assert fired == [1]


def test_unfold_model_with_own_eps_keeps_it():
    kwargs = dict(norm_layer=functools.partial(nn.BatchNorm2d, eps=1e-2))
    model = create_model('test_repvgg', deploy=True, **kwargs).double().eval()
    x = images(2, px=32, dtype=F64)
    before = model(x)
    with torch.inference_mode():
        unfold(model, block='acb', batches=[x])
    model(x).sum().backward()
    again = create_model('test_repvgg', block='acb', **kwargs).double().eval()
    again.load_state_dict(model.state_dict())
    assert rel_diff(again(x), before) < 1e-9


# ----------------------------------------------------------------------------------------------- while loading


@BLOCK
@pytest.mark.parametrize('tag', ['cifar10', 'cifar10_deploy'])
def test_load_pretrained_with_unfold_fits_each_block_type(block, tag, folded, photos):
    model = create_model(f'test_repvgg.{tag}', pretrained=True, block=block, unfold=True).eval()
    assert not model.deploy
    assert rel_diff(model.double()(photos), folded(photos)) < 1e-4  # float32 weights


@pytest.mark.cpu
def test_load_pretrained_with_unfold_takes_own_weights_unchanged():
    plain = timm.create_model('test_repvgg', pretrained=True)
    model = timm.create_model('test_repvgg', pretrained=True, unfold=True)
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in model.state_dict().items())


def test_load_pretrained_with_unfold_adapts_classes_and_channels(folded, photos):
    model = create_model('test_repvgg.cifar10_deploy', pretrained=True, unfold=True, num_classes=3, in_chans=1)
    assert model.head.fc.out_features == 3
    deployed = create_model('test_repvgg.cifar10_deploy', pretrained=True, in_chans=1).eval()
    grey = photos.float().mean(1, keepdim=True)
    assert rel_diff(model.eval().forward_features(grey), deployed.forward_features(grey)) < 1e-4


@pytest.mark.cpu
@pytest.mark.slow
@pytest.mark.parametrize('aux_heads', [True, False])
def test_load_checkpoint_with_unfold_keeps_auxiliary_heads(tmp_path, aux_heads):
    trained = timm.create_model('repvggplus_l2pse', aux_heads=True, num_classes=3).state_dict()
    torch.save(trained, tmp_path / 'training.pth')
    model = timm.create_model('repvggplus_l2pse', aux_heads=aux_heads, num_classes=3, block='plain')
    loaded = load_checkpoint(model, tmp_path / 'training.pth', unfold=True).state_dict()
    assert {key for key in loaded if 'aux_heads' in key} == {key for key in trained if aux_heads and 'aux_heads' in key}
    assert all(torch.equal(loaded[key], trained[key]) for key in loaded if 'head' in key)


@pytest.mark.cpu
def test_load_checkpoint_deploy_weights_without_unfold_raises(tmp_path):
    torch.save(timm.create_model('test_repvgg', deploy=True).state_dict(), tmp_path / 'deploy.pth')
    model = timm.create_model('test_repvgg')
    with pytest.raises(CheckpointError, match=r'deploy=True, or load with unfold=True'):
        load_checkpoint(model, tmp_path / 'deploy.pth')
    load_checkpoint(model, tmp_path / 'deploy.pth', unfold=True)
    with pytest.raises(ValueError, match='this one is of the deploy form'):
        load_checkpoint(timm.create_model('test_repvgg', deploy=True), tmp_path / 'deploy.pth', unfold=True)


def test_load_pretrained_deploy_folder_unfolds(folded, photos, tmp_path):
    """Its config.json says `deploy=True`."""
    convert('test_repvgg.cifar10', tmp_path / 'deploy', form='deploy')
    model = create_model(f'local-dir:{tmp_path / "deploy"}', pretrained=True, unfold=True, block='acb').eval()
    assert not model.deploy
    assert rel_diff(to_device(model.double())(photos), folded(photos)) < 1e-4


@pytest.mark.cpu
@pytest.mark.parametrize('tag', ['cifar10', 'cifar10_deploy'])
def test_create_deploy_form_with_unfold_is_an_error_that_names_both(tag, tmp_path):
    both = dict(pretrained=True, deploy=True, unfold=True)
    with pytest.raises(ValueError, match=r'deploy=True builds .*, and unfold=True .*; give one'):
        timm.create_model(f'test_repvgg.{tag}', **both)
    assert not timm.create_model(f'test_repvgg.{tag}', **(both | dict(deploy=False))).deploy
    convert('test_repvgg', tmp_path / 'training')
    with pytest.raises(ValueError, match='give one'):
        timm.create_model(f'local-dir:{tmp_path / "training"}', **both)


@pytest.mark.parametrize('tag', ['cifar10', 'cifar10_deploy'])
def test_load_pretrained_deploy_form_takes_weights_of_the_default_block(folded, photos, tag):
    model = create_model(f'test_repvgg.{tag}', pretrained=True, deploy=True, block='acb').eval()
    assert rel_diff(model.double()(photos), folded(photos)) < 1e-4
    with pytest.raises(
        CheckpointError, match=r"of block='repvgg', .* those of block='acb'; .*or load with unfold=True"
    ):
        timm.create_model('test_repvgg.cifar10', pretrained=True, block='acb')


@pytest.mark.cpu
def test_load_checkpoint_weights_of_another_block_raises(tmp_path):
    torch.save(timm.create_model('test_repvgg', block='acb').state_dict(), tmp_path / 'acb.pth')
    with pytest.raises(
        CheckpointError, match=r"of block='acb', and the model has those of block='repvgg'; create it with"
    ):
        load_checkpoint(timm.create_model('test_repvgg'), tmp_path / 'acb.pth')


@pytest.mark.parametrize('damage', ['missing', 'extra', 'reshaped'])
def test_load_checkpoint_misfit_with_unfold_raises_and_changes_nothing(damage, tmp_path):
    state_dict = timm.create_model('test_repvgg', deploy=True).state_dict()
    if damage == 'missing':
        del state_dict['stages.1.0.reparam_conv.bias']
    elif damage == 'extra':
        state_dict['stages.1.9.reparam_conv.bias'] = torch.zeros(3)
    else:
        state_dict['stages.1.0.reparam_conv.weight'] = torch.zeros(2, 2, 3, 3)
    torch.save(state_dict, tmp_path / 'deploy.pth')
    model = create_model('test_repvgg', block='acb')
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=r'does not fit test_repvgg.*stages\.1\.'):
        load_checkpoint(model, tmp_path / 'deploy.pth', unfold=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_convert_with_unfold_keeps_the_outputs(folded, photos, tmp_path):
    convert('test_repvgg.cifar10_deploy', tmp_path / 'dbb', unfold=True, block='dbb')
    model = create_model(f'local-dir:{tmp_path / "dbb"}', pretrained=True).eval()
    assert model.stem.block == 'dbb'
    assert rel_diff(model.double()(photos), folded(photos)) < 1e-4
    with pytest.raises(ValueError, match='unfolding makes the training form'):
        convert('test_repvgg', tmp_path / 'other', unfold=True, form='deploy')


# --------------------------------------------------------------------------------------------------- fine-tuning


def top1_after_training(model: nn.Module, train, validation, seed: int) -> float:
    """Per cent, after four epochs on 500 photos."""
    generator = torch.Generator().manual_seed(seed)
    epochs, steps = 4, len(train[0]) // 50
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(train[0]), generator=generator).split(50):
            x = train[0][batch]
            x = torch.where(torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5, x.flip(3), x)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), train[1][batch], label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
    with torch.inference_mode():
        return 100 * (model.eval()(validation[0]).argmax(1) == validation[1]).double().mean().item()


@pytest.mark.cpu
@pytest.mark.exhaustive
def test_unfold_then_fine_tuning_is_as_good_as_the_training_form():
    """A classifier that was taken off is learnt again, and the features move, by the same recipe from either form."""
    transform = create_transform(**resolve_model_data_config(timm.create_model('test_repvgg')))
    data = []
    for split in ('train', 'validation'):
        dataset = create_dataset('', root=str(weights_dir() / 'cifar10' / split))
        dataset.transform = transform
        pairs = [dataset[index] for index in range(len(dataset))]
        data.append((torch.stack([x for x, _ in pairs]), torch.tensor([label for _, label in pairs])))
    results = {'training form': [], 'unfolded': []}
    for seed in range(3):
        torch.manual_seed(seed)
        kept = timm.create_model('test_repvgg.cifar10', pretrained=True)
        lost = unfold(timm.create_model('test_repvgg.cifar10_deploy', pretrained=True), batches=[data[0][0]])
        kept.reset_classifier(10)
        lost.reset_classifier(10)
        lost.head.load_state_dict(kept.head.state_dict())
        results['training form'].append(top1_after_training(kept, *data, seed))
        results['unfolded'].append(top1_after_training(lost, *data, seed))
    kept, lost = (statistics.mean(values) for values in results.values())
    assert kept > 60
    assert lost > kept - 2  # standard error of a difference of means of three, of 500 images each: one point


def test_unfold_then_step_of_an_old_optimizer_raises(folded):
    model = copy.deepcopy(folded).requires_grad_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    unfold(model)
    with pytest.raises(RuntimeError, match=r'were replaced by switch_to_deploy\(\), unfold\(\)'):
        optimizer.step()


def test_unfold_shared_channels_last_block_with_hook_keeps_all(folded):
    block = copy.deepcopy(folded.stages[0][1]).to(memory_format=torch.channels_last)
    seen = []
    block.register_forward_hook(lambda *_: seen.append(1))
    twice = unfold(nn.Sequential(block, block), block='acb')
    assert twice[0] is twice[1]
    x = images(1, 8, in_chans=block.reparam_conv.in_channels, dtype=F64)
    assert rel_diff(twice(x), block(block(x))) < 1e-9
    assert len(seen) == 4
    assert twice[0].branches['kxk'].conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_unfold_channels_of_different_range_keeps_the_outputs(folded, photos):
    model, generator = copy.deepcopy(folded), torch.Generator().manual_seed(0)
    blocks = [model.stem, *(block for stage in model.stages for block in stage)]
    with torch.no_grad():
        for first, second in pairwise(blocks):
            scale = to_device(
                10 ** (6 * torch.rand(first.reparam_conv.out_channels, generator=generator, dtype=F64) - 3)
            )
            first.reparam_conv.weight /= scale.view(-1, 1, 1, 1)
            first.reparam_conv.bias /= scale
            second.reparam_conv.weight *= scale.view(1, -1, 1, 1)
    for block in ('repvgg', 'acb', 'mobileone', 'dbb'):
        assert rel_diff(unfold(copy.deepcopy(model), block=block)(photos), folded(photos)) < 1e-9


def test_load_checkpoint_with_unfold_uses_the_eps_of_the_model(tmp_path):
    def norm(chs, **dd):
        return nn.BatchNorm2d(chs, eps=0.1, **dd)

    model = randomise(timm.create_model('test_repvgg', norm_layer=norm), px=32)
    torch.save(model.state_dict(), tmp_path / 'file.pth')
    other = create_model('test_repvgg', norm_layer=norm, block='acb').eval()
    load_checkpoint(other, tmp_path / 'file.pth', unfold=True)
    x = images(1, 32)
    assert rel_diff(other(x), model(x)) < 1e-3


def test_match_bn_statistics_compiled_model_sets_the_statistics(folded, photos):
    model = unfold(copy.deepcopy(folded))
    compiled = torch.compile(model, backend='eager')
    compiled(photos)
    match_bn_statistics(compiled, [photos])
    assert rel_diff(model(photos), folded(photos)) < 1e-9
    assert rel_diff(model.train()(photos), folded(photos)) < 0.02


@pytest.mark.cpu
def test_create_unfold_without_weights_raises():
    with pytest.raises(ValueError, match=r'load_checkpoint\(model, path, unfold=True\)'):
        timm.create_model('test_repvgg', unfold=True)


def other_stride(conv):
    conv.stride = (2, 1)


def other_dilation(conv):
    conv.dilation, conv.padding = (1, 2), (1, 2)


def no_padding(conv):
    conv.padding = (0, 0)


def hooked(conv):
    conv.register_forward_hook(lambda module, args, y: 2 * y)


@pytest.mark.cpu
@pytest.mark.parametrize('change', [other_stride, other_dilation, no_padding, hooked])
def test_unfold_changed_convolution_raises(change):
    model = timm.create_model('test_repvgg', deploy=True)
    change(model.stages[3][0].reparam_conv)
    with pytest.raises(ValueError, match='has no branches that compute what it computes'):
        unfold(model)
    assert model.deploy
