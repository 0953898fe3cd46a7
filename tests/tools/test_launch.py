"""The launcher: scripts, modules and console scripts, as if run directly."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm

from repvgg_zoo.tools import launch
from repvgg_zoo_cli import main

LAUNCHER = [sys.executable, '-m', 'repvgg_zoo', 'run']
REPORT = """
import json, sys
import timm
main = sys.modules['__main__'].__dict__ is globals()
print(json.dumps([sys.argv, sys.path[0], __name__, main, timm.is_model('repvgg_b1g2')]))
sys.exit(int(sys.argv[1]))
"""


def run(command, cwd, **kwargs):
    return subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, **kwargs)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / 'scripts').mkdir()
    (tmp_path / 'scripts' / 'report.py').write_text(REPORT)
    (tmp_path / 'a_module.py').write_text(REPORT)
    (tmp_path / 'a_package').mkdir()
    (tmp_path / 'a_package' / '__init__.py').touch()
    (tmp_path / 'a_package' / '__main__.py').write_text(REPORT)
    return tmp_path


@pytest.mark.parametrize(
    ('target', 'direct'),
    [
        ('scripts/report.py', [sys.executable, 'scripts/report.py']),
        ('a_module', [sys.executable, '-m', 'a_module']),
        ('a_package', [sys.executable, '-m', 'a_package']),
    ],
)
def test_run_program_sees_same_as_direct_run(target, direct, folder):
    args = ['3', '--flag', '-x', '--', 'run', '--help']
    launched, expected = run([*LAUNCHER, target, *args], folder), run([*direct, *args], folder)
    assert launched.returncode == expected.returncode == 3, launched.stderr
    assert launched.stdout == expected.stdout.replace('false', 'true')
    assert 'false' in expected.stdout


def test_run_folder_and_moving_script_work(folder):
    app = folder / 'app'
    app.mkdir()
    (app / '__main__.py').write_text('import beside, sys; print(beside.value, sys.argv)')
    (app / 'beside.py').write_text('value = 5')
    (folder / 'scripts' / 'moves.py').write_text("import os; os.chdir('/'); print(os.path.abspath(__file__))")
    assert (
        run([*LAUNCHER, 'app', 'x'], folder).stdout
        == run([sys.executable, 'app', 'x'], folder).stdout
        == ("5 ['app', 'x']\n")
    )
    assert run([*LAUNCHER, 'scripts/moves.py'], folder).stdout.strip() == str(folder / 'scripts' / 'moves.py')


def test_run_timm_beside_script_warns(folder):
    (folder / 'timm').mkdir()
    (folder / 'timm' / '__init__.py').touch()
    (folder / 'script.py').touch()
    done = run([*LAUNCHER, folder / 'script.py'], folder / 'scripts')
    assert done.returncode == 0
    assert 'has a timm beside it, but runs with timm' in done.stderr


def test_run_console_script_works(folder):
    done = run([*LAUNCHER, 'pytest', '--version'], folder)
    assert done.returncode == 0
    assert 'pytest' in done.stdout + done.stderr


def test_run_exception_ends_as_direct_run(folder):
    (folder / 'fails.py').write_text('raise RuntimeError("of the script")')
    done = run([*LAUNCHER, 'fails.py'], folder)
    assert done.returncode == 1
    assert 'Traceback' in done.stderr
    assert done.stderr.rstrip().endswith('RuntimeError: of the script')


def test_run_unknown_target_fails(folder):
    done = run([*LAUNCHER, 'no_such_thing'], folder)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "repvgg-zoo: 'no_such_thing' is no file, no installed console script and no module that can be run"
    )
    (folder / 'namespace').mkdir()
    assert 'no module that can be run' in run([*LAUNCHER, 'namespace'], folder).stderr


def test_run_spawning_script_works(folder):
    (folder / 'spawns.py').write_text(
        'import multiprocessing as mp\n'
        'def work(x): return x + 1\n'
        "if __name__ == '__main__':\n"
        "    with mp.get_context('spawn').Pool(1) as pool: print(pool.map(work, [1, 2]))\n"
    )
    done = run([*LAUNCHER, 'spawns.py'], folder)
    assert done.stdout.strip() == '[2, 3]', done.stderr


def test_run_under_torchrun_works(folder):
    (folder / 'distributed.py').write_text(
        'import sys, timm, torch\n'
        "torch.distributed.init_process_group('gloo')\n"
        'one = torch.ones(1)\n'
        'torch.distributed.all_reduce(one)\n'
        "rank = f'rank {torch.distributed.get_rank()} of {int(one)}:'\n"
        'sys.stdout.write(f\'{rank} {timm.is_model("resnet18_acb")} {sys.argv[1:]}\\n\')  # in one piece\n'
        'torch.distributed.destroy_process_group()\n'
    )
    torchrun = Path(sys.executable).with_name('torchrun')
    command = [torchrun, '--standalone', '--nproc-per-node', 2, '-m', 'repvgg_zoo', 'run']
    recipe = ['--overparameterize', 'resnet18:acb']
    done = run([*command, *recipe, 'distributed.py', '--x', 1], folder, timeout=300)
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith('rank'))
    assert lines == ["rank 0 of 2: True ['--x', '1']", "rank 1 of 2: True ['--x', '1']"], done.stderr


@pytest.mark.usefixtures('own_registry')
def test_run_overparameterize_registers_and_passes_arguments_on(monkeypatch):
    ran = []
    monkeypatch.setattr(launch, 'run', lambda *args: ran.append(args))
    recipes = ['--overparameterize', 'test_resnet:acb', '--overparameterize', 'resnet18.tv_in1k:dbb:layer1.*']
    assert main(['run', *recipes, 'train.py', '--overparameterize', 'x', '--model', 'resnet18_dbb']) == 0
    assert ran == [('train.py', ['--overparameterize', 'x', '--model', 'resnet18_dbb'])]
    assert timm.is_model('test_resnet_acb')
    assert timm.get_pretrained_cfg('resnet18_dbb').tag == 'tv_in1k'


@pytest.mark.parametrize(
    ('recipe', 'said'),
    [
        ('resnet18', "'resnet18' is not of the form NAME:BLOCK"),
        ('resnet19:acb', "unknown model 'resnet19'; did you mean 'resnet18'"),
        ('resnet18:abc', "unknown block 'abc'; did you mean 'acb'"),
    ],
)
def test_run_overparameterize_of_unknown_name_fails_before_the_program(recipe, said, monkeypatch, capsys):
    monkeypatch.setattr(launch, 'run', lambda *_: pytest.fail('ran'))
    assert main(['run', '--overparameterize', recipe, 'train.py']) == 1
    assert capsys.readouterr().err.startswith(f'repvgg-zoo: --overparameterize: {said}')
