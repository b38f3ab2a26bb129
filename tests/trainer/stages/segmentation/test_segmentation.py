"""Stage 3 for segmentation on real DeepSpeed ranks: learning, exact evaluation, resuming, mistakes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torchmetrics.classification import MulticlassJaccardIndex

import models
from data import original_loader
from tests.conftest import ROOT, Patches, run_trainer
from tests.trainer.stages.test_stages import SAVES, assert_resumes_to_the_bit, assert_same_curve

HEADS = {
    "linear": {"blocks": 2},
    "upernet": {"channels": 32},
    "mask2former": {"channels": 32, "queries": 6, "layers": 2, "pixel_layers": 1, "points": 128},
}


@pytest.fixture(scope="module")
def masked(small: Path) -> list[str]:
    """Options for the small data set with masks: 24 images to train on, 13 of three sizes to judge on."""
    return ["--task", "segmentation", "--data.train", str(small / "masked.beton"), "--data.val",
            str(small / "masked_val.beton"), "--train.batch_size", "8", "--data.max_share", "1",
            "--data.photometric", "false", "--data.resize", "[0.9, 1.2]"]  # fmt: skip


def head(name: str) -> list[str]:
    return ["--segmentation.head", name, "--segmentation.kwargs", json.dumps(HEADS[name])]


# On each of its paths: stochastic depth, rates by depth, an average, and stage 1's loss kept on.
SUPERVISED = ["--student.parent", "none", "--stage3.drop_path", "0.2", "--stage3.layer_decay", "0.7",
              "--stage3.ema", "0.9", "--stage3.attention_weight", "50"]  # fmt: skip


def zero(stage: int) -> list[str]:
    return ["--deepspeed", str(ROOT / f"ds_configs/zero{stage}.json")]


@pytest.fixture(scope="module")
def alone(small: Path, masked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with stage 3 on one rank, from the teacher's weights, linear attention, with the linear head."""
    run = tmp_path_factory.mktemp("alone")
    done = run_trainer(small, run, 3, *masked, *head("linear"), *SAVES, *SUPERVISED)
    assert done.code == 0, done.err
    return run


def test_two_ranks_in_zero_3_give_the_curve_of_one_and_resume(
    small: Path, masked: list[str], alone: Path, tmp_path: Path
) -> None:
    """Batch norm over the ranks, and their sizes of images in evaluation, that call the model unevenly often."""
    options = [*masked, *head("linear"), *SAVES, *SUPERVISED, *zero(3)]
    done = run_trainer(small, tmp_path, 3, *options, ranks=2)
    assert done.code == 0, done.err
    assert_same_curve(done.folder, alone / "stage3")
    assert_resumes_to_the_bit(small, tmp_path, 3, *options, ranks=2)


@pytest.mark.parametrize("name", HEADS)
def test_each_head_overfits_on_two_ranks(small: Path, masked: list[str], name: str, tmp_path: Path) -> None:
    steps, bf16 = "120" if name == "upernet" else "60", str(name != "linear").lower()
    options = [*masked, *head(name), *zero(2), "--data.val", str(small / "masked.beton"), "--data.resize", "[1, 1]"]
    options += ["--student.attention", "softmax", "--train.lr", "3e-3", "--train.steps", steps, "--train.bf16", bf16]
    done = run_trainer(small, tmp_path, 3, *options, ranks=2)
    assert done.code == 0, done.err
    first, last = done.lines("val")
    assert last["miou"] > 80 > first["miou"] + 20
    assert models.load(done.folder / "export")(torch.zeros(1, 3, 32, 32)).shape == (1, 3, 32, 32)


def test_the_last_line_is_what_torchmetrics_says_of_the_export(small: Path, alone: Path) -> None:
    """The mean over windows, flips and scales is in the tests of views."""
    folder = alone / "stage3"
    model, given = models.load(folder / "export"), models.read_config(folder / "export")["input"]
    miou, images = MulticlassJaccardIndex(3, ignore_index=models.IGNORE), 0
    loader = original_loader(small / "masked_val.beton", batch_size=4, mean=given["mean"], std=given["std"])
    for batch in loader.epoch():
        size = tuple(batch["image"].shape[-2:])
        factor = 32 / min(size)
        resized = torch.nn.functional.interpolate(
            batch["image"], [round(side * factor) for side in size], mode="bilinear", antialias=True
        )
        with torch.no_grad():
            logits = model(resized)  # 40 x 48 becomes 32 x 38, two windows; 24 x 36 is 32 x 48
            windows = torch.zeros_like(logits), torch.zeros(logits.shape[-2:])
            for left in sorted({0, min(21, logits.shape[-1] - 32), logits.shape[-1] - 32}):
                part = (..., slice(left, left + 32))
                windows[0][part] += model(resized[part])
                windows[1][part] += 1
        logits = torch.nn.functional.interpolate(windows[0] / windows[1], size, mode="bilinear")
        miou.update(logits.argmax(1), batch["mask"].long())
        images += len(batch["index"])
    assert images == 13
    last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["miou"] == pytest.approx(100 * miou.compute().item(), abs=1e-4)
    classes = json.loads((folder / "classes.json").read_text())["classes"]
    assert list(classes) == list(Patches.mask_classes)
    assert sum(each["iou"] for each in classes.values()) / 3 == pytest.approx(last["miou"])


