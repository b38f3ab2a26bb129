"""Faults on purpose: a run must end as if nothing had happened, or in one clear line. `make faults` runs them all.

Each fault is drawn from (seed, family, number), so that one can be given again: `--only "kills:7"`. Outcomes:

- equal: after the last restart the export, the last checkpoint (weights, optimizer state, averages) and the metrics
  lines, but for timings, are those of the undisturbed run, bit for bit;
- clear error: status 2 and exactly one line `error: ...`, no traceback, what was there before untouched;
- lost: it went on, but not as the undisturbed run, or earlier progress was gone;
- unexplained: anything else, such as a crash, a hang, or a traceback.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from tests.conftest import ENVIRONMENT, ROOT, curve, write_small
from tests.support.zygote import Run, Zygote
from trainer.engine.checkpoint import ASIDE, verify

EQUAL, ERROR, LOST, UNEXPLAINED, SKIPPED = "equal", "clear error", "lost", "unexplained", "skipped"
STEPS, SAVE_EVERY, EVAL_EVERY = 40, 4, 10
WATCH = 0.0005  # seconds between two looks at a run folder


@dataclass(frozen=True)
class Setup:
    """A stage on a number of ranks."""

    stage: int
    zero: int = 1
    ranks: int = 1
    accumulate: int = 1

    def argv(self, small: Path, run: Path) -> list[str]:
        """The program's arguments."""
        options = {
            "config": small / "recipe.yaml",
            "stage": self.stage,
            "run": run,
            "deepspeed": ROOT / f"ds_configs/zero{self.zero}.json",
            "student.parent": "none",
            "train.micro_batch_size": 16 // self.ranks // self.accumulate,
            "train.steps": STEPS,
            "train.save_every": SAVE_EVERY,
            "train.eval_every": EVAL_EVERY,
            "train.keep": 3,
        }
        if self.stage == 3:
            names = ("mixup", "cutmix", "drop_path", "label_smoothing", "layer_decay", "ema")
            values = zip(names, (0.8, 1.0, 0.1, 0.1, 0.7, 0.9), strict=True)
            options |= {f"stage3.{name}": value for name, value in values} | {"train.weight_decay": 0.05}
        return [word for name, value in options.items() for word in (f"--{name}", str(value))]


SETUPS = (
    Setup(2),
    Setup(3, zero=2, ranks=2),
    Setup(1, zero=3),
    Setup(2, zero=3, ranks=2),
    Setup(3, zero=3, accumulate=2),
    Setup(1, zero=2, ranks=2, accumulate=2),
    Setup(3),
    Setup(2, zero=2, accumulate=2),
    Setup(3, zero=3, ranks=2),
    Setup(2, zero=1, ranks=2),
)


@dataclass
class Fault:
    """One fault and how it ended."""

    kind: str
    outcome: str
    said: str = ""


@dataclass
class Reference:
    """An undisturbed run: its stage's folder, and how long it took."""

    folder: Path
    seconds: float


class Broken(Exception):
    """What should be the undisturbed run does not end well: there is nothing to compare with."""


