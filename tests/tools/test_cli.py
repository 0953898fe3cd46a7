"""The command line as a person meets it: in a process of its own."""

import os
import subprocess
import sys

import pytest

from repvgg_zoo import VARIANTS, __version__
from repvgg_zoo.tools.cli import COMMANDS, main


def zoo(*args, cwd=None):
    return subprocess.run(
        [sys.executable, '-m', 'repvgg_zoo', *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=300
    )


def test_version_is_printed():
    assert zoo('--version').stdout.strip() == f'repvgg-zoo {__version__}'


@pytest.mark.parametrize(
    ('name', 'argument'),
    [
        ('list', '--markdown'),
        ('demo', '--out'),
        ('convert', '--form'),
        ('quantize', '--calibration'),
        ('verify', '--images'),
        ('publish', '--push'),
        ('reproduce', '--imagenet'),
        ('benchmark', '--baseline'),
        ('run', 'SCRIPT_OR_MODULE'),
    ],
)
def test_help(name, argument, capsys):
    assert len(COMMANDS) == 9
    for command, expected in (([], f'\n    {name}'), ([name], argument)):
        with pytest.raises(SystemExit) as ended:
            main([*command, '--help'])
        assert ended.value.code == 0
        said = capsys.readouterr().out
        assert said.startswith(' '.join(['usage: repvgg-zoo', *command]))
        assert expected in said


def test_help_imports_no_tool():
    """The program's own help costs what importing the package costs."""
    code = (
        'import sys\n'
        'import repvgg_zoo\n'
        'before = set(sys.modules)\n'
        'from repvgg_zoo.tools.cli import main\n'
        'try: main(["--help"])\n'
        'except SystemExit: pass\n'
        'print(sorted(m for m in set(sys.modules) - before if m.startswith("repvgg_zoo")))'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    imported = done.stdout.splitlines()[-1]
    assert imported == "['repvgg_zoo.tools', 'repvgg_zoo.tools.cli', 'repvgg_zoo.tools.console']", done.stderr


def test_list_shows_all_variants():
    done = zoo('list')
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.split()}
    assert all(name in rows for name in VARIANTS)
    assert rows['repvgg_b1g2'] == ['45.78', '41.36', '8.810', '224', '77.78']
    assert rows['repvgg_b1g2.mm_in1k'] == ['224', '77.87', 'URL', 'fold', 'no']
    assert rows['repvgg_b2.rvgg_in1k'] == ['224', '78.78', 'Hub', 'fold', 'no']
    tables = [line for line in done.stdout.splitlines() if line.strip().split('.')[0].split(' ')[0] in VARIANTS]
    assert len(tables) > len(VARIANTS)
    assert all(len(line) <= 80 for line in tables)


def test_list_narrow_terminal_keeps_cells():
    command = [sys.executable, '-m', 'repvgg_zoo', 'list']
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {'COLUMNS': '30'})
    assert '…' not in done.stdout
    assert '120.39' in done.stdout


def test_list_closed_pipe_is_silent():
    command = f'{sys.executable} -m repvgg_zoo list | head -n 1'
    done = subprocess.run(['/bin/sh', '-c', command], capture_output=True, text=True)
    assert done.stderr == ''


def test_convert_then_verify_same_function(tmp_path):
    done = zoo('convert', 'test_repvgg', 'out', '--form', 'deploy', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == 'wrote test_repvgg, deploy form, 10 classes, to out'
    same = zoo('verify', 'test_repvgg', 'out', cwd=tmp_path)
    assert (same.returncode, same.stdout.splitlines()[-1]) == (0, 'the same function')


def test_verify_other_weights_fails(tmp_path):
    code = (
        'import timm, torch, repvgg_zoo\n'
        "model = timm.create_model('test_repvgg', pretrained=True)\n"
        'model.head.fc.bias.data[0] += 1\n'
        "torch.save(model.state_dict(), 'other.pth')"
    )
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, check=True)
    done = zoo('verify', 'test_repvgg', 'other.pth', cwd=tmp_path)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, 'NOT the same function')


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (('convert', 'nothing.pth', 'out'), "no checkpoint file at 'nothing.pth'"),
        (('convert', 'test_repvgg', '.'), "'.' exists; choose another path or pass overwrite (--overwrite)"),
        (('verify', 'repvgg_b4'), "no checkpoint file or folder at 'repvgg_b4', and unknown variant 'repvgg_b4'; did"),
        (('verify', 'test_repvgg.cifar'), "unknown tag 'cifar' of test_repvgg; did you mean 'cifar10'"),
        (('convert', 'repvgg_b2g2', 'out'), 'nobody has published weights of repvgg_b2g2.rvgg_in1k on the Hub'),
        (('demo', '--out', '.'), "'.' exists"),
    ],
)
def test_mistake_gives_one_line_and_status(args, message, tmp_path):
    done = zoo(*args, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ''
    assert done.stderr.strip().splitlines()[-1].startswith(f'repvgg-zoo: {message}')
    assert len(done.stderr.strip().splitlines()) == 1
    assert os.listdir(tmp_path) == []


def test_unknown_command_fails():
    done = zoo('frobnicate')
    assert done.returncode == 2
    assert 'Traceback' not in done.stderr


def test_demo_writes_both_forms(tmp_path):
    done = zoo('demo', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    forms = ('pretrained, training', 'fine-tuned, training', 'fine-tuned, deploy', 'deploy form, reloaded')
    lines = [line.strip() for line in done.stdout.splitlines()]
    pretrained, finetuned, deployed, reloaded = (
        next(line for line in lines if line.startswith(form)).split() for form in forms
    )
    assert float(pretrained[-1]) > 80
    assert float(finetuned[-1]) == float(deployed[-2]) == float(reloaded[-2]) > 80
    assert float(deployed[-1]) == float(reloaded[-1]) < 1e-4
    assert sorted(path.name for path in (tmp_path / 'repvgg-demo').glob('[!.]*')) == ['deploy', 'training']
    again = zoo('demo', cwd=tmp_path)
    assert again.returncode == 1
    assert "'repvgg-demo' exists" in again.stderr
