"""Shifted images: common corruptions at five severities, after Hendrycks & Dietterich, arXiv 1903.12261.

The definitions are the paper's, the constants those of its published data sets: of CIFAR-10-C for images of about 32
pixels, of ImageNet-C at 64 for about 64, and of ImageNet-C for larger ones, which were made for 224. So corrupt images
at the size at which they will be looked at. As in those data sets the result is cut to 8 bits, not rounded.

What is random is a pure function of (seed, index), and alike at all severities. The packages that offer the same
(imagecorruptions, imagenet-c) draw from numpy's global generator and had their last releases years ago.
"""

import io
from collections.abc import Callable, Sequence

import cv2
import numpy as np
from PIL import Image
from scipy import ndimage

SEVERITIES = (1, 2, 3, 4, 5)


def corrupt(image: np.ndarray, name: str, severity: int, index: int, seed: int = 0) -> np.ndarray:
    """A corrupted copy of an image.

    Args:
        image: uint8 [H, W, 3].
        name: a key of `CORRUPTIONS`.
        severity: 1 (least) to 5.
        index: of the image in its data set.
        seed: of the data set.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ValueError: no such corruption or severity.
    """
    check(name, severity)
    function, *tables = CORRUPTIONS[name]
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, index])))
    x = function(image / 255.0, tables[_table(image)][severity - 1], rng)
    return (x.clip(0, 1) * 255 + 1e-6).astype(np.uint8)  # 1e-6: a pixel that is left alone stays as it is


def check(name: str, severity: int) -> None:
    """Raises ValueError unless there is such a corruption and severity."""
    if name not in CORRUPTIONS:
        raise ValueError(f"corrupt {name!r}: there is no such corruption, only {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity {severity!r}: must be in 1..5")


def _table(image: np.ndarray) -> int:
    """Which constants: 0 for about 32 pixels, 1 for 64, 2 for 224 and more; the limits are half-way, in ratio."""
    side = min(image.shape[:2])
    return 0 if side <= 45 else 1 if side <= 119 else 2


# Each: float64 [H, W, 3] in 0..1, a severity's constant, a generator -> float [H, W, 3], to be clipped to 0..1.


