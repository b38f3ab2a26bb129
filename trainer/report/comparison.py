"""Several runs side by side: what differs in their settings, and what came of it."""

import statistics
from collections.abc import Mapping, Sequence
from functools import partial

from trainer.config import flatten, free_settings
from trainer.output import charts
from trainer.report.draw import chart
from trainer.report.read import RunRecord
from trainer.report.sections import curve_of, evaluations
from trainer.report.words import Section, bar, short


def comparison(runs: Sequence[RunRecord]) -> Section:
    """The table of runs, their curves together, and what seeds do."""
    settings = [_comparable(run) for run in runs]
    places = sorted({place for found in settings for place in found})
    apart = [p for p in places if len({found[p] for found in settings if p in found}) > 1]
    differs = list(dict.fromkeys(key for key, _ in apart))
    rows = []
    for run, found in zip(runs, settings, strict=True):
        newest = [row for row in evaluations(run) if row["kind"] in ("student", "baseline")]
        differ = {key: _values(found, [place for place in apart if place[0] == key]) for key in differs}
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
                pictures.append(chart(f"{title} of stage {at}, all runs", draw))
    return {
        "rows": rows,
        "differs": differs,
        "low": low,
        "charts": pictures,
        "seeds": seeds(rows, differs),
        "masks": any(r["student"] and r["student"]["miou"] is not None for r in rows),
    }


def _comparable(run: RunRecord) -> dict[tuple[str, str], str]:
    """A run's settings by name and stage, as far as they matter to what is learned."""
    free = free_settings() | {"stage", "run", "student.parent"}
    return {
        (key, stage.stage): short(value)
        for stage in run.begun
        for key, value in flatten(stage.settings).items()
        if not any(key == name or key.startswith(f"{name}.") for name in free)
    }


def _values(found: Mapping[tuple[str, str], str], places: Sequence[tuple[str, str]]) -> str:
    """A setting's value, or its values in the order of the stages."""
    values = [found[place] for place in places if place in found]
    return values[0] if len(set(values)) == 1 else " / ".join(values)


def seeds(rows: Sequence[Section], differs: Sequence[str]) -> list[Section]:
    """Runs that came equally far and differ by their seeds alone: mean and range of their results."""
    others = [key for key in differs if key != "train.seed"]
    groups: dict[tuple[str, ...], list[Section]] = {}
    for row in rows:
        if row["student"]:
            groups.setdefault((row["student"]["name"], *(row["differs"][key] for key in others)), []).append(row)
    made = []
    for (_, *about), group in groups.items():
        values = {k: [row["student"][k] for row in group] for k in ("top1", "miou", "feature_cosine")}
        spread = {
            k: {"mean": statistics.fmean(v), "low": min(v), "high": max(v)} for k, v in values.items() if None not in v
        }
        if len(group) > 1 and spread:
            names = [row["name"] for row in group]
            made.append({"about": dict(zip(others, about, strict=True)), "runs": names, "spread": spread})
    return made
