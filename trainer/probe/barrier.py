"""How ranks with unequal work wait for each other."""

import time
from collections.abc import Callable, Generator
from contextlib import closing

from torch.distributed import PrefixStore, distributed_c10d
from tqdm import tqdm

from trainer.ranks.signals import StopFlag, Stopped
from trainer.ranks.world import World

PAUSE = 0.2  # seconds between two looks at the other ranks


class Barrier:
    """A barrier without a timeout.

    A collective fails when one rank enters it later than the process group's timeout after another. Here a rank counts
    itself in the process group's store, and reads the count every `PAUSE` seconds. Each request to the store is short.
    """

    def __init__(self, me: World, should_stop: StopFlag) -> None:
        """The process group must exist."""
        self.me, self.should_stop = me, should_stop
        self._store = PrefixStore("probe", distributed_c10d._get_default_store())

    def work(self, pieces: Generator[None], total: int, what: str) -> None:
        """Do this rank's pieces, one per iteration. Then wait until all ranks have done theirs.

        Args:
            total: number of pieces of all ranks.
            what: a name that no other call has.

        Raises:
            Stopped: some rank was asked to stop before all pieces were done. All ranks raise it, each after the piece
                that it was at.
        """
        silent = None if self.me.rank == 0 else True
        with tqdm(total=total, desc=what, disable=silent, dynamic_ncols=True, leave=False) as bar, closing(pieces):

            def show(more: int = 0) -> None:
                bar.update(self._store.add(f"{what}.pieces", more) - bar.n)

            while not (stopped := self._is_stopping()) and next(pieces, bar) is not bar:
                show(1)
            # Before this rank arrives: once all have arrived, all of them read the same count.
            self._store.add(f"{what}.finished", int(not stopped))
            self.wait(what, show)
        if self._store.add(f"{what}.finished", 0) < self.me.size:
            raise Stopped

    def wait(self, what: str, look: Callable[[], None] = lambda: None) -> None:
        """Return once all ranks have called it.

        Args:
            what: a name that no other call has.
            look: called again and again meanwhile.
        """
        arrived = self._store.add(f"{what}.arrived", 1)
        while arrived < self.me.size:
            time.sleep(PAUSE)
            self._is_stopping()  # a signal to a rank that waits reaches those that work
            look()
            arrived = self._store.add(f"{what}.arrived", 0)

    def _is_stopping(self) -> bool:
        """Whether any rank was asked to stop."""
        if self.should_stop.set:
            self._store.set("stop", "1")
        return self._store.check(["stop"])
