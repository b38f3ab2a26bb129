"""Ranks with unequal work wait for each other longer than the process group's timeout."""

import os
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch.multiprocessing import start_processes

from trainer.probe.barrier import Barrier
from trainer.ranks.signals import StopFlag, Stopped
from trainer.ranks.world import World

TIMEOUT = 1.0  # of the process group, seconds


def rank_of_two(rank: int, folder: Path, stop_on: int | None) -> None:
    """Rank 0 has a short piece of work, rank 1 long ones: its report tells how it ended."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "WORLD_SIZE": "2"}
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=TIMEOUT)
    )
    should_stop, done = StopFlag(), []

    def pieces() -> Iterator[None]:
        for i in range(3 if rank else 1):
            time.sleep(TIMEOUT if rank else 0.01)
            done.append(i)
            should_stop.set = rank == stop_on
            yield

    barrier, began = Barrier(World(rank, rank, 2, torch.device("cpu")), should_stop), time.monotonic()
    try:
        barrier.work(pieces(), 4, "pieces")
        ended = "done"
        if rank == 1:  # as rank 0 does with its report
            time.sleep(2 * TIMEOUT)
        barrier.wait("report")
    except Stopped:
        ended = "stopped"
    flag = torch.ones(())
    torch.distributed.all_reduce(flag)  # now they are together
    (folder / str(rank)).write_text(f"{ended} {len(done)} {time.monotonic() - began}")


@pytest.mark.parametrize("stop_on", (None, 0, 1))
def test_unequal_work(stop_on: int | None, tmp_path: Path) -> None:
    start_processes(rank_of_two, (tmp_path, stop_on), nprocs=2, start_method="fork")
    (ended, pieces, seconds), (other_ended, other_pieces, _) = (
        (tmp_path / str(rank)).read_text().split() for rank in (0, 1)
    )
    assert ended == other_ended == ("done" if stop_on is None else "stopped")
    if stop_on is None:
        assert (pieces, other_pieces) == ("1", "3") and float(seconds) > 4 * TIMEOUT
    else:
        assert int(other_pieces) < 3
