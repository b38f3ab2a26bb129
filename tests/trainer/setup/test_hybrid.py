"""`student.keep_softmax auto:K`: a greedy choice by naive reference, one for all ranks, kept, and taken over later."""

import json
from pathlib import Path

import pytest
import timm
import torch

import models
from tests.conftest import ARCHITECTURE, run_trainer
from tests.trainer.stages.test_base import job_of
from trainer.config import UserError
from trainer.setup.hybrid import rank_blocks

AUTO = ["--student.keep_softmax", "auto:1"]


def test_the_least_damage_turns_linear_first() -> None:
    torch.manual_seed(0)
    teacher = timm.create_model("vit_tiny_patch16_224", img_size=32, **ARCHITECTURE | {"depth": 4}).eval()
    with torch.no_grad():
        for block, factor in zip(teacher.blocks, (200, 50, 400, 100), strict=True):
            block.attn.qkv.weight.mul_(factor)
    images = [torch.randn(3, 3, 32, 32), torch.randn(5, 3, 32, 32)]

    def damage(linear: set[int]) -> float:
        student = models.linearize(teacher, keep_softmax=set(range(4)) - linear)
        with torch.no_grad():
            pairs = [(student.forward_features(x), teacher.forward_features(x)) for x in images]
        left, right = (torch.cat(part) for part in zip(*pairs, strict=True))
        return (1 - torch.nn.functional.cosine_similarity(left, right, dim=-1)).mean().item()

    found = rank_blocks(teacher, models.linearize(teacher), images, keep=1)
    assert found["alone"] == pytest.approx([damage({i}) for i in range(4)], rel=1e-3, abs=1e-6)
    linear: set[int] = set()
    for entry in found["order"]:
        damages = {i: damage(linear | {i}) for i in range(4) if i not in linear}
        assert entry["block"] == min(damages, key=damages.get)
        linear.add(entry["block"])
        assert entry["damage"] == pytest.approx(damage(linear), rel=1e-3)
    assert found["softmax"] == sorted(set(range(4)) - linear) and len(linear) == 3
    assert all(type(block.attn).__name__ == "Attention" for block in teacher.blocks)  # as it was


def test_ranks_agree_and_later_stages_take_the_choice_over(small: Path, tmp_path: Path) -> None:
    one = run_trainer(small, tmp_path / "one", 1, *AUTO, "--train.steps", "2")
    two = run_trainer(small, tmp_path / "two", 1, *AUTO, "--train.steps", "2", ranks=2)
    assert one.code == two.code == 0, one.err + two.err
    kept, other = (json.loads((run.folder / "blocks.json").read_text()) for run in (one, two))
    assert kept["softmax"] == other["softmax"] and kept["alone"] == pytest.approx(other["alone"], rel=1e-3)
    assert f"student.keep_softmax auto:1: block {kept['softmax'][0]} of 2; the final tokens lose" in one.err
    linear = [i for i in range(2) if i not in kept["softmax"]]
    assert models.read_config(one.folder / "export")["attention"]["linear_blocks"] == linear
    # What is kept counts, also against what would be measured now.
    later = run_trainer(small, tmp_path / "one", 2, *AUTO, "--train.steps", "1")
    assert later.code == 0, later.err
    assert models.read_config(later.folder / "export")["lineage"]["linear_blocks"] == linear
    assert not (later.folder / "blocks.json").exists()
    again = run_trainer(small, tmp_path / "one", 1, *AUTO, "--train.steps", "2")
    assert again.code == 0 and "complete" in again.out, again.err


def test_a_kept_choice_is_read(small: Path, tmp_path: Path) -> None:
    done = run_trainer(small, tmp_path, 1, *AUTO, "--train.steps", "1")
    assert done.code == 0, done.err
    file = done.folder / "blocks.json"
    kept = json.loads(file.read_text())
    swapped = kept | {"softmax": [1 - kept["softmax"][0]]}
    file.write_text(json.dumps(swapped))
    options = [*AUTO, "--run", str(tmp_path)]
    assert models.linear_blocks(job_of(small, 1, *options).stage.student) == kept["softmax"]
    file.write_text("{")  # damaged: measured again
    assert models.linear_blocks(job_of(small, 1, *options).stage.student) == swapped["softmax"]
    assert json.loads(file.read_text()) == kept


@pytest.mark.parametrize("value", ("auto:2", "auto:0", "auto", "auto:x"))
def test_what_does_not_fit_is_refused(small: Path, value: str) -> None:
    words = "the model has 2 blocks" if value == "auto:2" else "must be a list .* or auto:K for K blocks"
    with pytest.raises(UserError, match=words):
        job_of(small, 1, "--student.keep_softmax", value)
    assert not (small / "none").exists()


def test_a_dry_run_measures_and_writes_nothing(small: Path, tmp_path: Path) -> None:
    done = run_trainer(small, tmp_path / "run", 1, *AUTO, "--dry_run")
    assert done.code == 0, done.err
    assert "student.keep_softmax auto:1" in done.out
    assert not (tmp_path / "run").exists()
