"""Every record of the manifest loads in both forms: from a server on loopback that has its file under its real name.

The contents are synthetic. Their names, layouts and shapes are those of the authors' code, or of timm's for weights on
the Hub. The sha256 in a name is that of the real file, which is the wrong one here, or is replaced by the right one.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
from pathlib import Path

import pytest
import timm
import torch
from helpers import MMPRETRAIN, OFFICIAL, official, rename
from hub_server import Repository
from safetensors.torch import save_file
from torch import Tensor, nn

from repvgg_zoo import CheckpointError
from repvgg_zoo.pretrained.manifest import DEPLOY_SUFFIX, WeightsRecord, read_manifest
from repvgg_zoo.pretrained.urls import sha256_prefix
from repvgg_zoo.repvgg import _pretrained_cfg

RECORDS = read_manifest()
PUBLISHED = list(csv.DictReader((Path(__file__).parents[1] / 'data' / 'weights.csv').open()))
TABLES = {'mmpretrain': MMPRETRAIN, 'official RepVGG': OFFICIAL}
_FROM_OFFICIAL = [
    ('stage0.', 'backbone.stem.'),
    *((f'stage{s}.', f'backbone.stage_{s}.') for s in (1, 2, 3, 4)),
    ('.rbr_dense.conv.', '.branch_3x3.conv.'),
    ('.rbr_dense.bn.', '.branch_3x3.norm.'),
    ('.rbr_1x1.conv.', '.branch_1x1.conv.'),
    ('.rbr_1x1.bn.', '.branch_1x1.norm.'),
    ('.rbr_identity.', '.branch_norm.'),
    ('.se.down.', '.se_layer.conv1.conv.'),
    ('.se.up.', '.se_layer.conv2.conv.'),
    ('linear.', 'head.fc.'),
]


def of(source: str) -> list:
    """Training-form records whose file is at that kind of source."""

    def marks(record: WeightsRecord) -> list:
        return [pytest.mark.exhaustive] if record.params > 40e6 else [pytest.mark.slow] if record.params > 20e6 else []

    return [
        pytest.param(record, id=record.name, marks=marks(record))
        for record in RECORDS.values()
        if record.form == 'training' and not record.file and getattr(record, source)
    ]


def test_records_are_bundled_on_the_hub_at_an_address_or_in_the_official_release():
    for record in RECORDS.values():
        sources = [record.available.file, record.available.hub_id, record.available.url]
        assert sum(map(bool, sources)) == 1 or (record.upstream and not any(sources))
        if record.available.url:
            assert record.available.hub_ref is None
            assert sha256_prefix(record.available.url) is not None


def test_records_with_address_are_the_published_ones():
    assert len(PUBLISHED) == sum(record.url is not None for record in RECORDS.values())
    for row in PUBLISHED:
        name = f'{row["arch"]}.{row["tag"]}'
        assert RECORDS[name].url == row['url']
        assert sha256_prefix(row['url']) == row['sha256_prefix']
        for record in (RECORDS[name], RECORDS[name + DEPLOY_SUFFIX]):
            metrics, preprocessing = record.published[-1], record.preprocessing
            assert (metrics.dataset, metrics.top1_pct, metrics.top5_pct) == (
                row['dataset'],
                float(row['top1_published']),
                float(row['top5_published']),
            )
            assert preprocessing.input_px == int(row['eval_px'])
            assert preprocessing.crop_pct == float(row['crop_pct'])
            assert preprocessing.interpolation == row['interpolation']
            assert preprocessing.mean == tuple(map(float, row['mean'].split()))
            assert preprocessing.std == tuple(map(float, row['std'].split()))
            assert preprocessing.num_classes == {'ImageNet-1k': 1000, 'CIFAR-10': 10, 'CIFAR-100': 100}[row['dataset']]
            assert record.license == row['license']
            assert record.recipe
            assert record.origin


def test_list_pretrained_has_what_can_be_had():
    names = [record.name for record in RECORDS.values() if record.available.has_source]
    assert set(names) <= set(timm.list_pretrained())
    assert {record.name for record in RECORDS.values()} & set(timm.list_pretrained()) == set(names)
    assert timm.get_pretrained_cfg('repvgg_b1g2').tag == 'rvgg_in1k'
    assert timm.get_pretrained_cfg('repvgg_a0_cifar').tag == 'chenyaofo_cifar10'


# ------------------------------------------------------------------------------------------------ contents


def layout_of(record: WeightsRecord) -> str:
    return next(row['layout'] for row in PUBLISHED if record.name == f'{row["arch"]}.{row["tag"]}')


def synthetic(shapes: dict[str, Tensor]) -> dict[str, Tensor]:
    """Positive random values. All tensors share one storage, little larger than the largest: a small file to send."""
    largest = max(like.numel() for like in shapes.values())
    numbers = torch.rand(largest + 8 * len(shapes), generator=torch.Generator().manual_seed(0)) + 0.1
    return {
        key: numbers[8 * index :][: like.numel()].view(like.shape) if like.ndim else torch.tensor(1000)
        for index, (key, like) in enumerate(shapes.items())
    }


def official_shapes(record: WeightsRecord) -> dict[str, Tensor]:
    """The state dict of the authors' code, without values."""
    with torch.device('meta'):
        model = official(record.arch)
        model.linear = nn.Linear(model.linear.in_features, record.preprocessing.num_classes)
        return model.state_dict()


