"""The network beside timm's own, its interface, and its entries in timm's registry."""

import copy
import functools
import inspect
import json
import pickle
import subprocess
import sys
from dataclasses import asdict

import pytest
import timm
import torch
from helpers import (
    OFFICIAL,
    TIMM_NAMES,
    block_params,
    create_model,
    images,
    params,
    randomise,
    rel_diff,
    rename,
    run_branches,
    to_device,
)
from timm.models import byobnet
from torch import nn

import repvgg_zoo
from repvgg_zoo import VARIANTS, CheckpointError, RepVGG, RepVGGBlock
from repvgg_zoo.blocks import branch_sum, branches
from repvgg_zoo.blocks.branches import parallel
from repvgg_zoo.reparam.fold import BNStats

pytestmark = pytest.mark.device
NAMES = list(VARIANTS)


def timm_model(name: str, **kwargs) -> nn.Module:
    return to_device(getattr(byobnet, name)(**kwargs))


# ------------------------------------------------------------------------------------------ both forms


@pytest.mark.parametrize('name', params(NAMES))
def test_switch_keeps_the_outputs(name):
    model = randomise(create_model(name).double())
    x = images(dtype=torch.float64)
    before = model(x)
    assert model.switch_to_deploy() is model
    assert rel_diff(model(x), before) < 1e-9
    assert not any('conv_kxk' in key or 'bn' in key for key in model.state_dict())


@pytest.mark.parametrize('name', ['repvgg_a0', 'repvgg_b1g4'])
@pytest.mark.parametrize('output_stride', [8, 16])
def test_switch_dilated_keeps_the_outputs(name, output_stride):
    model = randomise(create_model(name, output_stride=output_stride).double())
    x = images(px=96, dtype=torch.float64)
    before = model(x)
    assert model.output_stride == output_stride
    assert model.forward_features(x).shape[-1] == 96 // output_stride
    assert rel_diff(model.switch_to_deploy()(x), before) < 1e-9


# ----------------------------------------------------------------------------------------- beside timm


@pytest.mark.parametrize('name', params(TIMM_NAMES))
def test_model_state_dict_and_outputs_equal_those_of_timm(name):
    ours, theirs = create_model(name), timm_model(name)
    assert isinstance(ours, RepVGG)
    assert not isinstance(theirs, RepVGG)
    theirs.load_state_dict(randomise(ours).state_dict(), strict=True)
    theirs.eval()
    x = images()
    y, expected = ours(x), theirs(x)
    fresh = create_model(name)
    fresh.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.equal(fresh.eval()(x), y)

    # not bitwise: a library may sum in another order over the subsampled input of a strided 1x1 convolution, some units
    # in the last place that the layers amplify: in float32 and D2se's 40 layers, 1e-6
    exact = theirs.double()(x.double())
    assert rel_diff(ours.double()(x.double()), exact) < 1e-13
    assert rel_diff(y, exact) <= 3 * rel_diff(expected, exact)


@pytest.mark.parametrize('name', params(TIMM_NAMES))
def test_switch_state_dict_fits_timm_and_is_more_exact(name):
    ours = randomise(create_model(name))
    theirs = timm_model(name).eval()
    theirs.load_state_dict(ours.state_dict())
    exact = copy.deepcopy(ours).double().switch_to_deploy().state_dict()
    ours.switch_to_deploy()
    theirs = timm.utils.reparameterize_model(theirs)
    for key, value in theirs.state_dict().items():
        if not key.endswith('id_tensor') and 'reparam_conv' in key:
            assert (ours.state_dict()[key] - exact[key]).abs().max() <= (value - exact[key]).abs().max()

    folded = ours.state_dict()
    theirs.load_state_dict(folded, strict=True)
    x = images()
    assert torch.equal(ours(x), theirs(x))
    fresh = create_model(name, deploy=True).eval()
    fresh.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.equal(fresh(x), ours(x))


@pytest.mark.parametrize('name', ['repvgg_a0', 'repvgg_b1g4'])
def test_model_gradients_equal_those_of_timm(name):
    ours, theirs = randomise(create_model(name).double()), timm_model(name).double()
    theirs.load_state_dict(ours.state_dict())
    x = images(2, dtype=torch.float64)
    for model in (ours.train(), theirs.train()):
        model(x).square().sum().backward()
    expected = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        assert rel_diff(parameter.grad, expected[key].grad) < 1e-10, key


