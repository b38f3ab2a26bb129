"""`convert` and the examples: the program as one calls it from Python, on small data."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import models
from tests.conftest import ARCHITECTURE, zygote
from tests.support.zygote import Run
from tests.trainer.setup.test_cache import save_blobs
from tools.write_notebook import EXAMPLES, SCRIPTS, notebook
from trainer import call, convert
from trainer.call import arguments, saved

QUICK = ["train.steps=2", "train.batch_size=8", "tracking=[]", "train.bf16=false", "data.workers=1"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images, a subfolder per class."""
    return save_blobs(tmp_path_factory.mktemp("call") / "photos", 40)


@pytest.fixture
def forked(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that `convert` starts is forked from the zygote instead: the same program, sooner."""

    def run(command: list[str]) -> None:
        (tmp_path / "log").mkdir(exist_ok=True)
        started = Run(zygote(small / "train.beton"), command[2:], tmp_path / "log")
        assert started.wait(400) == 0, started.text("err")

    monkeypatch.setattr(call, "_run", run)


def example(name: str, *argv: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
    runpy.run_module(f"examples.{name}", run_name="__main__")


def test_settings_are_typed_as_one_would() -> None:
    given = {"train": {"lr": 1e-3, "bf16": False}, "teacher.kwargs": {"depth": 2}, "config": "own", "data.val": None}
    assert list(arguments(given)) == [
        "--train.lr=0.001", "--train.bf16=false", '--teacher.kwargs={"depth": 2}', "--config=own", "--data.val=null",
    ]  # fmt: skip


def test_a_model_is_a_teacher_by_its_name_and_what_differs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=3, global_pool="avg")
    given = saved(vit, tmp_path)
    assert given["teacher.kwargs"] == {"num_classes": 3, "img_size": [64, 64], "global_pool": "avg"}
    again = models.build_backbone(given["teacher.name"], given["teacher.kwargs"], given["teacher.weights"])
    assert models.fingerprint(again) == models.fingerprint(vit)
    own = timm.create_model("vit_tiny_patch16_224", img_size=32, **ARCHITECTURE)
    with pytest.raises(ValueError, match="say what it was built with"):
        saved(own, tmp_path)
    assert saved(own, tmp_path, ARCHITECTURE | {"img_size": 32})["teacher.kwargs"]["depth"] == 2
    with pytest.raises(ValueError, match="Linear is no model that timm made"):
        saved(torch.nn.Linear(2, 2), tmp_path)


def test_a_mistake_is_a_value_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"did you mean train\.lr"):
        convert("vit_tiny_patch16_224", run=tmp_path / "run", train={"lrr": 1})


def test_the_examples(small: Path, photos: Path, tmp_path: Path, forked: None, monkeypatch, capfd) -> None:
    cache = [f"data.cache={tmp_path / 'cache'}", *QUICK, f"teacher.kwargs={ARCHITECTURE}", "data.image_size=32"]
    teacher = ["--teacher", "vit_tiny_patch16_224", "--weights", small / "teacher.safetensors"]
    example("convert", photos, *teacher, "--run", tmp_path / "run", "--set", *cache, monkeypatch=monkeypatch)
    assert "tokens (1, 17, 32), classes 4" in capfd.readouterr().out
    export = tmp_path / "run/stage3/export"
    card = (export / "README.md").read_text()
    assert str(tmp_path) not in card + (export / "config.json").read_text()
    assert all(said in card for said in ("top-1 (%)", "on the validation images of `photos`", "`pooled`")), card
    assert "--stage=3 --teacher.name=vit_tiny_patch16_224 --run=run --data.train=photos" in card

    example("pipeline", export, photos, "--epochs", 2, monkeypatch=monkeypatch)
    said = capfd.readouterr().out
    assert "feature maps of the last block: (16, 32, 4, 4)" in said and "epoch 1: loss" in said

    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)).save(tmp_path / "photo.jpg")
    where = ["--run", tmp_path / "masks", "--out", tmp_path / "out.png"]
    example(
        "segmentation", small / "masked.beton", tmp_path / "photo.jpg", *teacher, *where, "--set", *cache,
        monkeypatch=monkeypatch,
    )  # fmt: skip
    assert Image.open(tmp_path / "out.png").size == (48, 40) and "out.png: {" in capfd.readouterr().out


def test_examples_are_short_and_the_notebook_is_made_of_them() -> None:
    assert all(len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 40 for name in SCRIPTS)
    assert (EXAMPLES / "examples.ipynb").read_text() == notebook(), "run python -m tools.write_notebook"
