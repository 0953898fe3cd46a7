"""The studies of `python -m experiments`, at toy size."""

import csv
import sys
from functools import partial
from pathlib import Path

import pytest
import timm
import torch

from repvgg_zoo.pretrained.manifest import weights_dir

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / 'experiments').is_dir(), reason='a source distribution has no scripts')
TINY = dict(num_classes=10, depths=(1, 1, 1, 1), width=(0.125, 0.0625, 0.0625, 0.0625))


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from experiments import pool

    return pool


@pytest.fixture
def run(pool, monkeypatch, capsys):
    """Call the program; return what it printed."""
    from experiments import __main__ as program

    data = ['--data', str(weights_dir() / 'cifar10'), '--val-split', 'validation']

    def call(study, *options):
        monkeypatch.setattr(sys, 'argv', ['experiments', study, *data, *map(str, options)])
        try:
            program.main()
        except SystemExit:
            return capsys.readouterr().err
        return capsys.readouterr().out

    return call


def images(pool, count):
    return pool.Images(str(weights_dir() / 'cifar10'), 'validation', count, 'cpu')


def tiny(pool, block, seed=0):
    return pool.Job(block, seed, partial(timm.create_model, 'test_repvgg', block=block, **TINY), folds=True)


def rows(path):
    return list(csv.DictReader(path.open()))


def test_pool_goes_on_with_what_is_missing(pool, tmp_path):
    data, recipe = images(pool, 64), pool.Recipe(epochs=2, batch_size=32)
    train = partial(pool.train_all, images=data, recipe=recipe, out=tmp_path, at_once=1)
    wanted = [tiny(pool, 'plain'), tiny(pool, 'plain', seed=1), tiny(pool, 'repvgg')]
    train(wanted[:1], minutes=1)
    first = (tmp_path / 'results.csv').read_text()
    train(wanted, minutes=0)
    assert (tmp_path / 'results.csv').read_text() == first  # no time to begin one
    train(wanted, minutes=1)
    assert (tmp_path / 'results.csv').read_text().startswith(first)
    found = rows(tmp_path / 'results.csv')
    assert [(row['network'], row['seed']) for row in found] == [('plain', '0'), ('plain', '1'), ('repvgg', '0')]
    assert found[0]['train_loss'] != found[1]['train_loss']
    losses = rows(tmp_path / 'losses.csv')
    assert [row['epoch'] for row in losses] == ['0', '1'] * 3
    assert found[2]['train_loss'] == losses[-1]['train_loss']


def test_pool_several_at_once_train_as_one_does(pool, tmp_path):
    """Each has its own order of images, and nothing of the others."""
    data, recipe = images(pool, 64), pool.Recipe(epochs=2, batch_size=32)
    wanted = [tiny(pool, 'plain'), tiny(pool, 'repvgg')]
    for at_once in (1, 2):
        pool.train_all(wanted, data, recipe, tmp_path / str(at_once), at_once=at_once, minutes=1)
    one, two = (sorted(rows(tmp_path / name / 'results.csv'), key=str) for name in '12')
    assert one == two


def test_pool_trains_as_a_loop_of_pytorch_does(pool):
    """With the learning rate, the momentum, the decay and the pixels that are told."""
    data, recipe = images(pool, 96), pool.Recipe(epochs=3, batch_size=32, lr=0.02, weight_decay=0.5)
    training = pool.Training(tiny(pool, 'plain'), data, recipe)
    torch.manual_seed(0)
    model = tiny(pool, 'plain').create().train()
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
    order, top, left, mirrored = (part.long() for part in training.plan)
    total = torch.zeros(3)
    for step, factor in enumerate(factors):
        x = torch.empty(32, 3, 32, 32)
        chosen = range(32 * step, 32 * step + 32)
        for index, i in enumerate(chosen):
            part = data.padded[order[i], top[i] : top[i] + 32, left[i] : left[i] + 32].float()
            pixels = (part.flip(1) if mirrored[i] else part).permute(2, 0, 1)
            x[index] = (pixels - data.mean[:, None, None]) / data.std[:, None, None]
        loss = torch.nn.functional.cross_entropy(model(x), data.train_labels[order[list(chosen)]])
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group['lr'] = 0.02 * factor
        optimizer.step()
        total[step // 3] += loss.detach() / 3
        training.step()
    assert training.is_over
    torch.testing.assert_close(training.losses, total, rtol=1e-3, atol=0)  # nine steps in float32, in another layout
    assert sorted(order[:96].tolist()) == list(range(96))
    other = pool.Training(tiny(pool, 'plain', seed=1), data, recipe)
    assert all(not torch.equal(a, b) for a, b in zip(training.plan, other.plan, strict=True))


def test_pool_sees_each_test_image_once(pool):
    data = images(pool, 100)
    right = data.test_labels.clone()

    class Perfect(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.one_hot(right, 10).float()

    assert pool.top1_pct(Perfect(), data) == 100
    right[:25] = (right[:25] + 1) % 10
    assert pool.top1_pct(Perfect(), data) == 75


def test_vgg_trains_folds_and_reports(run, monkeypatch, tmp_path):
    from experiments import vgg

    monkeypatch.setattr(vgg, 'SEEDS', (3,))
    out = tmp_path / 'vgg'
    printed = run('vgg', '--out', out, '--only', 'doconv', '--epochs', 1, '--images', 128)
    (row,) = rows(out / 'results.csv')
    assert printed.split() == list(row.values())
    assert (row['network'], row['seed'], row['epochs']) == ('doconv', '3', '1')
    assert abs(float(row['top1_pct']) - float(row['folded_top1_pct'])) <= 1  # one image of 128, in the last bits
    assert '| doconv |' in run('vgg', '--report', out)


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        (['--out', 'out', '--only', 'acbb'], "argument --only: no network 'acbb'; there are none, doconv, acb, dbb"),
        (['--out', 'out', '--val-split', 'test'], "has no folder 'test'"),
        (['--report', 'nowhere'], "argument --report: 'nowhere' has no results.csv"),
        ([], 'training needs --data and --out'),
    ],
)
def test_impossible_argument_is_an_error(run, monkeypatch, tmp_path, options, said):
    monkeypatch.chdir(tmp_path)
    assert said in run('vgg', *options)
    assert not list(tmp_path.iterdir())
