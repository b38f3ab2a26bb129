"""Images -> a .beton file: `python -m data.write SOURCE OUT.beton`, or `write(dataset, out)` for a dataset object.

FFCV's fields encode and its allocator lays out the pages; the processes are ours, since FFCV's writer waits for ever
when one of its processes raises. A file is written beside its final name and renamed when it is complete.
"""

import argparse
import errno
import hashlib
import json
import mmap
import multiprocessing
import os
import queue
import signal
import sys
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import cv2
import numpy as np
from ffcv.fields import BytesField, IntField, RGBImageField
from ffcv.fields.rgb_image import resizer
from ffcv.memory_allocator import MemoryAllocator
from ffcv.types import ALLOC_TABLE_TYPE, FieldDescType, HeaderType
from ffcv.writer import MIN_PAGE_SIZE, DatasetWriter, handle_sample
from tqdm import tqdm

from data import corrupt, segmentation
from data.beton import inspect, put_digest, side_digest, side_file, tables_digest
from data.checksum import checksum
from data.decode import IGNORE
from data.layouts import LAYOUTS, Arrays, Files, open_source
from data.runs import encode_runs
from data.sources import MAX_SIDE, ImageFolder, to_rgb

CHUNK = 64  # samples a process takes at a time


def write(
    dataset: Any,
    out: str | Path,
    *,
    max_side: int | None = None,
    quality: int = 90,
    raw_share: float | str = "smart",
    smart_threshold: int = 100_000,
    workers: int | None = None,
    skip_unreadable: bool = False,
    corruption: tuple[str, int] | None = None,
    seed: int = 0,
    image_key: str = "image",
    label_key: str = "label",
    classes: Sequence[str] | None = None,
    mask_classes: Sequence[str] | None = None,
    palette: Sequence[Sequence[int]] | None = None,
    allow_empty: bool = False,
    source: str | None = None,
    progress: bool = True,
) -> dict:
    """Writes a dataset as a .beton file, with a JSON beside it (`OUT.json`).

    Args:
        dataset: an indexable object with a length, such as a torchvision or Hugging Face dataset. Its items are an
            image, (image, label), (image, label, mask), or a dict with `image_key` and, if labelled, `label_key` and
            `mask`. An image is a PIL image or a uint8 array [H, W, 3]; a mask is integers [H, W] beside it: classes, or
            255 where none is labelled.
        out: the file; replaced only when the new one is complete.
        max_side: larger images are shrunk to this longer side, pixels.
        quality: of the JPEGs, 1..100.
        raw_share: share of the images kept as raw pixels (0..1; raw loads fastest and takes most room), or "smart":
            raw up to `smart_threshold`, JPEG above.
        smart_threshold: bytes of raw pixels.
        workers: processes; by default one a core.
        skip_unreadable: leave out the items that cannot be read, instead of failing.
        corruption: (name, severity) of `data.corrupt`, to write a shifted copy; applied to the images as they are after
            `max_side`.
        seed: of the corruption's noise, which is a function of it and of an item's index.
        classes: names of the classes; by default the dataset's own (`classes`, or the label feature's `names`).
        mask_classes: names of the masks' classes; by default the dataset's own (`mask_classes`), else their numbers.
        palette: (R, G, B) of each of them, for pictures; by default the dataset's own (`palette`), else Pascal VOC's.
        allow_empty: let masks' classes have no pixel; as a small validation set may, and no training set should.
        source: what to record as the source; by default the dataset's type.

    Returns:
        What the JSON holds: classes, count, source, settings, bytes, sha256, skipped, digest; with masks also
        mask_classes, palette, pixels (of each class) and unlabelled (pixels without one).

    Raises:
        ValueError: a setting out of its range, an empty dataset, unreadable items (named in the message), or classes
            of masks without a pixel.
        OSError: the file cannot be written, such as no space left. Nothing was overwritten.
    """
    out = Path(out)
    _check_settings(max_side, quality, raw_share, smart_threshold, workers)
    if corruption is not None:
        corrupt.check(*corruption)
    if out.is_dir():
        raise ValueError(f"{out}: is a folder; name a file such as {out / 'train.beton'}")
    if len(dataset) == 0:
        raise ValueError(f"{source or type(dataset).__name__}: holds no images")
    mask_classes = getattr(dataset, "mask_classes", None) if mask_classes is None else mask_classes
    palette = getattr(dataset, "palette", None) if palette is None else palette
    read = _Items(dataset, image_key, label_key, IGNORE if mask_classes is None else len(mask_classes))
    if corruption is not None:
        read = _Corrupted(read, max_side, *corruption, seed)
    fields = _fields(read, max_side, quality, raw_share, smart_threshold)
    name_of = (
        dataset.name if isinstance(dataset, ImageFolder | Files | Arrays | segmentation.Pairs) else "item {}".format
    )

    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    side_aside = out.with_name(f".{out.name}.{os.getpid()}.json.tmp")
    try:
        unreadable, pixels = _write_pages(read, aside, fields, _page_size(max_side), workers or _cores(), progress)
        skipped = [{"name": name_of(index), "reason": reason} for index, reason in sorted(unreadable.items())]
        if skipped:
            _report(skipped, len(dataset), progress)
        if skipped and (not skip_unreadable or len(skipped) == len(dataset)):
            mend = "nothing is left" if skip_unreadable else "mend or remove them, or pass --skip_unreadable"
            first = f"{skipped[0]['name']} ({skipped[0]['reason']})"
            raise ValueError(f"{len(skipped)} of {len(dataset)} images unreadable, the first is {first}; {mend}")
        info = inspect(aside)  # what was written reads back
        content = {
            "classes": _classes(dataset, label_key, classes) if "label" in fields else None,
            "count": len(dataset) - len(skipped),
            "source": source or f"{type(dataset).__module__}.{type(dataset).__qualname__}",
            "settings": {
                "max_side": max_side, "quality": quality, "raw_share": raw_share, "smart_threshold": smart_threshold,
                "corruption": corruption and {"name": corruption[0], "severity": corruption[1], "seed": seed},
            },
            "bytes": aside.stat().st_size,
            "sha256": _sha256(aside),
            "skipped": skipped,
        }  # fmt: skip
        if "mask" in fields:
            content |= _masks(pixels, mask_classes, palette, allow_empty, content["source"])
        content["digest"] = side_digest(content, info.digest)
        side_aside.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(aside, out)
        os.replace(side_aside, side_file(out))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = f"{out.parent}: no space left for {out.name}; make room or choose another folder"
            raise OSError(error.errno, what) from error
        raise
    finally:
        aside.unlink(missing_ok=True)
        side_aside.unlink(missing_ok=True)
    return content


