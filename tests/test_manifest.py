import csv
import hashlib
from pathlib import Path

import pytest

from repvgg_zoo import VARIANTS
from repvgg_zoo.manifest import DEPLOY_SUFFIX, read_manifest

RECORDS = read_manifest()
OFFICIAL = {row['name']: row for row in csv.DictReader((Path(__file__).parent / 'data' / 'variants.csv').open())}


def test_every_variant_has_weights_of_both_forms():
    assert list(dict.fromkeys(record.arch for record in RECORDS.values())) == list(VARIANTS)
    for record in RECORDS.values():
        assert record.form == ('deploy' if record.tag.endswith(DEPLOY_SUFFIX) else 'training')
        assert record.training_name in RECORDS
        assert record.training_name + DEPLOY_SUFFIX in RECORDS


@pytest.mark.parametrize('record', RECORDS.values(), ids=lambda record: record.name)
def test_record_is_whole(record):
    assert record.license == 'mit'
    assert record.origin
    assert all(metrics.source for metrics in (*record.published, *record.measured))
    assert (record.hub_id is None) or (record.file is None and record.upstream is None)


@pytest.mark.parametrize('record', [r for r in RECORDS.values() if r.file], ids=lambda record: record.name)
def test_bundled_file_is_the_recorded_one(record):
    content = record.path.read_bytes()
    assert len(content) == record.size_bytes
    assert hashlib.sha256(content).hexdigest() == record.sha256


@pytest.mark.parametrize('name', OFFICIAL)
def test_official_records_say_what_was_published(name):
    row = OFFICIAL[name]
    for suffix in ('', DEPLOY_SUFFIX):
        record = RECORDS[f'{name}.rvgg_in1k{suffix}']
        assert record.preprocessing.input_px == int(row['eval_px'])
        assert record.preprocessing.crop_pct == float(row['eval_crop_pct'])
        assert record.preprocessing.interpolation == row['eval_interpolation']
        expected = [float(row[key]) for key in ('top1_paper_or_readme', 'top1_timm') if row[key]]
        assert [metrics.top1_pct for metrics in record.published] == expected
        assert record.measured == ()
    training = RECORDS[f'{name}.rvgg_in1k']
    assert training.hub_id == (row['upstream_train_weights'] if 'timm/' in row['upstream_train_weights'] else None)
    assert bool(training.upstream) != bool(training.hub_id)
