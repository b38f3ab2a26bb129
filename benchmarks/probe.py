"""Our probes against scikit-learn's, on the same features: `make bench-probe ARGS="--images DIR --teacher FILE"`.

The teacher's 6 blocks x 8 modules, mean over tokens, 10,000 training images of CIFAR-10. scikit-learn fits one module
at a time with the paper's pipeline (arXiv 2603.05280): L2-normalise, StandardScaler, LogisticRegression(max_iter=5000).
Its features are in memory before its clock starts. Our time includes reading them from the files. The two take turns,
block by block. Ours has all cores. scikit-learn runs each module on one core and on all, and the better time counts.
Then comes the peak memory of the program itself, features and probes, on 10,000 and 49,000 images. `--embedded` takes
the embedded data set and its teacher, 1,000 images, and leaves the memory out; it needs no files.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from threadpoolctl import threadpool_limits

from benchmarks.common import ROOT, claim, markdown
from benchmarks.stages import prepare
from models import BLOCK_MODULES
from trainer.config import parse
from trainer.output.folder import StageFolder
from trainer.probe.fit import fit_groups, groups_of, kept
from trainer.probe.plan import Plan, make_plan

CPU = torch.device("cpu")


def argv_of(args: argparse.Namespace, files: dict[str, Path], images: int) -> list[str]:
    """The program's arguments for a probe of the teacher that is fitted on so many images; of no files, embedded."""
    modules = ", ".join(f"blocks.{block}.{module}" for block in args.blocks for module in args.modules)
    given = [
        "--config", "cifar10", "--teacher.weights", str(args.teacher), "--data.train", str(files["train"]),
        "--data.val", str(files["val"]),
    ] if files else []  # fmt: skip
    return [
        "--stage", "probe", "--run", str(args.out / f"images-{images}"), *given, "--tracking", "[]",
        "--probe.models", "[teacher]", "--probe.modules", f"[{modules}]", "--probe.pooling", "[mean]",
        "--probe.penalties", "[1.0]", "--probe.images", str(images), "--probe.validation", "0.02",
        "--probe.keep_features", "true",
    ]  # fmt: skip


def probe(argv: list[str]) -> int:
    """Run the program in a process of its own; gives its peak memory, MiB."""
    print(f"probe on {argv[argv.index('--probe.images') + 1]} images ...", flush=True)
    child = subprocess.Popen([sys.executable, "trainer/run.py", *argv], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"the probe ended with status {os.waitstatus_to_exitcode(status)}")
    return used.ru_maxrss // 1024


def ours(plan: Plan, block: int, options, folder: Path) -> tuple[float, dict[str, float]]:
    """Seconds for all modules of a block, and top-1 on the test images in percent."""
    vectors = [vector for vector in plan.vectors if vector.tap.startswith(f"blocks.{block}.")]
    began = time.perf_counter()
    groups = groups_of(vectors, plan.store, plan.classes, CPU)
    for _ in fit_groups(plan.store, groups, plan.classes, options, folder, CPU):
        pass
    seconds = time.perf_counter() - began
    return seconds, {vector.tap: 100 * kept(folder, vector).right["val"].mean() for vector in vectors}


def theirs(plan: Plan, block: int) -> tuple[dict[str, float], dict[str, float]]:
    """The same by scikit-learn: seconds and top-1 per module."""
    seconds, top1 = {}, {}
    for vector in (vector for vector in plan.vectors if vector.tap.startswith(f"blocks.{block}.")):
        x, y, test, truth = (
            part.numpy()
            for split in ("fit", "val")
            for part in map(torch.cat, zip(*((x[0], y) for x, y in plan.store.blocks(split, [vector.keys], CPU)),
                                           strict=True))
        )  # fmt: skip
        times = []
        for cores in {1, torch.get_num_threads()}:
            with threadpool_limits(cores):
                began = time.perf_counter()
                pipeline = make_pipeline(Normalizer(), StandardScaler(), LogisticRegression(max_iter=5000)).fit(x, y)
                top1[vector.tap] = 100 * pipeline.score(test, truth)
                times.append(time.perf_counter() - began)
        seconds[vector.tap] = min(times)
    return seconds, top1


def main() -> None:
    """Probe, compare, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = ROOT.parent / "shared"
    parser.add_argument("--images", type=Path, default=shared / "data/cifar10.tar.gz", help="a folder or .tar.gz")
    parser.add_argument("--teacher", type=Path, default=shared / "teachers/cifar10_vit.safetensors")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs/bench-probe", help="what is done there is not done again"
    )
    parser.add_argument("--modules", nargs="+", default=BLOCK_MODULES, choices=BLOCK_MODULES)
    parser.add_argument("--blocks", type=int, nargs="+", help="all by default")
    parser.add_argument("--no-memory", action="store_true", help="leave out the second probe, on 49,000 images")
    parser.add_argument("--embedded", action="store_true", help="1,000 images of the embedded data set, no other files")
    parser.add_argument("--json", action="store_true", help="print a JSON object in place of the tables")
    args = parser.parse_args()
    args.blocks = args.blocks or range(5 if args.embedded else 6)
    for path in () if args.embedded else (args.images, args.teacher):
        if not path.exists():
            parser.error(f"{path}: no such file")
    args.out, args.teacher = args.out.resolve(), args.teacher.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    files = {} if args.embedded else prepare(args.images.resolve(), args.out)
    sizes = (1_000,) if args.embedded else (10_000,) if args.no_memory else (10_000, 49_000)
    peaks = {images: probe(argv_of(args, files, images)) for images in sizes}

    settings = parse(argv_of(args, files, sizes[0]))
    plan = make_plan(settings, StageFolder(settings))
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    mine, other, rows, apart = 0.0, 0.0, [], 0.0
    for block in args.blocks:
        seconds, top1 = ours(plan, block, settings.probe, args.out / "probes")
        their_seconds, their_top1 = theirs(plan, block)
        mine, other = mine + seconds, other + sum(their_seconds.values())
        print(f"block {block}: {seconds:.2f} s, scikit-learn {sum(their_seconds.values()):.2f} s", flush=True)
        for tap, value in top1.items():
            apart = max(apart, abs(value - their_top1[tap]))
            rows.append([tap, f"{value:.2f}", f"{their_top1[tap]:.2f}", f"{value - their_top1[tap]:+.2f}"])
    if args.json:
        said = [
            claim(f"probes of {len(rows)} modules, time over scikit-learn's", mine, 1.0, "s", peer=other),
            claim("the same, largest difference in top-1", apart, None, "points"),
        ]
        print(json.dumps({"rows": said}))
        return
    print(f"\n{markdown(['module', 'top-1, ours', 'scikit-learn', 'difference'], rows)}")
    print(f"{len(rows)} modules: {mine:.1f} s, scikit-learn {other:.1f} s, ratio {other / mine:.1f}; "
          f"largest difference {apart:.2f} points")  # fmt: skip
    for images, peak in peaks.items():
        print(f"peak memory of the program, {images:,} images to fit on: {peak:,} MiB")


if __name__ == "__main__":
    main()