def test_the_pictures_show_another_run_beside(small: Path, masked: list[str], alone: Path, tmp_path: Path) -> None:
    """And a frozen backbone is exported as it came; whole images, mirrored, at two scales."""
    options = [*masked, *head("upernet"), "--student.attention", "softmax", "--student.trainable", "head"]
    options += ["--segmentation.mode", "whole", "--segmentation.flip", "true", "--segmentation.scales", "[1, 1.5]"]
    done = run_trainer(small, tmp_path, 3, *options, "--segmentation.beside", str(alone / "stage3/export"))
    assert done.code == 0, done.err
    from PIL import Image

    pictures = {path.name: Image.open(path).size for path in (done.folder / "pictures").iterdir()}
    assert pictures.keys() == {"worst.png", "first.png"}
    alone_wide = Image.open(alone / "stage3/pictures/worst.png").size[0]
    assert all(wide == pytest.approx(alone_wide * 4 / 3, rel=0.01) for wide, _ in pictures.values())
    before, after = load_file(small / "teacher.safetensors"), load_file(done.folder / "export/model.safetensors")
    backbone = {name.removeprefix("backbone."): value for name, value in after.items() if name.startswith("backbone.")}
    assert len(backbone) > 20 and all(torch.equal(before[name], value) for name, value in backbone.items())


def test_a_dry_run_counts_every_head(small: Path, masked: list[str], tmp_path: Path) -> None:
    flops = set()
    for name in HEADS:
        options = [*masked, *head(name), "--student.attention", "softmax", "--segmentation.head_lr", "5", "--dry_run"]
        done = run_trainer(small, tmp_path, 3, *options)
        assert done.code == 0, done.err
        rates = [line.split("parameters, ")[1].split(" rate ")[1] for line in done.out.splitlines() if " rate " in line]
        assert set(rates) == {"0.001", "0.005"}
        assert "stage 3: semantic segmentation" in done.out
        flops.add(next(line for line in done.out.splitlines() if line.startswith("FLOPs")))
    assert len(flops) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data.train", "{small}/train.beton"], "train.beton: has no masks"),
        (["--data.val", "{small}/train.beton"], "train.beton: has no masks"),
        (["--stage3.mixup", "0.8"], "stage3.mixup 0.8: is for labels of whole images"),
        (["--stage3.num_classes", "7"], "stage3.num_classes 7: data.train has 3 classes"),
        (["--segmentation.head", "lineer"], "segmentation.head 'lineer': unknown; choose one of linear, upernet"),
        (["--segmentation.kwargs", '{"block": 2}'], "segmentation.kwargs {'block': 2}: the head linear cannot"),
        (["--segmentation.kwargs", '{"blocks": 9}'], "the head reads 9 blocks, the model has 2"),
        (["--segmentation.stride", "0"], "segmentation.stride 0: must be a number above 0"),
        (["--segmentation.beside", "{small}/nowhere"], "nowhere: no export there"),
        (["--task", "depth"], "task"),
    ],
)
def test_bad_input_is_named_in_one_line(
    small: Path, masked: list[str], options: list[str], words: str, tmp_path: Path
) -> None:
    options = [option.format(small=small) if "{small}" in option else option for option in options]
    done = run_trainer(small, tmp_path, 3, *masked, "--student.attention", "softmax", *options)
    assert words in done.error
    assert not tmp_path.joinpath("stage3").exists()


def test_a_segmentation_is_a_parent_too(small: Path, masked: list[str], alone: Path, tmp_path: Path) -> None:
    """Its backbone is; and what reads backbones reads its."""
    shutil.copytree(alone, tmp_path / "run")
    parent = str(alone / "stage3/export")
    done = run_trainer(small, tmp_path / "again", 3, *masked, "--student.parent", parent, "--dry_run")
    assert done.code == 0 and f"starts from: {parent}" in done.out, done.err
