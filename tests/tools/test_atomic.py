"""Folders that appear whole or not at all, wherever a process ends."""

import subprocess
import sys
from pathlib import Path

import pytest

from repvgg_zoo.tools.atomic import new_folder, write_text


def write(path, text='new', **kwargs):
    with new_folder(path, owned=('config.json',), **kwargs) as folder:
        (folder / 'config.json').write_text(text)


def test_new_folder_appears_at_end(tmp_path):
    with new_folder(tmp_path / 'a' / 'b') as folder:
        assert not (tmp_path / 'a' / 'b').exists()
        (folder / 'config.json').touch()
    assert sorted(p.name for p in (tmp_path / 'a').rglob('*')) == ['b', 'config.json']


@pytest.mark.parametrize('exists', [False, True])
def test_new_folder_failure_changes_nothing(tmp_path, exists):
    if exists:
        write(tmp_path / 'x', 'old')
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / 'x', overwrite=True, owned=('config.json',)):
        1 / 0  # noqa: B018
    assert [p.name for p in tmp_path.iterdir()] == ['x'] * exists


def test_new_folder_interrupt_between_renames_loses_nothing(tmp_path, monkeypatch):
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


def test_new_folder_after_killed_process_clears_leftovers(tmp_path):
    write(tmp_path / 'x', 'old')
    (tmp_path / '.x.partial' / 'new').mkdir(parents=True)
    (tmp_path / 'x').rename(tmp_path / '.x.partial' / 'old')  # killed between the renames
    with pytest.raises(FileExistsError):
        write(tmp_path / 'x')
    assert (tmp_path / 'x' / 'config.json').read_text() == 'old'
    write(tmp_path / 'x', overwrite=True)
    assert (tmp_path / 'x' / 'config.json').read_text() == 'new'
    assert [p.name for p in tmp_path.iterdir()] == ['x']


def test_new_folder_second_writer_raises(tmp_path):
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


def test_new_folder_error_inside_passes(tmp_path):
    with pytest.raises(BlockingIOError, match='mine'), new_folder(tmp_path / 'x'):
        raise BlockingIOError('mine')


def test_write_text_replaces_text(tmp_path):
    for text in ('one', 'two'):
        write_text(tmp_path / 'page.md', text)
    assert (tmp_path / 'page.md').read_text() == 'two'
    assert [p.name for p in tmp_path.iterdir()] == ['page.md']


@pytest.mark.parametrize('name', ['other', 'deeper/config.json', 'deeper/a/b'])
def test_new_folder_overwrite_keeps_foreign_files(tmp_path, name):
    write(tmp_path / 'x', 'old')
    (tmp_path / 'x' / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / 'x' / name).write_text('mine')
    with pytest.raises(FileExistsError, match=f'holds {name!r}, which is not one of the files to replace'):
        write(tmp_path / 'x', overwrite=True)
    assert (tmp_path / 'x' / name).read_text() == 'mine'
    assert (tmp_path / 'x' / 'config.json').read_text() == 'old'
