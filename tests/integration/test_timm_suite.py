"""timm's own tests of models, from the source distribution of the installed timm, run for the zoo's models."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import pytest
import timm
from helpers import TIMM_NAMES

from repvgg_zoo import VARIANTS
from repvgg_zoo.pretrained.manifest import DEPLOY_SUFFIX, read_manifest

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
FEW = {'test_repvgg', 'repvgg_a0', 'repvgg_b1g4'}
"""Variants that stand for the rest: of images of 32 pixels, the plainest, with groups."""
STRIDE = 'it expects a total stride of 32, which is 16 or 8 here'
FADES = 'untrained, its 31 squeeze-excites let through so little that the comparison takes any two outputs for the same'
EXCEPTIONS = {
    **{
        ('test_model_features_space2depth_reduction', name + form): STRIDE
        for name, tag in (('test_repvgg', 'cifar10'), *((f'repvgg_a{n}_cifar', 'chenyaofo_cifar10') for n in range(3)))
        for form in ('', f'.{tag}_deploy')
    },
    ('test_reset_classifier_keeps_pool', 'repvggplus_l2pse'): FADES,
    ('test_reset_classifier_keeps_pool', 'repvgg_d2se'): FADES,
}
"""Tests that timm's RepVGG passes and these models cannot pass, with the reason."""


@pytest.fixture(scope='module')
def suite(tmp_path_factory):
    """A folder with timm's tests."""
    folder = tmp_path_factory.mktemp('timm')
    download = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', ':all:']
    subprocess.run([*download, f'timm=={timm.__version__}', '--dest', folder], check=True)
    (archive,) = folder.glob('*.tar.gz')
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter='data')
    tests = folder / 'tests'
    shutil.copytree(next(folder.glob('timm-*/tests')), tests)
    (tests / 'pytest.ini').write_text('[pytest]\n')
    return tests


def outcomes(suite: Path, models: list[str], *options: str, tests: set[str] = frozenset()) -> dict[str, dict[str, str]]:
    """By test and model: an empty string if every case passed, otherwise what was said of the first that did not."""
    report = suite / 'report.xml'
    environment = os.environ | {
        'PYTHONPATH': os.pathsep.join([str(HERE), str(HERE.parents[1])]),
        'TIMM_SUITE_MODELS': ' '.join(models),
        'TIMM_SUITE_TESTS': ' '.join(sorted(tests)),
        'HF_HUB_OFFLINE': '1',
    }
    command = [sys.executable, '-m', 'pytest', '-q', *options, '-p', 'timm_suite', f'--junitxml={report}']
    done = subprocess.run([*command, 'test_models.py'], cwd=suite, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = defaultdict(dict)
    for case in ElementTree.parse(report).iter('testcase'):  # noqa: S314
        about = {p.get('name'): p.get('value') for p in case.iter('property')}
        bad = [child.get('message') or child.tag for child in case if child.tag in ('failure', 'error', 'skipped')]
        by_model = found[about['test']]
        by_model[about['model']] = by_model.get(about['model']) or ''.join(bad[:1])
    return found


@pytest.fixture(scope='module')
def expected(suite):
    """The tests that timm's own RepVGG passes in a process without the zoo."""
    passed = {test for test, models in outcomes(suite, TIMM_NAMES[:1]).items() if not any(models.values())}
    assert {'test_model_forward', 'test_model_backward', 'test_model_default_cfgs'} < passed
    return passed


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    'variants', [FEW, pytest.param(VARIANTS.keys() - FEW, marks=pytest.mark.exhaustive)], ids=['few', 'rest']
)
def test_timm_suite_passes_what_timms_own_model_passes(suite, expected, variants):
    first = {arch: next(r for r in read_manifest().values() if r.arch == arch) for arch in variants}
    names = [name for arch, record in first.items() for name in (arch, record.name + DEPLOY_SUFFIX)]
    found = outcomes(suite, names, '-p', 'repvgg_zoo', tests=expected)
    assert found.keys() == expected
    failures = {
        (test, model): message for test, models in found.items() for model, message in models.items() if message
    }
    assert all(models.keys() == set(names) for models in found.values())
    assert failures.keys() == {(test, name) for test, name in EXCEPTIONS if name in names}, failures
