"""A chain of jobs on Slurm: batch scripts, dependencies and arrays. Each job is submitted once."""

import io
import os
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError
from submitit.slurm.slurm import _make_sbatch_string

from jobs import slurm
from jobs.plan import Chain, Planned
from jobs.records import Records, Submitted
from jobs.settings import ORDER
from trainer.output.paths import is_complete


def submit(chain: Chain, records: Records) -> None:
    """Submit what is neither complete nor in the queue, and print it. Each stage of a sweep is an array.

    Raises:
        UserError: sbatch refuses, in its words; the jobs that were submitted before are cancelled.
    """
    token = _leave_token(records.folder)
    waiting = {planned.run: _in_queue(records, planned, ORDER.index(planned.stage)) for planned in chain[0]}
    made: list[str] = []
    for runs in chain:
        missing = []
        for planned in runs:
            if is_complete(planned.path):
                print(f"{planned.name}: is complete", flush=True)
            elif job := _live(records, planned.run, planned.stage):
                print(f"{planned.name}: job {job} is in the queue already", flush=True)
                waiting[planned.run] = job
            else:
                missing.append(planned)
        for part, after in _grouped(missing, waiting):
            try:
                jobs = _sbatch(part, records, token, after)
            except FailedJobError as error:
                if made:
                    slurm.cancel(made)
                slurm.raise_if_failed(subprocess.CompletedProcess([], 1, "", str(error)), "sbatch")
            made += jobs
            for planned, job in zip(part, jobs, strict=True):
                before = waiting.get(planned.run)
                records.add(Submitted(job, str(planned.run), planned.stage, "slurm", before, time.time()))
                print(f"{planned.name}: job {job}{f', after {before}' if before else ''}", flush=True)
                waiting[planned.run] = job


def _leave_token(folder: Path) -> Path:
    """A file that tells the jobs that they see the folder they were submitted from."""
    for path in folder.glob(".shared-*"):
        return path
    path = folder / f".shared-{secrets.token_hex(8)}"
    path.touch()
    return path


def _live(records: Records, run: Path, stage: str) -> str | None:
    """The job of a run's stage, when it may still run; else None."""
    newest = records.newest().get((str(run), stage))
    alive = newest is not None and newest.executor == "slurm" and slurm.show(newest.job).get("JobState") in slurm.LIVE
    return newest.job if alive else None


def _in_queue(records: Records, planned: Planned, before: int) -> str | None:
    """The latest stage's job before the planned one that may still run; an earlier command submitted it."""
    return next((job for stage in reversed(ORDER[:before]) if (job := _live(records, planned.run, stage))), None)


def _grouped(missing: list[Planned], waiting: dict[Path, str | None]) -> list[tuple[list[Planned], str | None]]:
    """Runs that form one array, with sbatch's dependency. Task i of an array can only wait for task i of another."""
    after = [waiting[planned.run] for planned in missing]
    if len(missing) > 1 and not any(after):
        return [(missing, None)]
    array = after[0].partition("_")[0] if after and after[0] else ""
    if len(missing) > 1 and after == [f"{array}_{i}" for i in range(len(after))]:
        return [(missing, f"aftercorr:{array}")]
    return [([planned], f"afterok:{job}" if job else None) for planned, job in zip(missing, after, strict=True)]


def _sbatch(runs: list[Planned], records: Records, token: Path, after: str | None) -> list[str]:
    """Submit one stage of these runs, several as an array; their job ids."""
    # submitit's own count of timeouts is never reached: jobs.after keeps ours.
    executor = submitit.SlurmExecutor(records.folder, max_num_timeout=10**6)
    executor.update_parameters(**parameters(runs, records, token, after))
    with _outside_of_a_job(), redirect_stderr(io.StringIO()):  # submitit repeats what sbatch says; so do we
        if len(runs) == 1:
            return [executor.submit(runs[0].job(records)).job_id]
        with executor.batch():
            jobs = [executor.submit(planned.job(records)) for planned in runs]
    return [job.job_id for job in jobs]


@contextmanager
def _outside_of_a_job() -> Iterator[None]:
    """Within it the environment, which sbatch passes on, has no variables of a job that this process may run in."""
    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    config = os.environ.get("SLURM_CONF")
    with submitit.helpers.clean_env():
        if config:
            os.environ["SLURM_CONF"] = config
        yield


def parameters(runs: list[Planned], records: Records, token: Path, after: str | None) -> dict[str, Any]:
    """The parameters of submitit's SlurmExecutor for a stage.

    Args:
        token: a file in the run folder, which tells a job that it sees the same folder.
        after: sbatch's `dependency`.
    """
    request, folder = runs[0].request, records.folder.absolute()
    cores = [f"--cpus-per-task={request.cpus_per_gpu}"] if request.cpus_per_gpu else []
    unshared = f"error: {folder}: is another folder here than where the job was submitted, on "
    mend = "; put the run folder on a file system that all nodes share"
    further: dict[str, Any] = {"nodes": request.nodes, "requeue": True}
    if after is not None:
        further |= {"dependency": after, "kill-on-invalid-dep": "yes"}
    name = runs[0].name if len(runs) == 1 else f"{folder.parent.name}/{runs[0].path.name}"
    given = {
        "job_name": name, "time": request.minutes, "nodes": request.node_counts[-1],
        # Slurm starts one per node by default. Where it is given, Slurm only ever takes one of --nodes 1-2.
        "ntasks_per_node": request.ranks if request.ranks > 1 else None, "gpus_per_node": request.gpus_per_node or None,
        "cpus_per_task": request.cpus_per_gpu, "mem": request.mem, "partition": request.partition,
        "account": request.account, "qos": request.qos, "constraint": request.constraint, "exclude": request.exclude,
        "signal_delay_s": request.signal_delay, "stderr_to_stdout": True,
        "setup": [
            f"if [ ! -e {shlex.quote(str(token.absolute()))} ]; then",
            f"    echo {shlex.quote(unshared)}$(hostname){shlex.quote(mend)} >&2",
            "    exit 2",
            "fi",
            "trap : TERM",  # so that jobs.after is reached when Slurm ends the job
            *request.setup,
        ],
        # The trainer's watchdog ends the ranks together, and the trainer shares the cores among them.
        "srun_args": ["--kill-on-bad-exit=0", "--cpu-bind=none", *cores],
        "teardown": [
            f"{shlex.quote(sys.executable)} -m jobs.after $? {shlex.quote(str(folder.parent))} "
            f"--max_timeouts {request.max_timeouts} --signal_delay {request.signal_delay}",
        ],
        "additional_parameters": further | request.slurm,
    }  # fmt: skip
    return {key: value for key, value in given.items() if value is not None} | {"wckey": None}  # submitit's own


def script(runs: list[Planned], records: Records, after: str | None) -> str:
    """The batch script that submitit would give to sbatch; needs no Slurm."""
    folder = records.folder.absolute()
    given = parameters(runs, records, folder / ".shared-<token>", after)
    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    return _make_sbatch_string(command, folder, **given, map_count=len(runs) if len(runs) > 1 else None)
