"""The studies of `python -m experiments`, at toy size."""

import csv
import math
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from helpers import images, randomise
from torch import nn

from repvgg_zoo import VARIANTS
from repvgg_zoo.pretrained.manifest import weights_dir
from repvgg_zoo.tools.quantize.report import Precision
from repvgg_zoo.tools.tables import count_gmacs

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / 'experiments').is_dir(), reason='a source distribution has no scripts')
DATA = ('--data', str(weights_dir() / 'cifar10'), '--val-split', 'validation', '--images', '60', '--epochs', '1')


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Only the shallowest networks."""
    monkeypatch.syspath_prepend(str(ROOT))
    from experiments import depth, lesion

    for name, value in dict(STEPS=(1,), DEEPEST=2, SKELETON_STEP=1, SEEDS=(0, 1, 2)).items():
        monkeypatch.setattr(depth, name, value)
    monkeypatch.setattr(lesion, 'STEPS', (1,))
    monkeypatch.setattr(depth, 'RECIPE', depth.Recipe(epochs=1, batch_size=30))


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the program; return what it printed."""
    from experiments import __main__ as program

    def call(*options):
        monkeypatch.setattr(sys, 'argv', ['experiments', *map(str, options)])
        program.main()
        return capsys.readouterr().out

    return call


def rows(path):
    return list(csv.DictReader(path.open()))


def test_depth_trains_each_network_once(run, tmp_path):
    from experiments import depth

    run('depth', *DATA, '--out', tmp_path, '--only', 'leaky-8')
    run('depth', *DATA, '--out', tmp_path, '--only', 'residual-8')
    found = rows(tmp_path / 'depth' / 'results.csv')
    assert [(row['network'], row['seed']) for row in found] == [
        (name, seed) for name in ('leaky-8', 'residual-8') for seed in '012'
    ]
    assert sorted(path.name for path in (tmp_path / 'depth' / 'weights').iterdir()) == [
        'leaky-8-0.safetensors',
        'residual-8-0.safetensors',
    ]
    printed = run('report', 'depth', '--results', tmp_path)
    mean = sum(float(row['top1_pct']) for row in found[:3]) / 3
    assert f'| leaky | {mean:.2f} ±' in printed
    assert depth.job('leaky', 1, 0).max_norm == 1


