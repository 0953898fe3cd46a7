"""The max-norm constraint."""

import pytest
import torch
from helpers import create_model, images

from repvgg_zoo import max_norm


def test_max_norm_limits_every_output_channel_after_a_step():
    torch.manual_seed(0)
    model = create_model('test_repvgg')
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = max_norm(optimizer, model, 0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert max(p.flatten(1).norm(dim=1).max() for p in model.parameters() if p.ndim > 1) > 0.9
    model(images(4, 32)).square().mean().backward()
    plain = {name: before[name] - 0.1 * p.grad for name, p in model.named_parameters()}
    optimizer.step()
    for name, p in model.named_parameters():
        expected = plain[name]
        if p.ndim > 1:
            norm = expected.flatten(1).norm(dim=1).view(-1, *[1] * (p.ndim - 1))
            expected = expected * (0.5 / norm).clamp(max=1)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-6)  # renorm adds 1e-7 to a norm
    handle.remove()
    model.head.fc.weight.data.fill_(9.0)
    optimizer.step()
    assert model.head.fc.weight.min() > 5


def test_max_norm_leaves_what_is_frozen():
    model = create_model('test_repvgg')
    model.head.fc.weight.requires_grad_(False)
    model.head.fc.weight.fill_(9.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    max_norm(optimizer, model, 0.5)
    optimizer.step()
    assert torch.equal(model.head.fc.weight, torch.full_like(model.head.fc.weight, 9.0))


@pytest.mark.parametrize('limit', [0, -1, float('nan')])
def test_max_norm_impossible_limit_raises(limit):
    model = create_model('test_repvgg')
    with pytest.raises(ValueError, match='it takes a number above 0'):
        max_norm(torch.optim.SGD(model.parameters(), lr=0.1), model, limit)
