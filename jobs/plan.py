"""From what was typed to the jobs of a chain: runs and stages, checked before anything is submitted."""

import itertools
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from jobs.job import StageJob
from jobs.records import Records
from jobs.settings import Request
from trainer.config import UserError, of_later_stage
from trainer.config import parse as parse_settings
from trainer.output.paths import stage_path


@dataclass(frozen=True)
class Planned:
    """A stage of a run."""

    run: Path
    stage: str
    argv: list[str]  # the trainer's
    request: Request

    def job(self, records: Records) -> StageJob:
        """What submitit pickles."""
        return StageJob(self.argv, self.request.gpus_per_node, records)

    @property
    def path(self) -> Path:
        """The stage's folder."""
        return stage_path(self.run, self.stage)

    @property
    def name(self) -> str:
        """Its name on the screen and in the queue."""
        return f"{self.run.name}/{self.path.name}"


Chain = list[list[Planned]]  # the stages in order, and all runs of each


def plan(requests: dict[str, Request], arguments: list[str]) -> tuple[Path, Chain]:
    """The run folder (of a sweep: the folder of its run folders), and the stages of all runs.

    Raises:
        UserError: a setting does not exist or fit.
    """
    sweep = combinations(next(iter(requests.values())).sweep)
    base = Path(parse_settings([*arguments, "--stage", next(iter(requests))]).run).absolute()
    if "%" in str(base) and any(request.executor == "slurm" for request in requests.values()):
        raise UserError(f"--run {base}: Slurm replaces % in the path of a log; give a folder without it")
    chain = []
    for stage, request in requests.items():
        runs = []
        for name, changes in sweep.items():
            run = base / name
            given = [*arguments, *changes]
            argv = [*(of_later_stage(given) if chain else given), "--stage", stage, "--run", str(run)]
            parse_settings(argv)
            runs.append(Planned(run, stage, argv, request))
        chain.append(runs)
    return base, chain


def combinations(sweep: list[str]) -> dict[str, list[str]]:
    """["train.lr=1e-3,1e-4"] -> {"train.lr=1e-3": ["--train.lr=1e-3"], ...}; without a sweep {"": []}.

    Raises:
        UserError: not of the form SETTING=VALUE,VALUE.
    """
    axes = []
    for axis in sweep:
        setting, _, values = axis.partition("=")
        try:
            values = yaml.load(f"[{values}]", Loader=yaml.BaseLoader)  # as text; a value may be a list
        except yaml.YAMLError:
            values = []
        if not setting or not values:
            raise UserError(f"--sweep {axis}: must be SETTING=VALUE,VALUE such as train.lr=1e-3,3e-4")
        texts = [
            value if isinstance(value, str) else json.dumps(value, separators=",:").replace('"', "") for value in values
        ]
        axes.append([f"{setting}={text}" for text in texts])
    product = list(itertools.product(*axes))
    named = {re.sub(r"[^\w.,=+-]", "_", ",".join(pairs)): [f"--{pair}" for pair in pairs] for pairs in product}
    if len(named) < len(product):
        raise UserError(f"--sweep {' '.join(sweep)}: two runs would have the same name")
    return named


def check(chain: Chain) -> None:
    """Find here what would fail on the nodes. It runs in a process of its own: its imports change the environment for
    this machine, which may have no GPU, and sbatch passes the environment on.

    Raises:
        UserError: one line on what does not fit.
    """
    jobs = [
        {"argv": planned.argv, "ranks": [nodes * planned.request.ranks for nodes in planned.request.node_counts]}
        for runs in chain
        for planned in runs
    ]
    command = [sys.executable, "-m", "trainer.setup.check"]
    done = subprocess.run(command, input=json.dumps(jobs), stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    error = re.search(r"(?m)^error: (.*)", done.stderr)
    if error:
        raise UserError(error[1])
    if done.returncode:
        raise UserError(f"trainer.setup.check ended with status {done.returncode}: {done.stderr}")


def graph(chain: Chain) -> str:
    """The dependency graph, a line per job."""
    lines = []
    for before, runs in zip([None, *chain], chain, strict=False):
        for i, planned in enumerate(runs):
            request = planned.request
            on = f"{request.nodes} node{'s' if request.nodes != '1' else ''} x {request.ranks} ranks"
            after = f", after {before[i].name}" if before else ""
            lines.append(f"{planned.name}: {on}, {request.minutes} minutes{after}")
    return "\n".join(lines)
