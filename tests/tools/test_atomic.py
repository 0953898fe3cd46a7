"""Folders that appear whole or not at all, wherever a process ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from repvgg_zoo.tools import atomic
from repvgg_zoo.tools.atomic import new_folder, write_text
from repvgg_zoo.tools.own_files import MARKER


def write(path, text='new', **kwargs):
    with new_folder(path, **kwargs) as folder:
        (folder / 'config.json').write_text(text)
        (folder / 'test').mkdir()
        (folder / 'test' / 'outputs').write_text(text)


def test_new_folder_appears_at_end(tmp_path):
    with new_folder(tmp_path / 'a' / 'b') as folder:
        assert not (tmp_path / 'a' / 'b').exists()
        (folder / 'config.json').touch()
    assert sorted(p.name for p in (tmp_path / 'a').rglob('*')) == [MARKER, 'b', 'config.json']
    assert [p.name for p in tmp_path.iterdir()] == ['a']


@pytest.mark.parametrize('exists', [False, True])
def test_new_folder_failure_changes_nothing(tmp_path, exists):
    if exists:
        write(tmp_path / 'x', 'old')
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / 'x', overwrite=True):
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


@pytest.mark.skipif(atomic.fcntl is None, reason='without locks nobody knows who is dead')
def test_new_folder_clears_killed_writers_of_other_folders(tmp_path):
    write(tmp_path / 'old', 'old')
    for name in ('a', 'b', 'between', 'empty'):
        (tmp_path / f'.{name}.partial').mkdir()
    (tmp_path / '.a.partial' / 'new').mkdir()
    (tmp_path / '.b.partial' / 'new' / 'test').mkdir(parents=True)
    (tmp_path / '.b.partial' / 'new' / 'test' / 'file').touch()
    (tmp_path / 'old').rename(tmp_path / '.between.partial' / 'old')  # killed between the renames
    write(tmp_path / 'x')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['between', 'x']
    assert (tmp_path / 'between' / 'config.json').read_text() == 'old'


def test_new_folder_leaves_running_writers_of_other_folders_alone(tmp_path):
    with new_folder(tmp_path / 'other') as other:  # a lock holds against the same process too
        write(tmp_path / 'x')
        assert other.is_dir()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['other', 'x']


def test_new_folder_leaves_partial_folders_of_others_alone(tmp_path):
    (tmp_path / '.download.partial').mkdir()
    (tmp_path / '.download.partial' / 'model.bin').touch()
    (tmp_path / 'target').mkdir()
    (tmp_path / '.link.partial').symlink_to(tmp_path / 'target')
    (tmp_path / '.file.partial').touch()
    before = sorted(tmp_path.rglob('*'))
    write(tmp_path / 'x')
    assert sorted(p for p in tmp_path.rglob('*') if 'x' not in p.relative_to(tmp_path).parts) == before


def test_new_folder_error_inside_passes(tmp_path):
    with pytest.raises(BlockingIOError, match='mine'), new_folder(tmp_path / 'x'):
        raise BlockingIOError('mine')


def test_write_text_replaces_text(tmp_path):
    for text in ('one', 'two'):
        write_text(tmp_path / 'page.md', text)
    assert (tmp_path / 'page.md').read_text() == 'two'
    assert [p.name for p in tmp_path.iterdir()] == ['page.md']


def test_new_folder_overwrite_replaces_what_it_wrote(tmp_path):
    write(tmp_path / 'x', 'old')
    write(tmp_path / 'x', overwrite=True)
    assert (tmp_path / 'x' / 'test' / 'outputs').read_text() == 'new'
    marker = (tmp_path / 'x' / MARKER).read_text()
    assert [line.split('  ')[1] for line in marker.splitlines()] == ['config.json', 'test/outputs']


@pytest.mark.parametrize('name', ['other', 'deeper/config.json', 'deeper/a/b', '.hidden', 'test/mine'])
def test_new_folder_overwrite_keeps_foreign_files(tmp_path, name):
    write(tmp_path / 'x', 'old')
    (tmp_path / 'x' / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / 'x' / name).write_text('mine')
    with pytest.raises(FileExistsError, match=f'holds {name!r}, which is not one of the files to replace'):
        write(tmp_path / 'x', overwrite=True)
    assert (tmp_path / 'x' / name).read_text() == 'mine'
    assert (tmp_path / 'x' / 'config.json').read_text() == 'old'


def change(folder):
    (folder / 'config.json').write_text('mine')


def add_folder(folder):
    (folder / 'empty').mkdir()


def link(folder):
    (folder / 'config.json').rename(folder.parent / 'moved')
    (folder / 'config.json').symlink_to(folder.parent / 'moved')


def pipe(folder):
    os.mkfifo(folder / 'pipe')


def forget(folder):
    (folder / MARKER).unlink()


@pytest.mark.parametrize(
    ('meddle', 'name'),
    [
        (change, 'config.json'),
        (add_folder, 'empty'),
        (link, 'config.json'),
        (pipe, 'pipe'),
        (forget, 'config.json'),
    ],
)
def test_new_folder_overwrite_keeps_what_is_not_as_written(tmp_path, meddle, name):
    """A file of the right name may be the user's: weights of another program, a card that was edited."""
    write(tmp_path / 'x', 'old')
    meddle(tmp_path / 'x')
    before = {path: path.is_file() and path.read_bytes() for path in (tmp_path / 'x').rglob('*')}
    with pytest.raises(FileExistsError, match=f'holds {name!r}'):
        write(tmp_path / 'x', overwrite=True)
    assert {path: path.is_file() and path.read_bytes() for path in (tmp_path / 'x').rglob('*')} == before


def test_new_folder_overwrite_keeps_file_that_came_meanwhile(tmp_path):
    write(tmp_path / 'x', 'old')
    with (
        pytest.raises(FileExistsError, match="holds 'notes"),
        new_folder(tmp_path / 'x', overwrite=True),
    ):
        (tmp_path / 'x' / 'notes.txt').touch()
    assert (tmp_path / 'x' / 'notes.txt').exists()
