"""What is judged: which models, by which measures, on which images; a mistake is found before anything is computed."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from torch import Tensor

import data
import models
from trainer.config import Settings, UserError
from trainer.evaluate.outputs import Outputs, class_embeddings, parts_of
from trainer.evaluate.settings import Measure
from trainer.evaluate.subjects import Subject, subjects_of
from trainer.output.folder import StageFolder
from trainer.probe.fit import Vector, vectors_of
from trainer.probe.images import Split, available, draw
from trainer.probe.plan import fitting
from trainer.probe.store import Store, free_bytes, image_bytes
from trainer.setup.resolution import pair
from trainer.stages.classes import check_same_classes, num_classes

MEASURES = get_args(Measure)
ON_FEATURES = ("knn", "probe")  # of training images as well
ON_LABELS = (*ON_FEATURES, "head", "zero_shot")
ON_IMAGES = (*ON_LABELS, "agreement")


@dataclass
class Plan:
    """What is judged, on which images.

    Attributes:
        given: how images are given to the models.
        infos: the images by `train` and `val`, where there are any.
        measures: those that are taken.
        outputs, store: what is read of the images; None where nothing is.
        notes: what the user should know, a line each.
    """

    settings: Settings
    folder: Path
    subjects: dict[str, Subject]
    given: dict[str, Any]
    infos: dict[str, data.Info]
    measures: list[str]
    outputs: Outputs | None
    store: Store | None
    notes: list[str]

    @property
    def classes(self) -> int:
        """Of the images' labels."""
        return num_classes(self.infos["train"] if "train" in self.infos else self.infos["val"])

    @property
    def reference(self) -> str | None:
        """The model that others are compared with: the teacher, else the first beside the student."""
        return next((name for name in self.subjects if name != "student"), None)

    @property
    def vectors(self) -> list[Vector]:
        """The features that k-NN and probe read."""
        arrays = [] if self.store is None else [array for array in self.store.arrays if array.tap == "features"]
        found = []
        for pool in dict.fromkeys(self.settings.evaluate.pooling):
            parts = parts_of(pool)
            own = [array for array in arrays if array.pool in parts]
            if len(parts) > 1:
                found += vectors_of(own, [pool])
            else:
                found += [Vector(a.model, a.tap, a.pool, a.width, (a.key,)) for a in own]
        order = list(self.subjects)
        return sorted(found, key=lambda vector: order.index(vector.model))

    @property
    def record(self) -> dict[str, Any]:
        """What an evaluation that goes on must have in common with the one that was begun."""
        embeddings = self.outputs.embeddings if self.outputs else None
        options = {name: value for name, value in asdict(self.settings.evaluate).items() if name != "class_embeddings"}
        return {
            "models": {
                name: {"from": s.source, "sha256": models.fingerprint(s.model)} for name, s in self.subjects.items()
            },
            "input": self.given,
            "data": {
                split: {"path": str(i.path), "images": i.num_samples, "sha256": i.sha256, "digest": i.digest}
                for split, i in self.infos.items()
            },
            "images": {} if self.store is None else {n: len(s.indices) for n, s in self.store.splits.items()},
            "class_embeddings": None if embeddings is None else _sha256(embeddings),
            "measures": self.measures,
            "settings": {"evaluate": options, "probe": asdict(self.settings.probe)},
        }


def inspect(settings: Settings) -> dict[str, data.Info]:
    """What data.train and data.val hold, where they are given.

    Raises:
        UserError, ValueError, OSError: a bad file, or no images for what is asked.
    """
    given = {"train": settings.data.train, "val": settings.data.val}
    infos = {split: data.inspect(data.resolve(spec, split)) for split, spec in given.items() if spec}
    if len(infos) == 2:
        check_same_classes(infos["train"], infos["val"], "data.val")
    asked = settings.evaluate.measures or ()
    for measure in asked:
        if (why := missing_images(measure, settings, infos)) is not None:
            raise UserError(f"evaluate.measures {measure}: {why}")
    if settings.evaluate.class_embeddings and "zero_shot" not in (settings.evaluate.measures or ["zero_shot"]):
        raise UserError("evaluate.class_embeddings: is for zero_shot, which evaluate.measures does not name; add it")
    return infos


def missing_images(measure: str, settings: Settings, infos: Mapping[str, data.Info]) -> str | None:
    """Why there are no images for a measure; None where there are."""
    val, train = infos.get("val"), infos.get("train")
    if measure == "speed":
        return None
    if val is None:
        return "there are no images to judge on; give --data.val FILE.beton"
    if measure in ON_LABELS and not val.has_labels:
        return f"data.val {val.path} has no labels"
    if measure in ON_FEATURES and train is None:
        return "there are no images to fit on; give --data.train FILE.beton"
    if measure in ON_FEATURES and not train.has_labels:
        return f"data.train {train.path} has no labels"
    if measure == "zero_shot" and settings.evaluate.class_embeddings is None:
        return "needs a text embedding per class; give --evaluate.class_embeddings FILE.safetensors"
    if measure == "mask_probe" and train is None:
        return "there are no images to fit on; give --data.train FILE.beton"
    for split in {"segmentation": ("val",), "mask_probe": ("train", "val")}.get(measure, ()):
        if not infos[split].has_masks:
            return f"data.{split} {infos[split].path} has no masks"
        if infos[split].mask_classes is None:
            return f"data.{split} {infos[split].path} has no JSON beside it, which names the classes of its masks"
    return None


