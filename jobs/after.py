"""The batch script's last command, on the job's first node: `python -m jobs.after STATUS RUN`.

The ranks have ended with STATUS. This notes the end, or puts the job back into the queue. It requeues a job that a
signal stopped, since the trainer has saved on all ranks, and a job that lost a node. A crash or a mistake ends the job,
and Slurm then cancels the jobs after it. What Slurm ends by itself (`scancel`, the end of a grace period, a lost node
that it saw first), Slurm alone requeues or does not.
"""

import argparse
import os
import signal
import socket
import sys
import time
from pathlib import Path

import submitit

from jobs import slurm
from jobs.records import Records
from trainer.config import UserError

STOPPED = 75  # trainer.ranks.signals.STOPPED, which would import torch
# The last two: a signal came before the trainer listened, so nothing was begun either.
STOPS = {STOPPED, 128 + signal.SIGUSR2, 128 + signal.SIGTERM}
RUNS = {"RUNNING", "SIGNALING"}  # the latter while Slurm sends it a signal
TIMED_OUT = "timed out"
EARLY = 90  # seconds by which Slurm may signal earlier than we asked


def main(argv: list[str] | None = None) -> int:
    """The job's exit status."""
    parser = argparse.ArgumentParser(prog="python -m jobs.after", description="The last command of a batch script.")
    parser.add_argument("status", type=int, help="exit status of the ranks")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--max_timeouts", type=int, required=True, help="how often a timeout is requeued")
    parser.add_argument("--signal_delay", type=int, required=True, help="seconds before the limit")
    given = parser.parse_args(argv)
    here, records = submitit.JobEnvironment(), Records(given.run)
    for wait in (0, 5, 15, 45, 120):  # a controller that restarts does not answer
        time.sleep(wait)
        if job := slurm.show(here.raw_job_id):
            break
    if int(job.get("Restarts", "0")) > int(os.environ.get("SLURM_RESTART_COUNT", "0")):  # Slurm has requeued it already
        lost = lost_nodes(slurm.nodes(os.environ["SLURM_JOB_NODELIST"]))
        records.note(here.job_id, "requeued", status=given.status, why=_lost(lost) if lost else "by Slurm")
        return STOPPED
    timeouts = sum(event.get("why") == TIMED_OUT for event in records.journal(here.job_id))
    again, why = decide(given.status, job, timeouts, given.max_timeouts, given.signal_delay)
    if again:
        records.note(here.job_id, "requeued", status=given.status, why=why)
        print(f"requeued: {why}", file=sys.stderr, flush=True)
        try:
            slurm.requeue(here.job_id)
        except UserError as error:
            print(f"error: {error}; submit the stage again to resume", file=sys.stderr, flush=True)
            why = f"{why}, and not requeued"
        else:
            return STOPPED
    records.note(here.job_id, "ended", status=given.status, why=why)
    if why:
        print(f"error: {why}", file=sys.stderr, flush=True)
    return given.status


def decide(
    status: int, job: dict[str, str], timeouts: int, max_timeouts: int, signal_delay: int
) -> tuple[bool, str | None]:
    """Whether to requeue, and why, in a few words.

    Args:
        status: exit status of the ranks.
        job: what Slurm says about it, see `slurm.show`.
        timeouts: how many it had before.
    """
    # The limit came before the ranks had saved on its warning, or srun ended before them.
    late = job.get("Reason") == "TimeLimit" and status in STOPS | {0}
    if not late and (status == 0 or job.get("JobState") not in RUNS):
        return False, None  # done; or Slurm is ending it, and decides itself whether it runs again
    if late or status in STOPS:
        if job.get("PreemptTime", "None") != "None":
            return True, "preempted"
        left = slurm.seconds(job.get("TimeLimit", "")) - slurm.seconds(job.get("RunTime", "0:00:00"))
        if left > signal_delay + EARLY:
            return True, "stopped by a signal"
        if timeouts < max_timeouts:
            return True, TIMED_OUT
        return False, f"timed out {timeouts + 1} times; give it more --time or --max_timeouts, and submit it again"
    lost = lost_nodes(slurm.nodes(job.get("NodeList", "")))
    if lost:
        return True, _lost(lost)
    return False, None  # the log says why


def _lost(nodes: list[str]) -> str:
    return f"lost {', '.join(nodes)}"


def lost_nodes(nodes: dict[str, tuple[str, int]]) -> list[str]:
    """The nodes whose daemon does not answer at (address, port). None when no daemon does: then the asking fails."""
    lost = [name for name, address in nodes.items() if not _answers(address)]
    return lost if len(lost) < len(nodes) else []


def _answers(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=10).close()
        return True
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
