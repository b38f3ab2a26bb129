"""The stage `evaluate`: a verdict on a model beside its teacher, on any number of ranks.

One pass over the images writes what is read of them to the run folder, as the probe does, and with its code; then each
rank takes its share of probes and neighbours. An evaluation that was stopped goes on with the same command. Another one
in the same run folder leaves the earlier results as `results-1.json`, `results-2.json` and so on.
"""

import json
import os
import shutil
import sys
from collections.abc import Generator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

import data
from models import match_dtypes
from trainer.config import Settings, user_errors
from trainer.evaluate import masks, patches, report
from trainer.evaluate.cost import measure
from trainer.evaluate.neighbours import labels_of, overlaps, votes
from trainer.evaluate.plan import Plan, fits_head, inspect, make_plan, same
from trainer.output.folder import StageFolder
from trainer.output.log import Log
from trainer.output.paths import write_aside
from trainer.probe.barrier import Barrier
from trainer.probe.features import extract
from trainer.probe.fit import Vector, fit_groups, groups_of, kept
from trainer.probe.images import Split
from trainer.ranks.shared import check_shared
from trainer.ranks.signals import STOPPED, StopFlag, Stopped
from trainer.ranks.world import World, dist, join, leave
from trainer.setup.resolution import plain

check = inspect


def run(settings: Settings, me: World, should_stop: StopFlag) -> int:
    """Exit status: 0 done, 75 stopped by a signal with everything saved.

    Raises:
        UserError, ValueError, OSError: a user's mistake, in one line.
    """
    folder = StageFolder(settings)
    with user_errors():
        plan = make_plan(settings, folder)
        record = plan.record
    room = plan.store.check_room() if plan.store else "no images"
    kept_plan, results = folder.path / "plan.json", folder.path / "results.json"
    is_same = kept_plan.is_file() and same(kept_plan.read_text(), record)
    if settings.dry_run or (is_same and folder.complete):
        if me.rank == 0:
            done = "" if settings.dry_run else f"{report.table(json.loads(results.read_text()))}\n"
            print(
                describe(plan, room) if settings.dry_run else f"{done}the evaluation is complete: {results}", flush=True
            )
        return 0
    folder.claim(settings, me.rank)
    if me.rank == 0 and not is_same:
        begin_anew(folder.path)
        write_aside(kept_plan, json.dumps(record, indent=2))
    with Log(folder.path, me.rank) as log, log.printed():
        join(me)
    check_shared(folder.path)
    if me.rank == 0:
        sources = ", ".join(f"{name} from {subject.source}" for name, subject in plan.subjects.items())
        for line in (sources, *(f"note: {note}" for note in plan.notes), f"{room}; {', '.join(plan.measures)}"):
            print(f"evaluate: {line}", file=sys.stderr, flush=True)
    barrier = Barrier(me, should_stop)
    try:
        rows = judge(plan, me, barrier)
    except Stopped:
        if me.rank == 0:
            print("stopped by a signal, all is saved; run the same command again", file=sys.stderr, flush=True)
        leave()
        return STOPPED
    if me.rank == 0:
        found = {**record, "notes": plan.notes, "intervals": report.INTERVALS, "device": device_name(me.device),
                 "dtype": "bf16" if settings.train.bf16 else "fp32", "results": rows}  # fmt: skip
        write_aside(results, json.dumps(found, indent=1) + "\n")
        print(f"{report.table(found)}\nevaluation is done: {results}", flush=True)
        if not settings.probe.keep_features:
            shutil.rmtree(folder.path / "features", ignore_errors=True)
            shutil.rmtree(folder.path / "probes", ignore_errors=True)
    barrier.wait("report")
    leave()
    return 0


def begin_anew(folder: Path) -> None:
    """Make room for an evaluation of something else; the earlier results stay under another name."""
    if (folder / "results.json").is_file():
        name = next(name for n in count(1) if not (name := folder / f"results-{n}.json").exists())
        os.replace(folder / "results.json", name)
    for part in ("features", "probes"):
        shutil.rmtree(folder / part, ignore_errors=True)


