"""The manifest: whole records, true figures."""

import csv
import dataclasses
import hashlib
import json
import re
from pathlib import Path
from types import UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

import pytest
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from repvgg_zoo import VARIANTS
from repvgg_zoo.pretrained.manifest import DEPLOY_SUFFIX, WeightsRecord, read_manifest
from repvgg_zoo.tools.publish.manifest_file import write_manifest
from repvgg_zoo.tools.tables import count_gmacs, count_params

RECORDS = read_manifest()
ROWS = csv.DictReader((Path(__file__).parents[1] / 'data' / 'variants.csv').open())
OFFICIAL = {row['name']: row for row in ROWS if row['official_name']}


def test_manifest_every_variant_has_both_forms():
    assert list(dict.fromkeys(record.arch for record in RECORDS.values())) == list(VARIANTS)
    for record in RECORDS.values():
        assert record.form == ('deploy' if record.tag.endswith(DEPLOY_SUFFIX) else 'training')
        assert record.training_name in RECORDS
        assert record.training_name + DEPLOY_SUFFIX in RECORDS


def allowed(hint):
    """The types of an annotation, as `isinstance` takes them."""
    if get_origin(hint) in (Union, UnionType):
        return tuple(part for option in get_args(hint) for part in allowed(option))
    if get_origin(hint) is Literal:
        return (str,)
    return (get_origin(hint) or hint, int) if hint is float else (get_origin(hint) or hint,)


@pytest.mark.parametrize('record', RECORDS.values(), ids=lambda record: record.name)
def test_record_fields_have_their_types(record):
    assert record.license in ('mit', 'apache-2.0', 'bsd-3-clause')
    assert record.origin
    assert all(metrics.source for metrics in (*record.published, *record.measured))
    assert all(metrics.source_url.startswith('https://') for metrics in record.published)
    assert all(
        0 < value <= 100 for m in (*record.published, *record.measured) for value in (m.top1_pct, m.top5_pct or 1)
    )
    for part in (record, record.preprocessing, *record.published, *record.measured):
        for name, hint in get_type_hints(type(part)).items():
            assert isinstance(getattr(part, name), allowed(hint)), name
    for value, digits in ((record.sha256, 64), (record.revision, 40)):
        assert value is None or re.fullmatch(f'[0-9a-f]{{{digits}}}', value)
    published = (record.hub_id, record.revision, record.sha256, record.size_bytes, record.fold_check)
    if record.hub_id is None:
        assert record.revision is None
        assert (record.sha256 is None) == (record.size_bytes is None) == (record.file is None)
        assert record.url is None or (record.form == 'training' and record.url.startswith('https://'))
        assert record.fold_check is None
    else:  # as timm published it, or as this project did, which knows what it published
        assert all(published) or (record.hub_id == f'timm/{record.name}' and not any(published[1:]))


@pytest.mark.parametrize('record', RECORDS.values(), ids=lambda record: record.name)
def test_record_sizes_follow_from_architecture(record):
    variant, classes = VARIANTS[record.arch], record.preprocessing.num_classes
    assert record.params == count_params(variant, deploy=record.form == 'deploy', num_classes=classes)
    gmacs = count_gmacs(variant, input_px=record.preprocessing.input_px, num_classes=classes)
    assert record.gmacs == pytest.approx(gmacs, abs=5e-7)  # it is written with six decimals


def test_manifest_is_written_as_it_is_read(own_weights):
    path = own_weights / 'manifest.json'
    written = path.read_text()
    write_manifest(read_manifest())
    assert path.read_text() == written
    fields = {field.name for field in dataclasses.fields(WeightsRecord)}
    assert fields == {'arch', 'tag'} | set(json.loads(written)['repvgg_a0.rvgg_in1k'])


NAME = 'repvgg_a0.rvgg_in1k'


