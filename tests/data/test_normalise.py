"""Normalising by a table: the numbers of the formula, to the bit."""

import numpy as np
import pytest
import torch

from data.normalise import normalise, table_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_table_gives_the_numbers_of_the_formula(dtype):
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    views = np.random.default_rng(0).integers(0, 256, (4, 3 * 30 * 20 + 7)).astype(np.uint8)  # other bytes behind it
    images = torch.from_numpy(views[:, : 3 * 30 * 20].copy()).view(4, 30, 20, 3).permute(0, 3, 1, 2)
    found = normalise(views, table_of(mean, std, dtype), 30, 20)
    assert found.dtype == dtype and found.is_contiguous()
    assert torch.equal(found, ((images.float() - mean) / std).to(dtype))
