"""Weights in files, in others' names: found by content, read under any prefix, and accounted for to the last number.

A file holds a network where one reading of its names fits; all that such a reading leaves out is either known to be
without effect or an error.
"""

import argparse
import io
import json
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from timm.models import VisionTransformer, clean_state_dict
from torch import Tensor, nn

from .huggingface import from_transformers

MEND = "mend teacher.name or teacher.kwargs"
MAX_VARIATION = 200  # names that do not fit; with more it is no variant of the same network
MAX_NESTING = 8  # dicts in dicts of a file; a pickle may hold one that holds itself

# Where a ViT begins: the patch embedding in the names of timm and Meta, CLIP and PE, Sapiens, AIMv2, BEiT-3, RADIO and
# transformers.
PATCH_EMBED = re.compile(
    r"(|.*\.)(patch_embed\.proj|patch_embed\.projection|conv1|preprocessor\.patchifier\.proj|vision_embed\.proj"
    r"|patch_generator\.embedder|embeddings\.patch_embeddings?(?:\.projection)?)\.weight"
)
# What pre-training leaves beside the network, and tables that timm computes by itself.
WITHOUT_EFFECT = re.compile(
    r"(|.*\.)(mask_token|masked_embed|relative_position_index|num_batches_tracked|bias_mask|logit_scale|logit_bias)"
    r"|decoder.*|predictor.*|projectors?\..*|projection_head\..*|lm_head\..*|(dino|ibot)_head\..*|local_cls_norm.*"
    r"|(|.*\.)rope[^.]*\.(periods|freqs_.*|inv_freq|bands)|text_embed\..*|.*\.B\..*"
)
WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
BLOCK_CHUNKS = re.compile(r"\bblocks\.\d+\.(\d+)\.")  # DINOv2's training keeps its blocks in groups


Shapes = Callable[[int], nn.Module]  # builds a model of so many classes on the meta device


@dataclass
class Weights:
    """What a file holds.

    Attributes:
        tensors: by their names, those of nested dicts joined by dots.
        trained_at: (height, width) in pixels where the file, or who gives it, says so.
        built_at: where nobody does, that of the model that it is given for.
        may_stay: beginnings of names, of parts that a model may be built without on purpose.
    """

    path: Path
    tensors: dict[str, Tensor]
    trained_at: tuple[int, int] | None = None
    built_at: tuple[int, int] | None = None
    may_stay: tuple[str, ...] = ("head.", "head_dist.")


@dataclass
class Reading:
    """Part of a file as a state dict of timm's: what stands under `prefix`.

    Attributes:
        lost: names in the file whose values have an effect and do not reach `state`.
        problems: why it does not fit the model; empty where it does.
        misfits: how many names do not fit.
        assumed: what the file does not say.
    """

    prefix: str
    state: dict[str, Tensor]
    lost: list[str]
    problems: str = ""
    misfits: int = 0
    assumed: str = ""


def open_weights(path: str | Path) -> Weights:
    """All tensors of a file of weights, or of the folder of a softmax export.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: the file is damaged, holds no plain tensors by name, or those of a converted model.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "model.safetensors").is_file() or not (path / "config.json").is_file():
            raise FileNotFoundError(f"{path}: no such file of weights, but a folder{exports_within(path)}")
        path = path / "model.safetensors"
    content = _content(path)
    tensors = {WRAPPERS.sub("", key): value for key, value in _flat(content)}
    _check_plain(path, tensors)
    mark = read_mark(path)
    if mark.get("linear_blocks"):
        raise ValueError(
            f"{path}: weights of a converted model, with linear attention in {len(mark['linear_blocks'])} blocks; "
            "a teacher has softmax attention: give the weights that it was converted from, or continue it as "
            "student.parent"
        )
    size = mark.get("image_size")
    return Weights(path, tensors, None if size is None else pair(size))


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file of weights; its suffix does not matter.

    Nothing is executed: pickles are read with `weights_only=True`.

    Returns:
        Tensors by name. A single wrapper such as `state_dict` is removed; otherwise the names of nested dicts are
        joined by dots.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or holds something other than plain tensors by name.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    content = _content(path)
    # As timm does it, by which earlier runs know their teachers.
    keys = ("state_dict_ema", "model_ema", "state_dict", "model")
    inner = next((content[key] for key in keys if isinstance(content.get(key), Mapping)), content)
    if all(isinstance(key, str) and isinstance(value, Tensor) for key, value in inner.items()):
        state = clean_state_dict(inner)
    else:
        state = dict(_flat(content))
    _check_plain(path, state)
    return state


def read_mark(path: str | Path) -> dict[str, Any]:
    """What an export says of its weights in their file, or in the config.json beside it; empty for other files.

    `linear_blocks`, and `image_size` that the position embeddings are of.
    """
    path = Path(path)
    try:
        if is_safetensors(path):
            with safe_open(path, "pt") as file:
                mark = json.loads((file.metadata() or {}).get("unsoftmax", "{}"))
            if mark:
                return mark
        if path.name != "model.safetensors":
            return {}
        config = json.loads((path.parent / "config.json").read_text())
        return mark_of(config) if {"attention", "backbone"} <= config.keys() else {}
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return {}


def mark_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What an export's weights say of themselves, from its config; see `read_mark`."""
    size, blocks = config["backbone"]["kwargs"].get("img_size"), list(config["attention"]["linear_blocks"])
    return {"linear_blocks": blocks} | ({} if size is None else {"image_size": size})


