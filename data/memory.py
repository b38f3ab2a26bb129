"""How much memory this machine, or the control group that holds this process, has for caching files."""

import os
from pathlib import Path

# Where the kernel keeps control groups, by version, and the name of the limit there.
_V1, _V2 = ("memory", "memory.limit_in_bytes"), ("", "memory.max")


def memory_limit(root: Path = Path("/")) -> int:
    """Bytes of memory that this process and what it reads may take: the machine's, or its control group's if less.

    Args:
        root: where `proc` and `sys` lie.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount, name = _V1 if controllers else _V2
        # A container may show the host's path, of which only the upper end or nothing is mounted.
        folder = Path(path.lstrip("/"))
        for above in (folder, *folder.parents):
            limits += [int(text) for text in _lines(root / "sys/fs/cgroup" / mount / above / name) if text.isdigit()]
    return min(limits)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []
