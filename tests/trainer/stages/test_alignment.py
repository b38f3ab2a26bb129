"""The losses of alignment by their settings, and the errors of each block, against naive references."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import models
from data import train_loader
from models import taps
from tests.conftest import run_trainer
from tests.trainer.stages.test_base import job_of
from tests.trainer.stages.test_stages import assert_resumes_to_the_bit
from trainer.config import UserError, parse

CLOSE = {"rtol": 1e-4, "atol": 1e-7}


@pytest.fixture(scope="module")
def batch(small: Path) -> dict:
    return next(iter(train_loader(small / "train.beton", image_size=32, batch_size=16).epoch()))


def both(stage, image: torch.Tensor, *names: str) -> list[dict[str, torch.Tensor]]:
    """What teacher and student give at `names`, each by itself."""
    found = []
    for vit in (stage.teacher, stage.student):
        with torch.no_grad(), taps(vit, names) as read:
            vit(image)
        found.append(dict(read))
    return found


def test_stage_1_tells_the_error_of_each_block(small: Path, batch: dict) -> None:
    stage = job_of(small, 1).stage.eval()
    with torch.no_grad():
        values = stage(batch)
    forced, free = ([values[f"error_{how}.blocks.{i}"] for i in range(2)] for how in ("teacher_forced", "free_running"))
    torch.testing.assert_close(torch.stack(forced).mean(0), values["loss"])
    torch.testing.assert_close(free[0], forced[0])  # the first block reads the same in both
    of_teacher, of_student = both(stage, batch["image"], "blocks.1.mha")
    expected = (of_teacher["blocks.1.mha"] - of_student["blocks.1.mha"]).square().mean((1, 2))
    torch.testing.assert_close(free[1], expected, **CLOSE)
    assert not torch.allclose(free[1], forced[1], rtol=0.05)
    assert set(stage.train()(batch)) == {"loss"}


def test_stage_2_tells_the_error_of_each_block(small: Path, batch: dict) -> None:
    stage = job_of(small, 2, "--student.keep_softmax", "[0]").stage.eval()
    with torch.no_grad():
        values = stage(batch)
    of_teacher, of_student = both(stage, batch["image"], "blocks.1.mha")
    expected = (of_teacher["blocks.1.mha"] - of_student["blocks.1.mha"]).square().mean((1, 2))
    torch.testing.assert_close(values["error_free_running.blocks.1"], expected, **CLOSE)
    assert "error_free_running.blocks.0" not in values
    assert set(stage.train()(batch)) == {"loss"}


@pytest.mark.parametrize("loss", ("mse", "cosine_smooth_l1"))
@pytest.mark.parametrize("weight", (0, 1, 8))
def test_prefix_tokens_have_a_weight(small: Path, batch: dict, loss: str, weight: float) -> None:
    options = ["--stage2.loss", loss, "--stage2.prefix_weight", str(weight)]
    stage = job_of(small, 2, *options).stage.train()
    of_teacher, of_student = (x["norm"] for x in both(stage, batch["image"], "norm"))
    if loss == "mse":
        error = (of_teacher - of_student).square().mean(-1)
    else:
        error = 0.9 * (1 - F.cosine_similarity(of_teacher, of_student, dim=-1))
        error = error + 0.1 * F.smooth_l1_loss(of_student, of_teacher, reduction="none").mean(-1)
    weights = torch.tensor([float(weight)] + [1.0] * 16)
    expected = (error * weights / weights.sum()).sum(1).mean()
    torch.testing.assert_close(stage(batch)["loss"].detach(), expected, **CLOSE)


@pytest.mark.parametrize("checkpointing", ("false", "true"))
def test_blocks_and_attention_are_matched_as_well(small: Path, batch: dict, checkpointing: str) -> None:
    options = ["--stage2.blocks", "[0]", "--stage2.block_weight", "0.5", "--stage2.attention_weight", "50"]
    stage = job_of(small, 2, *options, "--train.grad_checkpointing", checkpointing).stage.train()
    of_teacher, of_student = both(stage, batch["image"], "norm", "blocks.0.rc2")
    final, between = ((of_teacher[name] - of_student[name]).square().mean() for name in ("norm", "blocks.0.rc2"))
    attention = job_of(small, 1).stage.train()(batch)["loss"]
    values = stage(batch)
    torch.testing.assert_close(values["blocks"], between, **CLOSE)
    torch.testing.assert_close(values["attention"], attention, **CLOSE)
    torch.testing.assert_close(values["loss"], final + 0.5 * between + 50 * attention, **CLOSE)
    values["blocks"].backward()
    trained = {name for name, p in stage.student.named_parameters() if p.grad is not None}
    assert any(name.startswith("blocks.0.mlp") for name in trained)
    assert not any(name.startswith("blocks.1") for name in trained)


@pytest.mark.parametrize("mixup", ("0", "0.8"))
def test_stage_3_keeps_the_alignment_on(small: Path, batch: dict, mixup: str) -> None:
    plain = job_of(small, 3, "--stage3.mixup", mixup).stage.train()(batch)
    stage = job_of(small, 3, "--stage3.mixup", mixup, "--stage3.attention_weight", "50").stage
    values = stage.train()(batch)
    torch.testing.assert_close(values["loss"], plain["loss"] + 50 * values["attention"], **CLOSE)
    if mixup == "0":  # else of mixed images
        torch.testing.assert_close(values["attention"], job_of(small, 1).stage.train()(batch)["loss"], **CLOSE)
    values["attention"].backward()
    reached = {name for name, p in stage.student.named_parameters() if p.grad is not None}
    assert reached == {name for name, _ in stage.student.named_parameters() if ".attn." in name}
    assert "attention" not in stage.eval()(batch)


def test_standardised_targets_are_the_runs(small: Path, tmp_path: Path) -> None:
    options = ["--stage2.standardise", "true", "--stage2.blocks", "[0]", "--train.save_every", "3", "--train.keep", "9"]
    done = run_trainer(small, tmp_path, 2, *options, ranks=2)
    assert done.code == 0, done.err
    file = done.folder / "target_statistics.safetensors"
    found = load_file(file)
    given = models.read_config(done.folder / "export")["input"]
    how = {"mean": given["mean"], "std": given["std"], "scale": (0.25, 1.0), "ratio": (0.75, 1.3333), "hflip": 0.5}
    loader = train_loader(small / "train.beton", image_size=32, batch_size=16, **how)
    stage = job_of(small, 2).stage
    read = [both(stage, batch["image"], "norm", "blocks.0.rc2")[0] for batch in loader.epoch(0)]
    for name in ("norm", "blocks.0.rc2"):
        tokens = torch.cat([x[name] for x in read]).flatten(0, 1)
        torch.testing.assert_close(found[f"{name}.mean"], tokens.mean(0), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found[f"{name}.deviation"], tokens.std(0), rtol=1e-3, atol=1e-4)
    assert set(load_file(done.folder / "export/model.safetensors")) == set(load_file(small / "teacher.safetensors"))
    plain = run_trainer(small, tmp_path / "plain", 2, "--train.steps", "1")
    assert plain.code == 0, plain.err
    assert plain.lines("val")[0]["loss"] != pytest.approx(done.lines("val")[0]["loss"], rel=0.05)
    assert plain.lines("val")[0]["feature_cosine"] == pytest.approx(done.lines("val")[0]["feature_cosine"], rel=1e-3)
    before = file.read_bytes()
    assert_resumes_to_the_bit(small, tmp_path, 2, *options, ranks=2)
    assert file.read_bytes() == before


def test_blocks_are_matched_and_watched_also_compiled(small: Path, tmp_path: Path) -> None:
    options, found = ["--stage2.blocks", "auto:1", "--train.steps", "2", "--train.lr", "1e-4"], {}
    for compiled in ("true", "false"):  # compiled in a fresh process, as in the test of stage 1
        given = [*options, "--train.compile", compiled]
        done = run_trainer(small, tmp_path / compiled, 2, *given, launcher=compiled == "true")
        assert done.code == 0, done.err
        last = done.lines("val")[-1]
        found[compiled] = {key: last[key] for key in last if key.startswith(("error_free_running", "blocks"))}
    assert len(found["true"]) == 3
    assert found["true"] == pytest.approx(found["false"], rel=1e-3)


def test_what_does_not_fit_is_refused(small: Path) -> None:
    with pytest.raises(UserError, match=r"stage2\.blocks .*the model has blocks 0 to 1"):
        job_of(small, 2, "--stage2.blocks", "[2]")
    for auto in ("auto:1", "auto:3"):
        assert job_of(small, 2, "--stage2.blocks", auto).stage.between == ("blocks.1.rc2",)
    for stage in ("2", "3"):
        with pytest.raises(UserError, match=rf"stage{stage}\.attention_weight 50.*train\.compile"):
            parse(["--stage", stage, f"--stage{stage}.attention_weight", "50", "--train.compile", "true"])
    for setting, value in (("attention", "softmax"), ("trainable", "head")):
        with pytest.raises(UserError, match=rf"stage3\.attention_weight 50.*student\.{setting} {value}"):
            parse(["--stage", "3", "--stage3.attention_weight", "50", f"--student.{setting}", value])
    with pytest.raises(UserError, match=r"teacher\.pretrained false: stage 3 aligns with a trained teacher"):
        untrained = ["--teacher.pretrained", "false", "--teacher.weights", "null"]
        job_of(small, 3, "--stage3.attention_weight", "50", *untrained)
