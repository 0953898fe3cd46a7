"""The extras: each brings what its commands import, also where nothing else is installed."""

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from repvgg_zoo.pretrained.manifest import weights_dir

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text('utf-8'))['project']
IMAGES = weights_dir() / 'cifar10' / 'validation' / 'cat'
BENCHMARK = ('benchmark', 'test_repvgg', '--rounds', '1', '--no-memory', '--out', 'out', '--runtimes')
COMMANDS = {
    'onnxruntime': (*BENCHMARK, 'onnxruntime'),
    'openvino': (*BENCHMARK, 'openvino'),
    'ncnn': (*BENCHMARK, 'ncnn'),
    'benchmark': (*BENCHMARK, 'eager', 'onnxruntime', 'openvino', 'ncnn'),
    'quantize': ('quantize', 'test_repvgg', 'out', '--subset', '2', '--images', IMAGES),
}
"""A command for each extra of users."""


def requirements_of(name: str) -> list[Requirement]:
    if name != 'repvgg-zoo':  # an installed copy may be of another revision
        return [Requirement(line) for line in requires(name) or []]
    extras = PROJECT['optional-dependencies'].items()
    lines = [f'{line}; extra == "{extra}"' for extra, lines in extras for line in lines]
    return [Requirement(line) for line in [*PROJECT['dependencies'], *lines]]


def installed_for(requirement: str) -> set[str]:
    """Return the distributions that pip installs for a requirement, of those that are here."""
    todo, seen = [Requirement(requirement)], set()
    while todo:
        wanted = todo.pop()
        for extra in ('', *wanted.extras):
            if (key := (canonicalize_name(wanted.name), extra)) in seen:
                continue
            try:
                found = requirements_of(wanted.name)
            except PackageNotFoundError:  # optional, or of another platform
                continue
            seen.add(key)
            todo += [r for r in found if r.marker is None or r.marker.evaluate({'extra': extra})]
    return {name for name, _ in seen} - {'repvgg-zoo'}


def environment(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Link some distributions into a folder, and return the variables of a process that sees no others."""
    for name in names:
        dist = distribution(name)
        for part in {file.parts[0] for file in dist.files or []} - {'..', '__pycache__'}:
            if not (folder / part).exists():
                (folder / part).symlink_to(dist.locate_file(part))
    return os.environ | {'PYTHONPATH': os.pathsep.join([str(folder), str(ROOT)])}


@pytest.fixture
def run(tmp_path):
    def run_alone(extra: str, *args: str) -> subprocess.CompletedProcess:
        (tmp_path / 'site').mkdir()
        env = environment(tmp_path / 'site', installed_for(f'repvgg-zoo[{extra}]' if extra else 'repvgg-zoo'))
        # -S: without the packages of this environment
        return subprocess.run([sys.executable, '-S', *args], cwd=tmp_path, env=env, capture_output=True, text=True)

    return run_alone


def test_base_installation_imports_every_module(run):
    code = (
        'import importlib, importlib.util, pkgutil, repvgg_zoo\n'
        "for module in pkgutil.walk_packages(repvgg_zoo.__path__, 'repvgg_zoo.'):\n"
        '    importlib.import_module(module.name)\n'
        "print([name for name in ('onnx', 'nncf', 'matplotlib', 'pytest') if importlib.util.find_spec(name)])"
    )
    done = run('', '-c', code)
    assert (done.stdout, done.returncode) == ('[]\n', 0), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize('extra', sorted(PROJECT['optional-dependencies'].keys() - {'docs', 'test', 'dev'}))
def test_extra_alone_runs_its_command(extra, run):
    done = run(extra, '-c', 'import sys; from repvgg_zoo_cli import main; sys.exit(main())', *map(str, COMMANDS[extra]))
    assert done.returncode == 0, done.stdout + done.stderr