def exports_within(folder: str | Path) -> str:
    """The exports in a run or stage folder, or beside a checkpoint, for the end of a message; nothing without any."""
    folder = Path(folder)
    for place in (folder, folder.parent, folder.parent.parent):
        if found := sorted([*place.glob("export/config.json"), *place.glob("*/export/config.json")]):
            return f"; the export here is {', or '.join(str(path.parent) for path in found[:5])}"
        if not re.match(r"step-|checkpoints$", place.name):
            break
    return ""


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: eight bytes of length, then JSON."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def fit(
    file: Weights,
    shapes: Shapes,
    num_classes: int | None,
    key: str | None = None,
    variants: Callable[[], Iterator[tuple[str, Shapes]]] = lambda: iter(()),
) -> tuple[dict[str, Tensor], int]:
    """The one reading of `file` that fits a model.

    Position embeddings are resampled from the grid that they were trained on to that of the model.

    Args:
        shapes: builds the model.
        num_classes: of the model; None takes the classifier that the file has.
        key: the reading to take, by its prefix, where several fit.
        variants: names of models that are much like this one, with what builds them; for the message.

    Returns:
        The state dict, in timm's names, and the number of classes.

    Raises:
        ValueError: no reading fits (problems named), more than one does (prefixes named), weights with effect are left
            out (named), or some are not finite.
    """
    places = _places(file)
    if key is not None:
        key = key.strip(".")
        chosen = {at: name for at, name in places.items() if f"{at}.".startswith(f"{key}.")}
        if not chosen:
            raise ValueError(f"{file.path}: has no ViT under teacher.weights_key {key!r}; {_found(file, places)}")
        places = chosen
    if not places and not any(re.match(r"(blocks\.\d+|cls_token|norm|pos_embed)\b", name) for name in file.tensors):
        raise ValueError(f"{file.path}: {_found(file, places)}; use a file that holds the weights of a ViT")
    readings = [
        _best(_without(file, [p for p in _places(file) if p != at and p.startswith(at)]), at, shapes, num_classes, name)
        for at, name in (places or {"": None}).items()
    ]
    fitting: list[Reading] = []
    for reading in readings:
        if not reading.problems and not any(_same(reading.state, other.state) for other in fitting):
            fitting.append(reading)
    if not fitting:
        closest = min(readings, key=lambda reading: reading.misfits)
        others = f"; {_found(file, places)}" if len(readings) > 1 else ""
        under = f"{closest.prefix}* " if closest.prefix else ""
        remedy = _remedy(file, closest, variants())
        raise ValueError(f"{file.path}: {under}does not fit the model: {closest.problems}; {remedy}{others}")
    if len(fitting) > 1:
        raise ValueError(
            f"{file.path}: holds {len(fitting)} networks that fit, {_listed(r.prefix for r in fitting)}; choose one "
            f"with --teacher.weights_key {fitting[0].prefix.rstrip('.') or repr('')}"
        )
    (reading,) = fitting
    if reading.lost:
        raise ValueError(
            f"{file.path}: {len(reading.lost)} weights that are not zero have no place in the model as built "
            f"({', '.join(reading.lost[:3])}); {_remedy(file, reading, variants())}"
        )
    check_finite(reading.state, file.path)
    if reading.assumed:
        warnings.warn(f"{file.path}: {reading.assumed}", stacklevel=3)
    return reading.state, _classes(reading.state) if num_classes is None else num_classes


