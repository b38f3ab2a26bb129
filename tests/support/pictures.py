"""Small pictures to write, and what a written file of them holds."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import eval_loader, inspect


def picture(index: int, size: tuple[int, int] = (20, 16)) -> Image.Image:
    pixels = np.random.default_rng(index).integers(0, 256, (2, 2, 3)).astype(np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)


def content(path: Path, **settings) -> tuple[np.ndarray, list[int] | None]:
    """The images, uint8 [N, H, W, 3], and labels of a file of equal images."""
    height, width = inspect(path).max_size
    loader = eval_loader(path, image_size=(height, width), batch_size=16, mean=(0, 0, 0), std=(1, 1, 1), workers=1)
    batches = list(loader.epoch())
    images = torch.cat([batch["image"] for batch in batches]).permute(0, 2, 3, 1) * 255
    labels = torch.cat([batch["label"] for batch in batches]).tolist() if loader.has_labels else None
    return images.round().to(torch.uint8).numpy(), labels
