"""The command line: one verb per room, no logic."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ['main']

_RUNTIMES = (
    'eager',
    'compile',
    'compile-freezing',
    'torchscript',
    'onnxruntime',
    'openvino',
    'ncnn',
    'ncnn-no-winograd',
)
"""Of `benchmark.RUNTIMES`, which is not imported to parse other verbs' arguments."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        return args.verb(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except args.errors as error:
        _complain(error)
        return 1


def _complain(error: Exception) -> None:
    message = ' '.join(str(error).split()) or type(error).__name__
    print(f'repvgg-zoo: {message}', file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    from .. import __version__

    parser = argparse.ArgumentParser(
        prog='repvgg-zoo',
        description='RepVGG models for timm, in the training and the deploy form.',
        epilog='`repvgg-zoo VERB --help` tells more about a verb.',
    )
    parser.add_argument('--version', action='version', version=f'repvgg-zoo {__version__}')
    verbs = parser.add_subparsers(metavar='VERB', required=True)

    def add(verb: Any, name: str, summary: str, description: str = '') -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=summary, description=f'{summary[0].upper()}{summary[1:]}. {description}')
        sub.set_defaults(verb=verb, errors=(RuntimeError, ValueError, OSError, ModuleNotFoundError))
        return sub

    sub = add(_list, 'list', 'list the variants, their sizes, published accuracy and weights')
    sub.add_argument('--markdown', action='store_true', help='print the table as Markdown, without the last columns')

    sub = add(
        _demo,
        'demo',
        'evaluate, fine-tune, fold and evaluate again on bundled images',
        'Needs no network and less than a minute.',
    )
    sub.add_argument('--out', default='repvgg-demo', help='folder for both forms of the model (%(default)s)')
    sub.add_argument('--overwrite', action='store_true', help='replace that folder if it exists')

    sub = add(
        _convert,
        'convert',
        'write a checkpoint of any layout and form as a model folder',
        "timm.create_model('local-dir:DST', pretrained=True) then builds the model.",
    )
    sub.add_argument('src', metavar='SRC', help='checkpoint file, model folder, or timm model name')
    sub.add_argument('dst', metavar='DST', help='folder to write: model.safetensors and config.json')
    sub.add_argument('--form', choices=('training', 'deploy'), help='form to write (that of SRC)')
    sub.add_argument('--variant', help='variant of SRC, where its shapes do not tell')
    sub.add_argument('--block', help='training-time block of a bare SRC (told by its keys), or to unfold to (repvgg)')
    sub.add_argument('--unfold', action='store_true', help='make branches that compute the same from a deploy form')
    sub.add_argument('--no-ema', action='store_true', help='take the plain weights where SRC holds an average too')
    sub.add_argument('--overwrite', action='store_true', help='replace DST if it exists')

    sub = add(
        _quantize,
        'quantize',
        'write the deploy form in INT8, and report what it costs and gains',
        'Post-training quantization by NNCF into an ONNX file, for OpenVINO or ONNX Runtime; accuracy and latency are '
        "measured in OpenVINO. Needs pip install 'repvgg-zoo[quantize]'.",
    )
    sub.add_argument('src', metavar='SRC', help='checkpoint file, model folder, or timm model name')
    sub.add_argument('dst', metavar='DST', help='folder to write: model.onnx, report.json and report.md')
    sub.add_argument('--images', metavar='FOLDER', required=True, help='images to evaluate on, in a folder a class')
    sub.add_argument(
        '--calibration', metavar='FOLDER', help='images to calibrate on, better of the training set (images)'
    )
    sub.add_argument('--subset', type=int, metavar='N', default=300, help='images to calibrate on (%(default)s)')
    sub.add_argument('--equalize', action='store_true', help='cross-layer equalisation first')
    sub.add_argument('--variant', help='variant of SRC, where its shapes do not tell')
    sub.add_argument('--block', help='training-time block of a bare checkpoint file (told by its keys)')
    sub.add_argument('--overwrite', action='store_true', help='replace DST if it exists')

    sub = add(
        _verify,
        'verify',
        'tell whether two checkpoints, or the two forms of one, compute the same function',
        'Exits with 0 if all top classes agree and the logits differ by no more than float32 rounding explains '
        '(1e-3 of the largest), with 1 otherwise.',
    )
    sub.add_argument('a', metavar='A', help='checkpoint file, model folder, or timm model name')
    sub.add_argument('b', metavar='B', nargs='?', help='another one; by default the fold of A')
    sub.add_argument('--variant', help='variant of A, where its shapes do not tell')
    sub.add_argument('--block', help='training-time block of A, if that is a bare file (told by its keys)')
    sub.add_argument('--images', metavar='FOLDER', help='real images to compare on (random ones)')

    sub = add(
        _publish,
        'publish',
        'write both forms of a checkpoint as model folders, and upload them to the Hub',
        'The forms are compared before anything is written. Without --push nothing is uploaded. A run that was stopped '
        'can be started again: what is on the Hub already is not uploaded twice.',
    )
    which = sub.add_mutually_exclusive_group(required=True)
    which.add_argument('name', metavar='ARCH.TAG', nargs='?', help='name of the training weights')
    which.add_argument('--all', action='store_true', help='all weights whose source the manifest knows')
    sub.add_argument(
        '--from',
        dest='source',
        metavar='SRC',
        help='checkpoint file of any layout, model folder, or Hub repository, with the weights that the manifest '
        'describes (what the manifest names)',
    )
    sub.add_argument('--owner', required=True, help='Hub account to publish under')
    sub.add_argument('--out', metavar='DIR', help='folder for the model folders (OWNER)')
    sub.add_argument('--push', action='store_true', help='upload, and write into the manifest where the weights are')
    sub.add_argument('--replace', action='store_true', help='replace folders and repositories that hold other files')
    sub.add_argument('--verify-images', metavar='FOLDER', help='real images to compare the forms on (random ones)')

    sub = add(
        _reproduce,
        'reproduce',
        'print the commands that reproduce the published accuracy, with the figure to expect',
    )
    sub.add_argument('--imagenet', metavar='FOLDER', default='imagenet', help='ImageNet-1k, as an image folder')
    sub.add_argument('--cifar10', metavar='FOLDER', default='cifar10', help='CIFAR-10, as an image folder')

    sub = add(
        _benchmark,
        'benchmark',
        'measure speed and memory beside rivals, on this machine',
        'Everything is timed in interleaved rounds in one process. Models are those of the zoo, timm:NAME or '
        'torchvision:NAME; the default are the models of the paper and of its related work.',
    )
    sub.add_argument('models', metavar='MODEL', nargs='*', help='models to measure (those of the paper)')
    sub.add_argument('--quick', action='store_true', help='some models, five runtimes, few rounds: three minutes')
    sub.add_argument('--work', nargs='+', choices=('infer', 'train', 'load', 'fold'), default=['infer'])
    sub.add_argument('--forms', nargs='+', choices=('training', 'deploy'), default=['training', 'deploy'])
    sub.add_argument('--runtimes', nargs='+', choices=_RUNTIMES, help='(eager)')
    sub.add_argument('--batch-sizes', nargs='+', type=_positive, metavar='N', default=[1])
    sub.add_argument('--dtypes', nargs='+', choices=('float32', 'bfloat16'), default=['float32'])
    sub.add_argument('--layouts', nargs='+', choices=('contiguous', 'channels_last'), default=['contiguous'])
    sub.add_argument(
        '--rival',
        default='timm',
        metavar='MODEL',
        help="what ratios compare with, in eager PyTorch (timm's own RepVGG)",
    )
    sub.add_argument('--rounds', type=_positive, metavar='N', help='turns of each case (10)')
    sub.add_argument('--threads', type=_positive, metavar='N', help='threads of every runtime (what PyTorch takes)')
    sub.add_argument('--no-memory', action='store_true', help='skip the peak memory, which takes a process a case')
    sub.add_argument('--out', default='repvgg-benchmark', help='folder for tables and plots (%(default)s)')
    sub.add_argument('--overwrite', action='store_true', help='replace that folder if it exists')

    sub = add(
        _run,
        'run',
        'run a script, module or console script with the zoo registered in timm',
        'Everything behind the name is passed on.',
    )
    sub.add_argument('target', metavar='SCRIPT_OR_MODULE')
    sub.add_argument('args', metavar='ARGS', nargs=argparse.REMAINDER)
    from .launch import LaunchError

    sub.set_defaults(errors=LaunchError)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f'{text!r} is no number from 1 on')
    return int(text)


