"""What all blocks share."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.errors import CheckpointError
from ..checkpoints.state_dicts import fold_state_dict
from ..reparam import switch as _switch
from ..reparam.fold import FoldError
from .fast_sum import full_precision, refresh_kernels

__all__ = ['ReparamBlock', 'has_identity']


class ReparamBlock(nn.Module):
    """A block that is a sum of branches to train and one 3x3 convolution, `reparam_conv`, to deploy.

    `has_identity` tells whether the training form has an identity branch, if it is of a kind that knows one.
    """

    @torch.jit.ignore
    def switch_to_deploy(self, *, verify: Tensor | None = None) -> 'ReparamBlock':
        """Fold the branches into one convolution, in place; see `repvgg_zoo.switch_to_deploy`."""
        return _switch.switch_to_deploy(self, verify=verify)

    @torch.jit.ignore
    def reparameterize(self) -> 'ReparamBlock':
        """`switch_to_deploy()` by timm's name."""
        return self.switch_to_deploy()

    @torch.jit.ignore
    def equivalent_kernel_bias(self) -> tuple[Tensor, Tensor]:
        """Kernel `(C_out, C_in / groups, 3, 3)` and bias `(C_out,)` of the convolution that the block is in eval mode.

        A differentiable function of the parameters and running statistics, in their dtype, float32 at least (of a
        block of the deploy form, its convolution's own): for regularisation, pruning and quantization.
        """
        if self.reparam_conv is not None:
            return self.reparam_conv.weight, self.reparam_conv.bias
        refresh_kernels(self)
        with full_precision(self):
            return self._sum_of_kernels()

    @torch.jit.ignore
    def input_convs(self) -> list[str]:
        """Paths of the convolutions that read the block's input, in either form."""
        return [p for p, m in self.named_modules() if isinstance(m, nn.Conv2d) and not p.startswith('attn.')]

    def _sum_of_kernels(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _folded(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """This block's own state dict with the fold of the branches, if they are there, in their place.

        Those of the default block go into the deploy form of any.
        """
        return fold_state_dict(state_dict, eps=self.norm_eps)

    @torch.jit.ignore
    def fold_state_dict(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Replace this block's branches, if they are there, by their fold."""
        own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        try:
            folded = self._folded(own)
        except (CheckpointError, FoldError) as error:
            raise type(error)(f'block {prefix.removesuffix(".")!r}: {error}') from error
        for key in own.keys() - folded.keys():
            del state_dict[prefix + key]
        state_dict.update({prefix + key: value for key, value in folded.items()})

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Mapping[str, Any], *args: Any
    ) -> None:
        """Fold training weights that are loaded into the deploy form, wherever the block stands."""
        if self.reparam_conv is not None:
            self.fold_state_dict(state_dict, prefix)
        elif f'{prefix}reparam_conv.weight' in state_dict:
            raise CheckpointError(
                'deploy-form weights do not go into a training-form model as they are: the branches cannot be told '
                'from their sum; create the model with deploy=True, or load with unfold=True'
            )
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)


def has_identity(in_chs: int, out_chs: int, stride: int, *, asked: bool | None = None) -> bool:
    """Whether a block has an identity branch: where input and output have one shape, unless it is asked for none."""
    fits = in_chs == out_chs and stride == 1
    if asked and not fits:
        raise ValueError(
            f'an identity branch takes as many channels as it gives, and stride 1; here are {in_chs} to {out_chs} '
            f'channels and stride {stride}'
        )
    return fits if asked is None else asked
