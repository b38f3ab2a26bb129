"""Signals, dying ranks and mistakes of one rank: what the others do, what is kept, and that no one waits for ever."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data import inspect
from data.write import write
from tests.conftest import BIN, ENVIRONMENT, ROOT, Blobs, curve, zygote
from tests.support.zygote import Run, free_port
from trainer.config import UserError
from trainer.ranks.signals import STOPPED
from trainer.ranks.watchdog import DIED, MISTAKE, Watchdog

ENDLESS = ("--train.steps", "1000000", "--train.save_every", "1000000", "--train.eval_first", "false")


def start(small: Path, tmp_path: Path, *options: str, ranks: int = 2, run: str = "run") -> Run:
    log = tmp_path / f"log{len(list(tmp_path.iterdir()))}"
    log.mkdir()
    argv = ["--config", str(small / "recipe.yaml"), "--stage", "2", "--run", str(tmp_path / run), *options]
    return Run(zygote(small / "train.beton"), argv, log, ranks)


def wait_for(condition: Callable[[], bool], running: Callable[[], bool], seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert running(), "it ended before"
        assert time.monotonic() < end
        time.sleep(0.01)


def lines(stage: Path) -> list[dict]:
    return curve(stage) if (stage / "metrics.jsonl").exists() else []


def saved(stage: Path) -> list[str]:
    return sorted(path.name for path in (stage / "checkpoints").glob("*") if path.is_dir())


def test_nothing_is_left_in_shared_memory(small: Path, tmp_path: Path) -> None:
    port = free_port()
    command = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(port), "trainer/run.py", "--config"]
    command += [str(small / "recipe.yaml"), "--stage", "1", "--run", str(tmp_path / "run"), "--train.steps", "1"]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True, timeout=400)
    assert not [path for path in Path("/dev/shm").iterdir() if f"_{port}_" in path.name]


def test_a_stop_in_evaluation_loses_nothing(small: Path, tmp_path: Path) -> None:
    write(Blobs(240, 1), tmp_path / "val.beton", raw_share=1.0, progress=False)
    options = ("--data.val", str(tmp_path / "val.beton"), "--train.micro_batch_size", "2", "--train.eval_every", "3",
               "--train.eval_first", "false")  # fmt: skip
    undisturbed = start(small, tmp_path, *options, run="undisturbed")
    assert undisturbed.wait(200) == 0, undisturbed.text("err")
    stopped, stage = start(small, tmp_path, *options), tmp_path / "run/stage2"
    wait_for(lambda: len(lines(stage)) == 3, lambda: stopped.poll() is None)
    stopped.ranks[1].signal(signal.SIGUSR1)
    time.sleep(0.1)
    stopped.ranks[1].signal(signal.SIGINT)  # a second one changes nothing
    assert stopped.wait(60) == STOPPED, stopped.text("err")
    assert "Traceback" not in stopped.text("err") and "warning" not in stopped.text("err")
    assert {rank.code for rank in stopped.ranks} <= {STOPPED, -signal.SIGTERM}  # the launcher's, once one has ended
    assert [line["split"] for line in lines(stage)] == ["train"] * 3
    assert saved(stage) == ["step-00000003"]
    again = start(small, tmp_path, *options)
    assert again.wait(200) == 0, again.text("err")
    assert lines(stage) == lines(tmp_path / "undisturbed/stage2")


def test_a_signal_in_start_up_is_heeded(small: Path, tmp_path: Path) -> None:
    run, stage = start(small, tmp_path, *ENDLESS, ranks=1), tmp_path / "run/stage2"
    wait_for((stage / "config.yaml").exists, lambda: run.poll() is None)
    run.signal(signal.SIGTERM)
    assert run.wait(100) == STOPPED, run.text("err")
    assert lines(stage) == [] and saved(stage) == []


@pytest.mark.parametrize("to", ("rank", "launcher"))
def test_a_stop_under_the_launcher(small: Path, tmp_path: Path, to: str) -> None:
    stage = tmp_path / "run/stage2"
    own = ["--config", str(small / "recipe.yaml"), "--stage", "2", "--run", str(tmp_path / "run"), *ENDLESS]
    command = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port()), "trainer/run.py", *own]
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(lambda: len(lines(stage)) > 2, lambda: launcher.poll() is None)
        assert launcher.poll() is None, (tmp_path / "log").read_text()
        found = subprocess.run(["pgrep", "-s", str(launcher.pid), "-f", "local_rank=1"], capture_output=True, text=True)
        (rank,) = map(int, found.stdout.split())
        os.kill(rank if to == "rank" else launcher.pid, signal.SIGTERM)
        assert launcher.wait(60) == (STOPPED if to == "rank" else -signal.SIGTERM)
        wait_for(lambda: not Path(f"/proc/{rank}").exists(), lambda: True, 60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
    assert "all is saved" in (tmp_path / "log").read_text()
    assert saved(stage) == [f"step-{lines(stage)[-1]['step']:08d}"]


@pytest.mark.parametrize("victim", (0, 1))
def test_a_rank_that_dies_is_named_and_the_job_ends(small: Path, tmp_path: Path, victim: int) -> None:
    run, stage = start(small, tmp_path, *ENDLESS), tmp_path / "run/stage2"
    wait_for(lambda: len(lines(stage)) > 2, lambda: run.poll() is None)
    os.kill(run.ranks[victim].pid, signal.SIGKILL)
    run.wait(60)
    assert run.ranks[1 - victim].code == DIED
    said = [line for line in run.text("err").splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and said[0].startswith(f"error: rank {victim} ("), said
    assert "died; run the same command again" in said[0]
    assert "Traceback" not in run.text("err")


def test_a_mistake_that_one_rank_meets_ends_all(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "train.beton"
    write(Blobs(96, 0), path, raw_share=0.0, progress=False)
    content = bytearray(path.read_bytes())
    starts = [at for at in range(len(content)) if content.startswith(b"\xff\xd8\xff", at)]
    assert len(starts) == inspect(path).num_samples
    content[starts[40] : starts[40] + 20] = bytes(20)  # one JPEG
    path.write_bytes(content)
    run = start(small, tmp_path, "--data.train", str(path), "--train.eval_first", "false")
    assert run.wait(100) == MISTAKE, run.text("err")
    assert {rank.code for rank in run.ranks} == {MISTAKE}
    said = [line for line in run.text("err").splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "damaged" in said[0], run.text("err")
    assert "Traceback" not in run.text("err")


def work(rank: int, size: int, port: int, log: Path, how: str) -> None:
    """A rank whose main thread waits for ever, as in a collective of NCCL when a peer is gone."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)  # pytest's goes elsewhere
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with Watchdog(rank, size, start=60) as watchdog:
        if how == "one is missing":
            watchdog.start = 5  # as the settings say, once they are read
        watchdog._connected.wait()
        if how == "all end":
            return
        if how == "all fail" or (how == "one fails" and rank == 1):
            watchdog.fail(UserError("no space left"))
        if how == "one raises" and rank == 1:
            raise KeyError("a bug")
        if how == f"{rank} is killed":
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)


