"""The page: what `read` found, put into sections, and written through the template. Nothing here imports torch."""

import shlex
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from trainer.config import UserError, flatten, free_settings
from trainer.output import charts
from trainer.output.intervals import wilson
from trainer.output.paths import write_aside
from trainer.report.draw import chart, png, tiles
from trainer.report.read import RunRecord, StageRecord, number

SHOWN_CLASSES = 40  # above it the worst and the best are shown
MODULES = ("ln1", "mha", "rc1", "ln2", "fc1", "act", "fc2", "rc2")  # of a block, in the order of the forward pass
Section = dict[str, Any]


def report(runs: Sequence[Path], out: Path) -> Path:
    """Write the page of `runs` to `out`; several are compared.

    Raises:
        UserError: a run folder is not there or has no stage in it, or the page cannot be written.
    """
    names = _names(runs)
    records = [RunRecord(path, name) for path, name in zip(runs, names, strict=True)]
    for record in records:
        if not record.path.is_dir():
            raise UserError(f"{record.path}: no such run folder; give the folder that --run named")
        if not record.begun and not record.probe and not record.evaluation:
            raise UserError(f"{record.path}: holds no stage of a run; give the folder that --run named")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"percent": _percent, "short": _short}
    content = {
        "runs": [_run(record) for record in records],
        "comparison": _comparison(records) if len(records) > 1 else None,
        "written": time.strftime("%Y-%m-%d %H:%M"),
    }
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_aside(out, environment.get_template("page.html").render(content))
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({(error.strerror or str(error)).lower()}); use --out") from error
    return out


def _names(runs: Sequence[Path]) -> list[str]:
    """Short names, all different: the folder's, with its parent's where two are alike."""
    whole = [path.resolve() for path in runs]
    for parts in range(1, 9):
        names = ["/".join(path.parts[-parts:]) for path in whole]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({i})" for i, path in enumerate(whole, 1)]


def _run(run: RunRecord) -> Section:
    """All sections of a run; one that cannot be made of what is there says so."""
    made: Section = {"name": run.name, "path": str(run.path), "stages": [_pill(stage) for stage in run.stages]}
    failed = []
    parts: dict[str, Callable[[RunRecord], Any]] = {
        "conversion": _conversion, "results": _results, "training": _training, "errors": _errors,
        "ranking": _ranking, "features": _features, "probe": _probe, "masks": _masks, "classes": _classes,
        "speed": _speed, "robustness": _robustness, "commands": _commands,
    }  # fmt: skip
    for name, make in parts.items():
        try:
            made[name] = make(run)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OSError) as error:
            made[name] = None
            failed.append(f"{run.path}: the section {name!r} cannot be made of it ({type(error).__name__}: {error})")
    made["missing"] = [*_missing(run), *({"what": line} for line in (*run.problems, *failed))]
    return made


def _pill(stage: StageRecord) -> Section:
    step, steps = stage.progress
    at = f"step {step} of {steps}" if steps else f"step {step}"
    return {"number": stage.stage, "title": stage.title, "state": stage.state, "at": at}


# --- What was converted from what -----------------------------------------------------------------------------------


