"""Every setting, as typed dataclasses: the recipe's YAML first, then the command line; unknown keys are errors.

A recipe's `stages` section holds what differs a stage; it is laid over the rest for the stage that runs, and its part
`segmentation` over that of stage 3 for that task.
"""

import argparse
import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser, Namespace

from trainer.setup import resolution

RECIPES = Path(__file__).parent / "recipes"


class UserError(Exception):
    """A user's mistake: one line that says what, where and how to mend it; the program ends with status 2."""


@dataclass
class Teacher:
    """The softmax ViT that is converted."""

    name: str = "vit_tiny_patch16_224"  # timm's name
    kwargs: dict[str, Any] = field(default_factory=dict)  # architecture overrides for timm.create_model
    weights: str | None = None  # a local .safetensors or .pth; else the hub
    pretrained: bool = True  # False: random weights, for training a softmax teacher in stage 3


@dataclass
class Student:
    """What the teacher is turned into."""

    attention: Literal["linear", "softmax"] = "linear"  # softmax: the baseline of stage 3
    feature_map: str = "elu1"  # a name from models.FEATURE_MAPS
    keep_softmax: list[int] = field(default_factory=list)  # blocks that stay softmax
    trainable: Literal["qkv", "attention", "backbone", "head", "all"] | None = None  # default: qkv, backbone, all
    parent: str | None = None  # an export to start from; "none": the teacher's weights; default: the run's last stage


@dataclass
class Data:
    """Images, as .beton files made by `python -m data.write`."""

    train: str = "digits"  # a .beton file, or digits: the embedded data set
    val: str | None = "digits"
    image_size: int | list[int] | None = None  # pixels, a side or [height, width]; default: the teacher's
    resolutions: list[str] = field(default_factory=list)  # before image_size: 224:0.8, pixels and share of the steps
    mean: list[float] | None = None  # of R, G, B in 0..1; default: the teacher's
    std: list[float] | None = None
    crop_pct: float = 1.0  # share of the shorter side that the evaluation's centre crop keeps
    scale: list[float] = field(default_factory=lambda: [0.25, 1.0])  # area of the random resized crop
    ratio: list[float] = field(default_factory=lambda: [0.75, 1.3333])  # its aspect
    hflip: float = 0.5
    # Segmentation, where scale, ratio and crop_pct count nowhere:
    resize: list[float] = field(default_factory=lambda: [0.5, 2.0])  # before the crop; 1: shorter side to image_size
    max_share: float = 0.75  # of one class in a crop, else another is drawn
    photometric: bool = True  # random brightness, contrast, saturation and hue
    order: Literal["auto", "random", "windowed"] = "auto"  # windowed reads in long runs; auto: for files above memory
    window: int | None = None  # MiB held and shuffled together, over all ranks; default: 2048, or 1/4 of memory
    workers: int | None = None  # decoding threads a rank; default: its share of the cores


@dataclass
class Train:
    """The loop and its optimizer, AdamW."""

    epochs: float = 1.0
    steps: int | None = None  # optimizer steps; wins over epochs
    batch_size: int = 256  # global
    micro_batch_size: int | None = None  # at most, a rank and forward pass; default: without accumulation
    lr: float = 1e-3  # peak; warm-up, then cosine to min_lr
    min_lr: float = 0.0
    warmup_steps: int = 0
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    clip_grad: float = 1.0  # global norm; 0: off
    bf16: bool = True  # weights and activations; masters and optimizer state are fp32
    grad_checkpointing: bool = False
    compile: bool = False
    seed: int = 0
    save_every: int = 1000  # steps
    keep: int = 2  # newest checkpoints, beside the best
    log_every: int = 10
    eval_first: bool = True  # judge before the first step
    eval_every: int = 0  # steps; 0: at the end only
    max_skipped: int = 10  # steps in a row with a non-finite loss or gradient before the run stops


@dataclass
class Stage1:
    """Attention alignment."""

    match: Literal["output", "heads"] = "output"  # after or before the output projection


