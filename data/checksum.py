"""XXH64 over stored bytes, compiled so that decoding threads can call it on what they read.

The algorithm is xxHash's published one (https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md), with seed 0.
It finds damage, not malice: it is fast, and no cryptographic hash.
"""

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic

_1 = np.uint64(0x9E3779B185EBCA87)
_2 = np.uint64(0xC2B2AE3D27D4EB4F)
_3 = np.uint64(0x165667B19E3779F9)
_4 = np.uint64(0x85EBCA77C2B2AE63)
_5 = np.uint64(0x27D4EB2F165667C5)


def _load(bits: int):
    @intrinsic
    def load(typingctx, address):
        """The little-endian word at an address, as uint64. Stored images begin at any byte: it need not be aligned."""

        def codegen(context, builder, signature, args):
            word = context.get_value_type(types.Integer(f"uint{bits}"))
            pointer = builder.inttoptr(args[0], word.as_pointer())
            return builder.zext(builder.load(pointer, align=1), context.get_value_type(types.uint64))

        return types.uint64(types.intp), codegen

    return load


_load_64, _load_32, load_8 = _load(64), _load(32), _load(8)


@numba.njit(nogil=True, inline="always")
def _rotate(x, bits):
    return (x << np.uint64(bits)) | (x >> np.uint64(64 - bits))


@numba.njit(nogil=True, inline="always")
def _round(lane, word):
    return _rotate(lane + word * _2, 31) * _1


@numba.njit(nogil=True, inline="always")
def _merge(total, lane):
    return (total ^ _round(np.uint64(0), lane)) * _1 + _4


def checksum(data: np.ndarray) -> int:
    """XXH64 of a contiguous uint8 array."""
    return checksum_at(data.ctypes.data, data.size)


@numba.njit(nogil=True)
def checksum_at(address, size):
    """XXH64 of `size` bytes at an address: uint64. Callable from other compiled code, in many threads at once."""
    at, end = np.intp(address), np.intp(address) + np.intp(size)
    if size >= 32:
        a, b, c, d = _1 + _2, _2, np.uint64(0), np.uint64(0) - _1
        while end - at >= 32:
            a = _round(a, _load_64(at))
            b = _round(b, _load_64(at + 8))
            c = _round(c, _load_64(at + 16))
            d = _round(d, _load_64(at + 24))
            at += 32
        total = _rotate(a, 1) + _rotate(b, 7) + _rotate(c, 12) + _rotate(d, 18)
        total = _merge(_merge(_merge(_merge(total, a), b), c), d)
    else:
        total = _5
    total += np.uint64(size)
    while end - at >= 8:
        total = _rotate(total ^ _round(np.uint64(0), _load_64(at)), 27) * _1 + _4
        at += 8
    if end - at >= 4:
        total = _rotate(total ^ (_load_32(at) * _1), 23) * _2 + _3
        at += 4
    while end - at >= 1:
        total = _rotate(total ^ (load_8(at) * _5), 11) * _1
        at += 1
    total = (total ^ (total >> np.uint64(33))) * _2
    total = (total ^ (total >> np.uint64(29))) * _3
    return total ^ (total >> np.uint64(32))
