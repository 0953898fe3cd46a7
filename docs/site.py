"""A hook of mkdocs: takes the files outside `docs/` that pages name into the site, and points the links at them."""

import re
from pathlib import Path
from posixpath import relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
FROM_ROOT = {'CONTRIBUTING.md': 'contributing.md', 'CHANGELOG.md': 'changelog.md'}
"""Pages that stand in the root, where readers of the repository look for them, and their places in the site."""
LINK = re.compile(r'(?<=\]\()([^):#]+)')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files that pages name, and those that these name."""
    for name, place in FROM_ROOT.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / name)))
    pages = list(files.documentation_pages())
    for page in pages:  # grows
        text = Path(page.abs_src_path).read_text('utf-8')
        for link in LINK.findall(text):
            target = _target(page, link)
            if target.is_file() and files.get_file_from_path(_place(target)) is None:
                added = File.generated(config, _place(target), abs_src_path=str(target))
                files.append(added)
                if added.is_documentation_page():
                    pages.append(added)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at where the files are in the site."""

    def place(link: re.Match[str]) -> str:
        target = _target(page.file, link[0])
        return relpath(_place(target), str(Path(page.file.src_uri).parent)) if target.exists() else link[0]

    return LINK.sub(place, markdown)


def _target(page: File, link: str) -> Path:
    return (Path(page.abs_src_path).parent / link).resolve()


def _place(target: Path) -> str:
    name = target.relative_to(ROOT).as_posix()
    return FROM_ROOT.get(name, name.removeprefix('docs/'))
