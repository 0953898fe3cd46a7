"""Draw the figures of the documents, each for a light and for a dark background.

    python docs/figures [NAME ...]

They are drawn from committed CSV and from the bundled weights, with the same bytes each time.
"""

import argparse
from pathlib import Path

from blocks import draw_blocks
from devices import draw_gpu, draw_int8
from fold import draw_fold
from speed import draw_forms, draw_memory, draw_runtimes, draw_speed_accuracy
from style import THEMES, save

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
    parser.add_argument('names', nargs='*', metavar='NAME', help=', '.join(FIGURES))
    parser.add_argument('--out', type=Path, default=Path(__file__).parent, help='folder (%(default)s)')
    args = parser.parse_args()
    if unknown := set(args.names) - set(FIGURES):
        parser.error(f'unknown figures {", ".join(sorted(unknown))}; there are {", ".join(FIGURES)}')
    for name in args.names or FIGURES:
        for theme in THEMES:
            save(FIGURES[name](theme), args.out / f'{name}{theme.suffix}.svg')


if __name__ == '__main__':
    main()
