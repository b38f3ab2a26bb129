"""Pictures of masks side by side, with a legend."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from models import IGNORE


@dataclass(frozen=True)
class Shown:
    """An image of an evaluation beside its truth and what was found; on the CPU."""

    index: int
    iou: float  # mean over the classes that truth or prediction has
    image: Tensor  # [3, H, W]
    truth: Tensor  # uint8 [H, W]
    found: Tensor  # uint8 [H, W]


def draw_masks(
    path: Path,
    images: Sequence[Tensor],
    masks: dict[str, Sequence[Tensor]],
    titles: Sequence[str],
    names: Sequence[str],
    palette: Sequence[Sequence[int]],
) -> None:
    """Write a picture, a row per image: the image, then its masks. The legend has the classes that are to be seen.

    Args:
        path: of the PNG; its folder is made.
        images: each [3, H, W] in 0..1.
        masks: a column a name: of each image classes, or IGNORE (drawn white), uint8 [H, W].
        titles: of the rows.
        names, palette: of the classes; (R, G, B) in 0..255.

    Raises:
        OSError: it cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    colours = np.full((IGNORE + 1, 3), 255, np.uint8)
    colours[: len(palette)] = palette
    columns = 1 + len(masks)
    figure, axes = plt.subplots(
        len(images), columns, figsize=(2.4 * columns, 2.4 * len(images) + 1), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for row, (image, title) in enumerate(zip(images, titles, strict=True)):
        axes[row, 0].imshow(image.permute(1, 2, 0).clamp(0, 1).numpy())
        axes[row, 0].set_ylabel(title)
        for column, each in enumerate(masks.values(), 1):
            axes[row, column].imshow(colours[each[row].numpy()], interpolation="nearest")
    for axis, name in zip(axes[0], ("image", *masks), strict=True):
        axis.set_title(name)
    seen = sorted({int(v) for each in masks.values() for mask in each for v in mask.unique()} - {IGNORE})
    patches = [Patch(facecolor=colours[value] / 255, edgecolor="0.5", label=names[value]) for value in seen]
    figure.legend(handles=patches, loc="outside lower center", ncols=2 * columns, fontsize="small", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
