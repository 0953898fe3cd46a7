"""The benchmark: what it plans, what its figures are of, and its files. No figure is tested for its size."""

import csv
import json
import logging
from dataclasses import replace

import pytest
import timm
import torch
import torchvision
from helpers import FORMS

from repvgg_zoo import VARIANTS
from repvgg_zoo.tools.benchmark.benchmark import run_benchmark, write_results
from repvgg_zoo.tools.benchmark.cases import Case, WrongOutputError, baseline_of, gmacs
from repvgg_zoo.tools.benchmark.measure import matmul_peak_gmacs_per_s, time_rounds
from repvgg_zoo.tools.benchmark.models import PEERS, ModelName
from repvgg_zoo.tools.benchmark.plan import FULL, QUICK, plan
from repvgg_zoo.tools.benchmark.report import Results, latency_quantiles_ms
from repvgg_zoo.tools.benchmark.runtimes import DTYPES, RUNTIMES, Runtime, autocast, cast
from repvgg_zoo.tools.console import no_progress
from repvgg_zoo_cli import main


def run(cases, **kwargs) -> Results:
    return run_benchmark(cases, **(dict(rounds=1, memory=False, track=no_progress) | kwargs))


def test_plan_all_work_has_every_combination():
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
    assert [count['test_repvgg', kind] for kind in ('infer', 'train', 'load', 'fold')] == [10, 4, 2, 1]
    assert [count['timm:resnet18', kind] for kind in ('infer', 'train', 'load', 'fold')] == [5, 4, 0, 0]


@pytest.mark.parametrize(
    ('settings', 'lines'),
    [
        (
            dict(work=['train'], dtypes=['float32', 'float16']),
            ['left out: training in pure float16, whose gradients vanish; amp_float16 scales them'],
        ),
        (
            dict(work=['load', 'fold'], dtypes=['float32', 'bfloat16', 'amp_float16']),
            ['left out: load and fold in bfloat16, amp_float16, because they are measured in float32 only'],
        ),
        (
            dict(runtimes=['eager', 'ncnn', 'onnxruntime-cuda'], batches=[1, 4], layouts=['contiguous']),
            [
                'left out: inference by ncnn, which takes batch sizes up to 1 and not 4',
                'left out: inference by onnxruntime-cuda, which runs on --device cuda and not on cpu',
            ],
        ),
        (
            dict(
                runtimes=['eager', 'openvino'], dtypes=['float32', 'float16'], layouts=['contiguous', 'channels_last']
            ),
            [
                'left out: inference by openvino, which takes float32 and bfloat16 and not float16, '
                'takes contiguous and not channels_last',
            ],
        ),
        (
            dict(work=['train'], runtimes=['eager', 'ncnn']),
            [
                'left out: training by ncnn; those that train are compile, compile-max-autotune, '
                'compile-reduce-overhead, eager'
            ],
        ),
        (
            dict(work=['train'], dtypes=['amp_float16']),
            ['training in amp_float16 may take a hundred times as long as in amp_bfloat16 on a CPU'],
        ),
        (dict(work=['train'], dtypes=['amp_float16'], device='cuda'), []),
        (dict(work=['infer', 'train', 'load', 'fold'], batches=[1, 4]), []),
    ],
)
def test_plan_says_in_a_line_what_it_leaves_out(settings, lines, caplog):
    caplog.set_level(logging.WARNING)  # which other libraries raise
    assert plan(['test_repvgg'], **settings)
    assert caplog.messages == lines


def test_plan_folds_whichever_forms_are_asked_for():
    assert [case.form for case in plan(['test_repvgg'], work=['fold'], forms=['deploy'])] == ['training']


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
def test_plan_unknown_model_raises(name, message):
    with pytest.raises(ValueError, match=message):
        plan([name])


@pytest.mark.parametrize('name', PEERS)
def test_peer_has_size_and_accuracy(name):
    model = ModelName.parse(name)
    assert model.input_px in (224, 299, 331)
    assert 69 < model.top1_pct < 83


@pytest.mark.slow
@pytest.mark.parametrize('name', PEERS)
def test_gmacs_peer_is_published_figure(name):
    model = ModelName.parse(name)
    counted = gmacs(model, 'single')
    assert 0.1 < counted < 30
    if model.source == 'torchvision':  # which publishes them
        weights = next(iter(torchvision.models.get_model_weights(model.name)))
        assert counted == pytest.approx(weights.meta['_ops'], rel=0.02)


def test_plan_default_settings_has_cases():
    for settings in (FULL, QUICK):
        assert plan(settings.models, runtimes=settings.runtimes)
    assert QUICK.runtimes == [name for name, runtime in RUNTIMES.items() if runtime.is_quick]


