"""The stage `probe`: linear probes on every module of every block, teacher beside student, in and out of distribution.

"Layer by layer, module by module", arXiv 2603.05280. Features are read in one pass over the images and kept in the run
folder; then groups of feature vectors are fitted, each on one rank. Stopped anywhere, the same command goes on.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models import Eva, VisionTransformer
from torch import nn
from tqdm import tqdm

import data
import models
from trainer.config import Settings, UserError, first_difference
from trainer.output.folder import StageFolder
from trainer.output.paths import write_aside
from trainer.probe.features import Reader, Split, Store, extract
from trainer.probe.fit import Vector, fit_groups, groups_of, kept, vectors_of
from trainer.probe.report import report
from trainer.ranks.signals import STOPPED, StopFlag, Stopped
from trainer.ranks.world import World, join, leave
from trainer.setup.student import convert
from trainer.setup.teacher import TEACHER_FIELDS, build_teacher, check_lineage, input_of, teacher_lineage

MODULES = ["patch_embed", *(f"blocks.*.{module}" for module in models.BLOCK_MODULES), "norm"]


@dataclass
class Plan:
    """What is probed on which images."""

    reader: Reader
    sources: dict[str, str]  # model -> where its weights come from, in words
    store: Store
    vectors: list[Vector]
    classes: int
    given: dict[str, Any]  # how images are given to the models
    record: dict[str, Any]  # of models and data, which must stay the same when a run goes on


def run(settings: Settings, me: World, should_stop: StopFlag) -> int:
    """Exit status: 0 done, 75 stopped by a signal with everything saved.

    Raises:
        UserError, ValueError, OSError: a user's mistake, in one line.
    """
    folder = StageFolder(settings)
    folder.check(settings)
    plan = make_plan(settings, folder)
    check_same(folder.path / "plan.json", plan.record)
    if settings.dry_run or folder.complete:
        if me.rank == 0:
            complete = f"the probe is complete: {folder.path / 'results.json'}"
            print(describe(settings, plan) if settings.dry_run else complete, flush=True)
        return 0
    room = plan.store.check_room()
    folder.claim(settings, me.rank)
    join(me)
    if me.rank == 0:
        write_aside(folder.path / "plan.json", json.dumps(plan.record, indent=2))
        print(f"probe: {', '.join(f'{m} from {s}' for m, s in plan.sources.items())}", file=sys.stderr)
        print(f"probe: {room}; {len(plan.vectors)} feature vectors", file=sys.stderr, flush=True)

    probes = folder.path / "probes"
    work = plan.store.missing()
    groups = groups_of(plan.vectors, plan.store, plan.classes * len(settings.probe.penalties), me.device)
    groups = [group for group in groups if any(kept(probes, vector) is None for vector in group)]
    for vit in plan.reader.vits.values():
        vit.to(me.device, torch.bfloat16 if settings.train.bf16 else torch.float32)
        if settings.train.compile:
            for block in vit.blocks:
                block.compile()

    def loader_of(split: Split) -> data.Loader:
        return data.eval_loader(
            split.path, indices=split.indices, batch_size=settings.probe.batch_size, device=me.device,
            dtype=next(iter(plan.reader.vits.values())).patch_embed.proj.weight.dtype,
            crop_pct=settings.data.crop_pct, workers=settings.data.workers,
            **{key: plan.given[key] for key in ("image_size", "mean", "std")},
        )  # fmt: skip

    try:
        should_stop.raise_if_set(me.device)  # nobody writes before all have looked
        if groups:
            mine = np.array_split(np.arange(len(work)), me.size)[me.rank]  # neighbours: one pass through the file
            made = extract(plan.reader, plan.store, [work[i] for i in mine], loader_of)
            together(made, -(-len(work) // me.size), "features", should_stop, me)
            mine = groups[me.rank :: me.size]
            fitted = fit_groups(plan.store, mine, plan.classes, settings.probe, probes, me.device)
            together(fitted, -(-len(groups) // me.size), "probes", should_stop, me)
    except Stopped:
        if me.rank == 0:
            print("stopped by a signal, all is saved; run the same command again", file=sys.stderr, flush=True)
        leave()
        return STOPPED
    if me.rank == 0:
        fits = [kept(probes, vector) for vector in plan.vectors]
        print(report(folder.path, fits, plan.record), flush=True)
        if not settings.probe.keep_features:
            plan.store.remove()
    leave()
    return 0


def check(settings: Settings) -> None:
    """Data and labels, before anything is built. Raises UserError, ValueError or OSError, in one line."""
    check_labels(data.inspect(data.resolve(settings.data.train, "train")), test_sets(settings))


def make_plan(settings: Settings, folder: StageFolder) -> Plan:
    """Check the data, build the models, and say what will be read of them.

    Raises:
        UserError, ValueError, OSError: one line on what does not fit.
    """
    options = settings.probe
    infos = test_sets(settings)
    train = data.inspect(data.resolve(settings.data.train, "train"))
    classes = check_labels(train, infos)
    vits, sources, given = models_of(settings, folder.run)
    pools = {}
    for model, vit in vits.items():
        have = ["mean", "prefix", "both"] if vit.num_prefix_tokens else ["mean"]
        wanted = options.pooling or have
        if not set(wanted) <= set(have):
            raise UserError(f"probe.pooling {wanted}: the {model} has no prefix token; use mean")
        pools[model] = wanted[0] if len(wanted) == 1 else "both"
    reader = Reader(vits, options.modules or MODULES, pools)

    lots = np.argsort(data.lots(train.num_samples, settings.train.seed), kind="stable")
    held = round(options.validation * train.num_samples)
    parts = {"fit": lots[held:][: options.images], "validation": lots[:held]}
    if not all(len(part) for part in parts.values()):
        raise UserError(f"probe.validation {options.validation}: leaves {len(parts['fit'])} images to fit on and "
                        f"{len(parts['validation'])} to choose on, of {train.num_samples} in {train.path}")  # fmt: skip
    splits = [Split(name, train.path, np.sort(part)) for name, part in parts.items()]
    splits += [Split(name, info.path, np.arange(info.num_samples)) for name, info in infos.items()]
    store = Store(folder.path / "features", reader.arrays, splits, options.batch_size, options.dtype)
    vectors = vectors_of(reader.arrays, options.pooling or ["mean", "prefix", "both"])
    record = {
        "models": {m: {"from": s, "sha256": models.fingerprint(vits[m])} for m, s in sources.items()},
        "data": {
            name: {"path": str(info.path), "images": info.num_samples, "sha256": info.sha256}
            for name, info in {"train": train, **infos}.items()
        },
        "split": {name: len(part) for name, part in parts.items()},
    }
    return Plan(reader, sources, store, vectors, classes, given, record)


def test_sets(settings: Settings) -> dict[str, data.Info]:
    """The test sets by name, `val` (`data.val`) first. Raises UserError where there is none, or a name twice."""
    specs = {"val": settings.data.val} if settings.data.val else {}
    for pair in settings.probe.test:
        name, _, spec = pair.partition("=")
        if name in specs or name in ("fit", "validation"):
            raise UserError(f"probe.test {pair}: the name {name} is taken; choose another")
        specs[name] = spec
    if not specs:
        raise UserError("data.val null: no images are left to report on; give it, or --probe.test NAME=FILE")
    return {name: data.inspect(data.resolve(spec, "val")) for name, spec in specs.items()}


def check_labels(train: data.Info, tests: dict[str, data.Info]) -> int:
    """Number of classes; raises UserError where a file has no labels, or other classes than the training images."""
    for name, info in {"train": train, **tests}.items():
        if not info.has_labels:
            raise UserError(f"{_setting(name)} {info.path}: has no labels, which a probe is fitted and judged on")
    classes = len(train.classes) if train.classes else train.max_label + 1
    for name, info in tests.items():
        if train.classes and info.classes and train.classes != info.classes:
            pairs = enumerate(zip(train.classes, info.classes, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(train.classes), len(info.classes)))
            said = [repr(c[at]) if at < len(c) else "missing" for c in (info.classes, train.classes)]
            raise UserError(f"{_setting(name)} {info.path}: has other classes than data.train: class {at} is "
                            f"{said[0]}, there {said[1]}")  # fmt: skip
        if info.max_label >= classes:
            raise UserError(f"{_setting(name)} {info.path}: has labels up to {info.max_label}, outside the {classes} "
                            "classes of data.train")  # fmt: skip
    return classes


def models_of(settings: Settings, run: Path) -> tuple[dict[str, nn.Module], dict[str, str], dict[str, Any]]:
    """Models, and where each comes from, by their names in `probe.models`; and how images are given to them."""
    teacher = build_teacher(settings)
    if not isinstance(teacher, VisionTransformer | Eva):
        raise UserError(f"teacher.name {settings.teacher.name}: {type(teacher).__name__} is no VisionTransformer or "
                        "Eva of timm, whose modules can be read; choose a ViT such as vit_*")  # fmt: skip
    given = input_of(settings, teacher)
    chosen = settings.teacher
    vits: dict[str, nn.Module] = {"teacher": teacher}
    sources = {"teacher": chosen.weights or (chosen.name if chosen.pretrained else "random weights")}
    if "student" in settings.probe.models:
        vits["student"], sources["student"] = student_of(settings, teacher, run, given["image_size"])
    wanted = [model for model in vits if model in settings.probe.models]
    return {m: vits[m].requires_grad_(False) for m in wanted}, {m: sources[m] for m in wanted}, given


def student_of(settings: Settings, teacher: nn.Module, run: Path, image_size: int) -> tuple[nn.Module, str]:
    """The newest stage's export in the run folder, or `student.parent`; without one, the teacher's copied weights."""
    exports = [run / f"stage{n}" / "export" for n in (3, 2, 1)]
    found = next((path for path in exports if (path / "config.json").is_file()), None)
    parent = settings.student.parent
    parent = found if parent is None else None if parent == "none" else Path(parent)
    if parent is None:
        student = convert(settings, teacher)
        return student, "the teacher's copied weights, no stage's"
    theirs = check_lineage(parent, {"teacher": teacher_lineage(settings, teacher)}, TEACHER_FIELDS)
    stages = theirs["stages"] or ["none"]
    return models.backbone_of(models.load(parent, image_size)), f"{parent} (after stage {' and '.join(stages)})"


def check_same(path: Path, record: dict[str, Any]) -> None:
    """Raises UserError, naming what differs, when `path` tells of other models or data."""
    if not path.is_file():
        return
    try:
        before = json.loads(path.read_text())
        difference = first_difference(before, json.loads(json.dumps(record)))
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: damaged; remove {path.parent} to start again") from error
    if difference:
        raise UserError(
            f"{path.parent}: was made of others: {difference}; remove it to start again, or use another --run"
        )


def together(work: Iterable[None], rounds: int, what: str, should_stop: StopFlag, me: World) -> None:
    """Let each rank do a piece of its work a round. Raises Stopped on all ranks after one in which a signal came."""
    work = iter(work)
    for _ in tqdm(range(rounds), desc=what, disable=None if me.rank == 0 else True, dynamic_ncols=True, leave=False):
        next(work, None)
        should_stop.raise_if_set(me.device)
    next(work, None)  # what is left to do once all pieces are done


def describe(settings: Settings, plan: Plan) -> str:
    """The text of `--dry_run`."""
    counts = {name: len(split.indices) for name, split in plan.store.splits.items()}
    lines = [
        *(f"{model}: {source}" for model, source in plan.sources.items()),
        f"classes: {plan.classes}",
        *(f"images, {name}: {count:,}" for name, count in counts.items()),
        f"features: {plan.store.check_room()}",
        f"probes: {len(plan.vectors)} feature vectors x {len(settings.probe.penalties)} penalties, "
        f"{settings.probe.solver}",
    ]
    return "\n".join(lines)


def _setting(name: str) -> str:
    return f"data.{name}" if name in ("train", "val") else f"probe.test {name}"
