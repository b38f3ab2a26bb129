"""The model card of an export, `README.md`: what it is, from what, how good, how to load it, under which licence."""

from collections.abc import Mapping, Sequence
from typing import Any

import timm
from huggingface_hub import ModelCardData

CARD = "README.md"
UNKNOWN = "unknown"
_WORDS = {
    "top1": "top-1 (%)", "top5": "top-5 (%)", "miou": "mIoU (%)", "pixel_accuracy": "pixel accuracy (%)",
    "feature_cosine": "cosine of its final features to the teacher's", "teacher_top1": "top-1 of the teacher (%)",
    "teacher_top5": "top-5 of the teacher (%)", "loss": "loss",
}  # fmt: skip


def licence_of(teacher: str) -> str | None:
    """The licence of a timm model's published weights, as timm says it; None where it says nothing."""
    found = timm.models.get_pretrained_cfg(teacher, allow_unregistered=True) if ":" not in teacher else None
    return getattr(found, "license", None)


def model_card(
    config: Mapping[str, Any],
    licence: str | None = None,
    figures: Mapping[str, float] | None = None,
    measured_on: str | None = None,
    commands: Sequence[str] = (),
    title: str | None = None,
) -> str:
    """The text of the card.

    Args:
        config: of the export, see `models.save`.
        licence: of the weights that it was made from; None: it is not known.
        figures: by the names that a stage's metrics have; of the last evaluation.
        measured_on: the name of the images whose validation part they are of.
        commands: that made it, a line each.
        title: by default the teacher's name and `linear`.
    """
    lineage = config.get("lineage") or {}
    teacher = (lineage.get("teacher") or {}).get("name") or config["backbone"]["name"]
    segments, linear = "segmentation" in config, bool(config["attention"]["linear_blocks"])
    kind = "linear" if linear else "softmax"
    what = "whose softmax attention was converted to linear attention with unsoftmax"
    what = what if linear else "with softmax attention, trained by unsoftmax as a baseline"
    head = ModelCardData(
        library_name="timm",
        license=licence or UNKNOWN,
        tags=["unsoftmax", *(["linear-attention"] if linear else []), "timm"],
        pipeline_tag="image-segmentation" if segments else "image-classification" if config.get("classes") else
        "image-feature-extraction",
        base_model=f"timm/{teacher}" if ":" not in teacher and licence else _on_the_hub(teacher),
    )  # fmt: skip
    parts = [
        f"---\n{head.to_yaml()}\n---",
        f"# {title or f'{teacher}, {kind}'}",
        f"A Vision Transformer {what}. {_is_of(config)}",
        "## From what",
        _table(["", ""], _origin(config, teacher)),
        "## Figures",
        _figures(figures, measured_on),
    ]
    if commands:
        parts += ["The commands:", "```\n" + "\n".join(commands) + "\n```"]
    parts += [
        "## Preprocessing",
        _preprocessing(config),
        "## Licence",
        _licence(licence, teacher),
        "## How to load it",
        _loading(segments),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _on_the_hub(teacher: str) -> str | None:
    """The hub's name of a teacher that is called `hf:OWNER/NAME` or `hf-hub:OWNER/NAME`."""
    source, _, place = teacher.partition(":")
    return place if source in ("hf", "hf-hub") and place.count("/") == 1 else None


def _is_of(config: Mapping[str, Any]) -> str:
    if "segmentation" in config:
        return f"It segments images into {config['segmentation']['num_classes']} classes."
    if config.get("classes"):
        return f"It tells {len(config['classes'])} classes."
    return "It gives the features of the teacher."


def _origin(config: Mapping[str, Any], teacher: str) -> list[list[str]]:
    attention, lineage = config["attention"], config.get("lineage") or {}
    blocks = ", ".join(map(str, attention["linear_blocks"])) or "none"
    rows = [
        ["teacher", f"`{teacher}`"],
        ["its weights", f"SHA-256 `{(lineage.get('teacher') or {}).get('sha256', UNKNOWN)}`"],
        ["operator", f"`{attention.get('operator', attention.get('feature_map'))}`"],
        ["additions", ", ".join(f"`{name}`" for name in attention.get("additions") or ()) or "none"],
        ["blocks with linear attention", blocks],
    ]
    for seen in lineage.get("data") or ():
        size = seen.get("image_size")
        size = f", {size if isinstance(size, int) else ' x '.join(map(str, size))} pixels" if size else ""
        said = f"trained {seen.get('trained', UNKNOWN)} on `{seen.get('train', UNKNOWN)}`{size}"
        rows.append([f"stage {seen.get('stage', UNKNOWN)}", said])
    return rows


def _figures(figures: Mapping[str, float] | None, measured_on: str | None) -> str:
    known = [[_WORDS[name], f"{figures[name]:.4g}"] for name in _WORDS if figures and figures.get(name) is not None]
    if not known:
        return "None were measured."
    on = f", on the validation images of `{measured_on}`" if measured_on else ""
    return f"Measured once, at the end of training{on}:\n\n{_table(['', ''], known)}"


def _licence(licence: str | None, teacher: str) -> str:
    if licence is None:
        return "That of the weights that it was made from is not known here. Ask whoever gave them."
    return (
        f"The weights that it was made from: {licence}, as timm says of `{teacher}`. It binds what was made from them."
    )


def _preprocessing(config: Mapping[str, Any]) -> str:
    given = config.get("input") or {}
    rows = [[name.replace("_", " "), f"`{given[name]}`"] for name in
            ("image_size", "mean", "std", "crop_pct", "interpolation") if name in given]  # fmt: skip
    what = "`timm.data.resolve_model_data_config(model)` knows it."
    return f"{what}\n\n{_table(['', ''], rows)}" if rows else "Not recorded."


def _loading(segments: bool) -> str:
    gives = "logits [B, classes, H, W]" if segments else "logits [B, classes]"
    features = "" if segments else "\ntokens = model.forward_features(images)  # [B, N, D]"
    return (
        "With torch, timm and the package `unsoftmax`:\n\n```python\nimport timm\nfrom unsoftmax import load\n\n"
        'model = load("FOLDER")  # or load("hf-hub:OWNER/NAME")\n'
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
        f"output = model(images)  # {gives}{features}\n```"
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])
