"""`--stage all`: what is missing of the stages 1, 2 and 3, one after the other, and one table at the end.

Each stage is forked from this process, which imports nothing heavy. So it starts as it does by itself, on all ranks of
any launcher, and all its memory is given back at its end. The same command goes on where the chain stopped.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from trainer.config import Settings, UserError, of_later_stage, parse
from trainer.output.kept import check_kept, evaluations
from trainer.output.paths import is_complete, stage_path
from trainer.ranks.errors import MachineError
from trainer.ranks.launch import read_ranks

ALL = "all"
CHAIN = ("1", "2", "3")
STOPPED = 75  # as of a stage that a signal stopped
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
SCORES = {"top1": "top-1 (%)", "miou": "mIoU (%)", "feature_cosine": "feature cosine"}
_PR_SET_PDEATHSIG = 1  # prctl(2)


def is_asked(argv: list[str]) -> bool:
    """Whether `--stage all` was typed."""
    return with_stage(argv, "1") != argv and ALL in {arg.removeprefix("--stage=") for arg in argv}


def with_stage(argv: list[str], stage: str) -> list[str]:
    """The arguments with `stage` in place of all."""
    changed = []
    for before, arg in zip(["", *argv], argv, strict=False):
        whole = arg == f"--stage={ALL}" or (arg == ALL and before == "--stage")
        changed.append(arg.replace(ALL, stage) if whole else arg)
    return changed


def arguments(argv: list[str], stage: str) -> list[str]:
    """Those of a stage of the chain."""
    changed = with_stage(argv, stage)
    return changed if stage == CHAIN[0] else of_later_stage(changed)


def plan(argv: list[str]) -> dict[str, Settings]:
    """The settings of each stage of the chain.

    Raises:
        UserError: a setting does not exist or fit, or a stage was made with others.
    """
    softmax = parse(with_stage(argv, "3")).student.attention == "softmax"  # the baseline: nothing is converted
    stages = {stage: parse(arguments(argv, stage)) for stage in (CHAIN[-1:] if softmax else CHAIN)}
    for stage, settings in stages.items():
        check_kept(stage_path(settings.run, stage), settings)
    return stages


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, or that of the first stage that did not end with 0.

    Raises:
        UserError: see `plan`.
    """
    argv = sys.argv[1:] if argv is None else argv
    stages = plan(argv)
    first = _rank() == 0
    run = Path(next(iter(stages.values())).run)
    with _Forward() as forward:
        for number, (stage, settings) in enumerate(stages.items(), 1):
            path, of = stage_path(run, stage), f"stage {stage} ({number} of {len(stages)})"
            if is_complete(path) and not settings.dry_run:
                _say(first, f"{of} is complete: {path}")
                continue
            _say(first, f"{of} begins")
            if not first:
                time.sleep(1)  # rank 0 has left the stage before by now, and no other takes its port for the new one's
            began = time.monotonic()
            status = _in_a_process(arguments(argv, stage), stage, forward)
            if status:
                return status
            if settings.dry_run:
                continue
            took = timedelta(seconds=round(time.monotonic() - began))
            learned = "masks" if settings.task == "segmentation" else "labels"
            left_out = f"{of} is left out: data.train has no {learned}"
            _say(first, f"{of} is done after {took}" if is_complete(path) else left_out)
    if first and not next(iter(stages.values())).dry_run:
        print(summary(run, list(stages)), flush=True)
        _say(first, _report(run))
    return 0


def _report(run: Path) -> str:
    """Writes the page of the run, with its softmax baseline where there is one; says where, or why not."""
    from trainer.report import report

    beside = baseline(run)
    try:
        return f"report: {report([run, *([beside] if beside else [])], run / 'report.html')}"
    except UserError as error:
        return f"report: {error}"


def _rank() -> int:
    try:
        return read_ranks(dict(os.environ))[0]
    except MachineError:  # the stage says so
        return 0


def _say(first: bool, line: str) -> None:
    if first:
        print(line, file=sys.stderr, flush=True)


class _Forward:
    """Within its context `SIGNALS` go on to the stage that runs, which saves; no other begins."""

    def __init__(self) -> None:
        self.child, self.stopped = 0, False

    def __enter__(self) -> "_Forward":
        self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: object) -> None:
        self.stopped = True
        if self.child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.child, number)


