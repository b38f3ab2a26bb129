"""Exports by timm's own ways: `timm.create_model("local-dir:EXPORT", pretrained=True)`, or `"hf-hub:OWNER/NAME"`.

`push_to_hub` puts one there.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from timm.models import register_model
from timm.models._features import FeatureGetterNet
from torch import nn

from .card import CARD, model_card
from .checkpoints import one_line
from .export import build, download, load, read_config
from .segmenter import backbone_of


@register_model
def unsoftmax(
    pretrained: bool = False,
    pretrained_cfg: dict[str, Any] | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    pretrained_model_args: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    img_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    features_only: bool = False,
    out_indices: int | Sequence[int] = 3,
) -> nn.Module:
    """What `load` gives; timm's entry point for the architecture that an export's config.json names.

    Args:
        pretrained: False leaves the weights random.
        pretrained_cfg: timm's, which says where the export is.
        img_size: pixels; as exported by default.
        num_classes: another number than the export's gives a new classifier.
        features_only: a model that gives maps of patch features [B, D, h, w] of the blocks `out_indices`.

    Raises:
        ValueError, FileNotFoundError: as `load`; or there is no export behind the name.
    """
    place = pretrained_cfg if isinstance(pretrained_cfg, dict) else {}
    if place.get("source") == "local-dir":
        folder = Path(place["file"])
    elif place.get("source") == "hf-hub":
        folder = download(place["hf_hub_id"], cache_dir, weights=pretrained)
    else:
        raise ValueError("unsoftmax is no model of its own; give an export, local-dir:FOLDER or hf-hub:OWNER/NAME")
    model = load(folder, img_size) if pretrained else build(read_config(folder), img_size)
    vit = backbone_of(model)
    if num_classes not in (None, vit.num_classes):
        vit.reset_classifier(num_classes)
    if not features_only:
        return model
    features = FeatureGetterNet(vit, out_indices)
    features.pretrained_cfg = features.default_cfg = vit.pretrained_cfg
    return features


def push_to_hub(
    folder: str | Path, name: str, private: bool = False, token: str | None = None, message: str = "An export"
) -> str:
    """Put an export on the hub, with its model card: `README.md` beside it, else one made of its config.

    Args:
        folder: of the export.
        name: `OWNER/NAME`, made where it is not there.
        private: of a repository that is made.
        token: of an account that may write; by default the one of `hf auth login`.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        FileNotFoundError, ValueError: no export there, or damaged; or the hub refuses, or cannot be reached.
    """
    folder = Path(folder)
    load(folder)  # what is damaged is not handed on
    card = folder / CARD
    text = card.read_text() if card.is_file() else model_card(read_config(folder), title=name.rpartition("/")[2])
    files = {CARD: text.replace("OWNER/NAME", name).encode()}
    files |= {file: folder / file for file in ("config.json", "model.safetensors")}
    hub = HfApi(token=token)
    try:
        hub.create_repo(name, private=private, exist_ok=True)
        added = [CommitOperationAdd(path, content) for path, content in files.items()]
        return hub.create_commit(name, added, commit_message=message).commit_url
    except (OSError, ValueError) as error:
        raise ValueError(f"hf-hub:{name}: cannot be put there ({one_line(error)})") from error
