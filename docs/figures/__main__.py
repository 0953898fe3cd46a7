"""Draw the figures of the documents, each for a light and for a dark background.

    python docs/figures [NAME ...]

They are drawn from committed CSV and from the bundled weights, with the same bytes each time.
"""

import argparse
from functools import partial
from pathlib import Path

from blocks import draw_blocks
from devices import draw_gpu, draw_int8
from fold import draw_fold
from speed import draw_forms, draw_memory, draw_runtimes, draw_speed_accuracy
from studies import STUDIES
from style import ROOT, THEMES, save

FIGURES = {
    'fold': draw_fold,
    'speed_accuracy': draw_speed_accuracy,
    'forms': draw_forms,
    'runtimes': draw_runtimes,
    'memory': draw_memory,
    'blocks': draw_blocks,
    'int8': draw_int8,
    'gpu': draw_gpu,
}


def main() -> None:
    """Draw all figures, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    studies = {f'study_{name}': name for name in STUDIES}
    names = (*FIGURES, *studies)
    parser.add_argument('names', nargs='*', metavar='NAME', help=', '.join(names))
    parser.add_argument('--out', type=Path, default=Path(__file__).parent, help='folder (%(default)s)')
    results = ROOT / 'experiments' / 'results'
    parser.add_argument('--results', type=Path, default=results, help='folder of the studies (%(default)s)')
    args = parser.parse_args()
    if unknown := set(args.names) - set(names):
        parser.error(f'unknown figures {", ".join(sorted(unknown))}; there are {", ".join(names)}')
    for name in args.names or names:
        draw = partial(STUDIES[study], results=args.results / study) if (study := studies.get(name)) else FIGURES[name]
        for theme in THEMES:
            save(draw(theme), args.out / f'{name}{theme.suffix}.svg')


if __name__ == '__main__':
    main()
