"""Segmentation heads: shapes, what they read, their loss against a naive one, and that each can learn."""

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import models
from models.heads.linear import BatchNorm

KWARGS = {
    "linear": {"blocks": 4},
    "upernet": {"channels": 32},
    "mask2former": {"channels": 32, "queries": 6, "layers": 2, "pixel_layers": 1, "points": 128},
}
ARCHITECTURE = {"patch_size": 8, "embed_dim": 48, "depth": 5, "num_heads": 3, "num_classes": 7, "img_size": 32}


def segmenter(head: str, linear: bool = True, classes: int = 3, **kwargs) -> models.Segmenter:
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", **(ARCHITECTURE | kwargs))
    vit = models.linearize(vit) if linear else vit
    return models.Segmenter(vit, models.build_head(head, vit.embed_dim, classes, **KWARGS[head]))


@pytest.mark.parametrize("head", models.HEADS)
def test_logits_have_the_size_of_the_image_whatever_it_is(head: str) -> None:
    model = segmenter(head).eval()
    with torch.no_grad():
        for size in ((32, 32), (40, 64), (33, 50)):
            assert model(torch.randn(2, 3, *size)).shape == (2, 3, *size)


@pytest.mark.parametrize("head", models.HEADS)
def test_a_head_overfits_two_images(head: str) -> None:
    model = segmenter(head, linear=False)
    image = torch.randn(2, 3, 32, 32)
    mask = torch.zeros(2, 32, 32, dtype=torch.uint8)
    mask[0, :16], mask[1, :, 8:24], mask[:, 28:] = 1, 2, models.IGNORE
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(60):
        loss = model(image, mask)["loss"]
        assert loss.shape == (2,)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    with torch.no_grad():
        found = model.eval()(image).argmax(1)
    known = mask != models.IGNORE
    assert (found == mask)[known].float().mean() > 0.97


def test_the_loss_is_the_mean_over_pixels_without_the_ignored() -> None:
    head = models.build_head("upernet", 48, 4, channels=32)
    out, mask = torch.randn(2, 4, 8, 8), torch.randint(0, 4, (2, 16, 16), dtype=torch.uint8)
    mask[0, :5], mask[1] = models.IGNORE, models.IGNORE
    loss = head.loss(out, mask)["loss"]
    chance = nn.functional.interpolate(out, (16, 16), mode="bilinear").softmax(1)
    naive = -sum(chance[0, mask[0, y, x].item(), y, x].log() for y in range(5, 16) for x in range(16)) / 256
    torch.testing.assert_close(loss, torch.stack([naive, torch.zeros(())]), rtol=1e-5, atol=1e-6)


def test_four_blocks_are_read_as_timm_reads_them() -> None:
    model = segmenter("linear").eval()
    image = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        mine = model.features(image)
        theirs = model.backbone.forward_intermediates(image, indices=4, norm=True, intermediates_only=True)
    assert [x.shape for x in mine] == [(2, 48, 4, 6)] * 4
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_another_size_is_what_timm_makes_of_it() -> None:
    """With the weights of one built for that size, and with timm's own `dynamic_img_size`."""
    image = torch.randn(1, 3, 48, 64)
    fixed = timm.create_model("vit_tiny_patch16_224", **ARCHITECTURE).eval()
    model = models.Segmenter(
        timm.create_model("vit_tiny_patch16_224", **ARCHITECTURE), models.build_head("linear", 48, 3)
    ).eval()
    model.backbone.load_state_dict({k: v for k, v in fixed.state_dict().items() if not k.startswith("head.")})
    fixed.set_input_size(img_size=(48, 64))
    with torch.no_grad():
        torch.testing.assert_close(model.backbone(image), fixed.forward_features(image))


