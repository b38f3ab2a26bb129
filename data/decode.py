"""A stored image, and the mask beside it, -> a view of both, in compiled code.

Image and mask go through one function, so that they have the same crop, size and flip. For each sample it writes the
view's RGB pixels. Where masks are asked for, the mask's labels follow them. JPEGs are decoded by FFCV's C++: the part
that is shown, where `jpeg.cut` can tell it from the rest. The compiled code depends on the kind of view alone, not on
its numbers nor on the file: it is kept.
"""

import ctypes
from collections.abc import Callable
from typing import NamedTuple

import llvmlite.binding
import numba
import numpy as np
from ffcv.libffcv import lib
from numba import types

from data.augment import centre_view, distort, masked_view, mirror, nearest, random_view
from data.checksum import checksum_at
from data.compiled import compiled
from data.jpeg import cut
from data.resize import resize
from data.runs import read_runs

IGNORE = 255  # the label of pixels that are not labelled

# By name, not by address, so that the compiled code can be kept.
llvmlite.binding.add_symbol("ffcv_imdecode", ctypes.cast(lib.imdecode, ctypes.c_void_p).value)
# (source, bytes, height, width, destination, crop height, crop width, offsets x, y, scale, whether to crop, to flip)
_imdecode = types.ExternalFunction(
    "ffcv_imdecode",
    types.int32(types.intp, types.uint64, types.uint32, types.uint32, types.intp, *[types.uint32] * 8),
)


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


def place(view, seed, epoch, index, height, width, mask):
    """What a view shows of an image of that size and its mask, [H, W] or [0, 0]. For compiled code.

    Returns:
        (top, left, height, width, flip) of the crop, and (height, width) of what it fills in the view, pixels.
    """
    raise NotImplementedError


def draw(view, seed, epoch, index, crop, image, above, before, mask, out):
    """Writes what `place` says into out, uint8 [bytes]. For compiled code.

    The image is uint8 [H', W', 3]: the part that begins `above` rows below and `before` columns right of the stored
    image's corner.
    """
    raise NotImplementedError


def _place_random(view, seed, epoch, index, height, width, mask):
    scale, ratio = (view.least_scale, view.most_scale), (view.least_ratio, view.most_ratio)
    crop = random_view(seed, epoch, index, height, width, scale, ratio, view.hflip)
    return (*crop, view.rows, view.columns)


def _place_centre(view, seed, epoch, index, height, width, mask):
    return (*centre_view(height, width, view.columns / view.rows, view.crop_pct), view.rows, view.columns)


def _place_masked(view, seed, epoch, index, height, width, mask):
    size, factors = (view.rows, view.columns), (view.least_resize, view.most_resize)
    return masked_view(seed, epoch, index, mask, size, factors, view.hflip, view.max_share)


def _place_whole(view, seed, epoch, index, height, width, mask):
    return 0, 0, height, width, False, height, width


def _draw_crop(view, seed, epoch, index, crop, image, above, before, mask, out):
    top, left, h, w, flip, _, _ = crop
    seen = out[: 3 * view.rows * view.columns].reshape(view.rows, view.columns, 3)
    resize(image, top - above, left - before, h, w, flip, seen)


def _draw_masked(view, seed, epoch, index, crop, image, above, before, mask, out):
    top, left, h, w, flip, filled, across = crop
    pixels = view.rows * view.columns
    seen = out[: 3 * pixels].reshape(view.rows, view.columns, 3)
    labels = out[3 * pixels : 4 * pixels].reshape(view.rows, view.columns, 1)
    part = np.empty((filled, across, 3), np.uint8)
    resize(image, top - above, left - before, h, w, False, part)
    if view.photometric:
        distort(part, seed, epoch, index)
    seen[:, :, 0], seen[:, :, 1], seen[:, :, 2] = view.red, view.green, view.blue
    labels[:] = IGNORE
    seen[:filled, :across] = part
    nearest(mask, top, left, h, w, labels[:filled, :across])
    if flip:
        mirror(seen)
        mirror(labels)


def _draw_whole(view, seed, epoch, index, crop, image, above, before, mask, out):
    height, width = mask.shape
    out[: 3 * height * width].reshape(height, width, 3)[:] = image
    out[3 * height * width : 4 * height * width].reshape(height, width)[:] = mask


_PLACE = {RandomCrop: _place_random, CentreCrop: _place_centre, MaskedCrop: _place_masked, Whole: _place_whole}
_DRAW = {RandomCrop: _draw_crop, CentreCrop: _draw_crop, MaskedCrop: _draw_masked, Whole: _draw_whole}


@numba.extending.overload(place, jit_options={"nogil": True})
def _place_of(view, seed, epoch, index, height, width, mask):
    return _PLACE[view.instance_class]


@numba.extending.overload(draw, jit_options={"nogil": True})
def _draw_of(view, seed, epoch, index, crop, image, above, before, mask, out):
    return _DRAW[view.instance_class]


def is_masked(view: Drawn) -> bool:
    """Whether masks are decoded too."""
    return isinstance(view, MaskedCrop | Whole)


def bytes_of(view: Drawn) -> int:
    """Room for a sample, its mask included."""
    return 4 * view.pixels if isinstance(view, Whole) else (3 + is_masked(view)) * view.rows * view.columns


@numba.njit(nogil=True)
def _decode_jpeg(data, size, pixels):
    """Decodes the first bytes of data into pixels, uint8 [H, W, 3]; whether it could."""
    rows, columns = pixels.shape[0], pixels.shape[1]
    to = pixels.ctypes.data
    return _imdecode(data.ctypes.data, size, rows, columns, to, rows, columns, 0, 0, 1, 1, 0, 0) == 0


@numba.njit(nogil=True)
def _decode_part(stored, height, width, top, left, h, w):
    """Decodes what a crop needs: uint8 [H', W', 3], the rows above it, the columns before it, and whether it could."""
    part = np.empty(stored.size, np.uint8)
    size, above, before, rows, columns = cut(stored, height, width, top, left, h, w, part)
    pixels = np.empty((rows, columns, 3), np.uint8)
    good = _decode_jpeg(part, size, pixels) if size > 0 else _decode_jpeg(stored, stored.size, pixels)
    return pixels, above, before, good


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
        crop = place(view, seed, epoch, index, height, width, mask)
        above, before = 0, 0
        if samples.raw[index]:
            image = stored.reshape(height, width, 3)
        else:
            image, above, before, good = _decode_part(stored, height, width, crop[0], crop[1], crop[2], crop[3])
            if not good:
                state[2] = index + 1
        draw(view, seed, epoch, index, crop, image, above, before, mask, out[np.intp(slot)])


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
