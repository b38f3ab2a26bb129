"""What is probed: which models, which of their features, on which images; and whether a run goes on with the same."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm.models import Eva, VisionTransformer
from torch import nn

import data
import models
from trainer.config import Settings, UserError, flatten
from trainer.output.folder import StageFolder
from trainer.output.paths import is_begun
from trainer.probe.features import Reader
from trainer.probe.fit import Vector, vectors_of
from trainer.probe.images import available, draw, inspect_images, share_out
from trainer.probe.settings import Probe
from trainer.probe.store import LESS, Store, free_bytes, image_bytes, size
from trainer.setup.student import convert
from trainer.setup.teacher import TEACHER_FIELDS, build_teacher, check_lineage, input_of, teacher_lineage
from trainer.stages.classes import num_classes

MODULES = ["patch_embed", *(f"blocks.*.{module}" for module in models.BLOCK_MODULES), "norm"]
GIB = 2**30


@dataclass
class Plan:
    """What is probed on which images."""

    settings: Settings
    reader: Reader
    models: dict[str, dict[str, Any]]  # name -> where its weights come from, in words, and what tells them from others
    vectors: list[Vector]
    given: dict[str, Any]  # how images are given to the models
    train: data.Info
    tests: dict[str, data.Info]
    counts: dict[str, int]  # number of images per split
    note: str  # one line on images that are left out, or nothing
    folder: Path
    store: Store = field(init=False)

    def __post_init__(self) -> None:
        self.use(self.counts)

    def use(self, counts: dict[str, int]) -> None:
        """Draw so many images per split."""
        self.counts, options = counts, self.settings.probe
        splits = draw(self.settings, self.train, self.tests, counts)
        self.store = Store(self.folder / "features", self.reader.arrays, splits, options.batch_size, options.dtype)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return num_classes(self.train)

    @property
    def record(self) -> dict[str, Any]:
        """What must stay the same when a run goes on: plan.json."""
        return {
            "models": self.models,
            "data": {
                name: {"path": str(info.path), "images": info.num_samples, "sha256": info.sha256, "digest": info.digest}
                for name, info in {"train": self.train, **self.tests}.items()
            },
            "split": self.counts,
            "images_per_file": self.store.rows,
        }


def make_plan(settings: Settings, folder: StageFolder) -> Plan:
    """Check the data, build the models, and choose the images: those of plan.json where the run has begun.

    Raises:
        UserError, ValueError, OSError: one line on what does not fit.
    """
    options = settings.probe
    train, tests = inspect_images(settings)
    wanted = available(settings, train, tests)
    vits, described, given = models_of(settings, folder.run)
    pools = {}
    for model, vit in vits.items():
        have = ["mean", "prefix", "both"] if vit.num_prefix_tokens else ["mean"]
        chosen = options.pooling or have
        if not set(chosen) <= set(have):
            raise UserError(f"probe.pooling {chosen}: the {model} has no prefix token; use mean")
        pools[model] = chosen[0] if len(chosen) == 1 else "both"
    reader = Reader(vits, options.modules or MODULES, pools)
    vectors = vectors_of(reader.arrays, options.pooling or ["mean", "prefix", "both"])
    kept = read_plan(folder)
    if kept is None:
        probes = 4 * (num_classes(train) + 3) * sum(vector.width for vector in vectors)
        free = int(0.9 * free_bytes(folder.path)) - probes
        counts = fitting(options, wanted, num_classes(train), image_bytes(reader.arrays, options.dtype), free)
    else:
        counts = wanted | kept.get("split", {})
    note = left_out(wanted, counts, image_bytes(reader.arrays, options.dtype))
    plan = Plan(settings, reader, described, vectors, given, train, tests, counts, note, folder.path)
    if kept is not None:
        check_same(folder, kept, plan.record)
    return plan


def fitting(options: Probe, wanted: dict[str, int], classes: int, per_image: int, free: int) -> dict[str, int]:
    """Number of images per split, so that the features fit in `probe.store_gib` and on the disk.

    Args:
        wanted: number of images per split, were there room for all.
        per_image: bytes of features.
        free: bytes that they may take on the disk.

    Raises:
        UserError: there is no room for `probe.images`, or for an image of each class in each split.
    """
    room = max(0, min(int(options.store_gib * GIB), free)) // per_image
    keep_fit = options.images is not None
    counts = share_out(wanted, room, keep_fit)
    least = {name: min(classes, count) for name, count in wanted.items()}
    if any(counts[name] < least[name] for name in wanted):
        others = sum(least.values()) - least["fit"]
        need = wanted["fit"] + others if keep_fit else 2 * max(least["fit"], others)
        raise UserError(
            f"probe.store_gib {options.store_gib:g}: the features need {size(need * per_image)} at least, the disk has "
            f"{size(max(0, free))} free for them; {LESS}"
        )
    return counts


def left_out(wanted: dict[str, int], counts: dict[str, int], per_image: int) -> str:
    """One line on the images that are left out, and how to have all; nothing where all are read."""
    if counts == wanted:
        return ""
    need = sum(wanted.values()) * per_image
    parts = ", ".join(f"{counts[name]:,} of {count:,} ({name})" for name, count in wanted.items())
    return (
        f"all images need {size(need)} of features, so a part is read, equally many per class: {parts}; for all give "
        f"--probe.store_gib {-(-need // GIB)}, and a --run on a disk that holds them"
    )


def models_of(settings: Settings, run: Path) -> tuple[dict[str, nn.Module], dict[str, dict[str, Any]], dict[str, Any]]:
    """Models, and what plan.json says of each, by their names in `probe.models`; and how images are given to them."""
    teacher = build_teacher(settings)
    if not isinstance(teacher, VisionTransformer | Eva):
        raise UserError(f"teacher.name {settings.teacher.name}: {type(teacher).__name__} is no VisionTransformer or "
                        "Eva of timm, whose modules can be read; choose a ViT such as vit_*")  # fmt: skip
    given = input_of(settings, teacher)
    chosen = settings.teacher
    vits: dict[str, nn.Module] = {"teacher": teacher}
    described = {"teacher": {"from": chosen.weights or (chosen.name if chosen.pretrained else "random weights")}}
    if "student" in settings.probe.models:
        vits["student"], described["student"] = student_of(settings, teacher, run, given["image_size"])
    wanted = [model for model in vits if model in settings.probe.models]
    for model in wanted:
        described[model]["sha256"] = models.fingerprint(vits[model])
    return {m: vits[m].requires_grad_(False) for m in wanted}, {m: described[m] for m in wanted}, given


def student_of(settings: Settings, teacher: nn.Module, run: Path, image_size: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The newest stage's export in the run folder, or `student.parent`; without one, the teacher's copied weights."""
    exports = [run / f"stage{n}" / "export" for n in (3, 2, 1)]
    found = next((path for path in exports if (path / "config.json").is_file()), None)
    parent = settings.student.parent
    parent = found if parent is None else None if parent == "none" else Path(parent)
    if parent is None:
        student = convert(settings, teacher)
        return student, {"from": "the teacher's copied weights, no stage's", "export": None}
    theirs = check_lineage(parent, {"teacher": teacher_lineage(settings, teacher)}, TEACHER_FIELDS)
    stages = theirs["stages"] or ["none"]
    described = {"from": f"{parent} (after stage {' and '.join(stages)})"}
    described["export"] = models.read_config(parent).get("digest")
    return models.backbone_of(models.load(parent, image_size)), described


