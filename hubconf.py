"""torch.hub: `torch.hub.load(REPO, 'repvgg_a0', pretrained=True, deploy=True, num_classes=10, in_chans=3)`."""

from repvgg_zoo.repvgg import (  # noqa: F401
    repvgg_a0,
    repvgg_a0_cifar,
    repvgg_a1,
    repvgg_a1_cifar,
    repvgg_a2,
    repvgg_a2_cifar,
    repvgg_b0,
    repvgg_b1,
    repvgg_b1g2,
    repvgg_b1g4,
    repvgg_b2,
    repvgg_b2g2,
    repvgg_b2g4,
    repvgg_b3,
    repvgg_b3g2,
    repvgg_b3g4,
    repvgg_d2se,
    repvggplus_l2pse,
    test_repvgg,
)

dependencies = ['torch', 'torchvision', 'timm', 'huggingface_hub', 'safetensors']
