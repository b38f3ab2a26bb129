"""Teachers of Hugging Face's transformers, `hf:OWNER/NAME` or `hf:FOLDER`: the timm model that a config.json describes.

DINOv2 with and without registers, DINOv3, CLIP, SigLIP and SigLIP 2; of the last three the vision tower. CLIP's
projection becomes the model's head. `huggingface` has the names of the weights.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import get_session
from torch import Tensor

from .checkpoints import Weights, one_line, open_weights, pair

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")  # the first that there is
ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
# What transformers' config classes assume where a config.json is silent, of the fields that are read here.
_COMMON = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_channels": 3, "image_size": 224}
_DINOV2 = {**_COMMON, "mlp_ratio": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "patch_size": 14,
           "qkv_bias": True, "use_swiglu_ffn": False}  # fmt: skip
_SIGLIP = {**_COMMON, "intermediate_size": 3072, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh",
           "layer_norm_eps": 1e-6, "vision_use_head": True}  # fmt: skip
DEFAULTS = {
    "dinov2": _DINOV2,
    "dinov2_with_registers": {**_DINOV2, "patch_size": 16, "num_register_tokens": 4},
    "dinov3_vit": {**_COMMON, "hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6,
                   "hidden_act": "gelu", "layer_norm_eps": 1e-5, "patch_size": 16, "rope_theta": 100.0,
                   "query_bias": True, "key_bias": False, "value_bias": True, "proj_bias": True, "mlp_bias": True,
                   "use_gated_mlp": False, "num_register_tokens": 0},
    "clip_vision_model": {**_COMMON, "intermediate_size": 3072, "patch_size": 32, "hidden_act": "quick_gelu",
                          "layer_norm_eps": 1e-5, "projection_dim": 512},
    "siglip_vision_model": _SIGLIP,
    "siglip2_vision_model": {**{key: value for key, value in _SIGLIP.items() if key != "image_size"},
                             "num_patches": 256},
}  # fmt: skip
# Fields whose values must be whole numbers above 0, and true or false; a default tells which, but for these two.
_KINDS = {key: type(value) for kind in DEFAULTS.values() for key, value in kind.items()}
_KINDS |= {"num_register_tokens": float, "mlp_ratio": float}
TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model", "siglip2": "siglip2_vision_model"}


@dataclass
class Described:
    """The timm model that fits a checkpoint of transformers.

    Attributes:
        architecture: timm's name.
        kwargs: overrides, plain values.
        pretrained_cfg: what timm is to say of images: `input_size`, `mean`, `std`.
    """

    architecture: str
    kwargs: dict[str, Any]
    pretrained_cfg: dict[str, Any]


def describe(place: str) -> Described:
    """The timm model for `OWNER/NAME`, `OWNER/NAME@REVISION` or a folder.

    Raises:
        ValueError: there is nothing, it cannot be had, or is no ViT that timm can build.
    """
    path = _file(place, "config.json", must=True)
    if path is None:
        raise ValueError(f"teacher.name 'hf:{place}': has no config.json of transformers")
    config = _read(place, path)
    kind = config.get("model_type")
    tower = config.get("vision_config", {}) if kind in TOWERS else config
    kind = TOWERS.get(kind, kind)
    if kind not in DEFAULTS or not isinstance(tower, dict):
        names = ", ".join(sorted({*DEFAULTS, *TOWERS}))
        raise ValueError(
            f"teacher.name 'hf:{place}': its config.json describes a {kind!r}; of transformers {names} are read; for "
            "another ViT give timm's name, and the file as teacher.weights"
        )
    rope = tower.get("rope_parameters")  # where transformers 5 keeps it
    tower = {**(rope if isinstance(rope, dict) else {}), **tower}
    given = DEFAULTS[kind] | {key: tower[key] for key in DEFAULTS[kind] if tower.get(key) is not None}
    try:
        _check(given)
        if kind == "siglip2_vision_model":
            given["image_size"] = isqrt(given["num_patches"]) * pair(given["patch_size"])[0]
        architecture, kwargs = FAMILIES[kind](given)
        kwargs = {
            "img_size": given["image_size"], "patch_size": given["patch_size"], "embed_dim": given["hidden_size"],
            "depth": given["num_hidden_layers"], "num_heads": given["num_attention_heads"], **kwargs,
        }  # fmt: skip
        cfg = {"input_size": (3, *pair(given["image_size"])), "num_classes": kwargs["num_classes"]}
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"teacher.name 'hf:{place}': its config.json cannot be built by timm: {error}") from error
    path = _file(place, "preprocessor_config.json")
    said = {} if path is None else _read(place, path)
    for name, key in (("image_mean", "mean"), ("image_std", "std")):
        value = said.get(name)
        if isinstance(value, list) and len(value) == 3 and all(isinstance(x, int | float) for x in value):
            cfg[key] = tuple(map(float, value))
    return Described(architecture, kwargs, cfg)


def _check(given: Mapping[str, Any]) -> None:
    """Raises ValueError for values that are not of their kind, or that timm's networks do not have."""
    for key, value in given.items():
        like = _KINDS.get(key)
        sides = key in ("image_size", "patch_size") and isinstance(value, list) and len(value) == 2
        whole = all(isinstance(x, int) and not isinstance(x, bool) and x > 0 for x in (value if sides else [value]))
        if (like is int and not whole) or (like is bool and not isinstance(value, bool)):
            raise ValueError(f"{key} {value!r}")
    if given["num_channels"] != 3:
        raise ValueError(f"num_channels {given['num_channels']}: images have 3 channels here")
    if given["hidden_act"] not in ACTIVATIONS:
        raise ValueError(f"hidden_act {given['hidden_act']!r}: must be one of {', '.join(ACTIVATIONS)}")


