"""The teacher, how images are given to it, and what an export says of it."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

import models
from trainer.config import Settings, UserError
from trainer.setup.resolution import pair, plain

INPUT_KEYS = ("image_size", "mean", "std", "crop_pct")
TEACHER_FIELDS = ("teacher.name", "teacher.kwargs", "teacher.sha256")
OPERATOR_FIELDS = ("operator", "operator_kwargs", "additions")


def build_teacher(settings: Settings) -> nn.Module:
    """The timm model that `settings.teacher` names, at the images' size.

    Raises:
        UserError: no name is given.
        ValueError, OSError: see `models.build_backbone`.
    """
    chosen, size = settings.teacher, settings.data.image_size
    if chosen.name is None:
        raise UserError("teacher.name: which ViT to convert is missing; give timm's name with --teacher.name NAME")
    torch.manual_seed(settings.train.seed)  # what is not loaded, such as a new head, starts alike on all ranks
    return models.build_backbone(
        chosen.name,
        chosen.kwargs,
        chosen.weights,
        chosen.pretrained,
        None if size is None else pair(size),
        weights_key=chosen.weights_key,
        mapped=True,
    )


def is_trained(settings: Settings) -> bool:
    """Whether the teacher has weights, from a file or the hub."""
    return settings.teacher.pretrained or settings.teacher.weights is not None


def input_of(settings: Settings, teacher: nn.Module) -> dict[str, Any]:
    """`INPUT_KEYS` and `interpolation`: how images reach the model; from the settings, else the teacher's own."""
    size = plain(settings.data.image_size or teacher.patch_embed.img_size)
    given = vars(settings.data) | {"image_size": size}
    given = {key: teacher.pretrained_cfg[key] if given[key] is None else given[key] for key in INPUT_KEYS}
    models.check_image_size(teacher, given["image_size"])
    return given | {"interpolation": "box"}  # the loaders average areas


def teacher_lineage(settings: Settings, teacher: nn.Module) -> dict[str, Any]:
    """What an export says of the teacher that it comes from."""
    chosen = settings.teacher
    # Of a local file all its tensors; else the blocks, which change with no image size and no head.
    sha256 = None  # of shapes alone, as a dry run without weights has them
    if not next(teacher.parameters()).is_meta:
        sha256 = models.fingerprint(models.read_weights(chosen.weights) if chosen.weights else teacher.blocks)
    return {"name": without_folder(chosen.name), "kwargs": chosen.kwargs, "sha256": sha256}


def without_folder(name: Any) -> Any:
    """A teacher's name as a lineage has it: of a folder on this disk, as in `local-dir:FOLDER`, its own name alone."""
    source, colon, place = name.partition(":") if isinstance(name, str) else ("", "", "")
    folder = Path(place).expanduser() if colon else Path()
    return f"{source}:{folder.name}" if colon and (folder.is_absolute() or folder.is_dir()) else name


def check_lineage(
    parent: Path, ours: dict[str, Any], fields: tuple[str, ...] = (*TEACHER_FIELDS, *OPERATOR_FIELDS, "linear_blocks")
) -> dict[str, Any]:
    """A parent export's lineage; raises UserError, naming the field, where it is not of our teacher and student."""
    theirs = models.read_config(parent).get("lineage")
    if isinstance(theirs, dict) and "feature_map" in theirs:  # of an earlier version
        theirs |= {"operator": theirs.pop("feature_map"), "operator_kwargs": {}, "additions": []}
    of_teacher = theirs.get("teacher") if isinstance(theirs, dict) else None
    if isinstance(of_teacher, dict) and "name" in of_teacher:
        of_teacher["name"] = without_folder(of_teacher["name"])  # earlier versions had all of it
    for field in (*fields, "stages", "data"):
        try:
            was = _get(theirs, field)
            now = was if field in ("stages", "data") else _get(ours, field)  # those two grow from stage to stage
            assert field not in ("stages", "data") or isinstance(was, list)
            assert field != "stages" or all(isinstance(stage, str) for stage in was)
        except (KeyError, TypeError, AssertionError) as error:
            raise UserError(f"{parent}/config.json: damaged, its lineage has no {field}; make the export again, "
                            "or choose another with --student.parent") from error  # fmt: skip
        if was != now:
            raise UserError(f"{parent}: does not fit as a parent: its {field} is {was!r}, this run's is {now!r}; "
                            "mend the setting, or choose another with --student.parent")  # fmt: skip
    return theirs


def _get(nested: dict[str, Any], path: str) -> Any:
    for key in path.split("."):
        nested = nested[key]
    return nested
