"""Teachers of transformers by `hf:`, from random weights that transformers itself writes."""

import json
import shutil

import pytest
import torch
import transformers as hf
from huggingface_hub import constants

from models import architecture, build_backbone, linearize
from models.hf import DEFAULTS

SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
WIDE = {**SMALL, "intermediate_size": 100}  # no multiple of the width
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
NAFLEX = {key: value for key, value in WIDE.items() if key != "image_size"} | {"num_patches": 16}
# name -> what transformers builds, and timm's architecture for it
CHECKPOINTS = {
    "dinov2": (lambda: hf.Dinov2Model(hf.Dinov2Config(**SMALL)), "vit_small_patch14_dinov2"),
    "dinov2 giant": (lambda: hf.Dinov2Model(hf.Dinov2Config(**SMALL, use_swiglu_ffn=True)), "vit_giant_patch14_dinov2"),
    "dinov2 classifier": (lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**SMALL)),
                          "vit_small_patch14_dinov2"),
    "registers": (lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**SMALL, num_register_tokens=3)),
                  "vit_small_patch14_dinov2"),
    "dinov3": (lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**{**WIDE, "num_register_tokens": 4})),
               "vit_small_patch16_dinov3_qkvb"),
    "clip": (lambda: hf.CLIPModel(hf.CLIPConfig(text_config=TEXT, vision_config=WIDE, projection_dim=20)),
             "vit_base_patch16_clip_quickgelu_224"),
    "clip tower": (lambda: hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**WIDE, projection_dim=20)),
                   "vit_base_patch16_clip_quickgelu_224"),
    "clip of laion": (lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**WIDE, hidden_act="gelu")),
                      "vit_base_patch16_clip_224"),
    "siglip": (lambda: hf.SiglipModel(hf.SiglipConfig(text_config=TEXT, vision_config=WIDE)),
               "vit_base_patch16_siglip_224"),
    "siglip tower": (lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**WIDE)), "vit_base_patch16_siglip_224"),
    "siglip headless": (lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**WIDE, vision_use_head=False)),
                        "vit_base_patch16_siglip_224"),
    "siglip2": (lambda: hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**NAFLEX)), "vit_base_patch16_siglip_224"),
}  # fmt: skip


def spread(model):
    """Every weight random, those too that transformers starts from constants."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.2)
    return model.eval()


def features(model, x):
    """The last tokens after the last norm, and the image's own vector, as transformers has them; None for none."""
    if isinstance(model, hf.CLIPModel | hf.CLIPVisionModelWithProjection):
        inner = model.vision_model
        last = inner.post_layernorm(inner(x).last_hidden_state)
        return last, model.visual_projection(last[:, 0])
    if isinstance(model, hf.CLIPVisionModel):
        norm = next(m for name, m in model.named_modules() if name.endswith("post_layernorm"))
        return norm(model(x).last_hidden_state), None
    if isinstance(model, hf.Siglip2VisionModel):  # patches row by row, channels last
        patches = x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).reshape(len(x), 16, -1)
        shapes, mask = torch.tensor([[4, 4]] * len(x)), torch.ones(len(x), 16, dtype=torch.long)
        out = model(patches, pixel_attention_mask=mask, spatial_shapes=shapes)
        return out.last_hidden_state, out.pooler_output
    if isinstance(model, hf.SiglipModel):
        model = model.vision_model
    if isinstance(model, hf.Dinov2ForImageClassification):
        model = model.dinov2
    out = model(x)
    pooled = out.pooler_output if isinstance(out.pooler_output, torch.Tensor) else None
    return out.last_hidden_state, pooled


@pytest.mark.parametrize("name", CHECKPOINTS)
@torch.no_grad()
def test_features_are_those_of_transformers(name, tmp_path):
    make, wanted = CHECKPOINTS[name]
    model = spread(make())
    model.save_pretrained(tmp_path, max_shard_size="60KB" if name == "siglip" else "1GB")
    assert (tmp_path / "model.safetensors.index.json").is_file() == (name == "siglip")
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4] * 3})
    )
    vit = build_backbone(f"hf:{tmp_path}")
    arch, kwargs = architecture(f"hf:{tmp_path}")
    assert arch == wanted and json.loads(json.dumps(kwargs)) == kwargs and "pretrained_cfg_overlay" not in kwargs
    assert vit.pretrained_cfg["mean"] == (0.1, 0.2, 0.3) and tuple(vit.patch_embed.img_size) == (32, 32)
    x = torch.randn(2, 3, 32, 32)
    tokens, pooled = features(model, x)
    torch.testing.assert_close(vit.forward_features(x), tokens, rtol=1e-4, atol=1e-4)
    if pooled is not None:
        torch.testing.assert_close(vit(x), pooled, rtol=1e-4, atol=1e-4)
    assert linearize(vit)(x).shape == vit(x).shape
    larger = build_backbone(f"hf:{tmp_path}", image_size=48)
    assert larger.forward_features(torch.randn(1, 3, 48, 48)).shape[1] == 36 + vit.num_prefix_tokens
    untrained = build_backbone(f"hf:{tmp_path}", pretrained=False)
    assert not torch.equal(untrained.patch_embed.proj.weight, vit.patch_embed.proj.weight)


def test_what_a_config_leaves_out_is_what_transformers_assumes():
    for kind, defaults in DEFAULTS.items():
        config = hf.AutoConfig.for_model(kind)
        for key, value in defaults.items():
            theirs = getattr(config, key) if key != "rope_theta" else 100.0
            assert theirs == value, (kind, key)


def bad(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def folder(tmp_path):
    hf.Dinov2Model(hf.Dinov2Config(**SMALL)).save_pretrained(tmp_path / "dinov2")
    return tmp_path / "dinov2"


MISTAKES = {
    "no ViT": (lambda f: bad(f, model_type="resnet"), "its config.json describes a 'resnet'; of transformers clip"),
    "no type": (lambda f: bad(f, model_type=None), "describes a None"),
    "grey": (lambda f: bad(f, num_channels=1), "num_channels 1: images have 3 channels here"),
    "activation": (lambda f: bad(f, hidden_act="relu"), "hidden_act 'relu': must be one of gelu"),
    "epsilon": (lambda f: bad(f, layer_norm_eps=0.1), "layer_norm_eps 0.1: timm's has 1e-06"),
    "a word": (lambda f: bad(f, hidden_size="wide"), "hidden_size 'wide'"),
    "a depth below": (lambda f: bad(f, num_hidden_layers=-1), "num_hidden_layers -1"),
    "other weights": (lambda f: bad(f, num_hidden_layers=3), "does not fit the model: 14 missing"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has none of model.safetensors"),
    "not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "config.json is no JSON object"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json of transformers"),
    "gone": (shutil.rmtree, "no such folder, and no OWNER/NAME on the hub"),
    "elsewhere": (lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../secret.safetensors"}}))), "it names files elsewhere"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, folder):
    spoil, said = MISTAKES[name]
    spoil(folder)
    with pytest.raises(ValueError) as error:
        build_backbone(f"hf:{folder}")
    assert said in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 700


def test_the_hub_out_of_reach_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"config\.json cannot be had from the hub .*hf:FOLDER") as error:
        build_backbone("hf:nobody/nothing")
    assert "\n" not in str(error.value)
