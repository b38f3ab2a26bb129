"""Vision towers in the names of Hugging Face's transformers -> names that timm's filters read.

ViT, DeiT, DINOv2 with and without registers, DINOv3, CLIP and SigLIP, as transformers 4 and 5 write them.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

RENAMED = [
    (r"embeddings\.(cls_token|class_embedding)", "cls_token"),
    (r"embeddings\.(mask_token|register_tokens)", r"\1"),
    (r"embeddings\.position_embeddings?(\.weight)?", "pos_embed"),
    (r"embeddings\.patch_embeddings?(\.projection)?", "patch_embed.proj"),
    (r"(encoder\.|model\.)?layers?\.(\d+)\.", r"blocks.\2."),
    (r"blocks\.(\d+)\.(layernorm_before|layer_norm1)", r"blocks.\1.norm1"),
    (r"blocks\.(\d+)\.(layernorm_after|layer_norm2)", r"blocks.\1.norm2"),
    (r"blocks\.(\d+)\.attention\.attention\.(q|k|v)(uery|ey|alue)", r"blocks.\1.attn.\2"),
    (r"blocks\.(\d+)\.(attention|self_attn)\.(q|k|v)_proj", r"blocks.\1.attn.\3"),
    (r"blocks\.(\d+)\.(attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)", r"blocks.\1.attn.proj"),
    (r"blocks\.(\d+)\.(intermediate\.dense|mlp\.up_proj)", r"blocks.\1.mlp.fc1"),
    (r"blocks\.(\d+)\.(output\.dense|mlp\.down_proj)", r"blocks.\1.mlp.fc2"),
    (r"blocks\.(\d+)\.mlp\.weights_in", r"blocks.\1.mlp.w12"),
    (r"blocks\.(\d+)\.mlp\.weights_out", r"blocks.\1.mlp.w3"),
    (r"blocks\.(\d+)\.layer_scale(\d)\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"pre_layrnorm", "norm_pre"),
    (r"(post_layernorm|layernorm)", "norm"),
    (r"head\.probe", "attn_pool.latent"),
    (r"head\.attention\.out_proj", "attn_pool.proj"),
    (r"head\.attention\.in_proj_", "attn_pool.qkv."),
    (r"head\.layernorm", "attn_pool.norm"),
    (r"head\.mlp", "attn_pool.mlp"),
]


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A vision tower's tensors, by names and in shapes that timm's `checkpoint_filter_fn` of that network reads."""
    out = {}
    for name, value in state.items():
        for theirs, ours in RENAMED:
            name = re.sub(f"^{theirs}", ours, name)
        out[name] = value
    out.pop("pooler.dense.weight", None)  # of transformers alone
    out.pop("pooler.dense.bias", None)
    for name in [name for name in out if re.fullmatch(r"blocks\.\d+\.attn\.q\.(weight|bias)", name)]:
        q, k, v = (out.pop(name.replace(".q.", f".{which}."), None) for which in "qkv")
        out[name.replace(".q.", ".qkv.")] = torch.cat([q, torch.zeros_like(q) if k is None else k, v])
    for kind in ("weight", "bias"):
        if (qkv := out.pop(f"attn_pool.qkv.{kind}", None)) is not None:
            third = len(qkv) // 3
            out[f"attn_pool.q.{kind}"], out[f"attn_pool.kv.{kind}"] = qkv[:third], qkv[third:]
    if "pos_embed" not in out and "register_tokens" in out:  # DINOv3, by Meta's name
        out["storage_tokens"] = out.pop("register_tokens")
    if "pos_embed" in out and out["pos_embed"].ndim == 2:
        out["pos_embed"] = out["pos_embed"][None]
    if "cls_token" in out and out["cls_token"].ndim == 1:
        out["cls_token"] = out["cls_token"][None, None]
    return out
