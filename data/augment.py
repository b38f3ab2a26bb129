"""What a sample looks like: crop, size, flip and colours, as a pure function of (seed, epoch, sample index).

FFCV's own random decoders draw from numba's per-thread generator, so their views change from run to run and with the
number of workers. Here every draw is a counter-based hash (splitmix64) of (seed, epoch, index, number of the draw): the
same sample gets the same view whatever the workers, the batch size, the rank, and wherever a run was resumed.
"""

import math
from functools import partial

import numba
import numpy as np

from data.compiled import compiled

Pair = tuple[float, float]

# numba compiles them with the flags of what calls them first: of `decode`, FFCV's fastmath.


@numba.njit(nogil=True)
def _mix(x):
    """splitmix64's finaliser: uint64 -> uint64, a bijection."""
    x = np.uint64(x) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@numba.njit(nogil=True)
def sample_key(seed, epoch, index):
    """What all random numbers of a sample in an epoch are drawn from, uint64."""
    return _mix(_mix(_mix(np.uint64(seed)) ^ np.uint64(epoch)) ^ np.uint64(index))


@partial(compiled, parallel=False)
def sample_keys(seed, epoch, indices):
    """`sample_key` of each index: int64 [B] -> uint64 [B]."""
    keys = np.empty(len(indices), np.uint64)
    for i in range(len(indices)):
        keys[i] = sample_key(seed, epoch, indices[i])
    return keys


@numba.njit(nogil=True)
def uniform(seed, epoch, index, draw):
    """Number `draw` of a sample's random numbers in an epoch, float64 in [0, 1). The views use draws 0 to 40."""
    x = _mix(sample_key(seed, epoch, index) ^ np.uint64(draw))
    return np.float64(x >> np.uint64(11)) * 2.0**-53


@numba.njit(nogil=True)
def lots(count: int, seed: int) -> np.ndarray:
    """A lot for each sample index, float64 [count] in [0, 1), to draw splits and sub-samples by."""
    out = np.empty(count)
    for index in range(count):
        out[index] = uniform(seed, 0, index, 1 << 32)  # a number that no view draws
    return out


def balanced(labels: np.ndarray, lots: np.ndarray) -> np.ndarray:
    """The order in which images are drawn: one per class, then a second per class, and so on.

    Args:
        labels: int64 [n].
        lots: float64 [n]; the lowest lot of a class is drawn first.

    Returns:
        Positions int64 [n]. Any first part of them has classes as equal as the images allow.
    """
    by_class = np.lexsort((lots, labels))
    labels = labels[by_class]
    turn = np.arange(len(labels)) - np.searchsorted(labels, labels)
    return by_class[np.lexsort((lots[by_class], turn))]


@numba.njit(nogil=True)
def random_view(seed, epoch, index, height, width, scale, ratio, hflip):
    """Random resized crop and flip of a sample, as torchvision's RandomResizedCrop and RandomHorizontalFlip draw them.

    Args:
        seed, epoch, index: what the view is a function of.
        height, width: of the stored image, pixels.
        scale: (least, most) share of the image's area.
        ratio: (least, most) width / height of the crop.
        hflip: probability of a flip.

    Returns:
        (top, left, height, width, flip) of the crop in the stored image, pixels.
    """
    height, width = np.int64(height), np.int64(width)
    flip = uniform(seed, epoch, index, 0) < hflip
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(10):
        draw = 1 + 4 * attempt
        area = height * width * (scale[0] + (scale[1] - scale[0]) * uniform(seed, epoch, index, draw))
        aspect = math.exp(low + (high - low) * uniform(seed, epoch, index, draw + 1))
        w = np.int64(round(math.sqrt(area * aspect)))
        h = np.int64(round(math.sqrt(area / aspect)))
        if 0 < w <= width and 0 < h <= height:
            top = np.int64(uniform(seed, epoch, index, draw + 2) * (height - h + 1))
            left = np.int64(uniform(seed, epoch, index, draw + 3) * (width - w + 1))
            return top, left, h, w, flip
    # The image is too long for the wanted ratios: its largest centred part within them.
    h = min(height, max(np.int64(1), np.int64(round(width / ratio[0]))))
    w = min(width, max(np.int64(1), np.int64(round(height * ratio[1]))))
    return (height - h) // 2, (width - w) // 2, h, w, flip


@numba.njit(nogil=True)
def centre_view(height, width, aspect, crop_pct):
    """The largest centred crop of width / height `aspect`, times `crop_pct`: (top, left, height, width, no flip)."""
    height, width = np.int64(height), np.int64(width)
    h = max(np.int64(1), np.int64(min(np.float64(height), width / aspect) * crop_pct))
    w = max(np.int64(1), np.int64(min(np.float64(width), height * aspect) * crop_pct))
    return (height - h) // 2, (width - w) // 2, h, w, False


