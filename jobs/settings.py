"""What a stage's job asks a cluster for: the cluster's YAML first, then the command line. An unknown key is an error.

A file's section `stages` holds what differs per stage.
"""

import argparse
import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trainer.chain import ALL, CHAIN
from trainer.config import Parser, Settings, UserError, gather, names, no_such, read_yaml
from trainer.fields import Count, CountOrZero, PathName, checked
from trainer.stages import STAGES

CLUSTERS = Path(__file__).parent / "clusters"
ORDER = tuple(STAGES)
RUN = tuple(stage for stage in ORDER if stage != "evaluate")  # what a run is made of
OURS = {"array", "dependency", "error", "nodes", "output", "requeue", "signal"}  # options of sbatch that we set


def node_counts(nodes: str) -> range:
    """ "2-4" -> the numbers 2, 3, 4."""
    least, _, most = nodes.partition("-")
    return range(int(least), int(most or least) + 1)


def minutes(time: str) -> int:
    """Slurm's time limit in minutes, rounded up."""
    days, _, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    # Without days one number is minutes, and two are minutes and seconds. With days the first is hours.
    hours, whole, seconds = [*parts, 0, 0][:3] if days or len(parts) == 3 else [0, *parts, 0][:3]
    return int(days or 0) * 1440 + hours * 60 + whole + (seconds > 0)


Nodes = checked(
    str,
    "a number, or LEAST-MOST of which the first is not above the second",
    lambda v: re.fullmatch(r"[1-9]\d*(-[1-9]\d*)?", v) and len(node_counts(v)) > 0,
)
TimeLimit = checked(
    str,
    "minutes, or DAYS-HOURS:MINUTES:SECONDS, at least a minute",
    lambda v: re.fullmatch(r"\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2}", v) and minutes(v) > 0,
)


@dataclass
class Resources:
    """What the job of a stage asks for. What is not given is left to the cluster."""

    executor: Literal["slurm", "local", "debug"] = "slurm"
    """Where the job runs: local takes this machine, debug this process; both run one stage after another."""
    nodes: Nodes = "1"
    """Nodes, as a number or LEAST-MOST: the job starts on what it gets, and goes on after it lost a node."""
    gpus_per_node: CountOrZero = 0
    """GPUs per node, with one rank each; 0 asks for CPU nodes."""
    ranks_per_node: Count | None = None
    """Ranks per CPU node; by default 1."""
    cpus_per_gpu: Count | None = None
    """Cores per rank, on CPU nodes too."""
    mem: str | None = None
    """Memory per node, as Slurm writes it: 64G."""
    time: TimeLimit = "1-00:00:00"
    """Time limit, as Slurm writes it: minutes, or DAYS-HOURS:MINUTES:SECONDS."""
    max_timeouts: CountOrZero = 3
    """How often a job goes on after its time limit; after a preemption it always does."""
    signal_delay: Count = 120
    """Seconds before the limit at which the job is asked to stop; a step and a save must fit."""
    partition: str | None = None
    """Slurm's partition."""
    account: str | None = None
    """Account that Slurm charges."""
    qos: str | None = None
    """Slurm's quality of service."""
    constraint: str | None = None
    """Features that the nodes must have."""
    exclude: str | None = None
    """Nodes that the job must not take."""
    setup: list[str] = field(default_factory=list)
    """Shell commands before the ranks start: "module load cuda" "export A=b"."""
    slurm: dict[str, Any] = field(default_factory=dict)
    """Any further option of sbatch: --slurm.reservation NAME."""

    @property
    def ranks(self) -> int:
        """Ranks per node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def node_counts(self) -> range:
        """Numbers of nodes that the job may run on."""
        return node_counts(self.nodes)

    @property
    def minutes(self) -> int:
        """The time limit, rounded up."""
        return minutes(self.time)


@dataclass
class Request(Resources):
    """All options of `python -m jobs.submit`; the trainer's settings go on to the jobs as they are."""

    cluster: PathName = "slurm"
    """The cluster: a YAML file, or the name of one in jobs/clusters."""
    stages: list[Literal[ORDER]] = field(default_factory=lambda: list(RUN))
    """Stages, a job each; each waits for the one before."""
    sweep: list[str] = field(default_factory=list)
    """SETTING=VALUE,VALUE ...: a run per combination, in arrays."""
    dry_run: bool = False
    """Print the batch scripts and the dependency graph, and submit nothing."""

    def resolve(self) -> None:
        """Raises UserError when options do not fit each other."""
        if self.gpus_per_node and self.ranks != self.gpus_per_node:
            raise UserError(f"ranks_per_node {self.ranks}: {self.gpus_per_node} GPUs per node need as many ranks; the "
                            "option is for CPU nodes")  # fmt: skip
        if self.executor != "slurm" and self.node_counts[-1] > 1:
            raise UserError(f"nodes {self.nodes}: {self.executor} runs on this machine alone; use --cluster slurm")
        if ours := sorted(OURS & set(self.slurm)):
            raise UserError(f"slurm.{ours[0]}: jobs.submit sets it; leave it out")
        if not self.stages:
            raise UserError(f"stages: give at least one of {', '.join(ORDER)}")


