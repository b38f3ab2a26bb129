"""What FFCV's `EpochIterator`, the thread that decodes ahead, needs of a loader: a file mapped, buffers, a function."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ffcv.pipeline.allocation_query import AllocationQuery, allocate_query

AHEAD = 2  # batches that wait decoded


class FileMap:
    """A file mapped into memory, as FFCV's memory managers give it: `state` is uint8 [bytes] once it was entered."""

    def __init__(self, path: Path):
        self.path, self.state = path, None

    def schedule_epoch(self, batches: list[np.ndarray]) -> "FileMap":
        """Called at an epoch's start, with each batch's sample indices."""
        return self

    def __enter__(self) -> "FileMap":
        if self.state is None:
            self.state = np.memmap(self.path, np.uint8, mode="r").view(np.ndarray)
        return self

    def __exit__(self, *_: object) -> None:
        """The map stays: the next epoch reads the same file."""

    def start_batch(self, batch: int) -> None:
        """Called before a batch is decoded."""


class Pipeline:
    """Stands in for FFCV's `Loader`, whose tables of pages take gigabytes, and a minute, for millions of images."""

    batches_ahead = AHEAD
    metadata = traversal_order = None  # which its thread hands on, and nothing here reads

    def __init__(self, decode: Callable, bytes_of: int, batch_size: int, workers: int, memory_manager: Any):
        """`decode` as `decode.decoder` gives it, into `bytes_of` bytes a sample; `workers`: numba's threads for it."""
        self.decode, self.bytes_of, self.batch_size, self.num_workers = decode, bytes_of, batch_size, workers
        self.memory_manager, self._buffers = memory_manager, None
        self.reader = self.graph = self
        self.code = [(self._stage, [0])], [0]

    def allocate_memory(self, batch_size: int, slots: int) -> dict[str, dict[int, np.ndarray]]:
        """The buffers, page-locked where there is a GPU; the same ones for each epoch, since one runs at a time."""
        if self._buffers is None:
            self._buffers = allocate_query(AllocationQuery((self.bytes_of,), np.dtype("u1")), batch_size, slots)
        return {"operation": {0: self._buffers}, "shared": {}}

    def _stage(self, batch_indices: np.ndarray, metadata: None, storage_state: np.ndarray, memory_0: np.ndarray):
        self.decode(batch_indices, memory_0, storage_state)
        return (torch.from_numpy(memory_0),)