def _list(args: argparse.Namespace) -> int:
    from .listing import HEADER, LEGEND, markdown_table, variant_rows

    rows = list(variant_rows())
    if args.markdown:
        print(markdown_table([row[:-2] for row in rows], HEADER[:-2]))  # where the weights are, changes
    else:
        _print_table(HEADER, rows)
        print(LEGEND)
    return 0


def _demo(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from .demo import run_demo

    with Progress(console=Console(stderr=True)) as progress:
        rows = run_demo(args.out, track=progress.track, overwrite=args.overwrite)
    _print_table(
        ('form', 'parameters', 'latency_ms\nper image', 'top1_pct', 'largest logit\ndifference'),
        [
            (
                row.form,
                f'{row.params:,}',
                f'{row.latency_ms:.2f}',
                f'{row.top1_pct:.1f}',
                '' if row.max_logit_diff is None else f'{row.max_logit_diff:.1e}',
            )
            for row in rows
        ],
    )
    print(f'both forms of the fine-tuned model are in {args.out}')
    return 0


def _convert(args: argparse.Namespace) -> int:
    from .convert import convert

    model = convert(
        args.src,
        args.dst,
        form=args.form,
        variant=args.variant,
        block=args.block,
        unfold=args.unfold,
        use_ema=not args.no_ema,
        overwrite=args.overwrite,
    )
    form = 'deploy' if model.deploy else 'training'
    print(f'wrote {model.variant.name}, {form} form, {model.num_classes} classes, to {args.dst}')
    return 0


def _quantize(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from .quantize import REPORT_HEADER, quantize

    with Progress(console=Console(stderr=True), transient=True) as progress:
        report = quantize(
            args.src,
            args.dst,
            images=args.images,
            calibration=args.calibration,
            subset=args.subset,
            equalize_layers=args.equalize,
            variant=args.variant,
            block=args.block,
            overwrite=args.overwrite,
            track=progress.track,
        )
    _print_table(REPORT_HEADER, report.rows())
    print(report.summary)
    if report.no_top1:
        print(f'no top-1: {report.no_top1}')
    worst = ', '.join(f'{error.layer} {error.rel_error:.1e}' for error in report.sensitivity[:3])
    print(f'most sensitive layers, and the relative error of the logits: {worst}')
    print(f'the model and the whole report are in {args.dst}')
    return 0


def _verify(args: argparse.Namespace) -> int:
    from .verify import verify

    results = verify(args.a, args.b, images=args.images, variant=args.variant, block=args.block)
    _print_table(
        ('computed in', 'images', 'largest\ndifference', 'relative to the\nlargest logit', 'same top class'),
        [
            (
                dtype,
                str(result.images),
                f'{result.max_abs_diff:.2e}',
                f'{result.max_rel_diff:.2e}',
                f'{result.top1_agreement_pct:.2f} %',
            )
            for dtype, result in results.items()
        ],
    )
    same = all(result.same for result in results.values())
    print('the same function' if same else 'NOT the same function')
    return 0 if same else 1


def _publish(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from .publish.publish import names_to_publish, publish

    if args.all and args.source:
        raise ValueError('--all takes every source from the manifest, so it goes without --from')
    failed = 0
    for name in names_to_publish(args.owner) if args.all else [args.name]:
        try:
            with Progress(console=Console(stderr=True), transient=True) as progress:
                done = publish(
                    name,
                    args.source,
                    owner=args.owner,
                    out=args.out,
                    push=args.push,
                    replace_existing=args.replace,
                    images=args.verify_images,
                    track=progress.track,
                )
        except args.errors as error:
            if not args.all:
                raise
            failed += 1
            _complain(error)
            continue
        for item in done:
            verb = 'published' if args.push else 'would publish'
            print(f'{item.folder}: {item.record.size_bytes / 1e6:.1f} MB, {verb} as {item.record.hub_id}')
        check = done[0].record.fold_check
        print(f'the forms differ by {check.float64_rel_diff:.1e} in float64, {check.float32_rel_diff:.1e} in float32')
    return int(failed > 0)


def _reproduce(args: argparse.Namespace) -> int:
    from .listing import reproduction_lines

    print('\n'.join(reproduction_lines(imagenet=args.imagenet, cifar10=args.cifar10)))
    return 0


def _benchmark(args: argparse.Namespace) -> int:
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from . import benchmark
    from .atomic import new_folder

    defaults = benchmark.QUICK if args.quick else benchmark.FULL
    if args.threads:
        torch.set_num_threads(args.threads)
    cases = benchmark.plan(
        args.models or defaults.models,
        forms=args.forms,
        work=args.work,
        runtimes=args.runtimes or defaults.runtimes,
        batches=args.batch_sizes,
        dtypes=args.dtypes,
        layouts=args.layouts,
    )
    with new_folder(args.out, overwrite=args.overwrite) as folder:
        with Progress(console=Console(stderr=True)) as progress:
            results = benchmark.run_benchmark(
                cases,
                rival=args.rival,
                rounds=args.rounds or defaults.rounds,
                memory=defaults.memory and not args.no_memory,
                track=progress.track,
            )
        if not results.rows:
            raise RuntimeError(f'nothing could be measured: {"; ".join(results.skipped)}')
        left_out = benchmark.write_results(results, folder)
    _print_table(*results.table())
    for line in (results.constants(), *results.skipped, *left_out, f'tables and plots are in {args.out}'):
        print(line)
    return 0


def _run(args: argparse.Namespace) -> int:
    import repvgg_zoo  # noqa: F401  registers the zoo

    from .launch import run

    run(args.target, args.args)
    return 0


def _print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.console import Console

    console, table = Console(), _table(header, rows)
    console.width = max(console.width, Console(width=1000).measure(table).maximum)  # a cell is never cut
    console.print(table)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for index, title in enumerate(header):
        table.add_column(title, justify='right' if index else 'left', no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
