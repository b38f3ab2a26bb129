"""Damage to files, as disks, networks and hurried hands do it; for tests of what reads them."""

from pathlib import Path

import numpy as np

PAGE = 4096


def _truncate(data: bytearray, rng: np.random.Generator) -> str:
    size = int(rng.choice([0, 1, len(data) - 1, rng.integers(len(data))]))
    del data[size:]
    return f"truncated to {size} bytes"


def _append(data: bytearray, rng: np.random.Generator) -> str:
    more = rng.bytes(int(rng.integers(1, 100)))
    data += more
    return f"{len(more)} bytes appended"


def _used(data: bytearray, rng: np.random.Generator, start: int = 0) -> int:
    """A place from `start` on that is not zero: a .beton file is padded with millions of zeros, which nothing reads."""
    used = np.flatnonzero(np.frombuffer(data, np.uint8)[start:])
    return start + int(rng.choice(used)) if len(used) else int(rng.integers(len(data)))


def _flip(data: bytearray, rng: np.random.Generator, at: int) -> str:
    bit = int(rng.integers(8))
    data[at] ^= 1 << bit
    return f"bit {bit} of byte {at} flipped"


def _flip_header(data: bytearray, rng: np.random.Generator) -> str:
    return _flip(data, rng, int(rng.integers(min(24, len(data)))))


def _flip_metadata(data: bytearray, rng: np.random.Generator) -> str:
    return _flip(data, rng, int(rng.integers(min(24, len(data) // 2), min(8192, len(data)))))


def _flip_image(data: bytearray, rng: np.random.Generator) -> str:
    return _flip(data, rng, _used(data, rng, min(8192, len(data) // 2)))


def _flip_tail(data: bytearray, rng: np.random.Generator) -> str:
    return _flip(data, rng, _used(data, rng, max(0, len(data) - 1024)))


def _zero_page(data: bytearray, rng: np.random.Generator) -> str:
    at = _used(data, rng) // PAGE * PAGE
    data[at : at + PAGE] = bytes(len(data[at : at + PAGE]))
    return f"{PAGE} bytes from {at} zeroed"


def _overwrite(data: bytearray, rng: np.random.Generator) -> str:
    at = _used(data, rng)
    part = slice(at, at + int(rng.integers(1, 300)))
    data[part] = rng.bytes(len(data[part]))
    return f"{len(data[part])} bytes from {at} overwritten"


def _swap_pages(data: bytearray, rng: np.random.Generator) -> str:
    first, second = (_used(data, rng) // PAGE * PAGE for _ in range(2))
    size = min(PAGE, len(data) - max(first, second))
    here, there = slice(first, first + size), slice(second, second + size)
    data[here], data[there] = data[there], data[here]
    return f"{size} bytes from {first} and from {second} swapped"


_KINDS = {
    "truncate": _truncate, "append": _append, "flip header": _flip_header, "flip metadata": _flip_metadata,
    "flip image": _flip_image, "flip tail": _flip_tail, "zero page": _zero_page, "overwrite": _overwrite,
    "swap pages": _swap_pages,
}  # fmt: skip
KINDS = tuple(_KINDS)


def damage(path: Path, kind: str, rng: np.random.Generator) -> str:
    """Damages a file in place and says how. The file itself stays the one that is open elsewhere.

    Args:
        path: of a file that is not empty. The places are those of a .beton file: the header is its first 24 bytes, then
            come descriptors and metadata, the images in the middle, and at the tail the allocation table. In other
            files the kinds hit about there.
        kind: one of `KINDS`.
        rng: what the damage is drawn from.

    Returns:
        The file, the kind and the place, for a report. Some damage changes nothing, such as a page swapped with itself.
    """
    data = bytearray(path.read_bytes())
    said = _KINDS[kind](data, rng)
    with open(path, "r+b") as file:
        file.write(data)
        file.truncate()
    return f"{path.name}: {kind}: {said}"
