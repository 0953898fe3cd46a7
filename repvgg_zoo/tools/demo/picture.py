"""The picture of the demo: what each model says about some images, and how long it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

__all__ = ['Answers', 'draw_picture']

_MARGIN, _NAMES_WIDTH, _COLUMN, _SCORE_WIDTH, _LINE, _TEXT, _TITLE = 40, 240, 140, 130, 46, 24, 34
_BLACK, _GREY, _WRONG, _BARS = '#1a1a1a', '#767676', '#c8102e', ('#9db7d5', '#1f5fa8')


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a model says about each image of a strip, and its accuracy on all images."""

    model: str
    classes: Sequence[str]
    top1_pct: float


def draw_picture(
    title: str,
    images: Sequence[Image.Image],
    labels: Sequence[str],
    answers: Sequence[Answers],
    latencies_ms: Mapping[str, float],
) -> Image.Image:
    """Draw a strip of images with a line of answers for each model, wrong ones in red, and latencies as bars.

    Args:
        title: Heading.
        images: The strip.
        labels: The right class of each image.
        answers: One for each model.
        latencies_ms: Milliseconds by name.

    Returns:
        The picture.

    Example:
        >>> answers = Answers(model='deploy form', classes=['cat', 'cat'], top1_pct=50.0)
        >>> strip = [Image.new('RGB', (32, 32), colour) for colour in ('red', 'blue')]
        >>> picture = draw_picture('negatives', strip, ['cat', 'dog'], [answers], {'training': 2.0, 'deploy': 1.0})
        >>> picture.size[0] > picture.size[1]
        True
    """
    left, side = _MARGIN + _NAMES_WIDTH, _COLUMN - 12
    answers_top = _MARGIN + 2 * _TITLE + side + 12
    bars_top = answers_top + (len(answers) + 1) * _LINE + 2 * _TITLE
    width = left + len(images) * _COLUMN + _SCORE_WIDTH + _MARGIN
    picture = Image.new('RGB', (width, bars_top + len(latencies_ms) * _LINE + _MARGIN), 'white')
    draw = ImageDraw.Draw(picture)
    text, heading = ImageFont.load_default(_TEXT), ImageFont.load_default(_TITLE)

    def write(x: int, line_top: int, words: str, colour: str = _BLACK, anchor: str = 'lm') -> None:
        draw.text((x, line_top + _LINE // 2), words, colour, text, anchor)

    draw.text((_MARGIN, _MARGIN), title, _BLACK, heading)
    for column, (image, label) in enumerate(zip(images, labels, strict=True)):
        x = left + column * _COLUMN
        enlarged = image.resize((side, side), Image.Resampling.BICUBIC)
        picture.paste(enlarged, (x + (_COLUMN - side) // 2, _MARGIN + 2 * _TITLE))
        write(x + _COLUMN // 2, answers_top, label, _GREY, 'mm')
    write(_MARGIN, answers_top, 'label', _GREY)
    write(width - _MARGIN, answers_top, 'top-1 of all', _GREY, 'rm')
    for line, answer in enumerate(answers, 1):
        top = answers_top + line * _LINE
        draw.line((_MARGIN, top, width - _MARGIN, top), '#dddddd')
        write(_MARGIN, top, answer.model)
        write(width - _MARGIN, top, f'{answer.top1_pct:.1f} %', _BLACK, 'rm')
        for column, (said, label) in enumerate(zip(answer.classes, labels, strict=True)):
            write(left + column * _COLUMN + _COLUMN // 2, top, said, _BLACK if said == label else _WRONG, 'mm')

    write(_MARGIN, bars_top - _LINE, 'latency of one image', _GREY)
    longest = width - left - _SCORE_WIDTH - _MARGIN
    for line, (name, latency_ms) in enumerate(latencies_ms.items()):
        top = bars_top + line * _LINE
        end = left + round(longest * latency_ms / max(latencies_ms.values()))
        write(_MARGIN, top, name)
        draw.rectangle((left, top + 8, end, top + _LINE - 8), _BARS[line % len(_BARS)])
        write(end + 12, top, f'{latency_ms:.2f} ms')
    return picture
