"""Linear attention as a drop-in for timm's attention modules.

Shapes: B images, N tokens, D width, H heads, K head dimension.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from .operators import PatchGrid, Shape, build_additions, build_operator

SITES = ("queries_keys", "values", "attention", "output")


@torch.fx.wrap  # in a graph the mask is a placeholder, which can be looked at only when the graph runs
def unmasked(x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """`x`; raises ValueError when there is a mask."""
    if attn_mask is not None or is_causal:
        raise ValueError("linear attention here is non-causal and takes no mask")
    return x


@torch.fx.wrap
def parted(qkv_BN3HK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, values [B, H, N, K]. On a CPU one copy instead of one in each matrix product; kernels need none.

    Parted before they are turned, so that backward lays the three gradients together in one pass.
    """
    q, k, v = qkv_BN3HK.unbind(2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if not qkv_BN3HK.is_cuda:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return q, k, v


class LinearAttention(nn.Module):
    """timm's `Attention`, `AttentionRope` or `EvaAttention`, softmax(q k^T / sqrt(K)) v replaced by an operator.

    It adopts the projections and norms of the module that it replaces, so parameter names, weights, qk-norm, output
    norm and gate stay as they were. Attention dropout has nothing to act on, there are no attention weights.

    Rotary positions turn q and k before the feature map: phi(R_m q_m)^T phi(R_n k_n). Those are the vectors whose
    products softmax saw, and what phi makes of them is not negative, so the output stays a weighted mean of the values.
    Turned after it, as in RoFormer, arXiv 2104.09864, section 3.3, weights can be negative and their sum zero, which
    is why there the normaliser leaves positions out.
    """

    def __init__(
        self,
        attn: Attention | AttentionRope | EvaAttention,
        operator: str = "elu1",
        operator_kwargs: Mapping[str, Any] | None = None,
        additions: Collection[str] = (),
        num_prefix_tokens: int | None = None,
    ) -> None:
        """Takes over the sub-modules of `attn`, which must not be used afterwards.

        Args:
            operator: a name from `OPERATORS`.
            operator_kwargs: of its own.
            additions: names from `ADDITIONS`.
            num_prefix_tokens: where `attn` does not know them itself.

        Raises:
            ValueError: `operator`, `operator_kwargs` or `additions` name something that there is not.
        """
        super().__init__()
        self.num_heads, self.head_dim = attn.num_heads, attn.head_dim
        self.num_kv_heads = getattr(attn, "num_kv_heads", attn.num_heads)
        self.num_prefix_tokens = getattr(attn, "num_prefix_tokens", num_prefix_tokens or 0)
        self.rotate_half = getattr(attn, "rotate_half", False)
        self.qkv = attn.qkv
        self.q_proj, self.k_proj, self.v_proj = (getattr(attn, f"{part}_proj", None) for part in "qkv")
        self.q_bias, self.v_bias = getattr(attn, "q_bias", None), getattr(attn, "v_bias", None)
        self.q_norm, self.k_norm = attn.q_norm, attn.k_norm
        self.norm, self.gate, self.proj, self.proj_drop = attn.norm, attn.gate, attn.proj, attn.proj_drop
        shape = Shape(attn.proj.out_features, self.num_heads, self.head_dim, self.num_prefix_tokens)
        weight = attn.proj.weight
        self.operator = build_operator(operator, shape, operator_kwargs).to(weight.device, weight.dtype)
        built = build_additions(additions, shape)
        for site in SITES:
            here = nn.ModuleDict({name: part for name, part in built.items() if part.site == site})
            setattr(self, f"on_{site}", here.to(weight.device, weight.dtype))
        self.needs_grid = self.operator.needs_grid or any(part.needs_grid for part in built.values())
        self.grid: PatchGrid | None = None
        self.built_grid = (0, 0)
        self.train(attn.training)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, rope: Tensor | None = None
    ) -> Tensor:
        """[B, N, D] -> [B, N, D].

        Args:
            rope: sines and cosines of the patches' rotary positions, as timm concatenates them, [..., patches, 2 K].

        Raises:
            ValueError: a mask or causal attention is asked for; this attention sees all tokens.
        """
        x = unmasked(x, attn_mask, is_causal)
        B, N, _ = x.shape
        grid = self.patch_grid(N)
        q, k, v = self.queries_keys_values(x)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = self.rotated(q, rope), self.rotated(k, rope)
        if self.num_kv_heads != self.num_heads:  # grouped queries
            k = k.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)
            v = v.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)
        for addition in self.on_queries_keys.values():
            q, k = addition(q, k)
        for addition in self.on_values.values():
            v = addition(v, x, grid)
        out = self.operator(q, k, v, x, grid)
        for addition in self.on_attention.values():
            out = addition(out, q, k, v, x, grid)
        for addition in self.on_output.values():
            out = addition(out, v, x, grid)
        out = self.norm(out.transpose(1, 2).reshape(B, N, self.num_heads * self.head_dim))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def patch_grid(self, tokens: int) -> tuple[int, int]:
        """Rows and columns of patches among `tokens`; (0, 0) where nothing here asks for them."""
        if torch.jit.is_scripting():
            return self.built_grid
        return self.grid.of(tokens - self.num_prefix_tokens) if self.grid is not None else (0, 0)

    def look_at(self, grid: PatchGrid) -> None:
        """Take rows and columns from `grid`."""
        self.grid = grid

    def __prepare_scriptable__(self) -> "LinearAttention":
        """What `torch.jit.script` calls first: a script holds for the size that the ViT has then."""
        if self.grid is not None:
            self.built_grid = tuple(self.grid.patch_embed.grid_size or (0, 0))
        return self

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, D] -> q [B, H, N, K], k and v [B, key-value heads, N, K]."""
        B, N, _ = x.shape
        if self.qkv is None:
            q = self.q_proj(x).reshape(B, N, self.num_heads, self.head_dim).transpose(1, 2)
            k = self.k_proj(x).reshape(B, N, self.num_kv_heads, self.head_dim).transpose(1, 2)
            v = self.v_proj(x).reshape(B, N, self.num_kv_heads, self.head_dim).transpose(1, 2)
            return q, k, v
        qkv = self.qkv(x)
        if self.q_bias is not None:  # a key's bias is none: softmax would not see it
            qkv = qkv + torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        return parted(qkv.reshape(B, N, 3, self.num_heads, self.head_dim))

    def rotated(self, x_BHNK: Tensor, rope: Tensor) -> Tensor:
        """Queries or keys with the patches' rotary positions."""
        prefix, patches = x_BHNK[:, :, : self.num_prefix_tokens], x_BHNK[:, :, self.num_prefix_tokens :]
        turned = apply_rot_embed_cat(patches, rope, half=self.rotate_half)
        return torch.cat([prefix, turned.to(prefix.dtype)], dim=2)

    @torch.jit.ignore
    def qkv_parameters(self) -> Iterator[nn.Parameter]:
        """Those that make queries, keys and values of the tokens."""
        for part in (self.qkv, self.q_proj, self.k_proj, self.v_proj):
            yield from part.parameters() if part is not None else ()
        yield from (bias for bias in (self.q_bias, self.v_bias) if bias is not None)

    @torch.jit.ignore
    def new_parameters(self) -> Iterator[nn.Parameter]:
        """Those that the softmax model does not have: of the operator and of the additions."""
        yield from self.operator.parameters()
        yield from self.addition_parameters()

    @torch.jit.ignore
    def alignment_parameters(self) -> Iterator[nn.Parameter]:
        """Those that can be trained toward the softmax attention's output, block by block (stage 1)."""
        yield from self.qkv_parameters()
        yield from self.operator.alignment_parameters()
        yield from self.addition_parameters()

    @torch.jit.ignore
    def addition_parameters(self) -> Iterator[nn.Parameter]:
        """Those of the additions."""
        for site in SITES:
            yield from getattr(self, f"on_{site}").parameters()