_ALL = dataclasses.make_dataclass("_All", [], bases=(Request, Settings))  # for hints


class _Parser(Parser):
    kind = Request


def parse(argv: list[str] | None = None) -> tuple[dict[str, Request], list[str]]:
    """What is asked for each stage, in their order, and the trainer's arguments, without its stage.

    Raises:
        UserError: unknown or unfit option, no such cluster.
    """
    argv = ["--dry_run=true" if arg == "--dry_run" else arg for arg in (sys.argv[1:] if argv is None else argv)]
    own, trainers = _split(argv)
    parser = _Parser(
        prog="python -m jobs.submit",
        description="Submit stages to a cluster, a job each. Other options go to the trainer: trainer/run.py --help",
    )
    if any(arg in ("-h", "--help") for arg in argv):
        parser.print_help()
        raise SystemExit(0)
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    peek.add_argument("--stage", choices=(*ORDER, ALL))  # as trainer/run.py takes it
    try:
        known, trainers = peek.parse_known_args(trainers)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    if known.stage:
        own += ["--stages", *(CHAIN if known.stage == ALL else [known.stage])]
    for option in ("--stages", "--setup", "--sweep"):
        own = gather(own, option)

    def read(part: list[str]) -> Request:
        given = parser.parse_args([*part, *own])
        request = Request(**{f.name: given[f.name] for f in dataclasses.fields(Request)})
        request.resolve()
        return request

    first = read([])
    cluster = _read_cluster(first.cluster)
    stages = sorted(set(first.stages), key=ORDER.index)
    return {stage: read(_arguments(cluster, stage)) for stage in stages}, trainers


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Our own options with their values, and the trainer's. Raises UserError for an option that neither has."""
    ours = {f.name for f in dataclasses.fields(Request)}
    theirs = {"config", "help", "print_config"} | {name.split(".")[0] for name, _ in names(Settings)}
    own, rest = [], []
    into = rest
    for arg in argv:
        if arg.startswith("--"):
            name = arg[2:].partition("=")[0]
            group = name.split(".")[0]
            if group not in ours | theirs:
                raise UserError(f"--{name}: {no_such(name, _ALL)}")
            into = own if group in ours else rest
        into.append(arg)
    return own, rest


def _read_cluster(name: str) -> dict[str, Any]:
    """The options in a cluster's file, as text. Raises UserError when there is no such cluster or option."""
    path = next((path for path in (Path(name), CLUSTERS / f"{name}.yaml") if path.is_file()), None)
    if path is None:
        have = sorted(path.stem for path in CLUSTERS.glob("*.yaml"))
        near = difflib.get_close_matches(name, have, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"--cluster {name}: no such cluster; {hint}give a YAML file or one of {', '.join(have)}")
    cluster = read_yaml(path, plain=True)  # 10:00:00 is no number to the base of 60
    stages = cluster.setdefault("stages", {}) or {}
    if not isinstance(stages, dict) or not all(isinstance(part, dict) for part in stages.values()):
        raise UserError(f"{path}: stages must be a mapping, a section of options per stage")
    if unknown := set(stages) - set(ORDER):
        raise UserError(f"{path}: stages has no {', '.join(sorted(unknown))}; it may hold {', '.join(ORDER)}")
    known = {f.name for f in dataclasses.fields(Resources)}
    for part, where in ((cluster, ""), *((part, f"stages.{stage}.") for stage, part in stages.items())):
        if unknown := sorted(set(part) - known - ({"stages"} if not where else set())):
            raise UserError(f"{path}: {where}{unknown[0]}: {no_such(unknown[0], Resources)}")
    return cluster


def _arguments(cluster: Mapping[str, Any], stage: str) -> list[str]:
    """A cluster file's options for a stage, as one would type them."""
    arguments = []
    for part in (cluster, (cluster["stages"] or {}).get(stage, {})):
        for key, value in part.items():
            if isinstance(value, dict) and key == "slurm":
                arguments += [f"--slurm.{name}={item}" for name, item in value.items()]
            elif key != "stages":
                arguments.append(f"--{key}={value if isinstance(value, str) else json.dumps(value)}")
    return arguments
