"""What only the first rank does while the others wait: however long it takes, and before there is a process group."""

import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore

from trainer.ranks.signals import Stopped
from trainer.ranks.watchdog import START, await_address, command_digest
from trainer.ranks.world import World

_calls = 0


def from_first(me: World, work: Callable[[], Any], start: float = START) -> Any:
    """What `work` gives, plain JSON; rank 0 alone does it. All ranks call this, within the watchdog's context.

    `start`: seconds that the ranks wait for each other's program to start.

    There is no time limit, as there is on a collective: when rank 0 fails or dies meanwhile, the watchdog ends the
    others.

    Raises:
        Stopped: on all ranks, when it was raised on rank 0.
    """
    global _calls
    if me.size == 1:
        return work()
    _calls += 1
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives its ranks
    key = f"first-{command_digest()}-{attempt}-{_calls}"
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    await_address(address, start)
    store = TCPStore(*address, is_master=False, timeout=timedelta(seconds=start), wait_for_workers=False)
    if me.rank == 0:
        try:
            found = work()
        except Stopped:
            store.set(key, json.dumps({"stopped": True}))
            raise
        store.set(key, json.dumps({"found": found}))
        return found
    while not store.check([key]):
        time.sleep(0.5)  # signals are heeded meanwhile
    said = json.loads(store.get(key))
    if "stopped" in said:
        raise Stopped
    return said["found"]
