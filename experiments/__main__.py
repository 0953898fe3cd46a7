"""Experiments on CIFAR-10, and what they found.

    python -m experiments depth --data cifar10 --out runs    # goes on with what it has not done yet
    python -m experiments report                             # tables of the results in experiments/results
    python -m experiments report --figures figures           # and figures, which need matplotlib

`--data` holds the folders `train` and `test`, with a folder of images for each class. Each study writes a folder of its
own in `--out`, which `report --results` reads.
"""

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

from experiments import depth, forms, int8, lesion, multiplications, skeleton, vgg
from experiments.errors import StudyError

STUDIES = {
    'depth': depth,
    'lesion': lesion,
    'skeleton': skeleton,
    'multiplications': multiplications,
    'forms': forms,
    'vgg': vgg,
    'int8': int8,
}
FIGURES = ('depth', 'lesion', 'skeleton', 'multiplications', 'forms')
COMMITTED = Path(__file__).parent / 'results'
DRAW = Path(__file__).parents[1] / 'docs' / 'figures'


def main() -> None:
    parser = argparse.ArgumentParser(
        prog='python -m experiments', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar='STUDY')
    for name, study in STUDIES.items():
        help_ = study.__doc__.partition('\n')[0]
        command = commands.add_parser(name, help=help_, description=study.__doc__)
        command.add_argument('--out', type=Path, required=True, help=f'folder; the results go to its folder {name}')
        study.add_arguments(command)
        command.set_defaults(run=study.run, parser=command)
    command = commands.add_parser('report', help='tables and figures of results')
    command.add_argument('studies', nargs='*', choices=[[], *STUDIES], metavar='STUDY', help='only these')
    command.add_argument('--results', type=Path, default=COMMITTED, help='folder (%(default)s)')
    command.add_argument(
        '--figures', type=Path, metavar='FOLDER', help='draw there the figures of the studies that have one'
    )
    command.set_defaults(run=report, parser=command)
    args = parser.parse_args()
    try:
        args.run(args)
    except StudyError as error:
        args.parser.error(str(error))


def report(args: argparse.Namespace) -> None:
    found = [name for name in args.studies or STUDIES if (args.results / name).is_dir()]
    if not found:
        raise StudyError(f'{str(args.results)!r} has no results of {", ".join(args.studies or STUDIES)}')
    for name in found:
        print(f'\n{name}\n')
        STUDIES[name].report(args.results / name)
    if args.figures:
        draw([name for name in found if name in FIGURES], args.results, args.figures)


def draw(studies: list[str], results: Path, out: Path) -> None:
    if not importlib.util.find_spec('matplotlib'):
        raise StudyError("--figures needs matplotlib: pip install 'repvgg-zoo[benchmark]'")
    if not studies:
        raise StudyError(f'--figures: there is none of these results, only of {", ".join(FIGURES)}')
    out.mkdir(parents=True, exist_ok=True)
    names = [f'study_{name}' for name in studies]
    command = [sys.executable, DRAW, *names, '--results', results, '--out', out]
    if subprocess.run(command, check=False).returncode:
        raise StudyError(
            f'not all of {", ".join(names)} could be drawn of {str(results)!r}; the error is above. Name those to draw'
        )


if __name__ == '__main__':
    sys.exit(main())
