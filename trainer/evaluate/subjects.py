"""The models that are judged: teacher, student and others beside them, and how each wants its images."""

import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import models
from trainer.config import Settings, UserError
from trainer.setup.resolution import Size, pair, plain
from trainer.setup.student import convert
from trainer.setup.teacher import INPUT_KEYS, TEACHER_FIELDS, build_teacher, check_lineage, is_trained, teacher_lineage


@dataclass
class Subject:
    """A model that is judged.

    Attributes:
        model: a timm model, or a `Segmenter` around one.
        source: where its weights come from, in words.
        architecture: timm's name.
        config: of its export; empty without one.
    """

    name: str
    model: nn.Module
    source: str
    architecture: str
    config: dict[str, Any] = field(default_factory=dict)
    _normalise: tuple[Tensor, Tensor] | None = None

    @property
    def net(self) -> nn.Module:
        """The timm model itself."""
        return models.backbone_of(self.model)

    @property
    def segments(self) -> bool:
        """Whether it gives masks."""
        return isinstance(self.model, models.Segmenter)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self.model.parameters()).device

    @property
    def has_patches(self) -> bool:
        """Whether it is a ViT, of whose patches there are features."""
        return isinstance(self.net, models.ViT)

    @property
    def classes(self) -> int:
        """Of its own classifier; 0 where it has none. What CLIP's head gives are features."""
        classes = 0 if self.segments or "clip" in self.architecture else self.net.num_classes
        return classes if classes > 1 else 0

    def place(self, device: torch.device, dtype: torch.dtype, given: dict[str, Any]) -> None:
        """Move it. `given` is how the images are normalised that it will see."""
        self.model.eval().requires_grad_(False).to(device, dtype)
        if self.name in ("teacher", "student"):
            return
        own = self.net.pretrained_cfg
        mean, std, own_mean, own_std = (
            torch.tensor(values, device=device, dtype=torch.float32).view(3, 1, 1)
            for values in (given["mean"], given["std"], own["mean"], own["std"])
        )
        if not (torch.equal(mean, own_mean) and torch.equal(std, own_std)):
            self._normalise = std / own_std, (mean - own_mean) / own_std

    def seen(self, image: Tensor) -> Tensor:
        """Images [B, 3, H, W] as this model wants them."""
        if self._normalise is not None:
            scale, shift = self._normalise
            image = image.float() * scale + shift
        return image.to(next(self.model.parameters()).dtype)


def subjects_of(settings: Settings) -> tuple[dict[str, Subject], dict[str, Any], list[str]]:
    """The models by name; how images are given to them; and what the user should know, a line each.

    Raises:
        UserError, ValueError, OSError: one line on what cannot be had, or does not fit.
    """
    options, source = settings.evaluate, source_of(settings)
    wanted, notes = options.models or ["teacher", "student"], []
    student = None if source is None else opened("student", source, settings.data.image_size)
    config = {} if student is None else student.config
    if student is not None:  # it says how it was shown its images, where the settings do not
        size = settings.data.image_size or plain(size_of(student.net))
        shown = {key: getattr(settings.data, key) or (config.get("input") or {}).get(key) for key in ("mean", "std")}
        settings = replace(settings, data=replace(settings.data, image_size=size, **shown))
    teacher = None
    if "teacher" in wanted or settings.student.parent == "none":
        teacher, note = teacher_of(settings, config, must="teacher" in (options.models or ()))
        notes += [note] if note else []
    if teacher is not None and student is not None and "lineage" in config:
        ours = {"teacher": teacher_lineage(settings, teacher.model)}
        check_lineage(models.folder_of(source), ours, TEACHER_FIELDS)
    if student is None and teacher is not None and settings.student.parent == "none":
        copied = convert(settings, teacher.model)
        student = Subject("student", copied, "the teacher's copied weights, no stage's", teacher.architecture)
    if student is None and options.models and "student" in options.models:
        raise UserError(
            f"evaluate.models {options.models}: {settings.run} has no export; give one with --student.parent"
        )
    found = {s.name: s for s in (teacher, student) if s is not None and s.name in wanted}
    if not found:
        raise UserError(
            "which model to judge is missing; give --student.parent EXPORT, --teacher.name NAME or a --run with exports"
        )
    given = given_to(settings, next(iter(found.values())).net)
    for name, _, place in (each.partition("=") for each in options.beside):
        found[name] = opened(name, place, given["image_size"])
    return found, given, notes


def opened(name: str, source: str, size: Size | None) -> Subject:
    """A model by whatever names it, see `models.open_model`."""
    model = models.open_model(source, None if size is None else pair(size))
    if models.is_name(source):
        return Subject(name, model, source, models.architecture(source)[0])
    config = models.read_config(models.folder_of(source))
    stages = (config.get("lineage") or {}).get("stages")
    after = f" (after stage {' and '.join(stages)})" if stages else ""
    return Subject(name, model, f"{source}{after}", config["backbone"]["name"], config)


def size_of(net: nn.Module) -> tuple[int, int]:
    """(height, width) in pixels that a model is built for; not every one is a ViT."""
    own = getattr(getattr(net, "patch_embed", None), "img_size", None)
    return tuple(own or net.pretrained_cfg["input_size"][-2:])


def given_to(settings: Settings, net: nn.Module) -> dict[str, Any]:
    """`INPUT_KEYS`: how images are given; from the settings, else as the model wants them."""
    given = vars(settings.data) | {"image_size": settings.data.image_size or plain(size_of(net))}
    given = {key: net.pretrained_cfg[key] if given[key] is None else given[key] for key in INPUT_KEYS}
    models.check_image_size(net, given["image_size"])
    return given


def source_of(settings: Settings) -> str | None:
    """Where the student is: `student.parent`, else the run's newest export; None for neither, or for `none`."""
    if settings.student.parent is not None:
        return None if settings.student.parent == "none" else settings.student.parent
    exports = (Path(settings.run) / f"stage{n}" / "export" for n in (3, 2, 1))
    return next((str(path) for path in exports if (path / "config.json").is_file()), None)


def teacher_of(settings: Settings, config: dict[str, Any], must: bool) -> tuple[Subject | None, str]:
    """The teacher that the settings name, else the one that the student's export tells of; and why there is none.

    Args:
        config: of the student's export.
        must: it is asked for; that it cannot be had is then an error.
    """
    chosen, lineage = settings.teacher, (config.get("lineage") or {}).get("teacher")
    told = chosen.name is None and isinstance(lineage, dict) and isinstance(lineage.get("name"), str)
    if chosen.name is None and not told and not must:
        return None, ""
    if told:  # the settings are those that the lineage is compared with
        settings.teacher = chosen = replace(chosen, name=lineage["name"], kwargs=lineage.get("kwargs") or {})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = build_teacher(settings)
        if told and teacher_lineage(settings, model)["sha256"] != lineage.get("sha256"):
            raise ValueError("the student's teacher had other weights; give their file with --teacher.weights FILE")
    except ValueError as error:
        if not told or must:
            raise
        return None, f"without the teacher {chosen.name}: {error}"
    source = chosen.weights or (chosen.name if is_trained(settings) else "random weights")
    return Subject("teacher", model, source, models.architecture(chosen.name, chosen.kwargs)[0]), ""
