""".beton files -> batches on the device: sharded over ranks, shuffled and augmented as a function of (seed, epoch).

FFCV decodes, in its own threads. The order, the views, the labels and the normalising are ours.

Three loaders: `train_loader` draws views, `eval_loader` gives a centre crop of each image, `original_loader` each image
and its mask as they are stored. The first two give every image of a batch the size `image_size`. A mask is uint8
[B, H, W] beside the image [B, 3, H, W], pixel for pixel. It holds classes, or `IGNORE` (255) where none is labelled.
"""

import contextlib
import math
import queue
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict, Unpack

import numba
import numpy as np
import torch
from ffcv.loader.epoch_iterator import EpochIterator

from data import cores
from data.augment import Pair, sample_keys
from data.beton import WRITE_AGAIN, DamagedError, open_checked
from data.decode import Samples, bytes_of, decoder
from data.normalise import normalise, table_of
from data.order import MAX_AHEAD, RUN_BYTES, WINDOW, Order
from data.pipeline import FileMap, Pipeline
from data.read_ahead import RunReader
from data.resolve import resolve
from data.shares import BySize, InOrder, Shares, Shuffled
from data.views import CentreView, ImageSize, MaskedView, RandomView, StoredView, View

__all__ = ["Batch", "Common", "Loader", "eval_loader", "original_loader", "resolve", "train_loader"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
ORIGINAL_PIXELS = 1 << 24  # of a batch of stored images; FFCV holds four batches
Batch = dict[str, torch.Tensor]


class Common(TypedDict, total=False):
    """Keywords of every loader; `Loader` has their defaults.

    Attributes:
        rank, world_size: which part of every global batch this process gets.
        device, dtype: of the images; the device is of the other tensors too.
        mean, std: one value per channel (R, G, B), for pixels in 0..1. By default ImageNet's.
        workers: decoding threads; by default this process's share of the cores. No result depends on it.
        indices: take only these images; int64 [n]. By default all, in the file's order.
    """

    rank: int
    world_size: int
    device: str | torch.device
    dtype: torch.dtype
    mean: Sequence[float]
    std: Sequence[float]
    workers: int | None
    indices: np.ndarray | None


def train_loader(
    path: str | Path,
    *,
    image_size: ImageSize,
    batch_size: int,
    accumulate: int = 1,
    seed: int = 0,
    scale: Pair = (0.08, 1.0),
    ratio: Pair = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    masks: bool = False,
    resize: Pair = (0.5, 2.0),
    max_share: float = 0.75,
    photometric: bool = True,
    order: Order = "random",
    window: int = WINDOW,
    **common: Unpack[Common],
) -> "Loader":
    """Shuffled batches of random views: `RandomView` of images, or `MaskedView` of images with masks.

    Args:
        path: a .beton file.
        image_size: side, or (height, width), pixels.
        batch_size: samples per optimizer step, over all ranks. Each rank yields `accumulate` micro-batches of
            batch_size / (world_size * accumulate) for it. An epoch's last, incomplete global batch is dropped.
        accumulate: micro-batches per optimizer step.
        seed: of the order and of the views.
        scale, ratio, hflip: see `RandomView`.
        masks: yield `mask` too.
        resize, hflip, max_share, photometric: with masks, see `MaskedView`. `scale` and `ratio` are not used then.
        order: `random` takes each image from anywhere in the file. `windowed`, for a file larger than memory, reads
            it in long runs, each once per epoch, see `order.windowed_order`; `choose_order` tells which.
        window: MiB of the file that the windowed order holds in memory and shuffles together, over all ranks. It reads
            a quarter of it more, at most 256 MiB, ahead.
        common: see `Common`.

    Raises:
        FileNotFoundError, ValueError: see `inspect`.
        ValueError: the batch size does not divide, or the file has fewer samples than one batch, or it has no masks
            where they are asked for, or a setting is out of its range.
    """
    if masks:
        view: View = MaskedView(
            image_size=image_size, resize=resize, hflip=hflip, max_share=max_share, photometric=photometric
        )
    else:
        view = RandomView(image_size=image_size, scale=scale, ratio=ratio, hflip=hflip)
    ranks = common.get("world_size", 1)
    if accumulate < 1 or batch_size < 1 or batch_size % (ranks * accumulate):
        parts = f"{ranks} ranks x {accumulate} accumulation steps"
        raise ValueError(f"batch_size {batch_size}: must be a positive multiple of {parts}")
    micro_batch_size = batch_size // (ranks * accumulate)
    if order not in ("random", "windowed"):
        raise ValueError(f"order {order}: must be random or windowed")
    if window < 1:
        raise ValueError(f"window {window}: must be at least 1 MiB")
    runs = (window << 20) // RUN_BYTES if order == "windowed" else None
    return Loader(path, view, micro_batch_size, accumulate=accumulate, seed=seed, window=runs, **common)


def eval_loader(
    path: str | Path, *, image_size: ImageSize, batch_size: int, crop_pct: float = 1.0, **common: Unpack[Common]
) -> "Loader":
    """The `CentreView` of every image once, in the file's order or that of `indices`.

    All ranks yield the same number of batches of the same sizes. Where the images do not divide, samples are repeated:
    each batch says in `valid` (bool [B]) which samples count. It is true exactly once per image over all ranks.

    Args:
        image_size: side, or (height, width), pixels.
        batch_size: samples per batch on each rank.
        crop_pct: side of the centre crop as a share of the image's shorter side.
        common: see `Common`.

    Raises:
        FileNotFoundError, ValueError: see `inspect`.
        ValueError: a setting is out of its range.
    """
    return Loader(path, CentreView(image_size=image_size, crop_pct=crop_pct), batch_size, **common)


def original_loader(path: str | Path, *, batch_size: int, **common: Unpack[Common]) -> "Loader":
    """The `StoredView` of every image and its mask once: for segmentation's evaluation.

    The images of a batch have one size, which differs from batch to batch. So nothing is padded, and a batch may hold
    fewer than `batch_size` images. They come in the order of their sizes. All ranks yield the same number of batches,
    at a time of about the same sizes. Where the batches do not divide, one is repeated, whose `valid` (bool [B]) is
    false. `valid` is true exactly once per image over all ranks.

    Args:
        batch_size: images per batch on each rank, at most. There are fewer where images are so large that as many
            would hold more than `ORIGINAL_PIXELS`.
        common: see `Common`.

    Raises:
        FileNotFoundError, ValueError: see `inspect`.
        ValueError: the file has no masks, or a setting is out of its range.
    """
    return Loader(path, StoredView(), batch_size, **common)


class Loader:
    """Batches of a .beton file, one epoch at a time.

    The first batch of a kind of view compiles the decoder, which takes seconds, unless an earlier process has done so.

    Args:
        path: a .beton file.
        view: what is shown of each image.
        micro_batch_size: samples per batch on this rank. In evaluation the last one may be smaller.
        accumulate: in training, batches that this rank yields per global batch.
        seed: in training, of the order and of the views; None in evaluation.
        window: runs of the windowed order; None: the random order.
        Others: see `Common`.

    Attributes:
        num_samples: images in the file, or in the part of it that is asked for.
        info: what the file holds.
        classes: names of the classes from the JSON beside the file, or None.
        has_labels: whether batches have `label`.
        steps_per_epoch: global batches per epoch.
        micro_batch_size, accumulate: as given; `micro_batch_size` is smaller for very large images, see
            `original_loader`.
    """

    def __init__(
        self,
        path: str | Path,
        view: View,
        micro_batch_size: int,
        *,
        accumulate: int = 1,
        seed: int | None = None,
        window: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        workers: int | None = None,
        indices: np.ndarray | None = None,
    ):
        if micro_batch_size < 1:
            raise ValueError(f"batch_size {micro_batch_size}: must be at least 1")
        if seed is not None and seed < 0:
            raise ValueError(f"seed {seed}: must not be negative")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank}: must be in 0..{world_size - 1}")
        check_normalisation(mean, std)
        self.info, columns = open_checked(path)
        self._masked = isinstance(view, MaskedView | StoredView)
        if self._masked and not self.info.has_masks:
            raise ValueError(f"{path}: has no masks; write it with python -m data.write --task segmentation")
        self._sizes = columns["size"] if isinstance(view, StoredView) else None
        chosen = _chosen(indices, self.info.num_samples)
        self.num_samples = len(chosen)
        self.classes = self.info.classes
        self.has_labels = self.info.has_labels
        if isinstance(view, StoredView):
            height, width = self.info.max_size
            micro_batch_size = max(1, min(micro_batch_size, ORIGINAL_PIXELS // (height * width)))
        self.micro_batch_size = micro_batch_size
        self.accumulate = accumulate
        self.device = torch.device(device)
        self._labels = columns.get("label")
        self._dtype, self._train = dtype, seed is not None
        self._mean = torch.tensor(mean, dtype=torch.float32, device=self.device).view(3, 1, 1) * 255
        self._std = torch.tensor(std, dtype=torch.float32, device=self.device).view(3, 1, 1) * 255
        self._table = table_of(self._mean, self._std, dtype) if self.device.type == "cpu" else None
        drawn = view.drawn(mean, columns["size"])
        self._size = None if self._sizes is not None else (drawn.rows, drawn.columns)
        # (seed, epoch, what was found damaged), read by the compiled decoder at every batch.
        self._state = np.array([seed or 0, 0, 0], dtype=np.int64)
        absent = np.zeros(0, np.uint64)
        absent.flags.writeable = False  # of the type that the columns have
        samples = Samples(*(columns.get(name, absent) for name in Samples._fields))
        threads = _workers(workers)
        runs, memory = None, FileMap(self.info.path)
        if window is not None:
            # A mask lies behind its image: the page that holds the one holds both.
            regions = [(columns[name], columns[f"{name}_bytes"]) for name in ("image", "mask")[: 1 + self._masked]]
            ahead = max(4, min(MAX_AHEAD, window // 4) // world_size)
            memory = RunReader(self.info.path, regions, ahead)
            runs = memory.runs[chosen]
        self._pipeline = Pipeline(
            decoder(samples, self._state, drawn, threads), bytes_of(drawn), micro_batch_size, threads, memory
        )
        where = {"chosen": chosen, "micro_batch_size": micro_batch_size, "rank": rank, "world_size": world_size}
        if seed is not None:
            share = Shuffled(**where, accumulate=accumulate, seed=seed, runs=runs, window=window or 0)
            if share.steps == 0:
                samples = f"{len(chosen)} samples do not fill one batch of {share.batch_size}"
                raise ValueError(f"{path}: {samples}; use a smaller batch_size")
        elif isinstance(view, StoredView):
            share = BySize(**where, sizes=columns["size"])
        else:
            share = InOrder(**where)
        self._shares, self.steps_per_epoch = Shares(share), share.steps
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None  # of the last batch
        self._running: EpochIterator | None = None

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """This rank's batches of an epoch, from global batch `start` on; the earlier ones are not decoded.

        Global batch k holds the same samples at any world size and accumulation. A batch's tensors are the caller's, on
        the device: `image` [B, 3, H, W] normalised, `mask` uint8 [B, H, W] if masks are asked for, `index` int64 [B],
        `label` int64 [B] if there are labels, in training `key` int64 [B] (`augment.sample_key`), and in evaluation
        `valid` bool [B]. One epoch runs at a time: starting another ends this one.

        Raises:
            ValueError: `start` is outside the epoch.
            DamagedError: an image's or a mask's data is damaged.
        """
        if not 0 <= start <= self.steps_per_epoch:
            raise ValueError(f"start {start}: must be in 0..{self.steps_per_epoch}, the epoch's global batches")
        return self._batches(epoch, *self._shares.of(epoch, start))

    def __len__(self) -> int:
        """Batches this rank yields in an epoch."""
        return self.steps_per_epoch * self.accumulate

    def close(self) -> None:
        """Ends the running epoch's threads, if any. The loader can be used again."""
        running, self._running = self._running, None
        if self._copied is not None:
            self._copied.synchronize()
        if running is None:
            return
        running.iter_ixes = iter(())  # FFCV's thread looks for its end only when the queue is full
        running.close()
        # A thread that waits to put a batch (or its end mark, for which FFCV has no way out) needs room in the queue.
        while running.is_alive():
            with contextlib.suppress(queue.Empty):
                running.output_queue.get(timeout=0.02)

    def _batches(self, epoch: int, order: list[np.ndarray], valid: list[np.ndarray]) -> Iterator[Batch]:
        self.close()
        if not order:
            return
        self._state[1:] = epoch, 0
        running = self._running = EpochIterator(self._pipeline, _Cuts(order, self.micro_batch_size))
        try:
            for indices, counts in zip(order, valid, strict=True):
                size = self._size or tuple(self._sizes[indices[0]].tolist())
                views = self._next(running)
                if damaged := self._state[2].item():
                    which = f"image {damaged - 1}" if damaged > 0 else f"the mask of image {-damaged - 1}"
                    raise DamagedError(f"{self.info.path}: {which} is damaged; {WRITE_AGAIN}")
                columns = {"index": indices}
                if self._labels is not None:
                    columns["label"] = self._labels[indices]
                if self._train:
                    self._shares.prepare(epoch + 1)
                    columns["key"] = sample_keys(self._state[0], epoch, indices).view(np.int64)
                else:
                    columns["valid"] = counts
                yield self._to_device(views, size, columns)
        finally:
            if self._running is running:
                self.close()

    def _next(self, running: EpochIterator) -> torch.Tensor:
        """What is decoded next, uint8 [B, bytes], in a buffer that FFCV writes again two batches later."""
        while True:
            if self._running is not running:
                raise RuntimeError("this epoch was ended: its loader was closed or began another epoch")
            if self._copied is not None:
                self._copied.synchronize()  # then FFCV may write again into the buffer of the batch before
            try:
                _, (views,) = running.output_queue.get(timeout=1.0)
                return views
            except queue.Empty:  # FFCV's own next() waits for ever on a dead thread
                if not running.is_alive() and running.output_queue.empty():
                    raise RuntimeError(f"{self.info.path}: decoding died, see the traceback above") from None

    def _to_device(self, views: torch.Tensor, size: tuple[int, int], columns: dict[str, np.ndarray]) -> Batch:
        """uint8 [B, bytes] in FFCV's buffer, and columns [B] -> a batch on the device: normalised image, maybe mask.

        On a GPU it is copied on a stream of its own while training goes on. Only the GPU waits for it.
        """
        height, width = size
        pixels, masked = height * width, self._masked
        parts = [views[:, : (3 + masked) * pixels], torch.from_numpy(np.stack([*columns.values()]).astype(np.int64))]
        if self._copies is not None:
            with torch.cuda.stream(self._copies):
                parts = [part.to(self.device, non_blocking=True) for part in parts]
                self._copied = self._copies.record_event()
            training = torch.cuda.current_stream(self.device)
            training.wait_event(self._copied)
            for part in parts:
                part.record_stream(training)
        views, numbers = (part.to(self.device, non_blocking=True) for part in parts)
        batch = dict(zip(columns, numbers, strict=True))
        if "valid" in batch:
            batch["valid"] = batch["valid"].bool()
        if masked:
            mask = views[:, 3 * pixels :].clone(memory_format=torch.contiguous_format)
            batch["mask"] = mask.unflatten(1, (height, width))
        if self.device.type == "cpu":
            image = normalise(views.numpy(), self._table, height, width)
        else:
            image = views[:, : 3 * pixels].unflatten(1, (height, width, 3)).permute(0, 3, 1, 2)
            image = image.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
            image = image.sub_(self._mean).div_(self._std).to(self._dtype)
        return {"image": image, **batch}

    def pixels(self, image: torch.Tensor) -> torch.Tensor:
        """Images of a batch before they were normalised: fp32 in 0..1."""
        return (image.float() * self._std + self._mean) / 255


class _Cuts:
    """An epoch's batches for FFCV, which asks for `order[at : at + batch_size]` at multiples of batch_size."""

    def __init__(self, batches: list[np.ndarray], batch_size: int):
        self.batches, self.batch_size = batches, batch_size

    def __len__(self) -> int:
        return len(self.batches) * self.batch_size

    def __getitem__(self, part: slice) -> np.ndarray:
        return self.batches[part.start // self.batch_size].astype(np.uint64)


def check_normalisation(mean: Sequence[float], std: Sequence[float]) -> None:
    """Checks that mean and std are for pixels in 0..1.

    Raises:
        ValueError: they are not three finite values each, or std is not above 0, or they are in 0..255; the message
            names the values that were meant.
    """
    if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        raise ValueError(f"mean {list(mean)}, std {list(std)}: must be three values each (R, G, B), std above 0")
    for name, values in (("mean", mean), ("std", std)):
        if max(map(abs, values)) > 1:
            meant = [round(value / 255, 3) for value in values]
            raise ValueError(f"{name} {list(values)}: must be for pixels in 0..1, not 0..255: give {name} {meant}")


def _chosen(indices: np.ndarray | None, num_samples: int) -> np.ndarray:
    """The samples to take, int64 [n]."""
    if indices is None:
        return np.arange(num_samples)
    chosen = np.asarray(indices)
    if chosen.ndim != 1 or chosen.dtype.kind not in "iu" or not len(chosen):
        raise ValueError(f"indices: must be integers [n], not {chosen.dtype} {list(chosen.shape)}")
    if chosen.min() < 0 or chosen.max() >= num_samples:
        raise ValueError(f"indices {chosen.min()}..{chosen.max()}: must be in 0..{num_samples - 1}, the file's samples")
    return chosen.astype(np.int64)


def _workers(workers: int | None) -> int:
    """Decoding threads: as asked, or this process's share of the cores; never more than numba was started with."""
    if workers is None:
        workers = cores.own()
    elif workers < 1:
        raise ValueError(f"workers {workers}: must be at least 1")
    return max(1, min(workers, numba.config.NUMBA_NUM_THREADS))