def test_baseline_of_case_is_timms_model_in_same_setting():
    case = Case(model=ModelName.parse('repvgg_a0'), form='training', batch=16, layout='channels_last')
    baseline = baseline_of(case, 'timm')
    assert baseline == replace(case, model=ModelName.parse('timm:repvgg_a0'))
    assert baseline_of(replace(case, runtime='onnxruntime'), 'timm') == replace(baseline, form='deploy')
    assert baseline_of(replace(case, work='train'), 'timm').layout == 'contiguous'
    assert baseline_of(replace(case, model=ModelName.parse('repvgg_b1g2')), 'timm') is None
    assert baseline_of(case, 'torchvision:resnet50').model == ModelName.parse('torchvision:resnet50')
    assert baseline_of(replace(case, work='load'), 'torchvision:resnet50') is None
    trained = baseline_of(replace(case, work='train'), 'timm:repvgg_a0')
    assert (trained.form, trained.layout) == ('training', 'contiguous')
    assert baseline_of(case, 'repvgg_a0') == replace(case, form='deploy')
    assert baseline_of(replace(case, form='deploy', runtime='openvino'), 'repvgg_a0').runtime == 'eager'
    assert baseline_of(replace(case, form='deploy'), 'repvgg_a0') is None


@FORMS
def test_build_timm_name_gives_timms_class(deploy):
    model = ModelName.parse('timm:repvgg_a0').build('deploy' if deploy else 'training')
    assert type(model) is timm.models.byobnet.ByobNet
    assert (model.stem.reparam_conv is not None) == deploy


def test_run_benchmark_inference_rows_agree():
    cases = plan(['test_repvgg'], runtimes=['eager', 'torchscript'], batches=[2])
    results = run(cases, baseline='timm:resnet10t')
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
        assert row.pct_of_matmul_peak == pytest.approx(100 * row.gmacs_per_s / peak, rel=1e-2)  # which is rounded
    assert rows[0].gmacs > rows[1].gmacs == pytest.approx(0.078, rel=0.01)  # as listed


def test_run_benchmark_other_work_rows_agree():
    rows = run(plan(['repvgg_a0'], work=['train', 'load', 'fold'], batches=[2])).rows
    assert [(row.model, row.form, row.work) for row in rows] == [
        (model, form, work)
        for model in ('repvgg_a0', 'timm:repvgg_a0')
        for form, work in (('training', 'train'), ('training', 'load'), ('deploy', 'load'), ('training', 'fold'))
    ]
    assert all(row.ratio > 0 for row in rows[:4])
    assert rows[0].saved_mb < rows[4].saved_mb


def test_run_benchmark_peak_memory_exceeds_weights():
    (row,) = run(plan(['repvgg_a1'], forms=['deploy']), memory=True, baseline='repvgg_a1').rows
    assert 4 * 12.79 < row.peak_memory_mb < 400


def test_run_benchmark_missing_package_or_failure_is_skipped(monkeypatch):
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


def test_run_benchmark_untrainable_model_is_skipped():
    """levit normalises one value for each channel, of a batch of one."""
    results = run(plan(['test_repvgg', 'timm:levit_128s'], work=['train']))
    assert [row.model for row in results.rows] == ['test_repvgg']
    assert results.skipped[0].startswith('timm:levit_128s, single, train')


def test_plan_impossible_setting_raises(tmp_path, capsys):
    with pytest.raises(ValueError, match='inference by ncnn, which takes batch sizes up to 1 and not 4'):
        plan(['test_repvgg'], runtimes=['ncnn'], batches=[4])
    for option in ('--batch-sizes', '--rounds', '--threads'):
        for value in ('0', '-1', 'x'):
            with pytest.raises(SystemExit):
                main(['benchmark', 'test_repvgg', option, value])
            assert f'{value!r} is no number from 1 on' in capsys.readouterr().err


def test_main_nothing_measured_fails(monkeypatch, tmp_path, capsys):
    def fails(*_):
        raise WrongOutputError('off')

    monkeypatch.setitem(RUNTIMES, 'openvino', Runtime(prepare=fails))
    assert main(['benchmark', 'test_repvgg', '--runtimes', 'openvino', '--out', str(tmp_path / 'out')]) == 1
    assert 'nothing could be measured: test_repvgg, training' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_run_benchmark_wrong_output_is_skipped(monkeypatch):
    monkeypatch.setitem(RUNTIMES, 'eager', Runtime(prepare=lambda model, x, dtype: lambda: model(x) * 1.01))
    results = run(plan(['test_repvgg'], forms=['deploy']))
    assert results.rows == []
    assert 'eager is off by 1.0e-02 of the largest output' in results.skipped[0]


