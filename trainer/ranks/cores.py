"""A rank's share of its machine's cores, under every launcher: some bind each rank to cores of its own, some do not."""

from collections.abc import Collection

Place = tuple[str, Collection[int]]  # a rank's host, and the cores that it may run on


def share(mine: Place, everyone: list[Place]) -> int:
    """Whole cores, at least 1; a core that several ranks may run on counts for each of them in part."""
    host, own = mine
    beside = [set(theirs) for where, theirs in everyone if where == host]
    parts = sum(1 / sum(core in theirs for theirs in beside) for core in own)
    return max(1, int(parts + 1e-6))
