"""What a sample looks like: random resized crop and flip, as a pure function of (seed, epoch, sample index).

FFCV's own random decoders draw from numba's per-thread generator, so their views change from run to run and with the
number of workers. Here every draw is a counter-based hash (splitmix64) of (seed, epoch, index, number of the draw): the
same sample gets the same view whatever the workers, the batch size, the rank, and wherever a run was resumed.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numba
import numpy as np
from ffcv.fields.rgb_image import IMAGE_MODES, SimpleRGBImageDecoder
from ffcv.libffcv import imdecode, resize_crop
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.state import State

from data.checksum import checksum_at

Pair = tuple[float, float]

# Compiled on their own, without FFCV's fastmath: reordered sums could move a crop by a pixel from build to build.


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


@numba.njit(nogil=True)
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
def _enlarge(source, top, left, h, w, out):
    """Bilinear resize of a crop: uint8 [H, W, 3] -> uint8 out [H', W', 3]."""
    rows, columns = out.shape[0], out.shape[1]
    for y in range(rows):
        sy = min(max((y + 0.5) * h / rows - 0.5, 0.0), h - 1.0)
        y0 = np.int64(sy)
        y1 = min(y0 + 1, h - 1)
        fy = sy - y0
        for x in range(columns):
            sx = min(max((x + 0.5) * w / columns - 0.5, 0.0), w - 1.0)
            x0 = np.int64(sx)
            x1 = min(x0 + 1, w - 1)
            fx = sx - x0
            for c in range(3):
                upper = source[top + y0, left + x0, c] * (1 - fx) + source[top + y0, left + x1, c] * fx
                lower = source[top + y1, left + x0, c] * (1 - fx) + source[top + y1, left + x1, c] * fx
                out[y, x, c] = np.uint8(upper * (1 - fy) + lower * fy + 0.5)


@numba.njit(nogil=True)
def _flip(image):
    """Mirrors [H, W, C] in place."""
    width = image.shape[1]
    for y in range(image.shape[0]):
        for x in range(width // 2):
            for c in range(image.shape[2]):
                image[y, x, c], image[y, width - 1 - x, c] = image[y, width - 1 - x, c], image[y, x, c]


class _ViewDecoder(SimpleRGBImageDecoder):
    """FFCV decoder: stored image -> a view of it at the output size, uint8 [H, W, 3].

    Args:
        output_size: (height, width), pixels.
        state: int64 [3], (seed, epoch, 1 + the index of a damaged image or 0). The compiled code reads it through
            its address at every batch, so a new epoch needs no new compilation. The caller keeps it alive.

    Attributes:
        checksums: uint64 [num_samples] of the stored bytes, or None where the file has none; set before compilation.
    """

    def __init__(self, output_size: tuple[int, int], state: np.ndarray):
        super().__init__()
        self.output_size = output_size
        self.state = state
        self.checksums: np.ndarray | None = None

    def view(self) -> Callable:
        """A jitted (seed, epoch, index, height, width) -> (top, left, height, width, flip)."""
        raise NotImplementedError

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        shape, dtype = (*self.output_size, 3), np.dtype("<u1")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), AllocationQuery(shape, dtype)

    def generate_code(self) -> Callable:
        address, rows, columns = self.state.ctypes.data, self.output_size[0], self.output_size[1]
        jpg, mem_read, my_range, view = IMAGE_MODES["jpg"], self.memory_read, Compiler.get_iterator(), self.view()
        imdecode_c, resize_crop_c = Compiler.compile(imdecode), Compiler.compile(resize_crop)
        known = np.zeros(0, np.uint64) if self.checksums is None else self.checksums
        known_address, count = known.ctypes.data, len(known)

        def decode(batch_indices, destination, metadata, storage_state):
            state = numba.carray(address_as_void_pointer(address), 3, dtype=np.int64)
            checksums = numba.carray(address_as_void_pointer(known_address), count, dtype=np.uint64)
            seed, epoch = state[0], state[1]
            for slot in my_range(len(batch_indices)):
                index = batch_indices[slot]
                field = metadata[index]
                stored = mem_read(field["data_ptr"], storage_state)
                if count > 0 and checksum_at(stored.ctypes.data, stored.size) != checksums[index]:
                    state[2] = np.int64(index) + 1
                    continue  # a decoder is not to be trusted with it
                height, width = np.uint32(field["height"]), np.uint32(field["width"])
                if field["mode"] == jpg:
                    image = np.empty((height, width, 3), dtype=np.uint8)
                    if imdecode_c(stored, image, height, width, height, width, 0, 0, 1, 1, False, False) != 0:
                        state[2] = np.int64(index) + 1
                else:
                    image = stored.reshape(height, width, 3)
                top, left, h, w, flip = view(seed, epoch, index, height, width)
                # FFCV's resize averages areas: right for shrinking, but blocky like nearest neighbour for enlarging.
                if h * w < rows * columns:
                    _enlarge(image, top, left, h, w, destination[slot])
                else:
                    resize_crop_c(image, top, top + h, left, left + w, destination[slot])
                if flip:
                    _flip(destination[slot])
            return destination[: len(batch_indices)]

        decode.is_parallel = True
        return decode


@numba.extending.intrinsic
def address_as_void_pointer(typingctx, address):
    """An integer as void*, for `numba.carray`."""
    from numba.core import cgutils, types

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.uintp), codegen


class RandomViewDecoder(_ViewDecoder):
    """`random_view` of each image, resized to `output_size`."""

    def __init__(
        self, output_size: tuple[int, int], state: np.ndarray, scale: Pair = (0.08, 1.0), ratio: Pair = (3 / 4, 4 / 3),
        hflip: float = 0.5,
    ):  # fmt: skip
        super().__init__(output_size, state)
        self.scale, self.ratio, self.hflip = tuple(map(float, scale)), tuple(map(float, ratio)), float(hflip)

    def view(self) -> Callable:
        scale, ratio, hflip = self.scale, self.ratio, self.hflip

        @numba.njit(nogil=True)
        def view(seed, epoch, index, height, width):
            return random_view(seed, epoch, index, height, width, scale, ratio, hflip)

        return view


class CentreViewDecoder(_ViewDecoder):
    """`centre_view` of each image, resized to `output_size`: the same in every epoch."""

    def __init__(self, output_size: tuple[int, int], state: np.ndarray, crop_pct: float = 1.0):
        super().__init__(output_size, state)
        self.crop_pct = float(crop_pct)

    def view(self) -> Callable:
        aspect, crop_pct = self.output_size[1] / self.output_size[0], self.crop_pct

        @numba.njit(nogil=True)
        def view(seed, epoch, index, height, width):
            return centre_view(height, width, aspect, crop_pct)

        return view
