"""The sections of a run: what `read` found, as the template takes it. None where there is nothing to show."""

import math
import shlex
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from math import prod
from typing import Any

from trainer.output import charts
from trainer.output.intervals import wilson
from trainer.report.draw import chart, png, tiles
from trainer.report.read import RunRecord, StageRecord, number
from trainer.report.words import Section, bar, cosine, pairs, percent, short
from trainer.stages import STAGES

SHOWN_CLASSES = 40  # above it the worst and the best are shown
MODULES = ("ln1", "mha", "rc1", "ln2", "fc1", "act", "fc2", "rc2")  # of a block, in the order of the forward pass


# --- What was converted from what -----------------------------------------------------------------------------------


def conversion(run: RunRecord) -> Section | None:
    """What was converted from what, in facts and one sentence."""
    stage = next((s for s in reversed(run.begun) if s.export), run.begun[-1] if run.begun else None)
    if stage is None:
        return None
    shapes, export = stage.parameters, stage.export
    blocks = 1 + max(
        (int(n.split(".")[n.split(".").index("blocks") + 1]) for n in shapes if "blocks." in n), default=-1
    )
    linear = (export.get("attention") or {}).get("linear_blocks")
    depth = blocks or stage.get("teacher.kwargs.depth")
    additions = stage.get("student.additions", [])
    kwargs = stage.get("student.operator_kwargs", {})
    operator = "softmax (a baseline)" if stage.is_baseline else stage.get("student.operator", "unknown")
    facts = {
        "Teacher": stage.get("teacher.name"),
        "Its weights": stage.get("teacher.weights") or "from the hub",
        "Operator": operator + (f" ({pairs(kwargs)})" if kwargs else ""),
        "Additions": ", ".join(additions) if additions else None,
    }
    if linear is not None and depth:
        kept = [i for i in range(depth) if i not in linear]
        facts["Linear blocks"] = f"{len(linear)} of {depth}"
        facts["Softmax blocks"] = ", ".join(map(str, kept)) if kept else "none"
    else:
        facts["Softmax blocks"] = short(stage.get("student.keep_softmax", []))
    if shapes:
        backbone = {n.removeprefix("backbone."): shape for n, shape in shapes.items()}
        facts["Parameters"] = f"{sum(map(prod, shapes.values())) / 1e6:.2f} million"
        heads = stage.get("teacher.kwargs.num_heads")
        width = next((shape[0] for n, shape in backbone.items() if n.endswith("attn.proj.weight")), None)
        facts["Width, depth"] = f"{width}, {depth}" + (f", {heads} heads" if heads else "") if width else None
    started = stage.starts[-1] if stage.starts else {}
    size = started.get("image_size") or (export.get("input") or {}).get("image_size")
    if size:
        facts["Image size"] = f"{' x '.join(map(str, size if isinstance(size, list) else (size, size)))} pixels"
    if "tokens" in started:
        prefix = started.get("prefix_tokens")
        facts["Tokens"] = f"{started['tokens']}" + (f", {prefix} of them prefix" if prefix else "")
    for split, words in (("train", "Trained on"), ("val", "Evaluated on")):
        facts[words] = stage.get(f"data.{split}")
    seeds = {s.get("train.seed") for s in run.begun} - {None}
    facts["Seed"] = ", ".join(map(str, sorted(seeds))) if seeds else None
    where = f" in {facts['Linear blocks']} blocks" if "Linear blocks" in facts else ""
    replaced = f"its softmax attention replaced by {stage.get('student.operator')} linear attention{where}"
    sentence = f"{stage.get('teacher.name')}, {'the softmax baseline' if stage.is_baseline else replaced}"
    return {"facts": {k: v for k, v in facts.items() if v}, "sentence": sentence}


# --- Results --------------------------------------------------------------------------------------------------------


