"""Read any module of any block of a ViT by its name, through forward hooks.

For timm's `VisionTransformer` and `Eva` (EVA-02, DINOv3, PE), softmax and linear. The eight modules of a block are
those of "Layer by layer, module by module", arXiv 2603.05280.
"""

import contextlib
import math
import re
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from timm.layers import Attention, AttentionRope, SwiGLU
from timm.models.eva import EvaAttention, EvaBlockPostNorm
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn

BLOCK_MODULES = ("ln1", "mha", "rc1", "ln2", "fc1", "act", "fc2", "rc2")  # in the order of the forward pass

# name in a block -> (sub-module, which side of it). "attn_in" is what attention reads, "heads" what it gives before its
# projection. "act" is what the activation gives, read where its dropout takes it in: of a gated feed-forward network
# (GluMlp, SwiGLU) that is the gated product act(gate) * value, and "fc1" holds both, gate first.
POINTS: dict[str, tuple[str, str]] = {
    "ln1": ("norm1", "out"),
    "attn_in": ("attn", "in"),
    "heads": ("attn.proj", "in"),
    "mha": ("attn", "out"),
    "rc1": ("norm2", "in"),
    "ln2": ("norm2", "out"),
    "fc1": ("mlp.fc1", "out"),
    "act": ("mlp.drop1", "in"),
    "fc2": ("mlp.fc2", "out"),
    "rc2": ("", "out"),
}


@contextlib.contextmanager
def taps(
    vit: nn.Module, names: Iterable[str], pool: Literal["mean", "prefix", "both"] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Within the context, each forward of `vit` fills the mapping with the tensors called `names`, [B, N, *].

    Args:
        vit: a timm `VisionTransformer` or `Eva`; it may be compiled, block by block.
        names: `blocks.<i>.<point>` with a point from `POINTS` (`*` for every block); `patch_embed`, the embedded
            patches before positions and prefix tokens join them; `norm`, the final tokens, exactly what
            `forward_features` returns (where timm normalises only what it pooled, `fc_norm`, as they are before it).
        pool: reduce each tensor where it is read, in fp32, so that no tokens are kept: `mean` over all tokens, prefix
            tokens included, [B, *]; the first `prefix` token, the class token where there is one, [B, *]; `both`,
            prefix first, [B, 2, *].

    Raises:
        ValueError: a name that `vit` does not have, or a prefix token that it does not have.
    """
    read: dict[str, Tensor] = {}
    hooks = []

    def record(key: str, side: str, joins: bool):
        def keep(tensor: Tensor) -> None:
            tensor = tensor.flatten(1, -2) if pool is None else pooled(tensor.flatten(1, -2), pool)
            read[key] = torch.cat([read[key], tensor], -1) if joins else tensor

        def after(_module: nn.Module, _args: tuple, out: Tensor) -> None:
            keep(out)

        def before(_module: nn.Module, args: tuple) -> None:
            keep(args[0])

        return after if side == "out" else before

    try:
        for key, module, side, joins in (found for name in names for found in _resolve(vit, name)):
            if pool not in (None, "mean") and (key == "patch_embed" or vit.num_prefix_tokens == 0):
                raise ValueError(f"tap {key!r}: has no prefix token; pool its mean")
            register = module.register_forward_hook if side == "out" else module.register_forward_pre_hook
            hooks.append(register(record(key, side, joins)))
        yield read
    finally:
        for hook in hooks:
            hook.remove()


def pooled(tokens_BND: Tensor, pool: Literal["mean", "prefix", "both"]) -> Tensor:
    """One vector an image, fp32: see `taps`."""
    parts = []
    if pool != "mean":
        parts.append(tokens_BND[:, 0].to(torch.float32, copy=True))  # a view would keep all tokens
    if pool != "prefix":
        parts.append(tokens_BND.mean(1, dtype=torch.float32))
    return parts[0] if len(parts) == 1 else torch.stack(parts, 1)


@contextlib.contextmanager
def attention_entropy(vit: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Within the context, each forward of `vit` fills the mapping with the entropy of its softmax attention by block.

    Of each image [B], in fp32: the mean over heads and queries of -sum_n p_n log p_n / log N, which is 0 where a query
    looks at one token and 1 where it looks at all N alike. Linear blocks have none. Attention is computed unfused, with
    its weights [B, H, N, N] in memory, so give few images at a time.

    Args:
        vit: see `taps`.
    """
    read: dict[int, Tensor] = {}
    found = {i: getattr(block, "attn", None) for i, block in enumerate(vit.blocks)}
    attentions = {i: attn for i, attn in found.items() if isinstance(attn, Attention | AttentionRope | EvaAttention)}
    fused = {i: attn.fused_attn for i, attn in attentions.items()}
    hooks = []

    def record(i: int):
        def before(_module: nn.Module, args: tuple) -> None:
            weights = args[0].float()
            nats = torch.special.entr(weights).sum(-1)
            read[i] = nats.mean((1, 2)) / math.log(weights.shape[-1])

        return before

    try:
        for i, attn in attentions.items():
            attn.fused_attn = False  # its weights then pass through their dropout
            hooks.append(attn.attn_drop.register_forward_pre_hook(record(i)))
        yield read
    finally:
        for hook in hooks:
            hook.remove()
        for i, attn in attentions.items():
            attn.fused_attn = fused[i]


def tap_names(vit: nn.Module, names: Iterable[str]) -> list[str]:
    """`names` with `*` written out, in the order given, each once. Raises ValueError as `taps` does."""
    return list(dict.fromkeys(key for name in names for key, *_ in _resolve(vit, name)))


def _resolve(vit: nn.Module, name: str) -> list[tuple[str, nn.Module, str, bool]]:
    """(key, module, side, whether it joins what is there under the key) of each tensor that `name` stands for."""
    if name in ("patch_embed", "norm"):
        return [(name, getattr(vit, name), "out", False)]
    match = re.fullmatch(r"blocks\.(\*|\d+)\.(\w+)", name)
    depth = len(vit.blocks)
    if match is None or match[2] not in POINTS or (match[1] != "*" and int(match[1]) >= depth):
        raise ValueError(
            f"tap {name!r}: unknown; use patch_embed, norm or blocks.<0..{depth - 1} or *>.<{'|'.join(POINTS)}>"
        )
    blocks = range(depth) if match[1] == "*" else [int(match[1])]
    found = []
    for i in blocks:
        block, (path, side) = vit.blocks[i], POINTS[match[2]]
        paths = [path]
        if match[2] == "rc1" and isinstance(block, ResPostBlock | EvaBlockPostNorm):
            paths = ["mlp"]  # its norms follow attention and MLP, so the residual stream enters the MLP itself
        elif match[2] == "fc1" and isinstance(getattr(block, "mlp", None), SwiGLU):
            paths = ["mlp.fc1_g", "mlp.fc1_x"]
        for path in paths:
            try:
                module = block.get_submodule(path)
            except AttributeError as error:
                raise ValueError(f"tap {name!r}: block {i} ({type(block).__name__}) has no {path}") from error
            found.append((f"blocks.{i}.{match[2]}", module, side, path != paths[0]))
    return found
