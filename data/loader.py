""".beton files -> batches on the device: sharded over ranks, shuffled and augmented as a function of (seed, epoch).

FFCV decodes, in its own threads; the order, the views, the labels and the normalising are ours.

Three loaders: `train_loader` draws views, `eval_loader` gives a centre crop of each image, `original_loader` each image
and its mask as they are stored. In the first two every image of a batch has the size `image_size`. A mask is uint8
[B, H, W] beside the image [B, 3, H, W], pixel for pixel, and holds classes, or `IGNORE` (255) where none is labelled.
"""

import contextlib
import functools
import math
import os
import queue
from collections.abc import Iterator, Sequence
from pathlib import Path

import numba
import numpy as np
import torch
from ffcv.loader import Loader as FFCVLoader
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.transforms import ToTensor

from data.augment import Pair, sample_keys
from data.beton import WRITE_AGAIN, DamagedError, inspect, open_checked
from data.decode import CentreViewDecoder, Decoder, MaskedViewDecoder, RandomViewDecoder, StoredDecoder
from data.order import MAX_AHEAD, RUN_BYTES, WINDOW, Order, epoch_order, windowed_order
from data.read_ahead import RunReader

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
ORIGINAL_PIXELS = 1 << 24  # of a batch of stored images; FFCV holds four batches
Batch = dict[str, torch.Tensor]


def train_loader(
    path: str | Path,
    *,
    image_size: int | tuple[int, int],
    batch_size: int,
    accumulate: int = 1,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    scale: Pair = (0.08, 1.0),
    ratio: Pair = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    masks: bool = False,
    resize: Pair = (0.5, 2.0),
    max_share: float = 0.75,
    photometric: bool = True,
    order: Order = "random",
    window: int = WINDOW,
    workers: int | None = None,
) -> "Loader":
    """Shuffled batches with a random resized crop and flip; or with masks, by segmentation's recipe.

    Args:
        path: a .beton file.
        image_size: side, or (height, width), pixels.
        batch_size: samples an optimizer step, over all ranks. Each rank yields `accumulate` micro-batches of
            batch_size / (world_size * accumulate) for it. An epoch's last, incomplete global batch is dropped.
        accumulate: micro-batches an optimizer step.
        seed: of the order and of the views.
        dtype: of the images.
        mean, std: a value a channel (R, G, B), for pixels in 0..1.
        scale, ratio, hflip: of the views, see `augment.random_view`.
        masks: yield `mask` too. Then `resize`, `hflip` and `max_share` say how views are drawn, see
            `augment.masked_view`, not `scale` and `ratio`.
        photometric: with masks, change the images' colours, see `augment.distort`.
        order: `random` takes each image from anywhere in the file. `windowed`, for a file larger than memory, reads
            it in long runs, each once an epoch, see `order.windowed_order`; `choose_order` tells which.
        window: MiB of the file that the windowed order holds in memory and shuffles together, over all ranks; a
            quarter of it more, at most 256 MiB, is read ahead.
        workers: decoding threads; by default this process's share of the cores. No result depends on it.

    Raises:
        FileNotFoundError, ValueError: see `inspect`; and ValueError when the batch size does not divide, when the file
            has fewer samples than one batch, or no masks where they are asked for, or for a setting out of its range.
    """
    for name, (low, high), limit in (("scale", scale, 1.0), ("ratio", ratio, math.inf), ("resize", resize, math.inf)):
        if not 0 < low <= high <= limit:
            raise ValueError(f"{name} {(low, high)}: must be 0 < least <= most" + (" <= 1" if limit == 1 else ""))
    if not 0 <= hflip <= 1:
        raise ValueError(f"hflip {hflip}: must be a probability")
    if not 0 < max_share <= 1:
        raise ValueError(f"max_share {max_share}: must be above 0 and at most 1")
    if seed < 0:
        raise ValueError(f"seed {seed}: must not be negative")
    if accumulate < 1 or batch_size < 1 or batch_size % (world_size * accumulate):
        parts = f"{world_size} ranks x {accumulate} accumulation steps"
        raise ValueError(f"batch_size {batch_size}: must be a positive multiple of {parts}")
    if order not in ("random", "windowed"):
        raise ValueError(f"order {order}: must be random or windowed")
    if window < 1:
        raise ValueError(f"window {window}: must be at least 1 MiB")
    state = np.array([seed, 0, 0], dtype=np.int64)
    if masks:
        padding = tuple(round(255 * value) for value in mean)  # 0 once it is normalised
        decoder = MaskedViewDecoder(_size(image_size), state, resize, hflip, max_share, photometric, padding)
    else:
        decoder = RandomViewDecoder(_size(image_size), state, scale, ratio, hflip)
    micro_batch_size = batch_size // (world_size * accumulate)
    loader = Loader(
        path, decoder, state, micro_batch_size, accumulate, rank, world_size, True, device, dtype, mean, std, workers,
        (window << 20) // RUN_BYTES if order == "windowed" else None,
    )  # fmt: skip
    if loader.steps_per_epoch == 0:
        samples = f"{loader.num_samples} samples do not fill one batch of {batch_size}"
        raise ValueError(f"{path}: {samples}; use a smaller batch_size")
    return loader


