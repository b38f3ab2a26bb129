"""Weights as others write them: which reading of a file fits, what it leaves out, and what is said of it."""

import argparse
import contextlib
import io
import warnings

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from models import build_backbone, fingerprint, linearize, load, read_weights, save

NAME = "vit_tiny_patch16_224"
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
BARE = {key: value for key, value in TINY.items() if key != "img_size"}
DINOV3, EVA02, CLIP = "vit_small_patch16_dinov3", "eva02_tiny_patch14_224", "vit_base_patch16_clip_224"


def build(name=NAME, seed=0, **kwargs):
    torch.manual_seed(seed)
    vit = timm.create_model(name, **{**TINY, "num_classes": 0, **kwargs}).eval()
    with torch.no_grad():
        for weight in vit.parameters():
            weight.normal_(std=0.2)
    return vit


def under(prefix, state):
    return {f"{prefix}{key}": value for key, value in state.items()}


def read(tmp_path, content, name=NAME, kwargs=TINY, **more):
    torch.save(content, tmp_path / "w.pth")
    with contextlib.redirect_stdout(said := io.StringIO()):
        built = build_backbone(name, kwargs, tmp_path / "w.pth", **more)
    assert said.getvalue() == ""
    return built


STATE, OTHER = build().state_dict(), build(seed=1).state_dict()
DINO_HEAD = {"mlp.0.weight": torch.ones(4, 48), "last_layer.weight_v": torch.ones(3, 3)}
TEXT = {"transformer.resblocks.0.attn.in_proj_weight": torch.ones(9, 3), "positional_embedding": torch.ones(4, 3),
        "token_embedding.weight": torch.ones(5, 3), "logit_scale": torch.tensor(3.0)}  # fmt: skip

ONE_READING = {
    **{prefix: under(prefix, STATE) for prefix in (
        "teacher.", "backbone.", "model.", "module.", "student.", "encoder.", "visual.", "image_encoder.",
        "vision_model.", "net.0.", "module.teacher.backbone.", "_orig_mod.module.")},
    "nested": {"teacher": {**under("backbone.", STATE), "dino_head.last": torch.ones(3)}, "epoch": 3},
    "nested twice": {"state_dict": {"model": STATE}},
    "DINO's head": {"teacher": {**under("backbone.", STATE), **under("head.", DINO_HEAD)}},
    "the same twice": {"state_dict": STATE, "state_dict_ema": dict(STATE)},
    "MAE's decoder": {"model": {**STATE, "mask_token": torch.ones(1, 1, 48), "decoder_norm.weight": torch.ones(4)}},
    "iBOT's mask": {**STATE, "masked_embed": torch.ones(1, 48)},
    "I-JEPA": {"encoder": under("module.", STATE), "predictor": under("module.", DINO_HEAD)},
    "open_clip": {**under("visual.trunk.", STATE), **under("text.", TEXT)},
    "optimizer": {"model": STATE, "optimizer": {"state": {0: {"exp": torch.ones(3)}}}, "args": argparse.Namespace()},
    "compiled blocks": {key.replace("blocks.0.", "blocks.0._orig_mod."): value for key, value in STATE.items()},
    "chunks of blocks": {key.replace("blocks.", "blocks.0."): value for key, value in STATE.items()},
}  # fmt: skip


@pytest.mark.parametrize("content", ONE_READING.values(), ids=ONE_READING)
def test_one_reading_fits(tmp_path, content):
    assert fingerprint(read(tmp_path, content)) == fingerprint(STATE)


TWO_READINGS = {
    ("teacher.backbone.*", "student.module.backbone.*"): {
        "teacher": under("backbone.", STATE), "student": under("module.backbone.", OTHER)},
    ("state_dict.*", "state_dict_ema.*"): {"state_dict": STATE, "state_dict_ema": OTHER},
    ("encoder.module.*", "target_encoder.module.*"): {
        "encoder": under("module.", STATE), "target_encoder": under("module.", OTHER)},
    ("module.base_encoder.*", "module.momentum_encoder.*"): {
        **under("module.base_encoder.", STATE), **under("module.momentum_encoder.", OTHER)},
    ("names without a prefix", "ema.*"): {**STATE, **under("ema.", OTHER)},
}  # fmt: skip


