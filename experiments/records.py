"""What a study leaves in its folder: CSV files of results, and the settings that they hang on."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.cifar10 import changes
from experiments.errors import StudyError
from repvgg_zoo.tools.atomic import locked, write_text
from repvgg_zoo.tools.benchmark.benchmark import machine_facts

RESULTS, SETTINGS = 'results.csv', 'settings.json'


def settle(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make a folder for results and write their settings there; where results are, compare the settings with theirs.

    Raises:
        StudyError: The results there have other settings or none, or there can be no such folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StudyError(f'{str(folder)!r} cannot be made: {error.strerror}; give another --out') from None
    files = (path for path in folder.rglob('*') if path.is_file() and not path.name.startswith('.'))
    if not any(path.name != SETTINGS for path in files):
        write_text(folder / SETTINGS, json.dumps(settings, indent=2) + '\n')
    elif changed := changes(read_settings(folder), settings):
        raise StudyError(
            f'{str(folder)!r} has results under other settings: {changed}; give another --out or the same options'
        )


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the results of a folder.

    Raises:
        StudyError: It has none that can be read.
    """
    try:
        return json.loads((folder / SETTINGS).read_text())
    except (OSError, json.JSONDecodeError):
        raise StudyError(f'{str(folder)!r} has no {SETTINGS} that can be read; give a folder that has') from None


def processor() -> dict[str, Any]:
    """Return the settings of a timing on the CPU."""
    facts = machine_facts(torch.device('cpu'))
    return {name: facts[name] for name in ('processor', 'threads')}


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def values(rows: Sequence[dict[str, str]], column: str, **wanted: str) -> list[float]:
    """Return a column of the rows that have the wanted values."""
    return [float(row[column]) for row in rows if wanted.items() <= row.items()]


def append(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Add all rows or, if the program is stopped, none."""
    with locked(path.parent):
        before, added = path.read_text() if path.exists() else '', io.StringIO(newline='')
        csv.writer(added, lineterminator='\n').writerows(rows if before else [columns, *rows])
        write_text(path, before + added.getvalue())