@dataclass
class Stage2:
    """Feature alignment."""

    loss: Literal["mse", "cosine_smooth_l1"] = "mse"


@dataclass
class Stage3:
    """Supervised fine-tuning."""

    num_classes: int | None = None  # default: as many as the training data has
    reset_head: bool = False  # start from a new head even where the teacher's fits
    layer_decay: float | None = None
    drop_path: float = 0.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    ema: float | None = None  # decay of the weights' moving average, which is then what is judged and exported


@dataclass
class Segmentation:
    """Semantic segmentation, the other task of stage 3: its head, and how it is judged."""

    head: str = "linear"  # a name from models.HEADS
    kwargs: dict[str, Any] = field(default_factory=dict)  # the head's own architecture: {blocks: 4}, {channels: 512}
    head_lr: float = 1.0  # the head's learning rate, times train.lr
    mode: Literal["slide", "whole"] = "slide"  # windows of data.image_size, or the image at once
    stride: float = 2 / 3  # of the windows, as a share of their side
    short_side: int | None = None  # pixels that an image's shorter side is resized to; default: data.image_size
    scales: list[float] = field(default_factory=lambda: [1.0])  # sizes that are averaged over, times that
    flip: bool = False  # average over the mirrored image too
    beside: str | None = None  # another run's export (the softmax baseline's, say) that pictures show beside this one


@dataclass
class Probe:
    """Linear probes on every module of every block, teacher beside student."""

    models: list[Literal["teacher", "student"]] = field(default_factory=lambda: ["teacher", "student"])
    modules: list[str] | None = None  # taps such as blocks.*.act or norm; default: patch_embed, all of each block, norm
    pooling: list[Literal["mean", "prefix", "both"]] | None = None  # of tokens; default: all that the model has
    solver: Literal["logistic", "ridge"] = "logistic"  # multinomial logistic regression, or least squares: quicker
    penalties: list[float] = field(default_factory=lambda: [0.01, 0.1, 1.0])  # scikit-learn's C; validation chooses
    tolerance: float = 3e-5  # of the logistic solver: nats an image above the least objective
    validation: float = 0.1  # share of the training images that choose penalty and module
    images: int | None = None  # of the training images, fit on so many only
    test: list[str] = field(default_factory=list)  # NAME=FILE ...: .beton files beside data.val, shifted ones say
    batch_size: int = 64  # images a forward pass, on each rank
    dtype: Literal["fp32", "fp16"] = "fp32"  # of the features on disk
    keep_features: bool = False  # leave them in the run folder when all is done
    every: int = 0  # steps of stage 2 between quick probes of the student beside the teacher; 0: none


@dataclass
class Wandb:
    """Weights & Biases; offline unless a key is set."""

    enabled: bool = True
    project: str = "unsoftmax"


@dataclass
class Settings:
    """All settings of one stage's run."""

    stage: Literal["1", "2", "3", "probe"]  # attention alignment, feature alignment, supervised fine-tuning, probes
    task: Literal["classification", "segmentation"] = "classification"  # of stage 3
    run: str | None = None  # run folder; default: runs/<recipe>
    deepspeed: str = str(Path("ds_configs") / "zero1.json")  # DeepSpeed's JSON
    teacher: Teacher = field(default_factory=Teacher)
    student: Student = field(default_factory=Student)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    stage1: Stage1 = field(default_factory=Stage1)
    stage2: Stage2 = field(default_factory=Stage2)
    stage3: Stage3 = field(default_factory=Stage3)
    segmentation: Segmentation = field(default_factory=Segmentation)
    probe: Probe = field(default_factory=Probe)
    wandb: Wandb = field(default_factory=Wandb)
    dry_run: bool = False  # show what would run, without training


# May change between a run and its continuation: they alter nothing of what is learned.
FREE = {
    "run", "dry_run", "deepspeed", "wandb", "data.workers", "train.micro_batch_size", "train.max_skipped",
    "train.save_every", "train.keep", "train.log_every", "train.eval_first", "segmentation.beside",
    "probe.keep_features",
}  # fmt: skip


