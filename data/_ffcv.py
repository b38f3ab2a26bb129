"""FFCV as this package uses it; imported before any other module of it.

FFCV sets `torch.set_num_threads` along with numba's: to 1 when it is imported, then to its workers at every epoch.
Training would change its speed, and the last bits of its sums, with the number of decoding threads. Its table of two
image modes is a dict of numba's, which takes 4 s to compile. Where there is a GPU, its thread enters streams without
choosing a device, which makes a context on GPU 0 for every rank; nothing here decodes on a GPU.
"""

import numba
import numba.typed
import torch

_threads, _Dict = torch.get_num_threads(), numba.typed.Dict
numba.typed.Dict = dict
try:
    from ffcv.loader import epoch_iterator
    from ffcv.pipeline.compiler import Compiler
finally:
    numba.typed.Dict = _Dict


def _set_decoder_threads(cls, n: int) -> None:
    cls.num_threads = n
    numba.set_num_threads(n)


Compiler.set_num_threads = classmethod(_set_decoder_threads)
epoch_iterator.IS_CUDA = False
torch.set_num_threads(_threads)
