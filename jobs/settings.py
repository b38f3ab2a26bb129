"""What a stage's job asks a cluster for: the cluster's YAML first, then the command line; unknown keys are errors.

A file's `stages` section holds what differs a stage; it is laid over the rest for that stage's job.
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from trainer.config import Parser, UserError, gather

CLUSTERS = Path(__file__).parent / "clusters"
Stage = Literal["1", "2", "3", "probe"]
STAGES: tuple[str, ...] = get_args(Stage)


@dataclass
class Resources:
    """Of one stage's job. What is not given is left to the cluster."""

    executor: Literal["slurm", "local", "debug"] = "slurm"  # submitit's; local, debug: here, one stage after another
    nodes: str = "1"  # a number, or LEAST-MOST: starts on what it gets, and goes on so after a node is lost
    gpus_per_node: int = 0  # one rank each; 0: CPU nodes
    ranks_per_node: int | None = None  # default: gpus_per_node, on CPU nodes 1
    cpus_per_gpu: int | None = None  # cores a rank, on CPU nodes too
    mem: str | None = None  # a node, as Slurm writes it: 64G
    time: str = "1-00:00:00"  # limit, as Slurm writes it: minutes, or DAYS-HOURS:MINUTES:SECONDS
    max_timeouts: int = 3  # times that a job goes on after its time limit; after a preemption always
    signal_delay: int = 120  # seconds before the limit when the stop is asked for; a step and a save must fit
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None  # nodes
    setup: list[str] = field(default_factory=list)  # shell commands before the ranks start: "module load cuda" ...
    slurm: dict[str, Any] = field(default_factory=dict)  # any further option of sbatch: --slurm.reservation NAME

    @property
    def ranks(self) -> int:
        """Ranks a node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def node_counts(self) -> range:
        """Numbers of nodes that the job may run on."""
        least, _, most = self.nodes.partition("-")
        return range(int(least), int(most or least) + 1)

    @property
    def minutes(self) -> int:
        """The time limit, rounded up."""
        days, _, clock = self.time.rpartition("-")
        parts = [int(part) for part in clock.split(":")]
        # Without days one number is minutes, two are minutes and seconds; with days the first is hours.
        hours, minutes, seconds = [*parts, 0, 0][:3] if days or len(parts) == 3 else [0, *parts, 0][:3]
        return int(days or 0) * 1440 + hours * 60 + minutes + (seconds > 0)


@dataclass
class Request(Resources):
    """All options of `python -m jobs.submit`; the trainer's settings go on to the jobs as they are."""

    cluster: str = "slurm"  # a YAML file, or the name of one in jobs/clusters
    stages: list[Stage] = field(default_factory=lambda: list(STAGES))  # a job each, each after the one before
    sweep: list[str] = field(default_factory=list)  # SETTING=VALUE,VALUE ...: a run a combination, in arrays
    dry_run: bool = False  # print the batch scripts and the dependency graph; submit nothing


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
        description="Submit stages to a cluster, a job each. Other options go on to the trainer: trainer/run.py --help",
        allow_abbrev=False,
    )
    parser.add_class_arguments(Request, as_group=False)
    if any(arg in ("-h", "--help") for arg in argv):
        parser.print_help()
        raise SystemExit(0)
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    peek.add_argument("--stage", choices=STAGES)  # as trainer/run.py takes it
    try:
        known, trainers = peek.parse_known_args(trainers)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    if known.stage:
        own += ["--stages", known.stage]
    for option in ("--stages", "--setup", "--sweep"):
        own = gather(own, option)

    def read(part: list[str]) -> Request:
        given = parser.parse_args([*part, *own])
        request = Request(**{f.name: given[f.name] for f in dataclasses.fields(Request)})
        _check(request)
        return request

    first = read([])
    path, cluster = _read_cluster(first.cluster)
    stages = sorted(set(first.stages), key=STAGES.index)
    return {stage: read(_arguments(path, cluster, stage)) for stage in stages}, trainers


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Our own options with their values, and the rest."""
    names = {f.name for f in dataclasses.fields(Request)}
    own, rest = [], []
    into = rest
    for arg in argv:
        if arg.startswith("--"):
            into = own if re.split(r"[.=]", arg[2:])[0] in names else rest
        into.append(arg)
    return own, rest


def _read_cluster(name: str) -> tuple[Path, dict[str, Any]]:
    path = next((path for path in (Path(name), CLUSTERS / f"{name}.yaml") if path.is_file()), None)
    if path is None:
        have = ", ".join(sorted(path.stem for path in CLUSTERS.glob("*.yaml")))
        raise UserError(f"--cluster {name}: no such cluster; give a YAML file or one of {have}")
    try:
        # All values as they are written: 10:00:00 is no number to the base of 60.
        cluster = yaml.load(path.read_text(), Loader=yaml.BaseLoader) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    stages = cluster.get("stages") or {} if isinstance(cluster, dict) else None
    if not isinstance(stages, dict) or not all(isinstance(part, dict) for part in stages.values()):
        raise UserError(f"{path}: must be a mapping of options; its section stages one of such mappings")
    if unknown := set(stages) - set(STAGES):
        raise UserError(f"{path}: stages has no {', '.join(sorted(unknown))}; it may hold {', '.join(STAGES)}")
    known = {f.name for f in dataclasses.fields(Resources)}
    for part, where in ((cluster, ""), *((part, f"stages.{stage}.") for stage, part in stages.items())):
        if unknown := sorted(set(part) - known - ({"stages"} if not where else set())):
            raise UserError(f"{path}: {where}{unknown[0]}: no such option; it may hold {', '.join(sorted(known))}")
    return path, cluster


def _arguments(path: Path, cluster: Mapping[str, Any], stage: str) -> list[str]:
    """A cluster file's options for a stage, as one would type them."""
    arguments = []
    for part in (cluster, cluster.get("stages", {}).get(stage, {})):
        for key, value in part.items():
            if isinstance(value, dict) and key == "slurm":
                arguments += [f"--slurm.{name}={item}" for name, item in value.items()]
            elif key != "stages":
                arguments.append(f"--{key}={value if isinstance(value, str) else json.dumps(value)}")
    return arguments


