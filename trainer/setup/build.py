"""From settings to what a stage runs on: data, teacher, student and lineage, checked before anything is trained."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from torch import nn

import data
import models
from trainer.config import Settings, Teacher, UserError, segments
from trainer.engine.engine import World, accumulation
from trainer.setup import resolution
from trainer.stages import Stage, stage_of

INPUT_KEYS = ("image_size", "mean", "std", "crop_pct")


@dataclass
class Job:
    """One stage, ready for the engine."""

    stage: Stage
    start: str  # where the student's weights come from, and which images it sees, in words
    export: dict[str, Any]  # config.json of what the stage will hand on, lineage included
    train: data.Info
    val: data.Info | None
    steps_per_epoch: int
    steps: int
    sizes: list[resolution.Phase]  # of the training images


def build(settings: Settings, me: World, folder: Path) -> Job:
    """Check the data, build teacher and student, and wire them into the stage.

    Args:
        folder: of the run; the stage's parent is looked for in it.

    Raises:
        UserError, ValueError, FileNotFoundError: one line on what does not fit.
    """
    paths = {split: data.resolve(spec, split) for split in ("train", "val") if (spec := getattr(settings.data, split))}
    infos = {split: data.inspect(path) for split, path in paths.items()}
    steps_per_epoch = infos["train"].num_samples // settings.train.batch_size
    if steps_per_epoch == 0:
        raise UserError(f"train.batch_size {settings.train.batch_size}: {paths['train']} has only "
                        f"{infos['train'].num_samples} images")  # fmt: skip
    micro = settings.train.batch_size // me.size // accumulation(settings, me.size)
    if settings.stage == "3" and settings.stage3.mixup + settings.stage3.cutmix > 0 and micro % 2:
        raise UserError(f"stage3.mixup, cutmix: mix pairs, but a micro-batch has {micro} images; make it even")

    chosen = settings.teacher
    teacher = build_teacher(settings)
    models.check_linearizable(teacher)
    given = input_of(settings, teacher)
    student, start, lineage = _student(settings, teacher, folder, given["image_size"])
    num_classes = num_classes_of(settings, infos, student)
    seen = {"stage": settings.stage, "train": settings.data.train, "sha256": infos["train"].sha256}
    trained = settings.student.trainable or stage_of(settings).trainable
    seen |= {"image_size": given["image_size"], "trained": trained}
    lineage |= {"stages": [*lineage["stages"], settings.stage], "data": [*lineage["data"], seen]}

    untrained = not (chosen.pretrained or chosen.weights)
    if untrained and settings.stage != "3":
        raise UserError(f"teacher.pretrained false: stage {settings.stage} aligns with a trained teacher; "
                        "give its file with --teacher.weights FILE")  # fmt: skip
    resolved = replace(settings, stage3=replace(settings.stage3, num_classes=num_classes))
    stage = stage_of(settings)(resolved, student, None if untrained or segments(settings) else teacher)
    if not any(p.requires_grad for p in stage.parameters()):
        which = settings.student.trainable
        raise UserError(f"student.trainable {which}: the student has no such parameters; choose another")
    name, kwargs = models.architecture(chosen.name, chosen.kwargs)
    kwargs |= {"num_classes": models.backbone_of(stage.student).num_classes, "img_size": given["image_size"]}
    export = {
        "backbone": {"name": name, "kwargs": kwargs},
        "attention": {key: lineage[key] for key in ("feature_map", "linear_blocks")},
        "input": given,
        "lineage": lineage,
    }
    if segments(settings):
        chosen = settings.segmentation
        export["segmentation"] = {"head": chosen.head, "num_classes": num_classes, "kwargs": chosen.kwargs}
        stage.names, stage.palette = infos["train"].mask_classes, infos["train"].palette
        export["segmentation"] |= {"classes": stage.names, "palette": stage.palette}
    steps = settings.train.steps or max(1, round(settings.train.epochs * steps_per_epoch))
    sizes = resolution.phases(settings.data.resolutions, given["image_size"], steps)
    for size, _ in sizes[:-1]:
        models.check_image_size(teacher, size, "data.resolutions")
    if len(sizes) > 1:
        start += f"; {resolution.in_words(sizes)}"
        for vit in (teacher, student):
            models.take_any_size(vit)
    return Job(stage, start, export, infos["train"], infos.get("val"), steps_per_epoch, steps, sizes)


def reading(settings: Settings, job: Job, kept: dict[str, Any] | None) -> dict[str, Any]:
    """The order in which training reads its file, and the window: what `loaders` takes and a checkpoint keeps.

    All ranks call it and take rank 0's choice, since each machine may have another memory. A run that goes on takes
    what it began with (`kept`, of its checkpoint): another order would not show each image once an epoch.
    """
    if kept is None:
        order, window = data.choose_order(job.train.path, settings.data.order, settings.data.window)
        kept = {"order": order, "window": window}
    chosen = [kept]
    dist.broadcast_object_list(chosen, src=0)
    return chosen[0]


def loaders(settings: Settings, job: Job, me: World, reading: dict[str, Any]) -> tuple[data.Loader, data.Loader | None]:
    """Training and evaluation batches for this rank; `reading` is the training data's order and window."""
    given, accumulate = settings.data, accumulation(settings, me.size)
    how = {
        "image_size": job.export["input"]["image_size"], "mean": job.export["input"]["mean"],
        "std": job.export["input"]["std"], "rank": me.rank, "world_size": me.size, "device": me.device,
        "dtype": torch.bfloat16 if settings.train.bf16 else torch.float32, "workers": given.workers,
    }  # fmt: skip
    views = {"scale": tuple(given.scale), "ratio": tuple(given.ratio), "hflip": given.hflip}
    if segments(settings):
        views = {"masks": True, "resize": tuple(given.resize), "hflip": given.hflip, "max_share": given.max_share}
        views["photometric"] = given.photometric

    def train_at(size: resolution.Size) -> data.Loader:
        return data.train_loader(
            job.train.path, batch_size=settings.train.batch_size, accumulate=accumulate, seed=settings.train.seed,
            **views, **reading, **(how | {"image_size": size}),
        )  # fmt: skip

    if len(job.sizes) == 1:
        train = train_at(job.sizes[0].size)
    else:
        train = resolution.PhasedLoader(job.sizes, train_at, job.steps_per_epoch, accumulate)
    if job.val is None:
        return train, None
    micro = settings.train.batch_size // me.size // accumulate
    if segments(settings):
        how = {key: value for key, value in how.items() if key != "image_size"} | {"dtype": torch.float32}
        return train, data.original_loader(job.val.path, batch_size=micro, **how)
    return train, data.eval_loader(job.val.path, batch_size=micro, crop_pct=given.crop_pct, **how)