def test_batch_norm_is_torchs() -> None:
    torch.manual_seed(0)
    mine, theirs = BatchNorm(5), nn.BatchNorm2d(5)
    with torch.no_grad():
        for norm in (mine, theirs):
            norm.weight.copy_(torch.arange(5) + 0.5)
            norm.bias.copy_(torch.arange(5) - 2.0)
    for _ in range(3):
        x = torch.randn(4, 5, 6, 7) * 3 + 2
        x, y = x.clone().requires_grad_(), x.clone().requires_grad_()
        a, b = mine(x), theirs(y)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        (a * a.detach().cos()).sum().backward()
        (b * b.detach().cos()).sum().backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[name], value)
    torch.testing.assert_close(mine.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


def test_batch_norm_keeps_its_statistics_in_fp32() -> None:
    norm = BatchNorm(2).bfloat16()
    for _ in range(200):
        norm(torch.randn(8, 2, 4, 4, dtype=torch.bfloat16) + 3)
    assert norm.running_mean.dtype == torch.float32 and norm.weight.dtype == torch.bfloat16
    torch.testing.assert_close(norm.running_mean, torch.full((2,), 3.0), rtol=0.02, atol=0)
    assert norm.to("meta").running_mean.is_meta


def test_layer_decay_and_weight_decay_know_backbone_and_head() -> None:
    from timm.optim import param_groups_layer_decay

    model = segmenter("upernet")
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    of = {id(p): group for group in groups for p in group["params"]}
    backbone, head = model.backbone, model.head.classify
    blocks = [block.mlp.fc1.weight for block in backbone.blocks]
    scales = [of[id(p)]["lr_scale"] for p in (backbone.pos_embed, *blocks, head.weight)]
    assert scales == [0.5**n for n in (6, 5, 4, 3, 2, 1, 0)]
    assert of[id(backbone.pos_embed)]["weight_decay"] == 0 and of[id(head.weight)]["weight_decay"] == 0.05


@pytest.mark.parametrize("head", models.HEADS)
def test_an_export_gives_the_segmenter_back(head: str, tmp_path: Path) -> None:
    model = segmenter(head, global_pool="avg", class_token=False, fc_norm=True).eval()
    config = {
        "backbone": {
            "name": "vit_tiny_patch16_224",
            "kwargs": ARCHITECTURE | {"global_pool": "avg", "class_token": False, "fc_norm": True},
        },
        "attention": {"feature_map": "elu1", "linear_blocks": list(range(5))},
        "segmentation": {"head": head, "num_classes": 3, "kwargs": KWARGS[head]},
        "input": {"image_size": 32},
        "lineage": {},
    }
    models.save(tmp_path, model.state_dict(), config)
    again = models.load(tmp_path)
    image = torch.randn(1, 3, 40, 32)
    with torch.no_grad():
        assert torch.equal(again(image), model(image))
    larger = models.load(tmp_path, image_size=64)
    assert models.backbone_of(larger).pos_embed.shape[1] == 64


@pytest.mark.parametrize(
    ("part", "word"),
    [
        (None, "segmentation.head is missing"),
        ({"head": "lineer", "num_classes": 3, "kwargs": {}}, "lineer"),
        ({"head": "upernet", "num_classes": 3, "kwargs": {"channels": 10**9}}, "channels"),
        ({"head": "upernet", "num_classes": 3, "kwargs": {"depth": 3}}, "depth"),
        ({"head": "upernet", "num_classes": 4, "kwargs": {"channels": 32}}, "head.classify.weight"),
        ({"head": "linear", "num_classes": 3, "kwargs": {"blocks": 9}}, "reads 9 blocks"),
    ],
)
def test_an_export_with_another_head_is_named(part: dict | None, word: str, tmp_path: Path) -> None:
    model = segmenter("upernet")
    config = {
        "backbone": {"name": "vit_tiny_patch16_224", "kwargs": ARCHITECTURE},
        "attention": {"feature_map": "elu1", "linear_blocks": list(range(5))},
        "segmentation": part,
    }
    models.save(tmp_path, model.state_dict(), config)
    assert json.loads((tmp_path / "config.json").read_text())["segmentation"] == part
    with pytest.raises(ValueError, match=word):
        models.load(tmp_path)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "eva02_base_patch14_224", "vit_base_patch16_siglip_224"])
def test_other_vits_are_backbones_too(name: str) -> None:
    """Rotary positions, learned ones and attention pooling: every parameter left has a gradient."""
    tiny = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    vit = models.linearize(timm.create_model(name, **tiny))
    model = models.Segmenter(vit, models.build_head("linear", 48, 3, blocks=2))
    mask = torch.randint(0, 3, (2, 48, 40), dtype=torch.uint8)
    model(torch.randn(2, 3, 48, 40), mask)["loss"].mean().backward()
    assert not [key for key, p in model.named_parameters() if p.grad is None]
