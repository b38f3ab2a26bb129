"""The embedded default through all three stages, and what each one bought: `make demo`.

Two chains run side by side, each on half of the cores: stage 2 without stage 1; and stages 1, 2 and 3. The table and
its picture go to `runs/demo/table.md` and `table.png`. What is done already is not run again; remove the folder first.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import matplotlib
import torch

import models
from benchmarks.common import ROOT, markdown, run_stage
from trainer.config import parse

matplotlib.use("Agg")
from matplotlib import pyplot as plt

OUT = ROOT / "runs/demo"
COLUMNS = ["", "top-1 (%)", "feature cosine", "images/s"]


def images_per_second(
    vits: dict[str, torch.nn.Module], size: int, batch: int = 32, rounds: int = 15
) -> dict[str, float]:
    """Medians over interleaved forward passes in fp32 on the CPU."""
    images = torch.randn(batch, 3, size, size)
    seconds: dict[str, list[float]] = {name: [] for name in vits}
    with torch.inference_mode():
        for i in range(rounds + 2):
            for name, vit in vits.items():
                began = time.perf_counter()
                vit(images)
                if i >= 2:  # warm
                    seconds[name].append(time.perf_counter() - began)
    return {name: batch / median(times) for name, times in seconds.items()}


def draw(rows: list[list[str]], path) -> None:
    """The table's top-1 and cosine as bars."""
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


def main() -> None:
    """Run what is not done yet, then print and plot the table."""
    began = time.monotonic()
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(run_stage, OUT / "stage-2-alone", 2, [], threads)
        (copied, one), (_, two), (_, three) = (run_stage(OUT / "all", stage, [], threads) for stage in (1, 2, 3))
        alone = beside.result()[-1]

    settings = parse(["--stage", "2"])
    size = settings.data.image_size
    teacher = models.build_backbone(
        settings.teacher.name, settings.teacher.kwargs, settings.teacher.weights, image_size=size
    )
    speed = images_per_second({"softmax": teacher, "linear": models.load(OUT / "all/stage3/export")}, size)
    results = {
        "teacher (softmax)": ({"top1": copied["teacher_top1"], "feature_cosine": 1.0}, "softmax"),
        "weights copied, no training": (copied, "linear"),
        "after stage 1": (one, "linear"),
        "after stage 2 without stage 1": (alone, "linear"),
        "after stages 1 and 2": (two, "linear"),
        "after stages 1, 2 and 3": (three, "linear"),
    }
    rows = [
        [name, f"{line['top1']:.2f}", f"{line['feature_cosine']:.3f}", f"{speed[kind]:.0f}"]
        for name, (line, kind) in results.items()
    ]
    table = markdown(COLUMNS, rows)
    (OUT / "table.md").write_text(table)
    draw(rows, OUT / "table.png")
    tokens = teacher.patch_embed.num_patches + teacher.num_prefix_tokens
    print(f"\n{table}\nimages/s: forward, fp32, this CPU, {tokens} tokens an image; linear / softmax = "
          f"{speed['linear'] / speed['softmax']:.2f}. It pays off where images are larger.")  # fmt: skip
    print(f"table and picture: {OUT.relative_to(ROOT)}/table.md, table.png; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
