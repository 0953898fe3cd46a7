"""The official code, as an independent oracle for its layouts and for the function of both forms."""

import pytest
import timm
import torch
from helpers import PLUS, images, logits, official, randomise, rel_diff

from repvgg_zoo import load_checkpoint, switch_to_deploy

NAMES = [
    'repvgg_a0',
    'repvgg_b1g2',
    'repvgg_a2_cifar',  # no identity in the first block of a stage that keeps the resolution
    'repvgg_a0_cifar',  # an identity there
    pytest.param('repvgg_d2se', marks=pytest.mark.slow),
    pytest.param(PLUS, marks=pytest.mark.slow),
]


@pytest.mark.parametrize('name', NAMES)
def test_official_checkpoint_gives_equal_outputs_in_both_forms(name, tmp_path, capsys):
    with torch.no_grad():
        theirs, x = official(name), images(dtype=torch.float64)
        plus = name == PLUS
        randomise(theirs.double())
        torch.save(theirs.state_dict(), tmp_path / 'training.pth')
        expected = logits(theirs, x)

        training = load_checkpoint(
            timm.create_model(name, aux_heads=plus or None).double().eval(), tmp_path / 'training.pth'
        )
        assert rel_diff(training(x), expected) < 1e-9
        if plus:
            _, aux = training.train()(images(2, dtype=torch.float64))
            official_outputs = theirs.train()(images(2, dtype=torch.float64))
            names = ('stage1_aux', 'stage2_aux', 'stage3_first_aux')
            assert all(rel_diff(a, official_outputs[n]) < 1e-9 for a, n in zip(aux, names, strict=True))
            theirs.eval().load_state_dict(torch.load(tmp_path / 'training.pth'))
            training = load_checkpoint(training.eval(), tmp_path / 'training.pth')
        folded_at_load = load_checkpoint(
            timm.create_model(name, deploy=True).double().eval(), tmp_path / 'training.pth'
        )
        assert rel_diff(folded_at_load(x), expected) < 1e-9
        del folded_at_load
        assert rel_diff(training.switch_to_deploy()(x), expected) < 1e-9

        for module in theirs.modules():
            if module is not theirs and hasattr(module, 'switch_to_deploy'):
                module.switch_to_deploy()
        torch.save({k: v for k, v in theirs.state_dict().items() if 'aux' not in k}, tmp_path / 'deploy.pth')
        deployed = load_checkpoint(timm.create_model(name, deploy=True).double().eval(), tmp_path / 'deploy.pth')
        assert rel_diff(deployed(x), logits(theirs, x)) < 1e-9
    capsys.readouterr()


@pytest.mark.parametrize('name', ['repvgg_a0', pytest.param(PLUS, marks=pytest.mark.slow)])
def test_official_module_switch_keeps_outputs(name, capsys):
    with torch.no_grad():
        theirs, x = randomise(official(name).double()), images(dtype=torch.float64)
        expected = logits(theirs, x)
        assert switch_to_deploy(theirs) is theirs
        assert rel_diff(logits(theirs, x), expected) < 1e-9
        assert not any('rbr_dense' in key for key in theirs.state_dict())
    capsys.readouterr()
