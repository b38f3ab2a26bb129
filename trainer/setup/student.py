"""The student: the teacher with linear attention, or an earlier stage's export; and the lineage that says which."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import models
from trainer.config import Settings, UserError
from trainer.fields import count_of
from trainer.output.paths import is_begun, is_complete, stage_path
from trainer.setup.resolution import Size, pair
from trainer.setup.teacher import OPERATOR_FIELDS, check_lineage, is_trained, teacher_lineage
from trainer.stages import STAGES


class Student(NamedTuple):
    """A student, where it starts from in words, and its lineage so far."""

    vit: models.ViT
    start: str
    lineage: dict[str, Any]


def build_student(
    settings: Settings, teacher: models.ViT, image_size: Size, previous: str | None, keep_softmax: Collection[int]
) -> Student:
    """The student that a stage starts from.

    Args:
        image_size: pixels, of the stage's images.
        previous: the stage whose export it starts from, in the same run folder.
        keep_softmax: what `student.keep_softmax` comes to.

    Raises:
        UserError, ValueError, OSError: one line on what does not fit.
    """
    wanted = settings.student
    softmax = wanted.attention == "softmax"
    keep = range(len(teacher.blocks)) if softmax else keep_softmax
    student = convert(settings, teacher, keep)
    lineage = {
        "teacher": teacher_lineage(settings, teacher),
        **{field: getattr(wanted, field) for field in OPERATOR_FIELDS},
        "linear_blocks": models.linear_blocks(student),
        "stages": [],
        "data": [],
        "parent": None,
    }
    if softmax:
        start = "the teacher's weights" if is_trained(settings) else "random weights"
        return Student(student, f"{start}, softmax attention", lineage)
    if not lineage["linear_blocks"]:
        raise UserError(f"student.keep_softmax {wanted.keep_softmax}: leaves no block to convert; keep fewer, "
                        "or for the baseline of stage 3 give --student.attention softmax")  # fmt: skip
    parent = parent_of(settings, previous)
    if parent is None:
        start = "the teacher's copied weights" + (", no earlier stage's" if previous else "")
        return Student(student, start, lineage)
    theirs = check_lineage(parent, lineage)
    config = models.read_config(parent)
    theirs["parent"] = config.get("digest")
    start = f"{parent} (after stage {' and '.join(theirs['stages'])})"
    found = models.backbone_of(models.load(parent, pair(image_size)))
    was = config.get("input", {}).get("image_size")
    if was != image_size and found.pos_embed is not None:
        # Resized once from the teacher's own, rather than again from the parent's, where they were never trained.
        frozen = all(isinstance(e, dict) and e.get("trained") in ("qkv", "attention", "head") for e in theirs["data"])
        if frozen:
            found.pos_embed = student.pos_embed
        start += f", position embeddings resized from {'the teacher' if frozen else f'its {was} pixels'}"
    return Student(found, start, theirs)


def convert(settings: Settings, teacher: models.ViT, keep_softmax: Collection[int] | None = None) -> models.ViT:
    """The teacher with the student's attention, every weight copied. Raises ValueError for what there is not."""
    wanted = settings.student
    keep = wanted.keep_softmax if keep_softmax is None else keep_softmax
    if isinstance(keep, str):  # which ones is not known yet
        keep = range(check_count(keep, len(teacher.blocks)))
    return models.linearize(teacher, wanted.operator, keep, wanted.operator_kwargs, wanted.additions)


def check_count(keep_softmax: str, depth: int) -> int:
    """The K of `auto:K`. Raises UserError where a model of `depth` blocks has no block left to convert."""
    count = count_of(keep_softmax)
    if count >= depth:
        raise UserError(f"student.keep_softmax {keep_softmax}: the model has {depth} blocks; keep fewer")
    return count


def parent_of(settings: Settings, previous: str | None) -> Path | None:
    """The export that the stage starts from; None: the teacher's weights.

    Raises:
        UserError: an earlier stage was begun in the run folder and is not finished, or a later one is missing.
    """
    wanted = settings.student.parent
    if wanted == "none" or previous is None:
        return None
    if wanted is not None:
        return Path(wanted)
    earlier = list(STAGES)[: list(STAGES).index(settings.stage)]
    for stage in reversed(earlier):
        path = stage_path(settings.run, stage)
        if is_complete(path) and stage == previous:
            return path / "export"
        if is_complete(path):
            missing = stage_path(settings.run, previous)
            raise UserError(
                f"{missing}: is missing, while stage {stage} is done; run --stage {previous} first, or skip it with "
                f"--student.parent {path / 'export'}"
            )
        if is_begun(path):
            raise UserError(
                f"{path}: stage {stage} is not finished; finish it (--stage {stage} --run {settings.run}), or start "
                "from the teacher's weights with --student.parent none"
            )
    return None
