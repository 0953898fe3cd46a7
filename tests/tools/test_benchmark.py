"""The benchmark: what it plans, what its figures are of, and its files. No figure is tested for its size."""

import csv
import json
from dataclasses import replace

import pytest
import timm
import torch
import torchvision
from helpers import FORMS

from repvgg_zoo import VARIANTS
from repvgg_zoo.tools import benchmark, cli
from repvgg_zoo.tools.benchmark import RUNTIMES, Results, plan, run_benchmark, write_results
from repvgg_zoo.tools.benchmark.cases import Case, WrongOutputError, gmacs, rival_of
from repvgg_zoo.tools.benchmark.measure import matmul_peak_gmacs_per_s, time_rounds
from repvgg_zoo.tools.benchmark.models import PEERS, ModelName
from repvgg_zoo.tools.benchmark.report import latency_quantiles_ms
from repvgg_zoo.tools.benchmark.runtimes import Runtime


def track(items, **_):
    return items


def run(cases, **kwargs) -> Results:
    return run_benchmark(cases, **(dict(rounds=1, memory=False, track=track) | kwargs))


def test_plan_has_every_combination_that_there_is():
    cases = plan(
        ['test_repvgg', 'timm:resnet18'],
        work=['infer', 'train', 'load', 'fold'],
        runtimes=['eager', 'ncnn'],
        batches=[1, 4],
        dtypes=['float32', 'bfloat16'],
    )
    assert len(cases) == len(set(cases))
    count = {
        (name, kind): sum(str(c.model) == name and c.work == kind for c in cases)
        for name in ('test_repvgg', 'timm:resnet18')
        for kind in ('infer', 'train', 'load', 'fold')
    }
    # eager: 2 batches, 2 dtypes; ncnn: batch 1 in float32
    assert [count['test_repvgg', kind] for kind in ('infer', 'train', 'load', 'fold')] == [10, 2, 2, 1]
    assert [count['timm:resnet18', kind] for kind in ('infer', 'train', 'load', 'fold')] == [5, 2, 0, 0]


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('repvgg_c1', "unknown model 'repvgg_c1'; did you mean 'repvgg_b1'.*timm:NAME"),
        ('timm:resnet19', 'did you mean'),
        ('torchvision:resnet19', 'did you mean'),
        ('timm:repvgg_b1g2', 'unknown model'),  # in timm's registry, but the zoo's
        ('keras:resnet50', "unknown source 'keras'"),
        ('timm:resnet10t.nothing', "unknown tag in 'timm:resnet10t.nothing'; there are: c3_in1k"),
    ],
)
def test_unknown_models_are_errors(name, message):
    with pytest.raises(ValueError, match=message):
        plan([name])


@pytest.mark.parametrize('name', PEERS)
def test_peers_exist_with_size_and_accuracy(name):
    model = ModelName.parse(name)
    assert model.input_px in (224, 299, 331)
    assert 69 < model.top1_pct < 83


@pytest.mark.slow
@pytest.mark.parametrize('name', PEERS)
def test_multiply_adds_of_peers(name):
    model = ModelName.parse(name)
    counted = gmacs(model, 'plain')
    assert 0.1 < counted < 30
    if model.source == 'torchvision':  # which publishes them
        weights = next(iter(torchvision.models.get_model_weights(model.name)))
        assert counted == pytest.approx(weights.meta['_ops'], rel=0.02)


def test_settings_of_the_command_line_are_plans():
    for settings in (benchmark.FULL, benchmark.QUICK):
        assert plan(settings.models, runtimes=settings.runtimes)
    assert set(cli._RUNTIMES) == set(RUNTIMES)


def test_rival_is_timms_model_in_the_same_setting():
    case = Case(model=ModelName.parse('repvgg_a0'), form='training', batch=16, layout='channels_last')
    rival = rival_of(case, 'timm')
    assert rival == replace(case, model=ModelName.parse('timm:repvgg_a0'))
    assert rival_of(replace(case, runtime='onnxruntime'), 'timm') == replace(rival, form='deploy')
    assert rival_of(replace(case, work='train'), 'timm').layout == 'contiguous'
    assert rival_of(replace(case, model=ModelName.parse('repvgg_b1g2')), 'timm') is None
    assert rival_of(case, 'torchvision:resnet50').model == ModelName.parse('torchvision:resnet50')
    assert rival_of(replace(case, work='load'), 'torchvision:resnet50') is None
    trained = rival_of(replace(case, work='train'), 'timm:repvgg_a0')
    assert (trained.form, trained.layout) == ('training', 'contiguous')
    assert rival_of(case, 'repvgg_a0') == replace(case, form='deploy')
    assert rival_of(replace(case, form='deploy', runtime='openvino'), 'repvgg_a0').runtime == 'eager'
    assert rival_of(replace(case, form='deploy'), 'repvgg_a0') is None


