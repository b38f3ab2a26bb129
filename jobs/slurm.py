"""Slurm's commands, without submitit's need of accounting."""

import re
import shutil
import subprocess

from trainer.config import UserError

# What a job is while it may still run or run again.
LIVE = {
    "PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "STOPPED", "COMPLETING", "REQUEUED", "REQUEUE_FED",
    "REQUEUE_HOLD", "RESV_DEL_HOLD", "SIGNALING", "STAGE_OUT", "SPECIAL_EXIT", "RESIZING",
}  # fmt: skip


def check_installed() -> None:
    """Raises UserError when Slurm's commands are not on the path."""
    if not (shutil.which("sbatch") and shutil.which("srun") and shutil.which("scontrol")):
        raise UserError("Slurm: no sbatch, srun and scontrol on the path; go to a login node, load Slurm's module, or "
                        "use --cluster local")  # fmt: skip


def show(job: str) -> dict[str, str]:
    """What Slurm knows about a job, under the names of `scontrol show job`; {} if nothing.

    Accounting tells about a job that ended long ago. It has `JobState` alone, and no `Reason`, `RunTime` and so on.
    """
    done = _run(["scontrol", "-o", "show", "job", job])
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    if lines:
        return dict(re.findall(r"(\w+)=(\S*)", lines[0]))
    if shutil.which("sacct"):
        done = _run(["sacct", "--noheader", "--parsable2", "-X", "-j", job, "-o", "State"])
        if done.returncode == 0 and done.stdout.strip():
            return {"JobState": done.stdout.split()[0]}
    return {}


def nodes(names: str) -> dict[str, tuple[str, int]]:
    """Address and port of each node's daemon, for a node list such as `node[1-4]`."""
    config = re.search(r"(?m)^SlurmdPort\s*=\s*(\d+)", _run(["scontrol", "show", "config"]).stdout)
    found = {}
    for line in _run(["scontrol", "-o", "show", "nodes", names]).stdout.splitlines():
        node = dict(re.findall(r"(\w+)=(\S*)", line))
        found[node["NodeName"]] = node["NodeAddr"], int(node.get("Port") or (config[1] if config else 6818))
    return found


def cancel(jobs: list[str]) -> None:
    """Raises UserError, in Slurm's words, when it refuses."""
    raise_if_failed(_run(["scancel", *jobs]), "scancel")


def requeue(job: str) -> None:
    """Put a running job back into the queue, which ends it. Raises UserError when Slurm refuses."""
    raise_if_failed(_run(["scontrol", "requeue", job]), "scontrol requeue")


def seconds(clock: str) -> float:
    """The seconds of "1-02:03:04" or "02:03:04"; infinite for UNLIMITED and the like."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", clock)
    if found is None:
        return float("inf")
    days, hours, minutes, rest = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def raise_if_failed(done: subprocess.CompletedProcess, command: str) -> None:
    """Raises UserError, with what the command said, when it failed."""
    if done.returncode:
        words = re.sub(rf"(?m)^{command.split()[0]}: (error: )?", "", done.stderr.strip())
        raise UserError(f"{command}: {'; '.join(words.splitlines()) or f'status {done.returncode}'}")


def _run(command: list[str]) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", "no answer within 60 s")
