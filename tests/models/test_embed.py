"""Features of a folder of images: what is read, in which order, and what cannot be read."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open

from models import Segmenter, build_head, linearize, load, save
from models.embed import embed, main

NAME = "vit_tiny_patch16_224"
KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
INPUT = {"image_size": 32, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.2], "crop_pct": 0.8}


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("exports") / "export"
    save(folder, linearize(timm.create_model(NAME, **KWARGS)).state_dict(), {
        "backbone": {"name": NAME, "kwargs": KWARGS}, "attention": {"feature_map": "elu1", "linear_blocks": [0, 1]},
        "input": INPUT, "lineage": {},
    })  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five images, of which one lies turned and one has no suffix; one that is cut, and two files that are none."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, size in (("b/2.png", (40, 32)), ("b/10.jpg", (64, 48)), ("a.png", (32, 32)), ("c/no_suffix", (50, 50))):
        (folder / name).parent.mkdir(exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        image.save(folder / name, format="JPEG" if "jpg" in name else "PNG")
    turned = Image.open(folder / "a.png").rotate(90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 270 degrees
    turned.save(folder / "z.png", exif=exif)
    (folder / "cut.jpg").write_bytes((folder / "b/10.jpg").read_bytes()[:900])
    Image.fromarray(rng.integers(0, 65536, (32, 32), dtype=np.uint16)).save(folder / "deep.png")
    (folder / "notes.txt").write_text("no image")
    return folder


NAMES = ["a.png", "b/10.jpg", "b/2.png", "c/no_suffix", "z.png"]


@pytest.mark.parametrize("half", [False, True])
@torch.no_grad()
def test_the_command_writes_what_the_model_gives(export, folder, tmp_path, capsys, half):
    out = tmp_path / "features.safetensors"
    more = ["--half", "--batch_size", "1"] if half else ["--tokens", "--batch_size", "4", "--workers", "2"]
    assert main([str(export), str(folder), str(out), *more, "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert "cut.jpg: cannot be read" in said.err and "deep.png: cannot be read (has more than 8 bits" in said.err
    assert "2 files could not be read" in said.out and "notes.txt" not in said.err
    vit = load(export)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(vit))
    images = [transform(Image.open(folder / name).convert("RGB")) for name in NAMES[:4]]
    tokens = vit.forward_features(torch.stack([*images, images[0]]))
    wanted = {"class_token": tokens[:, 0], "mean_patch": tokens[:, 1:].mean(1), "pooled": tokens[:, 0]}
    wanted |= {} if half else {"tokens": tokens}
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["files"]) == NAMES and file.metadata()["model"] == str(export)
        assert set(json.loads(file.metadata()["unreadable"])) == {"cut.jpg", "deep.png"}
        assert json.loads(file.metadata()["input"])["mean"] == INPUT["mean"]
        assert set(file.keys()) == set(wanted)
        for name, x in wanted.items():
            got = file.get_tensor(name)
            assert got.dtype == (torch.float16 if half else torch.float32)
            torch.testing.assert_close(got.float(), x, atol=2e-3 if half else 1e-5, rtol=1e-3 if half else 1e-5)


def test_other_models_and_sizes(folder):
    torch.manual_seed(0)
    siglip = timm.create_model("vit_base_patch16_siglip_224", **{**KWARGS, "img_size": (32, 64), "num_classes": 0})
    found = embed(siglip, folder, 2)
    assert {key: list(x.shape) for key, x in found.tensors.items()} == {"mean_patch": [5, 48], "pooled": [5, 48]}
    assert found.files == NAMES
    segmenter = Segmenter(linearize(timm.create_model(NAME, **KWARGS)), build_head("linear", 48, 3))
    assert set(embed(segmenter, folder).tensors) == {"class_token", "mean_patch"}
    convolutional = timm.create_model("resnet10t", num_classes=3)
    assert {key: list(x.shape) for key, x in embed(convolutional, folder).tensors.items()} == {"pooled": [5, 512]}


def test_mistakes_are_one_line(export, folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.jpg").write_text("no image")
    (tmp_path / "a.beton").write_bytes(b"\2\0")
    out = str(tmp_path / "out.safetensors")
    mistakes = {
        (str(export), str(tmp_path / "none"), out): "none: no such folder",
        (str(export), str(tmp_path / "empty"), out): "empty: holds no image that can be read",
        (str(export), str(tmp_path / "bad"), out): "bad: holds no image that can be read; a.jpg: cannot identify",
        (str(export), str(tmp_path / "a.beton"), out): "a file, no folder of images; for a .beton file",
        (str(folder), str(folder), out): "no export there",
        ("vit_none", str(folder), out): "vit_none: no folder of an export, and no name of timm's",
        (str(export), str(folder), str(tmp_path / "no/out")): "no/out: its folder is not there",
        (str(export), str(folder), out, "--image_size", "30"): "--image_size (30, 30): not a multiple",
        (str(export), str(folder), out, "--image_size", "1", "2", "3"): "give a side, or height and width",
        (str(export), str(folder), out, "--batch_size", "0"): "--batch_size 0: must be at least 1",
        (str(export), str(folder), out, "--device", "nowhere"): "--device nowhere: torch has no such device here",
    }
    for arguments, wanted in mistakes.items():
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and wanted in said
    assert not (tmp_path / "out.safetensors").exists()
