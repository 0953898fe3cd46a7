"""The house: which module may import which, and which private names of other libraries are touched.

The rules read the source. Each has a test on a package of a few lines that shows that it bites.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

PACKAGE = Path(__file__).parents[1] / 'repvgg_zoo'

LAYERS = (
    ('_compat', '_interrupt', 'variants'),
    ('reparam',),
    ('checkpoints',),
    ('blocks',),
    ('overparam', 'pretrained', 'quantization', 'model'),
    ('repvgg',),
    ('training',),
    ('__init__',),
    ('tools',),
    ('__main__',),
)
"""Modules and folders of the package, the lowest first. A module imports from its own layer and from those below."""

NAMED_TUPLE = {'_asdict', '_field_defaults', '_fields', '_make', '_replace'}
"""Names that the standard library documents as public in spite of their underscore."""


def modules(package: Path) -> dict[str, ast.Module]:
    """Return the syntax tree of each module by its dotted name; a package is named like its `__init__.py`."""
    trees = {}
    for path in sorted(package.rglob('*.py')):
        name = '.'.join((package.name, *path.relative_to(package).with_suffix('').parts)).removesuffix('.__init__')
        trees[name] = ast.parse(path.read_text('utf-8'))
        trees[name].is_package = path.name == '__init__.py'
    return trees


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk over a tree, except over what only a type checker runs."""
    yield tree
    for field, value in ast.iter_fields(tree):
        if field == 'body' and isinstance(tree, ast.If) and ast.unparse(tree.test).endswith('TYPE_CHECKING'):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from runtime_nodes(child)


