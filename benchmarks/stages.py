"""What each stage buys, on CIFAR-10: `make bench-stages ARGS="--images DIR --teacher FILE"`.

Equal budgets (images seen), fixed last checkpoints, for each seed: copied weights; stage 1 only; stage 2 only; both;
both with only Q, K, V trained in stage 2. Then, for the first seed, stage 3 from "both", and the softmax teacher
fine-tuned by the same command on the same budget. Interrupted, the same command goes on where it was.
"""

import argparse
import os
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

from benchmarks.common import ROOT, markdown, run_stage

SPLITS = {"train": "train", "val": "test"}


def prepare(images: Path, out: Path) -> dict[str, Path]:
    """train.beton and val.beton from a folder, or a .tar.gz, with train/ and test/, a folder a class."""
    files = {split: out / f"{split}.beton" for split in SPLITS}
    if all(file.exists() for file in files.values()):
        return files
    if images.is_file():
        with tarfile.open(images) as archive:
            archive.extractall(out / "images", filter="data")
        images = out / "images"
    for split, folder in SPLITS.items():
        write = [sys.executable, "-m", "data.write", str(images / folder), str(files[split]), "--raw_share", "1"]
        subprocess.run(write, cwd=ROOT, check=True)
    return files


def main() -> None:
    """Run everything that is not done yet, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = ROOT.parent / "shared"
    parser.add_argument("--images", type=Path, default=shared / "data/cifar10.tar.gz", help="a folder or .tar.gz")
    parser.add_argument("--teacher", type=Path, default=shared / "teachers/cifar10_vit.safetensors")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/bench-stages")
    parser.add_argument("--epochs", type=float, nargs=3, default=(1, 2, 2), metavar=("S1", "S2", "S3"), help="a stage")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1))
    args = parser.parse_args()
    out, (one, two, three) = args.out.resolve(), args.epochs
    out.mkdir(parents=True, exist_ok=True)
    files = prepare(args.images.resolve(), out)
    common = ["--config", "cifar10", "--teacher.weights", str(args.teacher.resolve())]
    common += ["--data.train", str(files["train"]), "--data.val", str(files["val"])]
    cores = len(os.sched_getaffinity(0))
    lanes = min(cores, len(args.seeds))  # two processes of one thread wait less than one of two

    def go(seed: int, name: str, stage: int, epochs: float, *options: str) -> list[dict]:
        first = str(name == "stage2-only").lower()  # the copied weights are evaluated once per seed
        options = (
            *common,
            "--train.seed",
            str(seed),
            "--train.epochs",
            str(epochs),
            "--train.eval_first",
            first,
            *options,
        )
        return run_stage(out / f"seed{seed}" / name, stage, list(options), cores // lanes)

    def parent(seed: int, name: str, stage: int) -> tuple[str, str]:
        return "--student.parent", str(out / f"seed{seed}" / name / f"stage{stage}/export")

    def align(seed: int) -> list[dict]:
        return go(seed, "align", 1, one)

    def both(seed: int) -> list[dict]:
        return go(seed, "both", 2, two, *parent(seed, "align", 1))

    def finetune(attention: str) -> list[dict]:
        start = parent(args.seeds[0], "both", 2) if attention == "linear" else ()
        return go(args.seeds[0], f"finetune-{attention}", 3, three, "--student.attention", attention, *start)

    def qkv(seed: int) -> list[dict]:
        return go(seed, "both-qkv", 2, two, *parent(seed, "align", 1), "--student.trainable", "qkv")

    def only_2(seed: int) -> list[dict]:
        return go(seed, "stage2-only", 2, one + two, "--student.parent", "none")

    def only_1(seed: int) -> list[dict]:
        return go(seed, "stage1-only", 1, one + two)

    with ThreadPoolExecutor(lanes) as pool:
        list(pool.map(align, args.seeds))
        ran_both = list(pool.map(both, args.seeds))
        linear, softmax = pool.map(finetune, ("linear", "softmax"))
        ran_2, ran_1, ran_qkv = (list(pool.map(run, args.seeds)) for run in (only_2, only_1, qkv))

    def last(runs: list[list[dict]]) -> list[dict]:
        return [lines[-1] for lines in runs]

    table = {
        "copied weights, no training": ("0", [lines[0] for lines in ran_2]),
        "stage 1 only": (f"{one + two:g} + 0", last(ran_1)),
        "stage 2 only": (f"0 + {one + two:g}", last(ran_2)),
        "both, stage 2 on Q, K, V only": (f"{one:g} + {two:g}", last(ran_qkv)),
        "both": (f"{one:g} + {two:g}", last(ran_both)),
        "both, then stage 3": (f"{one:g} + {two:g} + {three:g}", [linear[-1]]),
        "softmax teacher, stage 3": (f"0 + 0 + {three:g}", [softmax[-1]]),
    }
    teacher = ran_2[0][0]["teacher_top1"]
    rows = [["softmax teacher", "", f"{teacher:.2f}", "", "100.0 %", "1.000"]]
    for name, (budget, lines) in table.items():
        top1, cosine = (mean(line[key] for line in lines) for key in ("top1", "feature_cosine"))
        each = ", ".join(f"{line['top1']:.2f}" for line in lines)
        rows.append([name, budget, f"{top1:.2f}", each, f"{top1 / teacher:.1%}", f"{cosine:.3f}"])
    print(markdown(["run", "epochs", "top-1", "a seed", "of the teacher", "feature cosine"], rows))


if __name__ == "__main__":
    main()
