"""Every tap against a forward written out by hand."""

import copy

import pytest
import timm
import torch
from timm.layers import GluMlp, Mlp
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock
from torch.nn import functional as F

from models import BLOCK_MODULES, attention_entropy, linearize, tap_names, taps
from models.taps import POINTS

ALL = ["patch_embed", *(f"blocks.*.{point}" for point in POINTS), "norm"]
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}


def build(linear=False, **kwargs):
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", **TINY, init_values=0.5, reg_tokens=4, **kwargs).eval()
    with torch.no_grad():
        for weight in vit.parameters():
            weight.normal_(std=0.2)
    return linearize(vit) if linear else vit


def attend(attn, x, linear):
    """Attention output before its projection."""
    q, k, v = (t.reshape(len(x), -1, 3, 16).transpose(1, 2) for t in attn.qkv(x).chunk(3, -1))
    weights = (F.elu(q) + 1) @ (F.elu(k) + 1).mT if linear else (q @ k.mT / 4).exp()
    return (weights / weights.sum(-1, keepdim=True) @ v).transpose(1, 2).reshape(x.shape)


def by_hand(vit, images, linear, norm_after):
    x, points = vit._pos_embed(vit.patch_embed(images)), {}
    for i, block in enumerate(vit.blocks):
        p = {}
        if norm_after:
            p["attn_in"] = x
            p["heads"] = attend(block.attn, x, linear)
            p["mha"] = block.attn.proj(p["heads"])
            p["ln1"] = block.norm1(p["mha"])
            x = p["rc1"] = x + p["ln1"]
            p["fc1"] = block.mlp.fc1(x)
        else:
            p["ln1"] = p["attn_in"] = block.norm1(x)
            p["heads"] = attend(block.attn, p["ln1"], linear)
            p["mha"] = block.attn.proj(p["heads"])
            x = p["rc1"] = x + block.ls1.gamma * p["mha"]
            p["ln2"] = block.norm2(x)
            p["fc1"] = block.mlp.fc1(p["ln2"])
        p["act"] = F.gelu(p["fc1"])
        p["fc2"] = block.mlp.fc2(p["act"])
        if norm_after:
            p["ln2"] = block.norm2(p["fc2"])
        x = p["rc2"] = x + (p["ln2"] if norm_after else block.ls2.gamma * p["fc2"])
        points |= {f"blocks.{i}.{point}": tensor for point, tensor in p.items()}
    return {"patch_embed": vit.patch_embed(images), **points, "norm": vit.norm(x)}


@pytest.mark.parametrize("norm_after", [False, True], ids=["norm before", "norm after"])
@pytest.mark.parametrize("linear", [False, True], ids=["softmax", "linear"])
@torch.no_grad()
def test_every_point_by_hand(linear, norm_after):
    vit = build(linear, **({"block_fn": ResPostBlock} if norm_after else {}))
    images = torch.randn(2, 3, 32, 32)
    with taps(vit, ALL) as read:
        out = vit(images)
    assert_all_read(read, by_hand(vit, images, linear, norm_after))
    assert torch.equal(read["norm"], vit.forward_features(images))
    assert torch.equal(out, vit(images))
    check_pools(vit, images, read)


# timm's Eva as these use it: EVA-02 tiny; EVA-02 base; DINOv3; DINOv3 plus; qk-norm with a packed gate; norms after.
EVAS = {
    "packed gate": {"swiglu_mlp": True, "use_rot_pos_emb": True},
    "normed gate": {"swiglu_mlp": True, "scale_mlp": True, "qkv_fused": False, "use_rot_pos_emb": True},
    "dinov3": {"dynamic_img_size": True, "qkv_bias": False, "init_values": 0.5, "rope_type": "dinov3",
               "rope_rotate_half": True, "use_rot_pos_emb": True, "use_abs_pos_emb": False, "num_reg_tokens": 4,
               "use_fc_norm": False},
    "dinov3 plus": {"swiglu_mlp": True, "swiglu_align_to": 8, "use_rot_pos_emb": True, "num_reg_tokens": 4},
    "qk-norm": {"qk_norm": True, "scale_attn_inner": True, "swiglu_mlp": True},
    "norm after": {"use_post_norm": True},
}  # fmt: skip


def rotated(x, sin_cos, half):
    """Rotary positions on [B, H, N, K]: pairs of neighbours, or of the two halves."""
    sin, cos = sin_cos.chunk(2, -1)
    if half:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin
    a, b = x[..., 0::2], x[..., 1::2]
    return x * cos + torch.stack([-b, a], -1).flatten(-2) * sin


