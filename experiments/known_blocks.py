"""What `switch_to_deploy` makes of the networks whose blocks fold, beside timm's own `reparameterize_model`.

    python -m experiments.known_blocks

Writes known_blocks.csv and known_blocks.md beside this file, in some minutes. Weights are random, and so are the
statistics of batch normalisation. The detectors of transformers are there if it is installed (`pip install
transformers`); nothing is downloaded.
"""

import argparse
import copy
import csv
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from repvgg_zoo import switch_to_deploy
from repvgg_zoo.tools.markdown import markdown_table

RESULTS = Path(__file__).with_suffix('.csv')
NETWORKS = {
    'mobileone_s0': 64,
    'fastvit_t8': 64,
    'fastvit_mci0': 64,
    'repvit_m0_9': 64,
    'repvit_m1': 64,
    'repghostnet_050': 64,
    'ghostnetv3_050': 64,
    'shvit_s1': 64,
    'nextvit_small': 64,
    'levit_128s': 224,
    'tiny_vit_5m_224': 64,
    'efficientvit_m0': 128,
    'iformer_t': 64,
    'efficientvim_m1': 64,
    'lcnetv2_small': 64,
}
"""One of each family, the smallest, and those of a family whose blocks differ; with a size in pixels."""
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
DETECTOR = dict(d_model=16, decoder_attention_heads=2, decoder_ffn_dim=16, decoder_layers=1, num_queries=5)
DETECTOR |= dict(encoder_attention_heads=2, encoder_ffn_dim=16, encoder_hidden_dim=16)
DETECTOR |= dict(encoder_in_channels=[16, 16, 16], decoder_in_channels=[16, 16, 16])
COLUMNS = {
    'network': 'network',
    'dtype': 'dtype',
    'parameters': 'parameters',
    'parameters_deploy': 'after',
    'norms': 'BN',
    'norms_deploy': 'after',
    'norms_conv_bn': 'with conv_bn',
    'rel_diff': 'difference',
    'rel_diff_conv_bn': 'with conv_bn',
    'timm_norms': "timm's BN",
    'timm_rel_diff': "timm's difference",
}
"""Columns of the CSV file, and what the Markdown table calls them."""


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    warnings.simplefilter('ignore')
    with RESULTS.open('w', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
        writer.writeheader()
        rows = []
        for name, create in networks():
            for dtype in DTYPES:
                rows.append(measure(name, create, dtype))
                writer.writerow(rows[-1])
                print(*rows[-1].values(), flush=True)
    cells = [[str(row[column]) for column in COLUMNS] for row in rows]
    table = markdown_table(cells, list(COLUMNS.values()), text_columns=('network', 'dtype', COLUMNS['timm_rel_diff']))
    RESULTS.with_suffix('.md').write_text(f'{HEAD}\n{environment()}\n\n{table}\n')


HEAD = """# Networks whose blocks fold

Written by [known_blocks.py](known_blocks.py). Differences are those of the outputs before and after, divided by the
largest output, in the dtype of the row; timm's are those of `timm.utils.model.reparameterize_model`. Norms are counted
after `switch_to_deploy(model)` and after `switch_to_deploy(model, conv_bn=True)`.
"""


def environment() -> str:
    cpu = next(line for line in subprocess.check_output(['lscpu'], text=True).splitlines() if 'Model name' in line)  # noqa: S607
    versions = [f'torch {torch.__version__}', f'timm {timm.__version__}']
    try:
        import transformers

        versions.append(f'transformers {transformers.__version__}')
    except ImportError:
        pass
    return f'CPU: {cpu.split(":")[1].strip()}; {", ".join(versions)}.'


def networks() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    for name in NETWORKS:
        yield name, lambda name=name: timm.create_model(name)
    try:
        import transformers
    except ImportError:
        return
    stages = dict(hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], out_features=['stage2', 'stage3', 'stage4'])
    resnet: dict[str, Any] = dict(embedding_size=8, layer_type='basic', **stages)
    for kind in ('RTDetr', 'RTDetrV2'):
        backbone = getattr(transformers, f'{kind}ResNetConfig', transformers.RTDetrResNetConfig)(**resnet)
        config = getattr(transformers, f'{kind}Config')(backbone_config=backbone, **DETECTOR)
        yield f'transformers {kind}', lambda kind=kind, config=config: getattr(transformers, f'{kind}Model')(config)
    backbone = transformers.RTDetrResNetConfig(**resnet)
    config = transformers.DFineConfig(backbone_config=backbone, **DETECTOR)
    yield 'transformers DFine', lambda: transformers.DFineModel(config)


def measure(name: str, create: Callable[[], nn.Module], dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(0)
    model = create()
    px = NETWORKS.get(name, 64)
    x = torch.randn(2, 3, px, px)
    randomise(model, x)
    model, x = model.to(dtype), x[:1].to(dtype)
    before = outputs(model, x)
    deploy = switch_to_deploy(copy.deepcopy(model))
    every = switch_to_deploy(copy.deepcopy(model), conv_bn=True, sample=x)
    their_norms, their_diff = timms(model, x, before) if name in NETWORKS else ('', 'no helper')
    return {
        'network': name,
        'dtype': str(dtype).removeprefix('torch.'),
        'parameters': count_parameters(model),
        'parameters_deploy': count_parameters(deploy),
        'norms': count_norms(model),
        'norms_deploy': count_norms(deploy),
        'norms_conv_bn': count_norms(every),
        'rel_diff': f'{rel_diff(outputs(deploy, x), before):.1e}',
        'rel_diff_conv_bn': f'{rel_diff(outputs(every, x), before):.1e}',
        'timm_norms': their_norms,
        'timm_rel_diff': their_diff,
    }


@torch.no_grad()
def randomise(model: nn.Module, x: Tensor) -> None:
    """Give norms random affine parameters, and the disturbed statistics of a batch."""
    norms = [m for m in model.modules() if hasattr(m, 'running_var')]
    for norm in norms:
        norm.weight.uniform_(0.3, 1.2)
        norm.bias.uniform_(-0.3, 0.3)
        norm.momentum = 1.0
    model.train()(x)
    for norm in norms:
        norm.momentum = 0.1
        norm.running_mean += torch.empty_like(norm.running_mean).uniform_(-0.1, 0.1)
        norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.7, 1.4)
        norm.running_var += 0.1 * norm.running_var.mean()
    model.eval()


def timms(model: nn.Module, x: Tensor, before: Tensor) -> tuple[str, str]:
    """Count norms and measure the difference of timm's own helper; or tell how it fails."""
    dtype = x.dtype
    try:
        theirs = reparameterize_model(model)
        norms = str(count_norms(theirs))
        others = sum(p.dtype != dtype for p in theirs.parameters())
        note = f', {others} parameters of another dtype' if others else ''
        return norms, f'{rel_diff(outputs(theirs, x), before):.1e}{note}'
    except (RuntimeError, TypeError) as error:
        return norms, f'{type(error).__name__}: {error}{note}'


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    result = model(x)
    if not isinstance(result, Tensor):  # a detector chooses queries behind its encoder, and rounding changes that
        result = torch.cat([level.flatten() for level in result.encoder_last_hidden_state])
    return result.double()


def rel_diff(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def count_norms(model: nn.Module) -> int:
    return sum(hasattr(m, 'running_var') for m in model.modules())


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


if __name__ == '__main__':
    main()
