"""How a segmentation model looks at an image in evaluation: whole or in sliding windows, at some scales, mirrored."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.config import Settings

Size = tuple[int, int]  # height, width; pixels


@dataclass(frozen=True)
class Views:
    """The views of one image: its shorter side is resized to `short_side` times each of `scales`, the aspect kept."""

    window: Size  # what the model was trained on
    short_side: int
    slide: bool  # by the window; else the resized image goes in whole
    stride: float  # of the windows, as a share of their side
    scales: tuple[float, ...]
    flip: bool  # mirrored too
    batch: int  # images or windows a call, at most

    @classmethod
    def of(cls, settings: Settings, image_size: int | Size, batch: int) -> "Views":
        """As the settings say; `image_size` is that of training."""
        given = settings.segmentation
        window = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        slide, scales = given.mode == "slide", tuple(given.scales)
        return cls(window, given.short_side or min(window), slide, given.stride, scales, given.flip, batch)

    def calls(self, images: int, size: Size) -> int:
        """How often `probabilities` calls the model for so many images of one size."""
        passes = (math.ceil(images * len(self.boxes(self.resized(size, scale))) / self.batch) for scale in self.scales)
        return sum(passes) * (2 if self.flip else 1)

    def resized(self, size: Size, scale: float) -> Size:
        """What an image of `size` is resized to."""
        factor = self.short_side * scale / min(size)
        return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))

    def boxes(self, size: Size) -> list[tuple[slice, slice]]:
        """Rows and columns of the windows that cover an image of `size`, the last ones moved inside."""
        if not self.slide:
            return [(slice(0, size[0]), slice(0, size[1]))]
        sides = []
        for length, window in zip(size, self.window, strict=True):
            window = min(window, length)
            step = max(1, int(window * self.stride))
            starts = range(math.ceil((length - window) / step) + 1)
            sides.append([slice(at := min(i * step, length - window), at + window) for i in starts])
        return [(rows, columns) for rows in sides[0] for columns in sides[1]]

    def probabilities(self, model: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
        """Of each class at each pixel, the mean over all views: [B, 3, H, W] -> [B, C, H, W], fp32.

        A pixel's logits are averaged over the windows that it lies in, and resized to the image's own size; their
        softmax is averaged over scales and the mirrored image. The field does it so (mmsegmentation).

        Args:
            model: images of any size, at most `batch` -> logits of that size, [b, C, h, w] in fp32.
        """
        size, total = tuple(image.shape[-2:]), None
        for scale in self.scales:
            to = self.resized(size, scale)
            view = image if to == size else F.interpolate(image, to, mode="bilinear", antialias=True)
            for mirrored in (False, True) if self.flip else (False,):
                logits = self._logits(model, view.flip(-1) if mirrored else view)
                logits = F.interpolate(logits.flip(-1) if mirrored else logits, size, mode="bilinear")
                total = logits.softmax(1) if total is None else total + logits.softmax(1)
        return total / (len(self.scales) * (2 if self.flip else 1))

    def _logits(self, model: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
        boxes = self.boxes(tuple(image.shape[-2:]))
        parts = [(i, *box) for box in boxes for i in range(len(image))]
        total = None
        count = torch.zeros(image.shape[-2:], device=image.device)
        for at in range(0, len(parts), self.batch):
            chunk = parts[at : at + self.batch]
            logits = model(torch.stack([image[part] for part in _with_channels(chunk)]))
            if total is None:
                total = logits.new_zeros(len(image), logits.shape[1], *image.shape[-2:])
            for part, values in zip(_with_channels(chunk), logits, strict=True):
                total[part] += values
        for box in boxes:
            count[box] += 1
        return total / count


def _with_channels(parts: list[tuple[int, slice, slice]]) -> list[tuple[int, slice, slice, slice]]:
    return [(i, slice(None), rows, columns) for i, rows, columns in parts]
