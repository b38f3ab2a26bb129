"""The records of a run's jobs, in `RUN/jobs`, beside the logs. Nothing here asks a cluster.

`submitted.jsonl` has a line per job. `<job>.jsonl` is the job's own journal, a line per event: `started` (by rank 0),
`requeued` with the reason, `ended` with the exit status and the reason.
"""

import argparse
import difflib
import json
import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from trainer.config import UserError
from trainer.output.paths import hold
from trainer.ranks.errors import cause


@dataclass(frozen=True)
class Submitted:
    """A job, as it was submitted."""

    job: str  # the cluster's id
    run: str  # run folder
    stage: str
    executor: str
    after: str | None  # the job that it waits for
    time: float  # seconds since 1970


class Records:
    """The records of a run, or of a sweep's runs together."""

    def __init__(self, run: Path) -> None:
        """`run`: the run folder, or the folder of a sweep's run folders."""
        self.folder = run / "jobs"
        self._submitted = self.folder / "submitted.jsonl"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within it no other process submits to this run.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = hold(self.folder)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written ({cause(error)})") from error
        with lock:
            yield

    def add(self, submitted: Submitted) -> None:
        """Record a job."""
        _append(self._submitted, asdict(submitted))

    def newest(self) -> dict[tuple[str, str], Submitted]:
        """The newest job per (run, stage), in the order of their first submission."""
        found = (Submitted(**line | {"run": os.path.abspath(line["run"])}) for line in _lines(self._submitted))
        return {(submitted.run, submitted.stage): submitted for submitted in found}

    def journal(self, job: str) -> list[dict[str, Any]]:
        """The events of a job, oldest first."""
        return _lines(self.folder / f"{job}.jsonl")

    def note(self, job: str, event: str, **more: Any) -> None:
        """Add an event to a job's journal."""
        _append(self.folder / f"{job}.jsonl", {"event": event, "time": time.time(), **more})

    def log(self, job: str) -> Path:
        """What rank 0 and the batch script printed."""
        return self.folder / f"{job}_0_log.out"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; usage: {self.prog} RUN")


def typed_run(argv: list[str] | None, command: str, description: str) -> Path:
    """The run folder on the command line of `jobs.<command>`. Raises UserError when it is not one path."""
    parser = _Parser(prog=f"python -m jobs.{command}", description=description, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="the run folder, or a sweep's")
    return Path(parser.parse_args(argv).run).expanduser()


def find(run: Path) -> tuple[Records, list[Submitted]]:
    """The records of a run, or of all runs of a sweep, and the newest job of each stage.

    Raises:
        UserError: nothing was submitted for it.
    """
    run = run.absolute()
    for records in (Records(run), Records(run.parent)):
        jobs = [s for s in records.newest().values() if records.folder.parent == run or Path(s.run) == run]
        if jobs:
            return records, jobs
    have = [path.parents[1].name for path in run.parent.glob("*/jobs/submitted.jsonl")]
    near = difflib.get_close_matches(run.name, have, 1)
    hint = f"did you mean {run.parent / near[0]}? " if near else ""
    how = f"python -m jobs.submit --run {shlex.quote(str(run))} submits one"
    raise UserError(f"{run}: no job was submitted for it; {hint}{how}")


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("ab", buffering=0) as file:
        file.write(json.dumps(line).encode() + b"\n")
        os.fsync(file.fileno())


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, which may be missing, or end in a line that is still being written."""
    found = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