def test_model_features_only_equals_that_of_timm():
    for kwargs in (dict(), dict(out_indices=(1, 3)), dict(output_stride=8)):
        ours = create_model('repvgg_a0', features_only=True, **kwargs)
        theirs = timm_model('repvgg_a0', features_only=True, **kwargs)
        assert ours.feature_info.channels() == theirs.feature_info.channels()
        assert ours.feature_info.reduction() == theirs.feature_info.reduction()
        randomise_features(ours)
        theirs.load_state_dict(ours.state_dict())
        for a, b in zip(run_branches(lambda: ours.eval()(images())), theirs.eval()(images()), strict=True):  # noqa: B023
            assert torch.equal(a, b)


def randomise_features(model):
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.3, 1.2)
            nn.init.uniform_(m.running_var, 0.5, 2)


# --------------------------------------------------------------------------------------------- mutants


def drop_identity(patch):
    real = RepVGGBlock.named_branches
    patch.setattr(RepVGGBlock, 'named_branches', lambda self: {k: b for k, b in real(self).items() if k != 'identity'})


def other_eps(patch):
    real = BNStats.of
    patch.setattr(BNStats, 'of', lambda norm: real(norm)._replace(eps=1e-2))


def swap_statistics(patch):
    real = RepVGGBlock.named_branches

    def named_branches(self):
        return real(self) | {'conv_1x1': branches.ConvBranch(self.conv_1x1.conv, self.conv_kxk.bn)}

    patch.setattr(RepVGGBlock, 'named_branches', named_branches)