def build_teacher(settings: Settings) -> nn.Module:
    """The timm model that `settings.teacher` names, at the images' size."""
    chosen, size = settings.teacher, settings.data.image_size
    torch.manual_seed(settings.train.seed)  # what is not loaded, a new head say, starts alike on all ranks
    return models.build_backbone(
        chosen.name, chosen.kwargs, chosen.weights, chosen.pretrained, None if size is None else resolution.pair(size)
    )


def input_of(settings: Settings, teacher: nn.Module) -> dict[str, Any]:
    """`INPUT_KEYS`: how images are given to the model; from the settings, else the teacher's own."""
    size = resolution.plain(settings.data.image_size or teacher.patch_embed.img_size)
    given = vars(settings.data) | {"image_size": size}
    given = {key: teacher.pretrained_cfg[key] if given[key] is None else given[key] for key in INPUT_KEYS}
    models.check_image_size(teacher, given["image_size"])
    return given


def _student(
    settings: Settings, teacher: models.ViT, folder: Path, image_size: resolution.Size
) -> tuple[models.ViT, str, dict[str, Any]]:
    """The student, where it starts from in words, and the lineage so far."""
    chosen, wanted = settings.teacher, settings.student
    softmax = wanted.attention == "softmax"
    keep = range(len(teacher.blocks)) if softmax else wanted.keep_softmax
    student = models.linearize(teacher, wanted.feature_map, keep)
    lineage = {
        "teacher": teacher_lineage(settings, teacher),
        "feature_map": wanted.feature_map,
        "linear_blocks": models.linear_blocks(student),
        "stages": [],
        "data": [],
    }
    if softmax:
        start = "the teacher's weights" if chosen.pretrained or chosen.weights else "random weights"
        return student, f"{start}, softmax attention", lineage
    if not lineage["linear_blocks"]:
        raise UserError(f"student.keep_softmax {wanted.keep_softmax}: leaves no block to convert; keep fewer, "
                        "or for the baseline of stage 3 give --student.attention softmax")  # fmt: skip
    parent = _parent(settings, folder)
    if parent is None:
        return student, "the teacher's copied weights, no earlier stage's", lineage
    theirs = check_lineage(parent, lineage)
    start = f"{parent} (after stage {' and '.join(theirs['stages'])})"
    found = models.backbone_of(models.load(parent, resolution.pair(image_size)))
    was = models.read_config(parent).get("input", {}).get("image_size")
    if was != image_size and found.pos_embed is not None:
        # Resized once from the teacher's own, rather than again from the parent's, where they were never trained.
        frozen = all(isinstance(e, dict) and e.get("trained") in ("qkv", "attention", "head") for e in theirs["data"])
        if frozen:
            found.pos_embed = student.pos_embed
        start += f", position embeddings resized from {'the teacher' if frozen else f'its {was} pixels'}"
    return found, start, theirs


def check_unchanged(settings: Settings, job: Job, found: tuple[Path, dict[str, Any]] | None) -> None:
    """Raises UserError when the teacher's weights or the images are not those that a checkpoint's lineage names."""
    if found is None:
        return
    kept, step = found[1]["lineage"], found[1]["step"]
    before, now = ((of["teacher"]["sha256"], of["data"][-1]["sha256"]) for of in (kept, job.export["lineage"]))
    teacher = f"teacher.weights {settings.teacher.weights or settings.teacher.name}"
    for name, was, is_now in zip((teacher, f"data.train {job.train.path}"), before, now, strict=True):
        if was != is_now and None not in (was, is_now):
            raise UserError(f"{name}: is not what this run had up to step {step}; put it back, or use another --run")


