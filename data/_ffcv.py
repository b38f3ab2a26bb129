"""Keeps FFCV away from torch's thread count; imported before any other module of this package.

FFCV sets `torch.set_num_threads` along with numba's: to 1 when it is imported, then to its workers at every epoch.
Training would change its speed, and the last bits of its sums, with the number of decoding threads.
"""

import numba
import torch

_threads = torch.get_num_threads()

from ffcv.pipeline.compiler import Compiler  # noqa: E402


def _set_decoder_threads(cls, n: int) -> None:
    cls.num_threads = n
    numba.set_num_threads(n)


Compiler.set_num_threads = classmethod(_set_decoder_threads)
torch.set_num_threads(_threads)