class Bench:
    """What the faults need: the small data set, forked runs, undisturbed runs to compare with."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        folder.mkdir(parents=True)
        self.small = folder / "small"
        self.small.mkdir()
        write_small(self.small)
        self._mine = threading.local()
        self._references: dict[Any, Reference] = {}
        self._locks: dict[Any, threading.Lock] = defaultdict(threading.Lock)

    def rng(self, family: str, number: int) -> np.random.Generator:
        """What a fault is drawn from."""
        return np.random.default_rng([self.seed, zlib.crc32(family.encode()), number])

    def place(self, family: str, number: int) -> Path:
        """A new folder for a fault."""
        path = self.folder / f"{family}-{number}".replace(" ", "-")
        path.mkdir()
        return path

    def start(self, argv: list[str], ranks: int = 1, supervised: bool = True, **how: Any) -> Run:
        """The program, forked. Each thread has a zygote of its own."""
        if not hasattr(self._mine, "zygote"):
            self._mine.zygote = Zygote(ENVIRONMENT, self.small / "train.beton")
        log = Path(tempfile.mkdtemp(dir=self.folder, prefix="log-"))
        return Run(self._mine.zygote, argv, log, ranks, supervised=supervised, **how)

    def finish(self, argv: list[str], ranks: int = 1, timeout: float = 200) -> Run:
        """The program, to its end."""
        run = self.start(argv, ranks)
        run.wait(timeout)
        return run

    def reference(self, key: Any, argv: Callable[[Path], list[str]], stage: int, ranks: int = 1) -> Reference:
        """The undisturbed run of `argv(run folder)`, made once for each `key`."""
        with self._locks[key]:
            if key not in self._references:
                folder = Path(tempfile.mkdtemp(dir=self.folder, prefix="reference-"))
                run = self.start(argv(folder), ranks)
                began = time.monotonic()
                if run.wait(200) != 0:
                    raise Broken(f"without any fault: {ending(run)}")
                self._references[key] = Reference(folder / f"stage{stage}", time.monotonic() - began)
            return self._references[key]

    def undisturbed(self, setup: Setup) -> Reference:
        """The reference of a setup."""
        return self.reference(setup, lambda run: setup.argv(self.small, run), setup.stage, setup.ranks)


# --- How a run ended -------------------------------------------------------------------------------------------------


def differences(folder: Path, reference: Path, whole: bool = True) -> list[str]:
    """What of a finished stage is not as in the undisturbed one. `whole`: the export's config.json too."""
    found = []
    if not (folder / "export/config.json").is_file():
        return ["there is no export"]
    if whole and (folder / "export/config.json").read_text() != (reference / "export/config.json").read_text():
        found.append("export/config.json differs")
    files = ["export/model.safetensors"]
    last = f"checkpoints/step-{max(published(reference)):08d}"
    files += [str(path.relative_to(reference)) for path in (reference / last).glob("*.safetensors")]
    for name in files:
        if not (folder / name).is_file():
            found.append(f"{name} is missing")
            continue
        mine, theirs = load_file(folder / name), load_file(reference / name)
        wrong = [key for key in theirs if key not in mine or not torch.equal(mine[key], theirs[key])]
        if wrong or mine.keys() - theirs.keys():
            found.append(f"{name} differs in {len(wrong)} of {len(theirs)} tensors")
    if curve(folder) != curve(reference):
        found.append("metrics.jsonl differs")
    return found


def published(folder: Path) -> list[int]:
    """Steps of the checkpoints in a stage's folder."""
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))


def error_line(run: Run) -> str | None:
    """The one line of a clear error, or None."""
    said = run.text("out") + run.text("err")
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    return lines[0] if run.code == 2 and len(lines) == 1 and "Traceback" not in said else None


def ending(run: Run) -> str:
    """Status and last words, for a report."""
    return f"status {run.code}: {run.text('out')[-200:]} {run.text('err')[-800:]}"


def judge(run: Run, folder: Path, reference: Path, whole: bool = True) -> tuple[str, str]:
    """(outcome, what to say) of a run that a damaged file was given to."""
    if line := error_line(run):
        return ERROR, line
    if run.code != 0:
        return UNEXPLAINED, ending(run)
    wrong = differences(folder, reference, whole)
    return (LOST, "; ".join(wrong)) if wrong else (EQUAL, "")


# --- Kills -----------------------------------------------------------------------------------------------------------


def in_a_save(folder: Path) -> bool:
    """A checkpoint is being written."""
    return any((folder / "checkpoints").glob(f"{ASIDE}*"))


def in_an_evaluation(folder: Path) -> bool:
    """The last line is of a step that is judged, and its judgement is not there."""
    lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []
    try:
        last = json.loads(lines[-1])
    except (IndexError, ValueError):
        return False
    return last["split"] == "train" and last["step"] % EVAL_EVERY == 0


def in_the_export(folder: Path) -> bool:
    """The last checkpoint is there, the export is not complete."""
    return (folder / f"checkpoints/step-{STEPS:08d}").exists() and not (folder / "export/config.json").exists()


# When to kill -> how it is seen in the stage's folder, and at most how many seconds later.
MOMENTS: dict[str, tuple[Callable[[Path], bool], float]] = {
    "save": (in_a_save, 0.02),
    "evaluation": (in_an_evaluation, 0.03),
    "export": (in_the_export, 0.05),
}
WAYS = ("anywhere", "save", "one rank", "conversion", "evaluation", "anywhere", "save", "signal", "export")


