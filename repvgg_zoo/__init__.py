"""The RepVGG model zoo for timm: importing it registers every variant with timm's registry."""

from .blocks import RepVGGBlock
from .checkpoints import CheckpointError
from .deploy import switch_to_deploy
from .optim import equivalent_kernel_l2, param_groups
from .pretrained import load_checkpoint
from .reparam import FoldError
from .repvgg import RepVGG
from .variants import VARIANTS, Variant

__all__ = [
    'VARIANTS',
    'CheckpointError',
    'FoldError',
    'RepVGG',
    'RepVGGBlock',
    'Variant',
    '__version__',
    'equivalent_kernel_l2',
    'load_checkpoint',
    'param_groups',
    'switch_to_deploy',
]

__version__ = '0.1.0'