def gaussian_noise(x: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """x + N(0, sigma)."""
    return x + rng.normal(0, sigma, x.shape)


def speckle_noise(x: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """x + x N(0, sigma)."""
    return x + x * rng.normal(0, sigma, x.shape)


def shot_noise(x: np.ndarray, photons: float, rng: np.random.Generator) -> np.ndarray:
    """Poisson(x photons) / photons."""
    return rng.poisson(x * photons) / photons


def impulse_noise(x: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Each value is replaced with probability `amount`, by 0 or 1 alike."""
    u = rng.uniform(size=x.shape)
    return np.where(u < amount / 2, 0.0, np.where(u < amount, 1.0, x))


def contrast(x: np.ndarray, c: float, rng: np.random.Generator) -> np.ndarray:
    """(x - mean) c + mean, per channel."""
    mean = x.mean(axis=(0, 1), keepdims=True)
    return (x - mean) * c + mean


def brightness(x: np.ndarray, c: float, rng: np.random.Generator) -> np.ndarray:
    """HSV's value plus c: at equal hue and saturation all channels keep their ratio to the largest, the value."""
    value = x.max(axis=2, keepdims=True)
    ratio = np.divide(x, value, out=np.ones_like(x), where=value > 0)
    return ratio * (value + c).clip(0, 1)


def gaussian_blur(x: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """A Gaussian filter, cut at 4 sigma; the image's edge is repeated."""
    return ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest", truncate=4)


def motion_blur(x: np.ndarray, c: tuple[int, float], rng: np.random.Generator) -> np.ndarray:
    """Blur of radius and sigma `c` along a direction within 45 degrees of the horizontal."""
    return _streak(x, *c, angle=rng.uniform(-45, 45))


def snow(x: np.ndarray, c: tuple, rng: np.random.Generator) -> np.ndarray:
    """Flakes drawn out by motion, over an image that is whitened.

    `c`: mean and sigma of the noise that flakes are cut from, their zoom, the threshold of the cut, radius and sigma of
    their motion, share of the image that is not whitened.
    """
    mean, sigma, zoom, threshold, radius, streak, keep = c
    flakes = _zoom(rng.normal(mean, sigma, x.shape[:2]), zoom)
    flakes = np.where(flakes < threshold, 0, flakes).clip(0, 1)
    flakes = _streak(np.floor(flakes * 255) / 255, radius, streak, angle=rng.uniform(-135, -45))[..., None]
    gray = x @ np.array([0.299, 0.587, 0.114])
    x = keep * x + (1 - keep) * np.maximum(x, gray[..., None] * 1.5 + 0.5)
    return x + flakes + np.rot90(flakes, 2)


def pixelate(x: np.ndarray, c: float, rng: np.random.Generator) -> np.ndarray:
    """Shrunk to a share `c` of each side and back, by box filters."""
    image = Image.fromarray((x * 255).round().astype(np.uint8))
    small = image.resize((max(1, int(image.width * c)), max(1, int(image.height * c))), Image.Resampling.BOX)
    return np.asarray(small.resize(image.size, Image.Resampling.BOX)) / 255.0


def jpeg_compression(x: np.ndarray, quality: int, rng: np.random.Generator) -> np.ndarray:
    """Through a JPEG of this quality."""
    buffer = io.BytesIO()
    Image.fromarray((x * 255).round().astype(np.uint8)).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer)) / 255.0


# name -> (function, constants of CIFAR-10-C, of ImageNet-C at 64 pixels, of ImageNet-C), five severities each
CORRUPTIONS: dict[str, tuple[Callable, Sequence, Sequence, Sequence]] = {
    "gaussian_noise": (
        gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10), (0.04, 0.08, 0.12, 0.15, 0.18), (0.08, 0.12, 0.18, 0.26, 0.38)
    ),
    "shot_noise": (shot_noise, (500, 250, 100, 75, 50), (250, 100, 50, 30, 15), (60, 25, 12, 5, 3)),
    "impulse_noise": (
        impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07), (0.01, 0.02, 0.05, 0.08, 0.14), (0.03, 0.06, 0.09, 0.17, 0.27)
    ),
    "speckle_noise": (
        speckle_noise, (0.06, 0.1, 0.12, 0.16, 0.2), (0.15, 0.2, 0.25, 0.3, 0.35), (0.15, 0.2, 0.35, 0.45, 0.6)
    ),
    "gaussian_blur": (gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1), (0.5, 0.75, 1, 1.25, 1.5), (1, 2, 3, 4, 6)),
    "motion_blur": (
        motion_blur,
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    ),
    "snow": (
        snow,
        ((0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
         (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8)),
        ((0.1, 0.2, 1, 0.6, 8, 3, 0.8), (0.1, 0.2, 1, 0.5, 10, 4, 0.8), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.7),
         (0.25, 0.3, 2.25, 0.6, 12, 6, 0.65), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.6)),
        ((0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7), (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
         (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55)),
    ),
    "brightness": (brightness, (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (contrast, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "pixelate": (pixelate, (0.95, 0.9, 0.85, 0.75, 0.65), (0.9, 0.8, 0.7, 0.6, 0.5), (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": (jpeg_compression, (80, 65, 58, 50, 40), (65, 58, 50, 40, 25), (25, 18, 15, 10, 7)),
}  # fmt: skip


def _streak(x: np.ndarray, radius: int, sigma: float, angle: float) -> np.ndarray:
    """ImageMagick's motion blur, as in the data sets: half a Gaussian over 2 radius + 1 pixels on one side of each
    pixel, in the direction `angle` (degrees, from the x axis down); the image's edge is repeated. Rounded to 8 bits."""
    step = np.arange(2 * radius + 1)
    weights = np.exp(-(step**2) / (2 * sigma**2))
    towards = np.deg2rad(angle)
    columns, rows = (np.ceil(step * part - 0.5).astype(int) for part in (np.cos(towards), np.sin(towards)))
    kernel = np.zeros((4 * radius + 1, 4 * radius + 1))
    np.add.at(kernel, (2 * radius + rows, 2 * radius + columns), weights / weights.sum())
    return np.rint(cv2.filter2D(x, -1, kernel, borderType=cv2.BORDER_REPLICATE) * 255) / 255


def _zoom(x: np.ndarray, factor: float) -> np.ndarray:
    """The middle of [H, W], enlarged `factor` times (>= 1, bilinear): [H, W]."""
    height, width = x.shape
    part = tuple(int(np.ceil(side / factor)) for side in x.shape)
    top, left = (height - part[0]) // 2, (width - part[1]) // 2
    large = ndimage.zoom(x[top : top + part[0], left : left + part[1]], factor, order=1)
    top, left = (large.shape[0] - height) // 2, (large.shape[1] - width) // 2
    return large[top : top + height, left : left + width]
