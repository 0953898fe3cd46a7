"""Files as trainers write them. Those of heavy libraries are built by hand, as a version of them wrote them."""

import argparse
import copy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import LAYOUTS, images, randomise, rel_diff, rename
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn

from repvgg_zoo import CheckpointError, load_checkpoint

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope='module')
def average():
    return randomise(timm.create_model('test_repvgg'), px=32)


@pytest.fixture(scope='module')
def plain():
    return randomise(timm.create_model('test_repvgg'), seed=1, px=32)


def check(path, expected, **options):
    """Load a file in both forms, and compare the outputs with those of a model."""
    for deploy in (False, True):
        loaded = load_checkpoint(timm.create_model('test_repvgg', deploy=deploy), path, **options).eval()
        assert rel_diff(loaded(X), expected(X)) < 1e-5  # float32


def under(prefix, module):
    return {prefix + key: value for key, value in module.state_dict().items()}


# ------------------------------------------------------------------------- written by the libraries themselves


def test_load_timm_training_script(average, plain, tmp_path):
    args = argparse.Namespace(model='test_repvgg', data_dir=Path('data'))
    saver = CheckpointSaver(
        copy.deepcopy(plain),
        torch.optim.SGD(plain.parameters(), lr=0.1),
        args=args,
        model_ema=ModelEmaV3(average),
        checkpoint_dir=str(tmp_path),
    )
    saver.save_checkpoint(0, metric=np.float64(90))
    check(tmp_path / 'last.pth.tar', average)
    check(tmp_path / 'last.pth.tar', plain, use_ema=False)


@pytest.mark.parametrize('container', [None, 'model', 'ema'])
def test_load_averaged_model(average, container, tmp_path):
    weights = torch.optim.swa_utils.AveragedModel(average).state_dict()
    assert 'n_averaged' in weights
    torch.save({container: weights} if container else weights, tmp_path / 'x.pth')
    check(tmp_path / 'x.pth', average)


@pytest.mark.parametrize('ema', [False, True])
def test_load_lightning(average, ema, tmp_path):
    lightning = pytest.importorskip('lightning')
    from lightning.pytorch.callbacks import WeightAveraging

    class Classifier(lightning.LightningModule):
        def __init__(self, root=Path('data'), args=None, rate=None, loss=None):
            super().__init__()
            self.save_hyperparameters()
            self.model = copy.deepcopy(average)
            self.loss = loss

        def training_step(self, batch):
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1], self.loss and self.loss.weight)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    data = torch.utils.data.TensorDataset(images(4, px=32), torch.arange(4))
    module = Classifier(
        rate=np.float64(0.1), args=argparse.Namespace(lr=1), loss=None if ema else nn.CrossEntropyLoss(torch.ones(10))
    )
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator='cpu',
        logger=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
        callbacks=[lightning.pytorch.callbacks.ModelCheckpoint(tmp_path), *([WeightAveraging()] if ema else [])],
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2))
    (path,) = tmp_path.glob('*.ckpt')
    saved = torch.load(path, weights_only=False)
    expected = copy.deepcopy(average)
    for name, options in (('state_dict', {}), ('current_model_state', dict(use_ema=False)))[: 1 + ema]:
        expected.load_state_dict({k[6:]: v for k, v in saved[name].items() if k.startswith('model.')})
        check(path, expected, **options, **({} if ema else dict(prefix='model.')))


# ----------------------------------------------------------------------------------------------- built by hand


def test_load_official_training_checkpoint(average, plain, tmp_path):
    official = [rename(m.state_dict(), LAYOUTS['official']) for m in (plain, average)]
    torch.save(
        {'model': official[0], 'ema': official[1], 'epoch': 3, 'max_accuracy': np.float64(1)}, tmp_path / 'x.pth'
    )
    check(tmp_path / 'x.pth', average)
    check(tmp_path / 'x.pth', plain, use_ema=False)


def test_load_mmengine_checkpoint(average, plain, tmp_path):
    """mmengine 0.10.7 with its EMAHook: `state_dict` has the average, and `ema_state_dict` the weights."""
    content = {
        'meta': {'epoch': 1, 'seed': np.int64(1)},
        'state_dict': rename(average.state_dict(), LAYOUTS['mmpretrain']),
        'message_hub': {'log_scalars': {'train/loss': np.arange(3)}, 'runtime_info': {}, 'resumed_keys': {}},
        'optimizer': {'state': {}, 'param_groups': []},
        'ema_state_dict': {
            'steps': torch.tensor(2),
            **{f'module.{k}': v for k, v in rename(plain.state_dict(), LAYOUTS['mmpretrain']).items()},
        },
    }
    torch.save(content, tmp_path / 'x.pth')
    check(tmp_path / 'x.pth', average)
    check(tmp_path / 'x.pth', plain, use_ema=False)


@pytest.mark.parametrize(
    ('name', 'make'),
    [
        ('Hugging Face Trainer', lambda m: under('timm_model.', m)),  # transformers 5.24.0: TimmWrapper
        ('fastai', lambda m: {'model': m.state_dict(), 'opt': {'hypers': [{'lr': 0.1}], 'state': []}}),  # fastai 2.8.12
        ('net', lambda m: {'net': m.state_dict(), 'acc': 1.0}),
        ('params', lambda m: {'params': m.state_dict()}),
        (
            'params_ema',
            lambda m: {'params': {k: v * 0 for k, v in m.state_dict().items()}, 'params_ema': m.state_dict()},
        ),
        ('model_state_dict', lambda m: {'epoch': 1, 'model_state_dict': m.state_dict(), 'loss': 0.1}),
        ('DeepSpeed', lambda m: {'module': m.state_dict(), 'optimizer': None}),
        ('nested', lambda m: {'model': {'state_dict': m.state_dict()}}),
        (
            'nested average',
            lambda m: {
                'model': {k: v * 0 for k, v in m.state_dict().items()},
                'ema': {'module': m.state_dict(), 'decay': 0.99},
            },
        ),
        ('ema_state_dict', lambda m: {'state_dict': {}, 'ema_state_dict': under('module.', m)}),
    ],
)
def test_load_container(name, make, average, tmp_path):
    torch.save(make(average), tmp_path / 'x.pth')
    check(tmp_path / 'x.pth', average)


def test_load_average_of_unknown_layout_raises_unless_left_out(plain, tmp_path):
    content = {'model': plain.state_dict(), 'ema': {'decay': 0.99, 'shadow_params': list(plain.parameters())}}
    torch.save(content, tmp_path / 'x.pth')
    model = timm.create_model('test_repvgg')
    with pytest.raises(CheckpointError, match=r"under 'ema' is of no known layout .*use_ema=False"):
        load_checkpoint(model, tmp_path / 'x.pth')
    check(tmp_path / 'x.pth', plain, use_ema=False)
