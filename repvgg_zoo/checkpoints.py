"""What a model needs from what a file has: files, key layouts as tables, the two forms, strict checks.

A checkpoint holds one of two forms (training: three branches with batch normalisation; deploy: one fused
convolution) in one of four key layouts. Everything here turns it into timm's layout, which is this
package's own; foreign names stand in the tables below and nowhere else.
"""

from __future__ import annotations

import json
import pickle
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .reparam import BNStats, FoldError, fold_block
from .variants import VARIANTS, Variant

__all__ = [
    'BLOCK_NAMES',
    'FAMILY_BRANCH',
    'FILE_SUFFIXES',
    'BlockNames',
    'CheckpointError',
    'Form',
    'StateDict',
    'check_fit',
    'fold_state_dict',
    'form_of',
    'identify_variant',
    'read_checkpoint',
    'read_safetensors_header',
    'to_timm_layout',
    'without_aux_heads',
]

Form: TypeAlias = Literal['training', 'deploy']
StateDict: TypeAlias = dict[str, Tensor]


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or does not fit the model that it is loaded into."""


# ---------------------------------------------------------------------------------------------- layouts


class BlockNames(NamedTuple):
    """What one code base calls the parts of a RepVGG block; the branches hold `conv` and `norm`."""

    conv_kxk: str
    conv_1x1: str
    identity: str
    reparam_conv: str
    norm: str
    squeeze: str
    excite: str


_TIMM = BlockNames('conv_kxk', 'conv_1x1', 'identity', 'reparam_conv', 'bn', 'attn.fc1', 'attn.fc2')
_OFFICIAL = BlockNames('rbr_dense', 'rbr_1x1', 'rbr_identity', 'rbr_reparam', 'bn', 'se.down', 'se.up')
_OFFICIAL_PLUS = _OFFICIAL._replace(squeeze='post_se.down', excite='post_se.up')
_MMPRETRAIN = BlockNames(
    'branch_3x3', 'branch_1x1', 'branch_norm', 'branch_reparam', 'norm', 'se_layer.conv1.conv', 'se_layer.conv2.conv'
)

BLOCK_NAMES = (_TIMM, _OFFICIAL, _MMPRETRAIN)
"""The names by which a block's branches are found in a module, ours first."""


@dataclass(frozen=True)
class _Layout:
    name: str
    marker: re.Pattern[str]
    """Matches a key that this layout alone has."""
    stem: str
    stages: re.Pattern[str]
    """Matches a block's prefix: stage (1 to 4), optionally which half of it, block."""
    names: BlockNames
    head: str
    aux_heads: tuple[str, ...] = ()
    aux_parts: Mapping[str, str] | None = None

    def parts(self) -> dict[str, str]:
        """Prefixes inside a block, in this layout and in timm's."""
        table = {}
        for branch in ('conv_kxk', 'conv_1x1'):
            ours, theirs = getattr(_TIMM, branch), getattr(self.names, branch)
            table[f'{theirs}.conv.'] = f'{ours}.conv.'
            table[f'{theirs}.{self.names.norm}.'] = f'{ours}.{_TIMM.norm}.'
        for part in ('identity', 'reparam_conv', 'squeeze', 'excite'):
            table[f'{getattr(self.names, part)}.'] = f'{getattr(_TIMM, part)}.'
        return table