def attend_eva(attn, x, rope):
    """Eva's attention output before its projection."""
    if attn.qkv is None:
        q, k, v = attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    else:
        q, k, v = attn.qkv(x).chunk(3, -1)
        if attn.q_bias is not None:
            q, v = q + attn.q_bias, v + attn.v_bias
    q, k, v = (t.reshape(len(x), -1, 3, 16).transpose(1, 2) for t in (q, k, v))
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        p = attn.num_prefix_tokens
        q, k = (torch.cat([t[:, :, :p], rotated(t[:, :, p:], rope, attn.rotate_half)], 2) for t in (q, k))
    out = ((q @ k.mT / 4).softmax(-1) @ v).transpose(1, 2).reshape(x.shape)
    return attn.norm(out)


def by_hand_eva(vit, images, norm_after):
    patches = vit.patch_embed(images)
    (x, rope), points = vit._pos_embed(patches), {}
    for i, block in enumerate(vit.blocks):
        p, mlp = {}, block.mlp
        p["attn_in"] = x if norm_after else block.norm1(x)
        p["heads"] = attend_eva(block.attn, p["attn_in"], rope)
        p["mha"] = block.attn.proj(p["heads"])
        p["ln1"] = block.norm1(p["mha"]) if norm_after else p["attn_in"]
        x = p["rc1"] = x + (p["ln1"] if norm_after else p["mha"] * (1 if block.gamma_1 is None else block.gamma_1))
        into = x if norm_after else block.norm2(x)
        if isinstance(mlp, Mlp):
            p["fc1"] = mlp.fc1(into)
            p["act"] = F.gelu(p["fc1"])
        else:
            p["fc1"] = mlp.fc1(into) if isinstance(mlp, GluMlp) else torch.cat([mlp.fc1_g(into), mlp.fc1_x(into)], -1)
            gate, value = p["fc1"].chunk(2, -1)
            p["act"] = gate * gate.sigmoid() * value
        p["fc2"] = mlp.fc2(mlp.norm(p["act"]))
        p["ln2"] = block.norm2(p["fc2"]) if norm_after else into
        x = p["rc2"] = x + (p["ln2"] if norm_after else p["fc2"] * (1 if block.gamma_2 is None else block.gamma_2))
        points |= {f"blocks.{i}.{point}": tensor for point, tensor in p.items()}
    return {"patch_embed": patches.flatten(1, -2), **points, "norm": vit.norm(x)}


@pytest.mark.parametrize("variant", EVAS)
@torch.no_grad()
def test_every_point_of_eva_by_hand(variant):
    torch.manual_seed(0)
    plain = {"swiglu_mlp": False, "use_rot_pos_emb": False}
    vit = timm.create_model("eva02_tiny_patch14_224", **TINY | plain | EVAS[variant]).eval()
    for weight in vit.parameters():
        weight.normal_(std=0.2)
    images = torch.randn(2, 3, 32, 32)
    with taps(vit, ALL) as read:
        vit(images)
    assert_all_read(read, by_hand_eva(vit, images, variant == "norm after"))
    assert torch.equal(read["norm"], vit.forward_features(images))
    check_pools(vit, images, read)


