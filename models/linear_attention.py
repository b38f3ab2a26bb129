"""Linear attention, arXiv 2006.16236, as a drop-in for timm's `Attention`.

Shapes: B images, N tokens, D width, H heads, K head dimension, F feature dimension.
"""

from contextlib import nullcontext

import torch
from timm.layers import Attention
from torch import Tensor, nn

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
    """timm's `Attention` with softmax(q k^T / sqrt(K)) v replaced by `linear_attention`.

    It adopts the projections and norms of the module that it replaces, so parameter names, weights, qk-norm, output
    norm and gate stay as they were. Attention dropout has nothing to act on, there are no attention weights.
    """

    def __init__(self, attn: Attention, feature_map: str = "elu1") -> None:
        """Takes over the sub-modules of `attn`, which must not be used afterwards.

        Raises:
            ValueError: unknown `feature_map`.
        """
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = attn.num_heads, attn.head_dim, attn.attn_dim
        self.qkv, self.q_norm, self.k_norm = attn.qkv, attn.q_norm, attn.k_norm
        self.norm, self.gate, self.proj, self.proj_drop = attn.norm, attn.gate, attn.proj, attn.proj_drop
        self.feature_map = build_feature_map(feature_map, self.num_heads, self.head_dim)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, N, D] -> [B, N, D].

        Raises:
            ValueError: a mask or causal attention is asked for; this attention sees all tokens.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("linear attention here is non-causal and takes no mask")
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.contiguous().unbind(0)  # one copy here instead of one in each matrix product
        q, k = self.feature_map(self.q_norm(q)), self.feature_map(self.k_norm(k))
        out = linear_attention(q, k, v).transpose(1, 2).reshape(B, N, self.attn_dim)
        out = self.norm(out)
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))
