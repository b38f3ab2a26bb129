"""What a stage hands on: a folder with `model.safetensors` and `config.json`, given back as a timm model by `load`.

An export may come from anyone: nothing in it is run, no name in it leads to another file or to the hub, and nothing is
built that does not fit the weights.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .backbones import NOT_BUILT, check_image_size
from .checkpoints import check_finite, check_fit, exports_within, mark_of, one_line, pair
from .heads import build_head
from .hf import hub_without_long_waits
from .linearize import linearize
from .parallel import with_plain_blocks
from .segmenter import Segmenter, backbone_of

FORMAT = 1
MAX_SIZE = 10_000  # what a keyword of a head may say
MAX_DEPTH = 1000  # blocks; before they are compared with the weights they are built, one after the other


def save(folder: str | Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write `state` and `config` as an export; whoever loads finds a complete export or none.

    Args:
        folder: made if it is not there; an earlier export in it is replaced.
        state: the full state dict, on any device.
        config: plain JSON.
            `backbone` {name, kwargs}: `load` builds with `timm.create_model(name, **kwargs)`, so `kwargs` hold
            `img_size` and `num_classes` too where they are not timm's defaults for `name`.
            `attention` {operator, kwargs, additions, linear_blocks}, or `feature_map` in place of the first three.
            `input` {image_size, mean, std, crop_pct, interpolation}: how images are given to it.
            `lineage`: the trainer's.
            `segmentation` {head, num_classes, kwargs}: of a `Segmenter`, for `build_head`.
            `classes`, if they are known: names in the order of the labels; `palette`: their colours [r, g, b].
            To these `save` adds `digest`, by which `load` knows that the two files are as they were written. The file
            of weights says in its metadata which blocks are linear, so that nobody takes it for a softmax model.

    Raises:
        ValueError: `input` is not as timm knows it, or `classes` are not as many as the head has.
    """
    folder = Path(folder)
    content = json.loads(json.dumps({"format": FORMAT, **config}))
    _check_description(content)
    folder.mkdir(parents=True, exist_ok=True)
    # Both are written aside; then the old config goes first and the new one comes last, and `load` wants a config.
    weights, text = folder / "model.safetensors.part", folder / "config.json.part"
    lineage = hashlib.sha256(json.dumps(content.get("lineage"), sort_keys=True).encode()).hexdigest()
    mark = json.dumps({"format": FORMAT, **mark_of(content), "lineage": lineage})
    state = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    save_file(state, weights, {"unsoftmax": mark})  # of one entry, since safetensors writes several in any order
    os.umask(umask := os.umask(0))
    weights.chmod(0o666 & ~umask)  # safetensors writes files that only their owner may read
    content |= _for_timm(content)
    content["digest"] = _digest(content, weights)
    text.write_text(json.dumps(content, indent=2) + "\n")
    (folder / "config.json").unlink(missing_ok=True)
    os.replace(weights, folder / "model.safetensors")
    os.replace(text, folder / "config.json")


def read_config(folder: str | Path) -> dict[str, Any]:
    """The `config.json` of an export, without what it repeats for timm.

    Raises:
        FileNotFoundError: no export there; those nearby are named.
        ValueError: it was written by another format version, or is damaged: not JSON, or a part of another type.
    """
    return {key: value for key, value in _whole_config(folder).items() if key not in _OF_TIMM}


