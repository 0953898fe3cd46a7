"""The scripts beside the package: `experiments/cifar10.py` and `benchmarks/gpu`."""

import contextlib
import csv
import importlib.util
import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from repvgg_zoo.pretrained.manifest import weights_dir

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / 'experiments').is_dir(), reason='a source distribution has no scripts')


def load(path, monkeypatch):
    """Import a script, which may import files beside it."""
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location(f'script_{path.stem}', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def train(monkeypatch, capsys):
    """Call `experiments/cifar10.py` with few images. Its module is in `train.script`."""
    script = load(ROOT / 'experiments' / 'cifar10.py', monkeypatch)

    def call(out, *options):
        few = ['--val-split', 'validation', '--images', '64', '--batch-size', '32', '--eager']
        data = ['--data', str(weights_dir() / 'cifar10'), '--out', str(out)]
        monkeypatch.setattr(sys, 'argv', ['cifar10.py', *data, *few, *options])
        with contextlib.suppress(SystemExit):
            script.main()
        return capsys.readouterr().err

    call.script = script
    return call


@pytest.fixture
def stopped(train, tmp_path, monkeypatch):
    """The folder of a run of two epochs that was stopped after one."""
    save_state = train.script.save_state

    def save_and_stop(*args):
        save_state(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train.script, 'save_state', save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / 'stopped', '--epochs', '2')
    return tmp_path / 'stopped'


def test_cifar10_stopped_run_goes_on_to_the_same_weights(train, stopped, tmp_path):
    with (stopped / 'log.csv').open('a') as log:
        log.write('0,0.1,2.3,,1.0\n')  # of an epoch after the last state
    assert train(stopped, '--epochs', '2') == ''
    assert train(tmp_path / 'whole', '--epochs', '2') == ''
    found, expected = (load_file(folder / 'model.safetensors') for folder in (stopped, tmp_path / 'whole'))
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert [row['epoch'] for row in csv.DictReader((stopped / 'log.csv').open())] == ['0', '1']


def test_cifar10_stopped_run_with_other_settings_is_an_error_that_names_them(train, stopped):
    before = {path.name: path.read_bytes() for path in stopped.iterdir()}
    for options, said in {
        ('--epochs', '3'): '--epochs was 2 and is 3',
        ('--epochs', '2', '--seed', '1', '--lr', '0.2'): '--lr was 0.1 and is 0.2, --seed was 0 and is 1',
        ('--epochs', '2', '--model-kwargs', 'block=acb'): "--model-kwargs was {} and is {'block': 'acb'}",
    }.items():
        assert f"state.pt' is of a run with other settings: {said}; choose another --out" in train(stopped, *options)
    assert {path.name: path.read_bytes() for path in stopped.iterdir()} == before


def test_cifar10_finished_run_is_not_overwritten(train, tmp_path):
    (tmp_path / 'model.safetensors').write_text('mine')
    assert "model.safetensors' is the result of a finished run; choose another --out" in train(tmp_path)
    assert (tmp_path / 'model.safetensors').read_text() == 'mine'


@pytest.mark.parametrize(
    ('option', 'value', 'said'),
    [
        ('--batch-size', '0', "argument --batch-size: '0' is no number from 1 on"),
        ('--epochs', '0', "argument --epochs: '0' is no number from 1 on"),
        ('--minutes', '0', 'argument --minutes: 0.0 is not above 0'),
        ('--minutes', 'nan', 'argument --minutes: nan is not above 0'),
        ('--device', 'cuda:99', "argument --device: there is no device 'cuda:99' here; there is: cpu"),
    ],
)
def test_cifar10_impossible_argument_is_an_error(train, option, value, said, tmp_path):
    assert said in train(tmp_path / 'out', option, value)
    assert not (tmp_path / 'out').exists()


def test_gpu_benchmark_skips_only_its_parts(monkeypatch, capsys, tmp_path):
    script = load(ROOT / 'benchmarks' / 'gpu' / '__main__.py', monkeypatch)
    for part in ('tets', 'machine', 'page'):
        monkeypatch.setattr(sys, 'argv', ['gpu', '--rehearse', '--out', str(tmp_path / 'out'), '--skip', part])
        with pytest.raises(SystemExit):
            script.main()
        said = capsys.readouterr().err
        assert f"argument --skip: invalid choice: '{part}' (choose from " in said
        assert all(name in said for name in ('tests', 'cifar10', 'agreement', 'inference_eager'))
    assert not (tmp_path / 'out').exists()


def test_gpu_benchmark_plot_without_rows_does_not_warn(monkeypatch, tmp_path):
    script = load(ROOT / 'benchmarks' / 'gpu' / 'page.py', monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        script.plot([], tmp_path / 'training.png', 'title')
    assert (tmp_path / 'training.png').stat().st_size


@pytest.mark.parametrize('gpu', ['h100', 'h200'])
def test_gpu_benchmark_page_has_the_parts_that_were_measured(gpu, monkeypatch, tmp_path):
    script = load(ROOT / 'benchmarks' / 'gpu' / 'page.py', monkeypatch)
    committed = ROOT / 'benchmarks' / 'gpu' / gpu
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        script.write_page(json.loads((committed / 'results.json').read_text()), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in committed.iterdir()} - {'results.json'}
    for name in ('README.md', 'speed.csv'):
        assert (tmp_path / name).read_text() == (committed / name).read_text()
