"""Generated tables and counted fields: the files are current, and one row of the table of variants is enough."""

import dataclasses
from types import MappingProxyType

import pytest

from repvgg_zoo import VARIANTS, CheckpointError, Variant
from repvgg_zoo.pretrained.locate import locate
from repvgg_zoo.pretrained.manifest import DEPLOY_SUFFIX, read_manifest
from repvgg_zoo.repvgg import _pretrained_cfg
from repvgg_zoo.tools.listing import variant_rows
from repvgg_zoo.tools.publish.weights_page import weights_page
from repvgg_zoo.tools.reproduce import reproduction_lines
from repvgg_zoo.tools.tables import count_params, main, updated_records

NEW = Variant(name='repvgg_new', depths=(1, 1, 1, 1), width=(0.5, 0.5, 0.5, 0.5))


@pytest.fixture
def readme(own_weights, request):
    path = own_weights.parent / 'README.md'
    path.write_text((request.config.rootpath / 'README.md').read_text('utf-8'), 'utf-8')
    return path


@pytest.fixture
def new_variant(monkeypatch):
    variants = MappingProxyType({**VARIANTS, NEW.name: NEW})
    for module in ('variants', 'repvgg', 'tools.tables', 'tools.listing'):
        monkeypatch.setattr(f'repvgg_zoo.{module}.VARIANTS', variants)


def test_check_of_this_checkout_passes(capsys):
    assert main(['--check']) == 0
    assert capsys.readouterr() == ('', '')


@pytest.mark.parametrize('name', ['README.md', 'weights/README.md', 'weights/manifest.json'])
def test_check_outdated_file_fails_and_names_it(readme, capsys, name):
    path = readme.parent / name
    text = path.read_text('utf-8')
    spoiled = text
    for old, new in (('8,309,384', '8,309,385'), ('| 8.31 |', '| 8.32 |'), ('8309384', '8309385')):
        spoiled = spoiled.replace(old, new)
    assert spoiled != text
    path.write_text(spoiled, 'utf-8')
    read_manifest.cache_clear()
    assert main(['--check']) == 1
    assert capsys.readouterr().err == f'{path} is out of date; run python -m repvgg_zoo.tools.tables\n'
    assert path.read_text('utf-8') == spoiled
    assert main([]) == 0
    assert path.read_text('utf-8') == text
    read_manifest.cache_clear()
    assert main(['--check']) == 0


@pytest.mark.parametrize('text', [None, 'no table', '<!-- variants --> only'])
def test_main_without_place_for_table_fails(readme, capsys, text):
    readme.unlink() if text is None else readme.write_text(text)
    assert main([]) == 1
    assert 'README.md' in capsys.readouterr().err


def test_main_new_variant_writes_its_records(readme, new_variant):
    assert main(['--check']) == 1
    assert main([]) == 0
    read_manifest.cache_clear()
    assert main(['--check']) == 0
    training, deploy = list(read_manifest().values())[-2:]
    assert (training.name, deploy.name) == ('repvgg_new.untrained', 'repvgg_new.untrained_deploy')
    assert (training.form, deploy.form) == ('training', 'deploy')
    assert training.params == count_params(NEW, deploy=False)
    assert deploy.params == count_params(NEW, deploy=True) < training.params
    assert training.gmacs == deploy.gmacs > 0
    assert not any(record.has_source for record in (training, deploy))
    assert training.published == training.measured == ()
    assert '| repvgg_new | ' in readme.read_text('utf-8')
    page = (readme.parent / 'weights' / 'README.md').read_text('utf-8')
    assert '| repvgg_new.untrained_deploy | deploy | nowhere yet |' in page
    assert list(variant_rows(read_manifest()))[-1][-2:] == ('none', 'none')
    assert not any('repvgg_new' in line for line in reproduction_lines(imagenet='i', cifar10='c'))


def test_locate_record_without_source_raises(readme, new_variant):
    main([])
    read_manifest.cache_clear()
    for record in list(read_manifest().values())[-2:]:
        cfg = dataclasses.replace(_pretrained_cfg(record), architecture=record.arch, tag=record.tag)
        with pytest.raises(CheckpointError, match=rf'{record.name} has no weights; use pretrained=False'):
            locate(cfg)


def test_updated_records_changes_counted_fields_only():
    records = read_manifest()
    spoiled = {name: dataclasses.replace(record, params=1, gmacs=1.0) for name, record in records.items()}
    assert updated_records(spoiled) == dict(records)


def test_updated_records_follows_order_of_variants():
    records = dict(reversed(read_manifest().items()))
    assert [r.arch for r in updated_records(records).values()] == [r.arch for r in read_manifest().values()]


def test_weights_page_follows_given_records():
    records, name = dict(read_manifest()), 'repvgg_b1g2.rvgg_in1k'
    records[name] = dataclasses.replace(records[name], hub_id=f'me/{name}')
    assert f'| {name}{DEPLOY_SUFFIX} | deploy | fold of {name} |' in weights_page(records)
