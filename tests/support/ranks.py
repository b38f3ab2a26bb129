"""Ranks of a process group, forked from a script that has imported everything."""

import os
import traceback
from collections.abc import Callable

from tests.support.zygote import free_port


def forked(ranks: int, run_rank: Callable[[], object]) -> bool:
    """Run `run_rank` in a child for each rank, which is told of its rank by the environment; whether all ended well."""
    port, children = free_port(), []
    for rank in range(ranks):
        children.append(os.fork())
        if children[-1] == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
            try:
                run_rank()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
    failed = [child for child in children if os.waitpid(child, 0)[1]]
    return not failed
