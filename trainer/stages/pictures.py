"""Pictures of patch features, teacher beside student: principal components as red, green and blue."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

SIDE, MARGIN, TITLE, CAPTION = 224, 4, 20, 20  # pixels: height of an image, space between two, for titles, captions


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


@dataclass(frozen=True)
class Shown:
    """An image of an evaluation, with the last patch features of teacher and student; on the CPU."""

    index: int
    label: int | None
    cosine: float  # mean over tokens, student to teacher
    teacher: tuple[int, float] | None  # the class that it predicts, and its probability
    student: tuple[int, float] | None
    image: Tensor  # [3, H, W]
    of_teacher: Tensor  # [D, rows, columns]
    of_student: Tensor


def draw_features(
    path: Path,
    shown: Sequence[Shown],
    images: Sequence[Tensor],
    labels: Sequence[str] | None,
    head: Sequence[str] | None,
) -> None:
    """Write a picture, a row per image: the image, the teacher's patch features, the student's in the same colours.

    Beside it a JSON of the same name says of each row what was predicted, and where its tiles are.

    Args:
        path: of the PNG; its folder is made.
        images: what is shown of them, [3, H, W] in 0..1.
        labels, head: names of the classes of the images, and of those that the models predict.

    Raises:
        OSError: it cannot be written.
    """
    colours = PrincipalColours(torch.cat([row.of_teacher.float().flatten(1).mT for row in shown]))
    height, width = SIDE, round(SIDE * images[0].shape[-1] / images[0].shape[-2])
    step = height + CAPTION + MARGIN
    canvas = Image.new("RGB", (3 * (width + MARGIN) - MARGIN, TITLE + len(shown) * step - MARGIN), "white")
    draw, font, rows = ImageDraw.Draw(canvas), ImageFont.load_default(TITLE - 6), []
    for row, (found, image) in enumerate(zip(shown, images, strict=True)):
        smooth = {"mode": "bilinear", "antialias": True}
        tiles = {
            "image": F.interpolate(image.float()[None], (height, width), **smooth),
            "teacher": F.interpolate(_grid(colours, found.of_teacher), (height, width)),
            "student": F.interpolate(_grid(colours, found.of_student), (height, width)),
        }
        top, places = TITLE + row * step, {}
        for column, (name, tile) in enumerate(tiles.items()):
            left = column * (width + MARGIN)
            if row == 0:
                draw.text((left + width // 2, TITLE // 2), name, "black", font, anchor="mm")
            pixels = (tile[0].clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
            canvas.paste(Image.fromarray(np.ascontiguousarray(pixels)), (left, top))
            places[name] = [left, top, left + width, top + height]
        about = {"index": found.index, "label": _name(found.label, labels), "cosine": found.cosine, "tiles": places}
        for name, prediction in (("teacher", found.teacher), ("student", found.student)):
            if prediction is not None:
                about[name] = {"class": _name(prediction[0], head), "probability": prediction[1]}
        rows.append(about)
        draw.text((0, top + height + CAPTION // 2), in_words(about), "black", font, anchor="lm")
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)
    path.with_suffix(".json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")


def in_words(row: Mapping[str, Any]) -> str:
    """A row of the JSON as a caption."""
    parts = [f"image {row['index']}" if row["label"] is None else str(row["label"]), f"cosine {row['cosine']:.3f}"]
    parts += [
        f"{name}: {row[name]['class']} ({row[name]['probability']:.0%})"
        for name in ("teacher", "student")
        if name in row
    ]
    return "   ".join(parts)


def _name(index: int | None, names: Sequence[str] | None) -> str | None:
    if index is None:
        return None
    return names[index] if names is not None and index < len(names) else f"class {index}"


def _grid(colours: PrincipalColours, x_DRC: Tensor) -> Tensor:
    return colours(x_DRC.float().permute(1, 2, 0)).permute(2, 0, 1)[None]
