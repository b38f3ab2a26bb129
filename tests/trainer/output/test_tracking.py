"""Metrics, wandb and TensorBoard; and when files and services fail."""

import json
import resource
import struct
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from trainer.config import UserError, parse
from trainer.output.tracking import Tracker


def test_metrics_survive_garbage_and_say_when_they_cannot_be_written(small: Path, tmp_path: Path, capsys) -> None:
    settings = parse(["--config", str(small / "recipe.yaml"), "--stage", "2", "--run", str(tmp_path)])
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps({"step": step, "split": split}) for step in (1, 2, 3) for split in ("train", "val")]
    garbage = [b"\xff\x00\xfe", b"[1]", b'"step"', b'{"step": "2"}', b"[" * 100_000, b"", b'{"loss": 1}']
    torn = [line.encode()[:9] for line in good[:1]]
    path.write_bytes(b"\n".join([*garbage, *(line.encode() for line in good), *torn]))
    tracker = Tracker(tmp_path, settings, 0, 2, 9)
    assert path.read_text().splitlines() == good[:4]
    assert tracker.was_evaluated(2) and not tracker.was_evaluated(3)
    tracker.log({"step": 3, "split": "val", "loss": float("nan"), "norm": torch.tensor(2.0)})
    line = json.loads(path.read_text().splitlines()[-1])
    assert abs(line.pop("time") - time.time()) < 60
    assert line == {"step": 3, "split": "val", "loss": None, "norm": 2.0}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, limits[1]))  # as on a full disk
    try:
        with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written \(file too large\)"):
            tracker.log({"step": 4, "split": "val", "loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    tracker.close()
    assert not path.read_bytes().endswith(b"\n")  # the line was torn
    Tracker(tmp_path, settings, 0, 3, 9).close()
    assert path.read_text().splitlines()[:-1] == good[:4]
    assert json.loads(path.read_text().splitlines()[-1])["step"] == 3


def test_wandb_that_fails_is_left_off(small: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    argv = ["--config", str(small / "recipe.yaml"), "--stage", "2", "--run", str(tmp_path), "--tracking", "[wandb]"]
    monkeypatch.setenv("WANDB_MODE", "no such mode")
    tracker = Tracker(tmp_path, parse(argv), 0, 0, 9)
    tracker.log({"step": 1, "split": "val", "loss": 1.0})
    tracker.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 1.0
    assert capsys.readouterr().err.count("warning: wandb is left off") == 1


def events(folder: Path) -> list[Event]:
    """What TensorBoard's files hold: records of a length, its checksum, an event and its checksum."""
    found = []
    for path in sorted(folder.glob("events.*")):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (size,) = struct.unpack_from("<Q", content, at)
            found.append(Event.FromString(content[at + 12 : at + 12 + size]))
            at += size + 16
    return found


def test_tensorboard_has_metrics_and_pictures(small: Path, tmp_path: Path) -> None:
    argv = ["--config", str(small / "recipe.yaml"), "--stage", "2", "--run", str(tmp_path)]
    settings = parse([*argv, "--tracking", "[tensorboard]"])
    Image.new("RGB", (6, 4), "red").save(tmp_path / "masks.png")
    for start in (0, 2):  # the second goes on after step 2
        tracker = Tracker(tmp_path, settings, 0, start, 9)
        for step in range(start + 1, 4):
            tracker.log({"step": step, "split": "val", "epoch": 0.5, "loss": step / 4, "norm": float("nan")})
        tracker.pictures([tmp_path / "masks.png"], 3)
        tracker.close()
    found = events(tmp_path / "tensorboard")
    values = [(event.step, value) for event in found for value in event.summary.value]
    assert [(step, v.simple_value) for step, v in values if v.tag == "val/loss"] == [
        (1, 0.25), (2, 0.5), (3, 0.75), (3, 0.75)
    ]  # fmt: skip
    assert not any(v.tag in ("val/norm", "val/time", "val/step") for _, v in values)
    shown = [v.image for _, v in values if v.tag == "pictures/masks"]
    assert [(image.width, image.height) for image in shown] == [(6, 4)] * 2
    assert 3 in [event.step for event in found if event.HasField("session_log")]  # what came after is forgotten
    assert all(abs(event.wall_time - time.time()) < 60 for event in found)