def judge(plan: Plan, me: World, barrier: Barrier) -> list[report.Row]:
    """All rows; rank 0 has them, the others have none.

    Raises:
        Stopped: on all ranks, when a signal came to one.
    """
    dtype = torch.bfloat16 if plan.settings.train.bf16 else torch.float32
    for subject in plan.subjects.values():
        subject.place(me.device, dtype, plan.given)
        match_dtypes(subject.model)
    rows = []
    if plan.store is not None:
        read(plan, me, barrier)
        rows += on_labels(plan, me, barrier)
        rows += agreement(plan, me, barrier) if "agreement" in plan.measures else []
    if {"segmentation", "mask_probe"} & set(plan.measures):
        share = masks_of(plan, me, "val", rank=me.rank, world_size=me.size)
        rows += on_masks(plan, share, barrier) if "segmentation" in plan.measures else []
        rows += on_patches(plan, me, share, barrier) if "mask_probe" in plan.measures else []
    if "speed" in plan.measures:
        barrier.work(speeds(plan, rows) if me.rank == 0 else nothing(), len(sizes(plan)) * len(plan.subjects), "speed")
    return rows if me.rank == 0 else []


def read(plan: Plan, me: World, barrier: Barrier) -> None:
    """Write what is missing of the outputs, each rank its share."""
    missing = plan.store.missing()
    barrier.wait("look")  # nobody writes before all have looked
    mine = np.array_split(np.arange(len(missing)), me.size)[me.rank]  # neighbours: one pass through the file
    made = extract(plan.outputs, plan.store, [missing[i] for i in mine], lambda split: loader_of(plan, me, split))
    barrier.work(made, len(missing), "images")


def common(plan: Plan, me: World) -> dict[str, Any]:
    """Keywords of all loaders."""
    return {"mean": plan.given["mean"], "std": plan.given["std"], "device": me.device, "dtype": torch.float32,
            "workers": plan.settings.data.workers}  # fmt: skip


def loader_of(plan: Plan, me: World, split: Split) -> data.Loader:
    """Batches of a split, in order."""
    return data.eval_loader(
        split.path, indices=split.indices, batch_size=plan.settings.probe.batch_size, **common(plan, me),
        image_size=plan.given["image_size"], crop_pct=plan.given["crop_pct"],
    )  # fmt: skip


def gathered(barrier: Barrier, what: str, mine: Any) -> list[Any]:
    """Every rank's value, on all ranks, however late one comes."""
    barrier.wait(what)
    everyone: list[Any] = [None] * barrier.me.size
    dist.all_gather_object(everyone, mine)
    return everyone


def on_labels(plan: Plan, me: World, barrier: Barrier) -> list[report.Row]:
    """k-NN, probes, own heads and zero-shot: the accuracy of each, and its difference to the teacher's."""
    store, options = plan.store, plan.settings.evaluate
    rows, folder = [], plan.folder / "probes"
    labels = labels_of(store, ["val"]).numpy()
    if "probe" in plan.measures:
        problems = plan.classes * len(plan.settings.probe.penalties)
        groups = groups_of(plan.vectors, store, problems, me.device)
        groups = [group for group in groups if any(kept(folder, vector) is None for vector in group)]
        barrier.wait("look for probes")
        mine = groups[me.rank :: me.size]
        fitted = fit_groups(store, mine, plan.classes, plan.settings.probe, folder, me.device)
        barrier.work(fitted, len(groups), "probes")
        found = {vector: kept(folder, vector).right["val"] for vector in plan.vectors}
        rows += accuracies(f"probe, {plan.settings.probe.solver}", found, plan.reference)
    if "knn" in plan.measures:
        parts = np.array_split(np.arange(len(labels)), me.size)
        said = {}

        def ask() -> Generator[None]:
            for vector in plan.vectors:
                said[vector] = votes(store, vector.keys, parts[me.rank], options.neighbours, plan.classes, me.device)
                yield

        barrier.work(ask(), len(plan.vectors) * me.size, "neighbours")
        everyone = gathered(barrier, "neighbours of all", said)
        found = {v: np.concatenate([theirs[v] for theirs in everyone]) == labels for v in plan.vectors}
        rows += accuracies(f"k-NN, k = {options.neighbours}", found, plan.reference)
    if "head" in plan.measures:
        fitting = {n: x for n, x in best_of(plan, "head").items() if fits_head(plan.subjects[n], plan.infos)}
        rows += tops("own head", fitting, labels, plan.reference)
    if "zero_shot" in plan.measures:
        rows += tops("zero-shot", best_of(plan, "zero_shot"), labels, plan.reference)
    return rows


