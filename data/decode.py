"""FFCV decoders: a stored image, and the mask beside it, -> a view of both.

Image and mask go through one decoder, so that they have the same crop, size and flip. For each sample it writes the
view's RGB pixels. Where masks are asked for, the mask's labels follow them.
"""

from collections.abc import Callable
from dataclasses import replace

import numba
import numpy as np
from ffcv.fields.rgb_image import IMAGE_MODES, SimpleRGBImageDecoder
from ffcv.libffcv import imdecode, resize_crop
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.state import State

from data.augment import Pair, centre_view, distort, enlarge, masked_view, mirror, nearest, random_view
from data.checksum import checksum_at
from data.runs import read_runs

IGNORE = 255  # the label of pixels that are not labelled


@numba.extending.intrinsic
def address_as_void_pointer(typingctx, address):
    """An integer as void*, for `numba.carray`."""
    from numba.core import cgutils, types

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.uintp), codegen


class Decoder(SimpleRGBImageDecoder):
    """Decodes samples and has subclasses draw them: into uint8 [B, bytes], a sample's RGB pixels, then its labels.

    Args:
        state: int64 [3], (seed, epoch, what was found damaged: 1 + the index of an image, -1 - that of a mask, or 0).
            The compiled code reads it through its address at every batch, so a new epoch needs no new compilation.
            The caller keeps it alive.

    Attributes:
        masked: whether masks are decoded.
        columns: those of `beton.open_checked`; set before compilation. Without checksums nothing is compared.
    """

    masked = False

    def __init__(self, state: np.ndarray):
        super().__init__()
        self.state = state
        self.columns: dict[str, np.ndarray] = {}

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of a sample's view, pixels."""
        raise NotImplementedError

    def bytes(self) -> int:
        """Room for a sample."""
        raise NotImplementedError

    def draw(self) -> Callable:
        """A jitted (seed, epoch, index, image [H, W, 3], mask [H, W] or [0, 0], address), which fills the address."""
        raise NotImplementedError

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        shape, dtype = (self.bytes(),), np.dtype("<u1")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), AllocationQuery(shape, dtype)

    def generate_code(self) -> Callable:
        address, masked, draw = self.state.ctypes.data, self.masked, self.draw()
        jpg, mem_read, my_range = IMAGE_MODES["jpg"], self.memory_read, Compiler.get_iterator()
        imdecode_c = Compiler.compile(imdecode)
        self._read = [self.columns.get(name, np.zeros(0, np.uint64)) for name in ("checksum", "mask_checksum", "mask")]
        (known_at, mask_known_at, masks_at), (known, mask_known, masks) = zip(
            *((column.ctypes.data, len(column)) for column in self._read), strict=True
        )

        def decode(batch_indices, destination, metadata, storage_state):
            state = numba.carray(address_as_void_pointer(address), 3, dtype=np.int64)
            checksums = numba.carray(address_as_void_pointer(known_at), known, dtype=np.uint64)
            mask_checksums = numba.carray(address_as_void_pointer(mask_known_at), mask_known, dtype=np.uint64)
            mask_pointers = numba.carray(address_as_void_pointer(masks_at), masks, dtype=np.uint64)
            seed, epoch = state[0], state[1]
            for slot in my_range(len(batch_indices)):
                index = batch_indices[slot]
                field = metadata[index]
                stored = mem_read(field["data_ptr"], storage_state)
                if known > 0 and checksum_at(stored.ctypes.data, stored.size) != checksums[index]:
                    state[2] = np.int64(index) + 1
                    continue  # a decoder is not to be trusted with it
                height, width = np.uint32(field["height"]), np.uint32(field["width"])
                if field["mode"] == jpg:
                    image = np.empty((height, width, 3), dtype=np.uint8)
                    if imdecode_c(stored, image, height, width, height, width, 0, 0, 1, 1, False, False) != 0:
                        state[2] = np.int64(index) + 1
                else:
                    image = stored.reshape(height, width, 3)
                if masked:
                    mask = np.empty((height, width), dtype=np.uint8)
                    runs = mem_read(mask_pointers[index], storage_state)
                    whole = mask_known == 0 or checksum_at(runs.ctypes.data, runs.size) == mask_checksums[index]
                    if not whole or not read_runs(runs.ctypes.data, runs.size, mask):
                        state[2] = -np.int64(index) - 1
                        continue
                else:
                    mask = np.empty((0, 0), dtype=np.uint8)
                # In prange's loops numba takes `slot` for unsigned, and unsigned times signed for a float.
                draw(seed, epoch, index, image, mask, destination.ctypes.data + np.intp(slot) * destination.shape[1])
            return destination[: len(batch_indices)]

        decode.is_parallel = True
        return decode