def assert_all_read(read, wanted):
    assert read.keys() == wanted.keys() and len(read) == 2 * len(POINTS) + 2
    for name, tensor in wanted.items():
        torch.testing.assert_close(read[name], tensor, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def check_pools(vit, images, tokens):
    """What is pooled where it is read is what pooling the tokens gives."""
    names = [name for name in tokens if name != "patch_embed"]
    with taps(vit, tokens, "mean") as mean, taps(vit, names, "prefix") as prefix, taps(vit, names, "both") as both:
        vit(images)
    for name, tensor in tokens.items():
        torch.testing.assert_close(mean[name], tensor.mean(1))
        if name in names:
            assert torch.equal(prefix[name], tensor[:, 0])
            assert torch.equal(both[name], torch.stack([prefix[name], mean[name]], 1))


def test_names_are_written_out_once_and_in_order():
    vit = build()
    assert tap_names(vit, ["blocks.1.act", "blocks.*.act", "norm"]) == ["blocks.1.act", "blocks.0.act", "norm"]


@torch.no_grad()
def test_pools_are_fp32_under_bf16():
    vit = build(linear=True).bfloat16()
    images = torch.randn(2, 3, 32, 32).bfloat16()
    with taps(vit, ["blocks.0.act"]) as tokens, taps(vit, ["blocks.0.act"], "both") as both:
        vit(images)
    tokens = tokens["blocks.0.act"]
    assert tokens.dtype == torch.bfloat16 and both["blocks.0.act"].dtype == torch.float32
    wanted = torch.stack([tokens[:, 0].float(), tokens.float().mean(1)], 1)
    torch.testing.assert_close(both["blocks.0.act"], wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("names", [["patch_embed"], ["norm"]])
def test_no_prefix_token_to_pool(names):
    vit = build(**({"class_token": False, "global_pool": "avg"} if names == ["norm"] else {}))
    if names == ["norm"]:
        vit.num_prefix_tokens = 0
    with pytest.raises(ValueError, match="has no prefix token"), taps(vit, names, "both"):
        pass
    assert hooks(vit) == 0


def test_taps_carry_gradients_and_are_refilled():
    vit = build(linear=True)
    with taps(vit, ["blocks.1.mha"]) as read:
        vit(torch.randn(2, 3, 32, 32))
        first = read["blocks.1.mha"]
        vit(torch.randn(3, 3, 32, 32))
    assert first.shape == (2, 21, 48) and read["blocks.1.mha"].shape == (3, 21, 48)
    first.sum().backward()
    assert vit.blocks[0].attn.qkv.weight.grad.norm() > 0


def hooks(vit):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in vit.modules())


def test_hooks_are_removed_whatever_happens():
    vit = build()
    with taps(vit, ["norm", "blocks.*.rc1"]):
        assert hooks(vit) == 3
    assert hooks(vit) == 0
    with pytest.raises(RuntimeError), taps(vit, ["norm"]):
        raise RuntimeError
    assert hooks(vit) == 0


@pytest.mark.parametrize("name", ["blocks.2.mha", "blocks.-1.mha", "blocks.0.nope", "blocks.mha", "head", "", "Norm"])
def test_unknown_names(name):
    vit = build()
    with (
        pytest.raises(ValueError, match=r"unknown; use patch_embed, norm or blocks\.<0\.\.1 or \*>"),
        taps(vit, ["norm", name]),
    ):
        pass
    assert hooks(vit) == 0


def test_a_point_that_a_block_lacks():
    vit = build(block_fn=ParallelScalingBlock)
    with (
        pytest.raises(ValueError, match=r"blocks\.0\.fc1.*\(ParallelScalingBlock\) has no"),
        taps(vit, ["blocks.0.fc1"]),
    ):
        pass


@pytest.mark.parametrize("part", ["attn", "block"])
@torch.no_grad()
def test_taps_read_compiled_blocks_and_compile_them_once(part):
    """Hooks come and go with every step of a trainer: the values are right, and nothing is compiled again."""
    vit, graphs = build(linear=True), []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = copy.deepcopy(vit)
    for block in compiled.blocks:
        (block if part == "block" else block.attn).compile(backend=backend)
    names, counts = ["norm", *(f"blocks.*.{point}" for point in ("mha", "heads", *BLOCK_MODULES))], []
    for _ in range(3):
        images = torch.randn(2, 3, 32, 32)
        with taps(vit, names) as wanted:
            vit(images)
        with taps(compiled, names) as read:
            compiled(images)
        with taps(vit, names, "both") as pooled, taps(compiled, names, "both") as read_pooled:
            vit(images)
            compiled(images)
        torch.testing.assert_close(dict(read_pooled), dict(pooled))
        counts.append(len(graphs))
        assert read.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(read[name], tensor)
    assert counts[0] == counts[2] > 0


ENTROPY = {
    "vit": ("vit_tiny_patch16_224", {"qk_norm": True, "reg_tokens": 2}),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "eva02": ("eva02_tiny_patch14_224", {}),
    "naver": ("vit_base_patch16_rope_224.naver_in1k", {}),
}


@pytest.mark.parametrize("family", ENTROPY)
def test_entropy_of_softmax_attention(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against that of the queries and keys which torch's own fused attention is called with."""
    torch.manual_seed(0)
    name, kwargs = ENTROPY[family]
    vit = timm.create_model(name, **TINY | {"embed_dim": 48, "num_heads": 3}, **kwargs).eval()
    with torch.no_grad():
        for block in vit.blocks:
            for weight in block.attn.parameters():
                if weight.ndim == 2:
                    weight.normal_(std=0.3)
    images, fused, expected = torch.randn(2, 3, 32, 32), F.scaled_dot_product_attention, []

    def spy(q, k, v, **options):
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        nats = -(weights * weights.log()).sum(-1).mean((1, 2))
        expected.append(nats / torch.tensor(float(k.shape[-2])).log())
        return fused(q, k, v, **options)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(F, "scaled_dot_product_attention", spy)
        for block in vit.blocks:
            block.attn.fused_attn = True
        out = vit(images)
    with attention_entropy(vit) as found, torch.no_grad():
        torch.testing.assert_close(vit(images), out, rtol=1e-4, atol=1e-4)
    assert list(found) == [0, 1] == list(range(len(expected)))
    torch.testing.assert_close(torch.stack(list(found.values())), torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert all(0.05 < x < 0.99 for x in torch.stack(expected).flatten())
    assert all(block.attn.fused_attn for block in vit.blocks)
    with attention_entropy(linearize(vit, keep_softmax=[1])) as found:
        pass
    assert found == {}