class _Items:
    """A dataset's items as dicts with `image` and, where given, `label` and `mask`."""

    def __init__(self, dataset: Any, image_key: str, label_key: str, num_mask_classes: int):
        self.dataset, self.image_key, self.label_key = dataset, image_key, label_key
        self.num_mask_classes = num_mask_classes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        item = self.dataset[index]
        if isinstance(item, dict):
            if self.image_key not in item:
                raise ValueError(f"no {self.image_key!r} among {sorted(item)}")
            names = {"image": self.image_key, "label": self.label_key, "mask": "mask"}
            item = {name: item[key] for name, key in names.items() if key in item}
        else:
            values = item if isinstance(item, tuple | list) else (item,)
            item = dict(zip(("image", "label", "mask"), values, strict=False))
        item["image"] = to_rgb(item["image"])
        if "label" in item:
            label = int(item["label"])
            if label < 0:
                raise ValueError(f"label {label} is below 0")
            item["label"] = label
        if "mask" in item:
            item["mask"] = self._mask(np.asarray(item["mask"]), item["image"].shape[:2])
        return item

    def _mask(self, mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        if mask.dtype.kind not in "biu" or mask.shape != size:
            raise ValueError(f"its mask is {mask.dtype} {list(mask.shape)}, not integers {list(size)} as its image")
        outside = (mask < 0) | (mask >= self.num_mask_classes) & (mask != IGNORE)
        if outside.any():
            raise ValueError(f"its mask has class {mask[outside][0]}, of {self.num_mask_classes} and {IGNORE}")
        return np.ascontiguousarray(mask, dtype=np.uint8)


class _Corrupted:
    """Items with corrupted images, of the size at which they are stored."""

    def __init__(self, items: _Items, max_side: int | None, name: str, severity: int, seed: int):
        self.items, self.max_side, self.name, self.severity, self.seed = items, max_side, name, severity, seed

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        item = self.items[index]
        image = resizer(item["image"], self.max_side)
        return item | {"image": corrupt.corrupt(image, self.name, self.severity, index, self.seed)}


_CHECKSUMS = ("checksum", "mask_checksum")  # fields, of what is stored for the image and for the mask


class _PageTooSmallError(Exception):
    """A sample needs more than a page: its bytes are in args[0]."""


class _Allocator(MemoryAllocator):
    """FFCV's, which also keeps in `stored` what the current sample was given: uint8 arrays, of its image, then mask."""

    def set_current_sample(self, current_sample_id):
        super().set_current_sample(current_sample_id)
        self.stored = []

    def malloc(self, size):
        if size > self.page_size:
            raise _PageTooSmallError(int(size))
        pointer, buffer = super().malloc(size)
        self.stored.append(buffer)
        return pointer, buffer


Written = tuple[dict[int, str], np.ndarray]


def _write_pages(read: _Items, path: Path, fields: dict, page_size: int, workers: int, progress: bool) -> Written:
    """Writes the file; returns {index: reason} of the unreadable items, which it leaves out, and pixels a mask's value.

    The pixels are int64 [256], of all masks written.
    """
    while True:
        try:
            return _write_once(read, path, fields, page_size, workers, progress)
        except _PageTooSmallError as error:  # rare: raw images above FFCV's usual page; start again with larger pages
            page_size = 1 << (error.args[0] - 1).bit_length()


def _write_once(read: _Items, path: Path, fields: dict, page_size: int, workers: int, progress: bool) -> Written:
    count = len(read)
    writer = DatasetWriter(str(path), fields, page_size=page_size, num_workers=workers)
    writer.num_samples = count
    writer.prepare()  # the header and the fields
    # FFCV keeps the metadata in /dev/shm, which is small in containers. Forked processes can share plain memory.
    writer.metadata_sm.close()
    writer.metadata_sm.unlink()
    metadata = np.frombuffer(mmap.mmap(-1, count * writer.metadata_type.itemsize), dtype=writer.metadata_type)
    allocator = _Allocator(str(path), writer.data_region_start, page_size)

    checksum(np.zeros(1, np.uint8))  # compiled once, before the fork
    context = multiprocessing.get_context("fork")
    done, taken, messages = context.Value("Q", 0), context.Value("Q", 0), context.Queue()
    work = (read, fields, metadata, allocator, taken, done, messages, os.getpid())
    processes = [context.Process(target=_work, args=work, daemon=True) for _ in range(min(workers, -(-count // CHUNK)))]
    allocations, unreadable, pixels, finished = [], {}, np.zeros(256, np.int64), 0
    try:
        for process in processes:
            process.start()
        with tqdm(total=count, unit="image", disable=not progress, desc=path.name.split(".")[1]) as bar:
            while finished < len(processes):
                bar.update(done.value - bar.n)
                try:
                    kind, *values = messages.get(timeout=0.1)
                except queue.Empty:
                    if any(process.exitcode not in (None, 0) for process in processes):
                        raise RuntimeError("a writing process was killed; out of memory? try fewer --workers") from None
                    continue
                if kind == "error":
                    raise values[0]
                if kind == "unreadable":
                    unreadable[values[0]] = values[1]
                else:
                    allocations += values[0]
                    pixels += values[1]
                    finished += 1
            bar.update(count - bar.n)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()

    # An unbuffered write may stop short on a full disk without raising.
    pages = allocator.next_page_allocated.value
    if pages and path.stat().st_size != allocator.offset + pages * page_size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    # The unreadable ones leave a gap at the end of the metadata, which nothing points to.
    keep = np.ones(count, dtype=bool)
    keep[list(unreadable)] = False
    table = np.array(allocations, dtype=ALLOC_TABLE_TYPE)
    table = table[keep[table["sample_id"].astype(np.int64)]]
    table["sample_id"] = (np.cumsum(keep) - 1)[table["sample_id"].astype(np.int64)]
    with open(path, "r+b") as file:
        file.seek(writer.metadata_start)
        rows = metadata.view(np.uint8).reshape(count, -1)  # as bytes: a copy of structs leaves junk in their padding
        file.write(rows[keep].tobytes())
        writer.header["alloc_table_ptr"] = file.seek(0, os.SEEK_END)
        writer.header["num_samples"] = keep.sum()
        file.write(table.tobytes())
        descriptors = np.fromfile(path, FieldDescType, len(fields), offset=HeaderType.itemsize)
        put_digest(descriptors, tables_digest(writer.header.tobytes(), descriptors, rows[keep], table))
        file.seek(0)
        file.write(writer.header.tobytes())
        file.write(descriptors.tobytes())
        file.flush()
        os.fsync(file.fileno())
    return unreadable, pixels


def _work(read: _Items, fields, metadata, allocator, taken, done, messages, parent: int) -> None:
    """A writing process: takes chunks of samples until none is left. It reports every failure and raises none."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # the parent's handlers are not ours; it ends its processes itself
    cv2.setNumThreads(0)  # OpenCV's thread pool does not survive a fork
    warnings.simplefilter("ignore")
    pixels = np.zeros(256, np.int64)
    try:
        with allocator:
            while os.getppid() == parent:
                with taken.get_lock():
                    start = taken.value
                    taken.value += CHUNK
                for index in range(start, min(start + CHUNK, len(read))):
                    reason = _store(read, index, fields, metadata, allocator, pixels)
                    if reason:
                        messages.put(("unreadable", index, reason))
                    with done.get_lock():
                        done.value += 1
                if start >= len(read):
                    break
        messages.put(("done", allocator.allocations, pixels))
    except (OSError, _PageTooSmallError) as error:
        messages.put(("error", error))
    except BaseException as error:
        messages.put(("error", RuntimeError(f"a writing process failed: {_one_line(error)}")))


def _store(
    read: _Items, index: int, fields: dict, metadata: np.ndarray, allocator: _Allocator, pixels: np.ndarray
) -> str:  # fmt: skip
    """Writes one sample, and adds its mask's pixels a value; returns why it could not be read, or ""."""
    try:
        item = read[index]
        expected = [name for name in fields if name not in _CHECKSUMS]
        if list(item) != expected:
            raise ValueError(f"has {', '.join(item)}, while the first item has {', '.join(expected)}")
    except Exception as error:  # a decoder may raise anything on a broken file
        return _one_line(error)
    if "mask" in item:
        runs = encode_runs(item["mask"])
        item["mask"] = runs.reshape(-1)
    try:
        values = [item.get(name, 0) for name in fields]
        handle_sample(values, index, metadata.dtype.names, metadata, allocator, fields)
    except (OSError, _PageTooSmallError):  # of the file that is written
        raise
    except MemoryError as error:  # FFCV's word for an image and a mask that do not share a page
        raise _PageTooSmallError(2 * allocator.page_size) from error
    except Exception as error:  # such as a side too long for a JPEG
        return _one_line(error)
    columns = dict(zip(fields, metadata.dtype.names, strict=True))
    for name, stored in zip(_CHECKSUMS, allocator.stored, strict=False):
        metadata[columns[name]][index] = np.uint64(checksum(stored)).view(np.int64)
    if "mask" in item:
        pixels += np.bincount(runs[:, 0], runs[:, 1] + 1.0, minlength=256).astype(np.int64)
    return ""


def _fields(read: _Items, max_side, quality, raw_share, smart_threshold) -> dict:
    """FFCV's fields for what the first readable item holds."""
    item, reason = None, ""
    for index in range(len(read)):
        try:
            item = read[index]
            break
        except Exception as error:
            reason = reason or _one_line(error)
    if item is None:
        raise ValueError(f"none of the {len(read)} images is readable; the first: {reason}")
    mode = {"smart": "smart", 0: "jpg", 1: "raw"}.get(raw_share, "proportion")
    fields = {
        "image": RGBImageField(
            write_mode=mode, max_resolution=max_side, smart_threshold=smart_threshold, jpeg_quality=quality,
            compress_probability=0.0 if raw_share == "smart" else 1 - raw_share,
        )
    }  # fmt: skip
    if "label" in item:
        fields["label"] = IntField()
    if "mask" in item:
        if max_side is not None:
            raise ValueError("max_side: images with masks are stored at their own size")
        fields["mask"] = BytesField()
    fields |= {name: IntField() for name in _CHECKSUMS[: 1 + ("mask" in item)]}
    return fields


def _check_settings(max_side, quality, raw_share, smart_threshold, workers) -> None:
    checks = (
        ("max_side", max_side, max_side is None or 1 <= max_side <= MAX_SIDE, f"a number of pixels up to {MAX_SIDE}"),
        ("quality", quality, 1 <= quality <= 100, "in 1..100"),
        ("raw_share", raw_share, raw_share == "smart" or (not isinstance(raw_share, str) and 0 <= raw_share <= 1),
         'a share in 0..1, or "smart"'),
        ("smart_threshold", smart_threshold, smart_threshold >= 0, "a number of bytes"),
        ("workers", workers, workers is None or workers >= 1, "at least 1"),
    )  # fmt: skip
    for name, value, good, want in checks:
        if not good:
            raise ValueError(f"{name} {value}: must be {want}")


def _page_size(max_side: int | None) -> int:
    """FFCV's own 8 MiB, or a power of two that holds the largest raw image."""
    need = 4 * MIN_PAGE_SIZE if max_side is None else 3 * max_side**2
    return max(4 * MIN_PAGE_SIZE, min(1 << (need - 1).bit_length(), 1 << 31))


def _classes(dataset: Any, label_key: str, classes: Sequence[str] | None) -> list[str] | None:
    if classes is None:
        feature = (getattr(dataset, "features", None) or {}).get(label_key)
        classes = getattr(dataset, "classes", None) or getattr(feature, "names", None)
    return None if classes is None else [str(name) for name in classes]


def _masks(pixels: np.ndarray, names, palette, allow_empty: bool, source: str) -> dict:
    """What the JSON says of the masks."""
    if names is None:
        names = [str(number) for number in range(np.max(np.flatnonzero(pixels[:IGNORE]), initial=0) + 1)]
    elif not allow_empty and (empty := [f"{i} {name}" for i, name in enumerate(names) if not pixels[i]]):
        more = f" and {len(empty) - 10} more" if len(empty) > 10 else ""
        mend = "mend the class table, or let it pass with --allow_empty"
        raise ValueError(f"{source}: classes without a pixel in any mask: {', '.join(empty[:10])}{more}; {mend}")
    palette = segmentation.default_palette(len(names)) if palette is None else [list(colour) for colour in palette]
    return {
        "mask_classes": [str(name) for name in names],
        "palette": palette,
        "pixels": pixels[: len(names)].tolist(),
        "unlabelled": int(pixels[IGNORE]),
    }


def _summary(content: dict) -> str:
    """The masks' pixels a class, as shares, and the classes without one."""
    total = max(1, sum(content["pixels"]) + content["unlabelled"])
    counted = dict(zip(content["mask_classes"], content["pixels"], strict=True))
    shares = [f"{name} {count / total:.2%}" for name, count in counted.items() if count]
    shares.append(f"not labelled {content['unlabelled'] / total:.2%}")
    empty = [name for name, count in counted.items() if not count]
    return _listed("pixels", shares) + (_listed("\nclasses without a pixel", empty) if empty else "")


def _listed(what: str, parts: list[str]) -> str:
    """`what: part, part, ...` in lines that break between parts, not within: no-break spaces hold a part together."""
    text = f"{what}: {', '.join(part.replace(' ', chr(160)) for part in parts)}"
    return textwrap.fill(text, 120, subsequent_indent="  ", replace_whitespace=False).replace(chr(160), " ")


def _report(skipped: list[dict], total: int, progress: bool) -> None:
    if not progress:
        return
    for entry in skipped[:20]:
        print(f"unreadable: {entry['name']}: {entry['reason']}", file=sys.stderr)
    more = f", {len(skipped) - 20} of them not shown" if len(skipped) > 20 else ""
    print(f"{len(skipped)} of {total} images unreadable{more}", file=sys.stderr)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.exit(_fail(message))


def _fail(message: object) -> int:
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    return 2


def _raw_share(text: str) -> float | str:
    return text if text == "smart" else float(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = _Parser(prog="python -m data.write", description="Write a folder of images as a .beton file.")
    parser.add_argument(
        "source", help="a folder: a class a subfolder, any nested folder of unlabelled images, or an unpacked data set"
    )
    parser.add_argument("out", help="the file to write, such as train.beton")
    parser.add_argument("--max_side", type=int, help="shrink larger images to this longer side, pixels")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs, 1..100 (default 90)")
    parser.add_argument(
        "--raw_share", type=_raw_share, default="smart", help='share kept raw, 0..1, or "smart" (default)'
    )
    parser.add_argument("--smart_threshold", type=int, default=100_000, help="raw bytes from which smart takes JPEG")
    parser.add_argument("--workers", type=int, help="processes (default: one a core)")
    parser.add_argument("--unlabelled", action="store_true", help="take no labels from subfolders")
    parser.add_argument(
        "--task", choices=["classification", "segmentation"], default="classification",
        help="segmentation writes a mask with each image (default classification)",
    )  # fmt: skip
    parser.add_argument("--masks", metavar="FOLDER", help="of any folder of images: its masks, of the same names")
    parser.add_argument(
        "--classes", metavar="CSV", help="what the masks' values mean, lines of value,name (default: the layout's own)"
    )
    parser.add_argument("--allow_empty", action="store_true", help="let a class of a training split have no pixel")
    parser.add_argument("--skip_unreadable", action="store_true", help="leave out unreadable images instead of failing")
    parser.add_argument(
        "--layout",
        choices=["folder", *LAYOUTS, *segmentation.LAYOUTS],
        help="how the source is laid out (default: found out)",
    )
    parser.add_argument("--split", choices=["train", "val", "test"], help="of a data set (default: its first)")
    parser.add_argument("--corrupt", metavar="NAME", help=f"write a shifted copy: {', '.join(corrupt.CORRUPTIONS)}")
    parser.add_argument("--severity", type=int, choices=corrupt.SEVERITIES, help="of the corruption")
    parser.add_argument("--seed", type=int, default=0, help="of the corruption's noise (default 0)")
    options = vars(parser.parse_args(arguments))
    source, out, layout, split = (options.pop(name) for name in ("source", "out", "layout", "split"))
    unlabelled, name, severity = (options.pop(name) for name in ("unlabelled", "corrupt", "severity"))
    task, masks, classes = (options.pop(name) for name in ("task", "masks", "classes"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the unfinished file is removed
    try:
        if (name is None) != (severity is None):
            raise ValueError("corrupt, severity: give both, such as --corrupt contrast --severity 3")
        corruption = None if name is None else (name, severity)
        if task == "segmentation":
            if unlabelled:
                raise ValueError("unlabelled: is for classification; leave it out")
            folder = segmentation.open_pairs(source, layout, split, masks, classes)
            options["allow_empty"] |= split in ("val", "test")  # what is small may lack a rare class
        elif masks or classes:
            raise ValueError("masks, classes: belong to --task segmentation")
        else:
            folder = open_source(source, layout, split, corruption, unlabelled)
        print(f"{source}: {len(folder)} images, {folder.why}")
        if isinstance(folder, Arrays) and folder.corrupted:
            corruption = None
        if not isinstance(folder, ImageFolder):
            source = f"{source} ({folder.why})"
        content = write(folder, out, source=source, corruption=corruption, **options)
    except OSError as error:
        return _fail(error.strerror if error.errno in (errno.ENOSPC, errno.EDQUOT) else error)
    except (ValueError, RuntimeError) as error:
        return _fail(error)
    print(f"{out}: {content['count']} images, {content['bytes'] / 1e6:.1f} MB")
    if "pixels" in content:
        print(_summary(content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
