"""The embedded default, converted with the recommended operator and with the paper's: `make demo`.

Two chains run side by side, each on half of the cores: `recommended` (focused) and `paper` (elu1), stages 1 and 2 of
each. A bar shows the steps and the time left. What comes out is `runs/demo/report.html`, `table.md` and
`table.png`. What is done already is not run again; remove the folder first.
"""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from benchmarks.common import ROOT, markdown, run_stage
from trainer.output.log import has_width

if TYPE_CHECKING:
    from torch import nn

CHAINS = {"recommended": ("focused", (1, 2)), "paper": ("elu1", (1, 2))}
EPOCHS = {1: 0.375, 2: 0.5}  # shorter than the recipe's: all of it in minutes
STEPS = {1: 48, 2: 64}
START = 50  # steps that the start of a stage takes the time of, about
USUAL = 240.0  # seconds of all of it on two idle cores, about: what the time left is told by in the first seconds
LARGE = 256  # pixels of the second speed: 4,096 tokens
STOPPED = 75
COLUMNS = ["", "top-1 (%)", "feature cosine", "images per CPU second, 256 tokens", "4,096 tokens"]


class Stage:
    """What a stage's folder tells of its progress."""

    def __init__(self, run: Path, stage: int) -> None:
        self.name, self.steps = f"stage {stage}", STEPS[stage]
        self.folder, self.log = run / f"stage{stage}", run / f"stage{stage}.log"

    @property
    def work(self) -> int:
        """All of it, in steps."""
        return START + self.steps

    def done(self) -> int:
        """What is done of it, in steps: none while it starts."""
        if (self.folder / "export/config.json").is_file():
            return self.work
        begun = (self.folder / "starts.jsonl").is_file()
        return min(START + self.step(), self.work - 1) if begun else 0

    def step(self) -> int:
        """The last step that a line was written of."""
        try:
            lines = (self.folder / "metrics.jsonl").read_text().splitlines()
            return json.loads(lines[-1])["step"] if lines else 0
        except (OSError, ValueError):  # not there yet, or half a line
            return 0

    def words(self) -> str:
        """Where it stands."""
        if self.done() >= START:
            return f"{self.name}, step {self.step()} of {self.steps}"
        said = self.log.read_text() if self.log.is_file() else ""
        return f"{self.name} {'compiles DeepSpeed, once' if 'DeepSpeed compiles' in said else 'starts'}"


def progress(out: Path) -> tuple[float, str]:
    """The share of all work that is done, and where the two chains stand."""
    done = work = 0
    words = []
    for name, (_, stages) in CHAINS.items():
        chain = [Stage(out / name, stage) for stage in stages]
        done, work = done + sum(s.done() for s in chain), work + sum(s.work for s in chain)
        open_ = [s for s in chain if s.done() < s.work]
        words.append(f"{name}: {open_[0].words() if open_ else 'done'}")
    return done / work, "; ".join(words)


def left(share: float, first: float, elapsed: float) -> float:
    """Seconds until all is done: from what was usual at first, then more and more from what has been measured.

    Args:
        share: of the work, done by now.
        first: the share that was done when this call began.
        elapsed: seconds since then.
    """
    weight = 0.15  # the share of the work that what is usual counts as much as
    starting = len(CHAINS) * START / sum(START + STEPS[stage] for _, stages in CHAINS.values() for stage in stages)
    made = max(share - first, min(elapsed / USUAL, starting))  # the starts of the first stages show no step
    return (elapsed + weight * USUAL) / (made + weight) * (1 - share)


def watch(out: Path, futures: list[Future], began: float) -> None:
    """Show the progress until the futures are done: as a bar, or a line every ten seconds where nobody watches one."""
    drawn, first, told = has_width(sys.stderr), progress(out)[0], -10.0
    bar = tqdm(total=100, disable=not drawn, bar_format="{percentage:3.0f} %|{bar:20}| {desc}", file=sys.stderr)
    while True:
        share, words = progress(out)
        elapsed = time.monotonic() - began
        line = (
            f"{timedelta(seconds=round(elapsed))}, about {timedelta(seconds=round(left(share, first, elapsed)))} left"
        )
        bar.n = round(100 * share)
        bar.set_description_str(f"{line}; {words}")
        if not drawn and elapsed - told >= 10:
            print(f"{share:4.0%}, {line}; {words}", file=sys.stderr, flush=True)
            told = elapsed
        if all(future.done() for future in futures):
            break
        wait(futures, timeout=0.5)
    bar.close()


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def chains(out: Path, threads: int, say: Callable[[str], None]) -> Iterator[Callable[[], list[list[dict[str, Any]]]]]:
    """A function for each chain: the evaluations of its stages."""
    for name, (operator, stages) in CHAINS.items():
        options = ["--student.operator", operator, "--train.log_every", "4"]
        # A later stage begins with the figures that the one before has ended with.
        of = {
            stage: [*options, "--train.epochs", str(EPOCHS[stage]), "--train.eval_first", str(stage == 1).lower()]
            for stage in stages
        }
        yield lambda name=name, of=of: [run_stage(out / name, stage, of[stage], threads, say) for stage in of]


