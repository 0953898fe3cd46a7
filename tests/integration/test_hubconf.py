"""torch.hub from a bare checkout: without site (`-S`), an installed or editable package is out of sight."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm

from repvgg_zoo import VARIANTS

CHECKOUT = Path(__file__).parents[2]
DEPENDENCIES = Path(timm.__file__).parents[1]
PRELUDE = f"""
import sys
sys.path.append({str(DEPENDENCIES)!r})
import importlib.util, torch
assert importlib.util.find_spec('repvgg_zoo') is None, 'the package is installed here'
checkout = {str(CHECKOUT)!r}
"""


def run(code: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, '-S', '-P', '-c', PRELUDE + code],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={'HOME': str(cwd)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_hub_list_and_help_tell_every_variant(tmp_path):
    """They know no `source='local'`, but take what an earlier download left in the cache."""
    cache = tmp_path / '.cache' / 'torch' / 'hub'
    cache.mkdir(parents=True)
    (cache / 'owner_repvgg_zoo_main').symlink_to(CHECKOUT)
    output = run(
        "repo = 'owner/repvgg_zoo:main'\n"
        'print(*torch.hub.list(repo, trust_repo=True, verbose=False))\n'
        "print(torch.hub.help(repo, 'repvgg_b1g2', trust_repo=True))\n"
        "print(torch.hub.load(repo, 'repvgg_b1g2', trust_repo=True, verbose=False, device='meta').deploy)",
        tmp_path,
    )
    names, *doc = output.splitlines()
    assert names.split() == sorted(VARIANTS)
    assert doc[0] == 'RepVGG-B1g2 (arXiv 2101.03697).'
    assert doc[-1] == 'False'


def test_hub_load_passes_every_argument(tmp_path):
    output = run(
        f'for name in {sorted(VARIANTS)}:\n'
        "    model = torch.hub.load(checkout, name, source='local', pretrained=False, deploy=True, num_classes=10,"
        " in_chans=1, device='meta')\n"
        '    print(name, model.deploy, model.num_classes, model.in_chans, model(torch.empty(2, 1, 64, 64,'
        " device='meta')).shape)\n",
        tmp_path,
    )
    assert output.splitlines() == [f'{name} True 10 1 torch.Size([2, 10])' for name in sorted(VARIANTS)]


@pytest.mark.parametrize('deploy', [False, True])
def test_hub_load_pretrained_gives_logits(deploy, tmp_path):
    output = run(
        f"model = torch.hub.load(checkout, 'test_repvgg', source='local', pretrained=True, deploy={deploy})\n"
        'print(model.deploy, model.eval()(torch.zeros(1, 3, 32, 32)).shape)',
        tmp_path,
    )
    assert output.strip() == f'{deploy} torch.Size([1, 10])'
