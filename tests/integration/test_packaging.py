"""The wheel and the sdist, and the wheel alone in an environment of its own."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def dist(tmp_path_factory):
    folder = tmp_path_factory.mktemp('dist')
    subprocess.run([sys.executable, '-m', 'build', '--outdir', folder, ROOT], check=True, capture_output=True)
    return folder


def test_wheel_and_sdist_hold_data_files(dist):
    wheel, sdist = next(dist.glob('*.whl')), next(dist.glob('*.tar.gz'))
    names = zipfile.ZipFile(wheel).namelist()
    for part in ('py.typed', 'weights/manifest.json', 'weights/test_repvgg.cifar10_deploy.safetensors'):
        assert f'repvgg_zoo/{part}' in names
    assert sum(name.endswith('.jpg') for name in names) == 1000
    assert {name.split('/')[0] for name in names} == {
        'repvgg_zoo',
        'repvgg_zoo_cli.py',
        next(n for n in names if 'dist-info' in n).split('/')[0],
    }
    with tarfile.open(sdist) as archive:
        inside = {name.split('/', 1)[1] for name in archive.getnames() if '/' in name}
    assert {'hubconf.py', 'LICENSE', 'README.md', 'weights/manifest.json', 'tests/conftest.py'} <= inside


def test_installed_wheel_runs_outside_checkout(dist, tmp_path):
    environment = tmp_path / 'venv'
    venv.create(environment, with_pip=True, system_site_packages=False)
    python = environment / 'bin' / 'python'
    wheel = next(dist.glob('*.whl'))
    subprocess.run([python, '-m', 'pip', 'install', '--quiet', '--no-deps', wheel], check=True)
    site = subprocess.run(
        [python, '-c', 'import site; print(site.getsitepackages()[0])'], capture_output=True, text=True
    )
    # the dependencies are those of this environment; the checkout must not be found through them
    import timm

    dependencies = Path(timm.__file__).parents[1]
    code = (
        f'import sys; sys.path.append({str(dependencies)!r})\n'
        'import repvgg_zoo, timm\n'
        f'assert repvgg_zoo.__file__.startswith({site.stdout.strip()!r}), repvgg_zoo.__file__\n'
        "print(timm.create_model('test_repvgg.cifar10_deploy', pretrained=True).deploy)\n"
        'from repvgg_zoo_cli import main; sys.exit(main(["demo"]))'
    )
    env = {'PATH': os.environ['PATH'], 'HOME': str(tmp_path)}
    done = subprocess.run([python, '-c', code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('True')
    assert (tmp_path / 'repvgg-demo' / 'deploy' / 'model.safetensors').exists()
    assert (environment / 'bin' / 'repvgg-zoo').exists()
