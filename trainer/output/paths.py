"""Where a stage lies in a run folder, whether it is done, who holds it, how a file gets there; imports nothing big."""

import errno
import fcntl
import math
import os
import sys
import time
from pathlib import Path
from typing import IO

# What flock says where the file system has no locks: Lustre mounted with noflock, NFS without its lock daemon.
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}


def stage_path(run: str | Path, stage: str) -> Path:
    """`RUN/stage2`, or `RUN/probe`."""
    return Path(run) / (f"stage{stage}" if stage.isdigit() else stage)


def is_complete(path: Path) -> bool:
    """Whether the stage at `path` has written its export, or the probe its results."""
    return (path / "export" / "config.json").is_file() or (path / "results.json").is_file()


def is_begun(path: Path) -> bool:
    """Whether the stage at `path` has checkpoints, or features of a probe, and so settings that it was made with."""
    return any(any(path.glob(pattern)) for pattern in ("checkpoints/step-*", "features/*/*", "probes/*"))


def write_aside(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def hold(folder: Path, patience: float = math.inf) -> IO[str]:
    """The lock file of a folder, which is held until the file is closed or the process ends.

    A file system without locks cannot guard the folder; one line on stderr says so.

    Args:
        patience: seconds to wait for another process that holds it.

    Raises:
        BlockingIOError: another process still holds it.
        OSError: the folder cannot be written.
    """
    file, until = (folder / ".lock").open("w"), time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() >= until:
                file.close()
                raise
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                file.close()
                raise
            print(
                f"warning: {folder}: its file system has no locks ({error.strerror.lower()}), so nothing guards the "
                "folder; start one process at a time in it",
                file=sys.stderr,
                flush=True,
            )
            return file
        time.sleep(1)