def fold(weights: dict[str, Tensor], block: str) -> tuple[Tensor, Tensor]:
    """The sum of a block's branches, in float64, by the equations of the paper."""

    def scale_and_shift(norm: str) -> tuple[Tensor, Tensor]:
        gamma, beta, mean, var = (
            weights[f'{block}.{norm}.{name}'].double() for name in ('weight', 'bias', 'running_mean', 'running_var')
        )
        scale = gamma / (var + 1e-5).sqrt()
        return scale, beta - mean * scale

    scale, bias = scale_and_shift('conv_kxk.bn')
    kernel = weights[f'{block}.conv_kxk.conv.weight'].double() * scale[:, None, None, None]
    scale, shift = scale_and_shift('conv_1x1.bn')
    kernel[:, :, 1, 1] += weights[f'{block}.conv_1x1.conv.weight'].double()[:, :, 0, 0] * scale[:, None]
    bias = bias + shift
    if f'{block}.identity.weight' in weights:
        scale, shift = scale_and_shift('identity')
        channels = torch.arange(len(scale))
        kernel[channels, channels % kernel.shape[1], 1, 1] += scale
        bias = bias + shift
    return kernel, bias


def check(training: nn.Module, deploy: nn.Module, content: dict[str, Tensor], table: list) -> None:
    assert not training.deploy
    assert deploy.deploy
    state_dict = training.state_dict()
    ours = dict(zip(rename(state_dict, table), state_dict, strict=True))
    assert ours.keys() == content.keys()
    weights = {ours[key]: value for key, value in content.items()}
    assert all(torch.equal(value, weights[key]) for key, value in state_dict.items())
    folded = deploy.state_dict()
    for block in ('stem', 'stages.0.0', 'stages.0.1', 'stages.2.1', 'stages.3.0'):
        for name, expected in zip(('weight', 'bias'), fold(weights, block), strict=True):
            # each side rounds once to float32
            assert torch.allclose(folded[f'{block}.reparam_conv.{name}'].double(), expected, rtol=2e-7, atol=0)
    others = {key for key in folded if '.reparam_conv.' not in key}
    assert others == {key for key in state_dict if '.conv_' not in key and '.identity.' not in key}
    assert all(torch.equal(folded[key], weights[key]) for key in others)


# --------------------------------------------------------------------------------------------------- loads


@pytest.mark.parametrize('record', of('url'))
def test_record_with_address_loads_in_both_forms_if_the_hash_is_right(record, web, tmp_path):
    layout = layout_of(record)
    content = official_shapes(record)
    if layout == 'mmpretrain':
        content = rename(content, _FROM_OFFICIAL)
    content = synthetic(content)
    wrapped = {'meta': {'epoch': 120}, 'state_dict': content} if layout == 'mmpretrain' else content
    torch.save(wrapped, tmp_path / 'file.pth')
    data = (tmp_path / 'file.pth').read_bytes()
    web.files[record.url.removeprefix('https://')] = web.put(data)
    for name in (record.name, record.name + DEPLOY_SUFFIX):
        with pytest.raises(CheckpointError, match=rf'{record.url} gave other content than its name says'):
            timm.create_model(name, pretrained=True)
    assert list((tmp_path / 'torch').rglob('*.p*')) == []

    right = record.url.replace(sha256_prefix(record.url), hashlib.sha256(data).hexdigest()[:8])
    web.files[right.removeprefix('https://')] = web.files.pop(record.url.removeprefix('https://'))
    del web.requests[:]
    models = []
    for name in (record.name, record.name + DEPLOY_SUFFIX):
        at_right = dict(url=right, architecture=record.arch, tag=RECORDS[name].tag)
        cfg = dataclasses.replace(_pretrained_cfg(RECORDS[name]), **at_right)
        models.append(timm.create_model(record.arch, pretrained=True, pretrained_cfg=cfg))
    check(*models, content, TABLES[layout])
    assert web.requests == [('GET', '/web/' + right.removeprefix('https://'))]  # the second is of the cache


@pytest.mark.parametrize('record', of('hub_id'))
def test_record_on_the_hub_loads_in_both_forms_if_the_hash_is_right(record, hub, tmp_path):
    with torch.device('meta'):
        shapes = getattr(timm.models.byobnet, record.arch)().state_dict()
    content = {key: value.clone() for key, value in synthetic(shapes).items()}
    save_file(content, tmp_path / 'model.safetensors')
    sha256 = hub.put((tmp_path / 'model.safetensors').read_bytes())
    hub.repositories[record.hub_id] = Repository()
    hub.repositories[record.hub_id].commit({'model.safetensors': sha256})
    models = [timm.create_model(name, pretrained=True) for name in (record.name, record.name + DEPLOY_SUFFIX)]
    check(*models, content, [])

    with (hub.blobs / sha256).open('r+b') as file:
        file.seek(-1, 2)
        file.write(b'\xff')
    for name in (record.name, record.name + DEPLOY_SUFFIX):
        with pytest.raises(CheckpointError, match='is not the file that the Hub has: its sha256 is not'):
            timm.create_model(name, pretrained=True, cache_dir=tmp_path / 'another')