def _conversion(run: RunRecord) -> Section | None:
    stage = next((s for s in reversed(run.begun) if s.export), run.begun[-1] if run.begun else None)
    if stage is None:
        return None
    shapes, export = stage.parameters, stage.export
    blocks = 1 + max((int(n.split(".")[n.split(".").index("blocks") + 1]) for n in shapes if "blocks." in n), default=-1)
    linear = (export.get("attention") or {}).get("linear_blocks")
    depth = blocks or stage.get("teacher.kwargs.depth")
    additions = stage.get("student.additions", [])
    kwargs = stage.get("student.operator_kwargs", {})
    operator = "softmax (a baseline)" if stage.is_baseline else stage.get("student.operator", "unknown")
    facts = {
        "Teacher": stage.get("teacher.name"),
        "Its weights": stage.get("teacher.weights") or "from the hub",
        "Operator": operator + (f" ({_pairs(kwargs)})" if kwargs else ""),
        "Additions": ", ".join(additions) if additions else None,
    }
    if linear is not None and depth:
        kept = [i for i in range(depth) if i not in linear]
        facts["Linear blocks"] = f"{len(linear)} of {depth}"
        facts["Softmax blocks"] = ", ".join(map(str, kept)) if kept else "none"
    else:
        facts["Softmax blocks"] = _short(stage.get("student.keep_softmax", []))
    if shapes:
        backbone = {n.removeprefix("backbone."): shape for n, shape in shapes.items()}
        facts["Parameters"] = f"{sum(map(prod, shapes.values())) / 1e6:.2f} million"
        heads = stage.get("teacher.kwargs.num_heads")
        width = next((shape[0] for n, shape in backbone.items() if n.endswith("attn.proj.weight")), None)
        facts["Width, depth"] = f"{width}, {depth}" + (f", {heads} heads" if heads else "") if width else None
    started = stage.starts[-1] if stage.starts else {}
    facts["Images"] = started.get("images")
    for split, words in (("train", "Trained on"), ("val", "Evaluated on")):
        facts[words] = stage.get(f"data.{split}")
    seeds = {s.get("train.seed") for s in run.begun} - {None}
    facts["Seed"] = ", ".join(map(str, sorted(seeds))) if seeds else None
    what = "evaluated as the softmax baseline" if stage.is_baseline else f"converted to {stage.get('student.operator')}"
    return {"facts": {k: v for k, v in facts.items() if v}, "sentence": f"{stage.get('teacher.name')}, {what}"}


# --- Results --------------------------------------------------------------------------------------------------------


def _rows(run: RunRecord) -> list[Section]:
    """Teacher, copied weights, each stage: their last evaluations."""
    rows: list[Section] = []
    of_teacher = next((s.last or s.first for s in reversed(run.begun) if "teacher_top1" in (s.last or s.first)), None)
    if of_teacher:
        teacher = {"top1": number(of_teacher, "teacher_top1"), "feature_cosine": 1.0, "images": of_teacher.get("images")}
        rows.append(_row("Teacher (softmax)", teacher, "teacher"))
    for stage in run.begun:
        start = stage.first
        own = stage.get("student.parent") in (None, "none")
        if start and not any(row["kind"] == "start" for row in rows) and not stage.segments and not stage.is_baseline:
            rows.append(_row("Weights copied, no training" if own else "Before training", start, "start"))
        if stage.last:
            step, steps = stage.progress
            at = stage.last["step"]
            whole = stage.complete or at == steps
            name = f"After stage {stage.stage}" if not stage.is_baseline else f"Softmax baseline, stage {stage.stage}"
            rows.append(_row(name if whole else f"Stage {stage.stage} at step {at} of {steps or '?'}", stage.last,
                             "teacher" if stage.is_baseline else "student"))  # fmt: skip
    return rows


def _row(name: str, line: Mapping[str, Any], kind: str) -> Section:
    images, top1 = line.get("images"), number(line, "top1")
    interval = None
    if top1 is not None and isinstance(images, int) and images > 0:
        interval = wilson(min(images, round(top1 * images / 100)), images)
    keys = ("top1", "top5", "feature_cosine", "loss", "miou", "pixel_accuracy", "class_accuracy")
    return {"name": name, "kind": kind, "images": images, "interval": interval, **{k: number(line, k) for k in keys}}


