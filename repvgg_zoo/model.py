"""RepVGG with timm's model interface."""

# no `from __future__ import annotations`: graphs of torch.fx could not be scripted

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from timm.layers import ClassifierHead, SEModule, calculate_drop_path_rates, get_act_layer, get_norm_layer
from timm.models.byobnet import drop_blocks
from torch import Tensor, nn

from ._compat import feature_take_indices
from .blocks.base import ReparamBlock
from .blocks.factory import block_type
from .blocks.grad_checkpointing import checkpointed
from .checkpoints.contents import check_loadable
from .checkpoints.inserted_bn import fold_inserted_bn
from .checkpoints.layouts import to_timm_layout
from .checkpoints.state_dicts import StateDict, drop_aux_heads
from .pretrained.manifest import DEPLOY_SUFFIX
from .reparam import switch as _deploy
from .variants import OVERRIDES, VARIANTS, Variant

__all__ = ['AuxHead', 'RepVGG']


class AuxHead(nn.Module):
    """An auxiliary classifier on a feature map, as in the official RepVGGplus: `(N, C, H, W)` to `(N, num_classes)`.

    It is a 3x3 convolution of stride 2 with batch normalisation and ReLU, a global average, and a linear layer.
    """

    def __init__(self, chs: int, num_classes: int, *, norm_layer: Callable[..., nn.Module], **dd: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(chs, chs, 3, stride=2, padding=1, bias=False, **dd)
        self.bn = norm_layer(chs, **dd)
        self.act = nn.ReLU(inplace=True)
        self.fc = nn.Linear(chs, num_classes, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act(self.bn(self.conv(x))).mean((2, 3)))


class RepVGG(nn.Module):
    """RepVGG (arXiv 2101.03697) and RepVGGplus: `(N, in_chans, H, W)` to `(N, num_classes)`.

    A block of the training form is a sum of branches; `switch_to_deploy()` folds them into one 3x3 convolution.
    `load_state_dict` takes every known layout, and folds training-form weights for a model of the deploy form.

    Example:
        >>> import timm, torch, repvgg_zoo
        >>> model = timm.create_model('repvgg_a0', num_classes=10).eval()
        >>> model.switch_to_deploy()(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 10])
    """

    __jit_unused_properties__: ClassVar = [
        'deploy',
        'device',
        'dtype',
        'classifier_names',
        'head_hidden_size',
        '_model_args',
    ]
    if TYPE_CHECKING:  # TorchScript takes no annotation of what the model may lack
        pretrained_cfg: dict[str, Any]

    def __init__(
        self,
        variant: Variant,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = 'avg',
        output_stride: int = 32,
        img_size: int | tuple[int, int] | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        drop_block_rate: float = 0.0,
        drop_block_size: int = 3,
        act_layer: str | Callable[..., nn.Module] = nn.ReLU,
        norm_layer: str | Callable[..., nn.Module] = nn.BatchNorm2d,
        block: str = 'repvgg',
        deploy: bool = False,
        aux_heads: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """Weights are initialised as in the official code: by PyTorch's defaults.

        Args:
            variant: A row of `repvgg_zoo.VARIANTS`.
            num_classes: 0 leaves the classifier out.
            in_chans: Channels of the images.
            global_pool: timm's name of the pooling in front of the classifier.
            output_stride: 32, 16 or 8. Below 32, dilation replaces stride and keeps the resolution.
            img_size: No effect, as in timm's RepVGG. The model takes images of any size.
            drop_rate: Rate of dropout before the classifier.
            drop_path_rate: Rate of stochastic depth of the convolution branches in the last block. It grows from 0
                block by block.
            drop_block_rate: Rate of DropBlock (arXiv 1810.12890) of the 3x3 branches in the last two stages, as in
                timm.
            drop_block_size: Side of the dropped squares in the last stage, in pixels of the feature map.
            act_layer: Activation, by timm's name or as a class.
            norm_layer: Batch normalisation, by timm's name or as a class.
            block: Training-time block, a name of `repvgg_zoo.BLOCKS`. The deploy form is the same for all.
            deploy: Build the deploy form.
            aux_heads: Add the auxiliary heads of RepVGGplus. In train mode the model then returns
                `(logits, [logits of each head])`; in eval mode and in the deploy form it returns only the logits.
            device: Device of the tensors.
            dtype: Dtype of the parameters.

        Raises:
            ValueError: `output_stride` or `block` is unknown, or the variant has no auxiliary heads.
        """
        super().__init__()
        if output_stride not in (8, 16, 32):
            raise ValueError(f'output_stride is {output_stride}; it can be 8, 16 or 32')
        if aux_heads and not variant.aux_heads:
            having = ', '.join(v.name for v in VARIANTS.values() if v.aux_heads)
            raise ValueError(f'{variant.name} has no auxiliary heads; these have: {having}')
        make_norm: Callable[..., nn.Module] = get_norm_layer(norm_layer)
        dd = {'device': device, 'dtype': dtype}
        self.variant = variant
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.block = block
        self.drop_rate = drop_rate
        self.drop_path_rate = drop_path_rate
        self.grad_checkpointing = False

        make_block = functools.partial(
            block_type(block),
            deploy=deploy,
            attn_layer=_attn_layer(variant),
            attn_last=variant.se is not None and variant.se.position == 'after_act',
            act_layer=get_act_layer(act_layer),
            norm_layer=make_norm,
            **dd,
        )
        chs, total_stride, dilation = variant.stem_channels, variant.strides[0], 1
        self.stem = make_block(in_chans, chs, stride=total_stride)
        self.feature_info: list[dict[str, Any]] = [dict(num_chs=chs, reduction=total_stride, module='stem', stage=0)]
        drop_path_rates = cast(
            'list[list[float]]', calculate_drop_path_rates(drop_path_rate, list(variant.depths), stagewise=True)
        )
        stage_drop_blocks = drop_blocks(drop_block_rate, drop_block_size, len(variant.depths))
        stages, block_index = [], 1
        for stage, (depth, out_chs) in enumerate(zip(variant.depths, variant.stage_channels, strict=True)):
            stride, first_dilation = variant.strides[stage + 1], dilation
            dilated = total_stride >= output_stride and stride > 1
            if dilated:
                stride, dilation = 1, dilation * stride
            total_stride *= stride
            blocks = []
            for index in range(depth):
                first = index == 0
                blocks.append(
                    make_block(
                        chs,
                        out_chs,
                        stride=stride if first else 1,
                        dilation=first_dilation if first else dilation,
                        groups=variant.groups if block_index % 2 == 0 else 1,
                        identity=False if first and dilated else None,
                        drop_path_rate=drop_path_rates[stage][index],
                        drop_block=stage_drop_blocks[stage],
                    )
                )
                chs, block_index = out_chs, block_index + 1
            stages.append(nn.Sequential(*blocks))
            self.feature_info.append(
                dict(num_chs=chs, reduction=total_stride, module=f'stages.{stage}', stage=stage + 1)
            )
        self.stages = nn.Sequential(*stages)
        self.stage_ends = [info['stage'] for info in self.feature_info]
        self.output_stride = total_stride
        self.num_features = chs
        self.head = ClassifierHead(chs, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.global_pool = global_pool
        self.aux_heads = (
            nn.ModuleList(
                AuxHead(variant.stage_channels[stage], num_classes, norm_layer=make_norm, **dd)
                for stage, _ in variant.aux_blocks
            )
            if aux_heads and not deploy
            else None
        )
        self.register_load_state_dict_pre_hook(_rename_foreign_keys)

    @property
    def deploy(self) -> bool:
        """True if the model is of the deploy form."""
        return all(m.reparam_conv is not None for m in self.modules() if isinstance(m, ReparamBlock))

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first parameter."""
        return next(self.parameters()).dtype

    @property
    def head_hidden_size(self) -> int:
        """Number of features that the classifier sees; `num_features` if a head without a pool replaced timm's."""
        pool: Any = getattr(self.head, 'global_pool', None)
        return self.num_features * (pool.feat_mult() if hasattr(pool, 'feat_mult') else 1)

    @property
    def classifier_names(self) -> tuple[str, ...]:
        """Paths of the linear layers whose size is the number of classes. Heads without `fc` have none."""
        heads = ('head', *(f'aux_heads.{index}' for index in range(len(self.aux_heads or ()))))
        return tuple(f'{head}.fc' for head in heads if hasattr(self.get_submodule(head), 'fc'))

    @property
    def _model_args(self) -> dict[str, Any]:
        """Arguments to build the model again in its form. timm writes them into `config.json`."""
        args = dict(self.__dict__.get('_creation_args', {}))
        # some versions of timm do not tell a model its arguments
        own = {'deploy': (self.deploy, False), 'block': (self.block, 'repvgg'), 'in_chans': (self.in_chans, 3)}
        return (
            args | self.variant.overrides | {name: value for name, (value, default) in own.items() if value != default}
        )

    @_model_args.setter
    def _model_args(self, args: dict[str, Any]) -> None:
        self._creation_args = {
            name: value
            for name, value in args.items()
            # the model knows them, and timm's own RepVGG does not take them; unfolding is done once
            if name not in ('deploy', 'block', 'unfold', *OVERRIDES)
        }

    @torch.jit.ignore
    def switch_to_deploy(self, *, verify: Tensor | None = None) -> 'RepVGG':
        """Fold every block into one convolution, in place; see `repvgg_zoo.switch_to_deploy`."""
        return _deploy.switch_to_deploy(self, verify=verify)

    @torch.jit.ignore
    def reparameterize(self) -> 'RepVGG':
        """`switch_to_deploy()` by timm's name."""
        return self.switch_to_deploy()

    @torch.jit.ignore
    def _on_switch_to_deploy(self) -> None:
        self._remove_aux_heads()
        self._describe_form()

    @torch.jit.ignore
    def _describe_form(self) -> None:
        """Tell timm which convolutions read the images, and take back a tag that stands for the other form."""
        parts = [
            '.'.join(filter(None, ('stem', path, conv)))
            for path, block in self.stem.named_modules()
            if isinstance(block, ReparamBlock)
            for conv in block.input_convs()
        ]
        # some block types compute the kernel of a branch, so there may be one convolution or none
        first_conv = tuple(parts) if len(parts) > 1 else next(iter(parts), None)
        for description in ('pretrained_cfg', '_traits'):  # where timm looks it up
            if hasattr(self, description):
                getattr(self, description)['first_conv'] = first_conv
        cfg = getattr(self, 'pretrained_cfg', {})
        if not self.deploy and (cfg.get('tag') or '').endswith(DEPLOY_SUFFIX):
            cfg['tag'] = None

    @torch.jit.ignore
    def _on_unfold(self, block: str) -> None:
        self.block = block
        self._describe_form()

    @torch.jit.ignore
    def fold_state_dict(self, state_dict: StateDict) -> None:
        """Fold the branches in a training-form state dict in timm's layout, in place.

        The branches may be those of this model's blocks or of the default block. Each block's branches are released
        before the next block is folded.

        Args:
            state_dict: Weights in timm's layout, changed in place.

        Raises:
            CheckpointError: A block is incomplete, or has other branches.
            FoldError: A block cannot be folded.

        Example:
            >>> import timm, repvgg_zoo
            >>> state_dict = timm.create_model('test_repvgg').state_dict()
            >>> timm.create_model('test_repvgg', deploy=True).fold_state_dict(state_dict)
            >>> [key for key in state_dict if key.startswith('stem')]
            ['stem.reparam_conv.weight', 'stem.reparam_conv.bias']
        """
        for path, block in self.named_modules():
            if isinstance(block, ReparamBlock):
                block.fold_state_dict(state_dict, f'{path}.')

    @torch.jit.ignore
    def _remove_aux_heads(self) -> None:
        if self.aux_heads is not None:
            del self.aux_heads  # or a child that is None would stay
            self.aux_heads = None

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the names of further parameters that timm's optimizers do not decay: none."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns that put parameters into layer groups: the stem, then stages or blocks."""
        return dict(
            stem=r'^stem',
            blocks=[
                (r'^stages\.(\d+)' if coarse else r'^stages\.(\d+)\.(\d+)', None),
                (r'^aux_heads', (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of the stages for the backward pass, and run the stages again there."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the linear layer, or the head itself if it was replaced by one without `fc`."""
        return getattr(self.head, 'fc', self.head)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifiers by fresh ones. A head without `reset` is replaced as a whole.

        Args:
            num_classes: 0 removes the classifier.
            global_pool: timm's name of the pooling. None keeps the present one.
        """
        self.num_classes = num_classes
        like = next(self.head.parameters(), next(self.parameters()))  # a head without a classifier has no dtype
        if not hasattr(self.head, 'reset'):
            self.head = ClassifierHead(self.num_features, 0, pool_type=self.global_pool, drop_rate=self.drop_rate)
        self.head.reset(num_classes, global_pool)
        self.head.to(like.device, like.dtype).train(self.training)
        if global_pool is not None:
            self.global_pool = global_pool
        if num_classes == 0:
            self._remove_aux_heads()
        for aux in cast('Sequence[AuxHead]', self.aux_heads or ()):
            aux.fc = nn.Linear(aux.fc.in_features, num_classes, device=self.device, dtype=self.dtype)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map `(N, in_chans, H, W)` to `(N, num_features, H / output_stride, W / output_stride)`."""
        x = self.stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            for stage in self.stages:
                x = checkpointed(stage, x)
            return x
        return self.stages(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map the feature map to logits, or for `pre_logits` to the pooled features that the classifier sees."""
        if pre_logits:
            return self.head(x, pre_logits=True)
        return self.head(x)  # a head that users put in takes the feature map only

    def forward(self, x: Tensor) -> Tensor:
        """Map images to logits; with auxiliary heads in train mode, to `(logits, [logits of each head])`."""
        has_aux = self.aux_heads is not None and self.stem.reparam_conv is None
        if not torch.jit.is_scripting() and has_aux and self.training:
            return self._forward_with_aux(x)
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def _forward_with_aux(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.stem(x)
        heads = dict(zip(self.variant.aux_blocks, self.aux_heads or (), strict=True))
        aux_logits = []
        for stage, blocks in enumerate(self.stages):
            for index, block in enumerate(blocks.children()):
                x = checkpointed(block, x) if self.grad_checkpointing else block(x)
                if head := heads.get((stage, index + 1)):
                    aux_logits.append(head(x))
        return self.forward_head(x), aux_logits

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the forward features, and the feature maps of the stem (0) and the stages (1 to 4).

        Args:
            x: Images, `(N, in_chans, H, W)`.
            indices: Indices of the maps to return. A number n means the last n, and None means all.
            norm: No effect, because there is no norm layer outside the blocks.
            stop_early: Stop behind the last map of `indices`.
            output_fmt: 'NCHW'.
            intermediates_only: Return only the list of maps.

        Returns:
            The output of `forward_features` and the maps, or only the maps. With `stop_early`, the last map takes the
            place of the output.

        Raises:
            ValueError: `output_fmt` is not 'NCHW'.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt is '{output_fmt}'; it can be 'NCHW'")
        take_indices, max_index = feature_take_indices(len(self.stage_ends), indices)
        intermediates = []
        x = self.stem(x)
        if 0 in take_indices:
            intermediates.append(x)
        if torch.jit.is_scripting() or not stop_early:
            stages = self.stages
        else:
            stages = self.stages[:max_index]
        for index, stage in enumerate(stages, start=1):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpointed(stage, x)
            else:
                x = stage(x)
            if index in take_indices:
                intermediates.append(x)
        if intermediates_only:
            return intermediates
        return x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages behind the last feature map of `indices`, and the head that sits on them.

        Args:
            indices: As in `forward_intermediates`.
            prune_norm: No effect, because there is no norm layer outside the blocks.
            prune_head: Drop the classifier even if no stage is dropped.

        Returns:
            The indices of the feature maps.
        """
        take_indices, max_index = feature_take_indices(len(self.stage_ends), indices)
        pruned = max_index < len(self.stages)
        self.stages = self.stages[:max_index]
        if pruned:
            self.num_features = self.feature_info[max_index]['num_chs']
            if hasattr(self.head, 'reset'):
                self.head.in_features = self.num_features
        if prune_head or pruned:
            self.reset_classifier(0, '')
        return take_indices


def _rename_foreign_keys(
    model: RepVGG, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], *_: Any
) -> None:
    """Rename the keys of foreign layouts, and check the values, before the blocks look for theirs.

    The model may be part of another one.
    """
    own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    renamed = to_timm_layout(own, strict=False)
    check_loadable(renamed, model, assign=metadata.get('assign_to_params_buffers', False))
    if not hasattr(model.stem.reparam_conv, 'bn'):  # that the user put there
        fold_inserted_bn(renamed)
    buffers = {name for name, _ in model.named_buffers()}
    for key in [key for key in renamed if key.endswith('.num_batches_tracked') and key not in own]:
        if key not in buffers and key.replace('num_batches_tracked', 'running_var') in buffers:
            del renamed[key]  # filled in, but this model's norms count no batches
    if model.aux_heads is None:
        drop_aux_heads(renamed)
    if renamed.keys() != own.keys():
        for key in own:
            del state_dict[prefix + key]
        state_dict.update({prefix + key: value for key, value in renamed.items()})


def _attn_layer(variant: Variant) -> Callable[..., nn.Module] | None:
    return functools.partial(SEModule, rd_ratio=variant.se.rd_ratio, rd_divisor=1) if variant.se else None
