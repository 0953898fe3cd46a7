"""The figures of the documents are drawn from what is committed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

FIGURES = Path(__file__).parents[2] / 'docs' / 'figures'


def test_figures_are_drawn_for_both_backgrounds(tmp_path):
    subprocess.run([sys.executable, FIGURES, '--out', tmp_path], check=True, cwd=tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in FIGURES.glob('*.svg')}
    for name in drawn:
        sizes = [re.search(r'viewBox="[^"]+"', (folder / name).read_text('utf-8'))[0] for folder in (tmp_path, FIGURES)]
        assert sizes[0] == sizes[1]
    assert {name.replace('.svg', '.dark.svg') for name in drawn if '.dark' not in name} <= drawn
