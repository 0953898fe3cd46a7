"""Train several small networks at once, each on a CUDA stream of its own and as one CUDA graph a step.

A small network keeps a large GPU busy for a part of the time only. On a CPU the networks train one after the other.
"""

from __future__ import annotations

import copy
import csv
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_model
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

import repvgg_zoo
from experiments.cifar10 import PAD_PX, autocast, crop, load, normalise, pad

MEAN, STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
"""Of the pixels of CIFAR-10's training images, from 0 to 255."""
RESULTS, LOSSES = 'results.csv', 'losses.csv'
COLUMNS = ('network', 'seed', 'epochs', 'train_loss', 'top1_pct', 'folded_top1_pct')
EAGER_STEPS = 3
"""Before the CUDA graph is made, so that cuDNN has chosen its kernels and the optimizer has its state."""
TEST_BATCH_SIZE = 500


class Images:
    """CIFAR-10 as bytes `(N, H, W, 3)` on one device, the training images with their borders reflected."""

    def __init__(self, root: str, test_split: str, count: int | None, device: str) -> None:
        train, self.train_labels = load(root, 'train', count, device)
        self.test, self.test_labels = load(root, test_split, count, device)
        self.px, self.padded = train.shape[1], pad(train)
        self.device = train.device
        self.mean, self.std = (torch.tensor(values, device=device) for values in (MEAN, STD))


@dataclass(frozen=True)
class Job:
    """A network to train."""

    network: str
    seed: int
    create: Callable[[], nn.Module]
    folds: bool
    """Whether it has branches."""
    keeps: bool = False
    """Whether its weights are written."""


@dataclass(frozen=True)
class Recipe:
    """SGD with Nesterov's momentum of 0.9; the learning rate rises for two epochs, then falls linearly to 0."""

    epochs: int
    batch_size: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4


class Training:
    """The training of one network.

    All that changes from step to step is on the device: the order of the images, the learning rate, the losses. So a
    step is always the same, and a CUDA graph can hold it.
    """

    def __init__(self, job: Job, images: Images, recipe: Recipe) -> None:
        self.job, self.images, self.recipe = job, images, recipe
        device = images.device
        torch.manual_seed(job.seed)
        self.model = job.create().to(device, memory_format=torch.channels_last).train()
        self.steps = len(images.padded) // recipe.batch_size
        self.last = recipe.epochs * self.steps
        self.plan = [part.to(device) for part in self._plan()]
        self.in_batch = torch.arange(recipe.batch_size, device=device)
        self.done = torch.zeros((), dtype=torch.long, device=device)
        self.losses = torch.zeros(recipe.epochs, device=device)
        self.lr = torch.zeros((), device=device)
        groups = param_groups_weight_decay(self.model, recipe.weight_decay)
        self.optimizer = torch.optim.SGD(groups, lr=self.lr, momentum=0.9, nesterov=True, fused=True)
        for group in self.optimizer.param_groups:
            group['lr'] = self.lr  # this tensor, not a copy
        self.count, self.graph, self.stream = 0, None, None
        if device.type == 'cuda':
            self.stream = torch.cuda.Stream()
            self.stream.wait_stream(torch.cuda.current_stream())

    def _plan(self) -> tuple[Tensor, ...]:
        """For every image of every epoch: its number, its corner in the padded image, and whether it is mirrored."""
        generator = torch.Generator().manual_seed(self.job.seed)
        count, used = len(self.images.padded), self.steps * self.recipe.batch_size
        order = torch.cat([torch.randperm(count, generator=generator)[:used] for _ in range(self.recipe.epochs)])
        corners = torch.randint(0, 2 * PAD_PX + 1, (2, len(order)), generator=generator, dtype=torch.uint8)
        return order, *corners, torch.rand(len(order), generator=generator) < 0.5

    @property
    def is_over(self) -> bool:
        return self.count == self.last

    def step(self) -> None:
        if self.stream and self.count == EAGER_STEPS:
            self._capture()
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            self.graph.replay() if self.graph else self._step()
        self.count += 1

    def _capture(self) -> None:
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self._step()

    def _step(self) -> None:
        recipe, images = self.recipe, self.images
        warm = min(2 * self.steps, self.last // 2)
        rising, falling = (self.done + 1) / warm, (self.last - self.done) / (self.last - warm)
        self.lr.copy_(recipe.lr * torch.minimum(rising, falling))
        chosen, top, left, mirrored = (part[self.done * recipe.batch_size + self.in_batch] for part in self.plan)
        pixels = crop(images.padded, chosen, top.long(), left.long(), mirrored, images.px)
        self.optimizer.zero_grad(set_to_none=True)  # the backward pass writes new gradients, and adds to none
        with autocast('cuda') if self.stream else nullcontext():
            logits = self.model(normalise(pixels, images.mean, images.std))
        loss = F.cross_entropy(logits.float(), images.train_labels[chosen])
        loss.backward()
        self.optimizer.step()
        self.losses.index_add_(0, (self.done // self.steps).view(1), loss.detach().view(1) / self.steps)
        self.done += 1


def train_all(jobs: Sequence[Job], images: Images, recipe: Recipe, out: Path, *, at_once: int, minutes: float) -> None:
    """Train what has no line in `out/results.csv` yet; begin nothing after the minutes.

    `results.csv` gets a line a network, `losses.csv` the training loss of each epoch, and `weights` the files of the
    jobs that keep theirs.
    """
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    finished = {(row['network'], int(row['seed'])) for row in read(out / RESULTS)}
    waiting = [job for job in jobs if (job.network, job.seed) not in finished]
    running: list[Training] = []
    while waiting or running:
        while waiting and len(running) < at_once and time.monotonic() < end:
            running.append(Training(waiting.pop(0), images, recipe))
        if not running:
            return
        for training in running:
            training.step()
        for training in [training for training in running if training.is_over]:
            running.remove(training)
            record(training, out)


def record(training: Training, out: Path) -> None:
    if training.stream:
        training.stream.synchronize()
    job, model, losses = training.job, training.model, training.losses.tolist()
    top1 = folded_top1 = top1_pct(model, training.images)
    if job.keeps:
        (out / 'weights').mkdir(exist_ok=True)
        save_model(model, str(out / 'weights' / f'{job.network}-{job.seed}.safetensors'))
    if job.folds:
        folded_top1 = top1_pct(repvgg_zoo.switch_to_deploy(copy.deepcopy(model)), training.images)
    epochs = [(job.network, job.seed, epoch, f'{loss:.4f}') for epoch, loss in enumerate(losses)]
    append(out / LOSSES, ('network', 'seed', 'epoch', 'train_loss'), epochs)
    line = (job.network, job.seed, len(losses), f'{losses[-1]:.4f}', f'{top1:.2f}', f'{folded_top1:.2f}')
    append(out / RESULTS, COLUMNS, [line])
    print(*line, flush=True)


@torch.inference_mode()
def top1_pct(model: nn.Module, images: Images) -> float:
    """In float32."""
    model.eval()
    right = 0
    for pixels, labels in zip(
        images.test.split(TEST_BATCH_SIZE), images.test_labels.split(TEST_BATCH_SIZE), strict=True
    ):
        right += int((model(normalise(pixels, images.mean, images.std)).argmax(1) == labels).sum())
    return 100 * right / len(images.test_labels)


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def append(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    is_new = not path.exists()
    with path.open('a', newline='') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerows([columns, *rows] if is_new else rows)
