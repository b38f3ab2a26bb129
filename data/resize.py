"""A crop -> a view's size: an average over areas where it shrinks, bilinear where it grows.

Each pixel is a weighted sum over rows, then over columns. It is the same on every machine: no compiler's freedom with
floating point is used. Averages are to the bit those of OpenCV's INTER_AREA, in a quarter of its time.
"""

import ctypes
from functools import partial

import llvmlite.binding
import numba
import numpy as np
from ffcv.libffcv import lib
from numba import types

from data.augment import mirror
from data.compiled import compiled

# By name, not by address, so that the compiled code can be kept.
llvmlite.binding.add_symbol("ffcv_resize", ctypes.cast(lib.resize, ctypes.c_void_p).value)
# (0, source, its height and width, the crop's rows and columns, destination, its height and width)
_resize = types.ExternalFunction("ffcv_resize", types.int32(*[types.int64] * 11))

_exact = numba.njit(nogil=True, fastmath=False)  # whatever the caller's flags are
_U = np.uint64  # of an unsigned index numba does not ask whether it counts from the end
_3, _1, _2 = _U(3), _U(1), _U(2)


@partial(compiled, parallel=False)  # kept for the views of all kinds
def resize(image, top, left, h, w, flip, out):
    """Resizes a crop, and mirrors it if `flip`: uint8 [H, W, 3] -> uint8 out [H', W', 3]."""
    rows, columns = out.shape[0], out.shape[1]
    if h * w < rows * columns:  # OpenCV's would be blocky like nearest neighbour
        first, shares = _lines(h, rows)
        first_column, column_shares = _lines(w, columns)
        _weigh(image, top, left, first, shares, w, first_column, column_shares, flip, True, out)
    elif h < rows or w < columns or (h % rows == 0 and w % columns == 0):  # for which OpenCV has other sums
        _resize(
            0, image.ctypes.data, image.shape[0], image.shape[1], top, top + h, left, left + w,
            out.ctypes.data, rows, columns,
        )  # fmt: skip
        if flip:
            mirror(out)
    else:
        first, shares = _areas(h, rows)
        first_column, column_shares = _areas(w, columns)
        _weigh(image, top, left, first, shares, w, first_column, column_shares, flip, False, out)


@_exact
def _areas(side, cells):
    """How `cells` equal parts of a side cover its pixels: the first of each, int64 [cells]; shares, fp32 [cells, n].

    Parts below a thousandth of a pixel are left out, and all is rounded, as OpenCV does (`computeResizeAreaTab`).
    """
    scale = 1.0 / (np.float64(cells) / side)
    first, shares = np.empty(cells, np.int64), np.zeros((cells, np.int64(np.ceil(scale)) + 1), np.float32)
    for cell in range(cells):
        begin = cell * scale
        end, covered = begin + scale, min(scale, side - begin)
        last = min(np.int64(np.floor(end)), side - 1)
        at, n = min(np.int64(np.ceil(begin)), last), 0
        first[cell] = at
        if at - begin > 1e-3:
            first[cell], shares[cell, 0], n = at - 1, (at - begin) / covered, 1
        for _ in range(at, last):
            shares[cell, n] = 1.0 / covered
            n += 1
        if end - last > 1e-3:
            shares[cell, n] = min(min(end - last, 1.0), covered) / covered
    return first, shares


@_exact
def _lines(side, cells):
    """Between which pixels' centres those of `cells` equal parts of a side lie: as `_areas`, but fp64 [cells, 2]."""
    first, shares = np.empty(cells, np.int64), np.empty((cells, 2))
    for cell in range(cells):
        at = min(max((cell + 0.5) * side * (1.0 / cells) - 0.5, 0.0), side - 1.0)
        first[cell] = np.int64(at)
        shares[cell, 1] = at - first[cell]
        shares[cell, 0] = 1 - shares[cell, 1]
    return first, shares


@_exact
def _weigh(image, top, left, first_row, row_shares, w, first_column, column_shares, flip, half_up, out):
    """Writes weighted sums of a crop's pixels. A sum of n + 1/2 becomes n + 1, or else the even one of the two."""
    rows, columns, parts = out.shape[0], _U(out.shape[1]), _U(column_shares.shape[1])
    kind = column_shares.dtype
    zero = np.zeros(1, kind)[0]
    pixels = np.zeros(3 * (w + column_shares.shape[1]), kind)  # what lies right of the crop has no share
    # The last two rows, of the view's width: a row has a share in several of the view's.
    lines, held = np.empty((2, 3 * out.shape[1]), kind), np.full(2, -1)
    total = np.empty(3 * out.shape[1], kind)
    for y in range(rows):
        total[:] = 0
        for part in range(row_shares.shape[1]):
            share, row = row_shares[y, part], first_row[y] + part
            if share == 0:
                break
            line = lines[row % 2]
            if held[row % 2] != row:
                held[row % 2] = row
                source = image[top + row, left : left + w].reshape(-1)
                for i in range(source.size):
                    pixels[i] = source[i]
                for x in range(columns):
                    red = green = blue = zero
                    at = _3 * _U(first_column[x])
                    for n in range(parts):
                        of = column_shares[x, n]
                        red += pixels[at] * of
                        green += pixels[at + _1] * of
                        blue += pixels[at + _2] * of
                        at += _3
                    to = _3 * (columns - _1 - x if flip else x)
                    line[to], line[to + _1], line[to + _2] = red, green, blue
            for i in range(total.size):
                total[i] += share * line[i]
        seen = out[y].reshape(-1)
        if half_up:
            for i in range(total.size):
                seen[i] = np.uint8(np.int32(total[i] + 0.5))
        else:
            for i in range(total.size):
                seen[i] = np.uint8(np.int32(np.rint(total[i])))
