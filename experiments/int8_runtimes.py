"""The same model in INT8 in OpenVINO, ONNX Runtime and inductor: top-1, and the latency of B1 beside float32.

    python -m experiments.int8_runtimes --data cifar10

`--data` holds the folders `train` and `test`, with a folder of images for each class. Top-1 is of the bundled model on
all test images; B1 has random weights. `inductor, trained` is torchao's quantization-aware training of the exported
graph.
"""

import argparse
import copy
import csv
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

os.environ['TORCHINDUCTOR_FREEZING'] = '1'  # inductor then packs the weights; read when torch is imported

import timm
import torch
import torch.nn.functional as F
from timm.data import create_dataset, create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchao.quantization.pt2e import allow_exported_model_train_eval
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

from repvgg_zoo.quantization.onnx_export import export_onnx
from repvgg_zoo.quantization.ptq import quantize_onnx
from repvgg_zoo.tools.benchmark.measure import time_rounds
from repvgg_zoo.tools.benchmark.runtimes import compile_openvino
from repvgg_zoo.tools.console import no_progress, progress
from repvgg_zoo.tools.markdown import markdown_table
from repvgg_zoo.tools.quantize.images import evenly_spaced

Run = Callable[[Tensor], Tensor]
RESULTS = Path(__file__).with_suffix('.csv')
COLUMNS = ('runtime', 'float32_top1_pct', 'int8_top1_pct', 'b1_float32_ms', 'b1_int8_ms', 'b1_times_as_fast')
CALIBRATION_IMAGES, BATCH = 300, 100
TRAINING_BATCH, LR = 128, 1e-5
"""One epoch of Adam, by labels, without augmentation."""
DYNAMIC_BATCH = ({0: torch.export.Dim('batch')},)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, required=True, help='folder of the images')
    args = parser.parse_args()
    torch.manual_seed(0)
    model = timm.create_model('test_repvgg.cifar10_deploy', pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model))
    train, test = (create_dataset('', root=str(args.data / split), search_split=False) for split in ('train', 'test'))
    train.transform = test.transform = transform
    images = torch.stack([train[index][0] for index in evenly_spaced(len(train), CALIBRATION_IMAGES)])
    with tempfile.TemporaryDirectory() as folder:
        runs = runs_of(model, images, Path(folder))
    runs['inductor, trained'] = (runs['inductor'][0], compiled(trained_by_torchao(model, images, train)))
    top1 = {runtime: [top1_pct(run, test) for run in pair] for runtime, pair in runs.items()}
    b1 = timm.create_model('repvgg_b1', deploy=True).eval()
    with tempfile.TemporaryDirectory() as folder:
        runs = runs_of(b1, torch.randn(4, 3, 224, 224), Path(folder))
    milliseconds = latencies_ms(runs, torch.randn(1, 3, 224, 224))
    rows = []
    for runtime, shares in top1.items():
        times = milliseconds.get(runtime, [])
        ratio = [f'{times[0] / times[1]:.1f}'] if times else ['']
        cells = [f'{value:.2f}' for value in shares] + ([f'{value:.1f}' for value in times] or ['', '']) + ratio
        rows.append((runtime, *cells))
    with RESULTS.open('w', newline='') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerows([COLUMNS, *rows])
    print(markdown_table(rows, COLUMNS, text_columns=COLUMNS[:1]))


def runs_of(model: nn.Module, images: Tensor, folder: Path) -> dict[str, tuple[Run, Run]]:
    """Return functions of float32 and of INT8, by runtime."""
    paths = [folder / f'{name}.onnx' for name in ('float32', 'int8')]
    export_onnx(model, images[:2], paths[0])
    quantize_onnx(paths[0], images.split(1), paths[1], full_range=True)
    return {
        'OpenVINO': (in_openvino(paths[0]), in_openvino(paths[1])),
        'ONNX Runtime': (in_onnxruntime(paths[0]), in_onnxruntime(paths[1])),
        'inductor': (compiled(model), compiled(quantized_by_torchao(model, images))),
    }


def in_openvino(path: Path) -> Run:
    model = compile_openvino(path, 'float32')
    return lambda x: torch.from_numpy(model(x.numpy())[0])


def in_onnxruntime(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    return lambda x: torch.from_numpy(session.run(None, {'x': x.numpy()})[0])


def compiled(model: nn.Module) -> Run:
    fast = torch.compile(model)

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            return fast(x)

    return run


def quantized_by_torchao(model: nn.Module, images: Tensor) -> nn.Module:
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported(model, images), quantizer)
    with torch.no_grad():
        for batch in images.split(BATCH):
            prepared(batch)
    return convert_pt2e(prepared)


def trained_by_torchao(model: nn.Module, images: Tensor, dataset: Iterable[tuple[Tensor, int]]) -> nn.Module:
    config = x86.get_default_x86_inductor_quantization_config(is_qat=True)
    prepared = prepare_qat_pt2e(exported(model, images), x86.X86InductorQuantizer().set_global(config))
    allow_exported_model_train_eval(prepared)
    loader = DataLoader(dataset, batch_size=TRAINING_BATCH, shuffle=True, drop_last=True)
    optimizer = torch.optim.Adam(prepared.parameters(), lr=LR)
    prepared.train()
    with progress() as track:
        for x, labels in track(loader, description='training by torchao'):
            optimizer.zero_grad()
            F.cross_entropy(prepared(x), labels).backward()
            optimizer.step()
    prepared.eval()
    return convert_pt2e(prepared)


def exported(model: nn.Module, images: Tensor) -> nn.Module:
    own = copy.deepcopy(model)  # which a training may change
    return torch.export.export(own, (images[:2],), dynamic_shapes=DYNAMIC_BATCH).module()


def top1_pct(run: Run, dataset: Iterable[tuple[Tensor, int]]) -> float:
    hits = [(run(x).argmax(1) == labels).double().mean() for x, labels in DataLoader(dataset, batch_size=BATCH)]
    return 100 * torch.stack(hits).mean().item()  # batches of one size


def latencies_ms(runs: dict[str, tuple[Run, Run]], x: Tensor) -> dict[str, list[float]]:
    """Time all of them in interleaved rounds."""
    flat = [run for pair in runs.values() for run in pair]
    for run in flat:
        run(x)  # compiles
    seconds = time_rounds([(lambda: x, run) for run in flat], rounds=10, track=no_progress)
    medians = [1e3 * statistics.median(times) for times in seconds]
    return {runtime: medians[2 * index : 2 * index + 2] for index, runtime in enumerate(runs)}


if __name__ == '__main__':
    main()
