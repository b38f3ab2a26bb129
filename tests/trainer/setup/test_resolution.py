"""Images of other sizes: non-square, a parent at another size, low first and then high; rotary teachers."""

import functools
import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import models
from data import train_loader
from tests.conftest import ROOT, curve, forget_after, run_trainer
from trainer.config import UserError, parse
from trainer.setup.resolution import PhasedLoader, in_words, phases
from trainer.stages.pictures import PrincipalColours

EVA = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 4}


def assert_same(left: list[dict], right: list[dict]) -> None:
    """fp32; ranks add up gradients and losses in another order."""
    for a, b in zip(left, right, strict=True):
        assert a == {k: pytest.approx(v, rel=2e-4, abs=1e-7) if isinstance(v, float) else v for k, v in b.items()}


def test_sizes_and_the_steps_that_end_them() -> None:
    found = phases(["224:0.5", "224x448:0.25"], 512, 100)
    assert [tuple(phase) for phase in found] == [(224, 50), ([224, 448], 75), (512, 100)]
    assert in_words(found) == "224 pixels to step 50, then 224 x 448 pixels to step 75, then 512"


@pytest.mark.parametrize(
    "wrong", ["['224']", "['224:1.0']", "['224:0']", "['0:0.5']", "['224:0.6', '384:0.4']", "['1x2x3:0.5']", "['a:b']"]
)
def test_wrong_resolutions_are_named(wrong: str) -> None:
    with pytest.raises(UserError, match=r"data\.resolutions .*224:0\.8") as error:
        parse(["--stage", "2", "--data.resolutions", wrong])
    assert "\n" not in str(error.value)


def test_batches_change_size_at_a_step_and_nothing_else_does(small: Path) -> None:
    """96 images in batches of 16: 6 steps an epoch. From any step on, the same samples as ever."""

    @functools.cache
    def loader_of(size):
        return train_loader(small / "train.beton", image_size=size, batch_size=16, accumulate=2, workers=1)

    plain = loader_of(32)
    loader = PhasedLoader(phases(["16:0.25", "24:0.5"], 32, 16), loader_of, plain.steps_per_epoch, 2)
    wanted = [batch["index"].tolist() for epoch in range(3) for batch in plain.epoch(epoch)]
    assert loader.steps_per_epoch == 6
    for first in (0, 3, 4, 13):
        epoch, start = divmod(first, 6)
        sizes, indices = [], []
        while epoch < 3:
            for batch in loader.epoch(epoch, start):
                sizes.append(tuple(batch["image"].shape[-2:]))
                indices.append(batch["index"].tolist())
            epoch, start = epoch + 1, 0
        expected = [(16, 16)] * 8 + [(24, 24)] * 16 + [(32, 32)] * 12
        assert sizes == expected[2 * first :]
        assert indices == wanted[2 * first :]
    loader.close()


def test_principal_colours_are_those_of_the_singular_vectors() -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 8, dtype=torch.float64) * torch.tensor([9, 5, 3, 1, 1, 1, 1, 1.0])
    colours = PrincipalColours(x)
    _, _, axes = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    torch.testing.assert_close((colours.axes.mT @ axes[:3].mT).abs(), torch.eye(3, dtype=torch.float64))
    drawn = colours(x)
    assert drawn.shape == (500, 3) and drawn.min() == 0 and drawn.max() == 1
    assert ((drawn == 0).double().mean(0) - 0.01).abs().max() < 0.005
    assert torch.equal(PrincipalColours(x.flip(0)).axes.sign(), colours.axes.sign())


