"""The trainings and the command line of `python -m experiments`, at toy size."""

import csv
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import timm
import torch

from repvgg_zoo.pretrained.manifest import weights_dir

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / 'experiments').is_dir(), reason='a source distribution has no scripts')
DATA = ('--data', str(weights_dir() / 'cifar10'), '--val-split', 'validation')
IMAGES = (DATA[1], DATA[3], 64, 'cpu')
TINY = dict(num_classes=10, depths=(1, 1, 1, 1), width=(0.125, 0.0625, 0.0625, 0.0625))


@pytest.fixture(autouse=True)
def repository(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def training():
    from experiments import training

    return training


@pytest.fixture
def pool(training, tmp_path):
    """Make a pool of 64 images, with a recipe of two epochs and two steps each."""
    from experiments.pool import Pool

    recipe = training.Recipe(epochs=2, batch_size=32)
    return partial(Pool, IMAGES, recipe, tmp_path)


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the program; return what it printed."""
    from experiments import __main__ as program

    def call(*options):
        monkeypatch.setattr(sys, 'argv', ['experiments', *map(str, options)])
        try:
            program.main()
        except SystemExit:
            return capsys.readouterr().err
        return capsys.readouterr().out

    return call


def create(block):
    return timm.create_model('test_repvgg', block=block, **TINY)


def job(block, seed=0):
    from experiments.training import Job

    return Job(block, seed, partial(create, block), folds=True)


def rows(path):
    return list(csv.DictReader(path.open()))


def test_pool_goes_on_with_what_is_missing(pool, tmp_path):
    wanted = [job('plain'), job('plain', seed=1), job('repvgg')]
    pool().train(wanted[:1])
    first = (tmp_path / 'results.csv').read_text()
    pool(end=time.time() - 1).train(wanted)
    assert (tmp_path / 'results.csv').read_text() == first  # no time to begin one
    pool().train(wanted)
    assert (tmp_path / 'results.csv').read_text().startswith(first)
    found = rows(tmp_path / 'results.csv')
    assert [(row['network'], row['seed']) for row in found] == [('plain', '0'), ('plain', '1'), ('repvgg', '0')]
    assert found[0]['train_loss'] != found[1]['train_loss']
    losses = rows(tmp_path / 'losses.csv')
    assert [row['epoch'] for row in losses] == ['0', '1'] * 3
    assert found[2]['train_loss'] == losses[-1]['train_loss']
    assert not list((tmp_path / 'unfinished').iterdir())


def test_pool_goes_on_after_the_last_epoch(pool, training, tmp_path, monkeypatch):
    three = replace(pool(), recipe=training.Recipe(epochs=3, batch_size=32))  # the learning rate still rises
    whole = training.Training(job('repvgg'), training.Images(*IMAGES), three.recipe)
    while not whole.is_over:
        whole.step()

    def stop(self):
        if self.count == 3:
            raise KeyboardInterrupt
        step(self)

    step = training.Training.step
    monkeypatch.setattr(training.Training, 'step', stop)
    with pytest.raises(KeyboardInterrupt):
        three.train([job('repvgg')])
    steps = []
    monkeypatch.setattr(training.Training, 'step', lambda self: (steps.append(self.count), step(self)))
    three.train([job('repvgg')])
    assert steps == [2, 3, 4, 5]  # the first epoch was whole
    assert [row['train_loss'] for row in rows(tmp_path / 'losses.csv')] == [f'{x:.4f}' for x in whole.losses.tolist()]


def test_pool_stopped_between_its_files_writes_losses_once(pool, tmp_path, monkeypatch):
    from experiments import pool as module

    def stop(path, *args):
        if path.name == 'results.csv':
            raise KeyboardInterrupt
        append(path, *args)

    append = module.append
    monkeypatch.setattr(module, 'append', stop)
    with pytest.raises(KeyboardInterrupt):
        pool().train([job('plain')])
    monkeypatch.setattr(module, 'append', append)
    pool().train([job('plain')])
    assert [row['epoch'] for row in rows(tmp_path / 'losses.csv')] == ['0', '1']
    assert len(rows(tmp_path / 'results.csv')) == 1


def test_pool_goes_on_only_with_its_recipe(pool, training, tmp_path, monkeypatch):
    from experiments.errors import StudyError

    def stop(self):
        if self.count == 2:
            raise KeyboardInterrupt
        step(self)

    step = training.Training.step
    with monkeypatch.context() as patch:
        patch.setattr(training.Training, 'step', stop)
        with pytest.raises(KeyboardInterrupt):
            pool().train([job('repvgg')])
    longer = replace(pool(), recipe=training.Recipe(epochs=3, batch_size=32))
    fewer = replace(pool(), images=(*IMAGES[:2], 32, 'cpu'))
    elsewhere = replace(pool(), images=(IMAGES[0], 'train', *IMAGES[2:]))
    changes = (
        (longer, 'epochs was 2 and is 3'),
        (fewer, 'train_images was 64 and is 32, test_images was 64 and is 32'),
        (elsewhere, 'test_split was validation and is train'),
    )
    for others, change in changes:
        with pytest.raises(StudyError, match=f'{change}; give another --out'):
            others.train([job('repvgg')])
    pool().train([job('repvgg')])
    with pytest.raises(StudyError, match='epochs was 2 and is 3'):
        longer.train([job('plain')])


@pytest.mark.slow
def test_pool_processes_train_as_one_does(pool, tmp_path):
    wanted = [job('plain'), job('repvgg')]
    for at_once in (1, 2):
        replace(pool(at_once=at_once), out=tmp_path / str(at_once)).train(wanted)
    one, two = (sorted(rows(tmp_path / name / 'results.csv'), key=str) for name in '12')
    assert [row['network'] for row in one] == ['plain', 'repvgg']
    for a, b in zip(one, two, strict=True):  # with other numbers of threads
        assert float(a['train_loss']) == pytest.approx(float(b['train_loss']), rel=1e-2)


def test_training_is_as_a_loop_of_pytorch(training):
    """With the learning rate, the momentum, the decay and the pixels that are told."""
    data = training.Images(*IMAGES[:2], 96, 'cpu')
    recipe = training.Recipe(epochs=3, batch_size=32, lr=0.02, weight_decay=0.5)
    found = training.Training(job('plain'), data, recipe)
    torch.manual_seed(0)
    model = create('plain').to(memory_format=torch.channels_last).train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [dict(params=decayed, weight_decay=0.5), dict(params=others, weight_decay=0)]
    optimizer = torch.optim.SGD(groups, lr=1, momentum=0.9, nesterov=True)
    factors = [
        1 / 4,
        2 / 4,
        3 / 4,
        4 / 4,
        4 / 4,
        4 / 5,
        3 / 5,
        2 / 5,
        1 / 5,
    ]  # up for half of them
    order, top, left, mirrored = (part.long() for part in found.plan)
    total = torch.zeros(3)
    for step, factor in enumerate(factors):
        x = torch.empty(32, 3, 32, 32)
        chosen = range(32 * step, 32 * step + 32)
        for index, i in enumerate(chosen):
            part = data.padded[order[i], top[i] : top[i] + 32, left[i] : left[i] + 32].float()
            pixels = (part.flip(1) if mirrored[i] else part).permute(2, 0, 1)
            x[index] = (pixels - data.mean[:, None, None]) / data.std[:, None, None]
        with torch.autocast('cpu', torch.bfloat16):
            logits = model(x.to(memory_format=torch.channels_last))
        loss = torch.nn.functional.cross_entropy(logits.float(), data.train_labels[order[list(chosen)]])
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group['lr'] = 0.02 * factor
        optimizer.step()
        total[step // 3] += loss.detach() / 3
        found.step()
    assert found.is_over
    torch.testing.assert_close(found.losses, total, rtol=1e-3, atol=0)  # nine steps with convolutions in bfloat16
    assert sorted(order[:96].tolist()) == list(range(96))
    other = training.Training(job('plain', seed=1), data, recipe)
    assert all(not torch.equal(a, b) for a, b in zip(found.plan, other.plan, strict=True))


def test_training_limits_norms(training):
    recipe = training.Recipe(epochs=1, batch_size=32)
    limited = training.Training(replace(job('plain'), max_norm=0.5), training.Images(*IMAGES), recipe)
    limited.step()
    assert limited.model.stem.branches.kxk.conv.weight.flatten(1).norm(dim=1).max() <= 0.5 + 1e-6


def test_top1_sees_each_test_image_once(training):
    data = training.Images(*IMAGES[:2], 100, 'cpu')
    right = data.test_labels.clone()

    class Perfect(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.one_hot(right, 10).float()

    assert training.top1_pct(Perfect(), data) == 100
    right[:25] = (right[:25] + 1) % 10
    assert training.top1_pct(Perfect(), data) == 75


def test_vgg_trains_folds_and_reports(run, monkeypatch, tmp_path):
    from experiments import vgg

    monkeypatch.setattr(vgg, 'SEEDS', (3,))
    printed = run('vgg', '--out', tmp_path, *DATA, '--only', 'doconv', '--epochs', 1, '--images', 128)
    (row,) = rows(tmp_path / 'vgg' / 'results.csv')
    assert printed.split() == list(row.values())
    assert (row['network'], row['seed'], row['epochs']) == ('doconv', '3', '1')
    assert abs(float(row['top1_pct']) - float(row['folded_top1_pct'])) <= 1  # one image of 128, in the last bits
    assert '| doconv |' in run('report', 'vgg', '--results', tmp_path)


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        (['vgg', *DATA, '--out', 'out', '--only', 'acbb'], "no network 'acbb'; there are none, doconv, acb, dbb"),
        (['depth', *DATA[:2], '--out', 'out'], "has no folder 'test'"),
        (['vgg', *DATA, '--out', 'out', '--images', '100'], '100 images make no batch of 128'),
        (['report', '--results', 'nowhere'], "'nowhere' has no results of depth, lesion"),
        (['report', 'width'], "invalid choice: 'width'"),
        (['depth', '--out', 'out'], 'the following arguments are required: --data'),
    ],
)
def test_impossible_argument_is_an_error(run, monkeypatch, tmp_path, options, said):
    monkeypatch.chdir(tmp_path)
    assert said in run(*options)
    assert not list(tmp_path.rglob('*.csv'))


def test_report_reads_what_is_committed(run):
    printed = run('report')
    assert '| doconv |' in printed
