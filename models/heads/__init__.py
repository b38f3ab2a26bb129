"""Segmentation heads on a backbone's patch features, in one table.

A new one is a file here with a subclass of `Head`, and a line in `HEADS`.
"""

from importlib import import_module
from typing import Any

from .base import IGNORE, Head

# name -> (file, class). A file is imported when it is asked for: it may need more than the wheel does.
HEADS: dict[str, tuple[str, str]] = {
    "linear": ("linear", "Linear"),
    "upernet": ("upernet", "UPerNet"),
    "mask2former": ("mask2former", "Mask2Former"),
}


def build_head(name: str, width: int, num_classes: int, **kwargs: Any) -> Head:
    """The head called `name`, untrained.

    Args:
        width: of the backbone's features, D.
        num_classes: C.
        kwargs: the head's own architecture.

    Raises:
        ValueError: no head has that name, or it takes no such keyword or value; or what it needs is not installed.
    """
    if name not in HEADS:
        raise ValueError(f"segmentation.head {name!r}: unknown; choose one of {', '.join(HEADS)}")
    file, kind = HEADS[name]
    head = getattr(import_module(f".{file}", __name__), kind)
    try:
        return head(width, num_classes, **kwargs)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"segmentation.kwargs {kwargs}: the head {name} cannot be built so ({said})") from error


__all__ = ["HEADS", "IGNORE", "Head", "build_head"]