def _results(run: RunRecord) -> Section | None:
    rows = _rows(run)
    if not rows:
        return None
    tops = [row["interval"] or (row["top1"],) * 2 for row in rows if row["top1"] is not None]
    low = max(0.0, min((t[0] for t in tops), default=0.0) - 3) // 5 * 5
    for row in rows:
        row["bar"] = _bar(row["top1"], row["interval"], low)
    has = [k for k in ("top1", "top5", "feature_cosine", "miou", "pixel_accuracy", "class_accuracy")
           if any(row[k] is not None for row in rows)]  # fmt: skip
    counts = sorted({row["images"] for row in rows if row["images"]})
    datas = {s.get("data.val") for s in run.begun if s.last or s.first}
    teacher, student = rows[0] if rows[0]["kind"] == "teacher" else None, rows[-1]
    cards = []
    if teacher and teacher["top1"] is not None:
        cards.append({"value": _percent(teacher["top1"]), "name": "teacher, top-1"})
    for key, name, form in (("top1", "top-1", _percent), ("miou", "mean IoU", _percent), ("feature_cosine", "feature cosine", _cosine)):
        if student["kind"] != "teacher" and student[key] is not None:
            cards.append({"value": form(student[key]), "name": f"student, {name}"})
    if teacher and teacher["top1"] and student["kind"] == "student" and student["top1"] is not None:
        cards.append({"value": f"{student['top1'] / teacher['top1']:.1%}", "name": "of the teacher's top-1 kept"})
    return {"rows": rows, "has": has, "low": low, "images": counts, "several_data": len(datas) > 1, "cards": cards}


def _bar(value: float | None, interval: tuple[float, float] | None, low: float) -> Section | None:
    """Where a value and its interval lie between `low` and 100, in percent of the bar."""
    if value is None:
        return None

    def at(x: float) -> float:
        return round(100 * (x - low) / (100 - low), 2)

    ends = interval or (value, value)
    return {"dot": at(value), "left": at(ends[0]), "width": round(at(ends[1]) - at(ends[0]), 2)}


# --- Training -------------------------------------------------------------------------------------------------------


def _curve(stage: StageRecord, split: str, key: str) -> charts.Curve:
    lines = stage.of_split(split)
    return [line["step"] for line in lines], [number(line, key) for line in lines]


def _training(run: RunRecord) -> list[Section]:
    made = []
    for stage in run.begun:
        lines = stage.of_split("train")
        if not lines:
            continue
        found = {"training": _curve(stage, "train", "loss")}
        if not stage.segments and len(stage.of_split("val")) > 1:
            found["evaluation"] = _curve(stage, "val", "loss")
        pictures = [
            _chart(run, stage, "Loss", found, log=True),
            _chart(run, stage, "Learning rate", {"": _curve(stage, "train", "lr")}),
            _chart(run, stage, "Images per second", {"": _curve(stage, "train", "images_per_second")}),
        ]
        scores = {"miou": "Mean IoU (%)"} if stage.segments else {"top1": "Top-1 (%)", "feature_cosine": "Feature cosine"}
        for key, title in scores.items():
            curve = _curve(stage, "val", key)
            if sum(value is not None for value in curve[1]) > 2:
                pictures.append(_chart(run, stage, title, {"": curve}))
        speeds = [v for v in (number(line, "images_per_second") for line in lines) if v is not None]
        waits = {k: [v for v in (number(line, k) for line in lines) if v is not None] for k in ("data_wait", "save_wait")}
        said = [f"median {statistics.median(speeds):,.0f} images/s"] if speeds else []
        said += [f"{statistics.fmean(values):.0%} of the time waiting for {what}" for values, what in
                 ((waits["data_wait"], "images"), (waits["save_wait"], "checkpoints")) if values]  # fmt: skip
        if (seconds := _seconds(stage)) is not None:
            said.append(f"{timedelta(seconds=round(seconds))} from the first start to the last line")
        made.append({"title": f"Stage {stage.stage}, {stage.title}", "charts": pictures, "said": "; ".join(said)})
    return made


def _chart(run: RunRecord, stage: StageRecord, title: str, found: Mapping[str, charts.Curve], log: bool = False) -> Any:
    draw = partial(charts.curves, title=title, found=found, log=log)
    return chart(f"{title} of stage {stage.stage}, run {run.name}", draw)


def _seconds(stage: StageRecord) -> float | None:
    times = [t for t in (number(line, "time") for line in (*stage.starts, *stage.lines)) if t is not None]
    return max(times) - min(times) if len(times) > 1 else None


# --- Where error is made --------------------------------------------------------------------------------------------


