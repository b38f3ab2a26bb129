"""Which images are probed: parts of the training images, the test sets, and how many of each the store has room for."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

import data
from data.beton import open_checked
from trainer.config import Settings, UserError
from trainer.setup.cache import inspect_data
from trainer.stages.classes import check_same_classes


@dataclass(frozen=True)
class Split:
    """Images that are read together: `fit`, `validation`, or a test set by its name."""

    name: str
    path: Path
    indices: np.ndarray  # int64, ascending


def inspect_images(settings: Settings) -> tuple[data.Info, dict[str, data.Info]]:
    """The training images, and the test sets by name, `val` (`data.val`) first.

    Raises:
        UserError, ValueError, OSError: one line on a file that is missing, has no labels or has other classes.
    """
    specs = {}
    for pair in settings.probe.test:
        name, _, spec = pair.partition("=")
        if name in specs or name in ("train", "fit", "validation") or (name == "val" and settings.data.val):
            raise UserError(f"probe.test {pair}: the name {name} is taken; choose another")
        specs[name] = spec
    tests = dict(inspect_data(settings))
    train = tests.pop("train")
    tests |= {name: data.inspect(data.resolve(spec, "val")) for name, spec in specs.items()}
    if not tests:
        raise UserError("data.val null: no images are left to report on; give it, or --probe.test NAME=FILE")
    for name, info in {"train": train, **tests}.items():
        setting = f"data.{name}" if name == "train" or name not in specs else f"probe.test {name}"
        if not info.has_labels:
            raise UserError(f"{setting} {info.path}: has no labels, which a probe is fitted and tested on")
        check_same_classes(train, info, setting)
    return train, tests


def available(settings: Settings, train: data.Info, tests: dict[str, data.Info]) -> dict[str, int]:
    """Number of images per split, were there room for all.

    `validation` takes its share of the training images, and `fit` the others, `probe.images` of them at most.

    Raises:
        UserError: no image is left for one of the two.
    """
    share = settings.probe.validation
    held = round(share * train.num_samples)
    fit = train.num_samples - held
    if not held or not fit:
        raise UserError(f"probe.validation {share}: leaves {fit} images to fit on and {held} to choose on, "
                        f"of {train.num_samples} in {train.path}")  # fmt: skip
    counts = {"fit": min(fit, settings.probe.images or fit), "validation": held}
    return counts | {name: info.num_samples for name, info in tests.items()}


def share_out(wanted: dict[str, int], room: int, keep_fit: bool) -> dict[str, int]:
    """Number of images per split when there is room for `room` in all: what is wanted, where it fits.

    Else half of the room is for `fit`, and the other splits share the rest equally. A split that wants less than its
    share leaves the rest of it to the others.

    Args:
        keep_fit: `fit` gets what it wants. The others may then get less than none.
    """
    others = {name: count for name, count in wanted.items() if name != "fit"}
    counts = {"fit": wanted["fit"]}
    if not keep_fit:
        counts["fit"] = min(wanted["fit"], max(room // 2, room - sum(others.values())))
    left = room - counts["fit"]
    for i, name in enumerate(sorted(others, key=others.__getitem__)):
        counts[name] = min(others[name], left // (len(others) - i))
        left -= counts[name]
    return {name: counts[name] for name in wanted}


def draw(settings: Settings, train: data.Info, tests: dict[str, data.Info], counts: dict[str, int]) -> list[Split]:
    """The images of each split: a function of the files, `counts`, `probe.validation` and the seed alone."""
    lots = data.lots(train.num_samples, settings.train.seed)
    by_lot = np.argsort(lots, kind="stable")
    held = round(settings.probe.validation * train.num_samples)
    pools = {"fit": (train, by_lot[held:]), "validation": (train, by_lot[:held])}
    pools |= {name: (info, np.arange(info.num_samples)) for name, info in tests.items()}
    splits = []
    for name, (info, pool) in pools.items():
        if counts[name] < len(pool):
            labels = open_checked(info.path)[1]["label"][pool]
            order = data.balanced(labels, data.lots(info.num_samples, settings.train.seed)[pool])
            pool = pool[order[: counts[name]]]
        splits.append(Split(name, info.path, np.sort(pool)))
    return splits