def kills(bench: Bench, number: int) -> list[Fault]:
    """A run that is killed several times, each time in another way, and then left alone."""
    rng, setup = bench.rng("kills", number), SETUPS[number % len(SETUPS)]
    reference, place = bench.undisturbed(setup), bench.place("kills", number)
    folder, tried, wrong = place / f"stage{setup.stage}", [], []
    for attempt in range(int(rng.integers(3, 9))):
        way = WAYS[(3 * number + attempt) % len(WAYS)]
        if way == "one rank" and setup.ranks == 1:
            way = "anywhere"
        if (folder / "export/config.json").exists():
            break
        before = published(folder)
        run, hit = strike(bench, setup, place, way, reference.seconds, rng)
        fault = Fault("signal" if way == "signal" else f"SIGKILL: {way}", EQUAL)
        if hit:
            tried.append(fault)
        elif run.code != 0:
            wrong.append((UNEXPLAINED, f"ended before the {way} with {ending(run)}"))
        if hit and way == "signal" and run.code not in (0, 75, *(-number for number in STOPPING)):
            fault.outcome, fault.said = UNEXPLAINED, f"{setup}: {ending(run)}"
        if hit and way == "one rank" and (problem := survivors(run)):
            fault.outcome, fault.said = UNEXPLAINED, f"{setup}: {problem}"
        start = re.search(r"from step (\d+)", run.text("err"))
        if before and ", to step " in run.text("err") and not (start and int(start[1]) == before[-1]):
            wrong.append((LOST, f"did not go on from step {before[-1]}: {run.text('err')[-500:]}"))
    run = bench.finish(setup.argv(bench.small, place), setup.ranks)
    if run.code != 0:
        wrong.append((LOST, f"the last restart: {ending(run)}"))
    else:
        wrong += [(LOST, difference) for difference in differences(folder, reference.folder)]
    if wrong:
        said = f"{setup}, {[fault.kind for fault in tried]}: {'; '.join(text for _, text in wrong)}"
        worst = LOST if any(outcome == LOST for outcome, _ in wrong) else UNEXPLAINED
        return [Fault(fault.kind, worst, said) for fault in tried or [Fault("SIGKILL: none", worst)]]
    return tried


STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def strike(
    bench: Bench, setup: Setup, place: Path, way: str, life: float, rng: np.random.Generator
) -> tuple[Run, bool]:
    """Start a run and kill it; whether it was alive then. `life`: seconds that it takes undisturbed."""
    folder, ranks, argv = place / f"stage{setup.stage}", setup.ranks, setup.argv(bench.small, place)
    seen, later = MOMENTS.get(way, (None, 0.0))
    saves = int(rng.integers(1, 4))  # which of the saves is hit
    if way == "conversion":  # other ranks and another ZeRO stage; nothing of theirs may be saved
        ranks = 3 - ranks
        other = Setup(setup.stage, setup.zero % 3 + 1, ranks, setup.accumulate)
        argv = [*other.argv(bench.small, place), "--train.save_every", "1000000"]
    begun = time.monotonic()
    wait = float(rng.uniform(0, 0.8 * life if way == "conversion" else life))
    after = float(rng.uniform(0, later))
    first, news = len(published(folder)), set()
    run = bench.start(argv, ranks, supervised=way != "one rank")
    while way == "one rank" and run.poll() is None and run.text("out").count("built successfully") < ranks:
        begun = time.monotonic()  # before that the launcher alone knows that there is another rank
        time.sleep(WATCH)
    while run.poll() is None:
        if way == "conversion" and "to step" in run.text("err"):
            break
        if seen is None and time.monotonic() - begun > wait:
            break
        if seen is not None and seen(folder):
            news.add(len(published(folder)) if way == "save" else 0)
            if way != "save" or len(news) >= saves or first + len(news) > STEPS // SAVE_EVERY:
                break
        time.sleep(WATCH)
    time.sleep(after)
    if run.poll() is not None:
        return run, False
    if way == "signal":
        hit = int(rng.integers(setup.ranks))
        run.ranks[hit].signal(STOPPING[int(rng.integers(len(STOPPING)))])
        run.wait(120)
    elif way == "one rank":
        run.victim = int(rng.integers(setup.ranks))
        run.ranks[run.victim].signal(signal.SIGKILL)
        end = time.monotonic() + 60
        while run.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        return run, run.ranks[run.victim].poll() == -signal.SIGKILL
    else:
        run.kill()
        return run, any(rank.code == -signal.SIGKILL for rank in run.ranks)
    return run, True


