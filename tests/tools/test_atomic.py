"""Folders that appear whole or not at all, wherever a process ends."""

import subprocess
import sys
from pathlib import Path

import pytest

from repvgg_zoo.tools.atomic import new_folder, write_text


def write(path, text='new', **kwargs):
    with new_folder(path, **kwargs) as folder:
        (folder / 'config.json').write_text(text)


def test_folder_appears_at_the_end(tmp_path):
    with new_folder(tmp_path / 'a' / 'b') as folder:
        assert not (tmp_path / 'a' / 'b').exists()
        (folder / 'config.json').touch()
    assert sorted(p.name for p in (tmp_path / 'a').rglob('*')) == ['b', 'config.json']


@pytest.mark.parametrize('exists', [False, True])
def test_failure_changes_nothing(tmp_path, exists):
    if exists:
        write(tmp_path / 'x', 'old')
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / 'x', overwrite=True):
        1 / 0  # noqa: B018
    assert [p.name for p in tmp_path.iterdir()] == ['x'] * exists


def test_end_between_the_renames_loses_nothing(tmp_path, monkeypatch):
    write(tmp_path / 'x', 'old')
    rename = Path.rename

    def interrupted(self, target):
        if self.name == 'new':
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, 'rename', interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / 'x', overwrite=True)
    assert (tmp_path / 'x' / 'config.json').read_text() == 'old'
    assert [p.name for p in tmp_path.iterdir()] == ['x']


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    write(tmp_path / 'x', 'old')
    (tmp_path / '.x.partial' / 'new').mkdir(parents=True)
    (tmp_path / 'x').rename(tmp_path / '.x.partial' / 'old')  # killed between the renames
    with pytest.raises(FileExistsError):
        write(tmp_path / 'x')
    assert (tmp_path / 'x' / 'config.json').read_text() == 'old'
    write(tmp_path / 'x', overwrite=True)
    assert (tmp_path / 'x' / 'config.json').read_text() == 'new'
    assert [p.name for p in tmp_path.iterdir()] == ['x']


def test_second_writer_is_refused_until_the_first_has_ended(tmp_path):
    code = (
        'import sys, time; from repvgg_zoo.tools.atomic import new_folder\n'
        'with new_folder(sys.argv[1]): print(flush=True); time.sleep(60)'
    )
    command = [sys.executable, '-c', code, tmp_path / 'x']
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as first:
        first.stdout.readline()
        with pytest.raises(BlockingIOError, match='another process is writing'):
            write(tmp_path / 'x')
        first.kill()
    write(tmp_path / 'x')
    assert [p.name for p in tmp_path.iterdir()] == ['x']


def test_error_inside_is_not_taken_for_another_writer(tmp_path):
    with pytest.raises(BlockingIOError, match='mine'), new_folder(tmp_path / 'x'):
        raise BlockingIOError('mine')


def test_text_is_replaced(tmp_path):
    for text in ('one', 'two'):
        write_text(tmp_path / 'page.md', text)
    assert (tmp_path / 'page.md').read_text() == 'two'
    assert [p.name for p in tmp_path.iterdir()] == ['page.md']
