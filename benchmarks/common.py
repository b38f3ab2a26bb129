"""What the benchmarks share: one stage run by the program's own command line."""

import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).parent.parent
SCORES = {"miou": "mIoU", "top1": "top-1"}


def run_stage(
    folder: Path, stage: int, options: list[str], threads: int, say: Callable[[str], None] = print
) -> list[dict]:
    """One stage in the run folder `folder`, with wandb off; done before, it is only read.

    Args:
        threads: of torch, for this process.
        say: gets the line that it is done.

    Returns:
        The val lines of its metrics.jsonl: at the start first, at the end last.
    """
    command = [
        sys.executable,
        "trainer/run.py",
        "--stage",
        str(stage),
        "--run",
        str(folder),
        "--tracking",
        "[]",
        *options,
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"stage{stage}.log").open("a") as log:
        # timm's own softmax attention: on a CPU, at these lengths, twice as fast in backward as torch's fused one.
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "TIMM_FUSED_ATTN": "0"}
        done = subprocess.run(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"{folder.name}: stage {stage} ended with status {done.returncode}, see {log.name}")
    lines = map(json.loads, (folder / f"stage{stage}" / "metrics.jsonl").read_text().splitlines())
    evaluations = [line for line in lines if line["split"] == "val"]
    score = next(f"{words} {evaluations[-1][key]:.2f}" for key, words in SCORES.items() if key in evaluations[-1])
    say(f"{folder.name}: stage {stage} done, {score}")
    return evaluations


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def claim(
    words: str,
    ours: float,
    target: float | None,
    unit: str = "",
    *,
    peer: float | None = None,
    ratio: float | None = None,
    at_least: bool = False,
) -> dict[str, Any]:
    """A row of `benchmarks.all`: what a benchmark says, for its --json.

    Args:
        ours: the figure, in `unit`; where there is a peer, its figure stands beside.
        target: of the ratio, or of `ours` where there is no peer. None: there is none.
        ratio: ours over the peer's by default.
        at_least: the target is a floor; else it is a ceiling.
    """
    if ratio is None and peer is not None:
        ratio = ours / peer
    judged = ours if ratio is None else ratio
    met = None if target is None else judged >= target if at_least else judged <= target
    return {"claim": words, "ours": ours, "peer": peer, "unit": unit, "ratio": ratio, "target": target,
            "at_least": at_least, "met": met}  # fmt: skip


class Peak:
    """Bytes held at most since `restart`, over those held when it was built: on a GPU of torch's allocator.

    On a CPU of the resident set, which knows of all memory, not only of torch's. Until it is called, what is freed is
    given back at once, so that holes in the heap do not count; a pass takes longer meanwhile.
    """

    def __init__(self, device: "torch.device") -> None:
        import torch

        self.cuda = device if device.type == "cuda" else None
        self._torch = torch.cuda
        self.restart()
        self.before = self._torch.memory_allocated(self.cuda) if self.cuda else _resident("VmRSS")

    def restart(self) -> None:
        """Forget the peak so far."""
        if self.cuda:
            self._torch.empty_cache()
            self._torch.reset_peak_memory_stats(self.cuda)
        else:
            LIBC.mallopt(M_MMAP_THRESHOLD, 1 << 16)
            LIBC.malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the mark of the peak: proc(5)

    def __call__(self) -> int:
        """The bytes."""
        if self.cuda:
            return self._torch.max_memory_allocated(self.cuda) - self.before
        LIBC.mallopt(M_MMAP_THRESHOLD, 1 << 25)  # where the C library's own threshold ends up
        LIBC.mallopt(M_TRIM_THRESHOLD, 1 << 26)
        return _resident("VmHWM") - self.before


LIBC = ctypes.CDLL(None)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def _resident(which: str) -> int:
    return int(re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