def _best(file: Weights, at: str, shapes: Shapes, num_classes: int | None, patches: str | None) -> Reading:
    """What stands under `at`, read with as much of that prefix as timm's filter of the model may want to see."""
    parts = at.split(".")[:-1]
    cuts = ["".join(f"{part}." for part in parts[:n]) for n in range(len(parts) + 1)]
    readings = []
    for cut in cuts:
        reading = _read(file, at, cut, shapes, num_classes, patches)
        if not reading.problems:
            return reading
        readings.append(reading)
    return min(reversed(readings), key=lambda reading: reading.misfits)


def _read(
    file: Weights,
    at: str,
    cut: str,
    shapes: Shapes,
    num_classes: int | None,
    patches: str | None,
) -> Reading:
    given = _prepared({name[len(cut) :]: value for name, value in file.tensors.items() if name.startswith(cut)})
    inside = at[len(cut) :]
    model = shapes(1 if num_classes is None else num_classes)
    try:
        state, lost = _translate(given, model)
    except Exception as error:  # timm's filters meet any names and shapes here
        return Reading(at, {}, [], one_line(error), len(given))
    state = {name: value for name, value in state.items() if not WITHOUT_EFFECT.fullmatch(name)}
    # Text towers, heads and students stand elsewhere in the file.
    elsewhere = {name for name in given if not name.startswith(inside)}
    state = {name: value for name, value in state.items() if name not in elsewhere or given[name] is not value}
    model = _with_classes(shapes, num_classes, state)
    own = model.state_dict()
    # As with weights from the hub, what the user built the model without is left in the file.
    without = tuple(part for part in file.may_stay if not any(name.startswith(part) for name in own))
    state = {name: value for name, value in state.items() if not name.startswith(without)}
    if "head." in without:
        without += ("pre_logits.",)  # a layer before the classifier, which timm's ViTs have no more
    inner = {name: name[len(inside) :] for name in lost if name.startswith(inside)}
    lost = [
        f"{cut}{name}"
        for name, inner in inner.items()
        if not WITHOUT_EFFECT.fullmatch(inner) and not inner.startswith(without)
    ]
    try:
        assumed = _place_positions(state, model, file, None if patches is None else file.tensors[patches])
    except ValueError as error:
        others, count = misfits(model, state | {"pos_embed": model.pos_embed})
        return Reading(at, state, lost, others or str(error), count or 1)
    return Reading(at, state, lost, *misfits(model, state), assumed)


def _prepared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names and values as timm's filters know them, where a training framework wrote them otherwise."""
    state = {BLOCK_CHUNKS.sub(r"blocks.\1.", name): value for name, value in state.items()}
    if any(name.startswith("embeddings.patch_embedding") for name in state):
        state = from_transformers(state)
    for name in [name for name in state if name.endswith(".bias_mask")]:  # DINOv3's biases are what the mask leaves
        mask, bias = state.pop(name), name.removesuffix("_mask")
        if bias in state and state[bias].shape == mask.shape:
            state[bias] = state[bias] * mask.nan_to_num().to(state[bias].dtype)
    return state