def accuracies(measure: str, found: dict[Vector, np.ndarray], reference: str | None) -> list[report.Row]:
    """Rows of what each vector got right."""
    known = {v.pooling: report.Reference(v.model, right) for v, right in found.items() if v.model == reference}
    return [
        report.accuracy(measure, v.model, right, known.get(v.pooling), pooling=v.pooling) for v, right in found.items()
    ]


def tops(name: str, best: dict[str, np.ndarray], labels: np.ndarray, reference: str | None) -> list[report.Row]:
    """Rows of top-1 and top-5, from each model's best classes [N, 5 or fewer]."""
    rows = []
    for top in (1, 5):
        right = {n: (x[:, :top] == labels[:, None]).any(1) for n, x in best.items() if x.shape[1] >= top}
        known = report.Reference(reference, right[reference]) if reference in right else None
        rows += [report.accuracy(f"{name}, top-{top}", n, hit, known) for n, hit in right.items()]
    return rows


def best_of(plan: Plan, what: str) -> dict[str, np.ndarray]:
    """Model -> best classes of each test image, [N, 5 or fewer]."""
    return {array.model: values(plan, array.key).astype(np.int64) for array in plan.store.arrays if array.tap == what}


def values(plan: Plan, key: str) -> np.ndarray:
    """What the store has of the test images under a key, [N, width]."""
    return torch.cat([x[0] for x, _ in plan.store.blocks("val", [(key,)], torch.device("cpu"))]).numpy()


def agreement(plan: Plan, me: World, barrier: Barrier) -> list[report.Row]:
    """Cosine of the tokens, same best class, and common neighbours, of each model with the teacher."""
    rows, store = [], plan.store
    for array in store.arrays:
        if array.tap == "cosine":
            rows.append(report.mean("cosine to teacher", array.model, values(plan, array.key)[:, 0], of=array.pool))
    for what in ("head", "zero_shot"):
        found = best_of(plan, what)
        for name, x in found.items():
            teacher = found.get("teacher")
            if name != "teacher" and teacher is not None and _as_many(plan, what, name):
                same_class = x[:, 0] == teacher[:, 0]
                rows.append(report.accuracy("same class as teacher", name, same_class, None, of=what))
    images, k = len(store.splits["val"].indices), plan.settings.evaluate.neighbours
    features: dict[str, tuple[str, ...]] = {}
    for vector in plan.vectors:  # the first pooling
        features.setdefault(vector.model, vector.keys)
    if images > k + 1 and "teacher" in features:
        part, shares = np.array_split(np.arange(images), me.size)[me.rank], {}
        others = [name for name in features if name != "teacher"]

        def ask() -> Generator[None]:
            for name in others:
                shares[name] = overlaps(store, features["teacher"], features[name], part, k, me.device)
                yield

        barrier.work(ask(), len(others) * me.size, "agreement")
        everyone = gathered(barrier, "agreement of all", shares)
        for name in others:
            share = np.concatenate([theirs[name] for theirs in everyone])
            rows.append(report.mean(f"common neighbours, k = {k}", name, share, 100.0, unit="%"))
    return rows


def _as_many(plan: Plan, what: str, name: str) -> bool:
    """Whether a class number means the same to a model and to the teacher."""
    return what == "zero_shot" or plan.subjects[name].classes == plan.subjects["teacher"].classes


