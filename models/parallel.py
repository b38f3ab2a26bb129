"""timm's parallel blocks as blocks with one attention and one MLP, which compute the same up to rounding.

So whatever replaces, taps or trains `block.attn` finds it. What is fused is split, and what stands side by side is
joined: attentions by their heads, MLPs by their hidden units, the scales of their norms and layer scales multiplied in.
"""

import torch
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block, ParallelScalingBlock, ParallelThingsBlock
from torch import Tensor, nn

PARALLEL = (ParallelScalingBlock, ParallelThingsBlock)


class ParallelBlock(nn.Module):
    """x + attention(norm(x)) + MLP(norm(x)), as in ViT-22B, arXiv 2302.05442, equation 1."""

    def __init__(self, norm: nn.Module, attn: Attention, mlp: Mlp, ls: nn.Module, drop_path: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attn, self.mlp, self.ls, self.drop_path = norm, attn, mlp, ls, drop_path

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        y = self.norm1(x)
        y = self.attn(y, attn_mask=attn_mask, is_causal=is_causal) + self.mlp(y)
        return x + self.drop_path(self.ls(y))


@torch.no_grad()
def with_plain_blocks(vit: nn.Module) -> nn.Module:
    """`vit`, its parallel blocks replaced in place.

    Raises:
        ValueError: a parallel block has a part that cannot be joined.
    """
    for i, block in enumerate(getattr(vit, "blocks", ())):
        if type(block) in PARALLEL:
            new = _split(block) if isinstance(block, ParallelScalingBlock) else _joined(block, i)
            trains = all(p.requires_grad for p in block.parameters())
            vit.blocks[i] = new.train(block.training).requires_grad_(trains)
    return vit


def _split(block: ParallelScalingBlock) -> ParallelBlock:
    """One product with the tokens becomes two; so does that after, if it is one."""
    hidden, dim = block.in_split[:2]
    fc1, qkv = block.in_proj.weight.split([hidden, 3 * dim])
    fused = block.in_proj.bias
    fc1_bias, qkv_bias = (block.mlp_bias, None) if fused is None else fused.split([hidden, 3 * dim])
    if block.out_proj is None:
        proj, proj_bias = block.attn_out_proj.weight, block.attn_out_proj.bias
        fc2, fc2_bias = block.mlp_out_proj.weight, block.mlp_out_proj.bias
    else:
        proj, fc2 = block.out_proj.weight.split([dim, hidden], 1)
        proj_bias, fc2_bias = None, block.out_proj.bias
    attn = _attention(block.num_heads, block.head_dim, qkv, qkv_bias, proj, proj_bias, block.attn_drop)
    attn.q_norm, attn.k_norm, attn.fused_attn = block.q_norm, block.k_norm, block.fused_attn
    mlp = _mlp(fc1, fc1_bias, fc2, fc2_bias, block.mlp_act, block.mlp_drop)
    return ParallelBlock(block.in_norm, attn, mlp, block.ls, block.drop_path)


def _joined(block: ParallelThingsBlock, index: int) -> Block:
    """Attentions side by side are one with all their heads, MLPs side by side one with all their hidden units."""
    attentions = [branch.attn for branch in block.attns]
    plain = all(type(attn) is Attention and isinstance(attn.q_norm, nn.Identity) and attn.gate is None
                and isinstance(attn.norm, nn.Identity) for attn in attentions)  # fmt: skip
    if not plain or not all(type(branch.norm).__mro__[1] is nn.LayerNorm for branch in (*block.attns, *block.ffns)):
        raise ValueError(f"block {index} (ParallelThingsBlock): only attentions without norms of their own are joined")
    first, (qkv, qkv_bias) = attentions[0], _after_norms([(branch.norm, branch.attn.qkv) for branch in block.attns])
    # [branches, 3, H K, D] -> [3, branches, H K, D]
    qkv = qkv.unflatten(0, (len(attentions), 3, -1)).transpose(0, 1).flatten(0, 2)
    qkv_bias = qkv_bias.unflatten(0, (len(attentions), 3, -1)).transpose(0, 1).flatten()
    proj = _before_scales([(branch.attn.proj, branch.ls) for branch in block.attns])
    fc1 = _after_norms([(branch.norm, branch.mlp.fc1) for branch in block.ffns])
    fc2 = _before_scales([(branch.mlp.fc2, branch.ls) for branch in block.ffns])
    dim, mlp = proj[0].shape[0], block.ffns[0].mlp
    with torch.device("meta"):
        new = Block(dim, 1)
    for name, branch in (("1", block.attns[0]), ("2", block.ffns[0])):
        setattr(new, f"norm{name}", nn.LayerNorm(dim, branch.norm.eps, elementwise_affine=False))
        setattr(new, f"drop_path{name}", branch.drop_path)
    heads = first.num_heads * len(attentions)
    new.attn = _attention(heads, first.head_dim, qkv, qkv_bias, *proj, first.attn_drop)
    new.attn.fused_attn, new.attn.proj_drop = first.fused_attn, first.proj_drop
    new.mlp = _mlp(*fc1, *fc2, mlp.act, mlp.drop1)
    return new


def _after_norms(pairs: list[tuple[nn.LayerNorm, nn.Linear]]) -> tuple[Tensor, Tensor]:
    """Weight and bias of layers side by side that read what is normalised alone."""
    weights = [linear.weight * norm.weight for norm, linear in pairs]
    biases = [linear.weight @ norm.bias + (0 if linear.bias is None else linear.bias) for norm, linear in pairs]
    return torch.cat(weights), torch.cat(biases)


def _before_scales(pairs: list[tuple[nn.Linear, nn.Module]]) -> tuple[Tensor, Tensor]:
    """Weight and bias of the layer that gives the sum of layers, each scaled."""
    scales = [getattr(ls, "gamma", linear.weight.new_ones(linear.out_features)) for linear, ls in pairs]
    weights = [linear.weight * scale[:, None] for (linear, _), scale in zip(pairs, scales, strict=True)]
    biases = [
        0 if linear.bias is None else linear.bias * scale for (linear, _), scale in zip(pairs, scales, strict=True)
    ]
    return torch.cat(weights, 1), torch.stack([b + weights[0].new_zeros(len(weights[0])) for b in biases]).sum(0)


def _attention(
    heads: int, head_dim: int, qkv: Tensor, qkv_bias: Tensor | None, proj: Tensor, proj_bias: Tensor | None,
    drop: nn.Module,
) -> Attention:  # fmt: skip
    with torch.device("meta"):
        attn = Attention(qkv.shape[1], heads, head_dim)
    attn.qkv, attn.proj, attn.attn_drop = _linear(qkv, qkv_bias), _linear(proj, proj_bias), drop
    return attn


def _mlp(
    fc1: Tensor, fc1_bias: Tensor | None, fc2: Tensor, fc2_bias: Tensor | None, act: nn.Module, drop: nn.Module
) -> Mlp:
    with torch.device("meta"):
        mlp = Mlp(1)
    mlp.fc1, mlp.fc2, mlp.act, mlp.drop1 = _linear(fc1, fc1_bias), _linear(fc2, fc2_bias), act, drop
    return mlp


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear
