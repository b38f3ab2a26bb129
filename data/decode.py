"""A stored image, and the mask beside it, -> a view of both, in compiled code.

Image and mask go through one function, so that they have the same crop, size and flip. For each sample it writes the
view's RGB pixels. Where masks are asked for, the mask's labels follow them. JPEGs are decoded, and crops are shrunk, by
FFCV's C++. The compiled code depends on the kind of view alone, not on its numbers nor on the file: it is kept.
"""

import ctypes
from collections.abc import Callable
from typing import NamedTuple

import llvmlite.binding
import numba
import numpy as np
from ffcv.libffcv import lib
from numba import types

from data.augment import centre_view, distort, enlarge, masked_view, mirror, nearest, random_view
from data.checksum import checksum_at
from data.compiled import compiled
from data.runs import read_runs

IGNORE = 255  # the label of pixels that are not labelled

for _name in ("imdecode", "resize"):  # by name, not by address, so that the compiled code can be kept
    llvmlite.binding.add_symbol(f"ffcv_{_name}", ctypes.cast(getattr(lib, _name), ctypes.c_void_p).value)
# (source, bytes, height, width, destination, crop height, crop width, offsets x, y, scale, whether to crop, to flip)
_imdecode = types.ExternalFunction(
    "ffcv_imdecode",
    types.int32(types.intp, types.uint64, types.uint32, types.uint32, types.intp, *[types.uint32] * 8),
)
# (0, source, its height and width, the crop's rows and columns, destination, its height and width)
_resize = types.ExternalFunction("ffcv_resize", types.int32(*[types.int64] * 11))


class Samples(NamedTuple):
    """The columns of a file that decoding reads, as `beton.open_checked` gives them; empty where a file has none."""

    image: np.ndarray  # uint64 [n], where it begins in the file
    image_bytes: np.ndarray  # uint64 [n]
    raw: np.ndarray  # bool [n], whether it is stored as pixels, not as JPEG
    size: np.ndarray  # int64 [n, 2], (height, width)
    checksum: np.ndarray  # uint64 [n]
    mask: np.ndarray  # as of images
    mask_bytes: np.ndarray
    mask_checksum: np.ndarray


# Plain numbers alone: numba's parallel loops take no tuples in tuples.
class RandomCrop(NamedTuple):
    """`augment.random_view` of each image, resized to `rows` x `columns`."""

    rows: int
    columns: int
    least_scale: float
    most_scale: float
    least_ratio: float
    most_ratio: float
    hflip: float


class CentreCrop(NamedTuple):
    """`augment.centre_view` of each image, resized to `rows` x `columns`: the same in every epoch."""

    rows: int
    columns: int
    crop_pct: float


class MaskedCrop(NamedTuple):
    """`augment.masked_view` of each image and its mask.

    Attributes:
        photometric: whether the image's colours change, see `augment.distort`.
        red, green, blue: the image's colour where there is none; the mask has `IGNORE` there.
    """

    rows: int
    columns: int
    least_resize: float
    most_resize: float
    hflip: float
    max_share: float
    photometric: bool
    red: int
    green: int
    blue: int


class Whole(NamedTuple):
    """Each image and its mask as they are stored."""

    pixels: int  # of the largest


Drawn = RandomCrop | CentreCrop | MaskedCrop | Whole


def draw(view, seed, epoch, index, image, mask, out):
    """Writes a view of image [H, W, 3] and mask [H, W] (or [0, 0]) into out, uint8 [bytes]. For compiled code."""
    raise NotImplementedError


@numba.njit(nogil=True)
def _resize_into(image, top, left, h, w, out):
    """Resizes a crop into uint8 out [H', W', 3]."""
    # FFCV's resize averages areas: right for shrinking, but blocky like nearest neighbour for enlarging.
    if h * w < out.shape[0] * out.shape[1]:
        enlarge(image, top, left, h, w, out)
    else:
        _resize(
            0, image.ctypes.data, image.shape[0], image.shape[1], top, top + h, left, left + w,
            out.ctypes.data, out.shape[0], out.shape[1],
        )  # fmt: skip


@numba.njit(nogil=True)
def _draw_crop(image, view, crop, out):
    top, left, h, w, flip = crop
    seen = out[: 3 * view.rows * view.columns].reshape(view.rows, view.columns, 3)
    _resize_into(image, top, left, h, w, seen)
    if flip:
        mirror(seen)


def _draw_random(view, seed, epoch, index, image, mask, out):
    scale, ratio = (view.least_scale, view.most_scale), (view.least_ratio, view.most_ratio)
    crop = random_view(seed, epoch, index, image.shape[0], image.shape[1], scale, ratio, view.hflip)
    _draw_crop(image, view, crop, out)