def evaluations(run: RunRecord) -> list[Section]:
    """Teacher, copied weights, each stage: their last evaluations."""
    rows: list[Section] = []
    of_teacher = next((s.last or s.first for s in reversed(run.begun) if "teacher_top1" in (s.last or s.first)), None)
    if of_teacher:
        teacher = {
            "top1": number(of_teacher, "teacher_top1"),
            "feature_cosine": 1.0,
            "images": of_teacher.get("images"),
        }
        rows.append(_row("Teacher (softmax)", teacher, "teacher"))
    for stage in run.begun:
        start = stage.first
        own = stage.get("student.parent") in (None, "none")
        if start and not any(row["kind"] == "start" for row in rows) and not stage.segments and not stage.is_baseline:
            rows.append(_row("Weights copied, no training" if own else "Before training", start, "start"))
        if stage.last:
            steps = stage.progress[1]
            at = stage.last["step"]
            whole = stage.complete or at == steps
            name = f"After stage {stage.stage}" if not stage.is_baseline else f"Softmax baseline, stage {stage.stage}"
            rows.append(_row(name if whole else f"Stage {stage.stage} at step {at} of {steps or '?'}", stage.last,
                             "baseline" if stage.is_baseline else "student"))  # fmt: skip
    return rows


def _row(name: str, line: Mapping[str, Any], kind: str) -> Section:
    images, top1 = line.get("images"), number(line, "top1")
    interval = None
    if top1 is not None and isinstance(images, int) and images > 0:
        interval = wilson(min(images, round(top1 * images / 100)), images)
    keys = ("top1", "top5", "feature_cosine", "loss", "miou", "pixel_accuracy", "class_accuracy")
    return {"name": name, "kind": kind, "images": images, "interval": interval, **{k: number(line, k) for k in keys}}


def results(run: RunRecord) -> Section | None:
    """The table of evaluations, with intervals; and the few figures that stand at the top."""
    rows = evaluations(run)
    if not rows:
        return None
    teacher, student = rows[0] if rows[0]["kind"] == "teacher" else None, rows[-1]
    if run.baseline is not None:
        beside = evaluations(run.baseline)[-1:]
        rows += [row | {"name": f"{row['name']} ({run.baseline.name})"} for row in beside if row["kind"] == "baseline"]
    tops = [row["interval"] or (row["top1"],) * 2 for row in rows if row["top1"] is not None]
    low = max(0.0, min((t[0] for t in tops), default=0.0) - 3) // 5 * 5
    for row in rows:
        row["bar"] = bar(row["top1"], row["interval"], low)
    has = [k for k in ("top1", "top5", "feature_cosine", "miou", "pixel_accuracy", "class_accuracy")
           if any(row[k] is not None for row in rows)]  # fmt: skip
    counts = sorted({row["images"] for row in rows if row["images"]})
    datas = {s.get("data.val") for s in run.begun if s.last or s.first}
    cards = []
    if teacher and teacher["top1"] is not None:
        cards.append({"value": percent(teacher["top1"]), "name": "teacher, top-1"})
    for key, name, form in (
        ("top1", "top-1", percent),
        ("miou", "mean IoU", percent),
        ("feature_cosine", "feature cosine", cosine),
    ):
        if student["kind"] != "teacher" and student[key] is not None:
            who = {"student": "student", "baseline": "softmax baseline"}.get(student["kind"], "not trained")
            cards.append({"value": form(student[key]), "name": f"{who}, {name}"})
    if teacher and teacher["top1"] and student["kind"] == "student" and student["top1"] is not None:
        cards.append(
            {"value": f"{100 * student['top1'] / teacher['top1']:.1f} %", "name": "of the teacher's top-1 kept"}
        )
    return {"rows": rows, "has": has, "low": low, "images": counts, "several_data": len(datas) > 1, "cards": cards}


# --- Training -------------------------------------------------------------------------------------------------------


def curve_of(stage: StageRecord, split: str, key: str) -> charts.Curve:
    """Steps and values of a metric."""
    lines = stage.of_split(split)
    return [line["step"] for line in lines], [number(line, key) for line in lines]


