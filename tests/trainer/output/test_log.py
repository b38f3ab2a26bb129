"""The screen of a run: a bar on a terminal, no noise of libraries, no alarm on Ctrl-C; and `log.txt`."""

import contextlib
import fcntl
import io
import logging
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ENVIRONMENT, ROOT
from trainer.config import parse
from trainer.output.log import Log, has_width
from trainer.output.tracking import Tracker


@contextlib.contextmanager
def terminal(columns: int) -> Iterator[int]:
    """The file descriptor of a terminal of so many columns."""
    controller, screen = pty.openpty()
    fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    try:
        yield screen
    finally:
        os.close(controller)
        os.close(screen)


@pytest.fixture
def screen() -> Iterator[io.StringIO]:
    """What DeepSpeed's logger shows; its own handlers come back afterwards."""
    logger, shown = logging.getLogger("DeepSpeed"), io.StringIO()
    before = logger.handlers[:], logger.level, logger.propagate
    logger.handlers[:], logger.propagate = [logging.StreamHandler(shown)], False
    yield shown
    logger.handlers[:], level, logger.propagate = before
    logger.setLevel(level)


def test_libraries_log_to_a_file(tmp_path: Path, screen: io.StringIO, capsys) -> None:
    with Log(tmp_path, 0) as log:
        logging.getLogger("DeepSpeed").info("quiet")
        logging.getLogger("DeepSpeed").warning("loud")
        log.note("ours")
        with log.printed():
            print("built")
        warnings.warn("of code", DeprecationWarning, stacklevel=1)
    logging.getLogger("DeepSpeed").warning("later")
    text, said = (tmp_path / "log.txt").read_text(), capsys.readouterr()
    assert [word for word in ("quiet", "loud", "ours", "built", "of code", "later") if word in text] == [
        "quiet", "loud", "ours", "built", "of code"
    ]  # fmt: skip
    assert screen.getvalue().split() == ["loud", "later"] and not said.out + said.err
    with Log(tmp_path, 0) as log:
        log.note("again")
    with Log(tmp_path, 1) as log:
        log.note("another rank")
    assert (tmp_path / "log.txt").read_text().startswith(text) and "another" not in (tmp_path / "log.txt").read_text()


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path, screen: io.StringIO, capsys) -> None:
    for folder in (tmp_path / "missing", Path("/dev/full")):  # /dev/full/log.txt cannot be opened either
        with Log(folder, 0) as log:
            logging.getLogger("DeepSpeed").warning("loud")
            log.note("ours")
    (tmp_path / "log.txt").symlink_to("/dev/full")
    with Log(tmp_path, 0) as log:
        log.note("ours")
    said = capsys.readouterr()
    assert screen.getvalue().split() == ["loud", "loud"] and not said.out + said.err


def test_a_bar_needs_a_terminal_with_columns(tmp_path: Path) -> None:
    for columns, expected in ((80, True), (0, False)):
        with terminal(columns) as screen, os.fdopen(os.dup(screen), "w") as stream:
            assert has_width(stream) is expected
    with (tmp_path / "file").open("w") as stream:
        assert not has_width(stream)


def test_evaluations_are_told_without_their_blocks(small: Path, tmp_path: Path, capsys) -> None:
    settings = parse(["--config", str(small / "recipe.yaml"), "--stage", "2", "--run", str(tmp_path)])
    tracker = Tracker(tmp_path, settings, 0, 0, 9)
    tracker.log({"step": 1, "split": "val", "loss": 0.5, "error_free_running.blocks.0": 0.25})
    tracker.close()
    assert capsys.readouterr().err.splitlines() == ["step 1  split val  loss 0.5"]
    assert "blocks.0" in (tmp_path / "metrics.jsonl").read_text()


def test_ctrl_c_in_the_start_prints_a_line_alone(tmp_path: Path) -> None:
    command = [sys.executable, "trainer/run.py", "--stage", "1", "--run", str(tmp_path / "run")]
    run = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    end = time.monotonic() + 100
    while "libtorch" not in Path(f"/proc/{run.pid}/maps").read_text():  # the imports that take seconds
        assert run.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    said, _ = run.communicate(timeout=60)
    assert run.returncode == 75 and said == "stopped by a signal before training; run the same command again\n"
    assert not (tmp_path / "run").exists()
