"""The processes that write a file's pages, and the file's tables at the end.

FFCV's fields encode and its allocator lays out the pages. The processes are ours, since FFCV's writer waits for ever
when one of its processes raises.
"""

import errno
import mmap
import multiprocessing
import os
import queue
import signal
import sys
import warnings
from pathlib import Path

import cv2
import numpy as np
from ffcv.fields import BytesField, IntField, RGBImageField, rgb_image
from ffcv.memory_allocator import MemoryAllocator
from ffcv.types import ALLOC_TABLE_TYPE, FieldDescType, HeaderType
from ffcv.writer import MIN_PAGE_SIZE, DatasetWriter, handle_sample
from tqdm import tqdm

from data.beton import put_digest, tables_digest
from data.checksum import checksum
from data.jpeg import encode
from data.runs import encode_runs
from data.write.items import Corrupted, Items, StructureError, one_line
from data.write.open_files import SharedFileError, reopen

CHUNK = 64  # samples that a process takes at a time
Samples = Items | Corrupted


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


def write_pages(read: Samples, path: Path, fields: dict, page_size: int, workers: int, progress: bool) -> Written:
    """Writes the file.

    Returns:
        {index: reason} of the unreadable items, which are left out; and pixels per value in all masks, int64 [256].

    Raises:
        StructureError, SharedFileError: see `items` and `open_files`.
        OSError: the file cannot be written.
        RuntimeError: a process was killed, or failed by a fault of ours.
    """
    while True:
        try:
            return _write_once(read, path, fields, page_size, workers, progress)
        except _PageTooSmallError as error:  # rare: raw images above FFCV's usual page; start again with larger pages
            page_size = 1 << (error.args[0] - 1).bit_length()


def _write_once(read: Samples, path: Path, fields: dict, page_size: int, workers: int, progress: bool) -> Written:
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
    number = min(workers, -(-count // CHUNK))
    work = (read, fields, metadata, allocator, taken, done, messages, os.getpid(), number == 1)
    processes = [context.Process(target=_work, args=work, daemon=True) for _ in range(number)]
    allocations, unreadable, pixels, finished = [], {}, np.zeros(256, np.int64), 0
    try:
        for process in processes:
            process.start()
        name, pause = path.name.split(".")[1], 0.1 if sys.stderr.isatty() else 30.0  # seconds; a log is kept short
        with tqdm(total=count, unit="image", disable=not progress, desc=name, mininterval=pause) as bar:
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


def _work(read: Samples, fields, metadata, allocator, taken, done, messages, parent: int, alone: bool) -> None:
    """A writing process: takes chunks of samples until none is left. It reports every failure and raises none."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # the parent's handlers are not ours; it ends its processes itself
    cv2.setNumThreads(0)  # OpenCV's thread pool does not survive a fork
    warnings.simplefilter("ignore")
    rgb_image.encode_jpeg = encode  # of this process alone
    pixels = np.zeros(256, np.int64)
    try:
        if not alone:
            reopen(ours={messages._reader.fileno(), messages._writer.fileno()})
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
    except (OSError, StructureError, SharedFileError, _PageTooSmallError) as error:
        messages.put(("error", error))
    except BaseException as error:
        messages.put(("error", RuntimeError(f"a writing process failed: {one_line(error)}")))


def _store(
    read: Samples, index: int, fields: dict, metadata: np.ndarray, allocator: _Allocator, pixels: np.ndarray
) -> str:  # fmt: skip
    """Writes one sample, and adds up its mask's pixels per value; returns why it could not be read, or ""."""
    try:
        item = read[index]
        expected = [name for name in fields if name not in _CHECKSUMS]
        if list(item) != expected:
            has = f"has {', '.join(item)}, while the first readable item has {', '.join(expected)}"
            raise StructureError(f"item {index} {has}; all items must have the same")
    except StructureError:
        raise
    except Exception as error:  # a decoder may raise anything on a broken file
        return one_line(error)
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
        return one_line(error)
    columns = dict(zip(fields, metadata.dtype.names, strict=True))
    for name, stored in zip(_CHECKSUMS, allocator.stored, strict=False):
        metadata[columns[name]][index] = np.uint64(checksum(stored)).view(np.int64)
    if "mask" in item:
        pixels += np.bincount(runs[:, 0], runs[:, 1] + 1.0, minlength=256).astype(np.int64)
    return ""


def fields_of(read: Samples, max_side, quality, raw_share, smart_threshold) -> dict:
    """FFCV's fields for what the first readable item holds."""
    item, reason = None, ""
    for index in range(len(read)):
        try:
            item = read[index]
            break
        except StructureError:
            raise
        except Exception as error:
            reason = reason or one_line(error)
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


def page_size_for(max_side: int | None) -> int:
    """FFCV's own 8 MiB, or a power of two that holds the largest raw image."""
    need = 4 * MIN_PAGE_SIZE if max_side is None else 3 * max_side**2
    return max(4 * MIN_PAGE_SIZE, min(1 << (need - 1).bit_length(), 1 << 31))
