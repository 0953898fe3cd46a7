"""What the results of a folder hang on: more results join them under the same settings only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from experiments.cifar10 import changes
from experiments.errors import StudyError
from repvgg_zoo.tools.benchmark.benchmark import machine_facts

SETTINGS = 'settings.json'


def settle(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make a folder for results, and write their settings there, or compare them with those that are there.

    Raises:
        StudyError: The folder has other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / SETTINGS
    if not file.exists():
        file.write_text(json.dumps(settings, indent=2) + '\n')
    elif changed := changes(read_settings(folder), settings):
        raise StudyError(
            f'{str(folder)!r} has results under other settings: {changed}; give another --out or the same options'
        )


def read_settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / SETTINGS).read_text())


def processor() -> dict[str, Any]:
    """Return the settings of a timing on the CPU."""
    facts = machine_facts(torch.device('cpu'))
    return {name: facts[name] for name in ('processor', 'threads')}