_TIMM_MARKER = re.compile(r'stem\.(conv_kxk|reparam_conv|branches)\.')
_FOREIGN_LAYOUTS = (
    _Layout(
        name='official RepVGG',
        marker=re.compile(r'stage1\.\d+\.rbr_'),
        stem='stage0.',
        stages=re.compile(r'stage(?P<stage>[1-4])\.(?P<block>\d+)\.'),
        names=_OFFICIAL,
        head='linear.',
    ),
    _Layout(
        name='official RepVGGplus',
        marker=re.compile(r'stage1\.blocks\.\d+\.rbr_'),
        stem='stage0.',
        stages=re.compile(r'stage(?P<stage>[1-4])(?P<half>_first|_second)?\.blocks\.(?P<block>\d+)\.'),
        names=_OFFICIAL_PLUS,
        head='linear.',
        aux_heads=('stage1_aux.', 'stage2_aux.', 'stage3_first_aux.'),
        aux_parts={'0.conv.': 'conv.', '0.bn.': 'bn.', '3.': 'fc.'},
    ),
    _Layout(
        name='mmpretrain',
        marker=re.compile(r'backbone\.stem\.branch_'),
        stem='backbone.stem.',
        stages=re.compile(r'backbone\.stage_(?P<stage>[1-4])\.(?P<block>\d+)\.'),
        names=_MMPRETRAIN,
        head='head.fc.',
    ),
)
_WRAPPERS = ('module.', '_orig_mod.')
_AUX_PREFIX = 'aux_heads.'


def to_timm_layout(state_dict: Mapping[str, Tensor], *, strict: bool = True) -> StateDict:
    """Rename the keys of any layout, in either form, to timm's.

    Prefixes of DistributedDataParallel and torch.compile are stripped from the front of keys, and
    `num_batches_tracked`, which very old files lack, is filled in. The tensors are not copied. Raises
    `CheckpointError` if no layout is recognised, unless `strict` is false, or if a key has no place in the
    recognised one.
    """
    state_dict = {_strip_wrappers(key): value for key, value in state_dict.items()}
    if not any(map(_TIMM_MARKER.match, state_dict)):
        layout = next((known for known in _FOREIGN_LAYOUTS if any(map(known.marker.match, state_dict))), None)
        if layout is not None:
            state_dict = _translate(state_dict, layout)
        elif strict:
            names = ', '.join(['timm', *(known.name for known in _FOREIGN_LAYOUTS)])
            raise CheckpointError(
                f'no RepVGG checkpoint: its keys ({_few(state_dict)}) are of none of the known layouts ({names})'
            )
    for key in [key for key in state_dict if key.endswith('.running_var')]:
        counter = key.removesuffix('running_var') + 'num_batches_tracked'
        state_dict.setdefault(counter, torch.zeros((), dtype=torch.int64))
    return state_dict


def _strip_wrappers(key: str) -> str:
    while key.startswith(_WRAPPERS):
        key = key.split('.', 1)[1]
    return key


def _translate(state_dict: StateDict, layout: _Layout) -> StateDict:
    parts = layout.parts()
    matches = {key: layout.stages.match(key) for key in state_dict}
    first_half = {m['block'] for m in matches.values() if m and m.groupdict().get('half') == '_first'}

    def rename(key: str) -> str | None:
        if key.startswith(layout.head):
            return 'head.fc.' + key.removeprefix(layout.head)
        for index, prefix in enumerate(layout.aux_heads):
            if key.startswith(prefix):
                part = _replace_prefix(key.removeprefix(prefix), layout.aux_parts or {})
                return part and f'{_AUX_PREFIX}{index}.{part}'
        if match := matches[key]:
            block = int(match['block']) + (len(first_half) if match.groupdict().get('half') == '_second' else 0)
            prefix, rest = f'stages.{int(match["stage"]) - 1}.{block}.', key[match.end() :]
        elif key.startswith(layout.stem):
            prefix, rest = 'stem.', key.removeprefix(layout.stem)
        else:
            return None
        part = _replace_prefix(rest, parts)
        return part and prefix + part

    renamed, strangers = {}, []
    for key, value in state_dict.items():
        new_key = rename(key)
        if new_key is None:
            strangers.append(key)
        else:
            renamed[new_key] = value
    if strangers:
        raise CheckpointError(f'a checkpoint in the layout of {layout.name} with unknown keys: {_few(strangers)}')
    return renamed


def _replace_prefix(text: str, table: Mapping[str, str]) -> str | None:
    for old, new in table.items():
        if text.startswith(old):
            return new + text.removeprefix(old)
    return None


# ------------------------------------------------------------------------------------------------ forms