@pytest.mark.parametrize("content", TWO_READINGS.values(), ids=map(" ".join, TWO_READINGS))
def test_two_readings_are_named_and_one_is_chosen(tmp_path, content):
    names = next(names for names, value in TWO_READINGS.items() if value is content)
    with pytest.raises(ValueError, match="holds 2 networks that fit") as error:
        read(tmp_path, content)
    assert all(name in str(error.value) for name in names) and "--teacher.weights_key" in str(error.value)
    for name, state in zip(names, (STATE, OTHER), strict=True):
        key = name.removesuffix("*") if name.endswith("*") else ""
        assert fingerprint(read(tmp_path, content, weights_key=key)) == fingerprint(state)
    with pytest.raises(ValueError, match=r"no ViT under teacher\.weights_key 'nobody'; it holds"):
        read(tmp_path, content, weights_key="nobody")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"model": under("backbone.", {k: v for k, v in STATE.items() if "blocks.1" not in k})},
         r"model\.backbone\.\* does not fit the model: 12 missing"),
        ({**STATE, "adapter.weight": torch.ones(3)}, r"1 unexpected \(adapter\.weight\)"),
        ({"layer1.conv1.weight": torch.ones(3), "fc.bias": torch.ones(3)}, r"no patch embedding.* layer1\.\*, fc\.\*"),
        ({**STATE, "reg_token": torch.ones(1, 4, 48)}, r"1 unexpected \(reg_token\)"),
    ],
)  # fmt: skip
def test_no_reading_fits(tmp_path, content, said):
    with pytest.raises(ValueError, match=said):
        read(tmp_path, content)


def test_files_are_known_by_their_content(tmp_path):
    for write, suffixes in ((save_file, (".pth", ".bin", "")), (torch.save, (".safetensors", ".ckpt", ""))):
        for suffix in suffixes:
            write(STATE, tmp_path / f"w{suffix}")
            assert fingerprint(read_weights(tmp_path / f"w{suffix}")) == fingerprint(STATE)


def test_a_pickle_that_holds_itself(tmp_path):
    content = {"model": {}}
    content["model"]["model"] = content
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        build_backbone(NAME, TINY, tmp_path / "w.pth")


def clip_names(state):
    """OpenAI's names for a vision tower."""
    names = {"patch_embed.proj": "conv1", "blocks.": "transformer.resblocks.", "norm_pre": "ln_pre", "norm1": "ln_1",
             "norm2": "ln_2", "qkv.": "in_proj_", "attn.proj": "attn.out_proj", "fc1": "c_fc",
             "fc2": "c_proj"}  # fmt: skip
    out = {}
    for key, value in state.items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        out[f"ln_post.{key[5:]}" if key.startswith("norm.") else key] = value
    out["class_embedding"] = out.pop("cls_token")[0, 0]
    out["positional_embedding"] = out.pop("pos_embed")[0]
    out["proj"] = out.pop("head.weight").T
    del out["head.bias"]
    return out


@pytest.mark.parametrize("wrapped", [False, True])
def test_clip_keeps_its_projection_unless_it_is_left_out(tmp_path, wrapped):
    vit = build(CLIP, num_classes=7)
    torch.nn.init.zeros_(vit.head.bias)
    content = {**under("visual.", clip_names(vit.state_dict())), **TEXT}
    content = {"state_dict": under("module.", content)} if wrapped else content
    assert fingerprint(read(tmp_path, content, CLIP)) == fingerprint(vit)
    assert read(tmp_path, content, CLIP, {**TINY, "num_classes": 0}).num_classes == 0
    trunk = {**under("visual.trunk.", STATE), "visual.head.proj.weight": torch.randn(7, 48)}
    assert torch.equal(read(tmp_path, trunk).head.weight, trunk["visual.head.proj.weight"])