def _draw_centre(view, seed, epoch, index, image, mask, out):
    _draw_crop(image, view, centre_view(image.shape[0], image.shape[1], view.columns / view.rows, view.crop_pct), out)


def _draw_masked(view, seed, epoch, index, image, mask, out):
    pixels = view.rows * view.columns
    seen = out[: 3 * pixels].reshape(view.rows, view.columns, 3)
    labels = out[3 * pixels : 4 * pixels].reshape(view.rows, view.columns, 1)
    size, resize = (view.rows, view.columns), (view.least_resize, view.most_resize)
    top, left, h, w, flip, filled, across = masked_view(
        seed, epoch, index, mask, size, resize, view.hflip, view.max_share
    )
    part = np.empty((filled, across, 3), np.uint8)
    _resize_into(image, top, left, h, w, part)
    if view.photometric:
        distort(part, seed, epoch, index)
    seen[:, :, 0], seen[:, :, 1], seen[:, :, 2] = view.red, view.green, view.blue
    labels[:] = IGNORE
    seen[:filled, :across] = part
    nearest(mask, top, left, h, w, labels[:filled, :across])
    if flip:
        mirror(seen)
        mirror(labels)


def _draw_whole(view, seed, epoch, index, image, mask, out):
    height, width = mask.shape
    out[: 3 * height * width].reshape(height, width, 3)[:] = image
    out[3 * height * width : 4 * height * width].reshape(height, width)[:] = mask


_DRAW = {RandomCrop: _draw_random, CentreCrop: _draw_centre, MaskedCrop: _draw_masked, Whole: _draw_whole}


@numba.extending.overload(draw, jit_options={"nogil": True})
def _draw_of(view, seed, epoch, index, image, mask, out):
    return _DRAW[view.instance_class]


def is_masked(view: Drawn) -> bool:
    """Whether masks are decoded too."""
    return isinstance(view, MaskedCrop | Whole)


def bytes_of(view: Drawn) -> int:
    """Room for a sample, its mask included."""
    return 4 * view.pixels if isinstance(view, Whole) else (3 + is_masked(view)) * view.rows * view.columns


def _decode(indices, out, file, samples, masked, state, view):
    seed, epoch = state[0], state[1]
    for slot in numba.prange(len(indices)):
        # In prange's loops numba takes `slot` for unsigned, and unsigned times signed for a float.
        index = np.intp(indices[slot])
        begin = np.intp(samples.image[index])
        stored = file[begin : begin + np.intp(samples.image_bytes[index])]
        if len(samples.checksum) > 0 and checksum_at(stored.ctypes.data, stored.size) != samples.checksum[index]:
            state[2] = index + 1
            continue  # a decoder is not to be trusted with it
        height, width = samples.size[index, 0], samples.size[index, 1]
        if samples.raw[index]:
            image = stored.reshape(height, width, 3)
        else:
            pixels = np.empty((height, width, 3), dtype=np.uint8)
            whole = _imdecode(
                stored.ctypes.data, stored.size, height, width, pixels.ctypes.data, height, width, 0, 0, 1, 1, 0, 0
            )
            if whole != 0:
                state[2] = index + 1
            image = pixels
        if masked:
            mask = np.empty((height, width), dtype=np.uint8)
            begin = np.intp(samples.mask[index])
            runs = file[begin : begin + np.intp(samples.mask_bytes[index])]
            known = len(samples.mask_checksum) == 0 or (
                checksum_at(runs.ctypes.data, runs.size) == samples.mask_checksum[index]
            )
            if not known or not read_runs(runs.ctypes.data, runs.size, mask):
                state[2] = -index - 1
                continue
        else:
            mask = np.empty((0, 0), dtype=np.uint8)
        draw(view, seed, epoch, index, image, mask, out[np.intp(slot)])


_one_thread, _many_threads = compiled(_decode, parallel=False), compiled(_decode, parallel=True)


def decoder(samples: Samples, state: np.ndarray, view: Drawn, workers: int) -> Callable:
    """A function (indices uint64 [B], out uint8 [B, bytes], file uint8 [bytes]) that writes the views of samples.

    Args:
        state: int64 [3], (seed, epoch, what was found damaged: 1 + the index of an image, -1 - that of a mask, or 0).
        workers: threads of numba's that it may use.
    """
    decode, masked = _one_thread if workers == 1 else _many_threads, is_masked(view)

    def views(indices: np.ndarray, out: np.ndarray, file: np.ndarray) -> None:
        decode(indices, out, file, samples, masked, state, view)

    return views
