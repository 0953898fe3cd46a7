"""Libraries that build on timm's models: weights, a training step, and the switch."""

import inspect

import pytest
import timm
import torch
from helpers import FORMS, images, randomise, rel_diff
from timm.optim import create_optimizer_v2
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

from repvgg_zoo import VARIANTS, switch_to_deploy
from repvgg_zoo.reparam.evaluation import disable_fast_path
from repvgg_zoo.tools.model_folder import save_model


@pytest.fixture(scope='module')
def backbone(tmp_path_factory):
    """A folder with a small backbone of reductions 2 to 32, as segmentation and detection expect it."""
    folder = tmp_path_factory.mktemp('backbone')
    small = dict(depths=(1, 2, 2, 1), width=(0.25, 0.25, 0.25, 0.125), num_classes=2)
    save_model(randomise(timm.create_model('repvgg_a0', **small)), folder)
    return f'local-dir:{folder}'


def stem_kernel(model):
    return model.state_dict()['stem.conv_kxk.conv.weight'].float()


def check_training_and_switch(module, loss, run):
    """`loss()` in train mode, a step, and the switch of the network in eval mode; all in float64."""
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    module.train()
    loss().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for n, p in module.named_parameters() if 'stem' in n)
    optimizer.step()
    module.eval()
    with torch.no_grad(), disable_fast_path():
        before = run()
        switch_to_deploy(module)
        assert rel_diff(run(), before) < 1e-8
    assert not any('conv_kxk' in name for name, _ in module.named_modules())
    assert None not in (child for m in module.modules() for child in m._modules.values())


@pytest.mark.parametrize('decoder', ['Unet', 'FPN', 'Linknet', 'DeepLabV3Plus', 'UPerNet'])
@pytest.mark.parametrize('output_stride', [None, 8, 16])
def test_segmentation_decoder_trains_and_switches(decoder, output_stride, backbone):
    smp = pytest.importorskip('segmentation_models_pytorch')
    decoder = getattr(smp, decoder)
    options = {'decoder_channels': 32} if decoder is smp.DeepLabV3Plus else {}  # its 256 take a minute
    if output_stride and 'encoder_output_stride' not in inspect.signature(decoder).parameters:
        pytest.skip('the decoder has no such option')
    if output_stride:
        options['encoder_output_stride'] = output_stride
    network = decoder(f'tu-{backbone}', encoder_weights=True, classes=2, **options).double()
    assert torch.equal(stem_kernel(network.encoder.model), stem_kernel(timm.create_model(backbone, pretrained=True)))
    x = images(2, px=64, dtype=torch.float64)
    assert network.eval()(x).shape == (2, 2, 64, 64)
    check_training_and_switch(network, lambda: network(x).square().mean(), lambda: network(x))


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = timm.create_model(
            'test_repvgg', pretrained=True, features_only=True, out_indices=(2, 3, 4), feature_cls='dict'
        )
        self.out_channels = 32
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), self.out_channels)

    def forward(self, x):
        return self.fpn(self.body(x))


@pytest.mark.parametrize('detector', [FasterRCNN, RetinaNet, FCOS])
def test_torchvision_detector_trains_and_switches(detector):
    ratios = ((1.0,) if detector is FCOS else (0.5, 1.0, 2.0),)
    anchors = AnchorGenerator(((8,), (16,), (32,)), ratios * 3)
    if detector is FasterRCNN:
        options = dict(rpn_anchor_generator=anchors, box_roi_pool=MultiScaleRoIAlign(['2', '3', '4'], 7, 2))
    else:
        options = dict(anchor_generator=anchors)
    network = detector(Backbone(), num_classes=3, min_size=64, max_size=64, **options).double()
    x = list(torch.rand(2, 3, 64, 64, dtype=torch.float64))
    box = torch.tensor([[4.0, 4.0, 40.0, 40.0]], dtype=torch.float64)
    targets = [{'boxes': box, 'labels': torch.tensor([1])}] * 2
    check_training_and_switch(
        network,
        lambda: sum(network(x, targets).values()),
        lambda: torch.cat([value.flatten() for value in network.backbone(torch.stack(x)).values()]),
    )
    assert set(network(x)[0]) == {'boxes', 'labels', 'scores'}


