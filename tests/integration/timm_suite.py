"""A pytest plugin that runs timm's own tests of models for the models that `TIMM_SUITE_MODELS` names.

Every test with a parameter `model_name` takes these instead of its own; the others, which speak of one
architecture, are left out. `TIMM_SUITE_TESTS` names the tests to run, all if it is not set.
"""

from __future__ import annotations

import os

import pytest

MODELS = os.environ['TIMM_SUITE_MODELS'].split()
TESTS = os.environ.get('TIMM_SUITE_TESTS', '').split()


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for mark in metafunc.definition.own_markers:
        if mark.name == 'parametrize' and mark.args[0] == 'model_name':
            mark.args[1][:] = MODELS


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [
        item
        for item in items
        if isinstance(item, pytest.Function)
        and getattr(item, 'callspec', None)
        and item.callspec.params.get('model_name') in MODELS
        and (not TESTS or item.originalname in TESTS)
    ]


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> None:
    item.user_properties[:] = [('test', item.originalname), ('model', item.callspec.params['model_name'])]
