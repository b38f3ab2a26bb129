"""Masks as runs: how a .beton stores them, without loss, and small where labels cover areas.

A run is two bytes, its value and its length - 1; the runs follow the mask row by row, across the ends of rows. FFCV has
no decoder of its own for compressed masks of many sizes.
"""

import numba
import numpy as np

from data.checksum import load_8

LONGEST = 256  # pixels of a run


def encode_runs(mask: np.ndarray) -> np.ndarray:
    """uint8 [H, W], not empty -> uint8 [runs, 2]."""
    flat = mask.reshape(-1)
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    lengths = np.diff(starts, append=flat.size)
    pieces = -(-lengths // LONGEST)
    runs = np.empty((pieces.sum(), 2), np.uint8)
    runs[:, 0] = np.repeat(flat[starts], pieces)
    runs[:, 1] = LONGEST - 1
    runs[np.cumsum(pieces) - 1, 1] = (lengths - 1) % LONGEST
    return runs


@numba.njit(nogil=True)
def read_runs(address, size, mask):
    """Fills `mask`, uint8 [H, W], from `size` bytes of runs at an address; False when they do not fill it exactly."""
    flat = mask.reshape(mask.size, 1)  # not [H W]: FFCV makes numba's type of such byte arrays read-only
    at = 0
    for run in range(size // 2):
        value, length = np.uint8(load_8(address + 2 * run)), np.intp(load_8(address + 2 * run + 1)) + 1
        if at + length > len(flat):
            return False
        for place in range(at, at + length):
            flat[place, 0] = value
        at += length
    return at == len(flat) and size % 2 == 0
