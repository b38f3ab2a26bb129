"""Pooled features of every tapped module: each image is read once for all models, and kept in chunks on disk."""

import contextlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models import tap_names, taps
from trainer.config import UserError

CHUNK_IMAGES, CHUNK_BYTES = 1024, 2**27  # a chunk at most: what is lost when a run is killed, and held in memory


@dataclass(frozen=True)
class Array:
    """One vector an image: what `tap` of `model` gives, the mean of its tokens or its prefix token."""

    model: str
    tap: str
    pool: str
    width: int

    @property
    def key(self) -> str:
        return f"{self.model}.{self.tap}.{self.pool}"


@contextlib.contextmanager
def tapped(vit: nn.Module, names: list[str], pool: str) -> Iterator[Callable[[], dict[tuple[str, str], Tensor]]]:
    """Within the context each forward of `vit` is read; what is given tells what the last one left.

    Args:
        names: taps without `*`.
        pool: `mean`, `prefix` or `both`; of the embedded patches, which have no prefix token, always `mean`.

    Returns:
        A function that gives {(tap, "mean" or "prefix"): [B, width] fp32}, in the order of `names`.
    """
    patches = [name for name in names if name == "patch_embed"]
    with taps(vit, patches, "mean") as first, taps(vit, [n for n in names if n not in patches], pool) as rest:

        def read() -> dict[tuple[str, str], Tensor]:
            vectors = {}
            for name in names:
                if name in patches:
                    vectors[name, "mean"] = first[name]
                elif pool == "both":
                    vectors[name, "prefix"], vectors[name, "mean"] = rest[name].unbind(1)
                else:
                    vectors[name, pool] = rest[name]
            return vectors

        yield read


class Reader:
    """Reads the features of all models in one pass over a batch of images."""

    def __init__(self, vits: dict[str, nn.Module], names: list[str], pools: dict[str, str]) -> None:
        """`names`: taps with or without `*`. `pools`: for each model `mean`, `prefix` or `both`.

        Raises:
            ValueError: a tap that a model does not have.
        """
        self.vits, self.names, self.pools = vits, {m: tap_names(vit, names) for m, vit in vits.items()}, pools
        size = next(iter(vits.values())).patch_embed.img_size
        with self:
            one = self.read(torch.zeros(1, 3, *size))
        self.arrays = [Array(*key, x.shape[-1]) for key, x in one.items()]

    def __enter__(self) -> "Reader":
        """Puts the hooks on the models."""
        with contextlib.ExitStack() as stack:
            self._reads = {
                model: stack.enter_context(tapped(vit, self.names[model], self.pools[model]))
                for model, vit in self.vits.items()
            }
            self._hooks = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    @torch.no_grad()
    def read(self, image: Tensor) -> dict[tuple[str, str, str], Tensor]:
        """[B, 3, H, W] -> {(model, tap, pool): [B, width] fp32}, in the order of `arrays`."""
        found = {}
        for model, vit in self.vits.items():
            vit.forward_features(image.to(next(vit.parameters()).dtype))
            found |= {(model, *key): x for key, x in self._reads[model]().items()}
        return found


@dataclass(frozen=True)
class Split:
    """Images that are read together: `fit`, `validation`, or a test set by its name."""

    name: str
    path: Path
    indices: np.ndarray  # int64, ascending


class Store:
    """Features on disk, in chunks that are whole or not there: `<folder>/<split>/00000003.safetensors`.

    A chunk holds the same images at any number of ranks, so whoever comes next can go on.
    """

    def __init__(self, folder: Path, arrays: list[Array], splits: list[Split], batch_size: int, dtype: str) -> None:
        """Names the chunks; touches nothing."""
        self.folder, self.arrays, self.splits = folder, arrays, {split.name: split for split in splits}
        self.dtype = {"fp32": torch.float32, "fp16": torch.float16}[dtype]
        self.image_bytes = sum(array.width for array in arrays) * self.dtype.itemsize
        self.batches = max(1, min(CHUNK_IMAGES, CHUNK_BYTES // self.image_bytes) // batch_size)  # a chunk
        self.rows = self.batches * batch_size

    def path(self, split: str, number: int) -> Path:
        return self.folder / split / f"{number:08d}.safetensors"

    def chunks(self, split: str) -> range:
        """Numbers of the chunks that the split has when it is whole."""
        return range(-(-len(self.splits[split].indices) // self.rows))

    def missing(self) -> list[tuple[str, int]]:
        """(split, number) of the chunks still to be made; one cut short by a full disk or a crash is made again."""
        return [(split, i) for split in self.splits for i in self.chunks(split) if not _whole(self.path(split, i))]

    def check_room(self) -> str:
        """The space that the features take, in words.

        Raises:
            UserError: the disk has less free than what is missing needs.
        """
        images = sum(len(split.indices) for split in self.splits.values())
        missing = dict.fromkeys(self.splits, 0)
        for split, i in self.missing():
            missing[split] += min(self.rows, len(self.splits[split].indices) - i * self.rows)
        need = sum(missing.values()) * self.image_bytes
        there = next(path for path in self.folder.absolute().parents if path.exists())
        free = shutil.disk_usage(there).free
        if need > free:
            raise UserError(
                f"{self.folder}: the features need {_size(need)}, the disk has {_size(free)} free; read less with "
                "probe.modules, probe.pooling, probe.images or probe.dtype fp16, or use another --run"
            )
        return f"{images:,} images, {len(self.arrays)} vectors each, {_size(images * self.image_bytes)} on disk"

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

    def labels(self, split: str) -> Tensor:
        """Labels of a split, int64 [N]."""
        parts = []
        for number in self.chunks(split):
            with safe_open(self.path(split, number), "pt") as chunk:
                parts.append(chunk.get_tensor("label"))
        return torch.cat(parts)

    def remove(self) -> None:
        """Delete all features."""
        shutil.rmtree(self.folder, ignore_errors=True)


def extract(reader: Reader, store: Store, work: list[tuple[str, int]], loader_of: Callable) -> Iterator[None]:
    """Make the chunks in `work`, one an iteration.

    Args:
        loader_of: a split -> a loader that yields its images in order, batches of the store's batch size.
    """
    loader, batches, at = None, None, None
    rows = {(a.model, a.tap, a.pool): torch.empty(store.rows, a.width, dtype=store.dtype) for a in store.arrays}
    labels, widths = torch.empty(store.rows, dtype=torch.long), [a.width for a in store.arrays]
    with reader:
        for split, number in work:
            if at is None or at[0] != split:
                if loader is not None:
                    loader.close()
                loader = loader_of(store.splits[split])
            if at != (split, number):
                batches = loader.epoch(0, number * store.batches)
            count = 0
            for batch in itertools.islice(batches, store.batches):
                here = slice(count, count + len(batch["label"]))
                labels[here] = batch["label"]
                vectors = torch.cat(list(reader.read(batch["image"]).values()), 1).cpu()  # one wait for a device
                for column, x in zip(rows.values(), vectors.split(widths, 1), strict=True):
                    column[here] = x
                count = here.stop
            store.write(split, number, {key: x[:count] for key, x in rows.items()}, labels[:count])
            at = split, number + 1
            yield
    if loader is not None:
        loader.close()


def _whole(path: Path) -> bool:
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _size(count: float) -> str:
    """Bytes in words."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
