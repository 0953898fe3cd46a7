"""timm's own tests of models, from the source distribution of the installed timm, run for the zoo's models."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

import pytest
import timm
import torch
from helpers import TIMM_NAMES
from PIL import Image
from safetensors.torch import save

from repvgg_zoo import VARIANTS
from repvgg_zoo.pretrained.manifest import DEPLOY_SUFFIX, read_manifest, weights_dir
from repvgg_zoo.tools.publish.folders import build_folders
from repvgg_zoo.tools.publish.publication import own_publication
from repvgg_zoo.tools.publish.push import push_folders

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
FEW = {'test_repvgg', 'repvgg_a0', 'repvgg_b1g4'}
"""Variants that stand for the rest: of images of 32 pixels, the plainest, with groups."""
STRIDES = {'test_model_features_space2depth_reduction': 32, 'test_model_features_output_stride': 16}
"""Tests that expect a total stride, at least. Models for images of 32 pixels have less."""
FADES = {'repvggplus_l2pse', 'repvgg_d2se'}
"""Untrained, their 31 squeeze-excites let through so little that `test_reset_classifier_keeps_pool` takes any two
outputs for the same."""


def impossible(names: list[str]) -> set[tuple[str, str]]:
    """Tests that timm's RepVGG passes and these models cannot pass."""
    strides = {name: VARIANTS[name.split('.')[0]].total_stride for name in names}
    return {(test, name) for test, least in STRIDES.items() for name in names if strides[name] < least} | {
        ('test_reset_classifier_keeps_pool', name) for name in names if name in FADES
    }


_OFFLINE = {'HF_HUB_OFFLINE': '1'}


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


def outcomes(
    suite: Path,
    models: list[str],
    *options: str,
    tests: set[str] = frozenset(),
    variables: Mapping[str, str] = _OFFLINE,
) -> dict[str, dict[str, str]]:
    """By test and model: an empty string if every case passed, otherwise what was said of the first that did not."""
    report = suite / 'report.xml'
    environment = os.environ | {
        'PYTHONPATH': os.pathsep.join([str(HERE), str(HERE.parents[1])]),
        'TIMM_SUITE_MODELS': ' '.join(models),
        'TIMM_SUITE_TESTS': ' '.join(sorted(tests)),
        **variables,
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
    assert failures.keys() == impossible(names), failures


BIRD, OWL = 2, 24
"""Classes of CIFAR-10 and of ImageNet-1k. timm's test shows the model an owl."""


@torch.no_grad()
def bird_watcher() -> tuple[torch.nn.Module, Path]:
    """The bundled model with a thousand classes, among which it calls a bird an owl; and a picture that it calls so."""
    model = timm.create_model('test_repvgg', pretrained=True).eval()
    few, transform = model.get_classifier(), timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    picture = next(
        path
        for path in sorted(weights_dir().glob('cifar10/validation/bird/*.jpg'))
        if model(transform(Image.open(path)).unsqueeze(0)).argmax() == BIRD
    )
    model.reset_classifier(1000)
    many = model.get_classifier()
    classes = [OWL if index == BIRD else index for index in range(few.out_features)]
    many.weight.zero_()
    many.bias.fill_(-10)
    many.weight[classes], many.bias[classes] = few.weight, few.bias
    return model, picture


@pytest.mark.timeout(900)
def test_timms_test_of_inference_passes_for_what_publish_writes(suite, hub, tmp_path):
    """timm's own test downloads the reference outputs of a model and compares. That of the owl is made here."""
    model, picture = bird_watcher()
    torch.save(model.state_dict(), tmp_path / 'c.pth')
    published = build_folders(
        own_publication('test_repvgg.owl', tmp_path / 'c.pth'), owner='timm', out=tmp_path / 'out'
    )
    push_folders(published)
    for item in published:
        made = timm.create_model(f'local-dir:{item.folder}', pretrained=True).eval()
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(made))
        with torch.inference_mode():
            x = transform(Image.open(picture)).unsqueeze(0)
            features = made.forward_features(x)
            pre_logits = made.forward_head(features, pre_logits=True)
            tensors = {'input': x, 'output': made(x), 'features': features, 'pre_logits': pre_logits}
        repository = hub.repositories[item.hub_id]
        owl = {'test/owl_tensors.safetensors': save(tensors), 'test/test_owl.jpg': picture.read_bytes()}
        repository.commit(repository.commits[-1][1] | {name: hub.put(content) for name, content in owl.items()})
    names = [item.name for item in published]
    found = outcomes(
        suite,
        names,
        *('-p', 'timm_owl'),
        tests={'test_model_inference'},
        variables=hub.env(tmp_path / 'home'),
    )
    assert found == {'test_model_inference': dict.fromkeys(names, '')}
    for item in published:
        assert hub.count('GET', f'{item.hub_id}/resolve/main/test/rand_tensors') == 1
