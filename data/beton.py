"""A look at a .beton file before FFCV maps it: FFCV reads a damaged one until it crashes (SIGBUS, SIGSEGV).

A mask (field `mask`) has its image's size and is stored as runs, see `data.runs`.

A file from `data.write` carries a checksum of each stored image (field `checksum`) and mask (`mask_checksum`),
compared when they are decoded, and a SHA-256 of all its tables, those checksums and the labels among them, compared
here. It lies in the last bytes of the checksum field's arguments, which FFCV leaves empty: it goes where the file goes.
"""

import functools
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ffcv.fields import BytesField, IntField, NDArrayField, RGBImageField
from ffcv.fields.rgb_image import IMAGE_MODES
from ffcv.reader import Reader
from ffcv.types import ALLOC_TABLE_TYPE, CURRENT_VERSION, TYPE_ID_HANDLER, FieldDescType, HeaderType

from data.paths import did_you_mean, expand, kind_of
from data.runs import LONGEST as RUN_LENGTH

WRITE_AGAIN = "write it again with python -m data.write"
_JPEG_PIXELS = (
    1024  # more than a byte of any JPEG holds (a flat baseline one: 64); a lie would take gigabytes to decode
)
TICK = 100_000_000  # nanoseconds
_DIGEST = slice(-32, None)  # where in a field's arguments the tables' SHA-256 lies


class DamagedError(ValueError):
    """Stored data is not what was written; seen only when it is read."""


@dataclass(frozen=True)
class Info:
    """What a .beton file holds."""

    path: Path
    num_samples: int
    has_labels: bool
    has_masks: bool
    max_label: int | None  # None without labels
    classes: list[str] | None  # of the labels, from the JSON beside the file; None without it or without labels
    mask_classes: list[str] | None  # of the masks, in the order of their values, from the JSON; likewise
    palette: list[list[int]] | None  # of the masks' classes, (R, G, B) in 0..255, from the JSON; likewise
    sha256: str | None  # of the file when it was written, from the JSON beside it
    max_size: tuple[int, int]  # largest stored (height, width), pixels
    fields: tuple[str, ...]  # names of FFCV's fields
    digest: str | None  # SHA-256 of the tables, checksums of images and masks included; None in a file without them
    samples: str | None  # SHA-256 of sizes, labels and checksums alone, wherever they lie in the file; likewise


def side_file(path: Path) -> Path:
    """The JSON beside a .beton file: `x.beton.json`."""
    return path.with_name(path.name + ".json")


def tables_digest(header: bytes, descriptors: np.ndarray, metadata: np.ndarray, table: np.ndarray) -> bytes:
    """SHA-256 over a file's tables as they are stored, the place of the digest itself taken as empty."""
    descriptors = descriptors.copy()
    descriptors["arguments"][:, _DIGEST] = 0
    digest = hashlib.sha256(header)
    for part in (descriptors, metadata, table):
        digest.update(part.view(np.uint8))
    return digest.digest()


def put_digest(descriptors: np.ndarray, digest: bytes) -> None:
    """Enters a file's digest into the descriptor of its field `checksum`."""
    descriptors["arguments"][_names(descriptors).index("checksum"), _DIGEST] = np.frombuffer(digest, np.uint8)


def side_digest(content: dict, tables: str) -> str:
    """SHA-256 of what the JSON beside a file says, and of the digest of that file's tables."""
    said = {name: value for name, value in content.items() if name != "digest"}
    return hashlib.sha256(f"{tables} {json.dumps(said, sort_keys=True)}".encode()).hexdigest()


def inspect(path: str | Path) -> Info:
    """Checks that a .beton file is whole and says what it holds; reads its tables, not its images.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a .beton, of another version, unfinished, truncated, empty, or damaged in its tables, or
            it has no field `image`; or the JSON beside it is damaged or of another file. One line: what, where, how to
            mend it.
    """
    return open_checked(path)[0]