@pytest.mark.parametrize(
    ("how", "codes", "words"),
    (
        ("all end", {0}, None),
        ("all fail", {MISTAKE}, "error: no space left"),
        ("one fails", {MISTAKE}, "error: no space left (rank 1)"),
        ("one raises", {DIED}, "error: rank 1 ({host}) died (KeyError: 'a bug'); run the same command again to resume"),
        ("0 is killed", {DIED, -9}, "error: rank 0 (127.0.0.1) died; run the same command again to resume"),
        ("2 is killed", {DIED, -9}, "error: rank 2 ({host}) died; run the same command again to resume"),
        ("one is missing", {DIED}, "error: rank 2 did not start within 5 s; see what it printed"),
    ),
)
def test_watchdog(tmp_path: Path, how: str, codes: set[int], words: str | None) -> None:
    port, log, fork = free_port(), tmp_path / "log", multiprocessing.get_context("fork")
    log.touch()
    there = range(2 if how == "one is missing" else 3)
    ranks = [fork.Process(target=work, args=(rank, 3, port, log, how), daemon=True) for rank in there]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(40)
    assert {rank.exitcode for rank in ranks} == codes, log.read_text()
    said = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert said == ([words.format(host=os.uname().nodename)] if words else []), log.read_text()
    assert ("Traceback" in log.read_text()) == (how == "one raises")


def test_samples_that_poison_a_step_are_named(small: Path, tmp_path: Path) -> None:
    from data import train_loader

    # Black images are finite under this mean and deviation, a white one overflows: two of them, in steps 3 and 4.
    seen = [[batch["index"].tolist() for batch in train_loader(small / "train.beton", image_size=32, batch_size=16,
             rank=rank, world_size=2).epoch()] for rank in range(2)]  # fmt: skip
    poison = {seen[1][2][5], seen[0][3][0]}

    class Poisoned(Blobs):
        def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
            return np.full((32, 32, 3), 255 * (index in poison), dtype=np.uint8), super().__getitem__(index)[1]

    write(Poisoned(96, 0), tmp_path / "train.beton", raw_share=1.0, progress=False)
    options = ("--data.train", str(tmp_path / "train.beton"), "--data.val", "null", "--data.mean", "[0,0,0]",
               "--data.std", "[1e-39,1e-39,1e-39]")  # fmt: skip
    run, stage = start(small, tmp_path, *options, "--train.max_skipped", "2"), tmp_path / "run/stage2"
    assert run.wait(100) == MISTAKE, run.text("err")
    (said,) = [line for line in run.text("err").splitlines() if line.startswith("error: ")]
    for step, rank in ((3, 1), (4, 0)):
        assert f"step {step}, rank {rank}, samples {' '.join(map(str, seen[rank][step - 1]))};" in said
        assert f"step {step}, rank {1 - rank}" not in said
    assert saved(stage) == ["step-00000002"]
    assert [line["loss"] is None for line in lines(stage)] == [False, False, True]
    again = start(small, tmp_path, *options, "--train.max_skipped", "3")
    assert again.wait(100) == 0, again.text("err")
    assert "from step 2" in again.text("err")
    assert [line["loss"] is None for line in lines(stage)] == [False, False, True, True, False, False]