def images_per_second(vits: "dict[str, nn.Module]", size: int, batch: int, rounds: int) -> dict[str, float]:
    """Images per second of CPU time: medians over interleaved forward passes in fp32, on one thread."""
    import torch

    torch.set_num_threads(1)
    images = torch.randn(batch, 3, size, size)
    seconds: dict[str, list[float]] = {name: [] for name in vits}
    with torch.inference_mode():
        for i in range(rounds + 1):
            for name, vit in vits.items():
                began = time.process_time()
                vit(images)
                if i > 0:  # warm
                    seconds[name].append(time.process_time() - began)
    return {name: batch / median(times) for name, times in seconds.items()}


def speeds(out: Path) -> dict[str, list[float]]:
    """Images per CPU second of teacher and students, at the recipe's size and at a large one."""
    import models
    from trainer.config import parse

    settings = parse(["--stage", "2"])
    found: dict[str, list[float]] = {}
    for size, batch, rounds in ((settings.data.image_size, 16, 15), (LARGE, 1, 5)):
        teacher = models.build_backbone(
            settings.teacher.name, settings.teacher.kwargs, settings.teacher.weights, image_size=size
        )
        vits = {"softmax": teacher}
        for name, (operator, _) in CHAINS.items():
            vits[operator] = models.load(out / name / "stage2/export", image_size=size)
        for name, speed in images_per_second(vits, size, batch, rounds).items():
            found.setdefault(name, []).append(speed)
    return found


def draw(rows: list[list[str]], path: Path) -> None:
    """The table's top-1 and cosine as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names, top1, cosine = ([row[i] for row in rows] for i in (0, 1, 2))
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    for axis, values, title in zip(axes, (top1, cosine), COLUMNS[1:3], strict=True):
        bars = axis.barh(names, [float(v) for v in values], color=["0.6", *["tab:blue"] * (len(rows) - 1)])
        axis.bar_label(bars, labels=values, padding=3)
        axis.set_title(title)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=120)


def table(found: dict[str, list[list[dict[str, Any]]]], speed: dict[str, list[float]]) -> list[list[str]]:
    """The rows: teacher, and of each chain the copied weights and what came after each stage."""
    copied = next(iter(found.values()))[0][0]
    results = [("teacher (softmax)", {"top1": copied["teacher_top1"], "feature_cosine": 1.0}, "softmax")]
    for name, (operator, stages) in CHAINS.items():
        who = f"{operator} ({'recommended' if name == 'recommended' else 'the paper'})"
        results.append((f"{who}: weights copied", found[name][0][0], operator))
        for count, evaluations in enumerate(found[name], 1):
            after = " + ".join(map(str, stages[:count]))
            results.append((f"{who}: stage{'s' * (count > 1)} {after}", evaluations[-1], operator))
    return [
        [row, f"{line['top1']:.2f}", f"{line['feature_cosine']:.3f}", *(f"{value:.3g}" for value in speed[operator])]
        for row, line, operator in results
    ]


def main() -> int:
    """Run what is not done yet, then print and plot the table. Exit status: 0, or 75 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/demo", help="where it writes (runs/demo)")
    out, began = parser.parse_args().out.absolute(), time.monotonic()
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    with ThreadPoolExecutor(len(CHAINS)) as pool:
        futures = [pool.submit(chain) for chain in chains(out, threads, lambda line: tqdm.write(line, sys.stderr))]
        try:
            watch(out, futures, began)
            found = dict(zip(CHAINS, (future.result() for future in futures), strict=True))
        except KeyboardInterrupt:  # the stages have it too, save and end
            wait(futures)
            print("stopped; the same command goes on", file=sys.stderr)
            return STOPPED
    speed = speeds(out)
    rows = table(found, speed)
    text = markdown(COLUMNS, rows)
    (out / "table.md").write_text(text)
    draw(rows, out / "table.png")
    from trainer.report import report

    page = report([out / name for name in CHAINS], out / "report.html")
    small, large = (speed["focused"][i] / speed["softmax"][i] for i in (0, 1))
    used = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(f"\n{text}")
    print("speed: forward, fp32, one thread, in CPU time; focused / softmax = "
          f"{small:.2f} at 256 tokens, {large:.2f} at 4,096")  # fmt: skip
    print(f"report: {page}")
    print(f"took {time.monotonic() - began:.0f} s, and {used:.0f} s of CPU time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