def swap_group_index(patch):
    def identity_kernel(out_chs, in_chs, groups, dtype, device):
        kernel = torch.zeros(out_chs, in_chs // groups, 1, 1, dtype=dtype, device=device)
        for channel in range(out_chs):
            kernel[channel, channel // groups] = 1
        return kernel

    patch.setattr(parallel, 'identity_kernel', identity_kernel)


def lose_bias(patch):
    real = branch_sum.fold_exactly
    patch.setattr(branch_sum, 'fold_exactly', lambda *args: (k := real(*args)[0], k.new_zeros(len(k))))


def fold_in_half_precision(patch):
    real = branch_sum.fold_exactly
    patch.setattr(
        branch_sum, 'fold_exactly', lambda branches, norm: real([b._replace(kernel=b.kernel.half()) for b in branches])
    )


MUTANTS = [drop_identity, other_eps, swap_statistics, swap_group_index, lose_bias, fold_in_half_precision]


@pytest.mark.parametrize('mutant', MUTANTS, ids=lambda mutant: mutant.__name__)
@pytest.mark.parametrize('name', ['test_repvgg', 'repvgg_b1g4'])
def test_switch_wrong_fold_changes_the_outputs(name, mutant, monkeypatch):
    if mutant is swap_group_index and name == 'test_repvgg':
        pytest.skip('without groups there is one index')
    model = randomise(create_model(name).double())
    x = images(dtype=torch.float64)
    before = model(x)
    mutant(monkeypatch)
    assert rel_diff(model.switch_to_deploy()(x), before) > 1e-6


# ------------------------------------------------------------------------------------------- interface


@pytest.fixture(params=[False, True], ids=['training', 'deploy'])
def model(request):
    return create_model('test_repvgg', deploy=request.param).eval()


def test_model_has_the_interface_of_timm(model):
    x = images(2, px=32)
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 4, 4)
    assert torch.equal(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert (model.in_chans, model.num_classes, model.global_pool) == (3, 10, 'avg')
    assert (model.drop_rate, model.drop_path_rate, model.output_stride) == (0, 0, 8)
    assert (model.device, model.dtype) == (x.device, torch.float32)
    assert model.no_weight_decay() == set()
    assert model.get_classifier() is model.head.fc


def test_forward_intermediates_any_indices_equal_the_features(model):
    x = images(2, px=32)
    final, maps = model.forward_intermediates(x)
    assert [t.shape[1] for t in maps] == [info['num_chs'] for info in model.feature_info]
    assert [32 // t.shape[2] for t in maps] == [info['reduction'] for info in model.feature_info]
    assert torch.equal(final, model.forward_features(x))
    early = model.forward_intermediates(x, indices=[0, 2], stop_early=True, intermediates_only=True)
    assert [torch.equal(a, b) for a, b in zip(early, (maps[0], maps[2]), strict=True)] == [
        True,
        True,
    ]
    kept = model.prune_intermediate_layers([0, 2])
    assert kept == [0, 2]
    assert torch.equal(model.forward_intermediates(x, indices=[2], intermediates_only=True)[0], maps[2])
    assert model.num_features == maps[2].shape[1]


def test_reset_classifier_changes_the_outputs(model):
    x = images(2, px=32)
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(5, 'catavgmax')
    assert model(x).shape == (2, 5)
    assert model.head_hidden_size == 2 * model.num_features


@pytest.mark.cpu
@pytest.mark.parametrize(
    ('block', 'convs'),
    [
        ('repvgg', ('conv_kxk.conv', 'conv_1x1.conv')),
        ('dbb', ('branches.kxk.conv', 'branches.1x1.conv')),
        ('csla', ('branches.kxk.branch.conv', 'branches.1x1.branch.conv')),
        ('dirac', ()),
    ],
)
@pytest.mark.parametrize('name', ['repvgg_a0', 'repvgg_d2se'])
def test_first_conv_names_the_convolutions_that_read_images(name, block, convs):
    model = timm.create_model(name, block=block, device='meta')
    assert model.stem.input_convs() == list(convs)
    assert model.pretrained_cfg['first_conv'] == (tuple(f'stem.{conv}' for conv in convs) or None)
    deployed = timm.create_model(name, block=block, deploy=True, device='meta')
    assert deployed.stem.input_convs() == ['reparam_conv']
    assert deployed.pretrained_cfg['first_conv'] == 'stem.reparam_conv'


def test_switch_after_wrapped_stem_names_its_convolution():
    model = randomise(create_model('test_repvgg'), px=32)
    x = images(2, px=32)
    model.stem = nn.Sequential(nn.Identity(), model.stem)
    expected = model(x)
    assert rel_diff(model.switch_to_deploy()(x), expected) < 1e-4
    assert model.pretrained_cfg['first_conv'] == 'stem.1.reparam_conv'


class NarrowHead(nn.Module):
    """A user's own head, which has nothing that timm's has."""

    def __init__(self, chs: int):
        super().__init__()
        self.linear = nn.Linear(chs, 3)

    def forward(self, x):
        return self.linear(x.mean((2, 3)))


HEADS = {
    'identity': (nn.Identity, (2, 96, 4, 4)),
    'sequential': (lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 3)), (2, 3)),
    'own class': (lambda: NarrowHead(96), (2, 3)),
}


@pytest.mark.parametrize('head', HEADS)
def test_replaced_head_takes_the_feature_map_only(model, head):
    make, shape = HEADS[head]
    x = images(2, px=32)
    model.head = to_device(make())
    assert model(x).shape == shape
    assert model.forward_head(model.forward_features(x)).shape == shape
    with pytest.raises(TypeError, match='pre_logits'):
        model.forward_head(model.forward_features(x), pre_logits=True)
    assert model.head_hidden_size == model.num_features
    assert model.get_classifier() is model.head
    assert model.classifier_names == ()
    copied = copy.deepcopy(model)
    copied.load_state_dict(model.switch_to_deploy().state_dict() if model.deploy else model.state_dict())
    assert torch.equal(copied(x), model(x))
    assert timm.models.group_parameters(model, model.group_matcher())


@pytest.mark.parametrize('head', HEADS)
def test_reset_classifier_after_replaced_head_makes_one_of_timm(model, head):
    x = images(2, px=32)
    model.head = to_device(HEADS[head][0]())
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    assert model.classifier_names == ('head.fc',)
    assert not model.head.training


@pytest.mark.parametrize('head', HEADS)
def test_prune_after_replaced_head_leaves_the_features(model, head):
    x = images(2, px=32)
    model.head = to_device(HEADS[head][0]())
    expected = model.forward_intermediates(x, indices=[2], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([2]) == [2]
    assert torch.equal(model(x), expected)
    model.reset_classifier(4, 'avg')
    assert model(x).shape == (2, 4)


@pytest.mark.cpu
def test_model_inside_another_translates_keys_of_foreign_layouts(model):
    whole = nn.ModuleDict({'backbone': model, 'neck': nn.Linear(2, 2)})
    foreign = {f'backbone.{key}': value for key, value in rename(model.state_dict(), OFFICIAL).items()}
    foreign |= {f'neck.{key}': value for key, value in whole['neck'].state_dict().items()}
    other = create_model('test_repvgg', deploy=model.deploy).eval()
    copied = copy.deepcopy(nn.ModuleDict({'backbone': other, 'neck': nn.Linear(2, 2)}))  # the hook is that of the copy
    copied.load_state_dict(foreign)
    x = images(2, px=32)
    assert torch.equal(copied['backbone'](x), model(x))
    revived = pickle.loads(pickle.dumps(other))  # noqa: S301
    revived.load_state_dict(rename(model.state_dict(), OFFICIAL))
    assert torch.equal(revived(x), model(x))


def test_copied_model_computes_the_same(model):
    x = images(2, px=32)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert torch.equal(copied(x), model(x))
    assert torch.equal(copy.deepcopy(model).switch_to_deploy()(x), model.switch_to_deploy()(x))


@pytest.mark.cpu
def test_model_scripted_or_traced_computes_the_same(model):
    x = images(2, px=32)
    for exported in (torch.jit.script(model), torch.jit.trace(model, x)):
        torch.testing.assert_close(exported(x), model(x))


@pytest.mark.cpu
@pytest.mark.parametrize('name', ['test_repvgg', 'repvggplus_l2pse'])
def test_layer_groups_with_layer_decay_cover_every_parameter(name):
    from timm.optim import create_optimizer_v2

    model = timm.create_model(name, device='meta')
    optimizer = create_optimizer_v2(model, opt='sgd', lr=0.1, weight_decay=0.1, layer_decay=0.5)
    assert sum(len(group['params']) for group in optimizer.param_groups) == len(list(model.parameters()))
    scales = {group['lr_scale'] for group in optimizer.param_groups}
    assert len(scales) == 2 + sum(model.variant.depths)


@pytest.mark.parametrize('block', block_params(repvgg_zoo.BLOCKS))
@pytest.mark.parametrize('momentum', [0.1, None])
def test_grad_checkpointing_two_batches_gives_equal_training(block, momentum):
    x = images(4, px=32, dtype=torch.float64)
    norm_layer = functools.partial(nn.BatchNorm2d, momentum=momentum)
    plain = create_model('test_repvgg', block=block, norm_layer=norm_layer).double()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    for model in (plain, saving):
        for batch in (x, x.flip(1) ** 2):  # from the second one on, the mean of all batches is not that of this one
            model(batch).square().sum().backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    for a, b in zip(plain.buffers(), saving.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    assert {m.momentum for m in saving.modules() if isinstance(m, nn.BatchNorm2d)} == {momentum}


@pytest.mark.parametrize('block', ['repvgg', 'dbb'])
def test_grad_checkpointing_two_forward_and_backward_passes_gives_equal_training(block):
    """The statistics move between a forward pass and its repetition, which takes place once for each backward pass."""
    plain = create_model('test_repvgg', block=block, num_classes=10).double()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    x = images(4, px=32, dtype=torch.float64)
    for model in (plain, saving):
        first, second = model(x), model(x.flip(1) ** 2)
        first[:, 0].sum().backward(retain_graph=True)
        (first[:, 1] * second[:, 2]).sum().backward()
        penalised = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(penalised).square().sum(), penalised, create_graph=True)
        grad.square().sum().backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    for a, b in zip(plain.buffers(), saving.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_grad_checkpointing_without_statistics_gives_gradients():
    norm_layer = functools.partial(nn.BatchNorm2d, momentum=None, track_running_stats=False)
    model = create_model('test_repvgg', norm_layer=norm_layer)
    model.set_grad_checkpointing()
    model(images(4, px=32)).sum().backward()
    assert model.stages[3][0].conv_kxk.conv.weight.grad is not None


@pytest.mark.parametrize('run', ['forward_features', 'forward_intermediates', 'forward'])
def test_grad_checkpointing_backward_runs_the_stages_again(run):
    model = create_model('test_repvgg', num_classes=10)
    model.set_grad_checkpointing()
    runs = []
    model.stages[1][0].register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    outputs = getattr(model, run)(images(2, px=32))
    output = outputs[0] if isinstance(outputs, tuple) else outputs
    assert len(runs) == 1
    output.sum().backward()
    assert len(runs) == 2


def test_model_channels_last_training_gives_finite_gradients():
    model = create_model('repvgg_a0').to(memory_format=torch.channels_last)
    x = images(4).contiguous(memory_format=torch.channels_last)
    model(x).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_drop_path_deploy_form_has_none():
    model = create_model('test_repvgg', drop_path_rate=0.9)
    x = images(16, px=32)
    torch.manual_seed(0)
    assert not torch.equal(model(x), model(x))
    deployed = create_model('test_repvgg', drop_path_rate=0.3, deploy=True)
    assert not any('DropPath' in type(m).__name__ for m in deployed.modules())


@pytest.mark.cpu
def test_model_layers_by_name_are_used():
    model = create_model('test_repvgg', act_layer='silu', norm_layer='batchnorm2d')
    assert isinstance(model.stem.act, nn.SiLU)
    assert isinstance(model.stem.conv_kxk.bn, nn.BatchNorm2d)


def test_aux_heads_after_training_fold_away():
    model = create_model('repvggplus_l2pse', aux_heads=True, num_classes=7)
    x = images(2)
    logits, aux_logits = model.train()(x)
    assert logits.shape == (2, 7)
    assert [aux.shape for aux in aux_logits] == [(2, 7)] * 3
    (logits.sum() + sum(aux.sum() for aux in aux_logits)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.eval()(x).shape == (2, 7)
    plain = create_model('repvggplus_l2pse', num_classes=7).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(x), model(x))
    assert model.switch_to_deploy().train()(x).shape == (2, 7)
    assert model.aux_heads is None


@pytest.mark.cpu
def test_aux_heads_of_variant_without_raises():
    with pytest.raises(ValueError, match=r'repvgg_a0 has no auxiliary heads; these have: repvggplus_l2pse'):
        create_model('repvgg_a0', aux_heads=True)


@pytest.mark.cpu
def test_output_stride_unknown_raises():
    with pytest.raises(ValueError, match='output_stride is 4; it can be 8, 16 or 32'):
        create_model('repvgg_a0', output_stride=4)


# -------------------------------------------------------------------------------------------- registry


@pytest.fixture(scope='module')
def timm_alone():
    """What timm tells of its RepVGG in a process that never imports the zoo."""
    code = (
        'import timm, json; from dataclasses import asdict\n'
        "names = timm.list_models('repvgg*')\n"
        "tags = timm.list_pretrained('repvgg*')\n"
        'print(json.dumps([names, tags, {t: asdict(timm.get_pretrained_cfg(t)) for t in names + tags}]))'
    )
    return json.loads(subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True).stdout)


@pytest.mark.cpu
def test_registry_entries_of_timm_are_unchanged(timm_alone):
    names, tags, cfgs = timm_alone
    assert names == TIMM_NAMES
    assert set(tags) < set(timm.list_pretrained('repvgg*'))
    for name, cfg in cfgs.items():
        assert json.loads(json.dumps(asdict(timm.get_pretrained_cfg(name)))) == cfg
        assert timm.models.is_model_pretrained(name)


@pytest.mark.cpu
def test_entry_points_match_the_variants():
    entry_points = {
        name: value
        for name, value in vars(repvgg_zoo.repvgg).items()
        if inspect.isfunction(value) and value.__module__ == 'repvgg_zoo.repvgg' and 'repvgg' in name and name[0] != '_'
    }
    assert set(entry_points) == set(VARIANTS)
    for name, entry_point in entry_points.items():
        assert entry_point(device='meta').variant is VARIANTS[name]
        assert timm.models.model_entrypoint(name) is entry_point
        assert len(entry_point.__doc__.splitlines()) == 1
    assert set(repvgg_zoo.repvgg.__all__) == {'RepVGG', *VARIANTS}
    assert len(repvgg_zoo.repvgg.__all__) == 1 + len(VARIANTS)


@pytest.mark.cpu
def test_registry_new_entries_are_listed():
    assert timm.list_models('*', module='repvgg') == timm.list_models('*repvgg*') == sorted(NAMES)
    assert timm.models.is_model_pretrained('repvgg_b3.rvgg_in1k_deploy')
    assert timm.models.is_model_pretrained('repvgg_b1g2.rvgg_in1k')  # at an address
    assert not timm.models.is_model_pretrained('repvgg_b2g2.rvgg_in1k')
    assert timm.get_pretrained_cfg('repvggplus_l2pse').input_size == (3, 320, 320)
    assert timm.get_pretrained_cfg('repvgg_a0.rvgg_in1k_deploy').first_conv == 'stem.reparam_conv'


@pytest.mark.cpu
def test_import_beside_timm_warns_of_nothing():
    code = (
        'import timm, logging, warnings\n'
        'logging.basicConfig(level=0)\n'
        "warnings.simplefilter('error')\n"
        'import repvgg_zoo\n'
        "warnings.simplefilter('ignore')"
    )
    done = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True)
    assert done.stdout == done.stderr == ''


@pytest.mark.cpu
def test_create_unknown_tag_raises_with_the_nearest():
    with pytest.raises(RuntimeError, match=r"unknown tag 'rvgg_in1' of repvgg_a0; did you mean 'rvgg_in1k'"):
        create_model('repvgg_a0.rvgg_in1', pretrained=True)


@pytest.mark.cpu
def test_create_deploy_tag_gives_the_deploy_form_unless_told():
    assert create_model('repvgg_a0.rvgg_in1k_deploy').deploy
    assert not create_model('repvgg_a0.rvgg_in1k_deploy', deploy=False).deploy
    assert create_model('repvgg_a0.rvgg_in1k', deploy=True).deploy
    assert not create_model('repvgg_a0').deploy


@pytest.mark.cpu
def test_checkpoint_error_is_caught_like_a_torch_error():
    assert issubclass(CheckpointError, RuntimeError)