def exhaustive(value):
    return pytest.param(value, marks=pytest.mark.exhaustive)


ON_CPU = [name for name, runtime in RUNTIMES.items() if runtime.devices is None or 'cpu' in runtime.devices]


@pytest.mark.slow
@pytest.mark.parametrize(
    'runtime',
    # minutes of compilation
    [exhaustive(name) if name.startswith('compile') else name for name in ON_CPU],
)
def test_runtime_every_dtype_gives_outputs_of_eager(runtime):
    """Preparing compares them."""
    results = run(plan(['test_repvgg'], runtimes=[runtime], dtypes=['float32', 'bfloat16']))
    assert results.skipped == []
    assert {row.runtime for row in results.rows} == {runtime}


def test_runtimes_of_gpus_are_planned_for_gpus():
    assert set(RUNTIMES) - set(ON_CPU) == {'onnxruntime-cuda', 'onnxruntime-tensorrt', 'torch-tensorrt'}
    for runtime in set(RUNTIMES) - set(ON_CPU):
        with pytest.raises(ValueError, match=rf'inference by {runtime}, which runs on --device cuda and not on cpu'):
            plan(['test_repvgg'], runtimes=[runtime])
        cases = plan(['test_repvgg'], runtimes=[runtime], dtypes=['float16'], device='cuda:1')
        assert {case.device for case in cases} == {'cuda:1'}
        assert str(cases[0]).endswith(', cuda:1')


def test_onnxruntime_without_provider_is_skipped(monkeypatch):
    options = dict(packages=(), devices=('cpu',))
    monkeypatch.setitem(RUNTIMES, 'openvino', replace(RUNTIMES['onnxruntime-cuda'], **options))
    results = run(plan(['test_repvgg'], forms=['deploy'], runtimes=['openvino']))
    assert results.rows == []
    assert 'this onnxruntime has no CUDAExecutionProvider, only ' in results.skipped[0]


def test_run_benchmark_trains_in_each_precision():
    assert not any(case.dtype == 'float16' for case in plan(['test_repvgg'], work=['train'], dtypes=DTYPES))
    cases = plan(['test_repvgg'], work=['train'], batches=[2], dtypes=['float32', 'bfloat16', 'amp_bfloat16'])
    results = run(cases, baseline='test_repvgg')
    assert results.skipped == []
    kept = {row.dtype: row.saved_mb for row in results.rows}
    assert kept['bfloat16'] == pytest.approx(kept['float32'] / 2, rel=0.01)
    weights_mb = 2 * sum(p.numel() for p in timm.create_model('test_repvgg').parameters() if p.ndim > 1) / 1e6
    assert kept['amp_bfloat16'] == pytest.approx(kept['bfloat16'] + weights_mb, rel=0.05)  # their casts


def test_cast_and_autocast_give_dtype_of_setting():
    x = torch.ones(1, 3, 8, 8)
    for dtype, weights, outputs in (
        ('float16', torch.float16, torch.float16),
        ('amp_bfloat16', torch.float32, torch.bfloat16),
        ('float32', torch.float32, torch.float32),
    ):
        model, images = cast(torch.nn.Conv2d(3, 3, 3), x, dtype)
        with autocast('cpu', dtype):
            assert (model.weight.dtype, model(images).dtype) == (weights, outputs)


def test_baseline_of_training_trains_in_the_same_runtime():
    case = Case(model=ModelName.parse('repvgg_a0'), form='training', work='train', runtime='compile', device='cuda')
    baseline = baseline_of(replace(case, layout='channels_last'), 'timm')
    assert (baseline.runtime, baseline.form, baseline.layout) == ('compile', 'training', 'channels_last')


@pytest.mark.slow
def test_training_compiled_takes_a_step():
    results = run(plan(['test_repvgg'], work=['train'], runtimes=['eager', 'compile', 'ncnn'], batches=[2]))
    assert [(row.runtime, row.work) for row in results.rows] == [('eager', 'train'), ('compile', 'train')]


def test_main_missing_device_lists_those_that_exist(capsys):
    with pytest.raises(SystemExit):
        main(['benchmark', 'test_repvgg', '--device', 'cuda:7'])
    assert "there is no device 'cuda:7' here; there is: cpu" in capsys.readouterr().err


def test_build_on_meta_device_gives_meta_model():
    for name in ('test_repvgg', 'timm:repvgg_a0', 'timm:test_resnet'):
        model = ModelName.parse(name).build('training', device='meta')
        assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {'meta'}


