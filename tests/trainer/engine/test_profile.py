"""`train.profile`, and the metrics of speed, on a small run of two ranks."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.conftest import Result, run_trainer
from trainer.config import UserError, parse
from trainer.engine.profile import PARTS
from trainer.engine.speed import Clock


@pytest.fixture(scope="module")
def run(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    options = ("--train.profile", "3-4", "--train.micro_batch_size", "4", "--train.eval_first", "false",
               "--data.val", "null", "--student.parent", "none")  # fmt: skip
    done = run_trainer(small, tmp_path_factory.mktemp("profile"), 2, *options, ranks=2)
    assert done.code == 0, done.err
    return done


def test_a_table_says_what_took_how_long(run: Result) -> None:
    text = (run.folder / "profile/steps-3-4.txt").read_text()
    assert text.strip() in run.err  # the screen shows it
    rows = dict(re.findall(r"^(\S.*?) {2,}(-?[\d.]+) ms", text, re.MULTILINE))
    times = {name: float(value) for name, value in rows.items()}
    assert list(times) == [*PARTS, "the rest", "a step", "communication, within the above"]
    assert all(times[name] > 0 for name in times if name != "the rest")
    parts = sum(times[name] for name in (*PARTS, "the rest"))
    assert parts == pytest.approx(times["a step"], abs=0.1)
    assert times["communication, within the above"] < times["a step"]


def test_the_trace_has_the_parts_of_these_steps(run: Result) -> None:
    events = json.loads((run.folder / "profile/steps-3-4.json").read_text())["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert {name: names.count(name) for name in ("data", "backward", "optimizer", "logging")} == {
        "data": 4, "backward": 4, "optimizer": 4, "logging": 2
    }  # fmt: skip


def test_metrics_tell_the_speed(run: Result) -> None:
    for line in run.lines("train"):
        assert line["seconds_per_step"] == pytest.approx(16 / line["images_per_second"])
        assert line["tflops"] > 0 and line["peak_memory_gib"] > 0.05 and 0 <= line["data_wait"] < 1
        assert all(line[f"mfu{part}"] is None for part in ("", "_teacher", "_student", "_operator"))  # of a CPU


def test_waits_for_data_are_seen() -> None:
    def slow() -> Iterator[int]:
        for i in range(3):
            time.sleep(0.02)
            yield i

    clock = Clock(0, torch.device("cpu"))
    batches = clock.waiting_for(slow())
    for _ in range(3):
        next(batches)
        time.sleep(0.02)
    values = clock.rates(3, 1, 1, None)
    waited = values["data_wait"] * 3 * values["seconds_per_step"]
    assert 0.06 <= waited <= 3 * values["seconds_per_step"] - 0.06


@pytest.mark.parametrize("steps", ("4", "4-3", "0-2", "a-b"))
def test_steps_that_are_none(steps: str) -> None:
    with pytest.raises(UserError, match=r"train\.profile.*FROM-TO"):
        parse(["--stage", "2", "--train.profile", steps])
