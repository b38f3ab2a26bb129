"""The verdict: rows of figures with their intervals, the table on the screen, and results.json.

Intervals are 95 %: Wilson's of an accuracy, the normal one of a mean, the bootstrap's of a mean intersection over
union. Differences are paired, on the same images.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from trainer.evaluate.masks import miou, resampled
from trainer.output.intervals import Z, wilson
from trainer.probe.report import paired

INTERVALS = "95 %: Wilson (accuracies), normal (means, paired differences), bootstrap (mIoU); speed: quartiles"
Row = dict[str, Any]  # measure, model, value, low, high, unit; further keys of the measure's own


class Reference(NamedTuple):
    """The model that others are compared with, and what it had on the same images."""

    name: str
    values: np.ndarray


def accuracy(measure: str, model: str, right: np.ndarray, reference: Reference | None, **more: Any) -> Row:
    """A row of an accuracy, from whether each image is right."""
    low, high = wilson(int(right.sum()), len(right))
    row = {"measure": measure, "model": model, "value": 100 * float(right.mean()), "low": low, "high": high}
    row |= {"unit": "%", "images": len(right), **more}
    if reference is None or reference.name == model:
        return row
    return row | _difference(reference.name, *paired(right, reference.values))


def mean(measure: str, model: str, values: np.ndarray, scale: float = 1.0, **more: Any) -> Row:
    """A row of a mean over images."""
    values = scale * values.astype(np.float64)
    value, half = float(values.mean()), Z * float(values.std()) / math.sqrt(len(values))
    return {"measure": measure, "model": model, "value": value, "low": value - half, "high": value + half,
            "images": len(values), **more}  # fmt: skip


def overlap_of_masks(measure: str, model: str, counts_N3C: np.ndarray, reference: Reference | None, seed: int) -> Row:
    """A row of a mean intersection over union."""
    values = resampled(counts_N3C, seed)
    low, high = np.quantile(values, (0.025, 0.975)).tolist()
    row = {"measure": measure, "model": model, "value": miou(counts_N3C), "low": low, "high": high, "unit": "%",
           "images": len(counts_N3C)}  # fmt: skip
    if reference is None or reference.name == model:
        return row
    half = Z * float((values - resampled(reference.values, seed)).std())
    return row | _difference(reference.name, row["value"] - miou(reference.values), half)


def speed(model: str, size: Any, found: dict[str, Any]) -> list[Row]:
    """Rows of what `cost.measure` found."""
    rows = []
    for measure, key, unit in (("throughput", "images_per_second", "images/s"), ("latency", "latency_ms", "ms"),
                               ("FLOPs", "gflops", "GFLOPs/image"), ("memory", "memory_mib", "MiB")):  # fmt: skip
        row = {"measure": measure, "model": model, "value": found[key], "unit": unit, "size": size}
        row |= {"batch_size": 1 if measure == "latency" else found["batch_size"]}
        if f"{key}_low" in found:
            row |= {"low": found[f"{key}_low"], "high": found[f"{key}_high"]}
        rows.append(row)
    return rows


def _difference(name: str, value: float, half: float) -> Row:
    return {"to": name, "difference": float(value), "half": float(half)}


def table(results: dict[str, Any]) -> str:
    """All rows as one table for the screen: a line per figure, a column per model, then one per difference."""
    names = list(results["models"])
    lines: dict[str, dict[str, Row]] = {}
    for row in results["results"]:
        lines.setdefault(_label(row), {})[row["model"]] = row
    pairs = dict.fromkeys((row["model"], row["to"]) for row in results["results"] if "to" in row)
    head = ["", *names, *(f"{name} - {to}" for name, to in pairs)]
    cells = [head]
    for label, by_model in lines.items():
        gains = [_gain(by_model.get(name), to) for name, to in pairs]
        cells.append([label, *(_cell(by_model.get(name)) for name in names), *gains])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = (
        (line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)))
        for line in cells
    )
    return "\n".join("  ".join(line).rstrip() for line in padded)


def _label(row: Row) -> str:
    more = [str(row[key]) for key in ("pooling", "of") if key in row]
    more += [f"{row['size']} pixels"] if "size" in row else []
    more += [f"batch {row['batch_size']}"] if row["measure"] in ("throughput", "memory") else []
    said = f"{row['measure']} ({', '.join(more)})" if more else row["measure"]
    return f"{said}, {row['unit']}" if row.get("unit") else said


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    value, *interval = (_short(row[key], row.get("unit")) for key in ("value", "low", "high") if key in row)
    return f"{value} [{', '.join(interval)}]" if interval else value


def _gain(row: Row | None, to: str) -> str:
    return f"{row['difference']:+.1f} +- {row['half']:.1f}" if row and row.get("to") == to else ""


def _short(value: float, unit: str | None) -> str:
    return f"{value:.1f}" if unit == "%" else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
