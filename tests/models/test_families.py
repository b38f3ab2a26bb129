"""Every family of ViTs by a name of timm's, at tiny sizes: converted, kept, trained, at two sizes and in bf16."""

import copy

import pytest
import timm
import torch

from models import LinearAttention, linear_blocks, linearize, match_dtypes

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
FAMILIES = [
    "deit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "vit_small_patch16_224.augreg_in21k",
    "vit_base_patch16_224.mae",
    "vit_base_patch16_clip_224.laion2b",
    "vit_base_patch16_clip_quickgelu_224.openai",
    "vit_base_patch16_siglip_224.webli",  # attention pooling
    "vit_base_patch16_siglip_256.v2_webli",
    "vit_base_patch16_siglip_gap_256.v2_webli",
    "vit_so400m_patch14_siglip_378.v2_webli",
    "vit_so400m_patch14_siglip_gap_224.pali_mix",
    "vit_so150m_patch16_reg4_map_256",  # registers and attention pooling
    "vit_small_patch14_dinov2.lvd142m",
    "vit_small_patch14_reg4_dinov2.lvd142m",
    "vit_giant_patch14_dinov2.lvd142m",  # a gated MLP
    "vit_huge_patch14_gap_224.in1k_ijepa",
    "vit_pwee_patch16_reg1_gap_256.sbb_in1k",  # parallel, as ViT-22B
    "vit_small_patch16_18x2_224",  # attentions side by side
    "eva02_tiny_patch14_224.mim_in22k",
    "eva02_base_patch14_448.mim_in22k_ft_in22k_in1k",
    "eva02_base_patch16_clip_224.merged2b",
    "vit_small_patch16_dinov3.lvd1689m",
    "vit_small_plus_patch16_dinov3.lvd1689m",
    "vit_pe_core_tiny_patch16_384.fb",
    "vit_pe_lang_large_patch14_448.fb",
    "vit_pe_spatial_tiny_patch16_512.fb",
]


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    vit = timm.create_model(name, **TINY).eval()
    with torch.no_grad():
        for weight in vit.parameters():
            weight.normal_(std=0.2)
    return vit


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family(name: str) -> None:
    assert timm.is_model_pretrained(name) or "." not in name
    vit = build(name)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        kept = linearize(vit, keep_softmax=range(2))
        assert linear_blocks(kept) == [] and torch.equal(kept(x), vit(x))
        assert torch.equal(kept.forward_features(x), vit.forward_features(x))

    student = linearize(vit)
    assert linear_blocks(student) == [0, 1] and all(isinstance(b.attn, LinearAttention) for b in student.blocks)
    tokens = student.forward_features(x)
    assert tokens.shape == vit.forward_features(x).shape and not torch.allclose(tokens, vit.forward_features(x))
    tokens.square().mean().backward()
    attention = [p for block in student.blocks for p in block.attn.parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in attention)
    assert sum(p.grad.norm() for p in attention) > 0

    with torch.no_grad():
        for size in ((48, 48), (32, 64)):
            other = copy.deepcopy(student)
            other.set_input_size(img_size=size)
            prefix = vit.num_prefix_tokens
            assert other.forward_features(torch.randn(1, 3, *size)).shape[1] == size[0] * size[1] // 64 + prefix

        half = copy.deepcopy(student).bfloat16()
        match_dtypes(half)
        out = half.forward_features(x.bfloat16())
        assert out.dtype == torch.bfloat16
        cosine = torch.nn.functional.cosine_similarity(out.float(), tokens, dim=-1)
        assert cosine.min() > 0.98, cosine.min()