def missing_models(
    measure: str, subjects: Mapping[str, Subject], infos: Mapping[str, data.Info], embeddings: Tensor | None,
    outputs: Outputs,
) -> str | None:  # fmt: skip
    """Why no model can take a measure for which there are images; None where one can."""
    read = {(array.tap, array.model) for array in outputs.arrays}
    if measure == "head" and not any(fits_head(subject, infos) for subject in subjects.values()):
        have = ", ".join(f"{name} {subject.classes or 'none'}" for name, subject in subjects.items())
        return (
            f"no model has a head of the {num_classes(infos['val'])} classes of data.val (classes of the heads: {have})"
        )
    if measure == "zero_shot" and not any(what == "zero_shot" for what, _ in read):
        widths = ", ".join(f"{name} {outputs.widths[name]}" for name in subjects)
        return (
            f"the embeddings have {embeddings.shape[-1]} dimensions, the models give {widths}; CLIP's keep their head"
        )
    if measure == "segmentation":
        mine = {name: s.config["segmentation"]["num_classes"] for name, s in subjects.items() if s.segments}
        if not mine:
            return "no model segments; give an export of --stage 3 --task segmentation"
        count = len(infos["val"].mask_classes)
        if count not in mine.values():
            have = ", ".join(f"{name} {classes}" for name, classes in mine.items())
            return f"data.val has {count} classes of masks, the models: {have}"
    if measure == "mask_probe" and not any(s.has_patches for s in subjects.values()):
        return "no model is a ViT, whose patches are probed"
    if measure == "agreement" and ("teacher" not in subjects or len(subjects) < 2):
        return "needs the teacher beside another model; give --teacher.name NAME, or --student.parent EXPORT"
    return None


def fits_head(subject: Subject, infos: Mapping[str, data.Info]) -> bool:
    """Whether the labels are those of a model's own classifier."""
    info, classes = infos["val"], num_classes(infos["val"])
    if not subject.classes or (info.classes and subject.config.get("classes", info.classes) != info.classes):
        return False
    return classes == subject.classes or (classes < subject.classes and not info.classes)  # some may just not occur


def make_plan(settings: Settings, folder: StageFolder) -> Plan:
    """Check the data, build the models, choose measures and images.

    Raises:
        UserError, ValueError, OSError: one line on what does not fit.
    """
    options, infos = settings.evaluate, inspect(settings)
    subjects, given, notes = subjects_of(settings)
    val = infos.get("val")
    embeddings = None
    if options.class_embeddings is not None and val is not None and val.has_labels:
        embeddings = class_embeddings(options.class_embeddings, val.classes, num_classes(infos.get("train", val)))
    outputs = Outputs(subjects, options.pooling, pair(given["image_size"]), embeddings)
    measures, left = [], []
    for measure in options.measures or MEASURES:
        why = missing_images(measure, settings, infos) or missing_models(measure, subjects, infos, embeddings, outputs)
        if why is None:
            measures.append(measure)
        elif options.measures is not None or (measure == "zero_shot" and options.class_embeddings is not None):
            raise UserError(f"evaluate.measures {measure}: {why}")
        else:
            left.append(f"{measure} is left out: {why}")
    if val is None or measures == ["speed"]:
        notes += left
    if set(measures) & set(ON_FEATURES):
        have = {array.pool for array in outputs.arrays if array.tap == "features"}
        for pool in options.pooling:
            if not set(parts_of(pool)) <= have:
                raise UserError(f"evaluate.pooling {pool}: no model has such a token; use pooled or mean")
    if "speed" in measures:
        for size in options.sizes:
            for subject in subjects.values():
                models.check_image_size(subject.net, size, "evaluate.sizes")
    outputs.keep(measures)
    store = None
    if set(measures) & set(ON_IMAGES):
        splits, note = splits_of(settings, infos, measures, outputs, folder.path)
        notes += [note] if note else []
        store = Store(folder.path / "features", outputs.arrays, splits, settings.probe.batch_size, "fp32")
    return Plan(settings, folder.path, subjects, given, infos, measures, outputs, store, notes)


def splits_of(
    settings: Settings, infos: dict[str, data.Info], measures: list[str], outputs: Outputs, folder: Path
) -> tuple[list[Split], str]:
    """The images that are read, and one line on those that are left out: of them as many as the disk has room for."""
    val = infos["val"]
    every = Split("val", val.path, np.arange(val.num_samples))
    if not set(measures) & set(ON_FEATURES):
        return [every], ""
    tests = {"val": val}
    wanted, per_image = available(settings, infos["train"], tests), image_bytes(outputs.arrays, "fp32")
    free = int(0.9 * free_bytes(folder))
    counts = fitting(settings.probe, wanted, num_classes(infos["train"]), per_image, free) | {"val": val.num_samples}
    note = "" if counts == wanted else (
        f"{counts['fit']:,} of {wanted['fit']:,} images to fit on; for more raise probe.store_gib"
    )  # fmt: skip
    return draw(settings, infos["train"], tests, counts), note


def same(before: str, now: dict[str, Any]) -> bool:
    """Whether what was begun, as JSON, is what is asked for now. Files and models are compared by what they hold."""
    try:
        was = json.loads(before)
        return _compared(was) == _compared(json.loads(json.dumps(now)))
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def _compared(record: dict[str, Any]) -> dict[str, Any]:
    record = {key: record[key] for key in (
        "models", "input", "data", "images", "class_embeddings", "measures", "settings"
    )}  # fmt: skip
    record["models"] = {name: entry["sha256"] for name, entry in record["models"].items()}
    record["data"] = {
        split: entry["digest"] or entry["sha256"] or entry["path"] for split, entry in record["data"].items()
    }
    return record


def _sha256(x: Tensor) -> str:
    return hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest()
