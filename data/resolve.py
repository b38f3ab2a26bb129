"""What a data setting means: a path, or `digits`, the embedded data set."""

from pathlib import Path

from data.paths import expand


def resolve(spec: str | Path, split: str) -> Path:
    """A data setting -> a .beton file.

    Args:
        spec: `digits`, the embedded data set; `digits:contrast-3`, its shifted copy with a corruption of `data.corrupt`
            at a severity; else a path.
        split: "train" or "val", of the embedded data set.

    Raises:
        ValueError: no such split, corruption or severity.
    """
    name, _, shift = str(spec).partition(":")
    if name != "digits":
        return expand(spec)
    from data.samples import ensure  # here, since `python -m data.samples` imports this package first

    if not shift:
        return ensure(split)
    corruption, _, severity = shift.rpartition("-")
    if not corruption or severity not in ("1", "2", "3", "4", "5"):
        wanted = "a shifted copy is named as digits:contrast-3, by a corruption and a severity in 1..5"
        raise ValueError(f"{spec}: {wanted}")
    return ensure(split, (corruption, int(severity)))
