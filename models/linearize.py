"""Softmax ViT -> linear ViT, block by block, every weight copied."""

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from timm.layers import Attention, AttentionRope
from timm.models import Eva, VisionTransformer
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from .linear_attention import LinearAttention
from .operators import PatchGrid, check_additions, check_operator
from .parallel import PARALLEL, with_plain_blocks

ViT = VisionTransformer | Eva


def linearize(
    vit: nn.Module,
    operator: str = "elu1",
    keep_softmax: Collection[int] = (),
    operator_kwargs: Mapping[str, Any] | None = None,
    additions: Collection[str] = (),
    feature_map: str | None = None,
) -> ViT:
    """A copy of a timm `VisionTransformer` or `Eva` whose blocks attend linearly; `vit` itself is left as it is.

    Parameter names and values are unchanged, so are `forward_features`, `forward_intermediates`, `get_classifier`,
    prefix tokens, qk-norm, rotary positions, layer scale, `requires_grad` and train or eval mode; attention dropout is
    gone. Covers DeiT, AugReg, MAE, CLIP, SigLIP, DINOv2 with and without registers; EVA-02, DINOv3, PE. Parallel blocks
    get one attention first, and with it other names, see `parallel`.

    Parameters that an operator or addition has besides are trainable and start from constants, so the same `vit`
    always gives the same copy.

    Args:
        vit: the softmax model.
        operator: a name from `OPERATORS`.
        keep_softmax: blocks that keep softmax attention; negative counts from the last block.
        operator_kwargs: of the operator, such as `{"power": 6}`.
        additions: names from `ADDITIONS`.
        feature_map: an older name of `operator`.

    Raises:
        ValueError: `vit` cannot be linearised faithfully (named), or a block, operator or addition does not exist.
    """
    operator = feature_map or operator
    check_linearizable(vit)
    check_operator(operator, operator_kwargs)
    check_additions(additions)
    depth = len(vit.blocks)
    wrong = [i for i in keep_softmax if not -depth <= i < depth]
    if wrong:
        raise ValueError(f"keep_softmax {wrong}: the model has blocks 0 to {depth - 1}")
    keep = {i % depth for i in keep_softmax}
    student = copy.deepcopy(vit)
    if len(keep) < depth:
        with_plain_blocks(student)
    for i, block in enumerate(student.blocks):
        if i not in keep:
            block.attn = LinearAttention(block.attn, operator, operator_kwargs, additions, vit.num_prefix_tokens)
    ask = [student.blocks[i].attn for i in linear_blocks(student) if student.blocks[i].attn.needs_grid]
    if ask:
        if getattr(student.patch_drop, "prob", 0):
            raise ValueError(f"patch_drop: {operator} and its additions need the whole patch grid, of which it drops "
                             "patches; set vit.patch_drop = torch.nn.Identity()")  # fmt: skip
        grid = PatchGrid(student.patch_embed)
        for attn in ask:
            attn.look_at(grid)
    return student


def check_linearizable(vit: nn.Module) -> None:
    """Raises ValueError, naming the block and the reason, unless every block of `vit` has plain or rotary attention."""
    kind = type(vit).__name__
    if not isinstance(vit, ViT):
        raise ValueError(
            f"{kind}: not a timm VisionTransformer or Eva, it cannot be linearised; choose a ViT such as vit_*"
        )
    for i, block in enumerate(vit.blocks):
        if type(block) in PARALLEL:
            continue
        attn = getattr(block, "attn", None)
        if type(attn) not in (Attention, AttentionRope, EvaAttention):
            what = f"has {type(attn).__name__}" if attn is not None else f"({type(block).__name__}) has no attention"
            raise ValueError(f"{kind}: block {i} {what}; only timm's Attention, AttentionRope and EvaAttention can be "
                             "linearised faithfully, not relative-position bias or windows")  # fmt: skip


def linear_blocks(vit: nn.Module) -> list[int]:
    """Indices of the blocks of `vit` that attend linearly."""
    return [i for i, block in enumerate(vit.blocks) if isinstance(getattr(block, "attn", None), LinearAttention)]


@contextmanager
def borrowed_attention(vit: nn.Module, lender: nn.Module, blocks: Collection[int]) -> Iterator[None]:
    """Within the context, `blocks` of `vit` attend as those of `lender` do, by the very same modules.

    With a teacher for lender, what a linear block costs; with a student for lender, what one alone would.
    """
    own = {i: vit.blocks[i].attn for i in blocks}
    try:
        for i in own:
            vit.blocks[i].attn = lender.blocks[i].attn
        yield
    finally:
        for i, attn in own.items():
            vit.blocks[i].attn = attn


def note_image_size(vit: nn.Module, image_size: tuple[int, int]) -> None:
    """Tell the linear blocks of `vit` the (height, width) in pixels of the images whose tokens they are given next.

    Only where blocks are called by themselves: a ViT that is given images knows.
    """
    grid = getattr(vit.patch_embed, "patch_grid", None)
    if grid is not None:
        grid.note_image_size(*image_size)


def rotary_embeddings(vit: nn.Module, image_size: tuple[int, int]) -> list[Tensor | None]:
    """What `vit` gives each block's attention as `rope` for images of (height, width) pixels; None where it has none.

    A vector of 2 K sines and cosines a patch; with frequencies that are learned, for each head and block.
    """
    rope = getattr(vit, "rope", None)
    if rope is None:
        return [None] * len(vit.blocks)
    fixed = hasattr(rope, "feat_shape") and not vit.dynamic_img_size  # as Eva itself asks for it
    embed = rope.get_embed() if fixed else rope.get_embed(shape=vit.patch_embed.dynamic_feat_size(image_size))
    return list(embed) if vit.rope_mixed else [embed] * len(vit.blocks)