def training(run: RunRecord) -> list[Section]:
    """Curves of each stage: loss, rate, speed, scores."""
    made = []
    for stage in run.begun:
        lines = stage.of_split("train")
        if not lines:
            continue
        found = {"training": curve_of(stage, "train", "loss")}
        if not stage.segments and len(stage.of_split("val")) > 1:
            found["evaluation"] = curve_of(stage, "val", "loss")
        pictures = [_chart(run, stage, "Loss", found, log=True)]
        for key, title in (("miou", "Mean IoU (%)"), ("top1", "Top-1 (%)"), ("feature_cosine", "Feature cosine")):
            scores = curve_of(stage, "val", key)
            if sum(value is not None for value in scores[1]) > 2:
                pictures.append(_chart(run, stage, title, {"": scores}, zero=False))
        for key, title in (("lr", "Learning rate"), ("images_per_second", "Images per second")):
            pictures.append(_chart(run, stage, title, {"": curve_of(stage, "train", key)}))
        speeds = [v for v in (number(line, "images_per_second") for line in lines) if v is not None]
        waits = {
            k: [v for v in (number(line, k) for line in lines) if v is not None] for k in ("data_wait", "save_wait")
        }
        said = [f"median {statistics.median(speeds):,.0f} images/s"] if speeds else []
        said += [f"{statistics.fmean(values):.0%} of the time waiting for {what}" for values, what in
                 ((waits["data_wait"], "images"), (waits["save_wait"], "checkpoints")) if values]  # fmt: skip
        if shares := [v for v in (number(line, "mfu") for line in lines) if v is not None]:
            said.append(f"MFU {statistics.median(shares):.0%}")
        if (seconds := _seconds(stage)) is not None:
            said.append(f"{timedelta(seconds=round(seconds))} from the first start to the last line")
        made.append({"title": f"Stage {stage.stage}, {stage.title}", "charts": pictures, "said": "; ".join(said)})
    return made


def _chart(run: RunRecord, stage: StageRecord, title: str, found: Mapping[str, charts.Curve], **how: bool) -> Any:
    draw = partial(charts.curves, title=title, found=found, **how)
    return chart(f"{title} of stage {stage.stage}, run {run.name}", draw)


def _seconds(stage: StageRecord) -> float | None:
    times = [t for t in (number(line, "time") for line in (*stage.starts, *stage.lines)) if t is not None]
    return max(times) - min(times) if len(times) > 1 else None


# --- Where error is made --------------------------------------------------------------------------------------------


def errors(run: RunRecord) -> Section | None:
    """The alignment error of each block, and the entropy of the teacher's attention."""
    one, two = run.stages[0], run.stages[1]
    line = one.last or one.first
    found = {
        "teacher-forced": charts.by_block(line, "error_teacher_forced"),
        "free-running": charts.by_block(line, "error_free_running"),
        "same, after stage 2": charts.by_block(two.last, "error_free_running"),
    }
    found = {name: values for name, values in found.items() if values}
    if not found:
        return None
    nats = charts.by_block(line, "teacher_entropy")
    width = charts.width_of(max(len(values) for values in found.values()))
    pictures = [chart(f"Error by block, {run.name}", partial(charts.block_errors, found=found), width=width)]
    if nats:
        pictures.append(chart(f"Entropy by block, {run.name}", partial(charts.entropy, found=nats), width=width))
    when = "after stage 1" if one.last and one.complete else f"at step {line.get('step')} of stage 1"
    return {"charts": pictures, "width": width, "entropy": bool(nats), "when": when if line else "after stage 2"}


def ranking(run: RunRecord) -> Section | None:
    """Which blocks keep softmax attention, and why."""
    found = next((stage.blocks for stage in run.stages if stage.blocks), None)
    if not found:
        return None
    width = charts.width_of(len(found["alone"]))
    both = (charts.damage_alone, charts.damage_in_order)
    pictures = [chart(f"{f.__name__}, {run.name}", partial(f, found=found), width=width) for f in both]
    return {"charts": pictures, "width": width, "softmax": ", ".join(map(str, found["softmax"]))}


