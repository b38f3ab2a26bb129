"""Reads a .beton file in runs, ahead of the decoder, for the windowed order (`order.windowed_order`).

FFCV decodes from a memory map, whose page faults read a file piece by piece, in the order of the images. Here threads
read each run as a whole shortly before its first image is decoded, and its memory is given back after the last. Only
speed and memory depend on it: what is not in the page cache, the map still reads.
"""

import mmap
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data.order import RUN_BYTES
from data.pipeline import FileMap

THREADS = 4
PIECE = 1 << 20  # bytes of one read


class RunReader:
    """Stands in for a `FileMap`.

    Attributes:
        runs: int64 [num_samples], the run that each sample lies in.
        begin, end: int64 [runs], the bytes of the file that hold the samples of each run.
    """

    def __init__(self, path: Path, regions: list[tuple[np.ndarray, np.ndarray]], ahead: int):
        """What an epoch's reading needs.

        Args:
            path: the file.
            regions: uint64 [num_samples] each, where what is decoded of each sample begins in the file, and its bytes:
                of images, of masks.
            ahead: runs that are read before they are needed.
        """
        self.path, self.ahead = path, ahead
        self.runs = regions[0][0].astype(np.int64) // RUN_BYTES
        self.begin = np.full(self.runs.max() + 1, np.iinfo(np.int64).max)
        self.end = np.zeros(len(self.begin), np.int64)
        for begin, sizes in regions:
            np.minimum.at(self.begin, self.runs, begin.astype(np.int64))
            np.maximum.at(self.end, self.runs, (begin + sizes).astype(np.int64))

    def schedule_epoch(self, batches: list[np.ndarray]) -> "ReadAhead":
        """Called by FFCV at an epoch's start, with each batch's sample indices."""
        return ReadAhead(self, batches)


class ReadAhead(FileMap):
    """One epoch's reading. FFCV enters it, announces each batch before it decodes it, and leaves it, maybe twice."""

    def __init__(self, reader: RunReader, batches: list[np.ndarray]):
        super().__init__(reader.path)
        self._begin, self._end, self._ahead = reader.begin, reader.end, reader.ahead
        runs = reader.runs[np.concatenate(batches).astype(np.int64)]
        batch = np.repeat(np.arange(len(batches)), [len(indices) for indices in batches])
        used, first = np.unique(runs, return_index=True)
        last = len(runs) - 1 - np.unique(runs[::-1], return_index=True)[1]
        # (batch, run), in the order of the batches that need a run first, and last.
        self._to_read = deque(sorted(zip(batch[first].tolist(), used.tolist(), strict=True)))
        self._to_drop = deque(sorted(zip(batch[last].tolist(), used.tolist(), strict=True)))
        self._reads: deque[tuple[int, Future]] = deque()
        self._lock, self._ended = threading.Lock(), False

    def __enter__(self) -> "ReadAhead":
        self._file = os.open(self.path, os.O_RDONLY)
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)  # the kernel reads what is asked for and no further
        self._map = mmap.mmap(self._file, 0, prot=mmap.PROT_READ)
        # Should memory be short, a fault reads a page of memory, not what lies around it and pushes out more.
        self._map.madvise(mmap.MADV_RANDOM)
        self.state = np.frombuffer(self._map, np.uint8)  # what the decoder reads
        self._pool = ThreadPoolExecutor(THREADS, "read-ahead")
        return self

    def start_batch(self, batch: int) -> None:
        """Waits for the batch's runs, has the next ones read meanwhile, and drops those that only earlier ones needed.

        Raises:
            OSError: a run could not be read.
        """
        self._submit(lambda first: first <= batch)
        while self._reads and self._reads[0][0] <= batch:
            try:
                self._reads.popleft()[1].result()
            except CancelledError:  # the epoch was ended meanwhile
                return
        with self._lock:
            while not self._ended and self._to_drop and self._to_drop[0][0] < batch:
                self._drop(self._to_drop.popleft()[1])
        self._submit(lambda _: len(self._reads) < self._ahead)  # while the batch is decoded

    def _submit(self, wanted: Callable[[int], bool]) -> None:
        """Has the next runs read, as long as `wanted`, given the first batch that needs a run, says so."""
        with self._lock:
            while not self._ended and self._to_read and wanted(self._to_read[0][0]):
                first, run = self._to_read.popleft()
                self._reads.append((first, self._pool.submit(self._read, run)))

    def __exit__(self, *_: object) -> None:
        with self._lock:
            ended, self._ended = self._ended, True
        if not ended:
            self._pool.shutdown(wait=True, cancel_futures=True)
            os.close(self._file)

    def _read(self, run: int) -> None:
        at, end = int(self._begin[run]), int(self._end[run])
        while at < end:
            got = len(os.pread(self._file, min(PIECE, end - at), at))
            if got == 0:
                raise OSError(f"{self.path}: became shorter while it was read")
            at += got

    def _drop(self, run: int) -> None:
        """Takes the run out of our map, and out of the page cache where no other process maps it."""
        begin = -(-int(self._begin[run]) // mmap.PAGESIZE) * mmap.PAGESIZE
        length = int(self._end[run]) // mmap.PAGESIZE * mmap.PAGESIZE - begin
        if length > 0:
            self._map.madvise(mmap.MADV_DONTNEED, begin, length)
            os.posix_fadvise(self._file, begin, length, os.POSIX_FADV_DONTNEED)