def test_low_then_high_resumes_to_the_bit(small: Path, tmp_path: Path) -> None:
    """Two ranks, ZeRO 3, checkpointed blocks: killed before the size changes, it changes all the same."""
    options = ["--data.resolutions", "['16:0.5']", "--deepspeed", str(ROOT / "ds_configs/zero3.json")]
    options += ["--train.save_every", "1", "--train.keep", "9", "--train.grad_checkpointing", "true"]
    done = run_trainer(small, tmp_path, 2, *options, ranks=2)
    assert done.code == 0, done.err
    assert "16 pixels to step 3, then 32, to step 6" in done.err
    lines, weights = curve(done.folder), load_file(done.folder / "export/model.safetensors")
    assert weights["pos_embed"].shape == (1, 17, 32)
    forget_after(done.folder, 2)
    again = run_trainer(small, tmp_path, 2, *options, ranks=2)
    assert again.code == 0 and "from step 2" in again.err, again.err
    assert curve(done.folder) == lines
    after = load_file(done.folder / "export/model.safetensors")
    assert all(torch.equal(after[name], value) for name, value in weights.items())


def test_stages_at_sizes_of_their_own(small: Path, tmp_path: Path) -> None:
    """Stage 1 at 32, stage 2 at 48 x 32, stage 3 at 64: positions resized, and the lineage says so."""
    said = {}
    for stage, size in ((1, "32"), (2, "[48, 32]"), (3, "64")):
        done = run_trainer(small, tmp_path, stage, "--data.image_size", size, "--train.steps", "2")
        assert done.code == 0, done.err
        said[stage] = done.err
    config = models.read_config(tmp_path / "stage3/export")
    assert [(e["image_size"], e["trained"]) for e in config["lineage"]["data"]] == [
        (32, "qkv"), ([48, 32], "backbone"), (64, "all")
    ]  # fmt: skip
    # Stage 1 trained no positions: stage 2 resizes the teacher's own. Stage 2 did: stage 3 resizes those.
    assert "position embeddings resized from the teacher" in said[2]
    assert "position embeddings resized from its [48, 32] pixels" in said[3]
    second = models.load(tmp_path / "stage2/export")
    assert second.patch_embed.grid_size == (6, 4)
    assert second(torch.zeros(1, 3, 48, 32)).shape == (1, 4)
    assert config["backbone"]["kwargs"]["img_size"] == 64 and config["input"]["image_size"] == 64
    with Image.open(tmp_path / "stage2/pictures/features.png") as picture:
        assert picture.width > 3 * 149 and picture.height > 8 * 224  # 224 pixels high, 8 rows of 3


@pytest.fixture(scope="module")
def rotary(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like `small` whose teacher is a DINOv3."""
    folder = tmp_path_factory.mktemp("rotary")
    torch.manual_seed(0)
    teacher = timm.create_model("vit_small_patch16_dinov3", img_size=32, **EVA)
    with torch.no_grad():
        for block in teacher.blocks:
            block.attn.qkv.weight.mul_(20)
            block.gamma_1.fill_(0.5)
            block.gamma_2.fill_(0.5)
    save_file(teacher.state_dict(), folder / "teacher.safetensors")
    recipe = json.loads((small / "recipe.yaml").read_text())
    recipe["teacher"] = {
        "name": "vit_small_patch16_dinov3",
        "kwargs": EVA,
        "weights": str(folder / "teacher.safetensors"),
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    (folder / "train.beton").symlink_to(small / "train.beton")
    return folder


def test_a_rotary_teacher_through_all_stages_on_any_ranks(rotary: Path, tmp_path: Path) -> None:
    options = ["--train.grad_checkpointing", "true", "--stage3.layer_decay", "0.7", "--stage3.drop_path", "0.2"]
    zero3 = ["--deepspeed", str(ROOT / "ds_configs/zero3.json")]
    for stage in (1, 2):
        one = run_trainer(rotary, tmp_path / "one", stage, *options)
        two = run_trainer(rotary, tmp_path / "two", stage, *options, *zero3, ranks=2)
        assert one.code == two.code == 0, one.err + two.err
        assert_same(curve(one.folder), curve(two.folder))
        judged = one.lines("val")
        assert judged[-1]["loss"] < judged[0]["loss"]
    three = run_trainer(rotary, tmp_path / "one", 3, *options)
    assert three.code == 0, three.err
    student = models.load(tmp_path / "one/stage3/export", (32, 48))
    assert models.linear_blocks(student) == [0, 1] and student(torch.zeros(1, 3, 32, 48)).shape == (1, 4)
