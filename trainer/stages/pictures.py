"""Pictures of patch features, teacher beside student: principal components as red, green and blue."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

SIDE, MARGIN, TITLE = 224, 4, 20  # pixels: height of an image, space between two, space for the titles


class PrincipalColours:
    """Three principal components of patch features as red, green and blue, as in figure 1 of DINOv2, arXiv 2304.07193.

    Fitted on the patches of all images together. The background is left in: to cut it off, the paper's authors choose
    by eye the sign of the first component and a threshold.
    """

    def __init__(self, patches_ND: Tensor) -> None:
        """Fit; from the 1st to the 99th percentile a component goes from dark to bright."""
        x = patches_ND.double()
        self.mean = x.mean(0)
        axes = torch.linalg.eigh((x - self.mean).mT @ (x - self.mean)).eigenvectors[:, -3:].flip(1)
        self.axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()  # of the two signs, always one
        shares = torch.tensor([0.01, 0.99], dtype=torch.float64, device=x.device)
        self.low, self.high = torch.quantile(self._components(x), shares, dim=0)

    def __call__(self, patches: Tensor) -> Tensor:
        """[..., D] -> [..., 3] in 0..1."""
        return ((self._components(patches.double()) - self.low) / (self.high - self.low).clamp_min(1e-12)).clamp(0, 1)

    def _components(self, x: Tensor) -> Tensor:
        return (x - self.mean) @ self.axes


def draw_features(path: Path, image: Tensor, teacher: Tensor, student: Tensor) -> None:
    """Write a picture, a row per image: the image, the teacher's patch features, the student's in the same colours.

    Args:
        path: of the PNG; its folder is made.
        image: [B, 3, height, width] in 0..1.
        teacher, student: patch features [B, D, rows, columns] of the same layer; their components are the teacher's.

    Raises:
        OSError: it cannot be written.
    """
    teacher, student = (x.permute(0, 2, 3, 1).float().cpu() for x in (teacher, student))
    colours = PrincipalColours(teacher.flatten(0, 2))
    height, width = SIDE, round(SIDE * image.shape[-1] / image.shape[-2])
    columns = {
        "image": F.interpolate(image.float().cpu(), (height, width), mode="bilinear", antialias=True),
        **{
            name: F.interpolate(colours(x).permute(0, 3, 1, 2), (height, width), mode="nearest")
            for name, x in (("teacher", teacher), ("student", student))
        },
    }
    canvas = Image.new(
        "RGB", (len(columns) * (width + MARGIN) - MARGIN, TITLE + len(image) * (height + MARGIN) - MARGIN), "white"
    )
    font = ImageFont.load_default(TITLE - 6)
    for column, (name, tiles) in enumerate(columns.items()):
        left = column * (width + MARGIN)
        ImageDraw.Draw(canvas).text((left + width // 2, TITLE // 2), name, "black", font, anchor="mm")
        for row, tile in enumerate((tiles.clamp(0, 1) * 255).round().to(torch.uint8)):
            there = (left, TITLE + row * (height + MARGIN))
            canvas.paste(Image.fromarray(np.ascontiguousarray(tile.permute(1, 2, 0))), there)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)
