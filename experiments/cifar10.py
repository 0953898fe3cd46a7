"""Train a network on CIFAR-10, with all images in the memory of the device.

    python -m experiments.cifar10 --data cifar10 --out runs/tiny --epochs 200 --device cuda

`--data` holds the folders `train` and `test`, with a folder of images for each class. Crops of images padded by four
pixels, and flips; SGD, whose learning rate rises and falls linearly; label smoothing; an average of the weights;
bfloat16 autocast; `torch.compile`. `--out` gets `log.csv`, a line an epoch, and at the end `model.safetensors`, the
averaged weights. A run that was stopped goes on where it was, with the same settings; its file of the state is removed
at the end.
"""

import argparse
import csv
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_model
from timm.data import create_dataset
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, ParseKwargs
from torch import Tensor, nn
from torch.utils.data import Subset

import repvgg_zoo  # noqa: F401  registers its models
from repvgg_zoo.tools.console import positive
from repvgg_zoo.tools.devices import add_device_argument

PAD_PX = 4
COLUMNS = ('epoch', 'lr', 'train_loss', 'top1_pct', 'seconds')
MAY_CHANGE = ('out', 'device', 'eager')
"""Arguments that need not be those of the run that goes on."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', required=True, help='folder of the images')
    parser.add_argument('--val-split', default='test', help='name of the folder of the test images (%(default)s)')
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--model', default='test_repvgg')
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs)
    parser.add_argument('--epochs', type=positive, default=200)
    parser.add_argument(
        '--minutes', type=float, default=float('inf'), help='end by then; the learning rate falls faster'
    )
    parser.add_argument('--batch-size', type=positive, default=128)
    parser.add_argument('--lr', type=float, default=0.1)
    parser.add_argument('--weight-decay', type=float, default=5e-4)
    parser.add_argument('--ema-decay', type=float, default=0.999)
    parser.add_argument('--smoothing', type=float, default=0.1)
    parser.add_argument('--seed', type=int, default=0)
    add_device_argument(parser, what='it trains')
    parser.add_argument('--images', type=positive, help='train and test on that many images only')
    parser.add_argument('--eager', action='store_true', help='do not compile')
    args = parser.parse_args()

    if not args.minutes > 0:
        parser.error(f'argument --minutes: {args.minutes} is not above 0')
    for split in ('train', args.val_split):
        if not Path(args.data, split).is_dir():
            parser.error(f'{args.data!r} has no folder {split!r}')
    state_file, log, finished = (args.out / name for name in ('state.pt', 'log.csv', 'model.safetensors'))
    if finished.exists():
        parser.error(f'{str(finished)!r} is the result of a finished run; choose another --out')
    settings = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
    settings['data'] = str(Path(args.data).resolve())
    state = None
    if state_file.exists():
        state = torch.load(state_file, map_location=args.device, weights_only=True)
        if changed := changes(as_options(state.get('settings', {})), as_options(settings)):
            parser.error(f'{str(state_file)!r} is of a run with other settings: {changed}; choose another --out')
    torch.manual_seed(args.seed)
    train_images, train_labels = load(args.data, 'train', args.images, args.device)
    test_images, test_labels = load(args.data, args.val_split, args.images, args.device)
    steps = len(train_labels) // args.batch_size
    if steps == 0:
        parser.error(f'{len(train_labels)} training images make no batch of {args.batch_size}')
    model = timm.create_model(args.model, num_classes=10, **args.model_kwargs).to(args.device)
    print(f'{len(train_labels)} training images, {len(test_labels)} test images', flush=True)
    padded, px = pad(train_images), train_images.shape[1]
    mean, std = (255 * torch.tensor(model.pretrained_cfg[key], device=args.device) for key in ('mean', 'std'))
    ema = ModelEmaV3(model, decay=args.ema_decay)
    optimizer = create_optimizer_v2(model, 'sgd', lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
    args.out.mkdir(parents=True, exist_ok=True)
    begun, begin = 0, time.perf_counter()
    if state:
        model.load_state_dict(state['model'])
        ema.module.load_state_dict(state['ema'])
        optimizer.load_state_dict(state['optimizer'])
        begun, begin = state['epochs'], begin - state['seconds']
        log.write_text(''.join(log.read_text().splitlines(keepends=True)[: 1 + begun]))
    else:
        log.write_text(','.join(COLUMNS) + '\n')
    model.to(memory_format=torch.channels_last)
    if not args.eager:
        model.compile(mode='reduce-overhead' if args.device.startswith('cuda') else None)

    last, warm, part = args.epochs * steps, 2 * steps, 0.0
    for epoch in range(begun, args.epochs):
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(1000 * args.seed + epoch)
        order = torch.randperm(len(train_labels), generator=generator)
        corners = torch.randint(0, 2 * PAD_PX + 1, (2, len(order)), generator=generator)
        flipped = torch.rand(len(order), generator=generator) < 0.5
        batches = [t.to(args.device).split(args.batch_size) for t in (order, *corners, flipped)]
        model.train()
        total = torch.zeros((), device=args.device)
        for step, (chosen, top, left, flip) in zip(range(steps), zip(*batches, strict=True), strict=False):
            done = epoch * steps + step
            part = max(done / last, (time.perf_counter() - begin) / (60 * args.minutes))
            lr = args.lr * max(0.0, min((done + 1) / warm, (1 - part) / (1 - min(warm, last - 1) / last)))
            for group in optimizer.param_groups:
                group['lr'] = lr
            x = normalise(crop(padded, chosen, top, left, flip, px), mean, std)
            with autocast(args.device):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), train_labels[chosen], label_smoothing=args.smoothing)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update(model)
            total += loss.detach()
        is_over = part >= 1 or epoch == args.epochs - 1
        tested, score = epoch % 5 == 4 or is_over, ''
        if tested:
            score = f'{top1_pct(ema.module, normalise(test_images, mean, std), test_labels):.2f}'
        if tested or args.device == 'cpu':
            states = {'model': model.state_dict(), 'ema': ema.module.state_dict(), 'optimizer': optimizer.state_dict()}
            seconds = time.perf_counter() - begin
            save_state(state_file, states | {'epochs': epoch + 1, 'seconds': seconds, 'settings': settings})
        seconds = time.perf_counter() - start
        with log.open('a') as file:
            csv.writer(file, lineterminator='\n').writerow(
                (epoch, f'{lr:.5f}', f'{total.item() / steps:.4f}', score, f'{seconds:.1f}')
            )
        print(log.read_text().splitlines()[-1], flush=True)
        if is_over:
            break
    save_model(ema.module, str(finished))
    state_file.unlink(missing_ok=True)


def load(root: str, split: str, count: int | None, device: str) -> tuple[Tensor, Tensor]:
    """Images `(N, H, W, 3)` as bytes, and their classes."""
    samples = create_dataset('', root=str(Path(root) / split))
    if count is not None:
        samples = Subset(samples, torch.linspace(0, len(samples) - 1, count).long().tolist())
    with ThreadPoolExecutor() as threads:  # no processes: a fork is not safe where a runtime has threads of its own
        images, labels = zip(*threads.map(samples.__getitem__, range(len(samples))), strict=True)
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return pixels.to(device), torch.tensor(labels, device=device)


def pad(images: Tensor) -> Tensor:
    """Reflect the borders of `(N, H, W, 3)`."""
    chw = images.permute(0, 3, 1, 2).float()
    return F.pad(chw, (PAD_PX,) * 4, mode='reflect').to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def crop(padded: Tensor, chosen: Tensor, top: Tensor, left: Tensor, flip: Tensor, px: int) -> Tensor:
    """Cut `(B, px, px, 3)` out of padded images, each at its own corner and some of them mirrored."""
    pixels = torch.arange(px, device=padded.device)
    rows = top[:, None] + pixels
    columns = left[:, None] + torch.where(flip[:, None], px - 1 - pixels, pixels)
    return padded[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """`(B, 3, H, W)` in channels_last from bytes `(B, H, W, 3)`."""
    return ((images - mean) / std).permute(0, 3, 1, 2)


def autocast(device: str) -> torch.autocast:
    return torch.autocast(torch.device(device).type, torch.bfloat16)


@torch.no_grad()
def top1_pct(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    right = torch.zeros((), device=images.device)
    with autocast(str(images.device)):
        for x, y in zip(images.split(500), labels.split(500), strict=True):
            right += (model(x).argmax(1) == y).sum()
    return 100 * right.item() / len(labels)


def as_options(settings: dict[str, Any]) -> dict[str, Any]:
    return {f'--{name.replace("_", "-")}': value for name, value in settings.items()}


def changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Tell which settings have other values than before."""
    pairs = {name: (before.get(name), value) for name, value in now.items() if before.get(name) != value}
    return ', '.join(f'{name} was {old} and is {new}' for name, (old, new) in pairs.items())


def save_state(path: Path, state: dict[str, Any]) -> None:
    unfinished = path.with_suffix('.unfinished')
    torch.save(state, unfinished)
    unfinished.replace(path)


if __name__ == '__main__':
    main()
