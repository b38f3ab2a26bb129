"""Resizing: OpenCV's averages, bilinear where it grows, and mirrored in the same pass."""

import numpy as np
import pytest
import torch

from data import resize as module
from data.resize import resize

SOURCE = np.random.default_rng(0).integers(0, 256, (120, 150, 3)).astype(np.uint8)


def resized(crop: tuple[int, int, int, int], size: tuple[int, int], flip: bool = False) -> np.ndarray:
    out = np.empty((*size, 3), np.uint8)
    resize(SOURCE, *crop, flip, out)
    return out


def test_enlarging_is_bilinear():
    crop = torch.from_numpy(SOURCE[2:17, 3:23]).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(crop, (41, 67), mode="bilinear", align_corners=False)
    found = torch.from_numpy(resized((2, 3, 15, 20), (41, 67))).permute(2, 0, 1)
    assert (found - expected[0]).abs().max() <= 0.51


@pytest.mark.parametrize(
    ("crop", "size"),
    [
        ((2, 3, 101, 140), (64, 65)),
        ((0, 0, 120, 150), (64, 50)),
        ((119, 149, 1, 1), (1, 1)),
        ((7, 0, 113, 150), (7, 3)),
    ],
)
def test_shrinking_is_opencvs_average(crop, size):
    """To the bit where OpenCV was compiled for x86-64; where it fuses products and sums, to a grey level."""
    (top, left, h, w), expected = crop, np.empty((*size, 3), np.uint8)
    args = (SOURCE.ctypes.data, *SOURCE.shape[:2], top, top + h, left, left + w, expected.ctypes.data, *size)
    module.lib.resize(*map(int, (0, *args)))
    found = resized(crop, size)
    assert np.abs(found.astype(int) - expected).max() <= 1 and (found != expected).mean() < 0.01


@pytest.mark.parametrize("size", [(64, 65), (200, 211), (100, 211), (60, 75), (120, 150)])  # smaller, larger, both, ...
def test_flips(size):
    crop = (0, 0, 120, 150)
    assert np.array_equal(resized(crop, size, flip=True), resized(crop, size)[:, ::-1])