class _ViewDecoder(Decoder):
    """A part of each image without its mask, resized to `output_size`, (height, width), pixels."""

    def __init__(self, output_size: tuple[int, int], state: np.ndarray):
        super().__init__(state)
        self.output_size = output_size

    def size(self, index: int) -> tuple[int, int]:
        return self.output_size

    def bytes(self) -> int:
        return (3 + self.masked) * self.output_size[0] * self.output_size[1]

    def view(self) -> Callable:
        """A jitted (seed, epoch, index, height, width) -> (top, left, height, width, flip)."""
        raise NotImplementedError

    def draw(self) -> Callable:
        size, view, resize_into = (*self.output_size, 3), self.view(), _resize_into()

        @numba.njit(nogil=True)
        def draw(seed, epoch, index, image, mask, address):
            out = numba.carray(address_as_void_pointer(address), size, dtype=np.uint8)
            top, left, h, w, flip = view(seed, epoch, index, image.shape[0], image.shape[1])
            resize_into(image, top, left, h, w, out)
            if flip:
                mirror(out)

        return draw


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


class MaskedViewDecoder(_ViewDecoder):
    """`masked_view` of each image and its mask.

    Args:
        resize, hflip, max_share: see `augment.masked_view`.
        photometric: whether the image's colours change, see `augment.distort`.
        padding: the image's colour (R, G, B) where there is none; the mask has `IGNORE` there.
        Others: see `Decoder`.
    """

    masked = True

    def __init__(
        self, output_size: tuple[int, int], state: np.ndarray, resize: Pair, hflip: float, max_share: float,
        photometric: bool, padding: tuple[int, int, int],
    ):  # fmt: skip
        super().__init__(output_size, state)
        self.resize, self.hflip, self.max_share = tuple(map(float, resize)), float(hflip), float(max_share)
        self.photometric, self.padding = photometric, padding

    def draw(self) -> Callable:
        (rows, columns), resize, hflip, max_share = self.output_size, self.resize, self.hflip, self.max_share
        photometric, padding, resize_into = self.photometric, self.padding, _resize_into()

        @numba.njit(nogil=True)
        def draw(seed, epoch, index, image, mask, address):
            seen = numba.carray(address_as_void_pointer(address), (rows, columns, 3), dtype=np.uint8)
            labels = numba.carray(
                address_as_void_pointer(address + 3 * rows * columns), (rows, columns, 1), dtype=np.uint8
            )
            top, left, h, w, flip, filled, across = masked_view(
                seed, epoch, index, mask, (rows, columns), resize, hflip, max_share
            )
            part = np.empty((filled, across, 3), np.uint8)
            resize_into(image, top, left, h, w, part)
            if photometric:
                distort(part, seed, epoch, index)
            for c in range(3):
                seen[:, :, c] = padding[c]
            labels[:] = IGNORE
            seen[:filled, :across] = part
            nearest(mask, top, left, h, w, labels[:filled, :across])
            if flip:
                mirror(seen)
                mirror(labels)

        return draw


class StoredDecoder(Decoder):
    """Each image and its mask as they are stored."""

    masked = True

    def size(self, index: int) -> tuple[int, int]:
        height, width = self.columns["size"][index].tolist()
        return height, width

    def bytes(self) -> int:
        return 4 * int(self.columns["size"].prod(axis=1).max())

    def draw(self) -> Callable:
        @numba.njit(nogil=True)
        def draw(seed, epoch, index, image, mask, address):
            height, width = mask.shape
            seen = numba.carray(address_as_void_pointer(address), (height, width, 3), dtype=np.uint8)
            labels = numba.carray(
                address_as_void_pointer(address + 3 * height * width), (height, width), dtype=np.uint8
            )
            seen[:] = image
            labels[:] = mask

        return draw


def _resize_into() -> Callable:
    """A jitted (image, top, left, height, width, out): resizes a crop into uint8 out [H', W', 3]."""
    resize_crop_c = Compiler.compile(resize_crop)

    @numba.njit(nogil=True)
    def resize_into(image, top, left, h, w, out):
        # FFCV's resize averages areas: right for shrinking, but blocky like nearest neighbour for enlarging.
        if h * w < out.shape[0] * out.shape[1]:
            enlarge(image, top, left, h, w, out)
        else:
            resize_crop_c(image, top, top + h, left, left + w, out)

    return resize_into
