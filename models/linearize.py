"""Softmax ViT -> linear ViT, block by block, every weight copied."""

import copy
from collections.abc import Collection

from timm.layers import Attention
from timm.models import VisionTransformer
from torch import nn

from .feature_maps import check_feature_map
from .linear_attention import LinearAttention


def linearize(vit: nn.Module, feature_map: str = "elu1", keep_softmax: Collection[int] = ()) -> VisionTransformer:
    """A copy of a timm `VisionTransformer` whose blocks attend linearly; `vit` itself is left as it is.

    Parameter names and values are unchanged, so are `forward_features`, `forward_intermediates`, `get_classifier`,
    prefix tokens, qk-norm, layer scale, `requires_grad` and train or eval mode; attention dropout is gone. Covers DeiT,
    AugReg, MAE, CLIP, SigLIP, DINOv2 with and without registers.

    Args:
        vit: the softmax model.
        feature_map: a name from `FEATURE_MAPS`.
        keep_softmax: blocks that keep softmax attention; negative counts from the last block.

    Raises:
        ValueError: `vit` cannot be linearised faithfully (named), or a block or feature map does not exist.
    """
    check_linearizable(vit)
    check_feature_map(feature_map)
    depth = len(vit.blocks)
    wrong = [i for i in keep_softmax if not -depth <= i < depth]
    if wrong:
        raise ValueError(f"keep_softmax {wrong}: the model has blocks 0 to {depth - 1}")
    keep = {i % depth for i in keep_softmax}
    student = copy.deepcopy(vit)
    for i, block in enumerate(student.blocks):
        if i not in keep:
            block.attn = LinearAttention(block.attn, feature_map)
    return student


def check_linearizable(vit: nn.Module) -> None:
    """Raises ValueError, naming the block and the reason, unless every block of `vit` has timm's plain attention."""
    kind = type(vit).__name__
    if not isinstance(vit, VisionTransformer):
        raise ValueError(f"{kind}: not a timm VisionTransformer, it cannot be linearised; choose a ViT such as vit_*")
    for i, block in enumerate(vit.blocks):
        attn = getattr(block, "attn", None)
        if type(attn) is not Attention:
            what = f"has {type(attn).__name__}" if attn is not None else f"({type(block).__name__}) has no attention"
            raise ValueError(f"{kind}: block {i} {what}; only timm's plain Attention can be linearised faithfully, "
                             "not relative-position bias, windows or rotary embeddings")  # fmt: skip


def linear_blocks(vit: nn.Module) -> list[int]:
    """Indices of the blocks of `vit` that attend linearly."""
    return [i for i, block in enumerate(vit.blocks) if isinstance(block.attn, LinearAttention)]
