"""The results of the probes: results.json and .csv, a table, pictures, and advice.

Intervals are 95 %. An accuracy has Wilson's interval. A difference on the same images has the normal interval of the
paired differences. The validation images alone choose penalty, pooling and module.
"""

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from models import BLOCK_MODULES
from trainer.output.intervals import Z, wilson
from trainer.output.paths import write_aside
from trainer.probe.fit import Fit

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

COLUMNS = ("model", "block", "module", "pooling", "penalty", "data", "images", "top1", "low", "high")
LABELS = {name: name.upper() if name != "act" else "Act" for name in BLOCK_MODULES}


def report(folder: Path, fits: list[Fit], record: dict[str, Any]) -> str:
    """Write results.csv, the pictures and, last, results.json. Returns the text for the screen.

    Args:
        fits: in the order of the forward pass, model by model.
        record: plan.json, which says what was probed.
    """
    rows = [row for fit in fits for row in rows_of(fit)]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    (folder / "results.csv").write_text(text.getvalue())

    chosen = by_module(fits)
    tests = [name for name in fits[0].right if name != "validation"]
    advice = [line for model in record["models"] for line in advise(model, fits, tests)]
    if len(record["models"]) == 2:
        advice += compare(chosen, tests)
    pictures = {f"heatmap_{name}": draw_heat_maps(chosen, name) for name in tests}
    pictures["depth"] = draw_depth(chosen, tests)
    for name, figure in pictures.items():
        figure.savefig(folder / f"{name}.png", dpi=110)
        plt.close(figure)
    tables = "\n".join(table(chosen, model, name) for name in tests for model in record["models"])
    results = {"advice": advice, "intervals": "95 %: Wilson; differences: paired, normal", **record, "results": rows}
    write_aside(folder / "results.json", json.dumps(results, indent=1) + "\n")
    return f"{tables}\n" + "\n".join(advice) + f"\nprobe is done: {folder}/results.json, .csv and pictures"


def rows_of(fit: Fit) -> list[dict[str, Any]]:
    """One row per penalty on the validation images, and one per test set at the penalty that they chose."""
    block, module = place(fit.vector.tap)
    images = len(fit.right["validation"])
    found = [("validation", penalty, hits, images) for penalty, hits in fit.validation.items()]
    tests = (name for name in fit.right if name != "validation")
    found += [(name, fit.penalty, int(fit.right[name].sum()), len(fit.right[name])) for name in tests]
    what = {"model": fit.vector.model, "block": block, "module": module, "pooling": fit.vector.pooling}
    return [
        what | {"penalty": penalty, "data": name, "images": images, "top1": 100 * hits / images}
        | dict(zip(("low", "high"), wilson(hits, images), strict=True))
        for name, penalty, hits, images in found
    ]  # fmt: skip


def place(tap: str) -> tuple[int | None, str]:
    """`blocks.3.act` -> (3, "act"); `norm` -> (None, "norm")."""
    match = re.fullmatch(r"blocks\.(\d+)\.(\w+)", tap)
    return (int(match[1]), match[2]) if match else (None, tap)


