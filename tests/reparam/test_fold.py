"""The fold on tensors, against running the branches in float64."""

import pytest
import torch
from helpers import to_device
from torch import nn

from repvgg_zoo.reparam.fold import BNStats, ConvBN, FoldError, fold_branches, fold_exactly, identity_kernel

pytestmark = pytest.mark.device
EPS = {torch.float64: 2.3e-16, torch.float32: 1.2e-7, torch.float16: 9.8e-4, torch.bfloat16: 7.9e-3}


def random_bn(channels: int, seed: int, *, affine: bool = True, dtype=torch.float64, eps: float = 1e-5) -> BNStats:
    g = torch.Generator().manual_seed(seed)
    mean, weight, bias = torch.randn(3, channels, generator=g, dtype=torch.float64)
    var = torch.rand(channels, generator=g, dtype=torch.float64) * 3
    tensors = [mean, var, *((weight, bias) if affine else ())]
    return BNStats(*(to_device(t.to(dtype)) for t in tensors), eps=eps)


def norm_of(bn: BNStats) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(len(bn.mean), eps=bn.eps, affine=bn.weight is not None, dtype=bn.mean.dtype).eval()
    norm.running_mean, norm.running_var = bn.mean, bn.var
    if bn.weight is not None:
        del norm.weight, norm.bias  # plain tensors, which may be functions of others
        norm.weight, norm.bias = bn.weight, bn.bias
    return norm


def fold_block(kxk, bn_kxk, point, bn_point, bn_identity=None, *, bias_kxk=None, bias_1x1=None):
    """The three branches of RepVGG, folded for good."""
    branches = [ConvBN(kxk, bias_kxk, norm_of(bn_kxk)), ConvBN(point, bias_1x1, norm_of(bn_point))]
    if bn_identity is not None:
        groups = kxk.shape[0] // kxk.shape[1]
        eye = identity_kernel(kxk.shape[0], kxk.shape[0], groups, torch.float64, kxk.device)
        branches.append(ConvBN(eye, None, norm_of(bn_identity)))
    kernel, bias = fold_exactly(branches)
    return kernel.to(kxk.dtype), bias.to(kxk.dtype)


def apply(bn: BNStats, x: torch.Tensor) -> torch.Tensor:
    mean, var, weight, bias = (None if t is None else t.double() for t in bn[:4])
    return nn.functional.batch_norm(x, mean, var, weight, bias, eps=bn.eps)


