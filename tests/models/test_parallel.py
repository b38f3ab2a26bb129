"""Parallel blocks: the same function with one attention and one MLP, from a file, in an export, tapped."""

import copy
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock

from models import build_backbone, linear_blocks, linearize, load, save, taps
from models.parallel import with_plain_blocks

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
KINDS = {
    "split": ("vit_pwee_patch16_reg1_gap_256", {}),
    "joined": ("vit_small_patch16_18x2_224", {"init_values": 0.5}),
    "split, with qk-norm and one bias": (
        "vit_small_patch16_224",
        {"block_fn": ParallelScalingBlock, "qkv_bias": False, "qk_norm": True},
    ),
    "joined, without biases": ("vit_small_patch16_224", {"block_fn": ParallelThingsBlock, "qkv_bias": False}),
}


def build(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    name, kwargs = KINDS[kind]
    vit = timm.create_model(name, **TINY | kwargs).eval()
    with torch.no_grad():
        for p in vit.parameters():
            p.normal_(std=0.2)
    return vit


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_function(kind: str) -> None:
    vit, x = build(kind).double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    plain = with_plain_blocks(copy.deepcopy(vit))
    torch.testing.assert_close(plain(x), vit(x), rtol=1e-10, atol=1e-10)
    one, other = (model(x).square().sum() for model in (vit, plain))
    (one_of,), (other_of,) = (torch.autograd.grad(y, [m.pos_embed]) for y, m in ((one, vit), (other, plain)))
    torch.testing.assert_close(other_of, one_of, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["split", "joined"])
def test_from_a_file_to_an_export(kind: str, tmp_path: Path) -> None:
    vit, x = build(kind), torch.randn(2, 3, 32, 32)
    name, kwargs = KINDS[kind]
    save_file(vit.state_dict(), tmp_path / "weights.safetensors")
    teacher = build_backbone(name, TINY | kwargs, tmp_path / "weights.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(teacher(x), vit(x), rtol=1e-4, atol=1e-4)
    with taps(teacher, ["blocks.*.attn_in", "blocks.*.mha", "blocks.*.fc1"]) as read, torch.no_grad():
        teacher(x)
    assert set(read) == {f"blocks.{i}.{point}" for i in range(2) for point in ("attn_in", "mha", "fc1")}
    for keep in ([], [1], [0, 1]):
        student = linearize(teacher, "focused", keep)
        attention = {
            "operator": "focused",
            "kwargs": {"power": 6},
            "additions": [],
            "linear_blocks": linear_blocks(student),
        }
        config = {"backbone": {"name": name, "kwargs": TINY | kwargs}, "attention": attention, "lineage": {}}
        config["input"] = {"image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
        config["input"] |= {"crop_pct": 0.9, "interpolation": "bicubic"}
        save(tmp_path / "export", student.state_dict(), config)
        loaded = load(tmp_path / "export")
        assert linear_blocks(loaded) == [i for i in range(2) if i not in keep]
        with torch.no_grad():
            assert torch.equal(loaded(x), student.eval()(x))


def test_what_cannot_be_joined_is_named() -> None:
    vit = timm.create_model("vit_small_patch16_18x2_224", **TINY, qk_norm=True)
    with pytest.raises(ValueError, match=r"block 0 \(ParallelThingsBlock\): only attentions without norms"):
        linearize(vit)