def dinov3_names(state):
    """Meta's names: one bias for query, key and value, and its mask."""
    out = {"rope_embed.periods": torch.ones(4), "mask_token": torch.ones(1, 48)}
    for key, value in state.items():
        key = key.replace("reg_token", "storage_tokens")
        out[key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")] = value
    for i in range(2):
        q, v = (out.pop(f"blocks.{i}.attn.{which}_bias") for which in "qv")
        out[f"blocks.{i}.attn.qkv.bias"] = torch.cat([q, torch.ones_like(q), v])
        out[f"blocks.{i}.attn.qkv.bias_mask"] = torch.cat([torch.ones_like(q), torch.zeros_like(q), torch.ones_like(v)])
    return out


@pytest.mark.parametrize("prefix", ["", "teacher.backbone."])
def test_values_that_timms_filter_drops(tmp_path, prefix):
    vit = build(f"{DINOV3}_qkvb")
    content = under(prefix, dinov3_names(vit.state_dict()))
    bias = f"{prefix}blocks.1.attn.qkv.bias"
    assert fingerprint(read(tmp_path, content, f"{DINOV3}_qkvb")) == fingerprint(vit)
    with pytest.raises(ValueError, match=rf"2 weights that are not zero .*blocks\.0.*; it fits .*{DINOV3}_qkvb"):
        read(tmp_path, content, DINOV3)
    with pytest.raises(ValueError, match=rf"4 unexpected .*; it fits teacher.name {DINOV3}_qkvb"):
        read(tmp_path, vit.state_dict(), DINOV3)
    unmasked = {key: value for key, value in content.items() if not key.endswith("bias_mask")}
    with pytest.raises(ValueError, match=r"2 weights .*blocks\.0\.attn\.qkv\.bias"):  # the key's third of them
        read(tmp_path, unmasked, f"{DINOV3}_qkvb")
    for i in range(2):
        content[bias.replace("1", str(i))] = torch.zeros(144)
    read(tmp_path, content, DINOV3)


FAMILIES = {
    "ViT": (NAME, transformers.ViTConfig, transformers.ViTModel, {}, {"layer_norm_eps": 1e-6}),
    "Dinov2": ("vit_small_patch14_dinov2", transformers.Dinov2Config, transformers.Dinov2Model, {}, {}),
    "Dinov2WithRegisters": ("vit_small_patch14_reg4_dinov2", transformers.Dinov2WithRegistersConfig,
                            transformers.Dinov2WithRegistersModel, {}, {}),
    "CLIP": (f"{CLIP}.openai", transformers.CLIPVisionConfig, transformers.CLIPVisionModelWithProjection,
             {"act_layer": "quick_gelu"}, {}),
    "Siglip": ("vit_base_patch16_siglip_224", transformers.SiglipVisionConfig, transformers.SiglipVisionModel, {}, {}),
    "DINOv3": (f"{DINOV3}_qkvb", transformers.DINOv3ViTConfig, transformers.DINOv3ViTModel, {},
               {"num_register_tokens": 4}),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_files_of_transformers(tmp_path, family):
    """Features are those that transformers' own model gives."""
    name, config, model, kwargs, more = FAMILIES[family]
    torch.manual_seed(0)
    theirs = model(config(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=192,
                          image_size=32, patch_size=8, **more)).eval()  # fmt: skip
    for weight in theirs.parameters():
        weight.normal_(std=0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = build_backbone(name, {**TINY, **kwargs}, tmp_path / "theirs" / "model.safetensors")
    images = torch.randn(2, 3, 32, 32)
    wanted = theirs(images).last_hidden_state
    if family == "CLIP":  # whose last norm is of the class token alone
        wanted = ours.norm(wanted)
    torch.testing.assert_close(ours.forward_features(images), wanted, atol=1e-4, rtol=1e-4)
    assert fingerprint(build_backbone(name, {**TINY, **kwargs}, tmp_path / "theirs")) == fingerprint(ours)


def test_a_layer_before_the_classifier_has_an_effect_with_the_classifier_alone(tmp_path):
    content = {**build(num_classes=5).state_dict(), "pre_logits.fc.weight": torch.ones(48, 48)}
    with pytest.raises(ValueError, match=r"1 weights that are not zero .*pre_logits\.fc\.weight"):
        read(tmp_path, content)
    read(tmp_path, content, kwargs={**TINY, "num_classes": 0})


def test_pooling_stays_in_the_file_only_where_another_is_chosen(tmp_path):
    name = "vit_base_patch16_siglip_224"
    content = build(name).state_dict()
    read(tmp_path, content, name, {**TINY, "global_pool": "avg", "fc_norm": False})
    read(tmp_path, content, "vit_base_patch16_siglip_gap_224")
    with pytest.raises(ValueError, match=r"unexpected \(attn_pool\.latent"):
        read(tmp_path, content)


def test_eva_after_masked_image_modelling(tmp_path):
    vit = build(EVA02)
    content = {**vit.state_dict(), "mask_token": torch.ones(1, 1, 48), "lm_head.weight": torch.ones(3, 48)}
    assert fingerprint(read(tmp_path, content, EVA02)) == fingerprint(vit)


@pytest.mark.parametrize("name", [NAME, EVA02, "vit_small_patch14_reg4_dinov2"])
@pytest.mark.parametrize("size", [(128, 32), (32, 128)])
def test_a_square_grid_at_a_size_of_as_many_patches(tmp_path, name, size):
    vit = build(name, img_size=64)
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    with pytest.warns(UserWarning, match=r"64 position embeddings, taken as 8 x 8"):
        built = read(tmp_path, vit.state_dict(), name, BARE, image_size=size)
    wanted = resample_abs_pos_embed(vit.pos_embed, (size[0] // 8, size[1] // 8), (8, 8), prefix)
    torch.testing.assert_close(built.pos_embed, wanted)


@pytest.mark.parametrize("trained_at", [(128, 32), (32, 96)], ids=["as many as a square", "of no square"])
def test_a_grid_that_is_not_square_is_said_or_asked_for(tmp_path, trained_at):
    vit = build(img_size=trained_at)
    rows, columns = (side // 8 for side in trained_at)
    for size in (trained_at, trained_at[::-1], (64, 64)):
        wanted = resample_abs_pos_embed(vit.pos_embed, (size[0] // 8, size[1] // 8), (rows, columns), 1)
        with warnings.catch_warnings(action="error"):
            built = read(tmp_path, vit.state_dict(), kwargs={**TINY, "img_size": trained_at}, image_size=size)
        torch.testing.assert_close(built.pos_embed, wanted)
    asks = contextlib.nullcontext() if rows * columns == 64 else pytest.raises(ValueError, match=r"img_size: \[HEI")
    said = pytest.warns(UserWarning, match="taken as 8 x 8") if rows * columns == 64 else contextlib.nullcontext()
    with asks, said:
        read(tmp_path, vit.state_dict(), kwargs=BARE, image_size=trained_at[::-1])


def test_positions_of_other_prefix_tokens(tmp_path):
    for file, model in ((False, True), (True, False)):
        content = build(no_embed_class=file).state_dict()
        with pytest.raises(ValueError, match=rf"where {int(model)} would leave a square: set .*no_embed_class"):
            read(tmp_path, content, kwargs={**TINY, "no_embed_class": model})


def export(folder, vit, linear=True, **kwargs):
    vit = linearize(vit, keep_softmax=() if linear else range(2))
    blocks = [0, 1] if linear else []
    save(folder, vit.state_dict(), {
        "backbone": {"name": NAME, "kwargs": {**TINY, "num_classes": vit.num_classes, **kwargs}},
        "attention": {"feature_map": "elu1", "linear_blocks": blocks}, "lineage": {},
    })  # fmt: skip
    return folder


def test_a_converted_model_is_no_softmax_teacher(tmp_path):
    folder = export(tmp_path / "export", build())
    (tmp_path / "elsewhere.pth").write_bytes((folder / "model.safetensors").read_bytes())
    for weights in (folder, folder / "model.safetensors", tmp_path / "elsewhere.pth"):
        with pytest.raises(ValueError, match="weights of a converted model, with linear attention in 2 blocks"):
            build_backbone(NAME, TINY, weights)
    save_file(build().state_dict(), folder / "model.safetensors")  # as exports were: the file does not say it
    with pytest.raises(ValueError, match="weights of a converted model"):
        build_backbone(NAME, TINY, folder / "model.safetensors")


def test_a_softmax_export_is_a_teacher_and_says_its_grid(tmp_path):
    vit = build(img_size=(128, 32))
    folder = export(tmp_path / "export", vit, linear=False, img_size=[128, 32])
    for weights in (folder, folder / "model.safetensors"):
        assert fingerprint(build_backbone(NAME, BARE, weights, image_size=(128, 32))) == fingerprint(vit)
        wanted = resample_abs_pos_embed(vit.pos_embed, (4, 16), (16, 4), 1)
        torch.testing.assert_close(build_backbone(NAME, BARE, weights, image_size=(32, 128)).pos_embed, wanted)
        torch.testing.assert_close(load(folder, (32, 128)).pos_embed, wanted)
    with pytest.raises(FileNotFoundError, match=r"a folder; the export here is .*export"):
        build_backbone(NAME, TINY, tmp_path)
