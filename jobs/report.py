"""What `python -m jobs.status` shows about a stage: from its records, folder and log, and from Slurm."""

import itertools
import json
import re
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import yaml

from jobs import slurm
from jobs.records import Records, Submitted
from trainer.output.paths import is_complete, stage_path

UNSEEN = 60  # seconds in which a shared file system may not yet show what a node wrote


@dataclass
class Line:
    """A stage's line."""

    name: str
    job: str
    state: str
    step: str = ""
    left: str = ""
    restarts: str = ""
    loss: str = ""
    log: str = ""
    error: str = ""


def lines(records: Records, jobs: list[Submitted]) -> list[Line]:
    """A line per job, in their order."""
    states: dict[str, tuple[str, str]] = {}
    found = []
    for submitted in jobs:
        states[submitted.job] = state, why = state_of(submitted, records, states)
        journal, log = records.journal(submitted.job), records.log(submitted.job)
        path = stage_path(submitted.run, submitted.stage)
        reasons = restarts(journal)
        line = Line(f"{Path(submitted.run).name}/{path.name}", submitted.job, f"{state} ({why})" if why else state)
        line.restarts = f"{len(reasons)} ({', '.join(reasons)})" if reasons else "0"
        step, steps, seconds, loss = progress(path)
        line.step = f"{step}/{steps}" if steps else ""
        line.left = str(timedelta(seconds=round(seconds))) if state == "RUNNING" and seconds is not None else ""
        line.loss = f"{loss:.4g}" if loss is not None else ""
        line.log = str(log) if log.is_file() else ""
        line.error = "" if state in ("COMPLETED", "PENDING") else last_error(log) or ""
        found.append(line)
    return found


def restarts(journal: list[dict[str, Any]]) -> list[str]:
    """Why a job was started again, each time. It does not know the reason itself when Slurm requeues it."""
    starts = [i for i, event in enumerate(journal) if event["event"] == "started"]
    between = [journal[a:b] for a, b in itertools.pairwise(starts)]
    return [next((e["why"] for e in events if e["event"] == "requeued"), "by Slurm") for events in between]


def state_of(submitted: Submitted, records: Records, before: dict[str, tuple[str, str]]) -> tuple[str, str]:
    """A job's state in Slurm's words, and why.

    Args:
        before: the states of the jobs before it in the chain.
    """
    journal = records.journal(submitted.job)
    ended = journal[-1] if journal and journal[-1]["event"] == "ended" else None
    known, why = {}, ""
    if submitted.executor == "slurm":
        known = slurm.show(submitted.job)
    elif ended is None and _lives(submitted):
        known = {"JobState": "RUNNING"}
    if is_complete(stage_path(submitted.run, submitted.stage)):
        return "COMPLETED", ""
    state = known.get("JobState")
    if state is None:  # it ended so long ago that Slurm has forgotten it
        state = "UNKNOWN" if ended is None else "FAILED" if ended["status"] else "COMPLETED"
    if state == "PENDING" and known.get("Reason", "None") != "None":
        why = known["Reason"]
    if state in ("CANCELLED", "UNKNOWN") and not journal and before.get(submitted.after, ("",))[0] in ENDED_BADLY:
        return "CANCELLED", f"job {submitted.after}, which it waited for, did not succeed"
    if ended is not None and state not in slurm.LIVE:
        why = ended["why"] or (f"status {ended['status']}" if state == "FAILED" and ended["status"] else "")
    seen = journal or records.log(submitted.job).is_file()
    if state in ("FAILED", "RUNNING") and not seen and time.time() - submitted.time > UNSEEN:
        why = f"left no trace in {records.folder}: is it on a file system that all nodes share?"
    return state, why


ENDED_BADLY = {"FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "BOOT_FAIL", "DEADLINE"}


def _lives(submitted: Submitted) -> bool:
    """Whether a local job's controller still runs."""
    try:
        process = psutil.Process(int(submitted.job))
        return process.create_time() < submitted.time + 60 and "submitit.local._local" in process.cmdline()
    except (psutil.Error, ValueError):
        return False


def progress(path: Path) -> tuple[int, int, float | None, float | None]:
    """Step, steps (0: not known), seconds left and training loss of a stage, as far as its folder tells them."""
    train: dict[str, Any] = {}
    try:
        settings = yaml.safe_load((path / "config.yaml").read_text())["train"]
        for text in (path / "metrics.jsonl").read_text().splitlines():
            line = json.loads(text)
            train = line if line["split"] == "train" else train
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        pass
    if not train:
        return 0, 0, None, None
    step = train["step"]
    steps = settings["steps"] or max(1, round(settings["epochs"] * step / train["epoch"]))
    return step, steps, (steps - step) * settings["batch_size"] / train["images_per_second"], train["loss"]


def last_error(log: Path) -> str | None:
    """The last line of an error in the last 64 KiB of a log."""
    if not log.is_file():
        return None
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 2**16))
        text = file.read().decode(errors="replace").splitlines()
    ours = [line for line in text if line.startswith("error: ")]
    others = [line for line in text if re.match(r"(\w+: error: |[\w.]*(Error|Exception)\b)", line)]
    return next(reversed(ours), None) or next(reversed(others), None)