def _norm(given: Mapping[str, Any], eps: float) -> None:
    if given["layer_norm_eps"] != eps:
        raise ValueError(f"layer_norm_eps {given['layer_norm_eps']}: timm's has {eps}")


def _ratio(given: Mapping[str, Any]) -> float:
    """An `mlp_ratio` by which timm comes to this very width."""
    hidden, width = given["intermediate_size"], given["hidden_size"]
    return hidden / width if hidden % width == 0 else (hidden + 0.5) / width


def _act(given: Mapping[str, Any]) -> dict[str, Any]:
    act = ACTIVATIONS[given["hidden_act"]]
    return {} if act == "gelu" else {"act_layer": act}


def _dinov2(given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    _norm(given, 1e-6)
    kwargs = {"qkv_bias": given["qkv_bias"], "num_classes": 0}
    if "num_register_tokens" in given:
        kwargs |= {"reg_tokens": given["num_register_tokens"], "no_embed_class": True}
    if given["use_swiglu_ffn"]:
        hidden = (int(int(given["hidden_size"] * given["mlp_ratio"]) * 2 / 3) + 7) // 8 * 8
        kwargs["mlp_ratio"] = _ratio({"intermediate_size": 2 * hidden, "hidden_size": given["hidden_size"]})
        return "vit_giant_patch14_dinov2", kwargs
    return "vit_small_patch14_dinov2", kwargs | {"mlp_ratio": given["mlp_ratio"]} | _act(given)


def _dinov3(given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    _norm(given, 1e-5)
    if given["use_gated_mlp"] or not given["proj_bias"] or not given["mlp_bias"]:
        raise ValueError("a gated MLP, or layers without bias; give timm's name, such as vit_huge_plus_patch16_dinov3")
    kwargs = {"mlp_ratio": _ratio(given), "num_reg_tokens": given["num_register_tokens"], "num_classes": 0}
    kwargs |= {"rope_temperature": given["rope_theta"], "global_pool": "token"} | _act(given)
    biased = given["query_bias"] or given["key_bias"] or given["value_bias"]
    return f"vit_small_patch16_dinov3{'_qkvb' if biased else ''}", kwargs


def _clip(given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    _norm(given, 1e-5)
    act = ACTIVATIONS[given["hidden_act"]]
    quick = "_quickgelu" if act == "quick_gelu" else ""
    kwargs = {"mlp_ratio": _ratio(given), "num_classes": given["projection_dim"]} | ({} if quick else _act(given))
    return f"vit_base_patch16_clip{quick}_224", kwargs


def _siglip(given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    _norm(given, 1e-6)
    kwargs = {"mlp_ratio": _ratio(given), "num_classes": 0} | _act(given)
    if not given["vision_use_head"]:
        kwargs |= {"global_pool": "avg", "fc_norm": False}
    return "vit_base_patch16_siglip_224", kwargs


FAMILIES: dict[str, Callable[[Mapping[str, Any]], tuple[str, dict[str, Any]]]] = {
    "dinov2": _dinov2,
    "dinov2_with_registers": _dinov2,
    "dinov3_vit": _dinov3,
    "clip_vision_model": _clip,
    "siglip_vision_model": _siglip,
    "siglip2_vision_model": _siglip,
}


def weights_of(place: str, kwargs: Mapping[str, Any]) -> Weights:
    """The vision tower's tensors, by the names that `huggingface` reads.

    Args:
        kwargs: what `describe` gave, maybe at another size of images.

    Raises:
        ValueError, FileNotFoundError: there are none, or they cannot be read.
    """
    path = next((found for name in WEIGHTS if (found := _file(place, name)) is not None), None)
    if path is None:
        raise ValueError(f"teacher.name 'hf:{place}': has none of {', '.join(WEIGHTS)} that could be had")
    if path.name.endswith(".index.json"):
        for shard in _shards(place, path):
            _file(place, shard, must=True)
    file = open_weights(path)
    file.tensors = vision_tower(file.tensors, kwargs)
    file.trained_at = pair(kwargs["pretrained_cfg_overlay"]["input_size"][-2:])
    return file


def vision_tower(tensors: Mapping[str, Tensor], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The vision tower of a checkpoint, without its prefix; CLIP's projection as the head."""
    at = next((name for name in tensors if name.endswith(".embeddings.patch_embedding.weight")), "")
    at = at or next((name for name in tensors if ".embeddings.patch_embeddings." in name), "")
    prefix = at[: at.index("embeddings.")] if at else ""
    found = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
    found = {name: value for name, value in found.items() if not name.endswith("position_ids")}
    patches = found.get("embeddings.patch_embedding.weight")
    if patches is not None and patches.ndim == 2:  # SigLIP 2 takes pixels of a patch row by row, its channels last
        rows, columns = pair(kwargs["patch_size"])
        found["embeddings.patch_embedding.weight"] = patches.unflatten(1, (rows, columns, 3)).permute(0, 3, 1, 2)
    if (projection := tensors.get("visual_projection.weight")) is not None:
        found |= {"head.weight": projection, "head.bias": torch.zeros_like(projection[:, 0])}
        found.pop("visual_projection.weight", None)
    return found


def _shards(place: str, path: Path) -> list[str]:
    try:
        return sorted(set(_read(place, path)["weight_map"].values()))
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"teacher.name 'hf:{place}': {path.name} is no index of shards") from error


def _file(place: str, name: str, must: bool = False) -> Path | None:
    """A file of a folder, or of the hub, whose cache it then lies in; None where there is no such file.

    Raises:
        ValueError: there is no such place, or the hub does not answer; with `must` also where the file is not there.
    """
    folder = Path(place).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    repository, _, revision = place.partition("@")
    if place.startswith((".", "/", "~")) or repository.count("/") != 1:
        raise ValueError(f"teacher.name 'hf:{place}': no such folder, and no OWNER/NAME on the hub")
    try:
        with hub_without_long_waits():
            return Path(hf_hub_download(repository, name, revision=revision or None))
    except (OSError, ValueError) as error:
        if isinstance(error, EntryNotFoundError) and not must:
            return None
        raise ValueError(
            f"teacher.name 'hf:{place}': {name} cannot be had from the hub ({one_line(error)}); download the "
            "repository elsewhere and give its folder, hf:FOLDER"
        ) from error


def _read(place: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"teacher.name 'hf:{place}': {path.name} cannot be read ({one_line(error)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"teacher.name 'hf:{place}': {path.name} is no JSON object")
    return content


@contextmanager
def hub_without_long_waits() -> Iterator[None]:
    """huggingface_hub retries an unreachable hub for most of a minute: ask once; no answer, then its cache only."""
    offline = constants.HF_HUB_OFFLINE
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
