"""Generated tables and counted fields: the files are current, and one row of the table of variants is enough."""

import dataclasses
from types import MappingProxyType

import pytest

from repvgg_zoo import VARIANTS, CheckpointError, Variant
from repvgg_zoo.pretrained.locate import locate
from repvgg_zoo.pretrained.manifest import DEPLOY_SUFFIX, FoldCheck, read_manifest
from repvgg_zoo.repvgg import _pretrained_cfg
from repvgg_zoo.tools.listing import weights_rows
from repvgg_zoo.tools.markdown import markdown_table
from repvgg_zoo.tools.publish.weights_page import weights_page
from repvgg_zoo.tools.reproduce import reproduction_lines
from repvgg_zoo.tools.tables import count_params, main, updated_records

NEW = Variant(name='repvgg_new', depths=(1, 1, 1, 1), width=(0.5, 0.5, 0.5, 0.5))


@pytest.fixture
def readme(own_weights, request):
    folder = own_weights.parent
    (folder / 'docs').mkdir()
    for page in ('README.md', 'docs/models.md'):
        (folder / page).write_text((request.config.rootpath / page).read_text('utf-8'), 'utf-8')
    return folder / 'README.md'


@pytest.fixture
def new_variant(monkeypatch):
    variants = MappingProxyType({**VARIANTS, NEW.name: NEW})
    for module in ('variants', 'repvgg', 'tools.tables', 'tools.listing'):
        monkeypatch.setattr(f'repvgg_zoo.{module}.VARIANTS', variants)


def test_check_of_this_checkout_passes(capsys):
    assert main(['--check']) == 0
    assert capsys.readouterr() == ('', '')


@pytest.mark.parametrize('name', ['README.md', 'docs/models.md', 'weights/README.md', 'weights/manifest.json'])
def test_check_outdated_file_fails_and_names_it(readme, capsys, name):
    path = readme.parent / name
    text = path.read_text('utf-8')
    spoiled = text
    for old, new in (('| fold |', '| folded |'), ('| 8.31 |', '| 8.32 |'), ('8309384', '8309385')):
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
    assert '| repvgg_new.untrained | nowhere yet | nowhere yet |  | no | mit |' in page
    assert list(weights_rows(read_manifest()))[-1] == ('repvgg_new.untrained', '224', '', 'none', 'none', 'no')
    assert not any('repvgg_new' in line for line in reproduction_lines(imagenet='i', cifar10='c', cifar100='d'))


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
    records, name = dict(read_manifest()), 'repvgg_b2g2.rvgg_in1k'
    assert f'| {name} | `RepVGG-B2g2-train.pth` of the official release | fold |  | no | mit |' in weights_page(records)
    for suffix in ('', DEPLOY_SUFFIX):
        check = FoldCheck(float64_rel_diff=1e-15, float32_rel_diff=2e-7, images=8, top1_agreement_pct=None)
        published = dict(hub_id=f'me/{name}', revision='0' * 40, sha256='a' * 64, size_bytes=1234, fold_check=check)
        records[name + suffix] = dataclasses.replace(records[name + suffix], **published)
    page = weights_page(records)
    links = [f'[me](https://huggingface.co/me/{name}) on the Hub, at `000000000000`'] * 2
    assert f'| {name} | {" | ".join(links)} |  | forms | mit |' in page
    assert f'| {name}{DEPLOY_SUFFIX} | 1,234 | `aaaaaaaaaaaaaaaa` | 1.0e-15 / 2.0e-07 |  |' in page


def test_weights_page_and_list_tell_what_is_verified():
    page, rows = weights_page(read_manifest()), {row[0]: row[1:] for row in weights_rows(read_manifest())}
    sections = dict(section.split('\n', 1) for section in page.split('\n## ')[1:])
    for record in read_manifest().values():
        if record.form == 'training':
            (line,) = [line for line in sections[record.dataset].splitlines() if line.startswith(f'| {record.name} |')]
            assert ('| no |' in line) == (not record.measured) == (rows[record.name][-1] == 'no')
            assert all(f'[{metrics.top1_pct:g}]({metrics.source_url})' in line for metrics in record.published)
            assert record.url is None or record.url in line
    assert rows['repvgg_a0.mm_in1k'] == ('224', '72.37', 'URL', 'fold', 'no')
    assert rows['repvgg_b2g2.rvgg_in1k'] == ('224', '', '.pth', '.pth', 'no')
    assert rows['test_repvgg.cifar10'][2:] == ('bundled', 'bundled', 'yes')
    assert 'published, not verified here' in page


def test_reproduction_lines_tell_the_data_set_and_what_is_verified():
    lines = list(reproduction_lines(imagenet='my images', cifar10='c10', cifar100='c100'))
    for name, data in (
        ('repvgg_d2se.mm_224_in1k', "'my images'"),
        ('repvgg_a1_cifar.chenyaofo_cifar10', 'c10 --split test'),
        ('repvgg_a1_cifar.chenyaofo_cifar100', 'c100 --split test'),
        ('test_repvgg.cifar10', 'c10 --split test'),
    ):
        index = lines.index(f'repvgg-zoo run validate.py --data-dir {data} --model {name} --pretrained')
        verified = '# measured here' if name.startswith('test_') else '# published, not verified here'
        assert lines[index - 1] == verified


def test_markdown_table_bar_in_cell_is_escaped():
    table = markdown_table([('a|b', 'c')], ('name', 'px'), text_columns=('name', 'px'))
    assert table.splitlines()[-1] == r'| a\|b | c |'
