"""The demo: what it shows, what it writes, and its picture."""

from itertools import groupby

import pytest
import torch
from helpers import images
from PIL import Image

from repvgg_zoo.tools.console import no_progress
from repvgg_zoo.tools.convert import open_model
from repvgg_zoo.tools.demo import demo
from repvgg_zoo.tools.demo.demo import run_demo
from repvgg_zoo.tools.demo.picture import Answers, draw_picture
from repvgg_zoo.tools.own_files import MARKER
from repvgg_zoo_cli import main

FILES = [
    'demo.png',
    *(f'{form}/{name}' for form in ('deploy', 'training') for name in ('config.json', 'model.safetensors')),
]


def files_in(folder):
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file() and path.name != MARKER
    )


@pytest.fixture(scope='module')
def demonstrated(tmp_path_factory):
    folder = tmp_path_factory.mktemp('demo') / 'out'
    return folder, run_demo(folder, track=no_progress)


def test_demo_learns_and_both_forms_agree(demonstrated):
    _, (photographs, before, training, deploy, reloaded) = demonstrated
    assert photographs.top1_pct > before.top1_pct
    # far more than the standard error of a difference on 500 images, 3 points at most
    assert training.top1_pct > before.top1_pct + 12
    assert training.top1_pct == deploy.top1_pct == reloaded.top1_pct
    assert deploy.max_logit_diff == reloaded.max_logit_diff < 1e-4
    assert training.params > deploy.params


def test_demo_folder_holds_both_forms_and_a_picture(demonstrated):
    folder, _ = demonstrated
    assert files_in(folder) == FILES
    training, deploy = (open_model(folder / form).eval() for form in ('training', 'deploy'))
    assert (training.deploy, deploy.deploy) == (False, True)
    x = images(2, 32)
    assert torch.equal(training(x).argmax(1), deploy(x).argmax(1))
    with Image.open(folder / 'demo.png') as picture:
        assert picture.width > picture.height


def test_demo_again_replaces_only_its_own_files(demonstrated, tmp_path, monkeypatch, capsys):
    out = tmp_path / 'out'
    monkeypatch.setattr(demo, '_finetune', lambda model, track: None)
    assert main(['demo', '--out', str(out)]) == 0
    assert 'pretrained, negatives' in capsys.readouterr().out
    assert main(['demo', '--out', str(out)]) == 1
    assert 'exists' in capsys.readouterr().err
    assert main(['demo', '--out', str(out), '--overwrite']) == 0
    (out / 'notes.txt').touch()
    assert main(['demo', '--out', str(out), '--overwrite']) == 1
    assert files_in(out) == sorted([*FILES, 'notes.txt'])


def colours(picture: Image.Image, box) -> set[tuple[int, int, int]]:
    return {colour for _, colour in picture.crop(box).getcolors(1 << 20)}


def test_draw_picture_only_wrong_answers_are_red():
    strip = [Image.new('RGB', (32, 32), colour) for colour in ('#00ff00', '#0000ff')]

    def drawn(*said):
        answers = [Answers(model='deploy form', classes=said, top1_pct=50.0)]
        return draw_picture('title', strip, ['cat', 'dog'], answers, {'training form': 2.0, 'deploy form': 1.0})

    def is_red(picture, half):
        middle = 280 + 140  # between the columns of both images
        box = (280, 0, middle, picture.height) if half == 0 else (middle, 0, middle + 140, picture.height)
        return (200, 16, 46) in colours(picture, box)

    right, wrong = drawn('cat', 'dog'), drawn('cat', 'cat')
    assert not is_red(right, 0)
    assert not is_red(right, 1)
    assert not is_red(wrong, 0)
    assert is_red(wrong, 1)
    assert {(0, 255, 0), (0, 0, 255)} <= colours(right, (0, 0, *right.size))


def test_draw_picture_bars_are_proportional_to_latencies():
    strip = [Image.new('RGB', (32, 32), 'white')] * 3
    answers = [Answers(model='deploy form', classes=['cat'] * 3, top1_pct=50.0)]
    picture = draw_picture('title', strip, ['cat'] * 3, answers, {'training form': 2.0, 'deploy form': 0.5})
    pixels = picture.load()
    lengths = {}
    for y in range(picture.height):
        for colour, run in groupby(pixels[x, y] for x in range(picture.width)):
            lengths[colour] = max(lengths.get(colour, 0), len(list(run)))
    assert lengths[(0x1F, 0x5F, 0xA8)] / lengths[(0x9D, 0xB7, 0xD5)] == pytest.approx(0.25, abs=0.01)