def open_checked(path: str | Path) -> tuple[Info, dict[str, np.ndarray]]:
    """`inspect`, and the columns that are there, which cannot be written to.

    `image` and `mask` uint64 [n], where they are stored; `image_bytes` and `mask_bytes` uint64 [n], how long; `raw`
    bool [n], whether an image is stored as pixels, not as JPEG; `size` int64 [n, 2], (height, width); `label` int64
    [n]; `checksum` and `mask_checksum` uint64 [n].

    A process reads and hashes a file's tables once, as long as neither it nor the JSON beside it changes.
    """
    path = expand(path)
    stamps = _stamp(path), _stamp(side_file(path))
    changed = max((stamp[-1] for stamp in stamps if stamp), default=0)
    # A change within a tick of the clock that stamps files would not be seen.
    open_it = _open if time.time_ns() - changed > TICK else _open.__wrapped__
    return open_it(path, *stamps)


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What changes with a file, so that what was read of it no longer holds; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@functools.lru_cache(maxsize=8)  # a job's training and validation files, and a probe's
def _open(path: Path, stamp: object, side_stamp: object) -> tuple[Info, dict[str, np.ndarray]]:
    if path.is_dir():
        name = path.name or "train"
        mend = f"write it as one with python -m data.write {path} {name}.beton and give {name}.beton"
        raise FileNotFoundError(f"{path}: is a folder, not a .beton file; {mend}")
    if not path.is_file():
        near = did_you_mean(path, "digits")
        raise FileNotFoundError(f"{path}: no such file{near}; write one with python -m data.write SOURCE {path}")
    side = _read_side(path)
    size = path.stat().st_size
    recorded = side.get("bytes", size) if side else size
    if recorded > size:
        raise _truncated(path, size, recorded)
    if recorded != size:
        raise ValueError(f"{side_file(path)}: describes another file, of {recorded} bytes, not {size}; {WRITE_AGAIN}")
    if size < HeaderType.itemsize:
        raise _truncated(path, size, HeaderType.itemsize)
    header = np.fromfile(path, dtype=HeaderType, count=1)[0]
    if header["version"] != CURRENT_VERSION:
        kind = kind_of(path)
        if kind:
            raise ValueError(f"{path}: is {kind}, not a .beton file; write its images as one with python -m data.write")
        raise ValueError(f"{path}: not a .beton file of version {CURRENT_VERSION}; {WRITE_AGAIN}")
    table_start, num_samples = int(header["alloc_table_ptr"]), int(header["num_samples"])
    if table_start == 0:
        raise ValueError(f"{path}: unfinished, its writer was stopped; {WRITE_AGAIN}")
    if num_samples == 0:
        raise ValueError(f"{path}: holds no samples; {WRITE_AGAIN}")
    tables_end = HeaderType.itemsize + int(header["num_fields"]) * FieldDescType.itemsize
    if size < min(tables_end, table_start):
        raise _truncated(path, size, table_start)
    damaged = ValueError(f"{path}: not a .beton file, or damaged in its tables; {WRITE_AGAIN}")
    descriptors = np.fromfile(path, FieldDescType, int(header["num_fields"]), offset=HeaderType.itemsize)
    page_size = int(header["page_size"])
    if any(int(type_id) not in TYPE_ID_HANDLER for type_id in descriptors["type_id"]) or table_start < tables_end:
        raise damaged
    if page_size == 0 or page_size & (page_size - 1):
        raise damaged
    if size < table_start + ALLOC_TABLE_TYPE.itemsize * num_samples:  # at least the images have an entry each
        raise _truncated(path, size, table_start + ALLOC_TABLE_TYPE.itemsize * num_samples)
    try:
        reader = Reader(path)
    except Exception as error:  # whatever a reader of another's bytes may trip over
        raise damaged from error
    if len(reader.handlers) != header["num_fields"]:  # two of one name
        raise damaged
    return _check_tables(path, reader, size, side, damaged)