@pytest.mark.parametrize('n', [1, 2])
def test_depth_networks_differ_in_nothing_but_branches(n):
    from experiments import depth

    for network in depth.NETWORKS:
        convs = []
        model = depth.create(network, n).eval()
        if network != depth.RESIDUAL:
            model.switch_to_deploy()
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
                layer.register_forward_hook(lambda _, x, y, convs=convs: convs.append(y.shape[1:]))
        model(images(1, 32))
        widths = [16] * (2 * n) + [32] * (2 * n) + [64] * (2 * n)
        assert convs == [(16, 16, 16)] + [(w, 256 // w, 256 // w) for w in widths]
    slopes = {m.negative_slope for m in depth.create('leaky', n).modules() if isinstance(m, nn.LeakyReLU)}
    assert slopes == {0.1}


def test_lesion_removes_branches(run, tmp_path):
    from experiments import lesion

    run('lesion', *DATA, '--out', tmp_path)
    single = rows(tmp_path / 'lesion' / 'single.csv')
    kinds = ['3x3'] * 7 + ['1x1'] * 7 + ['identity'] * 4
    assert [row['kind'] for row in single] == kinds + ['residual'] * 3 + ['shortcut'] * 3
    found = rows(tmp_path / 'lesion' / 'results.csv')
    trained = {row['network']: row['top1_pct'] for row in rows(tmp_path / 'depth' / 'results.csv')}
    assert len([row for row in found if row['removed'] == '0']) == 7
    assert all(float(row['top1_pct']) == float(trained[row['network']]) for row in found if row['removed'] == '0')
    assert {row['removed'] for row in found if row['kind'] == 'any'} == {'0', '1', '2', '4', '8', '16'}
    assert [row['of'] for row in found if row['kind'] == 'any' and row['removed'] == '0'] == ['18', '6']
    before = [(path, path.read_text()) for path in (tmp_path / 'lesion').iterdir()]
    run('lesion', *DATA, '--out', tmp_path)
    assert all(path.read_text() == text for path, text in before)
    assert '| repvgg-8 | any |' in run('report', 'lesion', '--results', tmp_path)
    assert lesion.COUNTS[0] == 1


def test_lesion_of_results_without_weights_is_an_error(run, tmp_path, capsys):
    from experiments import depth, pool, records, training

    settings = asdict(depth.RECIPE) | training.image_settings(DATA[1], 'validation', 60)
    records.settle(tmp_path / 'depth', settings)
    lines = [(depth.name(network, 1), 0, 1, 0.5, 50, 50) for network in ('repvgg', 'residual')]
    records.append(tmp_path / 'depth' / 'results.csv', pool.COLUMNS, lines)
    with pytest.raises(SystemExit):
        run('lesion', *DATA, '--out', tmp_path)
    assert 'has a result of repvgg-8 and not repvgg-8-0.safetensors' in capsys.readouterr().err


def test_lesion_of_one_network_takes_no_other(run, tmp_path, capsys):
    run('lesion', *DATA, '--out', tmp_path, '--only', 'residual-8')
    assert {row['network'] for row in rows(tmp_path / 'lesion' / 'single.csv')} == {'residual-8'}
    shutil.rmtree(tmp_path / 'depth')
    with pytest.raises(SystemExit):
        run('lesion', *DATA[:-1], '2', '--out', tmp_path, '--only', 'repvgg-8')
    assert "lesion' has results under other settings: epochs was 1 and is 2" in capsys.readouterr().err


def test_lesion_of_shortcuts_leaves_the_residual_branch():
    from experiments import depth, lesion

    torch.manual_seed(0)
    model, x = depth.create('residual', 1).eval(), images(2, 32)
    before = model(x)
    shortcuts = lesion.branches(model)['shortcut']
    assert torch.equal(model(x), before)
    block, y = model[3], torch.randn(2, 16, 8, 8)
    with lesion.without(list(shortcuts.values())):
        torch.testing.assert_close(block(y), block.bn2(block.conv2(block.bn1(block.conv1(y)).relu())).relu())


def test_lesion_report_takes_one_branch_of_all(run, tmp_path):
    from experiments import lesion

    single = [
        dict(network='n', kind=kind, block='0', top1_pct=top1) for kind, top1 in (('a', '10'), ('a', '30'), ('b', '80'))
    ]
    draws = [dict(network='n', kind='a', removed='2', top1_pct=top1) for top1 in ('1', '2', '9')]
    assert lesion.without_some(draws, single, dict(network='n', kind='a'), 1) == 20
    assert lesion.without_some(draws, single, dict(network='n', kind='any'), 1) == 30
    assert lesion.without_some(draws, single, dict(network='n', kind='a'), 2) == 2
    assert lesion.without_some(draws, single, dict(network='n', kind='a'), 4) is None


def test_lesion_leaves_what_the_other_branches_compute():
    from experiments import depth, lesion

    model = randomise(depth.create('repvgg', 1), px=32)
    kinds = lesion.branches(model)
    block, x = model.stages[0][0], torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = block.conv_kxk(x).relu()
    before = block(x)
    with lesion.without([*kinds['1x1'].values(), *kinds['identity'].values()]):
        torch.testing.assert_close(block(x), expected)
    assert torch.equal(block(x), before)
    assert not torch.allclose(before, expected)
    norms = list(kinds['3x3'].values())
    assert lesion.drawn(norms, 3, 0) != lesion.drawn(norms, 3, 1)
    assert len(set(lesion.drawn(norms, 3, 0))) == 3


def test_skeleton_is_of_every_stage(run, tmp_path):
    run('skeleton', *DATA, '--out', tmp_path)
    found = rows(tmp_path / 'skeleton' / 'results.csv')
    assert len(found) == 4 * 2 * 4 * 9
    assert '| dbb-8 | after | 4 |' in run('report', 'skeleton', '--results', tmp_path)


def test_report_draws_the_results_that_it_is_given(run, tmp_path):
    pytest.importorskip('matplotlib')
    from experiments import __main__ as program

    (tmp_path / 'forms').mkdir()
    lines = [f'{layers},{form},1.0,1.00,1.00,1.00,1' for layers in (8, 26) for form in ('training', 'deploy')]
    text = '\n'.join(('depth,form,params_k,batch_1_ms,batch_32_ms,step_32_ms,kept_kb', *lines))
    (tmp_path / 'forms' / 'results.csv').write_text(text)
    (tmp_path / 'forms' / 'settings.json').write_text('{"processor": "A processor of mine", "threads": 7}')
    run('report', '--results', tmp_path, '--figures', tmp_path / 'figures')
    drawn = {path.name: path.read_text('utf-8') for path in (tmp_path / 'figures').iterdir()}
    assert set(drawn) == {'study_forms.svg', 'study_forms.dark.svg'}
    assert 'A processor of mine, 7 threads' in drawn['study_forms.svg']
    assert 'A processor of mine' not in (program.DRAW / 'study_forms.svg').read_text('utf-8')


def test_report_without_figures_is_an_error(run, tmp_path):
    from experiments import __main__ as program

    with pytest.raises(program.StudyError, match='none of these results, only of depth, '):
        program.draw([], tmp_path, tmp_path)
    with pytest.raises(program.StudyError, match=r'not all of study_depth could be drawn of .*; the error is above'):
        program.draw(['depth'], tmp_path, tmp_path)


def test_settings_are_those_of_results(tmp_path):
    from experiments.records import append, settle

    settle(tmp_path, {'epochs': 1})
    settle(tmp_path, {'epochs': 2})  # a mistake before any result
    append(tmp_path / 'results.csv', ('network',), [('plain',)])
    settle(tmp_path, {'epochs': 2})
    with pytest.raises(ValueError, match='epochs was 2 and is 3; give another --out'):
        settle(tmp_path, {'epochs': 3})
    for spoil in (lambda path: path.write_text('{'), Path.unlink):
        spoil(tmp_path / 'settings.json')
        with pytest.raises(ValueError, match=r'no settings\.json that can be read'):
            settle(tmp_path, {'epochs': 2})
    with pytest.raises(ValueError, match='cannot be made'):
        settle(tmp_path / 'results.csv' / 'depth', {})


def test_append_stopped_in_the_middle_adds_nothing(tmp_path, monkeypatch):
    from experiments import records

    def stop(*_):
        raise KeyboardInterrupt

    file = tmp_path / 'results.csv'
    records.append(file, ('a', 'b'), [(1, 2)])
    with monkeypatch.context() as patch:
        patch.setattr('os.replace', stop)
        with pytest.raises(KeyboardInterrupt):
            records.append(file, ('a', 'b'), [(3, 4), (5, 6)])
    records.append(file, ('a', 'b'), [(7, 8)])
    assert file.read_text() == 'a,b\n1,2\n7,8\n'


@pytest.mark.parametrize(
    ('counts', 'said'),
    [
        ({'plain-8': 1, 'repvgg-8': 1}, 'one seed'),
        ({'plain-8': 3, 'repvgg-8': 3, 'acb-8': 1}, '3 seeds and their spread'),
        ({'plain-8': 1, 'repvgg-8': 3}, '3 seeds and their spread; without a bar one seed'),
        ({'plain-8': 2, 'repvgg-8': 3}, '2 to 3 seeds and their spread'),
    ],
)
def test_figure_tells_its_seeds(counts, said, monkeypatch):
    pytest.importorskip('matplotlib')
    monkeypatch.syspath_prepend(str(ROOT / 'docs' / 'figures'))
    from studies import seeds_of

    assert seeds_of([{'network': name} for name, count in counts.items() for _ in range(count)]) == said


def test_skeleton_of_known_kernels():
    from experiments import depth, skeleton

    model = depth.create('plain', 1)
    with torch.no_grad():
        for stage in model.stages:
            for index, block in enumerate(stage):
                weight = block.branches.kxk.conv.weight.zero_()
                weight[:, :, 1, 1] = -1000.0 if index else 2.0
                weight[:, :, 0, 1] = 1000.0 if index else 2.0
    for taps in skeleton.magnitudes(model.eval()):
        assert taps.tolist() == [[0, 4.5, 0], [0, 4.5, 0], [0, 0, 0]]


def test_multiplications_are_counted_and_timed(run, tmp_path, capsys):
    pytest.importorskip('ncnn')
    options = ('--data', 'not read', '--models', 'test_repvgg', '--px', 32, '--rounds', 1)
    run('multiplications', '--out', tmp_path, *options)
    run('multiplications', '--out', tmp_path, *options)
    (row,) = rows(tmp_path / 'multiplications' / 'results.csv')
    assert float(row['gmacs']) == pytest.approx(count_gmacs(VARIANTS['test_repvgg'], input_px=32), abs=1e-4)
    assert float(row['ncnn_ms']) > 0
    assert float(row['ncnn_no_winograd_ms']) > 0
    with pytest.raises(SystemExit):
        run('multiplications', '--out', tmp_path, '--models', 'test_resnet')
    assert 'px was 32 and is 224, rounds was 1 and is 15' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run('multiplications', '--out', tmp_path, '--models', 'test_resnat', 'test_resnet')
    assert 'timm has no model test_resnat\n' in capsys.readouterr().err


def test_multiplications_of_known_layers():
    from experiments.multiplications import count

    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),  # F(2x2) and F(4x4): 4 x 4 and 2 x 2 tiles, for 7 pixels
        nn.ReLU(inplace=True),
        nn.BatchNorm2d(32),
        nn.Conv2d(32, 32, 3, padding=1, stride=2),  # neither
        nn.Conv2d(32, 32, 3, padding=1, groups=2),  # 2 x 2 tiles and one, for 4 pixels, of 16 channels a group
        nn.Conv2d(32, 8, 3, padding=1, groups=8),  # neither, of 4 channels a group
        nn.Conv2d(8, 4, 1),
        nn.Flatten(),
        nn.Linear(64, 10),
        nn.Sigmoid(),
    ).eval()
    others = 32 * 32 * 9 * 16 + 8 * 4 * 9 * 16 + 8 * 4 * 16 + 640
    found = count(model, torch.randn(1, 3, 7, 7))
    assert found.macs == 3 * 32 * 9 * 49 + 32 * 16 * 9 * 16 + others
    assert found.winograd2 == 3 * 32 * 16 * 16 + 32 * 16 * 4 * 16 + others
    assert found.winograd4 == 3 * 32 * 4 * 36 + 32 * 16 * 36 + others
    values = (3 + 32) * 49 + 32 * (49 + 16) + 2 * 32 * 16 + (32 + 8) * 16 + (8 + 4) * 16 + 64 + 10
    assert found.accessed == values + found.params - 2 * 32
    assert found.others == 2 * 32 * 49 + 10
    assert found.layers == 6
    assert found.params == sum(p.numel() for p in model.parameters())


