"""The order of an epoch, as a pure function of (seed, epoch): random, or windowed for files larger than memory.

The windowed order reads the file in runs, the images that begin in the same `RUN_BYTES` of it. It deals the runs,
shuffled, to lanes. Each lane goes through its runs with a window that slides over their images, and every global batch
takes as many images from each lane. So a run is read once, as a whole, and lives only while the window is over it.
"""

from pathlib import Path
from typing import Literal

import numpy as np

from data.memory import memory_limit
from data.paths import expand

RUN_BYTES = 2 << 20  # long enough for near the full speed of disks and network file systems; divides FFCV's pages
MAX_LANES = 256
MAX_AHEAD = 128  # runs read ahead, over all ranks
CACHED_SHARE = 2 / 3  # of memory, which a file may fill and still be cached beside what trains
WINDOW = 2048  # MiB, of the windowed order; a quarter of memory where that is less
Order = Literal["random", "windowed"]


def choose_order(path: str | Path, order: Order | Literal["auto"], window: int | None = None) -> tuple[Order, int]:
    """The order for a file, and the windowed order's window, MiB, as this machine's memory suggests.

    Args:
        order: `auto` is windowed for a file larger than `CACHED_SHARE` of the machine's memory, or of the control
            group's where that has less; else random.
        window: None: `WINDOW`, or a quarter of that memory if less.
    """
    memory = memory_limit()
    if order == "auto":
        order = "windowed" if expand(path).stat().st_size > CACHED_SHARE * memory else "random"
    return order, window or max(1, min(WINDOW, memory >> 22))


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """The shuffled order of an epoch.

    Args:
        num_samples: samples in the file.
        seed: the run's seed, >= 0.
        epoch: 0, 1, 2, ...

    Returns:
        int64 [num_samples], a permutation of 0..num_samples-1. The same arguments give the same order on every machine.
    """
    return _generator(seed, epoch).permutation(num_samples).astype(np.int64)


def windowed_order(runs: np.ndarray, seed: int, epoch: int, batch_size: int, window: int) -> np.ndarray:
    """An order that shuffles whole runs, and the samples of about `window` runs among each other.

    A global batch is laid out lane by lane, two lanes interleaved. So ranks that take equal parts of it, side by side,
    read different runs; only where a part's edge is not a lane's edge do two ranks read the runs of one lane (or two).

    Args:
        runs: int64 [num_samples], the run that each sample lies in.
        seed: the run's seed, >= 0.
        epoch: 0, 1, 2, ...
        batch_size: samples a global batch.
        window: runs in use at a time, over all lanes: begun, and not all of their samples taken.

    Returns:
        int64 [whole batches * batch_size], each sample at most once. The remainder that fills no batch, others each
        epoch, is left out. The same arguments give the same order on every machine.
    """
    random = _generator(seed, epoch)
    used = len(runs) // batch_size * batch_size
    number, counts = np.unique(runs, return_inverse=True, return_counts=True)[1:]
    # Run by run: the runs in a random order, each run's samples too.
    order = np.lexsort((random.random(len(runs)), random.permutation(len(counts))[number]))[:used]
    # Cut into equal lanes. Every other one is walked backwards, so that the two that share a cut run need it together.
    lanes = lane_count(batch_size, window)
    order = order.reshape(lanes, -1)
    order[1::2] = order[1::2, ::-1].copy()
    # Sorted by position + noise in 0..reach, samples move within a window that slides over `reach` positions.
    reach = max(1.0, (window / lanes - 1) * len(runs) / len(counts))
    key = np.arange(order.shape[1]) + reach * random.random(order.shape)
    order = np.take_along_axis(order, np.argsort(key, axis=1, kind="stable"), axis=1)
    # Neighbours in a batch, which mixup pairs, come from different lanes.
    together = 2 if lanes % 2 == 0 else 1
    order = order.reshape(lanes // together, together, used // batch_size, batch_size // lanes)
    return order.transpose(2, 0, 3, 1).reshape(-1).astype(np.int64)


def lane_count(batch_size: int, window: int) -> int:
    """Lanes of `windowed_order`: as many as divide the batch and leave each two runs of the window, up to 256."""
    most = max(1, min(MAX_LANES, window // 2))
    return max(lanes for lanes in range(1, most + 1) if batch_size % lanes == 0)


def _generator(seed: int, epoch: int) -> np.random.Generator:
    # Philox is counter-based: its stream is fixed by the key alone and does not depend on the platform.
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
