"""Feature maps phi of linear attention: softmax(q k^T) is replaced by phi(q) phi(k)^T.

A map is an `nn.Module` built as `Map(num_heads, head_dim)` that takes [B, H, N, K] to a non-negative [B, H, N, F], in
the dtype of its input or in fp32 where a narrower one would lose it.
A new one is a class here (or a file of its own) and a line in `FEATURE_MAPS`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Elu1(nn.Module):
    """elu(x) + 1, from "Transformers are RNNs", arXiv 2006.16236, equation 7. F = K, always positive.

    In bf16 the sum would keep two digits of exp(-2) and nothing of exp(-7), so it is taken in at least fp32.
    """

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, N, K] -> [B, H, N, K]."""
        return F.elu(x.to(torch.promote_types(x.dtype, torch.float32))) + 1


class ReLU(nn.Module):
    """max(x, 0), as in EfficientViT, arXiv 2205.14756. F = K; a token may have no positive feature at all."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, N, K] -> [B, H, N, K]."""
        return torch.relu(x)


FEATURE_MAPS: dict[str, type[nn.Module]] = {"elu1": Elu1, "relu": ReLU}


def build_feature_map(name: str, num_heads: int, head_dim: int) -> nn.Module:
    """The feature map called `name`.

    Raises:
        ValueError: no map has that name.
    """
    check_feature_map(name)
    return FEATURE_MAPS[name](num_heads, head_dim)


def check_feature_map(name: str) -> None:
    """Raises ValueError when no feature map is called `name`."""
    if name not in FEATURE_MAPS:
        raise ValueError(f"feature_map {name!r}: unknown; choose one of {', '.join(FEATURE_MAPS)}")
