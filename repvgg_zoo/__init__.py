"""The RepVGG model zoo for timm: importing it registers every variant with timm's registry."""

from .blocks import RepVGGBlock
from .checkpoints import CheckpointError
from .deploy import switch_to_deploy
from .family import BLOCKS, FamilyBlock
from .optim import equivalent_kernel_l2, param_groups
from .pretrained import load_checkpoint
from .reparam import FoldError
from .repoptimizer import rep_optimizer
from .repvgg import RepVGG
from .unfolding import match_bn_statistics, unfold
from .variants import VARIANTS, Variant

__all__ = [
    'BLOCKS',
    'VARIANTS',
    'CheckpointError',
    'FamilyBlock',
    'FoldError',
    'RepVGG',
    'RepVGGBlock',
    'Variant',
    '__version__',
    'equivalent_kernel_l2',
    'load_checkpoint',
    'match_bn_statistics',
    'param_groups',
    'rep_optimizer',
    'switch_to_deploy',
    'unfold',
]

__version__ = '0.1.0'
