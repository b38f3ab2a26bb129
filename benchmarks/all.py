"""Every benchmark that needs no GPU, in a short form, and one table: `make bench`, which writes runs/bench.md.

Each is a process of its own with a limit; one that fails or takes too long is a row that says so. Ratios are ours over
the peer's. The limits sum up to less than 20 minutes, meant for 2 idle cores; what each benchmark measures, and how, is
in its own file. Ends with status 1 where something could not be measured; a target that is missed is no failure.
"""

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, claim, markdown

HEAD = ["claim", "ours", "peer", "ratio", "target", "met"]


def rows_of(said: dict[str, Any]) -> list[dict[str, Any]]:
    """As `claim` makes them."""
    return said["rows"]


def spills(said: dict[str, Any]) -> list[dict[str, Any]]:
    """Of `benchmarks.kernels`, whose keys are kernel-passes-map-head dimension-architecture."""
    found: dict[str, int] = {}
    for key, built in said.items():
        name, _, kind, head_dim, architecture = re.fullmatch(r"(\w+)-(\w+)-(.+)-(\d+)-(\d+)", key).groups()
        words = f"no spills on sm_{architecture} at head dimension {head_dim}: {kind}, {name}"
        found[words] = max(found.get(words, 0), built["spills"])
    return [claim(words, worst, 0, "bytes") for words, worst in found.items()]


@dataclass
class Benchmark:
    """One process."""

    arguments: Sequence[str]  # of `python -m`, or of python
    limit: float  # seconds
    tiny: Sequence[str] | None = None  # the arguments that take seconds, if there are any
    threads: int | None = None  # where 1, CPU time counts
    read: Callable[[dict[str, Any]], list[dict[str, Any]]] = rows_of


BENCHMARKS = {
    "step": Benchmark(["-m", "benchmarks.step"], 320, threads=1),
    "start": Benchmark(["-m", "benchmarks.start", "--repeats", "2"], 150, threads=1),
    "loader": Benchmark(["-m", "benchmarks.loader", "--images", "512"], 180, ["-m", "benchmarks.loader", "--tiny"]),
    "saving": Benchmark(["-m", "benchmarks.saving", "--model", "vit_tiny_patch16_224", "--rounds", "1"], 130),
    "probe": Benchmark(["-m", "benchmarks.probe", "--embedded", "--blocks", "0"], 210),
    "resolution": Benchmark(
        ["-m", "benchmarks.resolution", "--sizes", "256", "512", "--seconds", "4", "--rounds", "5"], 120,
        ["-m", "benchmarks.resolution", "--model", "test_vit", "--sizes", "32", "--seconds", "0", "--rounds", "1"],
        threads=1,
    ),
    "kernels": Benchmark(
        ["-m", "benchmarks.kernels", "--maps", "ELU1", "FOCUSED-6", "--head_dims", "64", "--for", "90"], 90, read=spills
    ),
}  # fmt: skip


class NotMeasuredError(Exception):
    """In one line: why."""


def measured(benchmark: Benchmark, tiny: bool = False, patience: float = 1.0) -> list[dict[str, Any]]:
    """The rows of a benchmark. Raises NotMeasuredError where its process fails, says nothing, or takes too long."""
    command = [sys.executable, *(benchmark.tiny if tiny else benchmark.arguments), "--json"]
    env = os.environ | ({"OMP_NUM_THREADS": str(benchmark.threads)} if benchmark.threads else {})
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    limit = patience * benchmark.limit
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        raise NotMeasuredError(f"took more than {limit:g} s") from None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)  # with what it started
            process.communicate()
    if process.returncode:
        last = next((line.strip() for line in reversed((err or out).splitlines()) if line.strip()), "")
        raise NotMeasuredError(f"ended with status {process.returncode}: {last[:200]}")
    found = [line for line in out.splitlines() if line.startswith("{")]
    if not found:
        raise NotMeasuredError("printed no JSON")
    return benchmark.read(json.loads(found[-1]))


def cells(row: dict[str, Any]) -> list[str]:
    """A line of the table."""

    def figure(value: float | None, unit: str = "") -> str:
        return "" if value is None else f"{value:.4g} {unit}".strip()

    bound = "at least" if row["at_least"] else "at most"
    target = "" if row["target"] is None else f"{bound} {row['target']:g}"
    met = {None: "no target", True: "yes", False: "NO"}[row["met"]]
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f}"
    return [row["claim"], figure(row["ours"], row["unit"]), figure(row["peer"], row["unit"]), ratio, target, met]


def machine() -> str:
    """What the figures were measured on, in a line."""
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    name = processor[1] if processor else platform.machine()
    return f"{len(os.sched_getaffinity(0))} cores of {name}; load at the start {os.getloadavg()[0]:.1f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument("--patience", type=float, default=1.0, help="factor on the limits, for a busy machine")
    parser.add_argument("--tiny", action="store_true", help="what takes seconds, to see that it runs")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/bench.md")
    options = parser.parse_args(argv)
    names = [name for name in options.only if not options.tiny or BENCHMARKS[name].tiny]
    where, began, lines, failures = machine(), time.monotonic(), [], 0
    for name in names:
        since = time.monotonic()
        try:
            lines += map(cells, measured(BENCHMARKS[name], options.tiny, options.patience))
        except NotMeasuredError as error:
            lines.append([f"{name}: {error}".replace("|", "/"), "", "", "", "", "NOT MEASURED"])
            failures += 1
        print(f"{name}: {time.monotonic() - since:.0f} s", file=sys.stderr, flush=True)
    said = f"{where}. {time.monotonic() - began:.0f} s.\n\n{markdown(HEAD, lines)}"
    print(said, end="")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(said)
    return 1 if failures else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended too
    sys.exit(main())
