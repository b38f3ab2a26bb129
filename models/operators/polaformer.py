"""Polarity-aware linear attention, PolaFormer, arXiv 2501.15061."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .core import Operator, Shape, wide
from .feature_maps import log


class PolaFormer(Operator):
    """Signs apart: phi(x) = (relu(x / s)^p, relu(-x / s)^p), F = 2K, with s and p learned for each head and dimension.

    Pairs of the same sign, phi(q) phi(k)^T, weigh the first half of each head's values, and pairs of opposite sign,
    phi(-q) phi(k)^T, the second (equations 6 to 8). p = 1 + 4 sigmoid(w) starts as 3, s = softplus(t) as log 2. The
    authors' gate and convolution are the additions `gate` and `local_conv5`.
    """

    def __init__(self, shape: Shape) -> None:
        """Raises ValueError unless the head dimension is even."""
        super().__init__(shape)
        if shape.head_dim % 2:
            raise ValueError(f"head dimension {shape.head_dim}: PolaFormer halves it, so it must be even")
        self.scale = nn.Parameter(torch.zeros(shape.num_heads, 1, shape.head_dim))
        self.power = nn.Parameter(torch.zeros(shape.num_heads, 1, shape.head_dim))

    @staticmethod
    def features(q: Tensor, k: Tensor, scale: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
        s, p = F.softplus(wide(scale)), 1 + 4 * wide(power).sigmoid()
        return signs_apart(wide(q), s, p), signs_apart(wide(k), s, p)

    def own_features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.features(q, k, self.scale, self.power)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: tuple[int, int]) -> Tensor:
        same, opposite = v.chunk(2, dim=-1)
        return torch.cat([self.quotient(q, k, same)[0], self.quotient(-q, k, opposite)[0]], -1)


def signs_apart(x: Tensor, scale: Tensor, power: Tensor) -> Tensor:
    """(relu(x / s)^p, relu(-x / s)^p), which takes one power, not two."""
    size = (power * log(x.abs() / scale)).exp()
    return torch.cat([size * (x > 0), size * (x < 0)], -1)