def _whole_config(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / "config.json"
    if not path.is_file():
        near = f"; its folder is {path.parent.parent}" if path.parent.is_file() else exports_within(folder)
        raise FileNotFoundError(f"{folder}: no export there (config.json is missing){near}")
    try:
        config = json.loads(path.read_text())
        version = config["format"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, or not the config of an export ({error})") from error
    if version != FORMAT:
        raise ValueError(f"{path}: format {version!r}, this version reads {FORMAT}")
    attention = config.get("attention")
    new = isinstance(attention, dict) and "operator" in attention
    for name, kind in {**_KINDS, **(_OPERATOR if new else _FEATURE_MAP)}.items():
        part: Any = config
        for key in name.split("."):
            part = part.get(key) if isinstance(part, dict) else None
        if name.startswith("segmentation.") and "segmentation" not in config:
            continue
        if name in _OPTIONAL and part is None:
            continue
        if not isinstance(part, kind):
            raise ValueError(f"{path}: damaged, its {name} is {'missing' if part is None else repr(part)[:80]}")
    return config


# "lineage" is the trainer's, which checks it.
_KINDS = {
    "backbone.name": str, "backbone.kwargs": dict, "attention.linear_blocks": list,
    "segmentation.head": str, "segmentation.num_classes": int, "segmentation.kwargs": dict,
    "classes": list, "palette": list, "input": dict,
}  # fmt: skip
_OPERATOR = {"attention.operator": str, "attention.kwargs": dict, "attention.additions": list}
_FEATURE_MAP = {"attention.feature_map": str}  # what exports said while operators were feature maps alone
_OPTIONAL = ("classes", "palette", "input")


def download(name: str, cache_dir: str | Path | None = None, weights: bool = True) -> Path:
    """The folder of an export on the hub, `OWNER/NAME` or `OWNER/NAME@REVISION`, in the hub's cache.

    Raises:
        ValueError: it cannot be had.
    """
    repository, _, revision = name.partition("@")
    try:
        with hub_without_long_waits():
            for file in ("config.json", "model.safetensors")[: 1 + weights]:
                path = hf_hub_download(repository, file, revision=revision or None, cache_dir=cache_dir)
    except (OSError, ValueError) as error:
        raise ValueError(f"hf-hub:{name}: no export can be had from there ({one_line(error)})") from error
    return Path(path).parent


def load(folder: str | Path, image_size: int | tuple[int, int] | None = None) -> nn.Module:
    """The exported model in eval mode, fp32, on the CPU: a timm model, or a `Segmenter` around one.

    Its `pretrained_cfg` says how images were given to it, so that `timm.data.resolve_model_data_config` knows, and
    with `label_names` its classes, where the export has them. A `Segmenter` has `classes` and `palette` too.

    Args:
        folder: of the export, or `hf-hub:OWNER/NAME`.
        image_size: pixels, a side or (height, width), to resize the position embeddings to; default: as exported.

    Raises:
        FileNotFoundError: no export there; those nearby are named.
        ValueError: the export is damaged, cannot be had from the hub, or the patch size does not divide `image_size`.
    """
    if str(folder).startswith("hf-hub:"):
        folder = download(str(folder).removeprefix("hf-hub:"))
    config = _whole_config(folder)
    path = Path(folder) / "model.safetensors"
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read as weights ({error})") from error
    try:
        _check(config)
        with torch.device("meta"):  # no memory is taken before the shapes are known to be those of the file
            shapes = _build(config)
    except NOT_BUILT as error:
        raise ValueError(f"{folder}/config.json: no model can be built from it ({error!r})") from error
    check_fit(shapes, state, path, "it is not the file that config.json describes")
    check_finite(state, path)
    if "digest" in config and config["digest"] != _digest(config, path):
        raise ValueError(f"{folder}: config.json or model.safetensors is not as it was written; make the export again")
    return build(config, image_size, state)


def build(
    config: Mapping[str, Any],
    image_size: int | tuple[int, int] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """The model that the config of an export describes, with random weights where no `state` is given; as `load`."""
    try:
        _check(config)
        model = _build(config)
    except NOT_BUILT as error:
        raise ValueError(f"no model can be built from the config of the export ({error!r})") from error
    if state is not None:
        model.load_state_dict(state)
    if image_size is not None:
        vit = backbone_of(model)
        check_image_size(vit, image_size)
        vit.set_input_size(img_size=image_size)
    _describe(model, config)
    return model.eval()


# As the trainer's views are made: of the pixels that fall on one, the mean.
INTERPOLATION = "box"
# What timm says of the teacher's weights, and what is not true of these.
_OF_THE_TEACHER = (
    "url", "file", "hf_hub_id", "hf_hub_filename", "source", "tag", "custom_load", "notes", "test_input_size",
    "min_input_size", "test_crop_pct", "pool_size", "test_pool_size", "label_names", "label_descriptions",
    "label_offset",
)  # fmt: skip
ARCHITECTURE = "unsoftmax"  # by which timm finds `models.hub`
_OF_TIMM = ("architecture", "pretrained_cfg")  # in config.json, told by the rest of it, which `load` reads


def _for_timm(config: Mapping[str, Any]) -> dict[str, Any]:
    """What timm wants to read in config.json."""
    given, size = config.get("input") or {}, (config.get("input") or {}).get("image_size")
    known = {key: given[key] for key in ("mean", "std", "crop_pct") if key in given}
    known |= {} if size is None else {"input_size": [3, *pair(size)]}
    known |= {"label_names": config["classes"]} if config.get("classes") else {}
    known["interpolation"] = given.get("interpolation", INTERPOLATION)
    return {"architecture": ARCHITECTURE, "pretrained_cfg": known}


def _describe(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Tell in timm's terms what `config` says of the images and classes of `model`."""
    vit = backbone_of(model)
    known = {key: value for key, value in vit.pretrained_cfg.items() if key not in _OF_THE_TEACHER}
    given, classes = config.get("input") or {}, config.get("classes")
    known |= {key: tuple(given[key]) for key in ("mean", "std") if key in given}
    known |= {key: given[key] for key in ("crop_pct",) if key in given}
    known |= {
        "architecture": ARCHITECTURE,
        "input_size": (3, *vit.patch_embed.img_size),
        "interpolation": given.get("interpolation", INTERPOLATION),
        "crop_mode": "center",
        "num_classes": config["segmentation"]["num_classes"] if "segmentation" in config else vit.num_classes,
    }
    if classes is not None:
        known["label_names"] = tuple(classes)
    for part in {model, vit}:
        part.pretrained_cfg = part.default_cfg = known
    if model is not vit:
        model.classes, model.palette = classes, config.get("palette")


def _build(config: Mapping[str, Any]) -> nn.Module:
    backbone, attention = config["backbone"], config["attention"]
    model = with_plain_blocks(timm.create_model(backbone["name"], pretrained=False, **backbone["kwargs"]))
    linear = set(attention["linear_blocks"])
    if linear:
        blocks = set(range(len(model.blocks)))
        if linear - blocks:
            raise KeyError(f"linear_blocks {sorted(linear - blocks)}")
        model = linearize(model, keep_softmax=blocks - linear, **_operator(attention))
    if (of := config.get("segmentation")) is None:
        return model
    return Segmenter(model, build_head(of["head"], model.embed_dim, of["num_classes"], **of["kwargs"]))


def _operator(attention: Mapping[str, Any]) -> dict[str, Any]:
    """What `linearize` calls the operator of a config. Raises KeyError unless its keywords are words and numbers."""
    if "operator" not in attention:
        return {"operator": attention["feature_map"]}
    for name, value in attention["kwargs"].items():
        small = isinstance(value, int | float) and abs(value) <= MAX_SIZE  # a NaN is not
        if not small and not isinstance(value, str):
            raise KeyError(f"attention.kwargs: {name} {value!r}"[:100])
    return {
        "operator": attention["operator"],
        "operator_kwargs": attention["kwargs"],
        "additions": attention["additions"],
    }


def _check(config: Mapping[str, Any]) -> None:
    """Raises KeyError where something other than what `save` writes would be built or said."""
    _check_backbone(config["backbone"])
    _check_head(config)
    _check_description(config)


def _check_backbone(backbone: Mapping[str, Any]) -> None:
    """Raises KeyError unless it is an architecture of timm's with overrides that lead nowhere and end soon."""
    if not timm.is_model(backbone["name"].split(".")[0]):
        raise KeyError(f"{backbone['name'][:80]}: no architecture of timm's")
    for name, value in backbone["kwargs"].items():
        items = value if isinstance(value, list) else [value]
        plain = all(item is None or isinstance(item, bool | int | float | str) for item in items)
        finite = all(math.isfinite(item) for item in items if isinstance(item, float))
        if name in _NOT_OF_THE_ARCHITECTURE or not plain or not finite or (name == "depth" and value > MAX_DEPTH):
            raise KeyError(f"backbone.kwargs: {name} {value!r}"[:100])


def _check_head(config: Mapping[str, Any]) -> None:
    """Raises KeyError unless the keywords of a head, if there is one, are numbers that end soon."""
    for name, value in config.get("segmentation", {"kwargs": {}})["kwargs"].items():
        if not isinstance(value, int) or not 0 <= value <= MAX_SIZE:
            raise KeyError(f"segmentation.kwargs: {name} {value!r}"[:100])


def _check_description(config: Mapping[str, Any]) -> None:
    """Raises ValueError unless what the config says of images and classes, if it does, has the form that timm knows."""
    for name, value in (config.get("input") or {}).items():
        numbers = isinstance(value, list) and len(value) == 3 and all(isinstance(x, int | float) for x in value)
        fits = {
            "mean": numbers and all(map(math.isfinite, value)),
            "std": numbers and all(math.isfinite(x) and x > 0 for x in value),
            "crop_pct": isinstance(value, int | float) and 0 < value <= 10,
            "interpolation": value in ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"),
        }
        if not fits.get(name, True):
            raise ValueError(f"input: {name} {value!r}"[:100])
    count = (config.get("segmentation") or config["backbone"]["kwargs"]).get("num_classes")
    for name, kind in (("classes", str), ("palette", list)):
        value = config.get(name)
        if value is not None and not all(isinstance(item, kind) for item in value):
            raise ValueError(f"{name} {value!r}"[:100])
        if value is not None and count is not None and len(value) != count:
            raise ValueError(f"{name}: {len(value)} for a head of {count} classes")


_NOT_OF_THE_ARCHITECTURE = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")


def _digest(config: Mapping[str, Any], weights: Path) -> str:
    """SHA-256 of what `config` says and of the file of weights."""
    said = json.dumps({key: value for key, value in config.items() if key != "digest"}, sort_keys=True)
    with weights.open("rb") as file:
        of_weights = hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(f"{of_weights} {said}".encode()).hexdigest()