@FORMS
def test_timms_model_is_timms_own(deploy):
    model = ModelName.parse('timm:repvgg_a0').build('deploy' if deploy else 'training')
    assert type(model) is timm.models.byobnet.ByobNet
    assert (model.stem.reparam_conv is not None) == deploy


def test_rows_of_inference():
    cases = plan(['test_repvgg'], runtimes=['eager', 'torchscript'], batches=[2])
    results = run(cases, rival='timm:resnet10t')
    rows = results.rows
    assert [(row.form, row.runtime) for row in rows[:4]] == [(case.form, case.runtime) for case in cases]
    assert rows[4].model == 'timm:resnet10t'
    assert results.skipped == []
    for row in rows[:4]:
        assert row.latency_p10_ms <= row.latency_ms <= row.latency_p90_ms
        assert row.images_per_s == pytest.approx(2e3 / row.latency_ms)
        assert row.ratio == pytest.approx(rows[4].latency_ms / row.latency_ms)
        assert row.gmacs_per_s == pytest.approx(row.gmacs * row.images_per_s)
        peak = results.machine['matrix product float32 GMAC/s']
        assert row.peak_share_pct == pytest.approx(100 * row.gmacs_per_s / peak, rel=1e-2)  # which is rounded
    assert rows[0].gmacs > rows[1].gmacs == pytest.approx(0.043, rel=0.01)  # as listed


def test_rows_of_training_loading_and_folding():
    rows = run(plan(['repvgg_a0'], work=['train', 'load', 'fold'], batches=[2])).rows
    assert [(row.model, row.form, row.work) for row in rows] == [
        (model, form, work)
        for model in ('repvgg_a0', 'timm:repvgg_a0')
        for form, work in (('training', 'train'), ('training', 'load'), ('deploy', 'load'), ('training', 'fold'))
    ]
    assert all(row.ratio > 0 for row in rows[:4])
    assert rows[0].saved_mb < rows[4].saved_mb


def test_peak_memory_is_at_least_that_of_the_weights():
    (row,) = run(plan(['repvgg_a1'], forms=['deploy']), memory=True, rival='repvgg_a1').rows
    assert 4 * 12.79 < row.peak_memory_mb < 400


def test_missing_packages_and_failures_are_told(monkeypatch):
    def fails(*_):
        raise WrongOutputError('off')

    monkeypatch.setitem(RUNTIMES, 'ncnn', Runtime(prepare=fails, packages=('no_such_package',), extra='ncnn'))
    monkeypatch.setitem(RUNTIMES, 'openvino', Runtime(prepare=fails))
    results = run(plan(['test_repvgg'], forms=['deploy'], runtimes=['ncnn', 'openvino']))
    assert results.rows == []
    assert results.skipped == [
        "ncnn: no_such_package missing; pip install 'repvgg-zoo[ncnn]'",
        'test_repvgg, deploy, infer, openvino, batch 1, float32, contiguous: WrongOutputError: off',
    ]


def test_a_model_that_cannot_be_trained_is_skipped():
    """levit normalises one value for each channel, of a batch of one."""
    results = run(plan(['test_repvgg', 'timm:levit_128s'], work=['train']))
    assert [row.model for row in results.rows] == ['test_repvgg']
    assert results.skipped[0].startswith('timm:levit_128s, plain, train')


def test_settings_that_nothing_takes_are_an_error(tmp_path, capsys):
    with pytest.raises(ValueError, match='none of the runtimes ncnn takes batch sizes 4 in float32'):
        plan(['test_repvgg'], runtimes=['ncnn'], batches=[4])
    for option in ('--batch-sizes', '--rounds', '--threads'):
        for value in ('0', '-1', 'x'):
            with pytest.raises(SystemExit):
                cli.main(['benchmark', 'test_repvgg', option, value])
            assert f'{value!r} is no number from 1 on' in capsys.readouterr().err


def test_nothing_measured_is_an_error(monkeypatch, tmp_path, capsys):
    def fails(*_):
        raise WrongOutputError('off')

    monkeypatch.setitem(RUNTIMES, 'openvino', Runtime(prepare=fails))
    assert cli.main(['benchmark', 'test_repvgg', '--runtimes', 'openvino', '--out', str(tmp_path / 'out')]) == 1
    assert 'nothing could be measured: test_repvgg, training' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_wrong_outputs_are_not_timed(monkeypatch):
    monkeypatch.setitem(RUNTIMES, 'eager', Runtime(prepare=lambda model, x, dtype: lambda: model(x) * 1.01))
    results = run(plan(['test_repvgg'], forms=['deploy']))
    assert results.rows == []
    assert 'eager is off by 1.0e-02 of the largest output' in results.skipped[0]


@pytest.mark.slow
@pytest.mark.parametrize('runtime', RUNTIMES)
def test_runtimes_give_the_outputs_of_eager(runtime):
    """Preparing compares them."""
    results = run(plan(['test_repvgg'], runtimes=[runtime], dtypes=['float32', 'bfloat16']))
    assert results.skipped == []
    assert {row.runtime for row in results.rows} == {runtime}


