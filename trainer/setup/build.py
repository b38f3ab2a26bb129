"""From settings to what a stage runs on: data, teacher, student and lineage, checked before anything is trained."""

import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import data
import models
from trainer.config import Settings, UserError, stage_of
from trainer.engine.engine import accumulation
from trainer.output.paths import stage_path
from trainer.ranks.world import World
from trainer.setup import resolution
from trainer.setup.cache import inspect_data
from trainer.setup.hybrid import chosen_blocks
from trainer.setup.student import build_student
from trainer.setup.teacher import build_teacher, input_of, is_trained
from trainer.stages.base import Stage


@dataclass
class Job:
    """One stage, ready for the engine."""

    stage: Stage
    start: str  # where the student's weights come from, and which images it sees, in words
    export: dict[str, Any]  # config.json of what the stage will export, lineage included
    train: data.Info
    val: data.Info | None
    steps_per_epoch: int
    steps: int
    sizes: list[resolution.Phase]  # of the training images
    images: str = ""  # how images reach the model, and how a batch is split, in words
    notes: list[str] = field(default_factory=list)  # what the user should know before the run, a line each


def build(settings: Settings, me: World) -> Job:
    """Check the data, build teacher and student, and wire them into the stage.

    Raises:
        UserError, ValueError, FileNotFoundError: one line on what does not fit.
    """
    kind, infos = stage_of(settings), inspect_data(settings)
    accumulate = accumulation(settings, me.size)
    kind.check(settings, infos, settings.train.batch_size // me.size // accumulate)
    shapes_alone = settings.dry_run and not is_trained(settings)  # of any size, at no cost
    with warnings.catch_warnings(record=True) as caught, torch.device("meta") if shapes_alone else nullcontext():
        warnings.simplefilter("always", UserWarning)
        teacher = build_teacher(settings)
    models.check_linearizable(teacher)
    rope = getattr(teacher, "rope", None)
    if settings.teacher.shard and rope is not None and list(rope.parameters()):
        raise UserError(f"teacher.shard: {settings.teacher.name} learns its rotary frequencies, which are read whole; "
                        "leave it off")  # fmt: skip
    needs_teacher = kind.needs_teacher(settings)
    if needs_teacher and not is_trained(settings) and not shapes_alone:
        raise UserError(f"teacher.pretrained false: stage {settings.stage} aligns with a trained teacher; "
                        "give its file with --teacher.weights FILE")  # fmt: skip
    given = input_of(settings, teacher)
    keep, chosen_how = chosen_blocks(settings, teacher, given, infos["train"], kind.previous, me)
    student, start, lineage = build_student(settings, teacher, given["image_size"], kind.previous, keep)
    num_classes = kind.head_classes(settings, infos, student)
    seen = {"stage": settings.stage, "train": Path(settings.data.train).name, "sha256": infos["train"].sha256}
    seen |= {"image_size": given["image_size"], "trained": settings.student.trainable or kind.trainable}
    seen |= {"val": infos["val"].sha256 if "val" in infos else None}
    seen |= {f"{split}_samples": info.samples for split, info in infos.items()}
    lineage |= {"stages": [*lineage["stages"], settings.stage], "data": [*lineage["data"], seen]}

    beside = teacher if needs_teacher or (kind.compares and is_trained(settings)) else None
    stage = kind(settings, student, beside, num_classes, infos)
    if not any(p.requires_grad for p in stage.parameters()):
        which = settings.student.trainable
        raise UserError(f"student.trainable {which}: the student has no such parameters; choose another")
    chosen = settings.teacher
    name, kwargs = models.architecture(chosen.name, chosen.kwargs)
    kwargs |= {"num_classes": models.backbone_of(stage.student).num_classes, "img_size": given["image_size"]}
    export = {
        "backbone": {"name": name, "kwargs": kwargs},
        "attention": {
            "operator": lineage["operator"],
            "kwargs": lineage["operator_kwargs"],
            "additions": lineage["additions"],
            "linear_blocks": lineage["linear_blocks"],
        },
        "input": given,
        "lineage": lineage,
        **stage.export_config(),
    }
    steps_per_epoch = infos["train"].num_samples // settings.train.batch_size
    steps = settings.train.steps or max(1, round(settings.train.epochs * steps_per_epoch))
    sizes = resolution.phases(settings.data.resolutions, given["image_size"], steps)
    for size, _ in sizes[:-1]:
        models.check_image_size(teacher, size, "data.resolutions")
    if len(sizes) > 1:
        start += f"; {resolution.in_words(sizes)}"
        for vit in (teacher, student):
            models.take_any_size(vit)
    job = Job(stage, start, export, infos["train"], infos.get("val"), steps_per_epoch, steps, sizes)
    job.images = _in_words(settings, models.backbone_of(stage.student), given, me.size, accumulate)
    said = [str(warning.message) for warning in caught if warning.category is UserWarning]  # timm's notes among it
    said += [chosen_how] if chosen_how else []
    job.notes += [*dict.fromkeys(said), *stage.notes(), *_notes(settings, steps)]
    return job


def _in_words(settings: Settings, vit: models.ViT, given: dict[str, Any], ranks: int, accumulate: int) -> str:
    size = " x ".join(map(str, resolution.pair(given["image_size"])))
    tokens, prefix = vit.patch_embed.num_patches + vit.num_prefix_tokens, vit.num_prefix_tokens
    mean, std = (" ".join(f"{value:g}" for value in given[key]) for key in ("mean", "std"))
    batch, of_ranks = settings.train.batch_size, f"{ranks} rank{'s' if ranks > 1 else ''}"
    return (
        f"images of {size} pixels, {tokens} tokens ({prefix} of them prefix), areas averaged, mean {mean}, std {std}; "
        f"batches of {batch}: {of_ranks} x {accumulate} x {batch // ranks // accumulate}"
    )


def in_one_line(settings: Settings, job: Job, me: World, start: str) -> str:
    """What a run is, as its first line on the screen: model, tokens, how a batch is split, where it starts and writes.

    Args:
        start: where it starts from, in words.
    """
    vit, shown = models.backbone_of(job.stage.student), job.export["attention"]
    size = " x ".join(map(str, resolution.pair(job.export["input"]["image_size"])))
    tokens, batch = vit.patch_embed.num_patches + vit.num_prefix_tokens, settings.train.batch_size
    accumulate, linear, depth = accumulation(settings, me.size), len(shown["linear_blocks"]), len(vit.blocks)
    operator = " + ".join((shown["operator"], *shown["additions"])) if linear else "softmax"
    blocks = f" in {linear} of {depth} blocks" if 0 < linear < depth else ""
    split = f"{me.size} rank{'s' * (me.size > 1)} x {accumulate} x {batch // me.size // accumulate}"
    return (
        f"stage {settings.stage}, {job.stage.name}: {settings.teacher.name}, {operator}{blocks}, from {start}, to step "
        f"{job.steps}; {size} pixels, {tokens} tokens; batch {batch} = {split}; "
        f"in {stage_path(settings.run, settings.stage)}"
    )


def _notes(settings: Settings, steps: int) -> list[str]:
    warmup = settings.train.warmup_steps
    if warmup < steps:
        return []
    return [f"train.warmup_steps {warmup}: the run has {steps} steps, so the learning rate never reaches train.lr "
            f"{settings.train.lr:g}; give fewer, or train longer"]  # fmt: skip


def check_unchanged(settings: Settings, job: Job, step: int, kept: dict[str, Any], before: dict[str, Any]) -> None:
    """Raises UserError when teacher, images or parent are not those that the run had.

    Files are compared by what they hold, wherever they lie. Those whose hash is not known are compared by their paths.

    Args:
        step: up to which the run came.
        kept: the lineage that its checkpoint, or its export, tells of.
        before: its settings.
    """
    now = job.export["lineage"]
    had, has = kept["data"][-1], now["data"][-1]
    files = (
        ("teacher", "weights", kept["teacher"].get("sha256"), now["teacher"]["sha256"]),
        ("data", "train", had.get("sha256"), has["sha256"]),
        ("data", "val", had.get("val"), has["val"]),
    )
    for group, name, was, is_now in files:
        path = getattr(getattr(settings, group), name)
        samples = f"{name}_samples"
        if group == "data" and had.get(samples) and had[samples] == has.get(samples):
            continue  # written again, by several processes: the same samples elsewhere in the file
        if was != is_now if None not in (was, is_now) else before[group].get(name) != path:
            named = path or settings.teacher.name
            raise UserError(
                f"{group}.{name} {named}: is not what this run had up to step {step}; put it back, or use another --run"
            )
    if kept.get("parent", now["parent"]) != now["parent"]:
        what = "appeared" if kept["parent"] is None else "is gone" if now["parent"] is None else "changed"
        raise UserError(
            f"student.parent {job.start}: the export that the stage starts from {what} since step {step}; "
            "put back what was there, or use another --run"
        )
