"""The demo's progress and time left, from what stages leave in their folders."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks import demo
from data.samples import COUNTS
from trainer.config import parse
from trainer.output.tracking import Tracker


def test_progress_follows_what_stages_write(tmp_path: Path) -> None:
    share, words = demo.progress(tmp_path)
    assert share == 0 and words == "recommended: stage 1 starts; paper: stage 1 starts"
    folder = tmp_path / "paper/stage1"
    folder.mkdir(parents=True)
    (tmp_path / "paper/stage1.log").write_text("DeepSpeed compiles its collective for CPU ranks, once: up to a minute")
    assert demo.progress(tmp_path)[1].endswith("stage 1 compiles DeepSpeed, once")
    settings = parse(["--stage", "1", "--run", str(tmp_path / "paper"), "--tracking", "[]"])
    tracker = Tracker(folder, settings, 0, 0, demo.STEPS[1])
    tracker.started(steps=demo.STEPS[1])
    begun, _ = demo.progress(tmp_path)
    tracker.log({"step": 32, "epoch": 0.25, "split": "val", "loss": 1.0})
    tracker.close()
    (folder / "metrics.jsonl").open("a").write('{"step": 6')  # half a line
    assert demo.progress(tmp_path)[0] == begun > 0
    (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text().rpartition("\n")[0] + "\n")
    share, words = demo.progress(tmp_path)
    assert share > begun and words.endswith(f"paper: stage 1, step 32 of {demo.STEPS[1]}")
    for name, (_, stages) in demo.CHAINS.items():
        for stage in stages:
            (export := tmp_path / name / f"stage{stage}/export").mkdir(parents=True)
            (export / "config.json").write_text("{}")
    assert demo.progress(tmp_path) == (1, "recommended: done; paper: done")


def test_the_steps_are_those_of_the_epochs() -> None:
    for stage, steps in demo.STEPS.items():
        batch = parse(["--stage", str(stage)]).train.batch_size
        assert round(demo.EPOCHS[stage] * (COUNTS["train"] // batch)) == steps


def test_the_time_left_comes_from_what_was_measured() -> None:
    assert demo.left(0, 0, 0) == pytest.approx(demo.USUAL)
    slow, fast = (demo.left(0.5, 0, elapsed) for elapsed in (600, 60))
    assert slow > 2 * fast
    assert demo.left(0.9, 0.8, 30) < demo.left(0.85, 0.8, 15)
    assert demo.left(1, 0, 200) == 0


def test_lines_where_no_terminal_watches(tmp_path: Path, capsys) -> None:
    with ThreadPoolExecutor(1) as pool:
        demo.watch(tmp_path, [pool.submit(time.sleep, 0.6)], time.monotonic())
    (line,) = capsys.readouterr().err.splitlines()
    assert "about 0:04:00 left; recommended: stage 1 starts" in line
