"""The branches whose sum is a training-time block. In eval mode each is linear and equal to one convolution.

A branch maps `(N, C_in, H, W)` to `(N, C_out, H / stride, W / stride)`, rounded up. Stride and dilation are read off
its modules, so users can change them by hand, as segmentation recipes do.
"""

from .base import Branch
from .chains import AvgPoolBranch, PointConvBranch
from .kernels import DiracBranch, DOConvBranch, ExpandBranch, OREPABranch
from .parallel import ConvBranch, IdentityBranch, ScaledBranch
from .spec import CONVOLUTIONS, ConvSpec, SubsampledConv2d

__all__ = [
    'BRANCHES',
    'CONVOLUTIONS',
    'AvgPoolBranch',
    'Branch',
    'ConvBranch',
    'ConvSpec',
    'DOConvBranch',
    'DiracBranch',
    'ExpandBranch',
    'IdentityBranch',
    'OREPABranch',
    'PointConvBranch',
    'ScaledBranch',
    'SubsampledConv2d',
]

BRANCHES = (
    ConvBranch,
    IdentityBranch,
    ScaledBranch,
    DiracBranch,
    DOConvBranch,
    ExpandBranch,
    OREPABranch,
    PointConvBranch,
    AvgPoolBranch,
)
"""The classes whose word is taken for what they compute; a subclass has to be proven, and has no fast path."""
