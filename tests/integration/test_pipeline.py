"""The calls of timm's train.py and validate.py: data, mixup, optimizer, schedule, average, saver, resume."""

import shutil

import pytest
import timm
import torch
from helpers import images, rel_diff
from timm.data import Mixup, create_dataset, create_loader, resolve_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.models import load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler, accuracy, random_seed

from repvgg_zoo.pretrained.manifest import weights_dir

EPOCHS = 3


def loader(model, split, *, training):
    dataset = create_dataset('', root=str(weights_dir() / 'cifar10' / split), split=split)
    config = resolve_data_config({}, model=model)
    augmentation = dict(re_prob=0.25, re_mode='pixel', color_jitter=0.4, auto_augment='rand-m6-n1') if training else {}
    return create_loader(
        dataset,
        batch_size=64,
        is_training=training,
        use_prefetcher=False,
        num_workers=0,
        persistent_workers=False,
        device=torch.device('cpu'),
        **{key: config[key] for key in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct')},
        **augmentation,
    )


def train(folder, *, until=EPOCHS, resume=None, **model_kwargs):
    """As timm's train.py does it; returns the model and its average."""
    random_seed(0)
    model = timm.create_model('test_repvgg', pretrained=True, drop_path_rate=0.1, **model_kwargs)
    batches = loader(model, 'train', training=True)
    mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=model.num_classes)
    loss_fn = SoftTargetCrossEntropy()
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1e-3, weight_decay=0.05, layer_decay=0.7)
    scaler = NativeScaler(device='cpu')
    start = resume_checkpoint(model, resume, optimizer, scaler, log_info=False) if resume else 0
    average = ModelEmaV3(model, decay=0.9)
    if resume:
        load_checkpoint(average.module, resume, use_ema=True)
    saver = CheckpointSaver(
        model, optimizer, model_ema=average, amp_scaler=scaler, checkpoint_dir=folder, recovery_dir=folder
    )
    scheduler, _ = create_scheduler_v2(
        optimizer, sched='cosine', num_epochs=EPOCHS, warmup_epochs=1, updates_per_epoch=len(batches)
    )
    scheduler.step(start)
    for epoch in range(start, until):
        random_seed(
            epoch
        )  # train.py leaves the generators of a resumed run where they are; here both runs draw the same
        model.train()
        for index, (x, target) in enumerate(batches):
            x, target = mixup(x[: len(x) // 2 * 2], target[: len(x) // 2 * 2])
            # one batch an epoch: without instructions for it, bfloat16 takes ten times as long
            with torch.autocast('cpu', torch.bfloat16, enabled=index == 0):
                loss = loss_fn(model(x), target)
            optimizer.zero_grad()
            scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
            average.update(model)
        scheduler.step(epoch + 1)
        saver.save_checkpoint(epoch, metric=float(epoch))
    return model, average.module


@torch.no_grad()
def top1(model):
    model.eval()
    batches = loader(model, 'validation', training=False)
    hits = [accuracy(model(x), target)[0].item() * len(x) for x, target in batches]
    return sum(hits) / len(batches.dataset)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole')
    return folder, *train(folder)


def test_training_learns_and_switch_keeps_top1(whole):
    _, model, average = whole
    assert top1(average) > 70  # of ten classes, from weights that are at 88
    reached = top1(model)
    assert top1(model.switch_to_deploy()) == pytest.approx(reached, abs=0.2)  # one image of 500 may be on the edge


def test_resumed_training_gives_same_weights(whole, tmp_path):
    folder, *_ = whole
    train(tmp_path, until=1)
    stopped = tmp_path / 'stopped.pth.tar'
    shutil.copy(tmp_path / 'last.pth.tar', stopped)
    resumed = train(tmp_path, resume=str(stopped))
    expected = torch.load(folder / 'last.pth.tar', weights_only=False)
    for found, key in zip(resumed, ('state_dict', 'state_dict_ema'), strict=True):
        for name, value in found.state_dict().items():
            assert torch.equal(value, expected[key][name]), name


def test_training_checkpoint_loads_into_both_forms(whole):
    folder, _, average = whole
    x, file = images(4, px=32), str(folder / 'last.pth.tar')
    expected = average.eval()(x)
    assert torch.equal(timm.create_model('test_repvgg', checkpoint_path=file).eval()(x), expected)
    assert rel_diff(timm.create_model('test_repvgg', deploy=True, checkpoint_path=file).eval()(x), expected) < 1e-4