def features(run: RunRecord) -> Section | None:
    """Patch features as colours, teacher beside student."""
    for stage in reversed(run.stages):
        picture = stage.pictures().get("features")
        if picture is None:
            continue
        if not stage.features:
            return {"whole": png(picture), "rows": [], "stage": stage.stage}
        rows = []
        for row in stage.features:
            names = [name for name in ("image", "teacher", "student") if name in row["tiles"]]
            cut = tiles(picture, [row["tiles"][name] for name in names])
            told = [(n, row[n]) for n in ("teacher", "student") if isinstance(row.get(n), dict)]
            same = len(told) < 2 or told[0][1]["class"] == told[1][1]["class"]
            rows.append({"tiles": list(zip(names, cut, strict=True)), "label": row["label"], "index": row["index"],
                         "cosine": row["cosine"], "told": told, "same": same})  # fmt: skip
        return {"whole": None, "rows": rows, "stage": stage.stage}
    return None


# --- Probes, masks, classes, speed ----------------------------------------------------------------------------------


def probe(run: RunRecord) -> Section | None:
    """Heat maps of the linear probes, a panel per model and one of their difference."""
    rows = run.probe.get("results")
    if not rows:
        return None
    best: dict[tuple[str, Any, str], tuple[float, str]] = {}  # the pooling that is best on the validation images
    for row in rows:
        key = row["model"], row["block"], row["module"]
        if row["data"] == "validation" and (key not in best or row["top1"] > best[key][0]):
            best[key] = row["top1"], row["pooling"]
    maps = []
    for data in dict.fromkeys(row["data"] for row in rows if row["data"] != "validation"):
        cells: dict[str, dict[tuple[Any, str], Section]] = {}
        for row in rows:
            key = row["model"], row["block"], row["module"]
            if row["data"] == data and best.get(key, (0, row["pooling"]))[1] == row["pooling"]:
                cells.setdefault(row["model"], {})[row["block"], row["module"]] = row
        values = [row["top1"] for found in cells.values() for row in found.values()]
        low, high = min(values), max(values)
        panels = [
            _heat(model, {k: (r["top1"], (r["top1"] - low) / ((high - low) or 1), f"{r['low']:.1f} to {r['high']:.1f}")
                          for k, r in found.items()}, "heat")
            for model, found in cells.items()
        ]  # fmt: skip
        if {"teacher", "student"} <= cells.keys():
            pairs = {
                k: r["top1"] - cells["teacher"][k]["top1"] for k, r in cells["student"].items() if k in cells["teacher"]
            }
            most = max([1.0, *map(abs, pairs.values())])
            panels.append(_heat("student minus teacher", {k: (v, v / most, "") for k, v in pairs.items()}, "differs"))
        maps.append({"data": data, "panels": panels})
    return {"maps": maps, "advice": [str(line) for line in run.probe.get("advice", [])],
            "intervals": run.probe.get("intervals", "")}  # fmt: skip


def _heat(title: str, cells: Mapping[tuple[Any, str], tuple[float, float, str]], kind: str) -> Section:
    """A table of blocks x modules; a cell has its value, where it lies on the scale, and its interval."""
    modules = [m for m in MODULES if any(module == m for block, module in cells if block is not None)]
    modules += sorted({m for b, m in cells if b is not None} - set(modules))
    blocks = sorted({block for block, _ in cells if block is not None}, reverse=True)
    rows = [(f"block {b}", [cells.get((b, m)) for m in modules]) for b in blocks]
    others = [(m, value) for (b, m), value in cells.items() if b is None]
    return {"title": title, "kind": kind, "modules": modules, "rows": rows, "others": others}


def masks(run: RunRecord) -> Section | None:
    """Segmentation: overlap by class, and pictures."""
    stage = run.stages[2]
    if not stage.segments:
        return None
    pictures = {name: png(path) for name, path in stage.pictures().items() if name in ("worst", "first")}
    rows = [(name, number(about, "iou"), about.get("pixels"), bar(number(about, "iou"), None, 0.0))
            for name, about in stage.classes.items()]  # fmt: skip
    rows.sort(key=lambda row: (row[1] is None, row[1] or 0.0))
    return {"pictures": pictures, "rows": rows} if pictures or rows else None


