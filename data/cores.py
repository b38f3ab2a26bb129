"""The cores that are this process's to decode with, beside the other ranks of its machine."""

import os

_told: int | None = None


def own() -> int:
    """What `tell` said; else what the launcher lets the process run on, divided by the ranks that it started here."""
    if _told is not None:
        return _told
    # torchrun and submitit set the first, DeepSpeed's launcher the second.
    ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1
    return max(1, len(os.sched_getaffinity(0)) // int(ranks))


def tell(cores: int) -> None:
    """Say how many cores are this process's, where that is known better."""
    global _told
    _told = cores