def _errors(run: RunRecord) -> Section | None:
    one, two = run.stages[0], run.stages[1]
    line = one.last or one.first
    found = {
        "teacher-forced": charts.by_block(line, "error_teacher_forced"),
        "free-running": charts.by_block(line, "error_free_running"),
        "free-running, after stage 2": charts.by_block(two.last, "error_free_running"),
    }
    found = {name: values for name, values in found.items() if values}
    if not found:
        return None
    nats = charts.by_block(line, "teacher_entropy")
    width = charts.width_of(max(len(values) for values in found.values()))
    pictures = [chart(f"Error by block, {run.name}", partial(charts.block_errors, found=found), width=width)]
    if nats:
        pictures.append(chart(f"Entropy by block, {run.name}", partial(charts.entropy, found=nats), width=width))
    return {"charts": pictures, "entropy": bool(nats), "forced": "teacher-forced" in found}


def _ranking(run: RunRecord) -> Section | None:
    found = next((stage.blocks for stage in run.stages if stage.blocks), None)
    if not found:
        return None
    width = charts.width_of(len(found["alone"]))
    both = (charts.damage_alone, charts.damage_in_order)
    pictures = [chart(f"{f.__name__}, {run.name}", partial(f, found=found), width=width) for f in both]
    return {"charts": pictures, "softmax": ", ".join(map(str, found["softmax"]))}


def _features(run: RunRecord) -> Section | None:
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


def _probe(run: RunRecord) -> Section | None:
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
            pairs = {k: r["top1"] - cells["teacher"][k]["top1"] for k, r in cells["student"].items() if k in cells["teacher"]}
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


def _masks(run: RunRecord) -> Section | None:
    stage = run.stages[2]
    if not stage.segments:
        return None
    pictures = {name: png(path) for name, path in stage.pictures().items() if name in ("worst", "first")}
    rows = [(name, number(about, "iou"), about.get("pixels"), _bar(number(about, "iou"), None, 0.0))
            for name, about in stage.classes.items()]  # fmt: skip
    rows.sort(key=lambda row: (row[1] is None, row[1] or 0.0))
    return {"pictures": pictures, "rows": rows} if pictures or rows else None


