"""Conversion of real timm architectures, at tiny sizes."""

import pytest
import timm
import torch
from timm.models.vision_transformer import ResPostBlock
from torch.nn import functional as F

from models import OPERATORS, LinearAttention, borrowed_attention, fingerprint, linear_blocks, linearize

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
SHAPES = {
    "plain": {},
    "qk_norm": {"qk_norm": True},
    "attention norms": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "layer scale": {"init_values": 0.1},
    "registers": {"reg_tokens": 4},
    "registers, class token without position": {"reg_tokens": 4, "no_embed_class": True},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "registers only": {"class_token": False, "reg_tokens": 4, "global_pool": "avg"},
    "average of patches": {"global_pool": "avg"},
    "attention pooling": {"class_token": False, "global_pool": "map"},
    "norms after": {"block_fn": ResPostBlock, "init_values": 0.1},
    "dynamic size": {"dynamic_img_size": True},
}


def build(name="vit_tiny_patch16_224", seed=0, **kwargs):
    """A tiny `name` in eval mode whose every weight, biases and layer scale too, is random."""
    torch.manual_seed(seed)
    vit = timm.create_model(name, **{**TINY, **kwargs}).eval()
    with torch.no_grad():
        for weight in vit.parameters():
            weight.normal_(std=0.2)
    return vit


def images(side=32):
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_softmax_kept_everywhere_is_the_original_to_the_bit(shape):
    vit = build(**SHAPES[shape])
    student = linearize(vit, keep_softmax=range(2))
    x = images()
    assert linear_blocks(student) == []
    assert torch.equal(student(x), vit(x))
    assert torch.equal(student.forward_features(x), vit.forward_features(x))
    if shape == "dynamic size":
        assert torch.equal(student(images(48)), vit(images(48)))


@pytest.mark.parametrize("shape", SHAPES)
def test_conversion_copies_every_weight_and_leaves_the_original(shape):
    vit = build(**SHAPES[shape])
    before, modules, out = fingerprint(vit), [type(m) for m in vit.modules()], vit(images())
    student = linearize(vit)
    assert linear_blocks(student) == [0, 1]
    assert list(student.state_dict()) == list(vit.state_dict())
    assert fingerprint(student) == before
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in vit.parameters()}

    got = student(images())
    assert got.shape == out.shape and not torch.allclose(got, out)
    got.sum().backward()
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(1)
    assert fingerprint(vit) == before and [type(m) for m in vit.modules()] == modules
    assert all(p.grad is None for p in vit.parameters())
    assert torch.equal(vit(images()), out)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_timm_interface_works(shape):
    vit = build(**SHAPES[shape])
    student = linearize(vit)
    x = images()
    tokens = student.forward_features(x)
    assert tokens.shape == vit.forward_features(x).shape
    last, layers = student.forward_intermediates(x)
    assert torch.equal(last, tokens)
    assert [layer.shape for layer in layers] == [(2, 48, 4, 4)] * 2
    assert torch.equal(student.forward_head(tokens), student(x))
    assert student.get_classifier() is student.head

    student.set_grad_checkpointing()
    student.zero_grad()
    student(x).square().sum().backward()
    checkpointed = [p.grad for p in student.parameters()]
    student.set_grad_checkpointing(False)
    student.zero_grad()
    student(x).square().sum().backward()
    for a, p in zip(checkpointed, student.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad)

    student.reset_classifier(7)
    assert student(x).shape == (2, 7)
    assert vit.head.out_features == 5


@pytest.mark.parametrize("operator", OPERATORS)
def test_gradients_reach_q_k_and_v(operator):
    student = linearize(build(), operator)
    student(images()).square().sum().backward()
    for block in student.blocks:
        q, k, v = block.attn.qkv.weight.grad.chunk(3)
        assert all(grad.isfinite().all() and grad.norm() > 0 for grad in (q, k, v))


@pytest.mark.parametrize(("keep", "linear"), [((), [0, 1, 2]), ([1], [0, 2]), ((-1,), [0, 1]), ({0, -3, 2}, [1])])
@torch.no_grad()
def test_some_blocks_keep_softmax(keep, linear):
    vit = build(depth=3)
    student = linearize(vit, keep_softmax=keep)
    assert linear_blocks(student) == linear
    x = torch.randn(2, 17, 48)
    for i in range(3):
        assert torch.equal(student.blocks[i](x), vit.blocks[i](x)) == (i not in linear)


@torch.no_grad()
def test_a_block_that_attends_as_another_models():
    vit = build(depth=3)
    student, x = linearize(vit), images()
    before, first = student(x), linearize(vit, keep_softmax=[1, 2])(x)
    with borrowed_attention(student, vit, [1]):
        assert linear_blocks(student) == [0, 2]
        assert torch.equal(student(x), linearize(vit, keep_softmax=[1])(x))
    with pytest.raises(RuntimeError), borrowed_attention(vit, student, [0]):
        assert torch.equal(vit(x), first)
        raise RuntimeError
    assert linear_blocks(vit) == [] and torch.equal(student(x), before)


