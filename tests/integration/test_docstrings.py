"""Docstrings: their examples run, and every public name is documented in full."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

import repvgg_zoo

MODULES = ['repvgg_zoo', 'repvgg_zoo_cli', *(m.name for m in pkgutil.walk_packages(repvgg_zoo.__path__, 'repvgg_zoo.'))]
PUBLIC = [name for name in repvgg_zoo.__all__ if callable(getattr(repvgg_zoo, name))]


def docstrings(source: str) -> Iterator[tuple[str, str]]:
    """Yield the name and the docstring of a module and of all its classes, functions and constants."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield getattr(node, 'name', 'module'), ast.get_docstring(node) or ''
    for constant, node in pairwise(tree.body):
        if isinstance(constant, ast.Assign) and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield ast.unparse(constant.targets[0]), inspect.cleandoc(str(node.value.value))


def run_examples(source: str, variables: dict) -> tuple[int, str]:
    """Run the examples of each docstring with the variables of its module; return their number and the failures."""
    runner, report = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS), []
    for name, text in docstrings(source):
        test = doctest.DocTestParser().get_doctest(text, dict(variables), name, None, 0)
        runner.run(test, out=report.append)
    return runner.summarize(verbose=False).attempted, ''.join(report)


@pytest.mark.usefixtures('own_registry')
@pytest.mark.parametrize('name', [name for name in MODULES if not name.endswith('__main__')])
def test_module_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    _, failures = run_examples(Path(module.__file__).read_text('utf-8'), vars(module))
    assert not failures, failures


@pytest.mark.parametrize('name', sorted(set(repvgg_zoo.__all__) - {'__version__'}))
def test_public_name_is_on_the_page_of_the_api_and_has_an_example(name):
    page = (Path(__file__).parents[2] / 'docs' / 'api.md').read_text('utf-8')
    assert f'\n::: repvgg_zoo.{name}\n' in page
    modules = map(importlib.import_module, MODULES)
    files = {module.__file__ for module in modules if name in getattr(module, '__all__', ())}
    [text] = [text for file in files for own, text in docstrings(Path(file).read_text('utf-8')) if own == name]
    assert 'Example:\n' in text


def test_run_examples_finds_decorated_methods_and_failures():
    source = '''
class A:
    @no_grad()
    def f(self):
        """Count.

        >>> 1 + one
        2
        >>> 1 + one
        3
        """
'''
    count, failures = run_examples(source, {'one': 1})
    assert count == 2
    assert 'Expected:\n    3\nGot:\n    2\n' in failures


def missing_sections(public: type | Callable) -> Iterator[str]:
    """Yield the sections that the docstring of a function or class lacks; a class needs no Returns and no Raises.

    The arguments of a class may be documented by the class or by its constructor, inherited or not.
    """
    text = inspect.getdoc(public) or ''
    is_class = inspect.isclass(public)
    is_error = is_class and issubclass(public, Exception)
    if is_class:
        text += f'\n{inspect.getdoc(public.__init__)}'
    described = re.search(r'^(?:Args|Attributes):\n((?: .*\n?|\n)*)', text, re.MULTILINE)
    names = set(re.findall(r'^ +\**(\w+)\b.*:', described[1], re.MULTILINE) if described else [])
    if not is_error and not names >= inspect.signature(public).parameters.keys():
        yield 'Args'
    if not is_class:
        returns = inspect.signature(public).return_annotation not in (None, 'None')
        if returns and not re.search(r'^(Returns|Yields):\n', text, re.MULTILINE):
            yield 'Returns'
        raises = any(isinstance(node, ast.Raise) for node in ast.walk(ast.parse(inspect.getsource(public))))
        if raises and not re.search(r'^Raises:\n', text, re.MULTILINE):
            yield 'Raises'
    if not re.search(r'^Examples?:\n(.*\n)*?\s+>>> ', text, re.MULTILINE):
        yield 'Example'


def test_public_names_are_documented():
    missing = {f'{name}: {section}' for name in PUBLIC for section in missing_sections(getattr(repvgg_zoo, name))}
    assert not missing


def undocumented(path: str, *args: int) -> int:
    if args:
        raise ValueError(path)
    return 1


def documented(path: str, *args: int) -> int:
    """Count.

    Args:
        path: Where.
        *args: What.

    Returns:
        The count.

    Raises:
        ValueError: There are arguments.

    Example:
        >>> documented('x')
        1
    """
    if args:
        raise ValueError(path)
    return 1


@pytest.mark.parametrize(
    ('function', 'missing'),
    [(undocumented, ['Args', 'Returns', 'Raises', 'Example']), (documented, [])],
)
def test_missing_sections_lists_each(function, missing):
    assert list(missing_sections(function)) == missing
