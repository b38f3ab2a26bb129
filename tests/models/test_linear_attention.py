"""The attention module and the quotient that most operators are, its precision, and its memory."""

import pytest
import timm
import torch
from torch.nn import functional as F

from models import linear_attention, linearize
from models.operators.feature_maps import elu1
from tests.models import naive
from tests.support.largest import LargestTensor


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("name", ["elu1", "relu", "focused"])
def test_module_equals_the_quadratic_formula(name, prefix):
    """Through the projections, qk-norm and output norm of a timm block, with every weight's gradient."""
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3, num_classes=0,
        qk_norm=True, scale_attn_norm=True, class_token=prefix > 0, reg_tokens=max(prefix - 1, 0), global_pool="",
    ).double()  # fmt: skip
    attn = linearize(vit, name).blocks[0].attn
    x = torch.randn(2, vit.num_prefix_tokens + 16, 48, dtype=torch.float64)

    def by_hand():
        q, k, v = (t.reshape(2, -1, 3, 16).transpose(1, 2) for t in attn.qkv(x).chunk(3, dim=-1))
        out = naive.OPERATORS[name](attn.operator, attn.q_norm(q), attn.k_norm(k), v, x, (4, 4))
        return attn.proj(attn.norm(out.transpose(1, 2).reshape(2, -1, 48)))

    out, wanted = attn(x), by_hand()
    assert vit.num_prefix_tokens == prefix
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(out)
    weights = list(attn.parameters())
    for a, b in zip(torch.autograd.grad(out, weights, grad), torch.autograd.grad(wanted, weights, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_bf16_inputs_accumulate_in_fp32():
    """Within one bf16 rounding of fp64 at N = 4096, which sums kept in bf16 miss by far, autocast or not."""
    torch.manual_seed(0)
    q, k, v = (torch.rand(1, 2, 4096, 16).bfloat16() for _ in range(3))
    wanted = linear_attention(q.double(), k.double(), v.double())
    bound = 2**-8 * wanted.abs()  # bf16 keeps 8 bits: one rounding is at most half of this

    out = linear_attention(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        in_autocast = linear_attention(q, k, v)
    state, total = torch.zeros(1, 2, 16, 16).bfloat16(), torch.zeros(1, 2, 16).bfloat16()
    for n in range(0, 4096, 64):  # the same sums, kept in bf16 between pieces
        state += k[:, :, n : n + 64].transpose(-2, -1) @ v[:, :, n : n + 64]
        total += k[:, :, n : n + 64].sum(-2)
    in_bf16 = (q @ state) / (q @ total.unsqueeze(-1))

    assert out.dtype == in_autocast.dtype == torch.bfloat16
    assert ((out - wanted).abs() <= bound).all()
    assert ((in_autocast - wanted).abs() <= bound).all()
    assert not ((in_bf16 - wanted).abs() <= bound).all()


def test_elu1_keeps_small_values_in_bf16():
    x = torch.linspace(-8, 3, 200).bfloat16()
    wanted = naive.elu1(x.double())
    torch.testing.assert_close(elu1(x).double(), wanted, rtol=1e-3, atol=0)
    assert not torch.allclose((F.elu(x) + 1).double(), wanted, rtol=0.5, atol=0)  # what bf16 would give


def test_a_token_without_features_gives_zero_and_finite_gradients():
    q, k, v = (torch.randn(1, 1, 4, 8, requires_grad=True) for _ in range(3))
    out = linear_attention(torch.relu(-q.abs()), torch.relu(k), v)
    out.sum().backward()
    assert (out == 0).all()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_the_measure_finds_an_n_by_n_tensor():
    largest = {}
    for name, attend in {
        "linear": linear_attention,
        "formula": lambda q, k, v: naive.mean_of(q @ k.mT, v),
        "softmax": lambda q, k, v: torch.softmax(q @ k.mT, -1) @ v,
    }.items():
        largest[name] = []
        for tokens in (256, 1024):
            q, k, v = (torch.rand(1, 1, tokens, 4, requires_grad=True) for _ in range(3))
            with LargestTensor() as seen:
                attend(q, k, v).sum().backward()
            largest[name].append(seen.numel)
    assert largest == {"linear": [256 * 4, 1024 * 4], "formula": [256**2, 1024**2], "softmax": [256**2, 1024**2]}


def test_memory_of_a_whole_model_grows_linearly():
    """Forward and backward of a linearised ViT: the largest tensor grows with N and stays under N x N for each head."""
    largest = {}
    for side in (16, 32, 64):
        vit = timm.create_model(
            "vit_tiny_patch16_224", img_size=side, patch_size=1, embed_dim=6, depth=1, num_heads=3, num_classes=0,
            mlp_ratio=1, class_token=False, global_pool="avg",
        )  # fmt: skip
        with LargestTensor() as seen:
            linearize(vit)(torch.rand(1, 3, side, side)).sum().backward()
        largest[side**2] = seen.numel
    assert largest[1024] == 4 * largest[256]
    assert largest[4096] == 16 * largest[256] < 4096**2 / 100


def test_runs_on_the_meta_device():
    q = torch.empty(2, 3, 16, 8, device="meta")
    assert linear_attention(q, q, q).shape == q.shape


def test_a_mask_is_refused():
    vit = linearize(timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=1, num_heads=3))
    with pytest.raises(ValueError, match="no mask"):
        vit(torch.rand(1, 3, 32, 32), is_causal=True)
