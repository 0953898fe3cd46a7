"""What the README says is true: its blocks run, in an empty folder, and its table is the current one."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from repvgg_zoo.pretrained.manifest import read_manifest
from repvgg_zoo.tools.listing import variants_markdown

ROOT = Path(__file__).parents[2]
README = (ROOT / 'README.md').read_text('utf-8')
BLOCKS = re.findall(r'^```(python|sh)\n(.*?)^```', README, re.MULTILINE | re.DOTALL)


def test_blocks_run_in_their_order(tmp_path):
    hub = tmp_path / 'home' / '.cache' / 'torch' / 'hub'
    hub.mkdir(parents=True)
    (hub / 'owner_repvgg_zoo_main').symlink_to(ROOT)
    (tmp_path / 'work').mkdir()
    ran = 0
    for language, code in BLOCKS:
        if 'pip install' in code:
            continue
        command = [sys.executable, '-c', code]
        if language == 'sh':
            command = ['bash', '-ec', code.replace('repvgg-zoo', f'{sys.executable} -m repvgg_zoo')]
        done = subprocess.run(
            command,
            cwd=tmp_path / 'work',
            env={'HOME': str(tmp_path / 'home'), 'PATH': '/usr/bin:/bin', 'PYTHONPATH': str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f'{code}\n{done.stderr}'
        ran += 1
    assert ran == 8


def test_table_is_the_current_one():
    table = re.search(r'<!-- variants -->\n(.*?)<!-- /variants -->', README, re.DOTALL).group(1)
    assert table.strip() == variants_markdown(read_manifest())


@pytest.mark.parametrize('path', sorted(set(re.findall(r'\]\(([^):]+)\)', README))))
def test_links_lead_somewhere(path):
    assert (ROOT / path).exists()
