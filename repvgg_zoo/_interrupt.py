"""Ctrl-C while `python -m repvgg_zoo` still imports the package: in one line, as everywhere in the command line.

Python imports a package before its `__main__`, so this is the first import of `__init__`, and needs nothing itself.
"""

from __future__ import annotations

import sys
from types import TracebackType

__all__: list[str] = []


def _runs_this_package() -> bool:
    """Tell whether Python imports this package for `-m`, and not for another program."""
    argv = getattr(sys, 'argv', [])  # which programs that embed Python may lack
    return argv[:1] == ['-m'] and sys.orig_argv[-len(argv)].removeprefix('-m') == __package__


def _report(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write('repvgg-zoo: interrupted\n')
    else:
        sys.__excepthook__(kind, error, traceback)


if _runs_this_package():
    sys.excepthook = _report
