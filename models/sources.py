"""A model by whatever names one: the folder of an export, an export on the hub, or a name of timm's."""

import warnings
from pathlib import Path

import timm
from torch import nn

from .backbones import build_backbone
from .export import download, load


def open_model(source: str, image_size: int | tuple[int, int] | None = None, pretrained: bool = True) -> nn.Module:
    """The model in eval mode, fp32, on the CPU.

    Args:
        source: the folder of an export, `hf-hub:OWNER/NAME` of one, a name of timm's, or `hf:...`, see `hf`.
        image_size: pixels, a side or (height, width); by default the model's own.
        pretrained: False leaves the weights of a timm name random.

    Raises:
        ValueError, FileNotFoundError: nothing is there, or it cannot be had, or the size does not fit.
    """
    if is_name(source):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return build_backbone(source, pretrained=pretrained, image_size=image_size)
            except ValueError as error:
                if image_size is None or "keyword argument 'img_size'" not in str(error):
                    raise
            return build_backbone(source, pretrained=pretrained)  # which takes images of any size
    if not source.startswith("hf-hub:") and not Path(source).exists():
        raise ValueError(f"{source}: no folder of an export, and no name of timm's")
    return load(source, image_size)


def is_name(source: str) -> bool:
    """Whether it is a name of timm's, and no folder; or one of transformers' checkpoints, `hf:...`."""
    if source.startswith("hf:"):
        return True
    return not Path(source).exists() and timm.is_model(source.removeprefix("timm/").split(".")[0])


def folder_of(source: str) -> Path:
    """The folder of an export; one on the hub is brought to the hub's cache. Raises ValueError where it cannot be."""
    return download(source.removeprefix("hf-hub:")) if source.startswith("hf-hub:") else Path(source)