def test_frozen_and_training_stay_as_they_were():
    vit = build().train()
    vit.patch_embed.requires_grad_(False)
    student = linearize(vit)
    assert student.training and student.blocks[0].attn.training
    assert [p.requires_grad for p in student.parameters()] == [p.requires_grad for p in vit.parameters()]


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


# What timm builds each family's block of: (LayerNorm's epsilon, activation, prefix tokens).
FAMILIES = {
    "vit_small_patch14_dinov2": (1e-6, F.gelu, 1),
    "vit_small_patch14_reg4_dinov2": (1e-6, F.gelu, 5),
    "vit_base_patch16_clip_224": (1e-5, F.gelu, 1),
    "vit_base_patch16_clip_quickgelu_224": (1e-5, quick_gelu, 1),
    "vit_base_patch16_siglip_224": (1e-6, F.gelu, 0),
    "vit_so400m_patch16_siglip_256": (1e-6, gelu_tanh, 0),
    "deit3_small_patch16_224": (1e-6, F.gelu, 1),
    "deit_tiny_patch16_224": (1e-6, F.gelu, 1),
    "deit_tiny_distilled_patch16_224": (1e-6, F.gelu, 2),
    "vit_base_patch16_224.mae": (1e-6, F.gelu, 1),
}


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_block_of_each_family_by_hand(name):
    """One linear block in plain torch, from the original's weights, in fp64."""
    eps, act, prefix = FAMILIES[name]
    vit = build(name).double()
    assert vit.num_prefix_tokens == prefix
    student = linearize(vit)
    w = {key.removeprefix("blocks.1."): value for key, value in vit.state_dict().items() if "blocks.1." in key}
    x = torch.randn(2, prefix + 16, 48, dtype=torch.float64)

    def norm(x, of):
        return F.layer_norm(x, (48,), w[f"{of}.weight"], w[f"{of}.bias"], eps)

    def linear(x, of):
        return x @ w[f"{of}.weight"].T + w[f"{of}.bias"]

    q, k, v = (t.reshape(2, -1, 3, 16).transpose(1, 2) for t in linear(norm(x, "norm1"), "attn.qkv").chunk(3, -1))
    weights = (F.elu(q) + 1) @ (F.elu(k) + 1).mT
    heads = weights / weights.sum(-1, keepdim=True) @ v
    wanted = x + w.get("ls1.gamma", 1) * linear(heads.transpose(1, 2).reshape(2, -1, 48), "attn.proj")
    hidden = act(linear(norm(wanted, "norm2"), "mlp.fc1"))
    wanted = wanted + w.get("ls2.gamma", 1) * linear(hidden, "mlp.fc2")

    assert ("ls1.gamma" in w) == ("dinov2" in name or "deit3" in name)
    torch.testing.assert_close(student.blocks[1](x), wanted, rtol=1e-10, atol=1e-10)
    assert isinstance(student.blocks[1].attn, LinearAttention)


SMALL_SWIN = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 24, "depths": (1, 1), "num_heads": (1, 1)}
SMALL_VIT = {key: value for key, value in TINY.items() if key != "num_classes"}
REFUSED = {
    "swin_tiny_patch4_window7_224": (SMALL_SWIN, "SwinTransformer"),
    "vit_relpos_small_patch16_224": (SMALL_VIT, "VisionTransformerRelPos"),
    "beit_base_patch16_224": (SMALL_VIT, "Beit"),
    "beitv2_base_patch16_224": (SMALL_VIT, "Beit"),
    "resnet18": ({}, "ResNet"),
    "differential": ({**SMALL_VIT, "attn_layer": "diff", "num_heads": 2}, "block 0 has DiffAttention"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_linearised_is_refused_by_name(name):
    kwargs, named = REFUSED[name]
    model = timm.create_model(name if timm.is_model(name) else "vit_tiny_patch16_224", **kwargs)
    with pytest.raises(ValueError, match=named) as error:
        linearize(model)
    assert "\n" not in str(error.value)


def test_bad_arguments_are_named():
    vit = build()
    with pytest.raises(ValueError, match=r"keep_softmax \[2, -3\].*0 to 1"):
        linearize(vit, keep_softmax=[0, 2, -3])
    for keep in ((), range(2)):
        with pytest.raises(ValueError, match=r"'cosine'.*elu1"):
            linearize(vit, "cosine", keep_softmax=keep)
    with pytest.raises(ValueError, match="block 0 has LinearAttention"):
        linearize(linearize(vit))