def paired(right: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Difference of two accuracies on the same images, and half its 95 % interval; percent points."""
    difference = right.astype(float) - other
    return 100 * difference.mean(), 100 * Z * difference.std() / math.sqrt(len(difference))


def by_module(fits: list[Fit]) -> dict[tuple[str, str], Fit]:
    """(model, tap) -> the fit of the pooling that is best on the validation images. Among equals the first wins."""
    best: dict[tuple[str, str], Fit] = {}
    for fit in fits:
        key = fit.vector.model, fit.vector.tap
        if key not in best or on_validation(fit) > on_validation(best[key]):
            best[key] = fit
    return best


def on_validation(fit: Fit) -> int:
    """Number of validation images that get their class."""
    return int(fit.right["validation"].sum())


def advise(model: str, fits: list[Fit], tests: list[str]) -> list[str]:
    """Which module to probe instead of the last layer, by the validation images, and the gain on each test set."""
    own = [fit for fit in fits if fit.vector.model == model]
    best = max(own, key=on_validation)
    last = max((fit for fit in own if fit.vector.tap == own[-1].vector.tap), key=on_validation)
    parts = []
    for name in tests:
        gain, half = paired(best.right[name], last.right[name])
        parts.append(f"{gain:+.1f} +- {half:.1f} on {name} ({100 * best.right[name].mean():.1f})")
    return [f"{model}: probe {words(best)}; over the last layer, {words(last)}: {', '.join(parts)}"]


def compare(chosen: dict[tuple[str, str], Fit], tests: list[str]) -> list[str]:
    """The module at which the student loses most, by the validation images, and the loss on each test set."""
    taps = [tap for model, tap in chosen if model == "student" and ("teacher", tap) in chosen]
    loss = {tap: on_validation(chosen["student", tap]) - on_validation(chosen["teacher", tap]) for tap in taps}
    worst = min(taps, key=loss.__getitem__)
    parts = []
    for name in tests:
        gain, half = paired(*(chosen[model, worst].right[name] for model in ("student", "teacher")))
        mean = np.mean([100 * (chosen["student", t].right[name].mean() - chosen["teacher", t].right[name].mean())
                        for t in taps])  # fmt: skip
        parts.append(f"{gain:+.1f} +- {half:.1f} on {name} (mean over modules {mean:+.1f})")
    return [f"student - teacher: loses most at {title(worst)}: {', '.join(parts)}"]


def title(tap: str) -> str:
    """`blocks.3.act` -> "Act of block 3" (blocks count from 0)."""
    block, module = place(tap)
    return module if block is None else f"{LABELS.get(module, module)} of block {block}"


def words(fit: Fit) -> str:
    """A fit by its place and pooling."""
    return f"{title(fit.vector.tap)} ({fit.vector.pooling})"


def grid(chosen: dict[tuple[str, str], Fit], model: str, name: str) -> tuple[np.ndarray, list[str]]:
    """Top-1 in percent, [blocks, modules], NaN where there is no probe; and the names of the modules."""
    cells = {place(tap): fit for (m, tap), fit in chosen.items() if m == model}
    blocks = 1 + max((block for block, _ in cells if block is not None), default=-1)
    modules = [module for module in BLOCK_MODULES if any(m == module for b, m in cells if b is not None)]
    values = np.full((blocks, len(modules)), np.nan)
    for (block, module), fit in cells.items():
        if block is not None and module in modules:
            values[block, modules.index(module)] = 100 * fit.right[name].mean()
    return values, modules


def table(chosen: dict[tuple[str, str], Fit], model: str, name: str) -> str:
    """Top-1 per block and module, for the screen."""
    values, modules = grid(chosen, model, name)
    lines = [f"{model}, top-1 on {name} (%)", "block  " + "".join(f"{LABELS[m]:>7}" for m in modules)]
    lines += [f"{i:>5}  " + "".join(f"{v:7.1f}" for v in row) for i, row in enumerate(values)]
    for (m, tap), fit in chosen.items():
        if m == model and place(tap)[0] is None:
            lines.append(f"{tap}: {100 * fit.right[name].mean():.1f}")
    return "\n".join(lines) + "\n"


def draw_heat_maps(chosen: dict[tuple[str, str], Fit], name: str) -> Figure:
    """Block x module for each model, and student minus teacher."""
    models = list(dict.fromkeys(model for model, _ in chosen))
    maps = {model: grid(chosen, model, name) for model in models}
    values = np.concatenate([v.ravel() for v, _ in maps.values()])
    panels = [(model, *maps[model], "viridis", np.nanmin(values), np.nanmax(values)) for model in models]
    if len(models) == 2:
        difference = maps["student"][0] - maps["teacher"][0]
        most = max(1.0, float(np.nanmax(np.abs(difference))))
        panels.append(("student - teacher", difference, maps["teacher"][1], "RdBu", -most, most))
    blocks, modules = panels[0][1].shape
    size = (len(panels) * (0.62 * modules + 1.2), 0.42 * blocks + 1.5)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axis, (label, cells, names, colours, low, high) in zip(axes[0], panels, strict=True):
        image = axis.imshow(cells, cmap=colours, vmin=low, vmax=high, aspect="auto", origin="lower")
        axis.set_xticks(range(len(names)), [LABELS[m] for m in names])
        axis.set_yticks(range(blocks))
        axis.set_title(label)
        axis.set_ylabel("block")
        for (block, module), value in np.ndenumerate(cells):
            if not np.isnan(value):
                shade = image.norm(value)
                dark = shade < 0.5 if colours == "viridis" else abs(shade - 0.5) > 0.35
                sign = "+" if colours == "RdBu" and value > 0 else ""
                axis.text(module, block, f"{sign}{value:.1f}", ha="center", va="center", fontsize=8,
                          color="white" if dark else "black")  # fmt: skip
    figure.suptitle(f"top-1 of linear probes on {name} (%)")
    return figure


def draw_depth(chosen: dict[tuple[str, str], Fit], tests: list[str]) -> Figure:
    """Accuracy over depth: a line per module, a row per model, a column per test set."""
    models = list(dict.fromkeys(model for model, _ in chosen))
    size = (4.2 * len(tests) + 1.2, 3.4 * len(models))
    figure, axes = plt.subplots(
        len(models), len(tests), figsize=size, layout="constrained", squeeze=False, sharex=True, sharey="col"
    )
    colours = dict(zip(BLOCK_MODULES, plt.get_cmap("tab10").colors, strict=False))
    for i, model in enumerate(models):
        for j, name in enumerate(tests):
            axis, (values, modules) = axes[i][j], grid(chosen, model, name)
            for module, column in zip(modules, values.T, strict=True):
                act = {"linewidth": 2.5, "zorder": 3} if module == "act" else {"linewidth": 1.2}
                axis.plot(column, marker="o", markersize=3, color=colours[module], label=LABELS[module], **act)
            if (model, "norm") in chosen:
                last = 100 * chosen[model, "norm"].right[name].mean()
                axis.axhline(last, color="black", linestyle="--", linewidth=1, label="final norm")
            axis.set_title(f"{model}, {name}")
            axis.set_xticks(range(len(values)))
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("top-1 (%)")
    for axis in axes[-1]:
        axis.set_xlabel("block")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    return figure
