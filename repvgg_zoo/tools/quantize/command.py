"""The command line of `repvgg-zoo quantize`."""

from __future__ import annotations

import argparse

from ..console import positive, print_table, progress
from ..devices import add_device_argument
from ..model_arguments import add_model_arguments, model_options
from .quantize import FILES, quantize
from .report import HEADER

__all__ = ['add_arguments', 'main']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `repvgg-zoo quantize`."""
    parser.epilog = (
        'Post-training quantization by NNCF into an ONNX file, for OpenVINO or ONNX Runtime, and with --finetune a '
        "training. Accuracy and latency are measured in OpenVINO. Needs pip install 'repvgg-zoo[quantize]'."
    )
    parser.add_argument('src', metavar='SRC', help='checkpoint file, model folder, or timm model name')
    parser.add_argument('dst', metavar='DST', help=f'folder to write: {", ".join(FILES[:-1])} and {FILES[-1]}')
    parser.add_argument('--images', metavar='FOLDER', required=True, help='images to evaluate on, in a folder a class')
    parser.add_argument(
        '--calibration', metavar='FOLDER', help='images to calibrate on, better of the training set (default: --images)'
    )
    parser.add_argument('--subset', type=int, metavar='N', default=300, help='images to calibrate on (%(default)s)')
    parser.add_argument('--equalize', action='store_true', help='apply cross-layer equalisation first')
    parser.add_argument(
        '--full-range',
        action='store_true',
        help='let weights use all 8 bits, for machines with VNNI or AMX, or ARM; on others ONNX Runtime saturates then',
    )
    parser.add_argument(
        '--keep-float', type=int, metavar='N', default=0, help='leave the N most sensitive layers in float32 (none)'
    )
    parser.add_argument(
        '--finetune', metavar='FOLDER', help='train in INT8 on these images, to answer as the float model does'
    )
    parser.add_argument('--epochs', type=positive, metavar='N', help='of --finetune (3)')
    parser.add_argument('--lr', type=float, metavar='N', help='learning rate of --finetune (1e-4)')
    parser.add_argument(
        '--overwrite',
        action='store_true',
        help='replace DST if an earlier run wrote it as it is',
    )
    add_device_argument(parser, what='it trains, and computes the sensitivity of the layers')
    add_model_arguments(parser, 'SRC')


def main(args: argparse.Namespace) -> int:
    """Run `repvgg-zoo quantize`."""
    training = {name: value for name in ('epochs', 'lr') if (value := getattr(args, name)) is not None}
    if training and args.finetune is None:
        raise ValueError(f'--{" and --".join(training)}: of a training; give its images by --finetune')
    with progress() as track:
        report = quantize(
            args.src,
            args.dst,
            images=args.images,
            calibration=args.calibration,
            subset=args.subset,
            equalize_layers=args.equalize,
            full_range=args.full_range,
            keep_float=args.keep_float,
            finetune_on=args.finetune,
            overwrite=args.overwrite,
            device=args.device,
            track=track,
            **training,
            **model_options(args),
        )
    print_table(HEADER, report.rows())
    print(report.summary)
    if report.advice:
        print(report.advice)
    if report.no_top1:
        print(f'no top-1: {report.no_top1}')
    if report.kept_float:
        print(f'in float32: {", ".join(report.kept_float)}')
    worst = ', '.join(f'{error.layer} {error.rel_error:.1e}' for error in report.sensitivity[:3])
    print(f'most sensitive layers, and the relative error of the logits{report.place}: {worst}')
    print(f'the model and the whole report are in {args.dst}')
    return 0