def _translate(given: dict[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """`given` through timm's own filter for `model`, position embeddings as they are; and what the filter drops.

    A value reaches the model where the derivative of what comes out, with respect to it, is not zero: so parts of
    tensors count too, and a filter may rename, cut, join and resample as it likes.
    """
    translate = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if translate is None:
        return given, []
    deit3 = {"adapt_layer_scale": True} if isinstance(model, VisionTransformer) else {}
    leaves = {name: value.detach() for name, value in given.items()}
    for value in leaves.values():
        value.requires_grad_(value.is_floating_point())
    positions = getattr(model, "pos_embed", None)
    if positions is not None and not any("patch_generator." in name for name in given):  # RADIO crops its own
        model.pos_embed = None
    try:
        with torch.enable_grad(), redirect_stdout(io.StringIO()):
            state = translate(dict(leaves), model, **deit3)
    finally:
        if positions is not None:
            model.pos_embed = positions
    assert all(isinstance(value, Tensor) for value in state.values())
    kept = {id(value) for value in state.values()}
    moved = {name: v for name, v in leaves.items() if id(v) not in kept and v.requires_grad and v.numel()}
    slopes: Iterable[Tensor | None] = [None] * len(moved)
    with torch.enable_grad():
        made = [value.sum() for value in state.values() if value.grad_fn is not None]
        if made and moved:
            slopes = torch.autograd.grad(made, list(moved.values()), allow_unused=True)
    lost = [
        name
        for (name, value), slope in zip(moved.items(), slopes, strict=True)
        if (value if slope is None else value[slope == 0]).any()
    ]
    own = {id(leaf): given[name] for name, leaf in leaves.items()}
    return {name: own.get(id(value), value.detach()) for name, value in state.items()}, lost


_SAY_SIZE = "give the size that it was trained at as teacher.kwargs {img_size: [HEIGHT, WIDTH]}, beside data.image_size"


def _place_positions(state: dict[str, Tensor], model: nn.Module, file: Weights, patches: Tensor | None) -> str:
    """Resample `pos_embed` in `state` from the grid that it was trained on to that of `model`.

    Returns:
        What had to be assumed of that grid, for a warning; nothing where it is known.

    Raises:
        ValueError: the grid cannot be known.
    """
    positions = state.get("pos_embed")
    if positions is None or getattr(model, "pos_embed", None) is None or positions.ndim != 3:
        return ""
    prefix, wanted = 0 if model.no_embed_class else model.num_prefix_tokens, tuple(model.patch_embed.grid_size)
    count = positions.shape[1] - prefix
    patch = model.patch_embed.patch_size if patches is None or patches.ndim != 4 else patches.shape[-2:]

    def grids(*sizes: tuple[int, int] | None) -> list[tuple[int, int]]:
        found = [(size[0] // patch[0], size[1] // patch[1]) for size in sizes if size is not None]
        return [grid for grid in found if grid[0] * grid[1] == count > 0]

    stated = grids(file.trained_at, model.pretrained_cfg.get("input_size", (3, 0, 0))[-2:])
    square = isqrt(max(count, 0))
    likely = [(square, square)] if square**2 == count > 0 else grids(file.built_at)
    if not stated and not likely:
        squares = {n * n for n in range(1, isqrt(positions.shape[1]) + 1)}
        fits = [n for n in (0, 1, 5) if positions.shape[1] - n in squares]
        perhaps = f", where {fits[0]} would leave a square" if fits else ""
        raise ValueError(
            f"pos_embed has {positions.shape[1]} positions, {prefix} of them for prefix tokens{perhaps}: set "
            f"class_token, reg_tokens or no_embed_class in teacher.kwargs, or {_SAY_SIZE}"
        )
    trained = (stated or likely)[0]
    if trained != wanted:
        state["pos_embed"] = resample_abs_pos_embed(positions, wanted, trained, num_prefix_tokens=prefix)
    if stated or wanted[0] == wanted[1] or count != wanted[0] * wanted[1]:
        return ""
    rows, columns = trained
    return f"does not say the grid of its {count} position embeddings, taken as {rows} x {columns}; else {_SAY_SIZE}"


def _remedy(file: Weights, reading: Reading, variants: Iterator[tuple[str, Shapes]]) -> str:
    """What to change, so that all that stands where `reading` was taken has a place."""
    if reading.misfits <= MAX_VARIATION:
        for name, shapes in variants:
            other = _best(file, reading.prefix, shapes, None, None)
            if not other.problems and not other.lost:
                return f"it fits teacher.name {name}"
    return MEND


def _classes(state: Mapping[str, Tensor]) -> int:
    head = state.get("head.weight")
    return len(head) if head is not None and head.ndim == 2 and head.numel() else 0


def _with_classes(shapes: Shapes, given: int | None, state: Mapping[str, Tensor]) -> nn.Module:
    return shapes(_classes(state) if given is None else given)


def misfits(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[str, int]:
    """Why `state` is no state dict of `model`, the first keys named, and of how many; nothing where it is one."""
    own = model.state_dict()
    problems = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
            for key in own
            if key in state and state[key].shape != own[key].shape
        ],
        "of another kind of number": [
            f"{key} {state[key].dtype}".replace("torch.", "")
            for key in own
            if key in state and state[key].is_floating_point() != own[key].is_floating_point()
        ],
    }
    said = "; ".join(f"{len(keys)} {kind} ({', '.join(keys[:3])})" for kind, keys in problems.items() if keys)
    return said, sum(map(len, problems.values()))


def check_fit(model: nn.Module, state: Mapping[str, Tensor], path: str | Path, remedy: str) -> None:
    """Raises ValueError, naming the first keys, unless `state`, read from `path`, is a state dict of `model`."""
    problems, _ = misfits(model, state)
    if problems:
        raise ValueError(f"{path}: does not fit the model: {problems}; {remedy}")


def check_finite(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Raises ValueError, naming the first of them, when weights read from `path` are NaN or infinite."""
    for key, value in state.items():
        if value.is_floating_point() and not (value.float() if value.element_size() == 1 else value).isfinite().all():
            raise ValueError(f"{path}: {key} is not finite; the file is damaged, or its training diverged: use another")


def one_line(error: BaseException) -> str:
    """An error of others' code, in one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def _places(file: Weights) -> dict[str, str]:
    """The prefixes under which a ViT stands, each with the name of its patch embedding."""
    found = [match for name in file.tensors if (match := PATCH_EMBED.fullmatch(name))]
    return {m[1]: m[0] for m in found if m[2] != "conv1" or f"{m[1]}positional_embedding" in file.tensors}


def _without(file: Weights, prefixes: list[str]) -> Weights:
    """`file` without the networks that stand deeper in it."""
    inner = tuple(prefixes)
    return replace(file, tensors={key: value for key, value in file.tensors.items() if not key.startswith(inner)})


def _found(file: Weights, places: Mapping[str, Any]) -> str:
    """What a file holds, in a few words."""
    if places:
        return f"it holds {_listed(places)}"
    tops = dict.fromkeys(re.sub(r"\..*", ".", name) for name in file.tensors)
    return f"holds no patch embedding of a ViT; its names begin with {_listed(tops)}"


def _listed(prefixes: Iterable[str]) -> str:
    names = [f"{prefix}*" if prefix.endswith(".") else prefix or "names without a prefix" for prefix in prefixes]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a size that may be a side."""
    return (size, size) if isinstance(size, int) else tuple(size)


def _content(path: Path) -> Mapping[str, Any]:
    """What a file of safetensors or of torch.save holds, whatever its suffix.

    Both are mapped into memory, not read into it: processes of one machine share what they read of a file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")
    if path.name.endswith(".safetensors.index.json"):
        return _of_shards(path)
    try:
        if is_safetensors(path):
            content = load_file(path)
        else:  # timm's training leaves its arguments, plain values, in its files; torch looks at a path's suffix
            with path.open("rb") as file, torch.serialization.safe_globals([argparse.Namespace]):
                mapped = f"/proc/self/fd/{file.fileno()}"  # a path without a suffix, where there is such a thing
                maps = os.path.exists(mapped) and zipfile.is_zipfile(file)
                file.seek(0)
                content = torch.load(mapped if maps else file, map_location="cpu", weights_only=True, mmap=maps)
    except Exception as error:
        raise ValueError(f"{path}: cannot be read as weights: {_unreadable(path, error)}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: {_NO_STATE_DICT}")
    return content


def _of_shards(index: Path) -> dict[str, Tensor]:
    """What the files beside an index of transformers' hold together. No name in it leads elsewhere."""
    try:
        shards = set(json.loads(index.read_text())["weight_map"].values())
        if not all(isinstance(name, str) and name == Path(name).name for name in shards):
            raise ValueError("it names files elsewhere")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index}: no index of shards ({one_line(error)})") from error
    return {name: value for shard in sorted(shards) for name, value in _content(index.parent / shard).items()}


def _flat(content: Mapping[str, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Tensors by name; dicts by other things than names, such as an optimizer's, are passed over."""
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(key, str) and isinstance(value, Mapping) and depth < MAX_NESTING:
            yield from _flat(value, f"{prefix}{key}.", depth + 1)


def _check_plain(path: Path, state: Mapping[str, Tensor]) -> None:
    if not state:
        raise ValueError(f"{path}: {_NO_STATE_DICT}")
    for key, value in state.items():
        stored = value.layout == torch.strided and value.device.type == "cpu" and value.untyped_storage().nbytes()
        if stored is False or stored < value.numel() * value.element_size():
            raise ValueError(f"{path}: {key} is no plain tensor with all its values; {_SAVE_AGAIN}")


_NO_STATE_DICT = "holds no state dict of tensors; save one with safetensors or torch.save"
_SAVE_AGAIN = "where you trust its source, save its state dict alone, with safetensors"


def _unreadable(path: Path, error: Exception) -> str:
    """Why, and what to do, in few words; torch's own advice is to read it unsafely."""
    if is_safetensors(path):
        said = one_line(error).removeprefix("Error while deserializing header: ")[:100]
        return f"damaged safetensors ({said}); get it again"
    code = re.search(r"Unsupported globals: ([^ ,]+?)[.,]? |GLOBAL (\S+)", f"{error} {error.__cause__}")
    if code:
        name = code[1] or code[2]
        return f"it holds Python objects ({name}), which could run code, and none was run; {_SAVE_AGAIN}"
    if "weights_only" in str(error) and error.__cause__ is None:
        return f"a TorchScript program or an archive of old, which could run code, and none was run; {_SAVE_AGAIN}"
    return "neither written by torch.save nor safetensors, or damaged; get it again"
