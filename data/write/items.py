"""A dataset's items -> checked samples: dicts with `image` and, where given, `label` and `mask`.

What one item alone has wrong is a ValueError, as is an image that cannot be read: the item can be left out. What shows
that the items are not what was asked for is a `StructureError`, which ends the writing.
"""

import difflib
from collections.abc import Mapping
from typing import Any

import numpy as np
from ffcv.fields.rgb_image import resizer
from PIL import Image

from data import corrupt
from data.decode import IGNORE
from data.images import to_labels, to_upright, turn_mask

MAX_LABEL = np.iinfo(np.int64).max


class StructureError(ValueError):
    """The items are not of the kind that was asked for, or of several kinds."""


class Items:
    """The checked items of a dataset.

    Args:
        dataset: see `write`.
        image_key, label_key, mask_key: keys that all items must have; None: `image`, and `label` and `mask` if there.
        num_mask_classes: classes that a mask may have.

    Attributes:
        unused: keys of the item that was read last which are not taken.
    """

    def __init__(
        self, dataset: Any, image_key: str | None, label_key: str | None, mask_key: str | None, num_mask_classes: int
    ):
        self.dataset, self.num_mask_classes = dataset, num_mask_classes
        self.given = {"image": image_key, "label": label_key, "mask": mask_key}
        self.unused: list[str] = []

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.dataset[index]
        parts = self._from_keys(item, index) if isinstance(item, Mapping) else self._from_values(item, index)
        pixels, orientation = to_upright(parts["image"])
        sample = {"image": pixels}
        if "label" in parts:
            sample["label"] = to_label(parts["label"])
        if "mask" in parts:
            sample["mask"] = self._mask(parts["mask"], orientation, pixels.shape[:2])
        return sample

    def _from_keys(self, item: Mapping, index: int) -> dict[str, Any]:
        parts, taken = {}, set()
        for part, given in self.given.items():
            key = given or part
            if key in item:
                parts[part] = item[key]
                taken.add(key)
            elif given or part == "image":
                keys = [str(name) for name in item]
                near = difflib.get_close_matches(key, keys, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; give the right one as {part}_key"
                raise StructureError(f"{part}_key {key!r}: item {index} has only {', '.join(map(repr, keys))}{hint}")
        self.unused = [str(key) for key in item if key not in taken]
        return parts

    def _from_values(self, item: Any, index: int) -> dict[str, Any]:
        """An item without keys: the image first; then a label, which is one number, a mask, or both."""
        for part, key in self.given.items():
            if key is not None:
                raise StructureError(f"{part}_key {key!r}: item {index} is a {type(item).__name__} without keys")
        image, *targets = item if isinstance(item, tuple | list) and len(item) else (item,)
        if len(targets) == 1 and isinstance(targets[0], tuple):  # as torchvision gives several targets
            targets = [*targets[0]]
        parts = {"image": image}
        for target in targets:
            part = "mask" if _is_mask(target) else "label"
            if part in parts:
                kinds = ", ".join(type(value).__name__ for value in (image, *targets))
                raise StructureError(
                    f"item {index} is ({kinds}); it must be an image, (image, label), (image, mask) or both"
                )
            parts[part] = target
        return parts

    def _mask(self, mask: Any, orientation: int, size: tuple[int, int]) -> np.ndarray:
        try:
            labels, own = to_labels(mask) if isinstance(mask, Image.Image) else (np.asarray(mask), 1)
        except ValueError as error:
            raise ValueError(f"its mask {error}") from error
        if labels.ndim == 2:
            labels = turn_mask(labels, own, orientation, size)
        if labels.dtype.kind not in "biu" or labels.shape != size:
            raise ValueError(f"its mask is {labels.dtype} {list(labels.shape)}, not integers {list(size)} as its image")
        outside = (labels < 0) | (labels >= self.num_mask_classes) & (labels != IGNORE)
        if outside.any():
            raise ValueError(f"its mask has class {labels[outside][0]}, of {self.num_mask_classes} and {IGNORE}")
        return np.ascontiguousarray(labels, dtype=np.uint8)


class Corrupted:
    """Items with corrupted images, of the size at which they are stored."""

    def __init__(self, items: Items, max_side: int | None, name: str, severity: int, seed: int):
        self.items, self.max_side, self.name, self.severity, self.seed = items, max_side, name, severity, seed

    @property
    def unused(self) -> list[str]:
        return self.items.unused

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.items[index]
        image = resizer(item["image"], self.max_side)
        return item | {"image": corrupt.corrupt(image, self.name, self.severity, index, self.seed)}


def to_label(value: Any) -> int:
    """A label: one whole number in 0..2^63-1. It may be an int, a number of numpy's, or an array or tensor of one.

    Raises:
        ValueError: it is not. The message says what it is.
    """
    if value is None or isinstance(value, str | bytes | Mapping | Image.Image):
        hint = "; give its number" if isinstance(value, str) else ""
        shown = repr(value) if value is None or isinstance(value, str | bytes) else f"a {type(value).__name__}"
        raise ValueError(f"label {shown} is not a whole number{hint}")
    try:
        array = np.asarray(value)
    except Exception as error:  # of another's type anything may be wrong
        raise ValueError(f"label is a {type(value).__name__}, not a whole number ({error})") from error
    if array.size != 1:
        raise ValueError(f"label has {array.size} values; it must be one whole number")
    number = array.reshape(-1)[0].item() if array.dtype != object else array.reshape(-1)[0]
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if type(number) is not int:  # a bool is not one
        raise ValueError(f"label {number!r} is not a whole number")
    if number < 0:
        raise ValueError(f"label {number} is below 0")
    if number > MAX_LABEL:
        raise ValueError(f"label {number} is above {MAX_LABEL}, the most that 64 bits hold")
    return number


def _is_mask(target: Any) -> bool:
    """Whether a target has rows and columns, or is an image of another kind, rather than one number."""
    shape = tuple(getattr(target, "shape", ()))
    return isinstance(target, Image.Image) or (len(shape) >= 2 and shape != (1,) * len(shape))


def one_line(error: BaseException) -> str:
    """An error as one short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