def test_time_rounds_each_round_has_own_order(monkeypatch):
    monkeypatch.setattr('repvgg_zoo.tools.benchmark.measure._SLICE_S', 0.0)
    order = []
    runs = [(lambda: None, lambda _, name=name: order.append(name)) for name in 'abc']
    assert time_rounds(runs, rounds=2, track=no_progress) == [[], [], []]  # a turn of no length has no run

    monkeypatch.setattr('repvgg_zoo.tools.benchmark.measure._SLICE_S', 1e-12)
    seconds = time_rounds(runs, rounds=3, track=no_progress)
    rounds = [''.join(order[start : start + 3]) for start in (0, 3, 6)]
    assert all(sorted(names) == ['a', 'b', 'c'] for names in rounds)
    assert len(set(rounds)) == 3
    assert [len(found) for found in seconds] == [3, 3, 3]


def test_time_rounds_turn_fills_its_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr('repvgg_zoo.tools.benchmark.measure.time.perf_counter', lambda: now[0])

    def run_of(seconds):
        return lambda: None, lambda _: now.__setitem__(0, now[0] + seconds.pop())

    short, long = run_of([0.03, 0.03, 0.03, 0.05]), run_of([7.0])
    found = time_rounds([short, long], rounds=1, track=no_progress)
    assert found[0] == pytest.approx([0.03, 0.03])  # 0.05 on caches that others filled, and 0.1 s are over
    assert found[1] == [7.0]


@pytest.mark.parametrize(('gmacs_per_s', 'sizes'), [(0.5, [256, 512]), (500, [256, 512, 1024, 2048, 3072])])
def test_matmul_peak_slow_dtype_stops_early(monkeypatch, gmacs_per_s, sizes):
    """As bfloat16 on a CPU that cannot compute in it."""
    now, made = [0.0], []

    class Product:
        def __init__(self, size):
            self.size = size

    def mm(a, b):
        now[0] += a.size**3 / gmacs_per_s / 1e9

    def randn(count, size, _, dtype, device):
        made.append(size)
        return [Product(size)] * count

    monkeypatch.setattr('repvgg_zoo.tools.benchmark.measure.time.perf_counter', lambda: now[0])
    monkeypatch.setattr('repvgg_zoo.tools.benchmark.measure.torch.randn', randn)
    monkeypatch.setattr('repvgg_zoo.tools.benchmark.measure.torch.mm', mm)
    assert matmul_peak_gmacs_per_s('bfloat16') == pytest.approx(gmacs_per_s)
    assert made == sizes


def test_latency_quantiles_are_in_ms():
    assert latency_quantiles_ms([0.001 * n for n in range(11)]) == pytest.approx((5, 1, 9))
    assert latency_quantiles_ms([0.002]) == (2, 2, 2)


def test_write_results_writes_tables_and_plots(tmp_path):
    results = run(plan(['test_repvgg'], runtimes=['eager', 'torchscript']))
    assert write_results(results, tmp_path) == []
    rows = list(csv.DictReader((tmp_path / 'results.csv').open()))
    stored = json.loads((tmp_path / 'results.json').read_text())
    assert [float(row['latency_ms']) for row in rows] == [row['latency_ms'] for row in stored['rows']]
    assert stored['machine']['torch'] == torch.__version__.partition('+')[0]
    assert '| test_repvgg | training | eager |' in (tmp_path / 'results.md').read_text()
    plots = {path.name for path in tmp_path.iterdir()} - {'results.csv', 'results.json', 'results.md'}
    assert plots == {'forms.png', 'forms.svg', 'runtimes.png', 'runtimes.svg'}


def test_table_omits_empty_and_constant_columns():
    results = run(
        plan(['repvgg_a0'], work=['train'], batches=[2], layouts=['contiguous', 'channels_last']), baseline='repvgg_a0'
    )
    header, rows = results.table()
    assert header == ('model', 'layout', 'latency_ms (p10 to p90)', 'images_per_s', 'saved MB', 'top-1 %')
    assert [row[-2:] for row in rows] == [('14.5', '72.41')] * 2
    assert results.constants() == 'form training, work train, runtime eager, batch 2, dtype float32, px 224'


def test_main_benchmark_writes_folder(tmp_path, capsys):
    out = tmp_path / 'out'
    arguments = ['benchmark', 'test_repvgg', '--forms', 'deploy', '--rounds', '1', '--no-memory', '--out', str(out)]
    assert main(arguments) == 0
    assert 'test_repvgg' in capsys.readouterr().out
    assert main(arguments) == 1  # the folder exists
    assert main([*arguments, '--overwrite']) == 0
    assert main(['benchmark', 'nothing']) == 1
    assert "unknown model 'nothing'" in capsys.readouterr().err
    assert all(name in VARIANTS or ':' in name for name in FULL.models)