def test_rounds_take_turns_in_orders_of_their_own(monkeypatch):
    monkeypatch.setattr('repvgg_zoo.tools.benchmark.measure._SLICE_S', 0.0)
    order = []
    runs = [(lambda: None, lambda _, name=name: order.append(name)) for name in 'abc']
    assert time_rounds(runs, rounds=2, track=track) == [[], [], []]  # a turn of no length has no run

    monkeypatch.setattr('repvgg_zoo.tools.benchmark.measure._SLICE_S', 1e-12)
    seconds = time_rounds(runs, rounds=3, track=track)
    rounds = [''.join(order[start : start + 3]) for start in (0, 3, 6)]
    assert all(sorted(names) == ['a', 'b', 'c'] for names in rounds)
    assert len(set(rounds)) == 3
    assert [len(found) for found in seconds] == [3, 3, 3]


def test_turns_go_on_until_their_time_is_up(monkeypatch):
    now = [0.0]
    monkeypatch.setattr('repvgg_zoo.tools.benchmark.measure.time.perf_counter', lambda: now[0])

    def run_of(seconds):
        return lambda: None, lambda _: now.__setitem__(0, now[0] + seconds.pop())

    short, long = run_of([0.03, 0.03, 0.03, 0.05]), run_of([7.0])
    found = time_rounds([short, long], rounds=1, track=track)
    assert found[0] == pytest.approx([0.03, 0.03])  # 0.05 on caches that others filled, and 0.1 s are over
    assert found[1] == [7.0]


@pytest.mark.parametrize(('gmacs_per_s', 'sizes'), [(0.5, [256, 512]), (500, [256, 512, 1024, 2048, 3072])])
def test_peak_of_a_slow_dtype_takes_no_minutes(monkeypatch, gmacs_per_s, sizes):
    """As bfloat16 on a CPU that cannot compute in it."""
    now, made = [0.0], []

    class Product:
        def __init__(self, size):
            self.size = size

        def __matmul__(self, other):
            now[0] += self.size**3 / gmacs_per_s / 1e9

    def randn(count, size, _, dtype):
        made.append(size)
        return [Product(size)] * count

    monkeypatch.setattr('repvgg_zoo.tools.benchmark.measure.time.perf_counter', lambda: now[0])
    monkeypatch.setattr('repvgg_zoo.tools.benchmark.measure.torch.randn', randn)
    assert matmul_peak_gmacs_per_s('bfloat16') == pytest.approx(gmacs_per_s)
    assert made == sizes


def test_quantiles():
    assert latency_quantiles_ms([0.001 * n for n in range(11)]) == pytest.approx((5, 1, 9))
    assert latency_quantiles_ms([0.002]) == (2, 2, 2)


def test_files(tmp_path):
    results = run(plan(['test_repvgg'], runtimes=['eager', 'torchscript']))
    assert write_results(results, tmp_path) == []
    rows = list(csv.DictReader((tmp_path / 'results.csv').open()))
    stored = json.loads((tmp_path / 'results.json').read_text())
    assert [float(row['latency_ms']) for row in rows] == [row['latency_ms'] for row in stored['rows']]
    assert stored['machine']['torch'] == torch.__version__.partition('+')[0]
    assert '| test_repvgg | training | eager |' in (tmp_path / 'results.md').read_text()
    plots = {path.name for path in tmp_path.iterdir()} - {'results.csv', 'results.json', 'results.md'}
    assert plots == {'forms.png', 'forms.svg', 'runtimes.png', 'runtimes.svg'}


def test_table_leaves_out_what_is_empty_and_settings_that_are_the_same():
    results = run(
        plan(['repvgg_a0'], work=['train'], batches=[2], layouts=['contiguous', 'channels_last']), rival='repvgg_a0'
    )
    header, rows = results.table()
    assert header == ('model', 'layout', 'latency_ms (p10 to p90)', 'images_per_s', 'saved MB', 'top-1 %')
    assert [row[-2:] for row in rows] == [('14.5', '72.41')] * 2
    assert results.constants() == 'form training, work train, runtime eager, batch 2, dtype float32, px 224'


def test_command_line(tmp_path, capsys):
    out = tmp_path / 'out'
    arguments = ['benchmark', 'test_repvgg', '--forms', 'deploy', '--rounds', '1', '--no-memory', '--out', str(out)]
    assert cli.main(arguments) == 0
    assert 'test_repvgg' in capsys.readouterr().out
    assert cli.main(arguments) == 1  # the folder exists
    assert cli.main([*arguments, '--overwrite']) == 0
    assert cli.main(['benchmark', 'nothing']) == 1
    assert "unknown model 'nothing'" in capsys.readouterr().err
    assert all(name in VARIANTS or ':' in name for name in benchmark.FULL.models)