def classes(run: RunRecord) -> Section | None:
    """Accuracy by class."""
    stage = next((s for s in reversed(run.stages) if s.classes and not s.segments), None)
    if stage is None:
        return None
    rows = []
    for name, about in stage.classes.items():
        images, top1 = about["images"], number(about, "top1")
        if top1 is None:
            continue
        interval = wilson(min(images, round(top1 * images / 100)), images)
        teacher = number(about, "teacher_top1")
        rows.append({"name": name, "images": images, "top1": top1, "interval": interval, "teacher": teacher,
                     "bar": bar(top1, interval, 0.0)})  # fmt: skip
    rows.sort(key=lambda row: row["top1"])
    hidden = 0
    if len(rows) > SHOWN_CLASSES:
        hidden = len(rows) - SHOWN_CLASSES
        rows = rows[: 3 * SHOWN_CLASSES // 4] + rows[-SHOWN_CLASSES // 4 :]
    has_teacher = any(row["teacher"] is not None for row in rows)
    return {"rows": rows, "hidden": hidden, "when": _when(stage), "teacher": has_teacher} if rows else None


def _when(stage: StageRecord) -> str:
    at = max((line["step"] for line in stage.of_split("val")), default=None)
    return f"after stage {stage.stage}" if stage.complete or at is None else f"at step {at} of stage {stage.stage}"


SPEEDS = {
    "throughput": "Images per second",
    "latency": "Latency of one image (ms)",
    "FLOPs": "GFLOPs per image",
    "memory": "Memory of a call (MiB)",
}


def verdict(run: RunRecord) -> Section | None:
    """What the stage `evaluate` found, but for speed: a line per figure, a column per model."""
    lines: dict[tuple[str, str], dict[str, Section]] = {}
    for row in run.evaluation.get("results", []):
        if row["measure"] not in SPEEDS:
            more = ", ".join(str(row[key]) for key in ("pooling", "of") if key in row)
            lines.setdefault((row["measure"], more), {})[row["model"]] = row
    if not lines:
        return None
    models = list(dict.fromkeys(model for found in lines.values() for model in found))
    rows = []
    for (measure, more), found in lines.items():
        images = sorted({row["images"] for row in found.values() if "images" in row})
        cells = [_cell(found.get(model)) for model in models]
        rows.append({"name": measure, "more": more, "cells": cells, "images": ", ".join(f"{n:,}" for n in images)})
    return {"models": models, "rows": rows, "intervals": run.evaluation.get("intervals", "")}


def _cell(row: Mapping[str, Any] | None) -> Section | None:
    """A figure of `evaluate`, its interval, and its difference to another model's."""
    if row is None:
        return None

    def words(value: float) -> str:
        return f"{value:.1f}" if row.get("unit") == "%" else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"

    return {
        "value": words(row["value"]) + (" %" if row.get("unit") == "%" else ""),
        "interval": f"{words(row['low'])} to {words(row['high'])}" if "low" in row else "",
        "gain": f"{row['difference']:+.1f} ± {row['half']:.1f} to {row['to']}" if "to" in row else "",
    }


def speed(run: RunRecord) -> Section | None:
    """Speed by resolution: charts where there are several sizes, and a table."""
    found = [row for row in run.evaluation.get("results", []) if row["measure"] in SPEEDS]
    sizes = {_pair(row["size"]): math.sqrt(prod(_pair(row["size"]))) for row in found}
    models = list(dict.fromkeys(row["model"] for row in found))
    at = {(row["measure"], row["model"], _pair(row["size"])): row for row in found}
    pictures, rows = [], []
    for measure, title in SPEEDS.items():
        lines = {}
        for model in models:
            points = [(sizes[k], at[measure, model, k]["value"]) for k in sorted(sizes) if (measure, model, k) in at]
            if len(points) > 1:
                lines[model] = tuple(zip(*points, strict=True))
        if lines:
            draw = partial(charts.curves, title=title, found=lines, log=True, x="side of the image, pixels")
            pictures.append(chart(f"{title} by resolution, {run.name}", draw))
        for size in sorted(sizes):
            cells = [at.get((measure, model, size)) for model in models]
            if any(cells):
                batch = next(cell.get("batch_size") for cell in cells if cell)
                of = f"batch {batch}" if measure in ("throughput", "memory") else ""
                shown = [_cell(cell) for cell in cells]
                rows.append({"name": title, "size": " x ".join(map(str, size)), "of": of, "cells": shown})
    device = " ".join(str(run.evaluation[key]) for key in ("device", "dtype") if key in run.evaluation)
    return {"charts": pictures, "models": models, "rows": rows, "device": device or "a device"} if rows else None


def _pair(size: int | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


# --- How it went, and again -----------------------------------------------------------------------------------------


def robustness(run: RunRecord) -> Section | None:
    """When each stage was started, at which step; warnings."""
    stages = []
    for stage in run.begun:
        starts = [
            {
                "when": time.strftime("%Y-%m-%d %H:%M", time.localtime(start["time"])),
                "step": start["step"],
                "ranks": start.get("ranks", "?"),
                "device": start.get("device", "?"),
                "versions": pairs(start.get("versions") or {}),
            }
            for start in stage.starts
        ]
        skipped = sum(
            number(line, "grad_norm") is None or number(line, "loss") is None for line in stage.of_split("train")
        )
        warnings = [f"step {line['step']}: {line.get('message')}" for line in stage.of_split("warning")]
        stages.append({"title": f"Stage {stage.stage}", "starts": starts, "skipped": skipped, "warnings": warnings})
    restarts = sum(max(0, len(stage["starts"]) - 1) for stage in stages)
    known = all(stage["starts"] for stage in stages)
    return {"stages": stages, "restarts": restarts, "known": known} if stages else None


def commands(run: RunRecord) -> list[str]:
    """What makes the run again."""
    again = f"{run.path}-again"
    found = []
    for stage in run.begun:
        if stage.settings:
            ranks = stage.starts[-1].get("ranks", 1) if stage.starts else 1
            start = ["deepspeed", *(["--num_gpus", str(ranks)] if ranks != 1 else []), "trainer/run.py"]
            options = ["--stage", stage.stage, "--config", str(stage.path / "config.yaml"), "--run", again]
            found.append(shlex.join([*start, *options]))
    if run.probe:
        found.append(shlex.join(["deepspeed", "trainer/run.py", "--stage", "probe", "--run", again]))
    return found


def missing(run: RunRecord) -> list[Section]:
    """What a whole report would have beside, and the command that makes it."""
    found: list[Section] = []

    def lacks(what: str, *options: str) -> None:
        how = shlex.join(["deepspeed", "trainer/run.py", *options, "--run", str(run.path)]) if options else None
        found.append({"what": what, "how": how})

    for stage in run.stages:
        step, steps = stage.progress
        if stage.state == "missing" and not (stage.stage != "3" and run.stages[2].is_baseline):
            lacks(f"Stage {stage.stage}, {stage.title}, has not run.", "--stage", stage.stage)
        elif stage.state == "unfinished":
            of = f" of {steps}" if steps else ""
            lacks(
                f"Stage {stage.stage} is not finished: step {step}{of}. The same command goes on.",
                "--stage",
                stage.stage,
            )
        if stage.begun and not stage.of_split("val"):
            lacks(f"Stage {stage.stage} has no evaluation: no --data.val, or it has not come so far.")
    if run.begun and not run.probe:
        lacks("There are no linear probes.", "--stage", "probe")
    if run.begun and not run.evaluation and "evaluate" in STAGES:
        lacks("There is no verdict: no speed by resolution, no k-NN.", "--stage", "evaluate")
    return found


SECTIONS: dict[str, Callable[[RunRecord], Any]] = {
    section.__name__: section
    for section in (
        conversion, results, training, errors, ranking, features, probe, masks, classes, verdict, speed, robustness,
        commands,
    )
}  # fmt: skip