def imports(name: str, tree: ast.Module, nodes: Iterator[ast.AST] | None = None) -> Iterator[tuple[str, str | None]]:
    """Yield each import of a module, wherever it stands: the absolute module and the name that is taken from it."""
    for node in nodes or runtime_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # the module itself is the first parent of a plain module, and not one of a package
            parents = name.split('.')[: len(name.split('.')) - node.level + tree.is_package] if node.level else []
            source = '.'.join([*parents, *([node.module] if node.module else [])])
            yield from ((source, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith('import_module'):
            yield from ((argument.value, None) for argument in node.args[:1] if isinstance(argument, ast.Constant))


def import_graph(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Return the modules of the package that each module imports by name."""
    graph = {}
    for name, tree in trees.items():
        found = set()
        for source, taken in imports(name, tree):
            found.add(f'{source}.{taken}' if f'{source}.{taken}' in trees else source)
        graph[name] = found & trees.keys()
    return graph


def import_cycles(package: Path) -> set[str]:
    """Return the imports that close a cycle, as 'importer -> imported'."""
    graph = import_graph(modules(package))

    def reachable(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            for name in graph[todo.pop()] - seen:
                seen.add(name)
                todo.append(name)
        return seen

    reached = {name: reachable(name) for name in graph}
    return {f'{name} -> {other}' for name, found in graph.items() for other in found if name in reached[other]}


def upward_imports(package: Path) -> set[str]:
    """Return the imports from a higher layer, and the modules that no layer names."""
    graph = import_graph(modules(package))
    levels = {part: level for level, parts in enumerate(LAYERS) for part in parts}

    def part(name: str) -> str:
        return f'{name}.__init__'.split('.')[1]

    unknown = {name for name in graph if part(name) not in levels}
    return unknown | {
        f'{name} -> {other}'
        for name in graph.keys() - unknown
        for other in graph[name] - unknown
        if levels[part(other)] > levels[part(name)]
    }


def imports_of_tools(package: Path) -> set[str]:
    """Return the imports of a tool by the library."""
    tools = f'{package.name}.tools'
    return {
        f'{name} -> {other}'
        for name, found in import_graph(modules(package)).items()
        for other in found
        if f'{other}.'.startswith(f'{tools}.') and not f'{name}.'.startswith(f'{tools}.')
    }


def libraries_of_reparam(package: Path) -> set[str]:
    """Return the imports of `reparam` from libraries other than torch and the standard one."""
    allowed = {'torch', package.name, *sys.stdlib_module_names}
    return {
        f'{name} -> {source}'
        for name, tree in modules(package).items()
        if f'{name}.'.startswith(f'{package.name}.reparam.')
        for source, _ in imports(name, tree, ast.walk(tree))  # for type checkers too
        if source.split('.')[0] not in allowed
    }


def networks_in_checkpoints(package: Path) -> set[str]:
    """Return the classes of `checkpoints` that derive from a class of `torch.nn`."""
    return {
        f'{name}: {node.name}'
        for name, tree in modules(package).items()
        if f'{name}.'.startswith(f'{package.name}.checkpoints.')
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and any(re.search(r'(^|\.)nn\.|Module$', ast.unparse(base)) for base in node.bases)
    }


def is_private(name: str) -> bool:
    return name.startswith('_') and not name.endswith('__') and name.strip('_') != ''


def private_names_of_torch() -> set[str]:
    """Return the private attributes of torch's modules, optimizers and tensors."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], momentum=0.9)
    instances = [nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), optimizer, torch.zeros(1)]
    classes = [item for item in vars(nn).values() if inspect.isclass(item)]
    return {name for item in [*instances, *classes] for name in dir(item) if is_private(name)} - NAMED_TUPLE


def own_names(trees: dict[str, ast.Module]) -> set[str]:
    """Return the private names that the package defines: functions, classes, variables, fields, attributes of self."""
    names = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.alias) and node.asname:
                names.add(node.asname)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names |= {node.attr} if ast.unparse(node.value) in ('self', 'cls') else set()
    return names


def private_names_of_others(package: Path) -> set[str]:
    """Return each private name of another library that a module touches, except `_compat`.

    A name is another library's if the package does not define it, or if a module, an optimizer or a tensor of torch
    has it. It counts as an attribute, as an import, as an override, and as a string that names it.
    """
    trees = modules(package)
    torchs = private_names_of_torch()
    own = own_names(trees) - torchs | NAMED_TUPLE

    def is_foreign(name: str) -> bool:
        return is_private(name) and name not in own

    def found_in(name: str, tree: ast.Module) -> Iterator[str]:
        for source, taken in imports(name, tree, ast.walk(tree)):
            if source.split('.')[0] != package.name:
                parts = [*source.split('.'), *([taken] if taken else [])]
                if any(is_private(part) for part in parts):
                    yield '.'.join(parts)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and is_foreign(node.attr):
                yield node.attr
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name in torchs:
                yield node.name
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in torchs:
                yield node.id
            elif isinstance(node, ast.Constant) and node.value in torchs:
                yield node.value
            elif isinstance(node, ast.Call) and re.search(r'(^|_)(get|set|has|del)attr$', ast.unparse(node.func)):
                yield from (a.value for a in node.args if isinstance(a, ast.Constant) and is_foreign(str(a.value)))

    return {
        f'{name}: {found}'
        for name, tree in trees.items()
        if name != f'{package.name}._compat'
        for found in found_in(name, tree)
    }


RULES = (
    import_cycles,
    upward_imports,
    imports_of_tools,
    libraries_of_reparam,
    networks_in_checkpoints,
    private_names_of_others,
)


@pytest.mark.parametrize('rule', RULES, ids=lambda rule: rule.__name__)
def test_package_rule_has_no_offenders(rule):
    assert rule(PACKAGE) == set()


def test_package_layers_name_existing_modules():
    present = {path.stem for path in PACKAGE.iterdir()}
    assert {part for parts in LAYERS for part in parts} - present <= {'_compat'}


def write_package(folder: Path, **sources: str) -> Path:
    """Write a package `zoo`: `reparam__fold='...'` becomes `zoo/reparam/fold.py`."""
    for name, source in sources.items():
        path = folder / 'zoo' / (name.replace('__', '/') if not name.startswith('__') else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(f'{path.name}.py').write_text(source)
    return folder / 'zoo'


@pytest.mark.parametrize(
    ('variants', 'offenders'),
    [
        ('from .model import RepVGG', {'zoo.variants -> zoo.model', 'zoo.model -> zoo.variants'}),
        ('from . import model', {'zoo.variants -> zoo.model', 'zoo.model -> zoo.variants'}),
        ('import zoo.model', {'zoo.variants -> zoo.model', 'zoo.model -> zoo.variants'}),
        ('def f():\n    import zoo.model', {'zoo.variants -> zoo.model', 'zoo.model -> zoo.variants'}),
        ('importlib.import_module("zoo.model")', {'zoo.variants -> zoo.model', 'zoo.model -> zoo.variants'}),
        ('from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .model import RepVGG', set()),
        ('import typing\nif typing.TYPE_CHECKING:\n    from .model import RepVGG', set()),
        (
            'if TYPE_CHECKING:\n    pass\nelse:\n    from .model import RepVGG',
            {'zoo.variants -> zoo.model', 'zoo.model -> zoo.variants'},
        ),
        ('from .other import model', set()),
    ],
)
def test_import_cycles_of_two_modules_are_found(variants, offenders, tmp_path):
    package = write_package(tmp_path, __init__='', variants=variants, model='from .variants import VARIANTS', other='')
    assert import_cycles(package) == offenders


def test_import_cycles_through_the_package_itself_are_found(tmp_path):
    package = write_package(tmp_path, __init__='from .a.b import c', a__b='from .. import __version__', a____init__='')
    assert import_cycles(package) == {'zoo -> zoo.a.b', 'zoo.a.b -> zoo'}


def test_import_cycles_of_three_modules_are_found_without_their_users(tmp_path):
    package = write_package(
        tmp_path, a='from .b import x', b='from .c import x', c='from .a import x', user='import zoo.a'
    )
    assert import_cycles(package) == {'zoo.a -> zoo.b', 'zoo.b -> zoo.c', 'zoo.c -> zoo.a'}


def test_upward_imports_are_found(tmp_path):
    package = write_package(
        tmp_path,
        __init__='from .repvgg import RepVGG',
        __main__='from .tools.listing import main',
        variants='',
        repvgg='from .model import RepVGG',
        model='from .blocks.base import Block',
        blocks__base='from ..reparam import fold\nfrom ..variants import VARIANTS',
        reparam__fold='def f():\n    from ..blocks.base import Block',
        tools__listing='from .. import __version__\nfrom ..repvgg import RepVGG',
    )
    assert upward_imports(package) == {'zoo.reparam.fold -> zoo.blocks.base'}


def test_upward_imports_of_a_module_without_a_layer_are_found(tmp_path):
    assert upward_imports(write_package(tmp_path, utils='', model='from .utils import x')) == {'zoo.utils'}


def test_imports_of_tools_by_the_library_are_found(tmp_path):
    package = write_package(
        tmp_path,
        model='import zoo.tools.atomic',
        training__groups='def f():\n    from ..tools import atomic',
        tools__atomic='',
        tools__listing='from . import atomic',
        tools_of_others='',
        variants='from . import tools_of_others',
    )
    assert imports_of_tools(package) == {
        'zoo.model -> zoo.tools.atomic',
        'zoo.training.groups -> zoo.tools.atomic',
    }


def test_libraries_of_reparam_except_torch_are_found(tmp_path):
    package = write_package(
        tmp_path,
        model='import timm',
        reparam__fold='import re\nimport torch.nn as nn\nfrom . import foreign',
        reparam__foreign='from timm.layers import ConvNormAct\nif TYPE_CHECKING:\n    import numpy as np',
    )
    assert libraries_of_reparam(package) == {
        'zoo.reparam.foreign -> timm.layers',
        'zoo.reparam.foreign -> numpy',
    }


@pytest.mark.parametrize('base', ['nn.Module', 'torch.nn.Module', 'Module', 'nn.Conv2d', 'torch.nn.Identity'])
def test_networks_in_checkpoints_are_found(base, tmp_path):
    source = f'class Net({base}):\n    pass'
    package = write_package(tmp_path, checkpoints__layouts=f'{source}\nclass Row(NamedTuple):\n    pass', model=source)
    assert networks_in_checkpoints(package) == {'zoo.checkpoints.layouts: Net'}


@pytest.mark.parametrize(
    ('source', 'offenders'),
    [
        ('from timm.models._features import feature_take_indices', {'timm.models._features.feature_take_indices'}),
        ('import torch._dynamo', {'torch._dynamo'}),
        ('from torch import _C', {'torch._C'}),
        ('if TYPE_CHECKING:\n    from torch._C import Graph', {'torch._C.Graph'}),
        ('def f():\n    from huggingface_hub._login import get_token', {'huggingface_hub._login.get_token'}),
        ('torch._C._are_functorch_transforms_active()', {'_C', '_are_functorch_transforms_active'}),
        ('block._modules.clear()', {'_modules'}),
        ('self._modules = {}', {'_modules'}),
        ('model._model_args = {}', {'_model_args'}),
        ('class Block:\n    def _load_from_state_dict(self):\n        pass', {'_load_from_state_dict'}),
        ('class Block:\n    _version = 2', {'_version'}),
        ("getattr(module, '_forward_hooks')", {'_forward_hooks'}),
        ("hasattr(model, '_hub_kwargs')", {'_hub_kwargs'}),
        ("module.__dict__['_buffers']", {'_buffers'}),
        ("vars(module)['_buffers']", {'_buffers'}),
        ('super()._conv_forward(x)', {'_conv_forward'}),
        ("'says that _buffers are kept'", set()),
        ('from ._private import _helper\n_helper()', set()),
        ('from zoo._private import _helper', set()),
        ('self._cache = 1\nother._cache', set()),
        ('class Row:\n    _size: int\nrow._size', set()),
        ('def _own():\n    pass\nmodule._own()', set()),
        ('row._replace(a=1)\nclass A:\n    def __init__(self):\n        self.__class__\nfor _ in ():\n    pass', set()),
        ('import numpy as _numpy\nfrom __future__ import annotations', set()),
    ],
)
def test_private_names_of_others_are_found(source, offenders, tmp_path):
    package = write_package(tmp_path, __init__='', model=source, _private='def _helper():\n    pass', _compat=source)
    assert private_names_of_others(package) == {f'zoo.model: {name}' for name in offenders}
