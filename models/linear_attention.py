"""Linear attention, arXiv 2006.16236, as a drop-in for timm's attention modules.

Shapes: B images, N tokens, D width, H heads, K head dimension, F feature dimension.
"""

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .feature_maps import build_feature_map

EPS = 1e-6  # floor of the normaliser; reached only by maps such as relu that can give a token no feature at all


def linear_attention(q_BHNF: Tensor, k_BHNF: Tensor, v_BHNK: Tensor) -> Tensor:
    """Non-causal linear attention in O(N F K): phi(q) (phi(k)^T v) / (phi(q) sum_n phi(k_n)).

    The F x K state and the normaliser accumulate in at least fp32; no N x N tensor is made.

    Args:
        q_BHNF: phi(q), non-negative, [B, H, N, F].
        k_BHNF: phi(k), non-negative, [B, H, N, F].
        v_BHNK: values, [B, H, N, K].

    Returns:
        [B, H, N, K] in the dtype of `v_BHNK`. Equation 5 of arXiv 2006.16236.
    """
    dtype = torch.promote_types(v_BHNK.dtype, torch.float32)
    device = v_BHNK.device.type
    # Autocast would take the matrix products back to bf16. The meta device, where FLOPs are counted, has none.
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        q, k, v = q_BHNF.to(dtype), k_BHNF.to(dtype), v_BHNK.to(dtype)
        state_BHFK = k.transpose(-2, -1) @ v
        norm_BHN1 = q @ k.sum(dim=-2).unsqueeze(-1)
        return ((q @ state_BHFK) / norm_BHN1.clamp_min(EPS)).to(v_BHNK.dtype)


class LinearAttention(nn.Module):
    """timm's `Attention`, `AttentionRope` or `EvaAttention`, softmax(q k^T / sqrt(K)) v replaced by `linear_attention`.

    It adopts the projections and norms of the module that it replaces, so parameter names, weights, qk-norm, output
    norm and gate stay as they were. Attention dropout has nothing to act on, there are no attention weights.

    Rotary positions turn q and k before the feature map: phi(R_m q_m)^T phi(R_n k_n). Those are the vectors whose
    products softmax saw, and what phi makes of them is not negative, so the output stays a weighted mean of the values.
    Turned after it, as in RoFormer, arXiv 2104.09864, section 3.3, weights can be negative and their sum zero, which
    is why there the normaliser leaves positions out.
    """

    def __init__(self, attn: Attention | AttentionRope | EvaAttention, feature_map: str = "elu1") -> None:
        """Takes over the sub-modules of `attn`, which must not be used afterwards.

        Raises:
            ValueError: unknown `feature_map`.
        """
        super().__init__()
        self.num_heads, self.head_dim = attn.num_heads, attn.head_dim
        self.num_kv_heads = getattr(attn, "num_kv_heads", attn.num_heads)
        self.num_prefix_tokens = getattr(attn, "num_prefix_tokens", 0)  # which have no rotary position
        self.rotate_half = getattr(attn, "rotate_half", False)
        self.qkv = attn.qkv
        self.q_proj, self.k_proj, self.v_proj = (getattr(attn, f"{part}_proj", None) for part in "qkv")
        self.q_bias, self.v_bias = getattr(attn, "q_bias", None), getattr(attn, "v_bias", None)
        self.q_norm, self.k_norm = attn.q_norm, attn.k_norm
        self.norm, self.gate, self.proj, self.proj_drop = attn.norm, attn.gate, attn.proj, attn.proj_drop
        self.feature_map = build_feature_map(feature_map, self.num_heads, self.head_dim)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, rope: Tensor | None = None
    ) -> Tensor:
        """[B, N, D] -> [B, N, D].

        Args:
            rope: sines and cosines of the patches' rotary positions, as timm concatenates them, [..., patches, 2 K].

        Raises:
            ValueError: a mask or causal attention is asked for; this attention sees all tokens.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("linear attention here is non-causal and takes no mask")
        q, k, v = self.queries_keys_values(x)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = self.rotated(q, rope), self.rotated(k, rope)
        if self.num_kv_heads != self.num_heads:  # grouped queries
            k, v = (t.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1) for t in (k, v))
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # which chooses by itself
            # Keep q, k and v for backward and make the rest again, as fused softmax does.
            out = checkpoint(self.attend, q, k, v, use_reentrant=False, preserve_rng_state=False)
        else:
            out = self.attend(q, k, v)
        out = self.norm(out.transpose(1, 2).flatten(2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def attend(self, q_BHNK: Tensor, k_BHNK: Tensor, v_BHNK: Tensor) -> Tensor:
        """[B, H, N, K] each -> [B, H, N, K]."""
        return linear_attention(self.feature_map(q_BHNK), self.feature_map(k_BHNK), v_BHNK)

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, D] -> q [B, H, N, K], k and v [B, key-value heads, N, K]."""
        B, N, _ = x.shape
        if self.qkv is None:
            parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
            return tuple(t.reshape(B, N, -1, self.head_dim).transpose(1, 2) for t in parts)
        qkv = self.qkv(x)
        if self.q_bias is not None:  # a key's bias is none: softmax would not see it
            qkv = qkv + torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = qkv.reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return qkv.contiguous().unbind(0)  # one copy here instead of one in each matrix product

    def rotated(self, x_BHNK: Tensor, rope: Tensor) -> Tensor:
        """Queries or keys with the patches' rotary positions."""
        prefix, patches = x_BHNK[:, :, : self.num_prefix_tokens], x_BHNK[:, :, self.num_prefix_tokens :]
        return torch.cat([prefix, apply_rot_embed_cat(patches, rope, half=self.rotate_half)], dim=2)

    def qkv_parameters(self) -> Iterator[nn.Parameter]:
        """Those that make queries, keys and values of the tokens."""
        for part in (self.qkv, self.q_proj, self.k_proj, self.v_proj):
            yield from part.parameters() if part is not None else ()
        yield from (bias for bias in (self.q_bias, self.v_bias) if bias is not None)