_KXK, _DEPLOY = f'{_TIMM.conv_kxk}.conv.weight', f'{_TIMM.reparam_conv}.weight'
FAMILY_BRANCH = re.compile(r'(?:^|\.)branches\.\d*[a-z]')
"""Matches the path of a branch of `family.FamilyBlock`, which alone knows how it folds: it has a name, not a number."""
_BRANCHES = tuple(f'{branch}.' for branch in (_TIMM.conv_kxk, _TIMM.conv_1x1, _TIMM.identity))


def form_of(state_dict: Iterable[str]) -> Form:
    """The form that a state dict in timm's layout holds; raises `CheckpointError` for a mixture."""
    keys = list(state_dict)
    training = [key for key in keys if key.endswith(_KXK) or FAMILY_BRANCH.search(key)]
    deploy = [key for key in keys if key.endswith(_DEPLOY)]
    if training and deploy:
        raise CheckpointError(
            f'a checkpoint with blocks of both forms: {_few(training)} of the training form, {_few(deploy)} of the '
            'deploy form; save it again from a model of one form'
        )
    if not training and not deploy:
        raise CheckpointError(f'no RepVGG block among the keys {_few(keys)}')
    return 'training' if training else 'deploy'


def fold_state_dict(
    state_dict: Mapping[str, Tensor], *, eps: float = BNStats._field_defaults['eps'], in_place: bool = False
) -> StateDict:
    """The deploy form of a training-form state dict in timm's layout, as `reparam.fold_block` makes it.

    Auxiliary heads, which only training uses, are left out. The blocks may stand at any prefix, so the
    state dict of a larger network, or of a single block, works too. `eps` is that of the batch
    normalisation that the weights were trained with; state dicts do not hold it. `in_place` puts the folded
    kernels into the memory of the 3x3 kernels, except where these share it with another tensor.
    """
    prefixes = [key.removesuffix(_KXK) for key in state_dict if key.endswith(_KXK)]
    branches = {prefix + branch for prefix in prefixes for branch in _BRANCHES}
    holders = Counter(value.untyped_storage().data_ptr() for value in state_dict.values()) if in_place else {}
    folded = {}
    for key, value in state_dict.items():
        if key.endswith(_KXK):
            prefix = key.removesuffix(_KXK)
            out = value if in_place and holders[value.untyped_storage().data_ptr()] == 1 else None
            weight, bias = _fold_one(state_dict, prefix, eps, out)
            folded[f'{prefix}{_TIMM.reparam_conv}.weight'], folded[f'{prefix}{_TIMM.reparam_conv}.bias'] = weight, bias
        elif _branch_prefix(key) not in branches:
            folded[key] = value
    return without_aux_heads(folded)


def without_aux_heads(state_dict: Mapping[str, Tensor]) -> StateDict:
    """A state dict without the auxiliary heads, which only training uses."""
    return {key: value for key, value in state_dict.items() if not key.startswith(_AUX_PREFIX)}


def _branch_prefix(key: str) -> str | None:
    """`stages.0.1.conv_kxk.` of `stages.0.1.conv_kxk.bn.bias`; None outside the branches of a block."""
    parts = key.split('.')
    for index, part in enumerate(parts):
        if f'{part}.' in _BRANCHES:
            return '.'.join(parts[: index + 1]) + '.'
    return None


def _fold_one(state_dict: Mapping[str, Tensor], prefix: str, eps: float, out: Tensor | None) -> tuple[Tensor, Tensor]:
    def stats(norm: str) -> BNStats:
        mean, var = (state_dict[f'{prefix}{norm}.running_{name}'] for name in ('mean', 'var'))
        weight, bias = (state_dict.get(f'{prefix}{norm}.{name}') for name in ('weight', 'bias'))
        bn = BNStats(mean, var, weight, bias, eps)
        bn.check()
        return bn

    try:
        return fold_block(
            state_dict[prefix + _KXK],
            stats(f'{_TIMM.conv_kxk}.{_TIMM.norm}'),
            state_dict[f'{prefix}{_TIMM.conv_1x1}.conv.weight'],
            stats(f'{_TIMM.conv_1x1}.{_TIMM.norm}'),
            stats(_TIMM.identity) if f'{prefix}{_TIMM.identity}.running_var' in state_dict else None,
            out=out,
        )
    except KeyError as error:
        raise CheckpointError(f'cannot fold block {prefix.rstrip(".")!r}: {error.args[0]} is missing') from None
    except FoldError as error:
        raise FoldError(f'cannot fold block {prefix.rstrip(".")!r}: {error}') from None


