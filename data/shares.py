"""Which samples each rank gets in which batch of an epoch. All are pure functions of the epoch.

A share is a rank's part of an epoch: its batches' sample indices, int64 [B] each, and beside each batch which of its
samples count, bool [B]. All ranks get the same number of batches.
"""

from dataclasses import dataclass, field
from threading import Thread

import numpy as np

from data.order import epoch_order, windowed_order

Share = tuple[list[np.ndarray], list[np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class Shuffled:
    """Training: whole global batches in a random order; the remainder is dropped.

    A rank's part of a global batch is one run of it, cut into micro-batches. So samples side by side in the global
    batch, such as a pair for mixup, meet in one micro-batch however the batch is cut.

    Attributes:
        chosen: the samples to take, int64 [n].
        micro_batch_size: samples per batch on a rank.
        accumulate: micro-batches per global batch on a rank.
        runs: int64 [n], the run of the file that each chosen sample lies in, for the windowed order; None: random.
        window: runs in use at a time, for the windowed order.
    """

    chosen: np.ndarray
    micro_batch_size: int
    accumulate: int
    rank: int
    world_size: int
    seed: int
    runs: np.ndarray | None = None
    window: int = 0

    @property
    def batch_size(self) -> int:
        """Samples per global batch."""
        return self.micro_batch_size * self.accumulate * self.world_size

    @property
    def steps(self) -> int:
        """Global batches per epoch."""
        return len(self.chosen) // self.batch_size

    def of(self, epoch: int, start: int) -> Share:
        """This rank's share of an epoch, from global batch `start` on."""
        if self.runs is None:
            order = epoch_order(len(self.chosen), self.seed, epoch)[: self.steps * self.batch_size]
        else:
            order = windowed_order(self.runs, self.seed, epoch, self.batch_size, self.window)
        order = order.reshape(self.steps, self.world_size, self.accumulate, self.micro_batch_size)
        order = self.chosen[order[start:, self.rank].reshape(-1)]
        return cut(order, self.micro_batch_size), cut(np.ones(len(order), dtype=bool), self.micro_batch_size)


@dataclass(frozen=True, kw_only=True)
class InOrder:
    """Evaluation: every chosen sample counts once, in their order. The last one is repeated where ranks do not divide.

    Attributes: as of `Shuffled`.
    """

    chosen: np.ndarray
    micro_batch_size: int
    rank: int
    world_size: int

    @property
    def steps(self) -> int:
        return -(-len(self.chosen) // (self.micro_batch_size * self.world_size))

    def of(self, epoch: int, start: int) -> Share:
        """This rank's share of any epoch, from global batch `start` on."""
        micro, per_rank = self.micro_batch_size, -(-len(self.chosen) // self.world_size)
        position = np.arange(self.rank * per_rank, (self.rank + 1) * per_rank)[start * micro :]
        order = self.chosen[np.minimum(position, len(self.chosen) - 1)]
        return cut(order, micro), cut(position < len(self.chosen), micro)


@dataclass(frozen=True, kw_only=True)
class BySize:
    """Evaluation at the images' own size: each batch is of one size, from the smallest to the largest.

    The batches are dealt to the ranks in turn, so that ranks work on about the same sizes at a time. The last batch is
    repeated, and does not count, where the ranks do not divide them.

    Attributes: as of `Shuffled`, and
        sizes: int64 [samples of the file, 2], (height, width).
    """

    chosen: np.ndarray
    micro_batch_size: int
    rank: int
    world_size: int
    sizes: np.ndarray
    batches: list[np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        sizes = self.sizes[self.chosen]
        order = np.lexsort((*sizes.T, sizes.prod(axis=1)))  # by area first
        changes = np.flatnonzero((np.diff(sizes[order], axis=0) != 0).any(axis=1)) + 1
        groups = np.split(self.chosen[order], changes)
        object.__setattr__(self, "batches", [batch for group in groups for batch in cut(group, self.micro_batch_size)])

    @property
    def steps(self) -> int:
        return -(-len(self.batches) // self.world_size)

    def of(self, epoch: int, start: int) -> Share:
        """This rank's share of any epoch, from its batch `start` on."""
        dealt = np.arange(self.rank, self.steps * self.world_size, self.world_size)[start:]
        batches = [self.batches[at] for at in np.minimum(dealt, len(self.batches) - 1)]
        counts = dealt < len(self.batches)
        return batches, [np.full(len(batch), here) for batch, here in zip(batches, counts, strict=True)]


class Shares:
    """Those of a rank, of which the next epoch's is built in a thread of its own: of 14 million images it takes 8 s."""

    def __init__(self, kind: Shuffled | InOrder | BySize):
        self.kind = kind
        self._next: tuple[int, Thread, list[Share]] | None = None

    def of(self, epoch: int, start: int) -> Share:
        """This rank's share of an epoch, from global batch `start` on: prepared, or built now, which is the same."""
        if self._next is None or self._next[0] != epoch or start != 0:
            return self.kind.of(epoch, start)
        (_, thread, made), self._next = self._next, None
        thread.join()
        return made[0] if made else self.kind.of(epoch, start)

    def prepare(self, epoch: int) -> None:
        """Begin to build the share of an epoch, unless that has begun."""
        if self._next is not None and self._next[0] == epoch:
            return
        made: list[Share] = []
        thread = Thread(target=lambda: made.append(self.kind.of(epoch, 0)), name="next order", daemon=True)
        self._next = epoch, thread, made
        thread.start()


def cut(values: np.ndarray, size: int) -> list[np.ndarray]:
    """In pieces of `size`; the last one may be shorter."""
    return [values[at : at + size] for at in range(0, len(values), size)]
