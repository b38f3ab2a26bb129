"""Pixels as they are stored -> what a ViT takes, on the CPU: one pass, a value looked up for each."""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from data.compiled import compiled

_BITS = {2: np.int16, 4: np.int32, 8: np.int64}  # numba knows no bfloat16: it moves bits


def table_of(mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """What becomes of each pixel value: mean and std [3, 1, 1] fp32, for pixels in 0..255 -> dtype [3, 256]."""
    return ((torch.arange(256.0) - mean.view(3, 1)) / std.view(3, 1)).to(dtype)


def normalise(views: np.ndarray, table: Tensor, height: int, width: int) -> Tensor:
    """Images by their `table_of`: uint8 [B, bytes], of which [height, width, 3] are pixels -> [B, 3, H, W]."""
    bits = _BITS[table.itemsize]
    out = np.empty((len(views), 3, height * width), bits)  # numpy takes huge pages where torch pays for small ones
    _look_up(views, table.view(getattr(torch, bits.__name__)).numpy(), out)
    return torch.from_numpy(out).view(table.dtype).unflatten(2, (height, width))


@partial(compiled, parallel=False)
def _look_up(views, table, out):
    for image in range(out.shape[0]):
        for channel in range(3):
            for pixel in range(out.shape[2]):
                out[image, channel, pixel] = table[channel, views[image, 3 * pixel + channel]]