# ----------------------------------------------------------------------------------------------- checks


def check_fit(state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, what: str) -> None:
    """Raise `CheckpointError` unless keys and shapes are those of `expected`, the model's state dict.

    The error lists what is missing, unexpected and of the wrong shape, and the variant that the
    checkpoint is of where its shapes tell. `what` names the model.
    """
    wrong_shape = [
        f'{key}: {tuple(value.shape)} in the checkpoint, {tuple(expected[key].shape)} in the model'
        for key, value in state_dict.items()
        if key in expected and value.shape != expected[key].shape
    ]
    problems = {
        'missing': [key for key in expected if key not in state_dict],
        'unexpected': [key for key in state_dict if key not in expected],
        'of the wrong shape': wrong_shape,
    }
    if any(problems.values()):
        variant = identify_variant(state_dict)
        hint = f' (it looks like a checkpoint of {variant.name})' if variant and variant.name != what else ''
        details = '; '.join(f'{len(keys)} {problem}: {_few(keys)}' for problem, keys in problems.items() if keys)
        raise CheckpointError(f'the checkpoint does not fit {what}{hint}: {details}')


def identify_variant(state_dict: Mapping[str, Tensor]) -> Variant | None:
    """The variant whose depths, channels, groups and squeeze-excite a state dict in timm's layout has."""
    suffix = f'.{_KXK}' if any(key.endswith(_KXK) for key in state_dict) else f'.{_DEPLOY}'
    shapes = {key.removesuffix(suffix): value.shape for key, value in state_dict.items() if key.endswith(suffix)}
    squeezed = state_dict.get(f'stages.0.0.{_TIMM.squeeze}.weight')
    for variant in VARIANTS.values():
        channels = {
            f'stages.{stage}.{block}': width
            for stage, (depth, width) in enumerate(zip(variant.depths, variant.stage_channels, strict=True))
            for block in range(depth)
        } | {'stem': variant.stem_channels}
        if {name: shape[0] for name, shape in shapes.items()} != channels:
            continue
        if shapes['stages.0.1'][1] != variant.stage_channels[0] // variant.groups:
            continue
        ratio = variant.se.rd_ratio if variant.se else 0
        if (0 if squeezed is None else squeezed.shape[0] / squeezed.shape[1]) == ratio:
            return variant
    return None


# ------------------------------------------------------------------------------------------------ files

FILE_SUFFIXES = ('.safetensors', '.pth', '.pt', '.tar', '.bin')
"""What the names of checkpoint files end in."""

_CONTAINERS = ('state_dict', 'model')
_EMA_CONTAINERS = ('state_dict_ema', 'model_ema')


