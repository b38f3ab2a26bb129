"""What a loader shows of each image: four descriptions of a view, each with its checks.

`RandomView` is for training on images, `MaskedView` for training on images with masks, `CentreView` for evaluation, and
`StoredView` for evaluation of masks at the images' own size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.augment import Pair
from data.decode import CentreCrop, MaskedCrop, RandomCrop, Whole

ImageSize = int | tuple[int, int]  # a side, or (height, width), pixels


@dataclass(frozen=True, kw_only=True)
class RandomView:
    """A random resized crop and a random flip, see `augment.random_view`.

    Raises:
        ValueError: a value is out of its range. This holds for every view.
    """

    image_size: ImageSize
    scale: Pair = (0.08, 1.0)
    ratio: Pair = (3 / 4, 4 / 3)
    hflip: float = 0.5

    def __post_init__(self) -> None:
        sides(self.image_size)
        _check_pair("scale", self.scale, most=1.0)
        _check_pair("ratio", self.ratio)
        _check_hflip(self.hflip)

    def drawn(self, mean: Sequence[float], sizes: np.ndarray) -> RandomCrop:
        """What the compiled code reads of this view.

        Args:
            mean: colour (R, G, B) that becomes 0 when it is normalised, in 0..1.
            sizes: int64 [n, 2], (height, width) of the stored images.
        """
        return RandomCrop(*sides(self.image_size), *map(float, (*self.scale, *self.ratio, self.hflip)))


@dataclass(frozen=True, kw_only=True)
class MaskedView:
    """A random crop of image and mask, by segmentation's usual recipe, see `augment.masked_view`.

    `photometric` also changes the image's colours, see `augment.distort`.
    """

    image_size: ImageSize
    resize: Pair = (0.5, 2.0)
    hflip: float = 0.5
    max_share: float = 0.75
    photometric: bool = True

    def __post_init__(self) -> None:
        sides(self.image_size)
        _check_pair("resize", self.resize)
        _check_hflip(self.hflip)
        if not 0 < self.max_share <= 1:
            raise ValueError(f"max_share {self.max_share}: must be above 0 and at most 1")

    def drawn(self, mean: Sequence[float], sizes: np.ndarray) -> MaskedCrop:
        how = map(float, (*self.resize, self.hflip, self.max_share))
        padding = (round(255 * value) for value in mean)
        return MaskedCrop(*sides(self.image_size), *how, bool(self.photometric), *padding)


@dataclass(frozen=True, kw_only=True)
class CentreView:
    """A centre crop. `crop_pct` is its side as a share of the image's shorter side."""

    image_size: ImageSize
    crop_pct: float = 1.0

    def __post_init__(self) -> None:
        sides(self.image_size)
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct {self.crop_pct}: must be above 0 and at most 1")

    def drawn(self, mean: Sequence[float], sizes: np.ndarray) -> CentreCrop:
        return CentreCrop(*sides(self.image_size), float(self.crop_pct))


@dataclass(frozen=True)
class StoredView:
    """The whole image and its mask, as they are stored."""

    def drawn(self, mean: Sequence[float], sizes: np.ndarray) -> Whole:
        return Whole(int(sizes.prod(axis=1).max()))


View = RandomView | MaskedView | CentreView | StoredView


def sides(image_size: ImageSize) -> tuple[int, int]:
    """(height, width), pixels."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < 1:
        raise ValueError(f"image_size {image_size}: must be at least 1 pixel")
    return height, width


def _check_pair(name: str, pair: Pair, most: float = math.inf) -> None:
    low, high = pair
    if not 0 < low <= high <= most:
        raise ValueError(f"{name} {(low, high)}: must be 0 < least <= most" + (" <= 1" if most == 1 else ""))


def _check_hflip(hflip: float) -> None:
    if not 0 <= hflip <= 1:
        raise ValueError(f"hflip {hflip}: must be a probability")