@numba.njit(nogil=True)
def masked_view(seed, epoch, index, mask, size, resize, hflip, max_share):
    """Random resize, crop and flip of an image with a mask, by the rules of segmentation's usual recipe (mmseg's).

    The image is resized by a random factor, then cropped to `size`; where it has become smaller than that, the rest of
    the view is padding, at the right and below. A crop in which one class covers more than `max_share` of the labelled
    pixels, or in which none is labelled, is drawn again, up to 10 times; then the last one stays.

    Args:
        seed, epoch, index: what the view is a function of.
        mask: uint8 [H, W], as stored; 255 is not labelled.
        size: (height, width) of the view, pixels.
        resize: (least, most) factor of the resize; 1 makes the image's shorter side the view's.
        hflip: probability of a flip.
        max_share: above 0; 1 allows a crop of one class.

    Returns:
        (top, left, height, width, flip) of the crop in the stored image, and (height, width) of what it fills, pixels.
    """
    height, width = mask.shape
    flip = uniform(seed, epoch, index, 0) < hflip
    factor = resize[0] + (resize[1] - resize[0]) * uniform(seed, epoch, index, 1)
    factor *= min(size) / min(height, width)
    h, rows = _cut(height, size[0], factor)
    w, columns = _cut(width, size[1], factor)
    top, left = 0, 0
    for attempt in range(10):
        top = np.int64(uniform(seed, epoch, index, 2 + 2 * attempt) * (height - h + 1))
        left = np.int64(uniform(seed, epoch, index, 3 + 2 * attempt) * (width - w + 1))
        if (h, w) == (height, width) or _is_varied(mask, top, left, h, w, max_share):  # the whole image: no other crop
            break
    return top, left, h, w, flip, rows, columns


@numba.njit(nogil=True)
def _cut(side, wanted, factor):
    """A side of a crop, of `side` pixels at most, that fills `wanted` pixels when resized; and what it really fills."""
    cut = max(np.int64(1), np.int64(round(wanted / factor)))
    if cut <= side:
        return cut, np.int64(wanted)
    return np.int64(side), min(np.int64(wanted), max(np.int64(1), np.int64(round(side * factor))))


@numba.njit(nogil=True)
def _is_varied(mask, top, left, h, w, max_share):
    """Whether a crop has labelled pixels, and no class more than `max_share` of them."""
    counts = np.zeros(256, np.int64)
    for y in range(top, top + h):
        for x in range(left, left + w):
            counts[mask[y, x]] += 1
    labelled = counts[:255].sum()
    return labelled > 0 and counts[:255].max() <= max_share * labelled


@numba.njit(nogil=True)
def nearest(source, top, left, h, w, out):
    """Nearest-neighbour resize of a crop of labels, which are never mixed: uint8 [H, W] -> uint8 out [H', W', 1].

    A pixel takes the label at its centre. The images' resizes have their pixels' centres at the same places.
    """
    rows, columns = out.shape[0], out.shape[1]
    for y in range(rows):
        for x in range(columns):
            out[y, x, 0] = source[top + (2 * y + 1) * h // (2 * rows), left + (2 * x + 1) * w // (2 * columns)]


@numba.njit(nogil=True)
def distort(image, seed, epoch, index):
    """Random brightness, contrast, saturation and hue, each with probability 1/2: uint8 [H, W, 3], in place.

    SSD's photometric distortion, arXiv 1512.02325, with the ranges usual in segmentation (mmseg's): 32 grey levels up
    or down, factors 0.5 to 1.5, hue by up to 36 degrees; contrast before or after the colours.
    """
    brightness = _maybe(seed, epoch, index, 22, -32.0, 32.0, 0.0)
    contrast = _maybe(seed, epoch, index, 24, 0.5, 1.5, 1.0)
    saturation = _maybe(seed, epoch, index, 26, 0.5, 1.5, 1.0)
    turn = _maybe(seed, epoch, index, 28, -0.6, 0.6, 0.0)  # sixths of a circle
    early = uniform(seed, epoch, index, 30) < 0.5
    before, after = (contrast, 1.0) if early else (1.0, contrast)
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            r, g, b = (
                _clip(_clip(image[y, x, 0] + brightness) * before),
                _clip(_clip(image[y, x, 1] + brightness) * before),
                _clip(_clip(image[y, x, 2] + brightness) * before),
            )
            value = max(r, g, b)
            spread = value - min(r, g, b)
            if spread > 0 and (saturation != 1 or turn != 0):  # HSV's, hue in sixths of a circle
                if value == r:
                    hue = (g - b) / spread
                elif value == g:
                    hue = (b - r) / spread + 2
                else:
                    hue = (r - g) / spread + 4
                hue, spread = hue + turn, min(spread * saturation, value)
                r, g, b = (
                    _channel(5, hue, value, spread),
                    _channel(3, hue, value, spread),
                    _channel(1, hue, value, spread),
                )
            image[y, x, 0] = np.uint8(_clip(r * after) + 0.5)
            image[y, x, 1] = np.uint8(_clip(g * after) + 0.5)
            image[y, x, 2] = np.uint8(_clip(b * after) + 0.5)


@numba.njit(nogil=True)
def _maybe(seed, epoch, index, draw, low, high, otherwise):
    """A number in low..high with probability 1/2, else `otherwise`; takes draws `draw` and the next."""
    if uniform(seed, epoch, index, draw) < 0.5:
        return low + (high - low) * uniform(seed, epoch, index, draw + 1)
    return otherwise


@numba.njit(nogil=True)
def _clip(x):
    return min(max(x, 0.0), 255.0)


@numba.njit(nogil=True)
def _channel(n, hue, value, spread):
    """HSV to RGB: red is n = 5, green 3, blue 1."""
    k = (n + hue) % 6
    return value - spread * max(0.0, min(k, 4 - k, 1.0))


@numba.njit(nogil=True)
def mirror(image):
    """Mirrors [H, W, C] in place."""
    width = image.shape[1]
    for y in range(image.shape[0]):
        for x in range(width // 2):
            for c in range(image.shape[2]):
                image[y, x, c], image[y, width - 1 - x, c] = image[y, width - 1 - x, c], image[y, x, c]
