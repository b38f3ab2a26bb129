"""A part of a JPEG without decoding the rest: ITU-T T.81, restart intervals (B.2.1 and E.1.4).

`encode` puts restart markers behind the MCUs (the smallest coded units, of 16 x 16 pixels). So the units can be told
apart without decoding them. `cut` copies those that a crop needs into a JPEG of their own. Any decoder reads both.
"""

from functools import partial

import cv2
import numba
import numpy as np
from numba import types

from data.compiled import compiled

_RESTART, _END = 0xD0, 0xD9  # of the markers, which follow a byte 0xFF: eight of the first kind take turns
_memchr = types.ExternalFunction("memchr", types.intp(types.intp, types.int32, types.uintp))
_memcpy = types.ExternalFunction("memcpy", types.intp(types.intp, types.intp, types.uintp))


def encode(image: np.ndarray, quality: int) -> np.ndarray:
    """A baseline JPEG with restart markers: uint8 [H, W, 3] -> uint8 [bytes].

    They come after two MCUs each, or after each where a row has an odd number. They change no pixel, and take about 3
    bytes each.

    Raises:
        ValueError, cv2.error: it cannot be encoded, such as one with a side above 65,500 pixels.
    """
    interval = 1 if -(-image.shape[1] // 16) % 2 else 2  # `cut` wants them to end with a row
    how = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_RST_INTERVAL, interval]
    success, stored = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), how)
    if not success:
        raise ValueError("it cannot be encoded as JPEG")
    return stored.reshape(-1)


@partial(compiled, parallel=False)  # kept for the views of all kinds
def cut(data, height, width, top, left, h, w, out):
    """Writes into `out` the JPEG of a part of a JPEG in which the crop (top, left, h, w) has the same pixels.

    Args:
        data: uint8 [bytes], a JPEG of height x width pixels.
        out: uint8 [bytes], as many.

    Returns:
        (bytes, above, before, rows, columns): how long it is, where the part begins, and its size, pixels. 0 bytes
        where all is needed, or where `data` is of another kind: progressive, or without restart markers that tell the
        parts of a row; then the part is the whole.
    """
    whole = 0, 0, 0, height, width
    begin, size_at, mcu_height, mcu_width, interval = _read_header(data, height, width)
    across, down = (width + mcu_width - 1) // mcu_width, (height + mcu_height - 1) // mcu_height
    if begin == 0 or interval == 0 or across % interval:
        return whole
    step, across = interval * mcu_width, across // interval
    # A pixel's colour is mixed with that of its neighbours, and in a very narrow image otherwise: so one pixel more
    # at each side, and no part narrower than a step.
    first, upper = max(0, min(left - 1, width - step) // step), max(0, min(top - 1, height - mcu_height) // mcu_height)
    last, lower = min(across, (left + w + step) // step), min(down, (top + h + mcu_height) // mcu_height)
    if last - first == across and lower - upper == down:
        return whole
    ends = np.empty(lower * across, np.int64)
    if not _find_ends(data, begin, across * down, ends):
        return whole

    to, n = out.ctypes.data, begin
    _memcpy(to, data.ctypes.data, begin)
    rows, columns = min(height, lower * mcu_height) - upper * mcu_height, min(width, last * step) - first * step
    out[size_at], out[size_at + 1] = rows >> 8, rows & 255
    out[size_at + 2], out[size_at + 3] = columns >> 8, columns & 255
    number = 0
    for row in range(upper, lower):
        one, end = row * across + first, row * across + last - 1
        start = ends[one - 1] + 2 if one > 0 else begin
        _memcpy(to + n, data.ctypes.data + start, ends[end] - start)
        n -= start
        for part in range(one, end + 1):
            out[n + ends[part]], out[n + ends[part] + 1] = 0xFF, _RESTART + number % 8
            number += 1
        n += ends[end] + 2
    out[n - 1] = _END
    return n, upper * mcu_height, first * step, rows, columns


@numba.njit(nogil=True)
def _read_header(data, height, width):
    """Where the coded data begins, where height and width stand, an MCU's height and width, and MCUs per restart.

    All 0 if it is no JPEG of that size with 8 bits, grey or of three components, all in one sequential scan.
    """
    other = 0, 0, 1, 1, 0
    size, at, size_at, parts, interval = data.size, 2, 0, 0, 0
    mcu_height, mcu_width = 8, 8
    if size < 2 or _pair(data, 0) != 0xFFD8:
        return other
    while at + 4 <= size:
        kind, after = _pair(data, at), at + 2 + _pair(data, at + 2)
        if kind >> 8 != 0xFF or after < at + 5 or after > size:
            return other
        if kind == 0xFFC0 or kind == 0xFFC1:  # SOF0, SOF1
            if after < at + 10:
                return other
            size_at, parts = at + 5, np.int64(data[at + 9])
            if data[at + 4] != 8 or _pair(data, at + 5) != height or _pair(data, at + 7) != width:
                return other
            if after != at + 10 + 3 * parts:
                return other
            if parts == 3:  # a grey one's unit is a block, whatever it says
                for part in range(3):
                    factors = np.int64(data[at + 11 + 3 * part])
                    mcu_height, mcu_width = max(mcu_height, 8 * (factors & 15)), max(mcu_width, 8 * (factors >> 4))
            elif parts != 1:
                return other
        elif kind == 0xFFDD and after >= at + 6:  # DRI
            interval = _pair(data, at + 4)
        elif kind == 0xFFDA:  # SOS
            return (after, size_at, mcu_height, mcu_width, interval) if size_at and data[at + 4] == parts else other
        elif kind != 0xFFC4 and kind != 0xFFDB and kind != 0xFFFE and kind >> 4 != 0xFFE:  # DHT, DQT, COM, APPn
            return other
        at = after
    return other


@numba.njit(nogil=True)
def _pair(data, at):
    """The big-endian number of 16 bits at a place."""
    return np.int64(data[at]) << 8 | np.int64(data[at + 1])


@numba.njit(nogil=True)
def _find_ends(data, begin, total, ends):
    """Writes where the first units end, of `total`; whether they all do as they should."""
    base, at, size, found = data.ctypes.data, begin, data.size, 0
    while found < len(ends):
        place = _memchr(base + at, 0xFF, size - at)
        at = place - base
        if place == 0 or at + 2 > size:
            return False
        after = data[at + 1]
        if after != 0:  # which stands for a byte 0xFF of the data
            if after != (_END if found == total - 1 else _RESTART + found % 8):
                return False
            ends[found] = at
            found += 1
        at += 2
    return True
