"""Whether the ranks share a folder: on clusters a path may lead to another disk on each node."""

import os
import secrets
import socket
import time
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from trainer.ranks.errors import MachineError
from trainer.ranks.world import dist

VISIBLE = 90.0  # seconds until all nodes see a new file: a client of NFS may keep what it knows of a folder for 60 s
REMEDY = "give --run a folder on a file system that all nodes share"


def check_shared(folder: Path) -> None:
    """Look whether all ranks see one folder, which rank 0 has made; a collective.

    Raises:
        MachineError, on all ranks: some of them see another folder.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    if size == 1:
        return
    token: list[Any] = [None]
    if rank == 0:
        path = folder / f".shared-{secrets.token_hex(8)}"
        try:
            path.touch()
            token = [path.name]
        except OSError as error:
            token = [error]
    dist.broadcast_object_list(token, src=0)
    if isinstance(token[0], OSError):
        raise token[0]
    found: list[Any] = [None] * size
    dist.all_gather_object(found, (socket.gethostname(), is_seen(folder / token[0])))
    if rank == 0:
        path.unlink()
    apart = [(rank, host) for rank, (host, sees) in enumerate(found) if not sees]
    if apart:
        raise MachineError(f"{folder}: {not_shared(found[0][0], apart)}")


def is_seen(path: Path, size: int | None = None, until: float | None = None) -> bool:
    """Whether a file is there, with its `size` in bytes, by the time `until` (`time.monotonic`; else `VISIBLE` s)."""
    until = time.monotonic() + VISIBLE if until is None else until
    while True:
        try:
            os.listdir(path.parent)  # makes a client of NFS ask again
            if path.stat().st_size == size or size is None:
                return True
        except OSError:
            pass
        if time.monotonic() >= until:
            return False
        time.sleep(0.5)


def not_shared(host: str, others: Iterable[tuple[int, str]]) -> str:
    """ "is another folder on rank 0 (a) than on rank 1, 2 (b), rank 3 (c)", and the remedy.

    Args:
        host: of rank 0.
        others: (rank, host) of those that see another folder.
    """
    by_host = groupby(others, key=lambda pair: pair[1])
    names = ", ".join(f"rank {', '.join(str(rank) for rank, _ in group)} ({theirs})" for theirs, group in by_host)
    return f"is another folder on rank 0 ({host}) than on {names}; {REMEDY}"