def fold_and_reference(c_in, c_out, groups, *, identity, affine=True, dtype=torch.float64, k=3, eps=1e-5):
    g = torch.Generator().manual_seed(0)
    kxk = to_device(torch.randn(c_out, c_in // groups, k, k, generator=g).to(dtype))
    point = to_device(torch.randn(c_out, c_in // groups, 1, 1, generator=g).to(dtype))
    bns = [random_bn(c_out, seed, affine=affine, dtype=dtype, eps=eps) for seed in (1, 2, 3)]
    kernel, bias = fold_block(kxk, bns[0], point, bns[1], bns[2] if identity else None)
    x = to_device(torch.randn(2, c_in, 9, 9, generator=g, dtype=torch.float64))
    reference = apply(bns[0], nn.functional.conv2d(x, kxk.double(), padding=k // 2, groups=groups))
    reference = reference + apply(bns[1], nn.functional.conv2d(x, point.double(), groups=groups))
    if identity:
        reference = reference + apply(bns[2], x)
    folded = nn.functional.conv2d(x, kernel.double(), bias.double(), padding=k // 2, groups=groups)
    return kernel, bias, folded, reference


@pytest.mark.parametrize('affine', [True, False])
@pytest.mark.parametrize(
    ('c_in', 'c_out', 'groups', 'identity'),
    [(6, 6, 1, True), (6, 6, 2, True), (12, 12, 4, True), (8, 8, 8, True), (6, 10, 1, False), (6, 12, 3, False)],
)
def test_fold_two_or_three_branches_keeps_the_outputs(c_in, c_out, groups, identity, affine):
    _, _, folded, reference = fold_and_reference(c_in, c_out, groups, identity=identity, affine=affine)
    torch.testing.assert_close(folded, reference, rtol=0, atol=1e-12 * reference.abs().max().item())


def test_fold_many_channels_keeps_the_outputs():
    _, _, folded, reference = fold_and_reference(300, 300, 1, identity=True)
    torch.testing.assert_close(folded, reference, rtol=0, atol=1e-12 * reference.abs().max().item())


def test_fold_larger_kernel_keeps_the_outputs():
    _, _, folded, reference = fold_and_reference(4, 4, 2, identity=True, k=5)
    torch.testing.assert_close(folded, reference, rtol=0, atol=1e-12 * reference.abs().max().item())


def test_fold_other_eps_keeps_the_outputs():
    _, _, folded, reference = fold_and_reference(6, 6, 1, identity=True, eps=0.1)
    torch.testing.assert_close(folded, reference, rtol=0, atol=1e-12 * reference.abs().max().item())


@pytest.mark.parametrize('dtype', EPS, ids=str)
def test_fold_each_dtype_is_right_to_two_roundings(dtype):
    """Half precision is rounded once, at the end; in float32 the scale is rounded, and then its product."""
    g = torch.Generator().manual_seed(0)
    kxk, point = (to_device(torch.randn(8, 4, k, k, generator=g).to(dtype)) for k in (3, 1))
    bns = [random_bn(8, seed, dtype=dtype) for seed in (1, 2, 3)]
    kernel, bias = fold_block(kxk, bns[0], point, bns[1], bns[2])
    assert kernel.dtype == bias.dtype == dtype

    (scale, shift), (scale_1x1, shift_1x1), (scale_identity, shift_identity) = (bn.scale_shift() for bn in bns)
    terms = torch.zeros(3, 8, 4, 3, 3, dtype=torch.float64, device=kxk.device)
    terms[0] = kxk.double() * scale.view(-1, 1, 1, 1)
    terms[1, :, :, 1:2, 1:2] = point.double() * scale_1x1.view(-1, 1, 1, 1)
    for channel in range(8):
        terms[2, channel, channel % 4, 1, 1] = scale_identity[channel]
    # float64 has no wider type to sum in: fold and reference both round three times, relative to terms that may cancel
    roundings = {torch.float64: 3, torch.float32: 1}.get(dtype, 0.501)
    size = terms.abs().sum(0) if dtype == torch.float64 else terms.sum(0).abs()
    assert ((kernel.double() - terms.sum(0)).abs() <= roundings * EPS[dtype] * size).all()
    exact_bias = shift + shift_1x1 + shift_identity
    assert ((bias.double() - exact_bias).abs() <= EPS[dtype] / 2 * exact_bias.abs()).all()


def test_fold_convolutions_with_bias_keeps_the_outputs():
    kxk, point, biases = (to_device(torch.randn(*s).double()) for s in ((4, 2, 3, 3), (4, 2, 1, 1), (2, 4)))
    bns = random_bn(4, 0), random_bn(4, 1)
    kernel, bias = fold_block(kxk, bns[0], point, bns[1], bias_kxk=biases[0], bias_1x1=biases[1])
    x = to_device(torch.randn(1, 2, 5, 5).double())
    expected = apply(bns[0], nn.functional.conv2d(x, kxk, biases[0], padding=1))
    expected += apply(bns[1], nn.functional.conv2d(x, point, biases[1]))
    torch.testing.assert_close(nn.functional.conv2d(x, kernel, bias, padding=1), expected)


@pytest.mark.parametrize('sum_dtype', [torch.float32, torch.float64])
def test_fold_smaller_kernels_are_added_to_the_centre(sum_dtype):
    large, small = to_device(torch.ones(4, 2, 3, 3)), to_device(torch.full((4, 2, 1, 1), 2.0))
    for kernels in ([large, small], [small, large]):
        total, bias = fold_branches([ConvBN(k) for k in kernels], torch.float32, sum_dtype=sum_dtype)
        assert total.dtype == torch.float32
        assert total[:, :, 1, 1].unique().tolist() == [3]
        assert total.sum() == 4 * 2 * (9 + 2)
        assert not bias.any()
    assert large.unique().tolist() == [1]
    assert small.unique().tolist() == [2]


@pytest.mark.parametrize('sum_dtype', [torch.float32, torch.float64])
def test_fold_3x1_and_1x3_kernels_gives_a_cross(sum_dtype):
    """3x1 and 1x3: each tap is one kernel's, the centre that of both."""
    branches = [ConvBN(to_device(torch.ones(1, 1, 3, 1))), ConvBN(to_device(torch.full((1, 1, 1, 3), 2.0)))]
    total, _ = fold_branches(branches, torch.float32, sum_dtype=sum_dtype)
    assert total[0, 0].tolist() == [[0, 1, 0], [2, 3, 2], [0, 1, 0]]


def test_fold_taps_that_cancel_are_summed_wide():
    large, small = to_device(torch.full((1, 1, 3, 3), 1 + 2**-20)), to_device(torch.full((1, 1, 1, 1), -1.0))
    third = BNStats(*(to_device(torch.full((1,), value)) for value in (0.0, 1.0, 1 / 3, 0.0)), eps=0.0)
    branches = [ConvBN(large, None, norm_of(third)), ConvBN(small, None, norm_of(third))]
    exact = (large[0, 0, 1, 1].double() - 1) * third.weight.double()
    wide, _ = fold_branches(branches, torch.float32, sum_dtype=torch.float64)
    narrow, _ = fold_branches(branches, torch.float32)
    assert abs(wide[0, 0, 1, 1].double() - exact) <= EPS[torch.float32] * exact
    assert abs(narrow[0, 0, 1, 1].double() - exact) > 100 * EPS[torch.float32] * exact


def test_fold_one_branch_gives_a_new_tensor():
    """Or the sum would change the parameters."""
    kernel = to_device(torch.ones(4, 2, 3, 3))
    for norm in (None, nn.Identity(), norm_of(random_bn(4, 0, dtype=torch.float32))):
        fused, _ = fold_branches([ConvBN(kernel, None, norm)], torch.float32)
        assert fused.data_ptr() != kernel.data_ptr()


def test_fold_channels_last_keeps_format_and_inputs():
    kxk = to_device(torch.randn(4, 4, 3, 3)).to(memory_format=torch.channels_last)
    point, before = to_device(torch.randn(4, 4, 1, 1)), kxk.clone()
    kernel, _ = fold_block(kxk, random_bn(4, 0), point, random_bn(4, 1), random_bn(4, 2))
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(kxk, before)


def test_fold_float64_passes_gradcheck():
    shapes = ((2, 2, 3, 3), (2, 2, 1, 1), (2,))
    kxk, point, gamma = (to_device(torch.randn(*s).double()).requires_grad_() for s in shapes)
    mean, var = (to_device(t.double()) for t in (torch.randn(2), torch.rand(2) + 0.5))

    def folded(kxk, point, gamma):
        bn = BNStats(mean, var, gamma, gamma)
        return fold_block(kxk, bn, point, bn, bn)

    assert torch.autograd.gradcheck(folded, (kxk, point, gamma))


@pytest.mark.parametrize('value', [float('nan'), -1e-3, float('inf')])
def test_bn_stats_bad_variance_raises_with_its_channel(value):
    bn = random_bn(4, 0)
    bn.var[2] = value
    with pytest.raises(FoldError, match=r'running variance .* in channel 2'):
        bn.check()


@pytest.mark.parametrize('field', ['mean', 'weight', 'bias'])
def test_bn_stats_not_finite_raises_with_its_channel(field):
    bn = random_bn(4, 0)
    getattr(bn, field)[3] = float('nan')
    with pytest.raises(FoldError, match='running mean, weight or bias of channel 3 is not finite'):
        bn.check()


@pytest.mark.cpu
def test_fold_module_imports_only_torch():
    import ast
    import pathlib

    import repvgg_zoo.reparam.fold

    tree = ast.parse(pathlib.Path(repvgg_zoo.reparam.fold.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {'__future__', 'collections.abc', 'typing', 'torch', 'torch.nn.functional'}