def test_efficientdet_trains_and_switches(backbone):
    effdet = pytest.importorskip('effdet')
    config = effdet.get_efficientdet_config('efficientdet_d0')
    config.update(
        dict(backbone_name=backbone, image_size=[128, 128], num_classes=3, fpn_cell_repeats=1, fpn_channels=16),
        box_class_repeats=1,
        backbone_args={},
        backbone_indices=(2, 3, 4),
        min_level=3,
        max_level=7,
    )
    network = effdet.EfficientDet(config, pretrained_backbone=True).double()
    assert torch.equal(stem_kernel(network.backbone), stem_kernel(timm.create_model(backbone, pretrained=True)))
    x = images(2, px=128, dtype=torch.float64)

    def run():
        return torch.cat([level.flatten() for output in network(x) for level in output])

    check_training_and_switch(network, lambda: run().square().mean(), run)


def test_lightning_checkpoint_loads_into_deploy_form(tmp_path):
    lightning = pytest.importorskip('lightning')

    class Classifier(lightning.LightningModule):
        def __init__(self, **kwargs):
            super().__init__()
            self.save_hyperparameters()
            self.net = timm.create_model('test_repvgg', pretrained=True, **kwargs)

        def training_step(self, batch):
            x, target = batch
            return nn.functional.cross_entropy(self.net(x), target)

        def configure_optimizers(self):
            return create_optimizer_v2(self, 'sgd', lr=0.01)

    data = torch.utils.data.TensorDataset(images(8, px=32), torch.arange(8))
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    module = Classifier()
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / 'last.ckpt')
    x = images(2, px=32)
    expected = module.eval().net(x)
    loaded = Classifier.load_from_checkpoint(tmp_path / 'last.ckpt', deploy=True).eval()
    assert loaded.net.deploy
    assert rel_diff(loaded.net(x), expected) < 1e-4
    assert rel_diff(switch_to_deploy(module).net(x), expected) < 1e-4


def test_clip_image_tower_trains_and_switches():
    open_clip = pytest.importorskip('open_clip')
    tower = open_clip.timm_model.TimmModel('test_repvgg', embed_dim=16, image_size=32, pretrained=True).double()
    x = images(2, px=32, dtype=torch.float64)
    check_training_and_switch(tower, lambda: tower(x).square().mean(), lambda: tower(x))


@pytest.mark.parametrize('block', ['repvgg', 'plain', 'acb', 'mobileone', 'qarepvgg', 'no_identity_bn'])
def test_pruned_model_switch_keeps_outputs(block):
    pruning = pytest.importorskip('torch_pruning')
    model = randomise(timm.create_model('test_repvgg', block=block), px=32)
    x = images(2, px=32)
    pruner = pruning.pruner.MagnitudePruner(
        model, x, importance=pruning.importance.MagnitudeImportance(), pruning_ratio=0.5, ignored_layers=[model.head.fc]
    )
    pruner.step()
    model.double().eval()
    before = model(x.double())
    assert rel_diff(model.switch_to_deploy()(x.double()), before) < 1e-9
    for folded in (model.stem, model.stages[1][1]):
        conv = folded.reparam_conv
        assert (conv.out_channels, conv.in_channels) == conv.weight.shape[:2]
    assert model.stem.reparam_conv.out_channels == VARIANTS['test_repvgg'].stem_channels // 2


@FORMS
@pytest.mark.parametrize('wrapper', ['list', 'dict', 'hook', 'getter'])
def test_feature_wrapper_switch_keeps_outputs(wrapper, deploy):
    features = timm.create_model('test_repvgg', pretrained=True, features_only=True, feature_cls=wrapper, deploy=deploy)
    features.double().eval()
    x = images(1, px=64, dtype=torch.float64)

    def run():
        output = features(x)
        return list(output.values() if isinstance(output, dict) else output)

    before = run()
    switch_to_deploy(features)
    for a, b in zip(run(), before, strict=True):
        assert rel_diff(a, b) < 1e-12


def test_traced_features_switch_raises_except_in_deploy_form():
    options = dict(features_only=True, feature_cls='fx')
    with pytest.raises(ValueError, match='whose branches are fixed in a graph'):
        switch_to_deploy(timm.create_model('test_repvgg', **options))
    deployed = timm.create_model('test_repvgg', deploy=True, **options)
    assert switch_to_deploy(deployed) is deployed