def _classes(run: RunRecord) -> Section | None:
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
                     "bar": _bar(top1, interval, 0.0)})  # fmt: skip
    rows.sort(key=lambda row: row["top1"])
    hidden = 0
    if len(rows) > SHOWN_CLASSES:
        hidden = len(rows) - SHOWN_CLASSES
        rows = rows[: 3 * SHOWN_CLASSES // 4] + rows[-SHOWN_CLASSES // 4 :]
    has_teacher = any(row["teacher"] is not None for row in rows)
    return {"rows": rows, "hidden": hidden, "stage": stage.stage, "teacher": has_teacher} if rows else None


def _speed(run: RunRecord) -> Section | None:
    return None


# --- How it went, and again -----------------------------------------------------------------------------------------


def _robustness(run: RunRecord) -> Section | None:
    stages = []
    for stage in run.begun:
        starts = [
            {
                "when": time.strftime("%Y-%m-%d %H:%M", time.localtime(start["time"])),
                "step": start["step"],
                "ranks": start.get("ranks", "?"),
                "device": start.get("device", "?"),
                "versions": _pairs(start.get("versions") or {}),
            }
            for start in stage.starts
        ]
        skipped = sum(number(line, "grad_norm") is None or number(line, "loss") is None for line in stage.of_split("train"))
        warnings = [f"step {line['step']}: {line.get('message')}" for line in stage.of_split("warning")]
        stages.append({"title": f"Stage {stage.stage}", "starts": starts, "skipped": skipped, "warnings": warnings})
    restarts = sum(max(0, len(stage["starts"]) - 1) for stage in stages)
    known = all(stage["starts"] for stage in stages)
    return {"stages": stages, "restarts": restarts, "known": known} if stages else None


def _commands(run: RunRecord) -> list[str]:
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


def _missing(run: RunRecord) -> list[Section]:
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
            lacks(f"Stage {stage.stage} is not finished: step {step}{of}. The same command goes on.", "--stage", stage.stage)
        if stage.begun and not stage.of_split("val"):
            lacks(f"Stage {stage.stage} has no evaluation: no --data.val, or it has not come so far.")
    if run.begun and not run.probe:
        lacks("No linear probes.", "--stage", "probe")
    return found


# --- Several runs ---------------------------------------------------------------------------------------------------


def _comparison(runs: Sequence[RunRecord]) -> Section:
    settings = [_comparable(run) for run in runs]
    keys = sorted({key for found in settings for key in found})
    differs = [key for key in keys if len({_short(found.get(key)) for found in settings}) > 1]
    rows = []
    for run, found in zip(runs, settings, strict=True):
        results = _rows(run)
        rows.append({
            "name": run.name, "results": results, "student": next((r for r in reversed(results) if r["kind"] != "start"), None),
            "differs": {key: _short(found.get(key)) for key in differs},
        })  # fmt: skip
    tops = [r["student"]["interval"] for r in rows if r["student"] and r["student"]["interval"]]
    low = max(0.0, min((t[0] for t in tops), default=0.0) - 3) // 5 * 5
    for row in rows:
        student = row["student"]
        row["bar"] = _bar(student["top1"], student["interval"], low) if student else None
    pictures = []
    for at in ("1", "2", "3"):
        stages = {run.name: next(s for s in run.stages if s.stage == at) for run in runs}
        for key, split, title, log in (("loss", "train", "Loss", True), ("images_per_second", "train", "Images per second", False)):
            found = {name: _curve(stage, split, key) for name, stage in stages.items() if stage.of_split(split)}
            if len(found) > 1:
                draw = partial(charts.curves, title=f"{title}, stage {at}", found=found, log=log)
                pictures.append(chart(f"{title} of stage {at}, all runs", draw, width=1.3))
    return {"rows": rows, "differs": differs, "low": low, "charts": pictures, "seeds": _seeds(rows, differs)}


def _comparable(run: RunRecord) -> dict[str, Any]:
    """A run's settings, as far as they matter to what is learned: a value, or the stages' values joined."""
    free = free_settings() | {"stage", "run", "student.parent"}
    found: dict[str, list[Any]] = {}
    for stage in run.begun:
        for key, value in flatten(stage.settings).items():
            if not any(key == name or key.startswith(f"{name}.") for name in free):
                found.setdefault(key, []).append(value)
    joined = {}
    for key, values in found.items():
        short = list(dict.fromkeys(map(_short, values)))
        joined[key] = short[0] if len(short) == 1 else " / ".join(map(_short, values))
    return joined


def _seeds(rows: Sequence[Section], differs: Sequence[str]) -> list[Section]:
    """Runs that differ by their seeds alone: mean and range of their results."""
    groups: dict[tuple, list[Section]] = {}
    for row in rows:
        groups.setdefault(tuple(row["differs"][key] for key in differs if key != "train.seed"), []).append(row)
    made = []
    for key, group in groups.items():
        found = [row["student"] for row in group if row["student"]]
        values = {k: [s[k] for s in found if s[k] is not None] for k in ("top1", "miou", "feature_cosine")}
        values = {k: v for k, v in values.items() if len(v) == len(group)}
        if len(group) > 1 and values:
            about = {k: v for k, v in zip([d for d in differs if d != "train.seed"], key, strict=True)}
            spread = {k: {"mean": statistics.fmean(v), "low": min(v), "high": max(v)} for k, v in values.items()}
            made.append({"about": about, "runs": [row["name"] for row in group], "spread": spread})
    return made


# --- Words ----------------------------------------------------------------------------------------------------------


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} %"


def _cosine(value: float) -> str:
    return f"{value:.3f}"


def _short(value: Any) -> str:
    """A setting's value as text."""
    if isinstance(value, list):
        return ", ".join(map(_short, value)) or "none"
    if isinstance(value, Mapping):
        return _pairs(value) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {_short(v)}" for k, v in values.items())