@pytest.mark.parametrize(
    ('field', 'value', 'message'),
    [
        ('typo', 1, 'has the unknown typo'),
        ('license', ..., 'lacks license'),
        ('params', '9108968', "params is '9108968'"),
        ('form', 'train', "form is 'train'"),
        ('hub_id', 7, 'hub_id is 7'),
        ('published', None, 'published is None'),
        ('published', [{'top1_pct': 7.0}], 'published lacks dataset'),
        ('preprocessing', [], r'preprocessing is \[\]'),
        ('preprocessing', {'input_px': 224}, 'preprocessing lacks crop_pct'),
    ],
)
def test_read_manifest_wrong_field_raises_and_names_it(own_weights, field, value, message):
    path = own_weights / 'manifest.json'
    content = json.loads(path.read_text())
    content[NAME] = {k: v for k, v in (content[NAME] | {field: value}).items() if v is not ...}
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"manifest\.json' is no manifest of weights: '{NAME}'.*{message}.*restore"):
        read_manifest()


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda text: text[:-100], 'line '),
        (lambda text: '[]', 'holds no records'),
        (lambda text: '{"repvgg_a0": {}}', "'repvgg_a0' is no `arch.tag`"),
        (lambda text: '{"repvgg_a0.x": 1}', r"'repvgg_a0\.x' is no"),
        (lambda text: text.replace('"repvgg_a0.', '"repvgg_aO.'), "unknown variant 'repvgg_aO'; did you mean"),
        (
            lambda text: text.replace('"repvgg_a0.rvgg_in1k"', '"repvgg_a0.other"'),
            "no training form of 'repvgg_a0.rvgg",
        ),
    ],
    ids=['cut', 'list', 'no tag', 'no fields', 'unknown variant', 'orphan'],
)
def test_read_manifest_broken_file_raises_and_names_it(own_weights, change, message):
    path = own_weights / 'manifest.json'
    path.write_text(change(path.read_text()))
    with pytest.raises(
        ValueError, match=rf"manifest\.json' is no manifest of weights: .*{message}.*install repvgg-zoo again"
    ):
        read_manifest()


def test_read_manifest_missing_file_raises_and_names_it(own_weights):
    (own_weights / 'manifest.json').unlink()
    with pytest.raises(ValueError, match=r"manifest\.json' is no manifest of weights: .*No such file"):
        read_manifest()


@pytest.mark.parametrize('record', [r for r in RECORDS.values() if r.file], ids=lambda record: record.name)
def test_record_bundled_file_has_size_and_sha256(record):
    content = record.path.read_bytes()
    assert len(content) == record.size_bytes
    assert hashlib.sha256(content).hexdigest() == record.sha256


@pytest.mark.parametrize('name', OFFICIAL)
def test_record_official_figures_are_published_ones(name):
    row = OFFICIAL[name]
    for suffix in ('', DEPLOY_SUFFIX):
        record = RECORDS[f'{name}.rvgg_in1k{suffix}']
        assert record.preprocessing.input_px == int(row['eval_px'])
        assert record.preprocessing.crop_pct == float(row['eval_crop_pct'])
        assert record.preprocessing.interpolation == row['eval_interpolation']
        expected = [float(row[key]) for key in ('top1_paper_or_readme', 'top1_timm') if row[key]]
        published = [m for m in record.published if 'mmpretrain' not in m.source]  # others are in weights.csv
        assert [metrics.top1_pct for metrics in published] == expected
        assert [m.top5_pct for m in published if m.top5_pct] == [float(t) for t in [row['top5_timm']] if t]
        assert (record.preprocessing.mean, record.preprocessing.std) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        assert record.origin == 'https://github.com/DingXiaoH/RepVGG'
        assert record.measured == ()
    training = RECORDS[f'{name}.rvgg_in1k']
    in_timm = row['upstream_train_weights'].startswith('timm/')
    assert (training.upstream is None) == in_timm
    if training.revision is None:  # else this project has published it
        assert training.hub_id == (row['upstream_train_weights'] if in_timm else None)