# What a setting may be, beyond its type.
_POSITIVE = (lambda v: v > 0, "above 0")
_NOT_NEGATIVE = (lambda v: v >= 0, "at least 0")
_AT_LEAST_1 = (lambda v: v >= 1, "at least 1")
_SHARE = (lambda v: 0 <= v <= 1, "in 0..1")
_BELOW_1 = (lambda v: 0 <= v < 1, "at least 0 and below 1")
_NOT_EMPTY = (len, "at least one")
_FACTOR = (lambda v: 0 < v <= 1, "above 0 and at most 1")
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "data.image_size": (lambda v: _sides(v) and min(_sides(v)) >= 1, "at least 1: a side, or [height, width]"),
    "data.resolutions": (lambda v: _leaves_steps(v), "sizes with shares of the steps, below 1 in all, as in 224:0.8"),
    "data.mean": (lambda v: len(v) == 3, "three values (R, G, B)"),
    "data.std": (lambda v: len(v) == 3 and min(v) > 0, "three values (R, G, B) above 0"),
    "data.crop_pct": _FACTOR,
    "data.scale": (lambda v: len(v) == 2 and 0 < v[0] <= v[1] <= 1, "two values, 0 < least <= most <= 1"),
    "data.ratio": (lambda v: len(v) == 2 and 0 < v[0] <= v[1], "two values, 0 < least <= most"),
    "data.hflip": _SHARE,
    "data.resize": (lambda v: len(v) == 2 and 0 < v[0] <= v[1], "two values, 0 < least <= most"),
    "data.max_share": _FACTOR,
    "data.window": _AT_LEAST_1,
    "data.workers": _AT_LEAST_1,
    "train.epochs": _POSITIVE,
    "train.steps": _AT_LEAST_1,
    "train.batch_size": _AT_LEAST_1,
    "train.micro_batch_size": _AT_LEAST_1,
    "train.lr": _POSITIVE,
    "train.min_lr": _NOT_NEGATIVE,
    "train.warmup_steps": _NOT_NEGATIVE,
    "train.weight_decay": _NOT_NEGATIVE,
    "train.betas": (lambda v: len(v) == 2 and all(0 <= beta < 1 for beta in v), "two values, at least 0 and below 1"),
    "train.clip_grad": _NOT_NEGATIVE,
    "train.seed": _NOT_NEGATIVE,
    "train.save_every": _AT_LEAST_1,
    "train.keep": _AT_LEAST_1,
    "train.log_every": _AT_LEAST_1,
    "train.eval_every": _NOT_NEGATIVE,
    "train.max_skipped": _AT_LEAST_1,
    "stage3.num_classes": _AT_LEAST_1,
    "stage3.layer_decay": _FACTOR,
    "stage3.drop_path": _BELOW_1,
    "stage3.label_smoothing": _BELOW_1,
    "stage3.mixup": _NOT_NEGATIVE,
    "stage3.cutmix": _NOT_NEGATIVE,
    "stage3.ema": _BELOW_1,
    "segmentation.head_lr": _POSITIVE,
    "segmentation.stride": _FACTOR,
    "segmentation.short_side": _AT_LEAST_1,
    "segmentation.scales": (lambda v: v and min(v) > 0, "values above 0"),
    "probe.models": _NOT_EMPTY,
    "probe.modules": _NOT_EMPTY,
    "probe.pooling": _NOT_EMPTY,
    "probe.penalties": (lambda v: v and min(v) > 0, "values above 0"),
    "probe.tolerance": _POSITIVE,
    "probe.validation": (lambda v: 0 < v < 1, "above 0 and below 1"),
    "probe.images": _AT_LEAST_1,
    "probe.test": (lambda v: all(re.fullmatch(r"[\w.+-]+=.+", pair) for pair in v), "NAME=FILE ..."),
    "probe.batch_size": _AT_LEAST_1,
    "probe.every": _NOT_NEGATIVE,
}


def _sides(size: int | list[int]) -> list[int]:
    """Both sides of an image size; of a list of another length none."""
    return [size, size] if isinstance(size, int) else size if len(size) == 2 else []