def read_checkpoint(path: str | Path, *, use_ema: bool = True) -> StateDict:
    """Read the state dict of a `.safetensors` or torch file, as its keys stand.

    A state dict inside a training checkpoint (`state_dict`, `model`) is found; where the file holds an
    exponential moving average too (`state_dict_ema`, `model_ema`), that one is taken unless `use_ema` is
    false. Torch files are read with `weights_only=True`, so no code in them is run. Raises
    `FileNotFoundError`, or `CheckpointError` for a file that cannot be read or holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'no checkpoint file at {str(path)!r}')
    checkpoint = _read_safetensors(path) if _is_safetensors(path) else _read_torch(path)
    containers = (_EMA_CONTAINERS if use_ema else ()) + _CONTAINERS
    if isinstance(checkpoint, Mapping):
        checkpoint = next((checkpoint[name] for name in containers if checkpoint.get(name) is not None), checkpoint)
    if not isinstance(checkpoint, Mapping) or not checkpoint or not all(map(torch.is_tensor, checkpoint.values())):
        raise CheckpointError(
            f'{str(path)!r} holds no state dict, neither bare nor under one of: {", ".join(containers)}'
        )
    return dict(checkpoint)


_SAFETENSORS_DTYPES = {
    'F64': torch.float64,
    'F32': torch.float32,
    'F16': torch.float16,
    'BF16': torch.bfloat16,
    'I64': torch.int64,
    'I32': torch.int32,
    'I16': torch.int16,
    'I8': torch.int8,
    'U8': torch.uint8,
    'BOOL': torch.bool,
}


def _is_safetensors(path: Path) -> bool:
    """By the suffix, or by the format: the length of a header in eight bytes, then the header in JSON."""
    with path.open('rb') as file:
        header_size, first = int.from_bytes(file.read(8), 'little'), file.read(1)
    return path.suffix == '.safetensors' or (first == b'{' and header_size < path.stat().st_size)


def _read_safetensors(path: Path) -> StateDict:
    """Read into memory that the tensors own: the library's reader maps the file, and needs as much again to copy it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, 'pt'):  # the library checks the header
            pass
        with path.open('rb') as file:
            header = read_safetensors_header(file)
            data_start = file.tell()
        header.pop('__metadata__', None)
        if unread := [f'{n} is {e["dtype"]}' for n, e in header.items() if e['dtype'] not in _SAFETENSORS_DTYPES]:
            raise CheckpointError(
                f'{str(path)!r} has tensors of dtypes that are not read: {_few(unread)}; these are: '
                f'{", ".join(_SAFETENSORS_DTYPES)}'
            )
        tensors = {
            name: torch.empty(entry['shape'], dtype=_SAFETENSORS_DTYPES[entry['dtype']], device='cpu')
            for name, entry in sorted(header.items(), key=lambda item: item[1]['data_offsets'])
        }
        by_size = sorted(tensors, key=lambda name: tensors[name].nbytes)
        workers = torch.get_num_threads()  # a thread spends its time with the kernel's copies and page faults
        shares = [
            [(data_start + header[name]['data_offsets'][0], tensors[name]) for name in by_size[worker::workers]]
            for worker in range(workers)
        ]
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(_read_into, repeat(path), shares))
        return tensors
    except SafetensorError as error:
        raise CheckpointError(f'{str(path)!r} is truncated or no safetensors file ({error}); get it again') from error


def read_safetensors_header(file: BinaryIO) -> dict[str, Any]:
    """The header of an open safetensors file, which is then at the end of it: its length in eight bytes, and JSON."""
    return json.loads(file.read(int.from_bytes(file.read(8), 'little')))


def _read_into(path: Path, tensors: Iterable[tuple[int, Tensor]]) -> None:
    """Fill each tensor with the bytes that begin at its offset in a file."""
    with path.open('rb') as file:
        for offset, tensor in tensors:
            file.seek(offset)
            if file.readinto(tensor.view(-1).view(torch.uint8).numpy()) != tensor.nbytes:
                raise CheckpointError(f'{str(path)!r} became shorter while it was read; get it again')


def _read_torch(path: Path) -> Any:
    from argparse import Namespace

    try:
        with torch.serialization.safe_globals([Namespace]):  # timm's training checkpoints hold their arguments
            return torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f'{str(path)!r} is no torch checkpoint or holds more than tensors, and nothing else is read, since '
            'unpickling it can run any code; save its state dict alone, or as safetensors'
        ) from error
    except Exception as error:  # the unpickler raises whatever the bytes lead it to
        raise CheckpointError(
            f'{str(path)!r} is truncated or no torch checkpoint of tensors alone; get it again, or save its state dict'
        ) from error


def _few(items: Iterable[str], limit: int = 5) -> str:
    items = list(items)
    return ', '.join(items[:limit]) + (f', … ({len(items)} in all)' if len(items) > limit else '')
