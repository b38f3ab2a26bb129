"""A look at a .beton file before FFCV maps it: FFCV reads a damaged one until it crashes (SIGBUS, SIGSEGV)."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ffcv.fields import IntField, NDArrayField, RGBImageField
from ffcv.fields.rgb_image import IMAGE_MODES
from ffcv.reader import Reader
from ffcv.types import ALLOC_TABLE_TYPE, CURRENT_VERSION, TYPE_ID_HANDLER, FieldDescType, HeaderType

WRITE_AGAIN = "write it again with python -m data.write"


@dataclass(frozen=True)
class Info:
    """What a .beton file holds."""

    path: Path
    num_samples: int
    has_labels: bool
    has_masks: bool
    max_label: int | None  # None without labels
    classes: list[str] | None  # from the JSON beside the file; None without it or without labels
    sha256: str | None  # of the file when it was written, from the JSON beside it
    max_size: tuple[int, int]  # largest stored (height, width), pixels
    fields: tuple[str, ...]  # names of FFCV's fields


def side_file(path: Path) -> Path:
    """The JSON beside a .beton file: `x.beton.json`."""
    return path.with_name(path.name + ".json")


def inspect(path: str | Path) -> Info:
    """Checks that a .beton file is whole and says what it holds; reads its tables, not its images.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a .beton, of another version, unfinished, truncated, empty, or damaged in its tables, or
            it has no field `image`. One line: what, where, how to mend it.
    """
    return open_checked(path)[0]


def open_checked(path: str | Path) -> tuple[Info, np.ndarray | None]:
    """`inspect`, and the labels: int64 [num_samples], or None in a file without labels."""
    path = Path(path)
    if not path.is_file():
        what = "is a folder, not a .beton file" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{path}: {what}; write one with python -m data.write SOURCE {path}")
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
    if any(int(type_id) not in TYPE_ID_HANDLER for type_id in descriptors["type_id"]) or table_start < tables_end:
        raise damaged
    if size < table_start + ALLOC_TABLE_TYPE.itemsize * num_samples:  # at least the images have an entry each
        raise _truncated(path, size, table_start + ALLOC_TABLE_TYPE.itemsize * num_samples)
    try:
        reader = Reader(path)
    except Exception as error:  # whatever a reader of another's bytes may trip over
        raise damaged from error
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

    reader_regions = sum(isinstance(handler, RGBImageField | NDArrayField) for handler in reader.handlers.values())
    if np.any(pointers > end) or np.any(sizes > end - pointers):
        raise damaged
    image = reader.metadata[columns["image"]]
    image_sizes = stored_sizes(image["data_ptr"])
    pixels = 3 * image["height"].astype(np.uint64) * image["width"]
    raw = image["mode"] == IMAGE_MODES["raw"]
    if np.any(pixels == 0) or np.any(image_sizes[raw] != pixels[raw]) or np.any(image["mode"] > 1):
        raise damaged
    mask = reader.handlers.get("mask")
    if mask is not None and np.any(stored_sizes(reader.metadata[columns["mask"]]) != mask.element_size):
        raise damaged

    labels = None
    if isinstance(reader.handlers.get("label"), IntField):
        labels = reader.metadata[columns["label"]].astype(np.int64)
    info = Info(
        path=path,
        num_samples=reader.num_samples.item(),
        has_labels=labels is not None,
        has_masks=mask is not None,
        max_label=None if labels is None else int(labels.max()),
        classes=side.get("classes") if side and labels is not None else None,
        sha256=side.get("sha256") if side else None,
        max_size=(int(image["height"].max()), int(image["width"].max())),
        fields=tuple(reader.handlers),
    )
    if labels is not None and labels.min() < 0:
        raise ValueError(f"{path}: has a label below 0 ({labels.min()}); {WRITE_AGAIN}")
    return info, labels


def _read_side(path: Path) -> dict | None:
    side = side_file(path)
    if not side.is_file():
        return None
    try:
        content = json.loads(side.read_text())
        size, classes = content.get("bytes", 0), content.get("classes") or []
        if not isinstance(size, int) or not all(isinstance(name, str) for name in classes):
            raise ValueError("`bytes` or `classes` is of another type")
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{side}: not such a file ({error}); delete it or {WRITE_AGAIN}") from error
    return content


def _truncated(path: Path, size: int, expected: int) -> ValueError:
    return ValueError(f"{path}: truncated, {size} bytes of {expected} expected; {WRITE_AGAIN}")