def on_masks(plan: Plan, share: data.Loader, barrier: Barrier) -> list[report.Row]:
    """Mean intersection over union of the models that segment; the first that is not the student is compared with."""
    classes = len(plan.infos["val"].mask_classes)
    models = {
        name: subject for name, subject in plan.subjects.items()
        if subject.segments and subject.config["segmentation"]["num_classes"] == classes
    }  # fmt: skip
    mine: dict[int, np.ndarray] = {}
    made = masks.counts(masks.predictions(models, plan.settings), share, classes, mine)
    return overlaps_of_masks("mIoU", plan, list(models), made, mine, barrier)


def on_patches(plan: Plan, me: World, share: data.Loader, barrier: Barrier) -> list[report.Row]:
    """Mean intersection over union of a linear probe of each model's patches."""
    train, classes = plan.infos["train"], len(plan.infos["val"].mask_classes)
    models = {name: subject for name, subject in plan.subjects.items() if subject.has_patches}
    mine: dict[str, patches.Probe] = {}

    def fit() -> Generator[None]:
        names = list(models)[me.rank :: me.size]
        chosen = patches.drawn(train, plan.settings.train.seed)
        loader = masks_of(plan, me, "train", indices=chosen) if names else None
        for name in names:
            mine[name] = patches.fitted(models[name], loader, classes)
            yield

    barrier.work(fit(), len(models), "patches")
    probes = {name: probe for theirs in gathered(barrier, "patches of all", mine) for name, probe in theirs.items()}
    found: dict[int, np.ndarray] = {}
    made = masks.counts(patches.predictions(models, probes), share, classes, found)
    return overlaps_of_masks("mIoU of a patch probe", plan, list(models), made, found, barrier)


def masks_of(plan: Plan, me: World, split: str, **more: Any) -> data.Loader:
    """Images and masks of a file at their own size. To build it takes seconds."""
    return data.original_loader(plan.infos[split].path, batch_size=1, **common(plan, me), **more)


def overlaps_of_masks(
    measure: str, plan: Plan, names: list[str], made: Generator[None], mine: dict[int, np.ndarray], barrier: Barrier
) -> list[report.Row]:
    """Rows of the pixels that all ranks count, see `masks.counts`: `made` fills `mine` with this rank's."""
    barrier.work(made, plan.infos["val"].num_samples, measure)
    found = {index: x for theirs in gathered(barrier, f"{measure} of all", mine) for index, x in theirs.items()}
    pixels = np.stack([found[index] for index in sorted(found)])
    of = {name: pixels[:, m] for m, name in enumerate(names)}
    reference = next((report.Reference(name, x) for name, x in of.items() if name != "student"), None)
    return [report.overlap_of_masks(measure, name, x, reference, plan.settings.train.seed) for name, x in of.items()]


def sizes(plan: Plan) -> list[Any]:
    """At which speed is measured."""
    return list(plan.settings.evaluate.sizes) or [plain(plan.given["image_size"])]


def speeds(plan: Plan, rows: list[report.Row]) -> Generator[None]:
    """Append the rows of a model at a size, one such pair per iteration."""
    options = plan.settings
    for size in sizes(plan):
        for name, subject in plan.subjects.items():
            rows += report.speed(
                name, size, measure(subject.model, size, options.probe.batch_size, options.evaluate.seconds)
            )
            yield


def nothing() -> Generator[None]:
    """No piece."""
    yield from ()


def device_name(device: torch.device) -> str:
    """What speeds are of."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def describe(plan: Plan, room: str) -> str:
    """The text of `--dry_run`."""
    return "\n".join([
        *(f"{name}: {subject.source}" for name, subject in plan.subjects.items()),
        f"measures: {', '.join(plan.measures)}",
        *(f"images, {split}: {info.num_samples:,}" for split, info in plan.infos.items()),
        f"features: {room}",
        *(f"note: {note}" for note in plan.notes),
    ])  # fmt: skip