def survivors(run: Run) -> str | None:
    """What is wrong with the ranks that are left when one was killed: they end within 60 s, and one names it."""
    left = [rank for rank in run.ranks if rank.poll() is None]
    if left:
        run.kill()
        return f"{len(left)} ranks still ran 60 s after rank {run.victim} was killed: {run.text('err')[-500:]}"
    others = [rank.code for i, rank in enumerate(run.ranks) if i != run.victim]
    if any(others) and not re.search(rf"^error: rank {run.victim}\b", run.text("err"), re.MULTILINE):
        return f"rank {run.victim} was killed, no line names it: {others} {run.text('err')[-500:]}"
    return None


# --- Full disks ------------------------------------------------------------------------------------------------------


def mount(folder: Path, kilobytes: int, *options: str) -> bool:
    """A tmpfs of that size; False where this machine mounts none."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    how = ",".join((*options, f"size={kilobytes}k"))
    return (
        subprocess.run(["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(folder)], capture_output=True).returncode == 0
    )


def full_disk(bench: Bench, number: int) -> list[Fault]:
    """A run on a file system that fills up somewhere; then room is made."""
    kind, rng, setup = "disk full", bench.rng("disk", number), SETUPS[(3 * number) % len(SETUPS)]
    reference, place = bench.undisturbed(setup), bench.place("disk", number)
    used = sum(path.stat().st_blocks // 2 for path in reference.folder.rglob("*"))
    kilobytes = int(used * rng.choice([rng.uniform(0, 0.1), rng.uniform(0.1, 1.0), rng.uniform(0.9, 1.1)])) // 4 * 4 + 4
    if not mount(place, kilobytes):
        return [Fault(kind, SKIPPED, "only root can mount the small file system that this needs")]
    try:
        argv, folder = setup.argv(bench.small, place), place / f"stage{setup.stage}"
        run = bench.finish(argv, setup.ranks)
        if run.code == 0:  # it was large enough
            wrong = differences(folder, reference.folder)
            return [Fault(kind, LOST, f"{kilobytes} kB: {wrong}")] if wrong else []
        line = error_line(run)
        if line is None or "no space left" not in line.lower():
            return [Fault(kind, UNEXPLAINED, f"{setup}, {kilobytes} kB: {ending(run)}")]
        before = published(folder)
        broken = {step: problem for step in before if (problem := verify(folder / f"checkpoints/step-{step:08d}"))}
        if broken:
            return [Fault(kind, LOST, f"{setup}, {kilobytes} kB: checkpoints are broken: {broken}")]
        assert mount(place, 1 << 18, "remount")
        run = bench.finish(argv, setup.ranks)
        outcome, said = judge(run, folder, reference.folder)
        if outcome == EQUAL and before and f"from step {before[-1]}," not in run.text("err"):
            outcome, said = LOST, f"did not go on from step {before[-1]}: {run.text('err')[-500:]}"
        return [Fault(kind, outcome if outcome == EQUAL else LOST, said and f"{setup}, {kilobytes} kB: {said}")]
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


# --- The suite -------------------------------------------------------------------------------------------------------

Family = Callable[[Bench, int], list[Fault]]


def families() -> dict[str, tuple[Family, str]]:
    """Name -> the function that gives number n of it, and which option says how many are wanted."""
    from tests.suites import faults_damage

    own = {"kills": (kills, "kills"), "disk": (full_disk, "disks"), "settings": (faults_damage.settings, "settings")}
    own |= {"unshared": (faults_damage.unshared, "unshared")}
    return own | {name: (function, "inputs") for name, function in faults_damage.FAMILIES.items()}


class Suite:
    """Runs families until enough was tried, on a few threads, and keeps count."""

    def __init__(self, bench: Bench, wanted: dict[str, int], minutes: float, quiet: bool = False) -> None:
        """`wanted`: faults of each family."""
        self.bench, self.wanted, self.quiet = bench, wanted, quiet
        self.end = time.monotonic() + 60 * minutes
        self.lock = threading.Lock()
        self.numbers: Counter[str] = Counter()
        self.done: Counter[str] = Counter()
        self.table: dict[str, Counter[str]] = defaultdict(Counter)
        self.bad: list[str] = []

    def run(self, threads: int = 2) -> None:
        """Until all are tried or the time is spent."""
        workers = [threading.Thread(target=self._work) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    def _next(self) -> tuple[str, int] | None:
        with self.lock:
            share = {name: self.done[name] / wanted for name, wanted in self.wanted.items() if wanted}
            open_ = [name for name, part in share.items() if part < 1]
            if not open_ or time.monotonic() > self.end:
                return None
            name = min(open_, key=share.get)
            self.numbers[name] += 1
            self.done[name] += 1  # counted when it begins, and made right when it ends
            return name, self.numbers[name] - 1

    def _work(self) -> None:
        while (job := self._next()) is not None:
            self.try_one(*job)

    def try_one(self, name: str, number: int) -> None:
        """One of a family; what it found goes into the table."""
        began = time.monotonic()
        try:
            found = families()[name][0](self.bench, number)
        except Broken as error:
            found, self.end = [Fault(name, UNEXPLAINED, str(error))], 0.0
        except Exception as error:  # the harness's own trouble, a hang that was ended among it
            found = [Fault(name, UNEXPLAINED, f"{type(error).__name__}: {error}")]
        with self.lock:
            self.done[name] += len(found) - 1
            for fault in found:
                self.table[fault.kind][fault.outcome] += 1
                bad = fault.outcome in (LOST, UNEXPLAINED)
                if bad:
                    again = f'again: --seed {self.bench.seed} --only "{name}:{number}"'
                    self.bad.append(f"{fault.outcome}: {fault.kind}: {fault.said}\n  {again}")
                    print(self.bad[-1], flush=True)
                elif not self.quiet:
                    seconds = round(time.monotonic() - began)
                    print(f"{name}:{number} {seconds} s {fault.kind}: {fault.outcome} {fault.said}"[:300], flush=True)

    def lines(self) -> Iterator[str]:
        """The table, as Markdown."""
        outcomes = (EQUAL, ERROR, LOST, UNEXPLAINED, SKIPPED)
        yield f"| fault | tried | {' | '.join(outcomes)} |"
        yield "|---" * (len(outcomes) + 2) + "|"
        rows = {kind: self.table[kind] for kind in sorted(self.table)}
        for kind, row in (rows | {"all": sum(rows.values(), Counter())}).items():
            tried = row.total() - row[SKIPPED]
            yield f"| {kind} | {tried} | {' | '.join(str(row[outcome]) for outcome in outcomes)} |"

    def short_of(self) -> list[str]:
        """Families of which fewer were tried than wanted."""
        return [f"{name}: {self.done[name]} of {n}" for name, n in self.wanted.items() if self.done[name] < n]


def main() -> int:
    """Exit status 1 when anything was lost, is unexplained, or was not tried for want of time."""
    parser = argparse.ArgumentParser(description="Give the trainer faults on purpose.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=140, help="SIGKILLs, and one signal in nine (default 140)")
    parser.add_argument("--disks", type=int, default=20, help="file systems that fill up (default 20)")
    parser.add_argument("--inputs", type=int, default=240, help="damaged and hostile files (default 240)")
    parser.add_argument("--settings", type=int, default=500, help="drawn settings (default 500)")
    parser.add_argument("--unshared", type=int, default=1, help="run folders that ranks do not share (default 1)")
    parser.add_argument("--minutes", type=float, default=25, help="begin no more after that (default 25)")
    parser.add_argument("--threads", type=int, default=2, help="runs at a time (default 2)")
    parser.add_argument("--only", help="one family, or one fault: FAMILY or FAMILY:NUMBER")
    parser.add_argument("--keep", action="store_true", help="keep the folder that it works in")
    options = parser.parse_args()
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    bench = Bench(folder / "bench", options.seed)
    only, _, number = (options.only or "").partition(":")
    known = families()
    if only and only not in known:
        parser.error(f"--only {only}: choose from {', '.join(known)}")
    shares = Counter(option for _, option in known.values())
    wanted = {
        name: -(-getattr(options, option) // shares[option])
        for name, (_, option) in known.items() if not only or name == only
    }  # fmt: skip
    suite = Suite(bench, wanted, options.minutes)
    if number:
        suite.try_one(only, int(number))
        suite.wanted = {}
    else:
        suite.run(options.threads)
    print("\n".join(("", *suite.lines())))
    total = sum(suite.table.values(), Counter())
    print(
        f"{total[LOST]} lost, {total[UNEXPLAINED]} unexplained; seed {options.seed}, {time.monotonic() - began:.0f} s"
    )
    for line in suite.bad:
        print(line)
    if short := suite.short_of():
        print(f"not all were tried: {', '.join(short)}")
    if options.keep:
        print(f"kept: {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if suite.bad or short else 0


if __name__ == "__main__":
    sys.exit(main())
