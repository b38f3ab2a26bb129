"""What a stage hands on: a folder with `model.safetensors` and `config.json`, given back as a timm model by `load`."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .backbones import check_fit, check_image_size
from .linearize import linearize

FORMAT = 1


def save(folder: str | Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write `state` and `config` as an export; whoever loads finds a complete export or none.

    Args:
        folder: made if it is not there; an earlier export in it is replaced.
        state: the full state dict, on any device.
        config: `backbone` {name, kwargs}, `attention` {feature_map, linear_blocks}, `input` {image_size, mean, std,
            crop_pct} and `lineage`, all plain JSON. `load` builds with `timm.create_model(name, **kwargs)`, so
            `kwargs` hold `img_size` and `num_classes` too where they are not timm's defaults for `name`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Both are written aside; then the old config goes first and the new one comes last, and `load` wants a config.
    weights, text = folder / "model.safetensors.part", folder / "config.json.part"
    save_file({key: value.detach().cpu().contiguous() for key, value in state.items()}, weights, {"format": "pt"})
    os.umask(umask := os.umask(0))
    weights.chmod(0o666 & ~umask)  # safetensors writes files that only their owner may read
    text.write_text(json.dumps({"format": FORMAT, **config}, indent=2) + "\n")
    (folder / "config.json").unlink(missing_ok=True)
    os.replace(weights, folder / "model.safetensors")
    os.replace(text, folder / "config.json")


def read_config(folder: str | Path) -> dict[str, Any]:
    """The `config.json` of an export.

    Raises:
        FileNotFoundError: no export there.
        ValueError: it was written by another format version, or is damaged.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no export there (config.json is missing)")
    try:
        config = json.loads(path.read_text())
        version = config["format"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: damaged, or not the config of an export ({error})") from error
    if version != FORMAT:
        raise ValueError(f"{path}: format {version!r}, this version reads {FORMAT}")
    return config


def load(folder: str | Path, image_size: int | tuple[int, int] | None = None) -> nn.Module:
    """The exported model, a timm model in eval mode, fp32, on the CPU.

    Args:
        folder: of the export.
        image_size: pixels, a side or (height, width), to resize the position embeddings to; default: as exported.

    Raises:
        FileNotFoundError: no export there.
        ValueError: the export is damaged, or the patch size does not divide `image_size`.
    """
    config = read_config(folder)
    try:
        backbone, attention = config["backbone"], config["attention"]
        model = timm.create_model(backbone["name"], pretrained=False, **backbone["kwargs"])
        linear = set(attention["linear_blocks"])
        if linear:
            blocks = set(range(len(model.blocks)))
            if linear - blocks:
                raise KeyError(f"linear_blocks {sorted(linear - blocks)}")
            model = linearize(model, attention["feature_map"], blocks - linear)
    except (KeyError, TypeError, AssertionError, RuntimeError) as error:
        raise ValueError(f"{folder}/config.json: no model can be built from it ({error!r})") from error
    path = Path(folder) / "model.safetensors"
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read as weights ({error})") from error
    check_fit(model, state, path, "it is not the file that config.json describes")
    model.load_state_dict(state)
    if image_size is not None:
        check_image_size(model, image_size)
        model.set_input_size(img_size=image_size)
    return model.eval()