def test_multiplications_of_resnet18_are_the_published_ones():
    from experiments.multiplications import count

    assert count(timm.create_model('resnet18').eval(), torch.randn(1, 3, 224, 224)).macs / 1e9 == pytest.approx(
        1.82, abs=0.01
    )


def test_rank_correlation_takes_equal_values():
    from experiments.multiplications import rank_correlation, ranks

    assert ranks([3.0, 1.0, 3.0, 7.0]) == [2.5, 1.0, 2.5, 4.0]
    table = [{'a': str(a), 'b': str(b)} for a, b in ((1, 10), (2, 1000), (3, 100))]
    assert rank_correlation(table, 'a', 'b') == pytest.approx(0.5)
    assert rank_correlation(table, 'b', 'a', per='b') != rank_correlation(table, 'b', 'a')
    assert math.isnan(rank_correlation(table, 'a', 'b', per='a'))  # a / a is 1 for all
    assert math.isnan(rank_correlation(table[:1], 'a', 'b'))


@pytest.mark.slow
def test_int8_quantizes_what_it_trained(run, monkeypatch, tmp_path):
    pytest.importorskip('nncf')
    from experiments import int8

    monkeypatch.setattr(int8, 'STEP', 1)
    options = (*DATA[:4], '--epochs', 1, '--out', tmp_path, '--only', 'qarepvgg-8', '--ways', '8 bits')
    run('int8', *options)
    run('int8', *options)
    (trained,) = rows(tmp_path / 'depth' / 'results.csv')
    (way,) = rows(tmp_path / 'int8' / 'ways.csv')
    assert float(way['float32_top1_pct']) == pytest.approx(float(trained['folded_top1_pct']), abs=0.21)  # one image
    assert f'| 8 bits | {way["int8_top1_pct"]} |' in run('report', 'int8', '--results', tmp_path)


