"""What `save` writes, `load` gives back, in this process and in one that has the wheel alone."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed

from models import Segmenter, build_head, fingerprint, linear_blocks, linearize, load, read_config, save

ROOT = Path(__file__).parents[2]
NAME = "vit_tiny_patch16_224"
KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5,
          "reg_tokens": 4, "qk_norm": True, "init_values": 0.1}  # fmt: skip


def build(keep=(), seed=0):
    torch.manual_seed(seed)
    vit = timm.create_model(NAME, **KWARGS).eval()
    with torch.no_grad():
        for weight in vit.parameters():
            weight.normal_(std=0.2)
    return linearize(vit, keep_softmax=keep)


def config(vit):
    return {
        "backbone": {"name": NAME, "kwargs": KWARGS},
        "attention": {"feature_map": "elu1", "linear_blocks": linear_blocks(vit)},
        "input": {"image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0},
        "lineage": {"stages": [1, 2]},
    }


def export(folder, vit):
    save(folder, vit.state_dict(), config(vit))
    return folder


@pytest.mark.parametrize("keep", [(), (0, -1), (0, 1, 2)], ids=["linear", "partly linear", "softmax"])
@torch.no_grad()
def test_round_trip_to_the_bit(tmp_path, keep):
    vit = build(keep)
    loaded = load(export(tmp_path / "a" / "export", vit))
    assert fingerprint(loaded) == fingerprint(vit)
    assert linear_blocks(loaded) == linear_blocks(vit) == sorted({0, 1, 2} - {i % 3 for i in keep})
    assert not loaded.training
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), vit(x))
    written = read_config(tmp_path / "a" / "export")
    assert len(written.pop("digest")) == 64 and written == {"format": 1, **config(vit)}
    assert {path.name for path in (tmp_path / "a" / "export").iterdir()} == {"model.safetensors", "config.json"}


@torch.no_grad()
def test_another_image_size(tmp_path):
    vit = build((0,))
    export(tmp_path, vit)
    loaded = load(tmp_path, (32, 64))
    wanted = resample_abs_pos_embed(vit.pos_embed, (4, 8), num_prefix_tokens=5)
    assert torch.equal(loaded.pos_embed, wanted)
    assert loaded(torch.rand(1, 3, 32, 64)).shape == (1, 5)
    assert fingerprint(load(tmp_path, 32)) == fingerprint(vit)
    with pytest.raises(ValueError, match="36: not a multiple of the patch size 8"):
        load(tmp_path, 36)


@pytest.mark.parametrize("size", [(16, 64), (48, 48)], ids=["another shape", "another number"])
@pytest.mark.parametrize(
    "given", [("mhla", {"cells": 2}, []), ("elu1", {}, ["value_conv3"])], ids=["mhla", "value_conv3"]
)
@torch.no_grad()
def test_another_image_size_in_torchscript(tmp_path, given, size):
    operator, kwargs, additions = given
    vit = linearize(build(range(3)), operator, operator_kwargs=kwargs, additions=additions)
    for weight in vit.parameters():
        weight.normal_(std=0.2)
    attention = {"operator": operator, "kwargs": kwargs, "additions": additions, "linear_blocks": linear_blocks(vit)}
    save(tmp_path, vit.state_dict(), config(vit) | {"attention": attention})
    loaded, x = load(tmp_path, size), torch.rand(2, 3, *size)
    torch.testing.assert_close(torch.jit.script(loaded)(x), loaded(x))
    vit.set_input_size(img_size=size)
    torch.testing.assert_close(torch.jit.script(vit)(x), vit(x))


def test_a_bf16_state_comes_back_as_fp32_with_the_same_values(tmp_path):
    vit = build().bfloat16()
    loaded = load(export(tmp_path, vit))
    assert load_file(tmp_path / "model.safetensors")["norm.weight"].dtype == torch.bfloat16
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert fingerprint(loaded) == fingerprint(vit.float())


def test_weights_that_are_views_of_one_buffer(tmp_path):
    """As DeepSpeed keeps them: slices of a flat tensor, some of them transposed."""
    vit = build()
    flat = torch.cat([value.reshape(-1) for value in vit.state_dict().values()])
    pieces = flat.split([value.numel() for value in vit.state_dict().values()])
    state = {key: piece.view(value.shape) for (key, value), piece in zip(vit.state_dict().items(), pieces, strict=True)}
    state["head.weight"] = state["head.weight"].T.contiguous().T
    save(tmp_path, state, config(vit))
    assert fingerprint(load(tmp_path)) == fingerprint(vit)


def test_a_new_export_replaces_the_old_one_and_a_failed_one_does_not(tmp_path):
    export(tmp_path, build(seed=0))
    second = build((0,), seed=1)
    export(tmp_path, second)
    assert fingerprint(load(tmp_path)) == fingerprint(second)
    third = build(seed=2)
    with pytest.raises(TypeError):
        save(tmp_path, third.state_dict(), {**config(third), "lineage": object()})
    assert fingerprint(load(tmp_path)) == fingerprint(second)


def test_no_export_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no export there"):
        load(tmp_path / "none")
    export(tmp_path, build())
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no export there"):
        load(tmp_path)


def test_folders_beside_an_export_name_it(tmp_path):
    made = export(tmp_path / "stage2" / "export", build())
    step = tmp_path / "stage2" / "checkpoints" / "step-00000010"
    step.mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "stage2", step.parent, step):
        with pytest.raises(FileNotFoundError, match=f"no export there .*; the export here is {made}$"):
            load(folder)
    with pytest.raises(FileNotFoundError, match=f"no export there .*; its folder is {made}$"):
        load(made / "model.safetensors")


@pytest.mark.parametrize("size", [None, (32, 64)])
def test_timm_preprocesses_a_photograph_as_the_export_was_trained(tmp_path, size):
    given = {"image_size": 32, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "crop_pct": 0.8}
    classes = ["cat", "dog", "owl", "pig", "yak"]
    save(tmp_path / "export", build().state_dict(), {**config(build()), "input": given, "classes": classes})
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    Image.fromarray(pixels).save(tmp_path / "photograph.jpg", quality=95)

    vit = load(tmp_path / "export", size)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(vit))
    with Image.open(tmp_path / "photograph.jpg") as image:
        images = transform(image.convert("RGB"))[None]
    with torch.no_grad():
        best = vit(images).argmax(-1).item()
    assert vit.pretrained_cfg["label_names"][best] in classes

    if size is None:  # a square of 0.8 of the shorter side, each pixel the mean of 4 x 4
        with Image.open(tmp_path / "photograph.jpg") as image:
            middle = torch.tensor(np.asarray(image)[16:144, 56:184] / 255, dtype=torch.float32).permute(2, 0, 1)
        mean, std = (torch.tensor(given[key]).view(3, 1, 1) for key in ("mean", "std"))
        wanted = (torch.nn.functional.avg_pool2d(middle, 4) - mean) / std
        torch.testing.assert_close(images[0], wanted, atol=0.02, rtol=0)
    assert images.shape == (1, 3, *(size or (32, 32)))
    said = timm.data.resolve_model_data_config(vit, use_test_size=True)
    assert said == timm.data.resolve_model_data_config(vit) and said["crop_pct"] == 0.8
    assert not vit.pretrained_cfg.keys() & {"url", "hf_hub_id", "tag", "notes"}


def test_what_the_export_says_of_its_images(tmp_path):
    without = {key: value for key, value in config(build()).items() if key != "input"}
    save(tmp_path, build().state_dict(), without)
    assert timm.data.resolve_model_data_config(load(tmp_path))["input_size"] == (3, 32, 32)
    given = {**config(build())["input"], "interpolation": "bicubic"}
    save(tmp_path, build().state_dict(), {**without, "input": given})
    assert timm.data.resolve_model_data_config(load(tmp_path))["interpolation"] == "bicubic"
    with pytest.raises(ValueError, match="classes: 2 for a head of 5 classes"):
        save(tmp_path, build().state_dict(), {**without, "classes": ["cat", "dog"]})
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        mark = json.loads(file.metadata()["unsoftmax"])
    assert mark["linear_blocks"] == [0, 1, 2] and mark["image_size"] == 32 and len(mark["lineage"]) == 64


def test_a_segmenter_tells_its_classes(tmp_path):
    vit = timm.create_model(NAME, **{**KWARGS, "num_classes": 0})
    model = Segmenter(linearize(vit), build_head("linear", 48, 2))
    palette = [[0, 0, 0], [255, 0, 0]]
    save(tmp_path, model.state_dict(), {
        **config(vit), "attention": {"feature_map": "elu1", "linear_blocks": [0, 1, 2]}, "classes": ["road", "sky"],
        "backbone": {"name": NAME, "kwargs": {**KWARGS, "num_classes": 0}}, "palette": palette,
        "segmentation": {"head": "linear", "num_classes": 2, "kwargs": {}},
    })  # fmt: skip
    loaded = load(tmp_path)
    assert (loaded.classes, loaded.palette) == (["road", "sky"], palette)
    said = timm.data.resolve_model_data_config(loaded)
    assert said["input_size"] == (3, 32, 32) and tuple(said["mean"]) == (0.5, 0.5, 0.5)
    assert loaded.pretrained_cfg["label_names"] == ("road", "sky") and loaded.pretrained_cfg["num_classes"] == 2


def edit(**changes):
    def damage(folder):
        text = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**text, **changes}))

    return damage


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def drop(folder):
    state = load_file(folder / "model.safetensors")
    del state["blocks.0.attn.qkv.weight"]
    save_file(state, folder / "model.safetensors")


def flip(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-2000] ^= 1
    path.write_bytes(content)


def diverged(folder):
    state = load_file(folder / "model.safetensors")
    state["blocks.1.mlp.fc1.weight"][3, 3] = float("nan")
    save_file(state, folder / "model.safetensors")


LINEAR = {"feature_map": "elu1", "linear_blocks": [0, 1, 2]}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, r"model\.safetensors: cannot be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"model\.safetensors: cannot be read"),
        (drop, r"model\.safetensors: does not fit .*1 missing \(blocks\.0\.attn\.qkv\.weight\)"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json: damaged"),
        (lambda folder: (folder / "config.json").write_text("[]"), r"config\.json: damaged"),
        (lambda folder: (folder / "config.json").write_text("{}"), r"config\.json: damaged"),
        (edit(format=99), "format 99, this version reads 1"),
        (edit(backbone={"name": NAME}), r"config\.json: damaged, its backbone\.kwargs is missing"),
        (edit(backbone={"name": "nonsense", "kwargs": {}}), r"config\.json: no model .*nonsense"),
        (edit(backbone={"name": NAME, "kwargs": {**KWARGS, "depht": 1}}), r"config\.json: no model .*depht"),
        (edit(backbone={"name": NAME, "kwargs": {**KWARGS, "img_size": 64}}), r"1 of another shape \(pos_embed"),
        (edit(attention={**LINEAR, "feature_map": "nonsense"}), "operator 'nonsense'"),
        (edit(attention={**LINEAR, "linear_blocks": [0, 7]}), r"config\.json: .*\[7\]"),
        (edit(attention={"feature_map": "elu1"}), r"config\.json: damaged, its attention\.linear_blocks is missing"),
        (edit(backbone=[NAME]), r"config\.json: damaged, its backbone\.name is missing"),
        (edit(backbone={"name": 7, "kwargs": {}}), r"config\.json: damaged, its backbone\.name is 7"),
        (edit(attention={**LINEAR, "linear_blocks": "0, 1"}), r"its attention\.linear_blocks is '0, 1'"),
        (edit(attention={**LINEAR, "linear_blocks": [{}]}), r"config\.json: no model .*unhashable"),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), r"config\.json: damaged"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe{"), r"config\.json: damaged"),
        # Nothing is fetched, read or made large because a config says so.
        (edit(backbone={"name": "hf-hub:timm/vit_tiny_patch16_224", "kwargs": {}}), "no architecture of timm"),
        (edit(backbone={"name": "local-dir:/etc", "kwargs": {}}), "no architecture of timm"),
        (edit(backbone={"name": "../../" + NAME, "kwargs": {}}), "no architecture of timm"),
        (edit(backbone={"name": NAME, "kwargs": {**KWARGS, "checkpoint_path": "/etc"}}), "kwargs: checkpoint_path"),
        (edit(backbone={"name": NAME, "kwargs": {**KWARGS, "pretrained": True}}), "kwargs: pretrained True"),
        (edit(backbone={"name": NAME, "kwargs": {**KWARGS, "pretrained_cfg": {"url": "x"}}}), "kwargs: pretrained_cfg"),
        (edit(backbone={"name": NAME, "kwargs": {**KWARGS, "depth": 10**9}}), "kwargs: depth 1000000000"),
        (edit(backbone={"name": NAME, "kwargs": {**KWARGS, "embed_dim": 3 * 10**8}}), "of another shape"),
        (edit(backbone={"name": NAME, "kwargs": {**KWARGS, "img_size": 10**6}}), r"of another shape \(pos_embed"),
        (edit(backbone={"name": NAME, "kwargs": {**KWARGS, "num_heads": 0}}), r"config\.json: no model .*Zero"),
        (edit(backbone={"name": NAME, "kwargs": {**KWARGS, "mlp_ratio": 1e400}}), "kwargs: mlp_ratio inf"),
        (edit(input={"mean": [0.5]}), r"config\.json: no model .*input: mean \[0\.5\]"),
        (edit(input={"std": [0.5, 0.0, 0.5]}), "input: std"),
        (edit(input={"interpolation": "/etc"}), "input: interpolation"),
        (edit(input=[]), r"config\.json: damaged, its input is \[\]"),
        (edit(classes="abc"), r"config\.json: damaged, its classes is 'abc'"),
        (edit(classes=[1, 2]), r"classes \[1, 2\]"),
        (edit(lineage={"stages": ["1"]}), "is not as it was written; make the export again"),
        (edit(pretrained_cfg={"mean": [0.0] * 3}), "is not as it was written"),
        (flip, "is not as it was written; make the export again"),
        (diverged, r"model\.safetensors: blocks\.1\.mlp\.fc1\.weight is not finite"),
    ],
)  # fmt: skip
def test_damaged_exports(tmp_path, damage, said):
    export(tmp_path, build())
    damage(tmp_path)
    with pytest.raises(ValueError, match=said) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_ten_lines_load_it_with_torch_timm_and_the_wheel_alone(tmp_path):
    """`unsoftmax` is models/ under another name, so models/ must import itself relatively and nothing of ours."""
    vit = build((0,))
    export(tmp_path / "export", vit)
    images = torch.randn(2, 3, 32, 32)
    torch.save(images, tmp_path / "images.pt")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "unsoftmax").symlink_to(ROOT / "models")
    script = textwrap.dedent("""
        import sys
        import timm
        import torch

        theirs = set(sys.modules)  # timm itself imports wandb where it is installed
        import unsoftmax

        model = unsoftmax.load("export")
        assert isinstance(model, timm.models.VisionTransformer)
        with torch.no_grad():
            torch.save(model(torch.load("images.pt")), "logits.pt")
        print(*{name.split(".")[0] for name in set(sys.modules) - theirs})
    """)
    (tmp_path / "script.py").write_text(script)
    env = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    # -P: the folder of the script is not on the path, nor is the clone, which set-up may have put on the environment's.
    outside = f"import sys; sys.path[:] = [p for p in sys.path if p != {str(ROOT)!r}]; exec(open('script.py').read())"
    done = subprocess.run(
        [sys.executable, "-P", "-c", outside], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "unsoftmax" in loaded
    assert not loaded & {"deepspeed", "ffcv", "models", "data", "trainer", "jobs", "wandb", "sklearn", "cv2"}
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), vit(images))
