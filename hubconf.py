"""torch.hub: `torch.hub.load(REPO, 'repvgg_a0', pretrained=True, deploy=True, num_classes=10, in_chans=3)`."""

from repvgg_zoo import VARIANTS as _VARIANTS
from repvgg_zoo import repvgg as _repvgg

dependencies = ['torch', 'torchvision', 'timm', 'huggingface_hub', 'safetensors']

globals().update({_name: getattr(_repvgg, _name) for _name in _VARIANTS})