def _hash(chosen: Teacher, teacher: nn.Module) -> str:
    """Of a local file, all its tensors; else of the blocks, which change with no image size and no head."""
    return models.fingerprint(models.read_weights(chosen.weights) if chosen.weights else teacher.blocks)


def teacher_lineage(settings: Settings, teacher: nn.Module) -> dict[str, Any]:
    """What an export says of the teacher that it comes from."""
    chosen = settings.teacher
    return {"name": chosen.name, "kwargs": chosen.kwargs, "sha256": _hash(chosen, teacher)}


TEACHER_FIELDS = ("teacher.name", "teacher.kwargs", "teacher.sha256")


def check_lineage(
    parent: Path, ours: dict[str, Any], fields: tuple[str, ...] = (*TEACHER_FIELDS, "feature_map", "linear_blocks")
) -> dict[str, Any]:
    """A parent export's lineage; raises UserError, naming the field, where it is not of our teacher and student."""
    theirs = models.read_config(parent).get("lineage")
    for field in (*fields, "stages", "data"):
        try:
            was = _get(theirs, field)
            now = was if field in ("stages", "data") else _get(ours, field)  # those two are handed on
            assert field not in ("stages", "data") or isinstance(was, list)
            assert field != "stages" or all(isinstance(stage, str) for stage in was)
        except (KeyError, TypeError, AssertionError) as error:
            raise UserError(f"{parent}/config.json: damaged, its lineage has no {field}; make the export again, "
                            "or choose another with --student.parent") from error  # fmt: skip
        if was != now:
            raise UserError(f"{parent}: does not fit as a parent: its {field} is {was!r}, this run's is {now!r}; "
                            "mend the setting, or choose another with --student.parent")  # fmt: skip
    return theirs


def _parent(settings: Settings, folder: Path) -> Path | None:
    if settings.student.parent == "none" or settings.stage == "1":
        return None
    if settings.student.parent is not None:
        return Path(settings.student.parent)
    found = folder / f"stage{int(settings.stage) - 1}" / "export"
    return found if (found / "config.json").is_file() else None


def num_classes_of(settings: Settings, infos: dict[str, data.Info], student: models.ViT) -> int:
    """Classes of the head that the stage ends with; checks that the labels are among them."""
    if segments(settings):
        num_classes = _num_mask_classes(settings, infos)
        _check_beside(settings, num_classes)
        return num_classes
    finetuning, num_classes = settings.stage == "3", student.num_classes
    if finetuning:
        for split, info in infos.items():
            if not info.has_labels:
                raise UserError(f"data.{split} {info.path}: has no labels, which stage 3 learns from")
        train = infos["train"]
        num_classes = settings.stage3.num_classes or (len(train.classes) if train.classes else train.max_label + 1)
    for split, info in infos.items():
        judged = finetuning or (split == "val" and num_classes > 1)
        if judged and info.has_labels and info.max_label >= num_classes:
            raise UserError(f"data.{split} {info.path}: has labels up to {info.max_label}, "
                            f"outside the head's {num_classes} classes")  # fmt: skip
    return num_classes


def _num_mask_classes(settings: Settings, infos: dict[str, data.Info]) -> int:
    """The same for segmentation."""
    for split, info in infos.items():
        if not info.has_masks or info.mask_classes is None:
            what = "has no JSON beside it, which names the classes of its masks" if info.has_masks else "has no masks"
            raise UserError(f"data.{split} {info.path}: {what}; write it with python -m data.write --task segmentation")
        if info.mask_classes != infos["train"].mask_classes:
            raise UserError(f"data.{split} {info.path}: its masks have other classes than those of data.train "
                            f"{infos['train'].path}; write both with one class table")  # fmt: skip
    num_classes = len(infos["train"].mask_classes)
    if settings.stage3.num_classes not in (None, num_classes):
        raise UserError(f"stage3.num_classes {settings.stage3.num_classes}: data.train has {num_classes} classes; "
                        "leave it out")  # fmt: skip
    return num_classes


def _check_beside(settings: Settings, num_classes: int) -> None:
    """Raises UserError unless `segmentation.beside` is an export that segments into as many classes."""
    beside = settings.segmentation.beside
    if beside is None:
        return
    theirs = models.read_config(beside).get("segmentation", {}).get("num_classes")
    if theirs != num_classes:
        what = "does not segment" if theirs is None else f"has {theirs} classes, the data has {num_classes}"
        raise UserError(f"segmentation.beside {beside}: {what}; give the export of another segmentation, or none")


def _get(nested: dict[str, Any], path: str) -> Any:
    for key in path.split("."):
        nested = nested[key]
    return nested
