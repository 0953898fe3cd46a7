"""What the pages say is true: their blocks run, in an empty folder, their links lead somewhere, tables are current."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from repvgg_zoo.pretrained.manifest import read_manifest
from repvgg_zoo.tools.listing import variants_markdown

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text('utf-8')
    for path in [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').rglob('*.md'))]
}
BLOCKS = {
    page: re.findall(r'^```(python|sh)\n(.*?)^```', text, re.MULTILINE | re.DOTALL) for page, text in PAGES.items()
}
"""Blocks in `python` and `sh` of each page. Those in `console` need data, a network or time, and are not run."""
LINKS = sorted({(page, link) for page, text in PAGES.items() for link in re.findall(r'\]\(([^):#]+)[^):]*\)', text)})


@pytest.mark.skipif(os.name == 'nt', reason='blocks in sh need a POSIX shell')
@pytest.mark.parametrize('page', [page for page, blocks in BLOCKS.items() if blocks])
def test_page_blocks_run_in_their_order(page, tmp_path):
    hub = tmp_path / 'home' / '.cache' / 'torch' / 'hub'
    hub.mkdir(parents=True)
    (hub / 'owner_repvgg_zoo_main').symlink_to(ROOT)
    (tmp_path / 'work').mkdir()
    for language, code in BLOCKS[page]:
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


def test_readme_is_short_and_has_a_block_to_run():
    assert len(PAGES['README.md'].splitlines()) <= 120
    assert [language for language, code in BLOCKS['README.md'] if 'pip install' not in code] == ['python']


@pytest.mark.parametrize('page', ['README.md', 'docs/models.md'])
def test_table_of_variants_is_current(page):
    table = re.search(r'<!-- variants -->\n(.*?)<!-- /variants -->', PAGES[page], re.DOTALL).group(1)
    assert table.strip() == variants_markdown(read_manifest())


@pytest.mark.parametrize(('page', 'link'), LINKS)
def test_link_leads_to_a_file(page, link):
    assert ((ROOT / page).parent / link).exists()
