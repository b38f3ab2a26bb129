"""What the JSON beside a .beton file says, and the lines on the screen about it."""

import hashlib
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.class_table import default_palette
from data.decode import IGNORE

SHOWN = 20  # names in the JSON of what was passed over


def class_names(dataset: Any, label_key: str | None, classes: Sequence[str] | None) -> list[str] | None:
    """Names of the classes: as given, or as the dataset has them."""
    if classes is None:
        feature = (getattr(dataset, "features", None) or {}).get(label_key or "label")
        classes = getattr(dataset, "classes", None) or getattr(feature, "names", None)
    return None if classes is None else [str(name) for name in classes]


def passed_over(paths: Sequence[Path]) -> dict[str, Any]:
    """What the JSON says of the files that were not taken."""
    return {"count": len(paths), "names": [str(path) for path in paths[:SHOWN]]}


def masks(pixels: np.ndarray, names: Sequence[str] | None, palette: Any, allow_empty: bool, source: str) -> dict:
    """What the JSON says of the masks.

    Args:
        pixels: int64 [256], pixels per value in all masks.
        names: of the classes; None: their numbers.
        palette: (R, G, B) per class; None: Pascal VOC's.
        allow_empty: let classes have no pixel.
        source: of the images, for the message.

    Raises:
        ValueError: a class has no pixel, or the palette has not one colour per class.
    """
    if names is None:
        names = [str(number) for number in range(np.max(np.flatnonzero(pixels[:IGNORE]), initial=0) + 1)]
    elif not allow_empty and (empty := [f"{i} {name}" for i, name in enumerate(names) if not pixels[i]]):
        more = f" and {len(empty) - 10} more" if len(empty) > 10 else ""
        mend = "mend the class table, or let it pass with --allow_empty"
        raise ValueError(f"{source}: classes without a pixel in any mask: {', '.join(empty[:10])}{more}; {mend}")
    palette = default_palette(len(names)) if palette is None else [list(map(int, colour)) for colour in palette]
    if len(palette) != len(names) or any(len(colour) != 3 for colour in palette):
        raise ValueError(f"palette: has {len(palette)} colours; it must be (R, G, B) for each of {len(names)} classes")
    return {
        "mask_classes": [str(name) for name in names],
        "palette": palette,
        "pixels": pixels[: len(names)].tolist(),
        "unlabelled": int(pixels[IGNORE]),
    }


def summary(content: dict) -> str:
    """The masks' pixels per class, as shares, and the classes without one."""
    total = max(1, sum(content["pixels"]) + content["unlabelled"])
    counted = dict(zip(content["mask_classes"], content["pixels"], strict=True))
    shares = [f"{name} {count / total:.2%}" for name, count in counted.items() if count]
    shares.append(f"not labelled {content['unlabelled'] / total:.2%}")
    empty = [name for name, count in counted.items() if not count]
    return _listed("pixels", shares) + (_listed("\nclasses without a pixel", empty) if empty else "")


def _listed(what: str, parts: list[str]) -> str:
    """`what: part, part, ...` in lines that break between parts, not within: no-break spaces hold a part together."""
    text = f"{what}: {', '.join(part.replace(' ', chr(160)) for part in parts)}"
    return textwrap.fill(text, 120, subsequent_indent="  ", replace_whitespace=False).replace(chr(160), " ")


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