def test_int8_tells_of_the_trained_network_even_if_it_is_worse(run, monkeypatch, tmp_path):
    from experiments import int8

    kept_last = [
        Precision(name=name, top1_pct=top1, same_top_class_pct=top1, latency_ms=1.0, bytes=1)
        for name, top1 in (('float32', 90.0), ('int8 trained', 50.0), ('int8', 80.0))
    ]
    monkeypatch.setattr(int8, 'quantize', lambda *_, **__: SimpleNamespace(epochs=3, precisions=kept_last))
    run('int8', *DATA[:4], '--out', tmp_path, '--only', 'unbalanced', '--ways', '8 bits', '8 bits, trained')
    assert [row['int8_top1_pct'] for row in rows(tmp_path / 'int8' / 'ways.csv')] == ['80.00', '50.00']


def test_int8_decays_what_it_says(monkeypatch):
    from experiments import int8, training

    data = training.Images(DATA[1], DATA[3], 30, 'cpu')
    for job in int8.jobs():
        groups = training.Training(job, data, training.Recipe(epochs=1, batch_size=30)).optimizer.param_groups
        decayed = [p for group in groups for p in group['params'] if group['weight_decay']]
        assert any(p.ndim == 1 for p in decayed) == (job.network.endswith('all-decayed'))


def test_forms_are_timed_over_depth(run, tmp_path, capsys, monkeypatch):
    run('forms', '--out', tmp_path, '--rounds', 1)
    training, deploy, *_ = rows(tmp_path / 'forms' / 'results.csv')
    assert (training['form'], deploy['form']) == ('training', 'deploy')
    assert float(training['params_k']) > float(deploy['params_k'])
    assert float(training['kept_kb']) > float(deploy['kept_kb'])
    assert '| 8 |' in run('report', 'forms', '--results', tmp_path)
    with pytest.raises(SystemExit):
        run('forms', '--out', tmp_path, '--rounds', 2)
    assert 'rounds was 1 and is 2' in capsys.readouterr().err
    monkeypatch.setattr('experiments.records.machine_facts', lambda _: {'processor': 'another', 'threads': 1})
    with pytest.raises(SystemExit):
        run('forms', '--out', tmp_path, '--rounds', 1)
    assert 'and is another' in capsys.readouterr().err
