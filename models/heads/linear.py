"""Batch norm and one linear layer, the head by which DINOv2, arXiv 2304.07193, judges frozen features (section 7.4)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch import distributed as dist

from .base import Head


class Linear(Head):
    """Batch norm and a 1x1 convolution on the last block's patch features, or on the last four's, concatenated."""

    def __init__(self, width: int, num_classes: int, blocks: int = 1) -> None:
        """`blocks`: how many of the last blocks are read; DINOv2 has 1 ("lin.") and 4 ("+ms")."""
        super().__init__()
        self.reads = blocks
        self.norm = BatchNorm(width * blocks)
        self.classify = nn.Conv2d(width * blocks, num_classes, 1)
        nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.zeros_(self.classify.bias)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """`blocks` times [B, D, h, w] -> [B, C, h, w]."""
        return self.classify(self.norm(torch.cat(list(features), 1)))


class BatchNorm(nn.BatchNorm2d):
    """Batch norm by the statistics of all ranks' micro-batches, on any device; torch's `SyncBatchNorm` needs GPUs.

    The ranks' batches have one shape. Statistics are taken and kept in fp32, whatever the module is converted to: in
    bf16 a running mean would stand still as soon as a step of it is below a 256th.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, h, w]."""
        values = x.float()
        mean, variance = self.running_mean, self.running_var
        if self.training:
            ranks = dist.get_world_size() if dist.is_initialized() else 1
            mean = _sum_over_ranks(values.mean((0, 2, 3))) / ranks
            variance = _sum_over_ranks((values - mean[:, None, None]).square().mean((0, 2, 3))) / ranks
            count = values[:, 0].numel() * ranks
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * (count / max(1, count - 1)), self.momentum)
        scale = self.weight.float() * (variance + self.eps).rsqrt()
        shift = self.bias.float() - mean * scale
        return torch.addcmul(shift[:, None, None], values, scale[:, None, None]).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        kept = {name: getattr(self, name) for name in ("running_mean", "running_var")}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            now = getattr(self, name)
            setattr(self, name, now.float() if before.is_meta or now.is_meta else before.to(now.device))
        return self


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks, whose gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _SumOverRanks.forward(ctx, gradient)


def _sum_over_ranks(value: Tensor) -> Tensor:
    return _SumOverRanks.apply(value) if dist.is_initialized() and dist.get_world_size() > 1 else value
