"""Train the networks of a study: those without a line in its results.

A small network keeps a large GPU busy for a part of the time only, so several train at once there, each on a CUDA
stream of its own and as one CUDA graph a step. On a CPU each trains in a process of its own, and a training that was
stopped goes on after its last whole epoch.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import nn

import repvgg_zoo
from experiments.cifar10 import save_state
from experiments.errors import StudyError
from experiments.records import RESULTS, append, read, settle, values
from experiments.training import Images, Job, Recipe, Training, image_settings, top1_pct

LOSSES, WEIGHTS, UNFINISHED = 'losses.csv', 'weights', 'unfinished'
COLUMNS = ('network', 'seed', 'epochs', 'train_loss', 'top1_pct', 'folded_top1_pct')


@dataclass(frozen=True)
class Pool:
    """Where, on what and for how long the networks train."""

    images: tuple[str, str, int | None, str]
    """Arguments of `Images`."""
    recipe: Recipe
    out: Path
    """Gets `results.csv` with a line a network, `losses.csv` with the training loss of each epoch, and `weights` with
    the files of the jobs that keep theirs."""
    at_once: int = 1
    end: float = float('inf')
    """Begin no network after that, in seconds since 1970."""

    def train(self, jobs: Sequence[Job]) -> None:
        """Train what has no line in `results.csv`.

        Raises:
            StudyError: The folder has results of another recipe or other images.
        """
        settle(self.out, asdict(self.recipe) | image_settings(*self.images[:3]))
        done = self.done(jobs)
        waiting = [job for job in jobs if job not in done]
        if not waiting:
            return
        if torch.device(self.images[-1]).type == 'cuda':
            self._train_together(waiting)
        elif self.at_once == 1:
            images = Images(*self.images)
            for job in waiting:
                self._train_alone(job, images)
        else:
            context = multiprocessing.get_context('spawn')
            with ProcessPoolExecutor(self.at_once, context, self._begin_process) as processes:
                list(processes.map(self._train_in_process, waiting))

    def done(self, jobs: Sequence[Job]) -> list[Job]:
        """Return those that have a line."""
        finished = {(row['network'], int(row['seed'])) for row in read(self.out / RESULTS)}
        return [job for job in jobs if (job.network, job.seed) in finished]

    def _train_together(self, waiting: list[Job]) -> None:
        images, running = Images(*self.images), []
        while waiting or running:
            while waiting and len(running) < self.at_once and time.time() < self.end:
                running.append(Training(waiting.pop(0), images, self.recipe))
            if not running:
                return
            for training in running:
                training.step()
            for training in [training for training in running if training.is_over]:
                running.remove(training)
                record(training, self.out)

    def _begin_process(self) -> None:
        global _images
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // self.at_once))
        _images = Images(*self.images)

    def _train_in_process(self, job: Job) -> None:
        self._train_alone(job, _images)

    def _train_alone(self, job: Job, images: Images) -> None:
        if time.time() > self.end:
            return
        training = Training(job, images, self.recipe)
        file = self.out / UNFINISHED / f'{job.network}-{job.seed}.pt'
        file.parent.mkdir(exist_ok=True)
        if file.exists():
            training.resume(torch.load(file, weights_only=True))
        while not training.is_over:
            training.step()
            if training.count % training.steps == 0:
                save_state(file, training.state())
        record(training, self.out)
        file.unlink()


_images: Images
"""Of a process of `Pool`."""


def record(training: Training, out: Path) -> None:
    if training.stream:
        training.stream.synchronize()
    job, model, losses = training.job, training.model, training.losses.tolist()
    top1 = folded_top1 = top1_pct(model, training.images)
    if job.keeps:
        (out / WEIGHTS).mkdir(exist_ok=True)
        save_model(model, str(weights_file(job, out)))
    if job.folds:
        folded_top1 = top1_pct(repvgg_zoo.switch_to_deploy(copy.deepcopy(model)), training.images)
    wanted = dict(network=job.network, seed=str(job.seed))
    if not values(read(out / LOSSES), 'train_loss', **wanted):  # a run that was stopped here has written them
        epochs = [(*wanted.values(), epoch, f'{loss:.4f}') for epoch, loss in enumerate(losses)]
        append(out / LOSSES, ('network', 'seed', 'epoch', 'train_loss'), epochs)
    line = (job.network, job.seed, len(losses), f'{losses[-1]:.4f}', f'{top1:.2f}', f'{folded_top1:.2f}')
    append(out / RESULTS, COLUMNS, [line])
    print(*line, flush=True)


def weights_file(job: Job, out: Path) -> Path:
    return out / WEIGHTS / f'{job.network}-{job.seed}.safetensors'


def trained(job: Job, out: Path) -> nn.Module:
    """Return the network of a job that kept its weights, in eval mode.

    Raises:
        StudyError: The folder has its line of results and no weights, as committed results have none.
    """
    file = weights_file(job, out)
    if not file.exists():
        raise StudyError(f'{str(out)!r} has a result of {job.network} and not {file.name}; train in another --out')
    network = job.create()
    load_model(network, str(file))
    return network.eval()
