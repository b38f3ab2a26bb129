"""timm's Eva (EVA-02, DINOv3, PE, ...): conversion of models with rotary positions, at tiny sizes."""

import pytest
import timm
import torch
from torch.nn import functional as F

from models import OPERATORS, fingerprint, linear_blocks, linearize, load, rotary_embeddings, save, take_any_size, taps
from models.operators import Operator

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
# timm's own architectures, and what of them is made smaller.
EVAS = {
    "eva02_tiny_patch14_224": {},  # biases beside a fused projection, positions of both kinds
    "eva02_base_patch14_224": {},  # separate projections, norms within the MLP
    "eva_giant_patch14_224": {},  # positions added, none rotary
    "vit_small_patch16_dinov3": {},
    "vit_small_plus_patch16_dinov3": {},
    "vit_pe_core_tiny_patch16_384": {},
    "vit_pe_spatial_tiny_patch16_512": {},
    "vit_medium_patch16_rope_reg1_gap_256": {},
    "vit_small_patch16_rope_mixed_224": {},  # frequencies learned, for each head and block
    "vit_small_patch16_rope_mixed_ape_224": {},
    "grouped queries": {"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 1, "use_rot_pos_emb": True},
    "norms of attention": {"qk_norm": True, "scale_attn_inner": True, "use_rot_pos_emb": True},
    "norms after": {"use_post_norm": True, "use_rot_pos_emb": True, "rope_type": "dinov3", "rope_rotate_half": True},
}


def build(name, **kwargs):
    """In eval mode, fp64, every weight random, biases and layer scale too."""
    torch.manual_seed(0)
    if timm.is_model(name):
        vit = timm.create_model(name, **{**TINY, **EVAS[name], **kwargs})
    else:
        vit = timm.models.Eva(**{**TINY, **EVAS[name], **kwargs})
    with torch.no_grad():
        for key, weight in vit.named_parameters():
            weight.normal_(std=0.2) if key != "rope.freqs" else None
    return vit.double().eval()


def images(*size):
    return torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Softmax(Operator):
    """In place of a linear operator."""

    def forward(self, q, k, v, x, grid):
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("name", EVAS)
@torch.no_grad()
def test_with_softmax_for_its_operator_it_is_timms(name, monkeypatch):
    """Projections, biases, norms, gate, grouping, and the rotation, at the model's size and at others."""
    monkeypatch.setitem(OPERATORS, "softmax", Softmax)
    for kwargs in ({}, {"dynamic_img_size": True}):
        vit = build(name, **kwargs)
        student = linearize(vit, "softmax")
        assert linear_blocks(student) == [0, 1]
        torch.testing.assert_close(student(images(32, 32)), vit(images(32, 32)), rtol=1e-10, atol=1e-10)
        if kwargs:
            torch.testing.assert_close(student(images(48, 64)), vit(images(48, 64)), rtol=1e-10, atol=1e-10)
    for model in (vit, student):
        model.set_input_size((48, 64))
    wanted = vit(images(48, 64))
    torch.testing.assert_close(student(images(48, 64)), wanted, rtol=1e-10, atol=1e-10)
    fixed = build(name)
    take_any_size(fixed)
    resized = fixed(images(48, 64))
    if fixed.pos_embed is None:  # else the other's were resized twice
        torch.testing.assert_close(resized, wanted, rtol=1e-5, atol=1e-5)  # a table is made in fp32
    torch.testing.assert_close(resized, build(name, dynamic_img_size=True)(images(48, 64)), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_rotary_positions_come_before_the_feature_map():
    """A block's heads by hand: a mean of the values, weighted by phi(R q) phi(R k)."""
    vit = build("vit_small_patch16_dinov3")
    student = linearize(vit)
    attn, tokens = student.blocks[1].attn, torch.randn(2, 5 + 16, 48, dtype=torch.float64)
    rope = rotary_embeddings(student, (32, 32))[1]
    assert student.num_prefix_tokens == 5 and rope.shape == (16, 32)
    q, k, v = (t.reshape(2, 21, 3, 16).transpose(1, 2) for t in attn.qkv(tokens).chunk(3, -1))
    sin, cos = rope.chunk(2, -1)

    def phi(x):
        a, b = x[:, :, 5:].chunk(2, -1)
        turned = torch.cat([x[:, :, :5], x[:, :, 5:] * cos + torch.cat([-b, a], -1) * sin], 2)
        return torch.where(turned > 0, turned + 1, turned.clamp(max=0).exp())

    weights = phi(q) @ phi(k).mT
    assert (weights > 0).all()
    wanted = (weights / weights.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attn(tokens, rope=rope), attn.proj(wanted), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(attn(tokens), attn(tokens, rope=rope))


@pytest.mark.parametrize("name", EVAS)
@torch.no_grad()
def test_rotary_embeddings_are_what_the_blocks_are_given(name):
    for kwargs, size in (({}, (32, 32)), ({"dynamic_img_size": True}, (48, 64))):
        vit, given = build(name, **kwargs), []

        def note(module, args, kwargs, given=given):
            given.append(kwargs["rope"])

        for block in vit.blocks:
            block.attn.register_forward_pre_hook(note, with_kwargs=True)
        vit(images(*size))
        for mine, theirs in zip(rotary_embeddings(vit, size), given, strict=True):
            assert (mine is None and theirs is None) or torch.equal(mine, theirs)


@pytest.mark.parametrize("name", EVAS)
def test_conversion_copies_every_weight_and_trains(name):
    vit = build(name)
    student = linearize(vit)
    assert list(student.state_dict()) == list(vit.state_dict()) and fingerprint(student) == fingerprint(vit)
    with taps(student, ["blocks.*.mha", "norm"]) as read:
        out = student(images(32, 32))
    assert torch.equal(read["norm"], student.forward_features(images(32, 32)))
    out.square().sum().backward()
    grads = [p.grad for p in student.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
    mine = list(student.blocks[0].attn.qkv_parameters())
    names = ("qkv.", "q_proj", "k_proj", "v_proj", "q_bias", "v_bias")
    wanted = [p for key, p in student.blocks[0].attn.named_parameters() if key.startswith(names)]
    assert {id(p) for p in mine} == {id(p) for p in wanted} and all(p.grad.norm() > 0 for p in mine)
    student.zero_grad()
    student.set_grad_checkpointing()
    student(images(32, 32)).square().sum().backward()
    for p, grad in zip(student.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "vit_pe_core_tiny_patch16_384"])
@torch.no_grad()
def test_exports_of_eva(tmp_path, name):
    student = linearize(build(name).float(), keep_softmax=[1])
    config = {
        "backbone": {"name": name, "kwargs": TINY},
        "attention": {"feature_map": "elu1", "linear_blocks": [0]},
        "input": {"image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0},
    }
    save(tmp_path, student.state_dict(), config)
    loaded = load(tmp_path)
    assert linear_blocks(loaded) == [0] and fingerprint(loaded) == fingerprint(student)
    assert torch.equal(loaded(images(32, 32).float()), student(images(32, 32).float()))
    student.set_input_size((48, 64))
    assert torch.equal(load(tmp_path, (48, 64))(images(48, 64).float()), student(images(48, 64).float()))
