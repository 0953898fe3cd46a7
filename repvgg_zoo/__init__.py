"""The RepVGG model zoo for timm: importing it registers every variant with timm's registry."""

from . import _interrupt  # noqa: F401  # first: the others take seconds
from .blocks.bn_statistics import match_bn_statistics
from .blocks.factory import BLOCKS
from .blocks.multi_branch import MultiBranchBlock
from .blocks.repvgg_block import RepVGGBlock
from .blocks.unfold import unfold
from .checkpoints.errors import CheckpointError
from .overparam.overparameterize import overparameterize
from .overparam.registry import register_overparameterized
from .pretrained.load import load_checkpoint
from .pretrained.manifest import weights_dir
from .quantization.qat import prepare_qat
from .reparam.evaluation import disable_fast_path
from .reparam.fold import FoldError
from .reparam.switch import switch_to_deploy
from .repvgg import RepVGG
from .training.max_norm import max_norm
from .training.param_groups import equivalent_kernel_l2, param_groups
from .training.rep_optimizer import rep_optimizer
from .variants import VARIANTS, Variant

__all__ = [
    'BLOCKS',
    'VARIANTS',
    'CheckpointError',
    'FoldError',
    'MultiBranchBlock',
    'RepVGG',
    'RepVGGBlock',
    'Variant',
    '__version__',
    'disable_fast_path',
    'equivalent_kernel_l2',
    'load_checkpoint',
    'match_bn_statistics',
    'max_norm',
    'overparameterize',
    'param_groups',
    'prepare_qat',
    'register_overparameterized',
    'rep_optimizer',
    'switch_to_deploy',
    'unfold',
    'weights_dir',
]

__version__ = '0.1.0'
