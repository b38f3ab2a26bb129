"""Several runs side by side: what differs in their settings, and what came of it."""

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

from trainer.config import flatten, free_settings
from trainer.output import charts
from trainer.report.draw import chart
from trainer.report.read import RunRecord
from trainer.report.sections import curve_of, evaluations
from trainer.report.words import Section, bar, short


def comparison(runs: Sequence[RunRecord]) -> Section:
    """The table of runs, their curves together, and what seeds do."""
    settings = [_comparable(run) for run in runs]
    keys = sorted({key for found in settings for key in found})
    differs = [key for key in keys if len({short(found.get(key)) for found in settings}) > 1]
    rows = []
    for run, found in zip(runs, settings, strict=True):
        newest = [row for row in evaluations(run) if row["kind"] != "start" and not row["name"].startswith("Teacher")]
        differ = {key: short(found.get(key)) for key in differs}
        rows.append({"name": run.name, "student": newest[-1] if newest else None, "differs": differ})
    tops = [r["student"]["interval"] for r in rows if r["student"] and r["student"]["interval"]]
    low = max(0.0, min((t[0] for t in tops), default=0.0) - 3) // 5 * 5
    for row in rows:
        student = row["student"]
        row["bar"] = bar(student["top1"], student["interval"], low) if student else None
    pictures = []
    for at in ("1", "2", "3"):
        stages = {run.name: next(s for s in run.stages if s.stage == at) for run in runs}
        for key, split, title, log in (
            ("loss", "train", "Loss", True),
            ("images_per_second", "train", "Images per second", False),
        ):
            found = {name: curve_of(stage, split, key) for name, stage in stages.items() if stage.of_split(split)}
            if len(found) > 1:
                draw = partial(charts.curves, title=f"{title}, stage {at}", found=found, log=log)
                pictures.append(chart(f"{title} of stage {at}, all runs", draw, width=1.3))
    return {"rows": rows, "differs": differs, "low": low, "charts": pictures, "seeds": seeds(rows, differs)}


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
        texts = list(dict.fromkeys(map(short, values)))
        joined[key] = texts[0] if len(texts) == 1 else " / ".join(map(short, values))
    return joined


def seeds(rows: Sequence[Section], differs: Sequence[str]) -> list[Section]:
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
            about = dict(zip((d for d in differs if d != "train.seed"), key, strict=True))
            spread = {k: {"mean": statistics.fmean(v), "low": min(v), "high": max(v)} for k, v in values.items()}
            made.append({"about": about, "runs": [row["name"] for row in group], "spread": spread})
    return made
