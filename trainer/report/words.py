"""Values as the page shows them."""

from collections.abc import Mapping
from typing import Any

Section = dict[str, Any]  # what the template takes


def percent(value: float | None) -> str:
    """A share of 100."""
    return "" if value is None else f"{value:.2f} %"


def cosine(value: float) -> str:
    """A cosine."""
    return f"{value:.3f}"


def short(value: Any) -> str:
    """A setting's value as text."""
    if isinstance(value, list):
        return ", ".join(map(short, value)) or "none"
    if isinstance(value, Mapping):
        return pairs(value) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def pairs(values: Mapping[str, Any]) -> str:
    """A mapping as text."""
    return ", ".join(f"{k} {short(v)}" for k, v in values.items())


def bar(value: float | None, interval: tuple[float, float] | None, low: float) -> Section | None:
    """Where a value and its interval lie between `low` and 100, in percent of the bar."""
    if value is None:
        return None

    def at(x: float) -> float:
        return round(100 * (x - low) / (100 - low), 2)

    ends = interval or (value, value)
    return {"dot": at(value), "left": at(ends[0]), "width": round(at(ends[1]) - at(ends[0]), 2)}