def eval_loader(
    path: str | Path,
    *,
    image_size: int | tuple[int, int],
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    crop_pct: float = 1.0,
    workers: int | None = None,
    indices: np.ndarray | None = None,
) -> "Loader":
    """Every image once, in the file's order, resized and centre-cropped.

    All ranks yield the same number of batches of the same sizes: where the images do not divide, samples are repeated,
    and each batch says in `valid` (bool [B]) which samples count. It is true exactly once an image over all ranks.

    Args:
        batch_size: samples a batch on each rank.
        crop_pct: side of the centre crop as a share of the image's shorter side.
        indices: only these images, in this order; int64 [n].
        Others: see `train_loader`.

    Raises:
        FileNotFoundError, ValueError: see `inspect`; and ValueError for a setting out of its range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: must be at least 1")
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct {crop_pct}: must be above 0 and at most 1")
    state = np.zeros(3, dtype=np.int64)
    decoder = CentreViewDecoder(_size(image_size), state, crop_pct)
    how = device, dtype, mean, std, workers
    return Loader(path, decoder, state, batch_size, 1, rank, world_size, False, *how, indices=indices)


def original_loader(
    path: str | Path,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    workers: int | None = None,
    indices: np.ndarray | None = None,
) -> "Loader":
    """Every image once with its mask, at their original size: for segmentation's evaluation.

    The images of a batch have one size, which differs from batch to batch; so nothing is padded, and a batch may hold
    fewer than `batch_size` images. They come in the order of their sizes. All ranks yield the same number of batches,
    at a time of about the same sizes; where the batches do not divide, one is repeated, whose `valid` (bool [B]) is
    false. `valid` is true exactly once an image over all ranks.

    Args:
        batch_size: images a batch on each rank, at most; fewer where images are so large that as many would hold
            more than `ORIGINAL_PIXELS`.
        indices: only these images, whose batches then come in the order of their sizes too; int64 [n].
        Others: see `train_loader`.

    Raises:
        FileNotFoundError, ValueError: see `inspect`; and ValueError for a file without masks, or a setting out of its
            range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: must be at least 1")
    height, width = inspect(path).max_size
    state, batch_size = np.zeros(3, dtype=np.int64), max(1, min(batch_size, ORIGINAL_PIXELS // (height * width)))
    how = device, dtype, mean, std, workers
    return Loader(path, StoredDecoder(state), state, batch_size, 1, rank, world_size, False, *how, indices=indices)


class Loader:
    """Batches of a .beton file, an epoch at a time; built by `train_loader`, `eval_loader` and `original_loader`.

    Building compiles the decoder, which takes seconds: build it once and call `epoch` for each pass.

    Attributes:
        num_samples: images in the file, or in the part of it that is asked for.
        info: what the file holds.
        classes: names of the classes from the JSON beside the file, or None.
        has_labels: whether batches have `label`.
        steps_per_epoch: global batches an epoch.
        micro_batch_size: samples a batch on this rank (in evaluation the last one may be smaller).
        accumulate: batches this rank yields for each global batch.
    """

    def __init__(
        self,
        path: str | Path,
        decoder: Decoder,
        state: np.ndarray,
        micro_batch_size: int,
        accumulate: int,
        rank: int,
        world_size: int,
        train: bool,
        device: str | torch.device,
        dtype: torch.dtype,
        mean: Sequence[float],
        std: Sequence[float],
        workers: int | None,
        window: int | None = None,
        indices: np.ndarray | None = None,
    ):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank}: must be in 0..{world_size - 1}")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean {tuple(mean)}, std {tuple(std)}: must be three values each (R, G, B), std above 0")
        self.info, columns = open_checked(path)
        if decoder.masked and not self.info.has_masks:
            raise ValueError(f"{path}: has no masks; write it with python -m data.write --task segmentation")
        decoder.columns = columns
        self.num_samples = self.info.num_samples if indices is None else len(indices)
        self._indices = indices
        self.classes = self.info.classes
        self.has_labels = self.info.has_labels
        self.micro_batch_size = micro_batch_size
        self.accumulate = accumulate
        self.device = torch.device(device)
        self._labels = columns.get("label")
        self._decoder, self._dtype, self._train = decoder, dtype, train
        self._rank, self._world_size = rank, world_size
        self._mean = torch.tensor(mean, dtype=torch.float32, device=self.device).view(3, 1, 1) * 255
        self._std = torch.tensor(std, dtype=torch.float32, device=self.device).view(3, 1, 1) * 255
        self._originals = self._by_size(columns["size"]) if isinstance(decoder, StoredDecoder) else None
        global_batch = micro_batch_size * accumulate * world_size
        if self._originals is not None:
            self.steps_per_epoch = -(-len(self._originals) // world_size)
        else:
            self.steps_per_epoch = self.num_samples // global_batch if train else -(-self.num_samples // global_batch)
        self._state = state  # read by the compiled decoder: must live as long as it
        pipelines = dict.fromkeys(self.info.fields)  # None: not decoded
        pipelines["image"] = [decoder, ToTensor()]
        self._ffcv = FFCVLoader(
            str(path),
            micro_batch_size,
            num_workers=_workers(workers),
            os_cache=True,
            pipelines=pipelines,
            batches_ahead=2,
            seed=0,  # unused, but FFCV would draw one from numpy's global generator
        )
        self._window = window  # runs; None: the random order
        if window is not None:
            # A mask lies behind its image: the page that holds the one holds both.
            pointers = [columns[name] for name in ("image", "mask") if name in columns][: 1 + decoder.masked]
            ahead = max(4, min(MAX_AHEAD, window // 4) // world_size)
            self._ffcv.memory_manager = RunReader(self._ffcv.memory_manager, pointers, ahead)
        # FFCV allocates its buffers (page-locked, with a GPU) anew for each epoch; one runs at a time, so once will do.
        self._ffcv.graph.allocate_memory = functools.lru_cache(maxsize=1)(self._ffcv.graph.allocate_memory)
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
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
        return self._batches(epoch, *self._share(epoch, start))

    def __len__(self) -> int:
        """Batches this rank yields in an epoch."""
        return self.steps_per_epoch * self.accumulate

    def close(self) -> None:
        """Ends the running epoch's threads, if any. The loader can be used again."""
        running, self._running = self._running, None
        if running is None:
            return
        running.iter_ixes = iter(())  # FFCV's thread looks for its end only when the queue is full
        running.close()
        # A thread that waits to put a batch (or its end mark, for which FFCV has no way out) needs room in the queue.
        while running.is_alive():
            with contextlib.suppress(queue.Empty):
                running.output_queue.get(timeout=0.02)

    def _share(self, epoch: int, start: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The sample indices of each batch of this rank, and which of them count: int64 [B], bool [B]."""
        micro = self.micro_batch_size
        if self._train:
            steps = self.steps_per_epoch
            batch_size, seed = micro * self.accumulate * self._world_size, self._state[0].item()
            if self._window is None:
                order = epoch_order(self.num_samples, seed, epoch)[: steps * batch_size]
            else:
                order = windowed_order(self._ffcv.memory_manager.runs, seed, epoch, batch_size, self._window)
            # A rank's part of a global batch is one run of it, cut into micro-batches: what lies side by side in the
            # global batch, a pair for mixup say, meets in one micro-batch however the batch is cut.
            order = order.reshape(steps, self._world_size, self.accumulate, micro)[start:, self._rank].reshape(-1)
            return _cut(order, micro), _cut(np.ones(len(order), dtype=bool), micro)
        if self._originals is not None:
            dealt = np.arange(self._rank, self.steps_per_epoch * self._world_size, self._world_size)[start:]
            batches = [self._originals[at] for at in np.minimum(dealt, len(self._originals) - 1)]
            counts = dealt < len(self._originals)
            return batches, [np.full(len(batch), here) for batch, here in zip(batches, counts, strict=True)]
        each = -(-self.num_samples // self._world_size)
        position = np.arange(self._rank * each, (self._rank + 1) * each)[start * micro :]
        order = np.minimum(position, self.num_samples - 1)
        order = order if self._indices is None else self._indices[order]
        return _cut(order, micro), _cut(position < self.num_samples, micro)

    def _by_size(self, sizes: np.ndarray) -> list[np.ndarray]:
        """The images' indices in batches of one size each, from the smallest to the largest."""
        chosen = np.arange(self.num_samples) if self._indices is None else self._indices
        chosen = chosen[np.lexsort((*sizes[chosen].T, sizes[chosen].prod(axis=1)))]  # by area first
        changes = np.flatnonzero((np.diff(sizes[chosen], axis=0) != 0).any(axis=1)) + 1
        return [batch for group in np.split(chosen, changes) for batch in _cut(group, self.micro_batch_size)]

    def _batches(self, epoch: int, order: list[np.ndarray], valid: list[np.ndarray]) -> Iterator[Batch]:
        self.close()
        if not order:
            return
        self._state[1:] = epoch, 0
        running = self._running = EpochIterator(self._ffcv, _Cuts(order, self.micro_batch_size))
        try:
            for indices, counts in zip(order, valid, strict=True):
                image, mask = self._to_views(self._next(running), self._decoder.size(indices[0]))
                if damaged := self._state[2].item():
                    which = f"image {damaged - 1}" if damaged > 0 else f"the mask of image {-damaged - 1}"
                    raise DamagedError(f"{self.info.path}: {which} is damaged; {WRITE_AGAIN}")
                batch = {"image": image, "index": self._to_device(indices)}
                if mask is not None:
                    batch["mask"] = mask
                if self._labels is not None:
                    batch["label"] = self._to_device(self._labels[indices])
                if self._train:
                    batch["key"] = self._to_device(sample_keys(self._state[0], epoch, indices).view(np.int64))
                else:
                    batch["valid"] = self._to_device(counts)
                yield batch
        finally:
            if self._running is running:
                self.close()

    def _next(self, running: EpochIterator) -> torch.Tensor:
        """What is decoded next, uint8 [B, bytes], in a buffer that FFCV writes again two batches later."""
        while True:
            if self._running is not running:
                raise RuntimeError("this epoch was ended: its loader was closed or began another epoch")
            try:
                _, (views,) = running.output_queue.get(timeout=1.0)
                return views
            except queue.Empty:  # FFCV's own next() waits for ever on a dead thread
                if not running.is_alive() and running.output_queue.empty():
                    raise RuntimeError(f"{self.info.path}: decoding died, see the traceback above") from None

    def _to_views(self, views: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """uint8 [B, bytes] in FFCV's buffer -> copies on the device: normalised [B, 3, H, W], and mask [B, H, W]."""
        height, width = size
        pixels, masked = height * width, self._decoder.masked
        views = views[:, : (3 + masked) * pixels]
        if self._copies is not None:
            # On a stream of its own, so that waiting for the copy (the buffer is reused) does not wait for training.
            with torch.cuda.stream(self._copies):
                views = views.to(self.device, non_blocking=True)
            self._copies.synchronize()
            views.record_stream(torch.cuda.current_stream(self.device))
        views = views.to(self.device)
        image = views[:, : 3 * pixels].unflatten(1, (height, width, 3)).permute(0, 3, 1, 2)
        image = image.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        mask = views[:, 3 * pixels :].clone(memory_format=torch.contiguous_format) if masked else None
        image = image.sub_(self._mean).div_(self._std).to(self._dtype)
        return image, None if mask is None else mask.unflatten(1, (height, width))

    def pixels(self, image: torch.Tensor) -> torch.Tensor:
        """Images of a batch before they were normalised: fp32 in 0..1."""
        return (image.float() * self._std + self._mean) / 255

    def _to_device(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values.copy()).to(self.device)


class _Cuts:
    """An epoch's batches for FFCV, which asks for `order[at : at + batch_size]` at multiples of batch_size."""

    def __init__(self, batches: list[np.ndarray], batch_size: int):
        self.batches, self.batch_size = batches, batch_size

    def __len__(self) -> int:
        return len(self.batches) * self.batch_size

    def __getitem__(self, part: slice) -> np.ndarray:
        return self.batches[part.start // self.batch_size].astype(np.uint64)


def _cut(values: np.ndarray, size: int) -> list[np.ndarray]:
    """In pieces of `size`; the last may be shorter."""
    return [values[at : at + size] for at in range(0, len(values), size)]


def resolve(spec: str | Path, split: str) -> Path:
    """A data setting -> a .beton file.

    Args:
        spec: `digits`, the embedded data set; `digits:contrast-3`, its shifted copy with a corruption of `data.corrupt`
            at a severity; else a path.
        split: "train" or "val", of the embedded data set.

    Raises:
        ValueError: no such split, corruption or severity.
    """
    name, _, shift = str(spec).partition(":")
    if name != "digits":
        return Path(spec).expanduser()
    from data.samples import ensure  # here, since `python -m data.samples` imports this package first

    if not shift:
        return ensure(split)
    corruption, _, severity = shift.rpartition("-")
    if not corruption or severity not in ("1", "2", "3", "4", "5"):
        raise ValueError(
            f"{spec}: a shifted copy is named as digits:contrast-3, by a corruption and a severity in 1..5"
        )
    return ensure(split, (corruption, int(severity)))


def _size(image_size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < 1:
        raise ValueError(f"image_size {image_size}: must be at least 1 pixel")
    return height, width


def _workers(workers: int | None) -> int:
    """Decoding threads: as asked, or this process's share of the cores; never more than numba was started with."""
    if workers is None:
        workers = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    elif workers < 1:
        raise ValueError(f"workers {workers}: must be at least 1")
    return max(1, min(workers, numba.config.NUMBA_NUM_THREADS))
