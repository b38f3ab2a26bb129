"""Before a stage: the .beton files of images that are given as such. One rank writes, the others wait for it."""

import socket
import sys
from contextlib import nullcontext
from pathlib import Path

from data.given import is_given
from trainer.config import Settings
from trainer.ranks.errors import MachineError
from trainer.ranks.first import from_first
from trainer.ranks.shared import is_seen
from trainer.ranks.signals import StopFlag
from trainer.ranks.world import World
from trainer.setup.cache import sources, write_missing
from trainer.setup.check import check


def prepare(settings: Settings, me: World, should_stop: StopFlag) -> None:
    """Write what the cache does not have, and set `settings.files`. What else may not fit is looked at before.

    Raises:
        UserError, ValueError, OSError: one line on what does not fit.
        Stopped: on all ranks, when a signal came.
    """
    if not any(map(is_given, (settings.data.train, settings.data.val))):
        return

    def work() -> dict[str, str]:
        found = sources(settings)
        if not all(source.is_written for source in found):
            check(settings, [me.size])  # hours of writing are lost to no other mistake
        return {split: str(path) for split, path in write_missing(found).items()}

    # Where a signal comes to another rank alone, all of them heed it at the first step.
    with should_stop.at_once() if me.rank == 0 else nullcontext():
        found = from_first(me, work, settings.train.start_limit)
    files = {split: Path(path) for split, path in found.items()}
    for path in files.values():
        if not is_seen(path):
            raise MachineError(
                f"data.cache {path.parent.parent}: is another folder on rank 0 than on rank {me.rank} "
                f"({socket.gethostname()}); give --data.cache a folder on a file system that all nodes share"
            )
    settings.files = files


def say_stopped(me: World) -> None:
    """The line for whoever watches, when a signal came while images were written."""
    if me.rank == 0:
        print("stopped by a signal before training; run the same command again", file=sys.stderr, flush=True)