def _leaves_steps(resolutions: list[str]) -> bool:
    try:
        found = [resolution.parse(spec) for spec in resolutions]
    except ValueError:
        return False
    return all(share > 0 and min(_sides(size)) >= 1 for size, share in found) and sum(s for _, s in found) < 1


class Parser(ArgumentParser):
    """jsonargparse's; a mistake is a UserError of one line. `kind` is the dataclass whose fields it reads."""

    kind: type = Settings

    def error(self, message: str, ex: Exception | None = None) -> None:
        message = " ".join(message.split())
        if unknown := re.match(r"unrecognized arguments: ([^\s=]+)", message):
            message = f"{unknown[1]}: {_no_such(unknown[1].lstrip('-'))}"
        elif wrong := re.fullmatch(r'Parser key "([\w.]+)": .*(?:Got|Given) value: (.*)', message):
            kind = dict(_names(self.kind)).get(wrong[1])
            words = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
            message = f"{wrong[1]} {wrong[2]}: must be {words.replace('Literal', 'one of ')}"
        raise UserError(message)


def _names(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("train.lr", float) and so on, all settings of a dataclass."""
    for f in dataclasses.fields(kind):
        if dataclasses.is_dataclass(f.type):
            yield from _names(f.type, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", f.type


def _no_such(name: str) -> str:
    have = {part for known, _ in _names(Settings) for part in (known, known.split(".")[0])} - {name}
    near = difflib.get_close_matches(name, sorted(have), 1)
    return f"no such setting; {f'did you mean {near[0]}? ' if near else ''}--print_config shows all"


def parse(argv: list[str] | None = None) -> Settings:
    """Settings from a recipe and the command line.

    Raises:
        UserError: unknown or unfit setting, no such recipe.
    """
    argv = [arg for arg in (sys.argv[1:] if argv is None else argv) if not arg.startswith("--local_rank")]
    argv = gather(["--dry_run=true" if arg == "--dry_run" else arg for arg in argv], "--probe.test")
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    peek.add_argument("--config", default="default")
    peek.add_argument("--stage")
    peek.add_argument("--task")
    try:
        known, _ = peek.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    parser = Parser(
        prog="trainer/run.py",
        description="Convert a softmax ViT into a linear-attention one, a stage a run.",
        print_config="--print_config",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", default="default", help="a recipe: a YAML file, or the name of one in trainer/recipes"
    )
    parser.add_argument(
        "--recipe", action="config", help="not for typing: the recipe with its stage's section laid over it"
    )
    parser.add_class_arguments(Settings, as_group=False)
    if any(arg in ("-h", "--help") for arg in argv):
        parser.print_help()
        raise SystemExit(0)
    if known.stage is None:
        raise UserError("--stage: which stage is missing; give --stage 1, 2, 3 or probe")
    path = find_recipe(known.config)
    given = parser.parse_args([f"--recipe={yaml.safe_dump(read_recipe(path, known.stage, known.task))}", *argv])
    settings = _build(Settings, given)
    settings.run = settings.run or str(Path("runs") / path.stem)
    settings.train.eval_every = settings.train.eval_every or settings.probe.every
    _check(settings)
    return settings


def gather(argv: list[str], option: str) -> list[str]:
    """`option A B ... option C` -> `option=["A", "B", "C"]`: the parser takes a list as one value."""
    values, rest, taking = [], [], False
    for arg in argv:
        taking = arg == option or (taking and not arg.startswith("-"))
        if not taking:
            rest.append(arg)
        elif arg != option:
            values.append(arg)
    return [*rest, f"{option}={json.dumps(values)}"] if values else argv


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path or by name. Raises UserError when there is none."""
    for path in (Path(name), RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path
    have = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    raise UserError(f"--config {name}: no such recipe; give a YAML file or one of {have}")


def read_recipe(path: Path, stage: str, task: str | None = None) -> dict[str, Any]:
    """A recipe's settings for `stage`, and for its task when that is segmentation, by `task` or by the recipe's own.

    Raises:
        UserError: the file is not a mapping in YAML, or names no such settings.
    """
    try:
        recipe = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(recipe, dict):
        raise UserError(f"{path}: must be a mapping of settings")
    stages = recipe.pop("stages", None) or {}
    if not isinstance(stages, dict):
        raise UserError(f"{path}: stages must be a mapping, a section a stage")
    stages = {str(key): value or {} for key, value in stages.items()}
    unknown = set(stages) - {"1", "2", "3", "segmentation", "probe"}
    if unknown:
        raise UserError(
            f"{path}: stages has no {', '.join(sorted(unknown))}; it may hold 1, 2, 3, segmentation and probe"
        )
    for part, prefix in ((recipe, ""), *((part, f"stages.{key}.") for key, part in stages.items())):
        _check_names(path, part, prefix)
    merged = _merge(recipe, stages.get(stage, {}))
    segments = stage == "3" and (task or merged.get("task")) == "segmentation"
    return _merge(merged, stages.get("segmentation", {})) if segments else merged


def _check_names(path: Path, part: Any, prefix: str, kind: type = Settings, inside: str = "") -> None:
    if not isinstance(part, Mapping):
        raise UserError(f"{path}: {prefix.rstrip('.')} {part!r}: must be a mapping of settings")
    kinds = {f.name: f.type for f in dataclasses.fields(kind)}
    for key, value in part.items():
        if key not in kinds:
            raise UserError(f"{path}: {prefix}{key}: {_no_such(f'{inside}{key}')}")
        if dataclasses.is_dataclass(kinds[key]):
            _check_names(path, value, f"{prefix}{key}.", kinds[key], f"{inside}{key}.")


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _build(kind: type, given: Namespace) -> Any:
    values = {}
    for f in dataclasses.fields(kind):
        value = given[f.name]
        values[f.name] = _build(f.type, value) if dataclasses.is_dataclass(f.type) else value
    return kind(**values)


def _check(settings: Settings) -> None:
    values = flatten(as_dict(settings))
    for name, (fits, words) in RANGES.items():
        if values[name] is not None and not fits(values[name]):
            raise UserError(f"{name} {values[name]}: must be {words}")
    if settings.stage in "12" and settings.student.attention == "softmax":
        raise UserError(
            "student.attention softmax: is the baseline of stage 3, there is nothing to align in stage 1 or 2"
        )
    every = settings.train.eval_every
    if settings.probe.every and settings.probe.every % every:
        raise UserError(f"probe.every {settings.probe.every}: must be a multiple of train.eval_every {every}: a quick "
                        "probe is part of an evaluation")  # fmt: skip
    if segments(settings):
        for name in ("mixup", "cutmix", "label_smoothing"):
            if getattr(settings.stage3, name):
                raise UserError(f"stage3.{name} {getattr(settings.stage3, name)}: is for labels of whole images; "
                                "segmentation learns from masks, set it to 0")  # fmt: skip
    if settings.stage == "1" and settings.stage1.match == "heads" and settings.train.compile:
        raise UserError("stage1.match heads: lies inside what train.compile compiles; use one of the two")
    if settings.stage in "12" and settings.student.trainable == "head":
        raise UserError(
            "student.trainable head: no loss of stage 1 or 2 reaches the head; choose qkv, attention or backbone"
        )


def segments(settings: Settings) -> bool:
    """Whether the stage that runs is semantic segmentation."""
    return settings.stage == "3" and settings.task == "segmentation"


def as_dict(settings: Settings) -> dict[str, Any]:
    """The settings as a nested dict of plain values."""
    return dataclasses.asdict(settings)


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"lr": 1}} -> {"train.lr": 1}."""
    flat = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and key != "kwargs":
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Name and values of the first setting that differs and is not in `FREE`, or None."""
    before, now = flatten(before), flatten(now)
    for key in sorted(before.keys() | now.keys()):
        free = any(key == name or key.startswith(f"{name}.") for name in FREE)
        if not free and before.get(key) != now.get(key):
            return f"{key} was {before.get(key)!r}, is now {now.get(key)!r}"
    return None
