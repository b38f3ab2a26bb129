"""Features on disk: which chunk file holds which images, and how they get there and back."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.config import UserError
from trainer.probe.images import Split

# At most, per chunk. A rank holds one in memory, and a killed run loses one per rank.
CHUNK_IMAGES, CHUNK_BYTES = 1024, 2**30
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Array:
    """One vector per image: what `tap` of `model` gives, the mean of its tokens or its prefix token."""

    model: str
    tap: str
    pool: str
    width: int

    @property
    def key(self) -> str:
        return f"{self.model}.{self.tap}.{self.pool}"


class Store:
    """Features on disk, in chunk files that are whole or missing: `<folder>/<split>/00000003.safetensors`.

    A chunk holds the same images on any number of ranks, so a run may go on with another number.
    """

    def __init__(self, folder: Path, arrays: list[Array], splits: list[Split], batch_size: int, dtype: str) -> None:
        """Names the chunks; touches nothing.

        Args:
            batch_size: images per forward pass. A chunk holds a whole number of batches.
            dtype: a key of `DTYPES`.
        """
        self.folder, self.arrays, self.splits = folder, arrays, {split.name: split for split in splits}
        self.dtype, self.image_bytes = DTYPES[dtype], image_bytes(arrays, dtype)
        self.batches = max(1, min(CHUNK_IMAGES, CHUNK_BYTES // self.image_bytes) // batch_size)  # per chunk
        self.rows = self.batches * batch_size

    def path(self, split: str, number: int) -> Path:
        """The file of a chunk."""
        return self.folder / split / f"{number:08d}.safetensors"

    def chunks(self, split: str) -> range:
        """Numbers of the chunks of a whole split."""
        return range(-(-len(self.splits[split].indices) // self.rows))

    def missing(self) -> list[tuple[str, int]]:
        """(split, number) of the chunks still to be made. One that a full disk or a crash cut short counts."""
        return [(split, i) for split in self.splits for i in self.chunks(split) if not _whole(self.path(split, i))]

    def check_room(self) -> str:
        """The space that the features take, in words.

        Raises:
            UserError: the disk has less free than the missing chunks need.
        """
        images = sum(len(split.indices) for split in self.splits.values())
        need = 0
        for split, i in self.missing():
            need += min(self.rows, len(self.splits[split].indices) - i * self.rows) * self.image_bytes
        free = free_bytes(self.folder)
        if need > free:
            raise UserError(f"{self.folder}: the features need {size(need)}, the disk has {size(free)} free; {LESS}")
        files = sum(len(self.chunks(split)) for split in self.splits)
        total = size(images * self.image_bytes)
        return f"{images:,} images, {len(self.arrays)} vectors each, {total} on disk in {files:,} files"

    def write(self, split: str, number: int, rows: dict[tuple[str, str, str], Tensor], labels: Tensor) -> None:
        """Publish a chunk.

        Raises:
            UserError: it cannot be written (no space left, say).
        """
        path = self.path(split, number)
        part = path.with_suffix(".part")
        tensors = {array.key: rows[array.model, array.tap, array.pool] for array in self.arrays}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors | {"label": labels}, part)
            os.replace(part, path)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path}: cannot be written ({error}); make room, then run the same command again"
            ) from error

    def blocks(
        self, split: str, wanted: list[tuple[str, ...]], device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """A split's features chunk by chunk: [M, N, width] fp32 and labels [N], on the device.

        Args:
            wanted: for each of M feature vectors of one width, the keys of the arrays that it joins.
        """
        for number in self.chunks(split):
            with safe_open(self.path(split, number), "pt") as chunk:
                vectors = [[chunk.get_tensor(key).to(device, torch.float32) for key in keys] for keys in wanted]
                vectors = [parts[0] if len(parts) == 1 else torch.cat(parts, -1) for parts in vectors]
                x = vectors[0][None] if len(vectors) == 1 else torch.stack(vectors)
                yield x, chunk.get_tensor("label").to(device)

    def remove(self) -> None:
        """Delete all features."""
        shutil.rmtree(self.folder, ignore_errors=True)


LESS = "read less with probe.modules, probe.pooling, probe.images or probe.dtype fp16, or use another --run"


def image_bytes(arrays: list[Array], dtype: str) -> int:
    """Bytes on disk per image."""
    return sum(array.width for array in arrays) * DTYPES[dtype].itemsize


def free_bytes(folder: Path) -> int:
    """Free space where the folder is, or will be."""
    return shutil.disk_usage(next(path for path in folder.absolute().parents if path.exists())).free


def size(count: float) -> str:
    """Bytes in words."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.1f} GiB" if count < 1024 else f"{count / 1024:.1f} TiB"


def _whole(path: Path) -> bool:
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False