def read_plan(folder: StageFolder) -> dict[str, Any] | None:
    """plan.json of a probe that has features or probes; None where nothing has begun.

    Raises:
        UserError: it is damaged.
    """
    path = folder.path / "plan.json"
    if not path.is_file() or not (folder.complete or is_begun(folder.path)):
        return None
    try:
        kept = json.loads(path.read_text())
        if all(isinstance(kept[part], dict) for part in ("models", "data", "split")):
            return kept
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path}: damaged; remove {folder.path} to start again")


def check_same(folder: StageFolder, before: dict[str, Any], record: dict[str, Any]) -> None:
    """Raises UserError, naming what differs, when a probe was begun with other models, data or files of features."""
    if folder.complete and "images_per_file" not in before:  # of an earlier version, and nothing more is made
        before = before | {"split": record["split"], "images_per_file": record["images_per_file"]}
    difference = first_difference(before, record)
    if difference:
        raise UserError(
            f"{folder.path}: was made of others: {difference}; remove it to start again, or use another --run"
        )


def first_difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Name and values of the first entry of a record that differs, or None.

    Models and files are compared by what they hold, wherever they lie.
    """
    was, is_now = (flatten(_compared(record, other)) for record, other in ((before, now), (now, before)))
    for key in sorted(was.keys() | is_now.keys()):
        if was.get(key) != is_now.get(key):
            return f"{key} was {was.get(key)!r}, is now {is_now.get(key)!r}"
    return None


def _compared(record: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The part of a record that must equal the same part of `other`."""
    named = {}
    for model, entry in record["models"].items():
        keys = ("sha256", "export") if "export" in other["models"].get(model, {}) else ("sha256",)
        named[model] = {key: entry[key] for key in keys if key in entry}
    files = {}
    for name, entry in record["data"].items():
        theirs = other["data"].get(name, {})
        known = [key for key in ("sha256", "digest") if entry.get(key) and theirs.get(key)]
        files[name] = {key: entry.get(key) for key in ("images", *(known[:1] or ["path"]))}
    return {"models": named, "data": files} | {key: record.get(key) for key in ("split", "images_per_file")}
