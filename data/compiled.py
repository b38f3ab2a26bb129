"""Compiled functions that the next process need not compile again: numba's own cache, beside the environment.

numba looks at a function's own file alone to tell whether what it kept is stale. So the folder is named by a hash of
all the sources here, and of what compiles them. The kept code is trusted as Python's own .pyc files are.
"""

import contextlib
import functools
import hashlib
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache

from data.paths import cache_folder


class _Cache(FunctionCache):
    """numba's, for which a full disk or a damaged file is no reason not to decode."""

    def load_overload(self, *args: Any) -> Any:
        try:
            return super().load_overload(*args)
        except Exception:  # a damaged pickle may raise anything
            return None

    def save_overload(self, *args: Any) -> None:
        try:
            super().save_overload(*args)
        except Exception:  # of a damaged list of what is kept, too
            with contextlib.suppress(OSError):
                self.flush()
                super().save_overload(*args)


@functools.cache
def folder() -> Path:
    """Where compiled code is kept, of these sources, this numba and this FFCV alone. `NUMBA_CACHE_DIR` is heeded."""
    digest = hashlib.sha256(f"{version('numba')} {version('llvmlite')} {version('ffcv')}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    beside = Path(sys.prefix) if os.access(sys.prefix, os.W_OK) else cache_folder()
    return Path(numba.config.CACHE_DIR or beside / "numba_cache") / digest.hexdigest()[:16]


def compiled(function: Callable, parallel: bool) -> Callable:
    """`function`, a module's own, compiled by numba without the GIL at its first call, or read where it is kept.

    Args:
        parallel: whether `numba.prange` uses several threads. numba's key does not tell the two apart.

    What it calls is compiled with the same flags: FFCV's own, with which views have always been drawn.
    """
    made = numba.njit(nogil=True, fastmath=True, error_model="numpy", parallel=parallel)(function)
    place = str(folder() / ("parallel" if parallel else "serial"))
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, place
    try:
        cache = _Cache(function)
    except (RuntimeError, OSError):  # no folder that can be written
        return made
    finally:
        numba.config.CACHE_DIR = before
    if cache.cache_path.startswith(place):  # not beside the source, where numba turns next
        made._cache = cache
    return made
