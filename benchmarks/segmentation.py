"""Segmentation on the embedded canvases, linear student against softmax baseline: `make bench-segmentation`.

For each seed the same stage 3 three times on equal budgets: from the softmax teacher's weights; from the student of
stages 1 and 2; and, to see what those two bought, from the teacher's weights copied into linear attention. Judged at
the last step, on images that chose nothing. Interrupted, the same command goes on where it was.
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
    parser.add_argument("--options", default="", help="of every run, such as '--train.bf16 false'")
    args = parser.parse_args()
    out, lanes = args.out.resolve(), min(len(os.sched_getaffinity(0)), len(args.seeds))

    def go(seed: int) -> dict[str, dict]:
        """The last line of each run of a seed."""

        def run(name: str, stage: int, *options: str) -> dict:
            every = ["--train.seed", str(seed), *args.options.split()]
            return run_stage(out / f"seed{seed}" / name, stage, [*every, *options], threads=1)[-1]

        segment = ("--task", "segmentation")
        last = {"softmax baseline": run("softmax", 3, *segment, "--student.attention", "softmax")}
        beside = ("--segmentation.beside", str(out / f"seed{seed}/softmax/stage3/export"))
        for stage in (1, 2):
            run("linear", stage)
        last["linear, after stages 1 and 2"] = run("linear", 3, *segment, *beside)
        last["linear, copied weights"] = run("copied", 3, *segment, *beside, "--student.parent", "none")
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
