"""The command line as a person meets it: in a process of its own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import repvgg_zoo_cli
from repvgg_zoo import VARIANTS, __version__
from repvgg_zoo.tools.console import print_error
from repvgg_zoo_cli import COMMANDS, main

ENTRY_POINT = [sys.executable, '-c', 'import sys; from repvgg_zoo_cli import main; sys.exit(main())']


def zoo(*args, cwd=None, env=None):
    return subprocess.run(
        [*ENTRY_POINT, *map(str, args)],
        cwd=cwd,
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def no_torch(tmp_path):
    """Make the variables of a process in which importing torch runs some code instead."""

    def environment(code):
        (tmp_path / 'torch.py').write_text(code)
        return {'PYTHONPATH': os.pathsep.join([str(tmp_path), str(Path(repvgg_zoo_cli.__file__).parent)])}

    return environment


def test_version_of_module_is_printed():
    done = subprocess.run([sys.executable, '-m', 'repvgg_zoo', '--version'], capture_output=True, text=True)
    assert done.stdout.strip() == f'repvgg-zoo {__version__}'


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
    for command, expected in (([], f'\n  {name} '), ([name], argument)):
        with pytest.raises(SystemExit) as ended:
            main([*command, '--help'])
        assert ended.value.code == 0
        said = capsys.readouterr().out
        assert said.startswith(' '.join(['usage: repvgg-zoo', *command]))
        assert expected in said


@pytest.mark.parametrize(
    ('args', 'status', 'said'),
    [
        ('--help', 0, 'convert    write a checkpoint'),
        ('--version', 0, __version__),
        ('', 2, 'convert    write a checkpoint'),
        ('convrt', 2, "invalid choice: 'convrt' (choose from 'list', "),
        ('--vrsion', 2, "unrecognized arguments: --vrsion; did you mean '--version'?"),
    ],
)
def test_main_without_command_answers_before_torch_is_imported(args, status, said, no_torch):
    done = zoo(*args.split(), env=no_torch('raise AssertionError'))
    assert done.returncode == status, done.stderr
    assert said.replace("'", '') in (done.stdout or done.stderr).replace("'", '')  # Python 3.12 quotes no choices


INTERRUPT = 'import signal; signal.signal(2, signal.default_int_handler); signal.raise_signal(2)'
"""Programs that a shell starts in the background ignore the signal otherwise."""


def test_main_interrupted_import_ends_in_one_line(no_torch):
    done = zoo('list', env=no_torch(INTERRUPT))
    assert (done.returncode, done.stdout, done.stderr) == (130, '', 'repvgg-zoo: interrupted\n')


def test_module_interrupted_import_ends_in_one_line(no_torch):
    """Python imports the package before `__main__`, which catches Ctrl-C from then on."""
    command = [sys.executable, '-m', 'repvgg_zoo', 'list']
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | no_torch(INTERRUPT), timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, '', 'repvgg-zoo: interrupted\n')


@pytest.mark.parametrize('how', [['-c', 'import repvgg_zoo'], ['-m', 'other']])
def test_package_interrupted_import_of_other_program_is_its_own(how, no_torch, tmp_path):
    environment = no_torch(INTERRUPT)
    (tmp_path / 'other').mkdir()
    for name in ('__init__', '__main__'):
        (tmp_path / 'other' / f'{name}.py').write_text('import repvgg_zoo')
    done = subprocess.run([sys.executable, *how], capture_output=True, text=True, env=os.environ | environment)
    assert 'Traceback' in done.stderr
    assert 'repvgg-zoo' not in done.stderr


@pytest.mark.parametrize(
    ('message', 'printed'),
    [
        ('', 'ValueError'),
        ('one\n  two\n\tthree\n', 'one two three'),
        ('save its weights:\n    a = 1\n    b = 2', 'save its weights:\n    a = 1\n    b = 2'),
    ],
)
def test_print_error_keeps_only_lines_of_code(message, printed, capsys):
    print_error(ValueError(message))
    assert capsys.readouterr().err == f'repvgg-zoo: {printed}\n'


def test_verify_whole_module_remedy_can_be_copied(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(timm.create_model('test_repvgg'), 'whole.pth')
    assert main(['verify', 'whole.pth']) == 1
    code = [line for line in capsys.readouterr().err.splitlines() if line.startswith('    ')]
    exec('\n'.join(line.strip() for line in code), {'torch': torch})  # noqa: S102
    assert main(['verify', 'weights.pth']) == 0


def test_main_interrupted_command_ends_in_one_line(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr('repvgg_zoo.tools.listing.main', interrupted)
    assert main(['list']) == 130
    assert capsys.readouterr().err == 'repvgg-zoo: interrupted\n'


@pytest.mark.parametrize(
    ('args', 'said'),
    [
        ('convrt a b', "repvgg-zoo: argument COMMAND: invalid choice: ... did you mean 'convert'?"),
        ('convert a b --form deplo', "repvgg-zoo convert: argument --form: invalid choice: ... did you mean 'deploy'?"),
        ('convert a b --fom deploy', "repvgg-zoo convert: unrecognized arguments: ... did you mean '--form'?"),
        ('list --markdwn=yes', "repvgg-zoo list: unrecognized arguments: ... did you mean '--markdown'?"),
        ('list repvgg_a9', 'repvgg-zoo list: unrecognized arguments: ... `repvgg-zoo list --help`'),
        ('convert a', 'repvgg-zoo convert: the following arguments are required: DST; `repvgg-zoo convert --help`'),
    ],
)
def test_main_wrong_arguments_give_one_line_with_what_was_meant(args, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(args.split())
    assert ended.value.code == 2
    message = capsys.readouterr().err
    beginning, _, end = said.partition(' ... ')
    assert message.startswith(beginning)
    assert end in message
    assert message.count('\n') == 1


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
