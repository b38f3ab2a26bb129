"""A teacher that is spread over the ranks gives what a whole one gives."""

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT, curve, run_trainer


@pytest.mark.parametrize(("stage", "zero", "bf16"), [(1, 1, "false"), (2, 3, "true")])
def test_a_sharded_teacher_gives_the_same_losses(small: Path, tmp_path: Path, stage: int, zero: int, bf16: str) -> None:
    runs = {}
    for shard in ("false", "true"):
        config = str(ROOT / f"ds_configs/zero{zero}.json")
        options = ["--student.parent", "none", "--train.steps", "3", "--deepspeed", config, "--train.bf16", bf16]
        done = run_trainer(small, tmp_path / shard, stage, *options, "--teacher.shard", shard, ranks=2)
        assert done.code == 0, done.err
        runs[shard] = done
    said = re.search(r"teacher: spread over the ranks, ([\d,]+) of its ([\d,]+) parameters on each", runs["true"].err)
    held, whole = (int(number.replace(",", "")) for number in said.groups())
    assert whole / 2 <= held < 0.51 * whole and "spread" not in runs["false"].err
    assert curve(runs["true"].folder) == curve(runs["false"].folder)


@pytest.mark.parametrize("other", [("--train.compile", "true"), ("--student.keep_softmax", "auto:1")])
def test_what_needs_a_whole_teacher_is_refused(small: Path, tmp_path: Path, other: tuple[str, str]) -> None:
    assert "error: teacher.shard: " in run_trainer(small, tmp_path, 2, "--teacher.shard", "true", *other).error
