"""The training of one small network on CIFAR-10, in which every step is the same."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

import repvgg_zoo
from experiments.cifar10 import PAD_PX, autocast, crop, load, normalise, pad
from experiments.errors import StudyError

MEAN, STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
"""Of the pixels of CIFAR-10's training images, from 0 to 255."""
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


def image_settings(root: str, test_split: str, count: int | None) -> dict[str, Any]:
    """Tell what results hang on, of the arguments of `Images`."""
    sizes = [sum(1 for _ in Path(root, split).glob('*/*')) for split in ('train', test_split)]
    train, test = (size if count is None else min(count, size) for size in sizes)
    return {'train_images': train, 'test_split': test_split, 'test_images': test}


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
    max_norm: float | None = None
    """Largest norm of the weights of an output channel."""
    decays_all: bool = False
    """Whether norms and biases decay too."""


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
        if not self.steps:
            raise StudyError(f'{len(images.padded)} images make no batch of {recipe.batch_size}')
        self.last = recipe.epochs * self.steps
        self.plan = [part.to(device) for part in self._plan()]
        self.in_batch = torch.arange(recipe.batch_size, device=device)
        self.done = torch.zeros((), dtype=torch.long, device=device)
        self.losses = torch.zeros(recipe.epochs, device=device)
        self.lr = torch.zeros((), device=device)
        groups = param_groups_weight_decay(self.model, recipe.weight_decay)
        if job.decays_all:
            groups = [dict(params=list(self.model.parameters()), weight_decay=recipe.weight_decay)]
        self.optimizer = torch.optim.SGD(groups, lr=self.lr, momentum=0.9, nesterov=True, fused=True)
        for group in self.optimizer.param_groups:
            group['lr'] = self.lr  # this tensor, not a copy
        if job.max_norm is not None:
            repvgg_zoo.max_norm(self.optimizer, self.model, job.max_norm)
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

    def state(self) -> dict[str, Any]:
        """What `resume` takes. It says nothing of the job and the recipe."""
        parts = {'model': self.model.state_dict(), 'optimizer': self.optimizer.state_dict()}
        return parts | {'count': self.count, 'losses': self.losses}

    def resume(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state['model'])
        self.optimizer.load_state_dict(state['optimizer'])
        for group in self.optimizer.param_groups:
            group['lr'] = self.lr
        self.count = state['count']
        self.done.fill_(self.count)
        self.losses.copy_(state['losses'])

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
        with autocast(str(images.device)):
            logits = self.model(normalise(pixels, images.mean, images.std))
        loss = F.cross_entropy(logits.float(), images.train_labels[chosen])
        loss.backward()
        self.optimizer.step()
        self.losses.index_add_(0, (self.done // self.steps).view(1), loss.detach().view(1) / self.steps)
        self.done += 1


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
