"""UPerNet, arXiv 1807.10221, on the simple feature pyramid of a plain backbone."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Head
from .pyramid import SCALES, SimplePyramid, conv

POOLS = (1, 2, 3, 6)  # cells a side of the pyramid pooling module, arXiv 1612.01105


class UPerNet(Head):
    """Pyramid pooling on the coarsest map, a feature pyramid network down to the finest, all of them fused."""

    def __init__(self, width: int, num_classes: int, channels: int = 256) -> None:
        """`channels`: width of all maps of the head."""
        super().__init__()
        self.pyramid = SimplePyramid(width, channels)
        self.pools = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(n), conv(channels, channels, 1)) for n in POOLS)
        self.pooled = conv(channels * (1 + len(POOLS)), channels, 3)
        self.lateral = nn.ModuleList(conv(channels, channels, 1) for _ in SCALES[:-1])
        self.output = nn.ModuleList(conv(channels, channels, 3) for _ in SCALES[:-1])
        self.fuse = conv(channels * len(SCALES), channels, 3)
        self.classify = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.zeros_(self.classify.bias)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """[[B, D, h, w]] -> [B, C, 4 h, 4 w]."""
        *fine, coarse = self.pyramid(features[-1])
        top = self.pooled(torch.cat([coarse, *(_to(pool(coarse), coarse) for pool in self.pools)], 1))
        maps, above = [top], top
        for x, lateral, output in zip(reversed(fine), self.lateral, self.output, strict=True):
            above = lateral(x) + _to(above, x)
            maps.append(output(above))
        return self.classify(self.fuse(torch.cat([_to(x, maps[-1]) for x in maps], 1)))


def _to(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[-2:], mode="bilinear")
