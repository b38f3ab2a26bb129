"""`--stage all`: the stages that are missing, in one command, which goes on where it stopped; and its table."""

import json
import signal
import time
from pathlib import Path

import pytest

from jobs.settings import parse as parse_jobs
from tests.conftest import run_trainer, zygote
from tests.support.zygote import Run
from tests.trainer.setup.test_cache import save_blobs
from trainer.chain import is_asked, plan, summary, with_stage
from trainer.config import UserError

SMALL = ["--train.batch_size", "8", "--train.steps", "2"]


def test_all_stands_for_each_stage() -> None:
    for typed, stage_2 in (
        (["--run", "all", "--stage", "all"], ["--run", "all", "--stage", "2"]),
        (["--stage=all", "--run=all"], ["--stage=2", "--run=all"]),
    ):
        assert is_asked(typed) and with_stage(typed, "2") == stage_2
    assert not is_asked(["--stage", "1", "--run", "all"])
    assert list(parse_jobs(["--stage", "all", "--cluster", "local", "--run", "x"])[0]) == ["1", "2", "3"]
    assert list(plan(["--stage", "all", "--student.attention", "softmax"])) == ["3"]
    from_scratch = plan(["--stage", "all", "--student.parent", "none"])
    assert [settings.student.parent for settings in from_scratch.values()] == ["none", None, None]
    for options in ([], ["--student.attention", "softmax"]):
        with pytest.raises(UserError, match=r"student.parent there: .*leave it out"):
            plan(["--stage", "all", "--student.parent", "there", *options])
    with pytest.raises(UserError, match=r"train.lr fast: must be"):
        plan(["--stage", "all", "--train.lr", "fast"])


def test_a_chain_on_a_folder_stops_and_goes_on(small: Path, tmp_path: Path) -> None:
    images = save_blobs(tmp_path / "photos", 40)
    argv = ["--config", str(small / "recipe.yaml"), "--stage", "all", "--run", str(tmp_path / "run")]
    argv += ["--data.train", str(images), "--data.cache", str(tmp_path / "cache"), "--train.batch_size", "8"]
    (tmp_path / "log").mkdir()
    first = Run(zygote(small / "train.beton"), [*argv, "--train.steps", "400"], tmp_path / "log")
    metrics, end = tmp_path / "run/stage1/metrics.jsonl", time.monotonic() + 200
    while not (metrics.exists() and '"train"' in metrics.read_text()):
        assert time.monotonic() < end and first.poll() is None, first.text("err")
        time.sleep(0.1)
    first.signal(signal.SIGTERM)
    assert first.wait(60) == 75, first.text("err")
    assert "all is saved" in first.text("err") and "stage 2" not in first.text("err")

    options = [*argv[4:], *SMALL]  # other settings than it was begun with
    assert "train.steps was 400, is now 2" in run_trainer(small, tmp_path / "run", "all", *options).error
    run = run_trainer(small, tmp_path / "two", "all", *argv[6:], *SMALL, ranks=2)
    assert run.code == 0, run.err
    assert run.err.count("stage 3 (3 of 3) is done after") == 1 and run.err.count("writing") == 0
    table = run.out.splitlines()[-7:]  # after what DeepSpeed prints
    assert [line.split("  ")[0] for line in table[1:-1]] == [
        "teacher (softmax)", "weights copied, not trained", "after stage 1", "after stage 2", "after stage 3",
    ]  # fmt: skip
    assert table[0].split("  ")[-1] == "feature cosine" and table[-1] == f"student: {tmp_path}/two/stage3/export"
    assert "After stage 3" in (tmp_path / "two/report.html").read_text() and "/two/report.html" in run.err
    again = run_trainer(small, tmp_path / "two", "all", *argv[6:], *SMALL)
    assert again.code == 0 and again.out.splitlines() == table and again.err.count("is complete") == 3


def test_images_without_labels_end_before_stage_3(small: Path, tmp_path: Path) -> None:
    images = tmp_path / "photos"
    for file in save_blobs(tmp_path / "by class", 20).rglob("*.png"):
        images.mkdir(exist_ok=True)
        file.rename(images / file.name)
    run = run_trainer(small, tmp_path / "run", "all", "--data.train", str(images), "--data.cache",
                      str(tmp_path / "cache"), "--data.val_share", "0", *SMALL)  # fmt: skip
    assert run.code == 0, run.err
    assert "stage 3 (3 of 3) is left out: data.train has no labels" in run.err
    assert "nothing was evaluated" in run.out and f"student: {tmp_path}/run/stage2/export" in run.out


def test_a_dry_run_shows_each_stage(small: Path, tmp_path: Path) -> None:
    dry = run_trainer(small, tmp_path / "dry", "all", "--dry_run", *SMALL)
    assert dry.code == 0, dry.err
    assert [line[:8] for line in dry.out.splitlines() if line.startswith("stage ")] == [
        "stage 1:", "stage 2:", "stage 3:",
    ]  # fmt: skip


def test_the_table_names_the_softmax_baseline_beside(tmp_path: Path) -> None:
    def made(run: str, stage: str, linear: list[int], *values: dict) -> None:
        folder = tmp_path / run / f"stage{stage}"
        (folder / "export").mkdir(parents=True)
        lines = [{"step": i, "split": "val"} | value for i, value in enumerate(values)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut')
        lineage = {"linear_blocks": linear, "teacher": {"sha256": "t"}, "data": [{"sha256": "d"}]}
        (folder / "export/config.json").write_text(json.dumps({"lineage": lineage}))

    copied, aligned = ({"top1": 10.0, "teacher_top1": 80.0, "feature_cosine": c} for c in (0.25, 0.5))
    made("mine", "1", [0], copied, aligned)
    made("mine", "3", [0], {"top1": 70.0})
    made("other", "3", [0], {"top1": 99.0})
    made("softmax", "3", [], {"top1": 9.0}, {"top1": 75.0})
    rows = [line.split() for line in summary(tmp_path / "mine", ["1", "2", "3"]).splitlines()]
    assert ["teacher", "(softmax)", "80.00", "1.0000"] in rows and ["after", "stage", "1", "10.00", "0.5000"] in rows
    assert ["weights", "copied,", "not", "trained", "10.00", "0.2500"] in rows
    assert ["after", "stage", "3", "70.00", "-"] in rows
    assert rows[-2] == ["softmax", "baseline", f"({tmp_path}/softmax)", "75.00", "-"]
    assert rows[-1] == ["student:", f"{tmp_path}/mine/stage3/export"]