def _check_tables(path: Path, reader: Reader, size: int, side: dict | None, damaged: ValueError):
    """Every pointer leads to a region of the allocation table, which lies inside the file and has the right size."""
    columns = dict(zip(reader.handlers, reader.metadata.dtype.names, strict=True))
    if not isinstance(reader.handlers.get("image"), RGBImageField):
        raise ValueError(f"{path}: has no field `image` of RGB images, only {list(reader.handlers)}; {WRITE_AGAIN}")
    if len(reader.metadata) != reader.num_samples:
        raise damaged
    order = np.argsort(reader.alloc_table["ptr"], kind="stable")
    pointers, sizes = reader.alloc_table["ptr"][order], reader.alloc_table["size"][order]
    end = np.uint64(reader.header["alloc_table_ptr"])

    def stored_sizes(wanted: np.ndarray) -> np.ndarray:
        at = np.minimum(np.searchsorted(pointers, wanted), max(len(pointers) - 1, 0))
        if not len(pointers) or np.any(pointers[at] != wanted):
            # Whole entries may be missing from the table's end.
            expected = int(end) + ALLOC_TABLE_TYPE.itemsize * reader.num_samples * reader_regions
            raise _truncated(path, size, expected) if size < expected else damaged
        return sizes[at]

    reader_regions = sum(
        isinstance(handler, RGBImageField | BytesField | NDArrayField) for handler in reader.handlers.values()
    )
    if np.any(pointers > end) or np.any(sizes > end - pointers):
        raise damaged
    image = reader.metadata[columns["image"]]
    image_sizes = stored_sizes(image["data_ptr"])
    pixels = 3 * image["height"].astype(np.uint64) * image["width"]
    raw = image["mode"] == IMAGE_MODES["raw"]
    if np.any(pixels == 0) or np.any(image_sizes[raw] != pixels[raw]) or np.any(image["mode"] > 1):
        raise damaged
    if np.any(pixels[~raw] // 3 > _JPEG_PIXELS * image_sizes[~raw]):
        raise damaged
    mask, stored_mask = reader.handlers.get("mask"), None
    if mask is not None:
        if type(mask) is not BytesField:
            raise ValueError(f"{path}: its field `mask` is not of masks stored as runs; {WRITE_AGAIN}")
        stored_mask = reader.metadata[columns["mask"]]
        longest = RUN_LENGTH * (stored_sizes(stored_mask["ptr"]) // np.uint64(2))  # pixels that as many runs may fill
        if np.any(stored_sizes(stored_mask["ptr"]) != stored_mask["size"]) or np.any(longest < pixels // np.uint64(3)):
            raise damaged
    digest = _check_digest(reader, damaged)
    if side is not None and digest and side.get("digest") != side_digest(side, digest):
        raise ValueError(f"{side_file(path)}: damaged, or of another file; delete it, or {WRITE_AGAIN}")

    kinds = {"label": np.int64, "checksum": np.uint64, "mask_checksum": np.uint64}
    read = {
        name: np.ascontiguousarray(reader.metadata[columns[name]]).view(kind)
        for name, kind in kinds.items()
        if isinstance(reader.handlers.get(name), IntField) and (digest or name == "label")
    }
    read["image"], read["image_bytes"] = np.ascontiguousarray(image["data_ptr"]), image_sizes
    read["raw"] = np.ascontiguousarray(raw)
    read["size"] = np.stack([image["height"], image["width"]], axis=1).astype(np.int64)
    if stored_mask is not None:
        read["mask"], read["mask_bytes"] = (np.ascontiguousarray(stored_mask[name]) for name in ("ptr", "size"))
    for column in read.values():
        column.flags.writeable = False  # shared by all that open the file
    labels = read.get("label")
    info = Info(
        path=path,
        num_samples=reader.num_samples.item(),
        has_labels=labels is not None,
        has_masks=mask is not None,
        max_label=None if labels is None else int(labels.max()),
        classes=side.get("classes") if side and labels is not None else None,
        mask_classes=side.get("mask_classes") if side and mask is not None else None,
        palette=side.get("palette") if side and mask is not None else None,
        sha256=side.get("sha256") if side else None,
        max_size=(int(image["height"].max()), int(image["width"].max())),
        fields=tuple(reader.handlers),
        digest=digest,
        samples=_samples_digest(read) if digest else None,
    )
    if labels is not None and labels.min() < 0:
        raise ValueError(f"{path}: has a label below 0 ({labels.min()}); {WRITE_AGAIN}")
    return info, read


def _samples_digest(columns: dict[str, np.ndarray]) -> str:
    """What the samples hold, in their order: two files that several processes wrote of the same images agree in it."""
    digest = hashlib.sha256()
    for name in ("size", "label", "checksum", "mask_checksum"):
        if name in columns:
            digest.update(name.encode())
            digest.update(columns[name].tobytes())
    return digest.hexdigest()


def _check_digest(reader: Reader, damaged: ValueError) -> str | None:
    """The digest of the tables, in hex; None in a file that never had one. Raises `damaged` when it does not fit."""
    descriptors = reader.field_descriptors
    stored = descriptors["arguments"][:, _DIGEST]
    if not stored.any() and "checksum" not in reader.handlers:
        return None
    digest = tables_digest(reader.header.tobytes(), descriptors, reader.metadata, reader.alloc_table)
    if "checksum" not in reader.handlers or stored[list(reader.handlers).index("checksum")].tobytes() != digest:
        raise damaged
    return digest.hex()


def _names(descriptors: np.ndarray) -> list[str]:
    return [name.tobytes().rstrip(b"\0").decode("ascii") for name in descriptors["name"]]


def _read_side(path: Path) -> dict | None:
    side = side_file(path)
    if not side.is_file():
        return None
    try:
        content = json.loads(side.read_text())
        size, sha256 = content.get("bytes", 0), content.get("sha256", "")
        classes, mask_classes, palette = (content.get(name) or [] for name in ("classes", "mask_classes", "palette"))
        lists = isinstance(classes, list) and isinstance(mask_classes, list) and isinstance(palette, list)
        if not isinstance(size, int) or not isinstance(sha256, str) or not lists:
            raise ValueError("`bytes`, `sha256` or `classes` is of another type")
        if not all(isinstance(name, str) for name in [*classes, *mask_classes]):
            raise ValueError("`classes` are not names")
        if len(palette) != len(mask_classes) or not all(_is_colour(colour) for colour in palette):
            raise ValueError("`palette` is not one colour per class")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{side}: not such a file ({error}); delete it or {WRITE_AGAIN}") from error
    return content


def _is_colour(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(part) is int and 0 <= part <= 255 for part in value)


def _truncated(path: Path, size: int, expected: int) -> ValueError:
    return ValueError(f"{path}: truncated, {size} bytes of {expected} expected; {WRITE_AGAIN}")