@contextlib.contextmanager
def _blocked() -> Iterator[None]:
    """Within it `SIGNALS` wait."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _in_a_process(argv: list[str], stage: str, forward: _Forward) -> int:
    """The exit status of a stage that runs in a process of its own; 1 where something killed it."""
    if forward.stopped:
        return STOPPED
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    with _blocked():  # in the stage until it listens: what comes during its imports counts then
        forward.child = os.fork()
        if forward.child == 0:
            _be_the_stage(argv, stage, parent)
    code = os.waitstatus_to_exitcode(os.waitpid(forward.child, 0)[1])
    forward.child = 0
    if code >= 0:
        return code
    line = f"error: stage {stage} was ended by {signal.Signals(-code).name}; run the same command again to resume"
    print(line, file=sys.stderr, flush=True)
    return 1


def _be_the_stage(argv: list[str], stage: str, parent: int) -> NoReturn:
    status = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # when this command is killed the stage saves
        if os.getppid() != parent:
            signal.raise_signal(signal.SIGTERM)
        sys.argv[1:] = argv
        _leave_the_launchers_store(stage)
        from trainer.main import main as run_stage

        status = 0 if stage == "3" and not _has_targets() else run_stage()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _leave_the_launchers_store(stage: str) -> None:
    """torchrun's store outlives a stage, with what the ranks told each other then: each stage gets one of its own."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    from torch.distributed import TCPStore

    address, key = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), f"chain-{stage}"
    store = TCPStore(*address, is_master=False, wait_for_workers=False)
    if os.environ["RANK"] == "0":
        with socket.socket() as free:
            free.bind(("", 0))
            store.set(key, str(free.getsockname()[1]))
    os.environ |= {"MASTER_PORT": store.get(key).decode(), "TORCHELASTIC_USE_AGENT_STORE": "False"}


def _has_targets() -> bool:
    """Whether the training images have what stage 3 learns from. What does not fit the stage itself says."""
    from trainer.setup.cache import inspect_data

    try:
        settings = parse()
        train = inspect_data(settings)["train"]
    except (UserError, ValueError, OSError):
        return True
    return train.has_masks if settings.task == "segmentation" else train.has_labels


def summary(run: Path, stages: list[str]) -> str:
    """The table of a run: teacher, copied weights, each stage, and the softmax baseline of a run beside it."""
    lines = {stage: found for stage in stages if (found := evaluations(stage_path(run, stage)))}
    rows: list[tuple[str, dict[str, Any]]] = []
    every = [line for found in lines.values() for line in found]
    of_teacher = {name: line[f"teacher_{name}"] for line in every for name in SCORES if f"teacher_{name}" in line}
    if lines and stages[0] == "1":
        rows.append(("teacher (softmax)", of_teacher | {"feature_cosine": 1.0}))
        start = lines[next(iter(lines))][0]
        if start["step"] == 0:
            rows.append(("weights copied, not trained", start))
    rows += [(f"after stage {stage}", found[-1]) for stage, found in lines.items()]
    if (beside := baseline(run)) is not None:
        rows.append((f"softmax baseline ({beside})", evaluations(stage_path(beside, "3"))[-1]))
    exports = [path for stage in reversed(stages) if (path := stage_path(run, stage) / "export").is_dir()]
    end = f"student: {exports[0]}" if exports else ""
    columns = [name for name in SCORES if any(name in values for _, values in rows)]
    if not columns:
        return f"nothing was evaluated: there are no validation images\n{end}"
    head = ["", *(SCORES[name] for name in columns)]
    cells = [[label, *(_number(values.get(name), name) for name in columns)] for label, values in rows]
    widths = [max(len(row[i]) for row in [head, *cells]) for i in range(len(head))]
    text = [
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(pairs)).rstrip()
        for pairs in (list(zip(row, widths, strict=True)) for row in [head, *cells])
    ]
    return "\n".join([*text, end])


def _number(value: float | None, name: str) -> str:
    return "-" if value is None else f"{value:.4f}" if name == "feature_cosine" else f"{value:.2f}"


def baseline(run: Path) -> Path | None:
    """A run folder beside `run` whose stage 3 kept softmax attention, of the same teacher and training images."""

    def origin(path: Path) -> Any:
        try:
            config = json.loads((path / "stage3" / "export" / "config.json").read_text())
            lineage = config["lineage"]
            return lineage["linear_blocks"] == [], lineage["teacher"]["sha256"], lineage["data"][-1]["sha256"]
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            return None

    ours = origin(run)
    if ours is None or ours[0]:
        return None
    beside = sorted(path for path in run.absolute().parent.iterdir() if path.is_dir() and evaluations(path / "stage3"))
    return next((run.parent / path.name for path in beside if origin(path) == (True, *ours[1:])), None)
