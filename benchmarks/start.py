"""From the command to the first step: CPU seconds, part by part. `make bench-start`.

A process runs stage 2 of the embedded default for one step, and notes its CPU time (all its threads, and the processes
that it started) at each milestone. The first start of all compiles the decoder and DeepSpeed's collective; a warm start
finds both. The evaluation before the first step is training's work, not the start's: it is left out.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.common import ROOT, claim

TARGET, DOOR, BATCH = 10.0, 2.0, 2.0  # CPU seconds: to the first step; --help and mistakes; second start to a batch
PARTS = (
    "torch", "FFCV and numba", "timm", "DeepSpeed", "the rest of the program", "settings, teacher, student",
    "process group", "loaders", "engine", "until the loop", "first batch", "first step",
)  # fmt: skip


def spent() -> float:
    """CPU seconds of this process and its children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def child(argv: list[str]) -> None:
    """The program, up to its first step; prints {part: CPU seconds}."""
    marks = {}

    def mark(part: str) -> None:
        marks[part] = spent() - sum(marks.values())

    def after(module: object, name: str, part: str) -> None:
        work: Callable = getattr(module, name)

        def timed(*args: object, **kwargs: object) -> object:
            done = work(*args, **kwargs)
            mark(part)
            return done

        setattr(module, name, timed)

    import torch  # noqa: F401

    mark(PARTS[0])
    import data  # noqa: F401

    mark(PARTS[1])
    import timm  # noqa: F401

    mark(PARTS[2])
    import trainer.ranks.world

    mark(PARTS[3])
    import trainer.loop
    import trainer.main as program

    mark(PARTS[4])
    for name, part in zip(("build", "join", "loaders", "build_engine"), PARTS[5:9], strict=True):
        after(program, name, part)
    batches = trainer.loop.batches_from

    def first_batch(*args: object) -> object:
        mark(PARTS[9])
        for batch in batches(*args):
            mark(PARTS[10])
            yield batch

    def first_step(*_: object) -> None:
        mark(PARTS[11])
        print(json.dumps(marks), flush=True)
        os._exit(0)

    trainer.loop.batches_from = first_batch
    program.Tracker.advance = first_step
    sys.exit(program.main(argv))


def run(command: list[str], status: int = 0) -> tuple[float, str]:
    """CPU seconds of a command, and what it printed."""
    before = os.times()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    after = os.times()
    if done.returncode != status:
        raise SystemExit(f"{' '.join(command)}: ended with status {done.returncode}\n{done.stdout}{done.stderr}")
    return sum(after[2:4]) - sum(before[2:4]), done.stdout


def first_steps(folder: Path, options: list[str]) -> dict[str, float]:
    """One start."""
    argv = ["--stage", "2", "--run", str(folder), "--tracking", "[]", "--train.eval_first", "false", *options]
    _, said = run(["-m", "benchmarks.start", "--child", *argv])
    return json.loads(re.findall(r"^\{.*\}$", said, re.M)[-1])


def main() -> int:
    """The command line; returns the exit status."""
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="warm starts, of which the medians are printed")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    options = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        runs = [first_steps(Path(folder) / str(i), []) for i in range(1 + options.repeats)]
        helped = statistics.median(run(["trainer/run.py", "--help"])[0] for _ in range(options.repeats))
        wrong = ["trainer/run.py", "--stage", "2", "--train.lr", "fast"]
        refused = statistics.median(run(wrong, status=2)[0] for _ in range(options.repeats))
    warm = {part: statistics.median(one[part] for one in runs[1:]) for part in PARTS}
    total = statistics.median(sum(one.values()) for one in runs[1:])
    batch = warm["loaders"] + warm["first batch"]
    claims = [
        claim(f"CPU time, {what}", found, target, "s")
        for what, found, target in (
            ("from command to first step", total, TARGET), ("loaders and first batch", batch, BATCH),
            ("--help", helped, DOOR), ("a mistake", refused, DOOR),
        )
    ]  # fmt: skip
    if options.json:
        print(json.dumps({"rows": claims}))
        return 0
    print(f"{'CPU seconds':36}{'warm':>8}{'first':>8}")
    for part in PARTS:
        print(f"{part:36}{warm[part]:8.2f}{runs[0][part]:8.2f}")
    for one in claims:
        said = f"target {one['target']:g}: {'met' if one['met'] else 'missed'}"
        print(f"{one['claim']:36}{one['ours']:8.2f}   {said}")
    print(f"({time.perf_counter() - began:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