_FORMS = {
    "nodes": (r"[1-9]\d*(-[1-9]\d*)?", "a number, or LEAST-MOST"),
    "time": (r"(\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2})", "minutes, or DAYS-HOURS:MINUTES:SECONDS"),
}
_LEAST = {"gpus_per_node": 0, "ranks_per_node": 1, "cpus_per_gpu": 1, "max_timeouts": 0, "signal_delay": 1}


def _check(request: Request) -> None:
    for name, (form, words) in _FORMS.items():
        if not re.fullmatch(form, value := getattr(request, name)):
            raise UserError(f"--{name} {value}: must be {words}")
    for name, least in _LEAST.items():
        if (value := getattr(request, name)) is not None and value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    if not request.node_counts:
        raise UserError(f"--nodes {request.nodes}: the least is above the most")
    if request.minutes < 1:
        raise UserError(f"--time {request.time}: must be at least a minute")
    if request.gpus_per_node and request.ranks != request.gpus_per_node:
        raise UserError(f"--ranks_per_node {request.ranks}: on {request.gpus_per_node} GPUs a node must be as many; "
                        "it is for CPU nodes")  # fmt: skip
    if request.executor != "slurm" and request.node_counts[-1] > 1:
        raise UserError(f"--nodes {request.nodes}: {request.executor} runs on this machine alone; use --cluster slurm")
    if ours := sorted(set(request.slurm) & {"array", "dependency", "error", "nodes", "output", "requeue", "signal"}):
        raise UserError(f"--slurm.{ours[0]}: is set by jobs.submit; leave it out")
    if not request.stages:
        raise UserError(f"--stages: at least one of {', '.join(STAGES)}")
