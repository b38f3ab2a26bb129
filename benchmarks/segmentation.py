"""Segmentation on the embedded canvases, linear student against softmax baseline: `make bench-segmentation`.

For each seed the same stage 3 on equal budgets, by the embedded default's recipe: from the softmax teacher's weights,
and from the linear student of stages 1 and 2 (`--epochs`). Judged at the last step, on images that chose nothing.
Interrupted, the same command goes on where it was.
"""

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

from benchmarks.common import ROOT, markdown, run_stage


def main() -> None:
    """Run everything that is not done yet, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/bench-segmentation")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1))
    parser.add_argument("--epochs", type=float, nargs=2, default=(2, 6), metavar=("S1", "S2"), help="of alignment")
    args = parser.parse_args()
    out, lanes = args.out.resolve(), min(len(os.sched_getaffinity(0)), len(args.seeds))

    def go(seed: int) -> dict[str, dict]:
        """The last line of each run of a seed."""

        def run(name: str, stage: int, *options: str) -> dict:
            return run_stage(out / f"seed{seed}" / name, stage, ["--train.seed", str(seed), *options], threads=1)[-1]

        segment = ("--task", "segmentation")
        last = {"softmax baseline": run("softmax", 3, *segment, "--student.attention", "softmax")}
        beside = ("--segmentation.beside", str(out / f"seed{seed}/softmax/stage3/export"))
        for stage, epochs in enumerate(args.epochs, 1):
            run("linear", stage, "--train.epochs", str(epochs))
        last["linear student of stages 1 and 2"] = run("linear", 3, *segment, *beside)
        return last

    with ThreadPoolExecutor(lanes) as pool:
        runs = list(pool.map(go, args.seeds))
    rows = []
    for name in runs[0]:
        of = [last[name] for last in runs]
        lost = [last["softmax baseline"]["miou"] - last[name]["miou"] for last in runs]
        each, by = (", ".join(f"{v:.2f}" for v in values) for values in ([line["miou"] for line in of], lost))
        rows.append([name, f"{mean(line['miou'] for line in of):.2f}", each, by,
                     f"{mean(line['pixel_accuracy'] for line in of):.2f}"])  # fmt: skip
    print(markdown(["stage 3 from", "mIoU", "a seed", "below the baseline", "pixel accuracy"], rows))
    print(f"pictures: {out}/seed*/*/stage3/pictures")


if __name__ == "__main__":
    main()
