"""Every tap against a forward written out by hand."""

import copy

import pytest
import timm
import torch
from timm.layers import SwiGLU
from timm.models.vision_transformer import ResPostBlock
from torch.nn import functional as F

from models import linearize, taps
from models.taps import POINTS

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
    return {**points, "norm": vit.norm(x)}


@pytest.mark.parametrize("norm_after", [False, True], ids=["norm before", "norm after"])
@pytest.mark.parametrize("linear", [False, True], ids=["softmax", "linear"])
@torch.no_grad()
def test_every_point_by_hand(linear, norm_after):
    vit = build(linear, **({"block_fn": ResPostBlock} if norm_after else {}))
    images = torch.randn(2, 3, 32, 32)
    names = ["norm", *(f"blocks.*.{point}" for point in POINTS)]
    with taps(vit, names) as read:
        out = vit(images)
    wanted = by_hand(vit, images, linear, norm_after)
    assert read.keys() == wanted.keys() and len(read) == 2 * len(POINTS) + 1
    for name, tensor in wanted.items():
        torch.testing.assert_close(read[name], tensor, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    assert torch.equal(read["norm"], vit.forward_features(images))
    assert torch.equal(out, vit(images))


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
    with pytest.raises(ValueError, match=r"unknown; use norm or blocks\.<0\.\.1 or \*>"), taps(vit, ["norm", name]):
        pass
    assert hooks(vit) == 0


def test_a_point_that_a_block_lacks():
    vit = build(mlp_layer=SwiGLU)
    with pytest.raises(ValueError, match=r"blocks\.0\.fc1.*\(Block\) has no mlp\.fc1"), taps(vit, ["blocks.0.fc1"]):
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
    names, counts = ["norm", "blocks.*.mha", "blocks.*.heads"], []
    for _ in range(3):
        images = torch.randn(2, 3, 32, 32)
        with taps(vit, names) as wanted:
            vit(images)
        with taps(compiled, names) as read:
            compiled(images)
        counts.append(len(graphs))
        assert read.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(read[name], tensor)
    assert counts[0] == counts[2] > 0
