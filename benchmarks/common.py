"""What the benchmarks share: one stage run by the program's own command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_stage(folder: Path, stage: int, options: list[str], threads: int) -> list[dict]:
    """One stage in the run folder `folder`, with wandb off; done before, it is only read.

    Args:
        threads: of torch, for this process.

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
        "--wandb.enabled",
        "false",
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
    judged = [line for line in lines if line["split"] == "val"]
    print(f"{folder.name}: stage {stage} done, top-1 {judged[-1]['top1']:.2f}", flush=True)
    return judged


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
