"""Softmax attention to near patches beside an operator: exact where attention is sharp, linear everywhere else."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import neighborhood
from .core import Shape, counted, preferred, product, rounds, wide, without_autocast
from .rala import constant_linear

TILE = 8  # patches of a row whose queries meet the keys around them in one product


class Neighborhood(nn.Module):
    """Softmax over near patches, prefix tokens, and a key that stands for all tokens. Prefix tokens see all exactly.

    Near are the patches of the size x size window around a query that lie in the image (neighborhood attention, arXiv
    2204.07143, which at a border moves its window instead). The key for all tokens has the operator's output for its
    value and log N + q mean(k)^T / sqrt(K) + x w + b for its logit: that of N keys equal to their mean, corrected by
    w and b, which start as zero. Near and far share a normaliser, as in LoLCATs, arXiv 2410.10254.

    It costs O(N size^2), and O(N) for each prefix token. It does not start as the identity but nearer to softmax.
    """

    site, needs_grid = "attention", True

    def __init__(self, shape: Shape, size: int) -> None:
        super().__init__()
        self.size, self.prefix = size, shape.num_prefix_tokens
        self.far = constant_linear(shape.width, shape.num_heads, 0.0)

    def forward(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, H, N, K] -> [B, H, N, K]."""
        far = self.far(x).transpose(1, 2).unsqueeze(-1)
        if torch.jit.is_scripting():
            return _with_near(out, q, k, v, far, self.size, self.prefix, grid)
        return with_near(out, q, k, v, far, self.size, self.prefix, grid)


@torch.fx.wrap
def with_near(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, far_BHN1: Tensor, size: int, prefix: int, grid: tuple[int, int]
) -> Tensor:
    """See `Neighborhood`; `far_BHN1` is x w + b."""
    with without_autocast(v):
        return _with_near(out, q, k, v, far_BHN1, size, prefix, grid)


def _with_near(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, far_BHN1: Tensor, size: int, prefix: int, grid: tuple[int, int]
) -> Tensor:
    scale = q.shape[-1] ** -0.5
    queries, keys, values = factor(q, v), factor(k, v), factor(v, v)
    patches, out = queries[:, :, prefix:], out[:, :, prefix:]
    shared = torch.cat([keys.mean(-2, keepdim=True), keys[:, :, :prefix]], -2)
    logits = times(patches, shared.transpose(-2, -1)) * scale
    logits = logits + F.pad(wide(far_BHN1)[:, :, prefix:] + math.log(q.shape[-2]), [0, prefix])
    if prefix > 0:  # what all queries see is one key more for each
        weights = logits.softmax(-1)
        logits = logits.logsumexp(-1, keepdim=True)
        out = weights[..., :1] * out + times(factor(weights[..., 1:], v), values[:, :, :prefix])
    mean = near(q[:, :, prefix:], k[:, :, prefix:], v[:, :, prefix:], out.to(v.dtype), logits, size, grid)
    return exactly(q, k, v, mean, prefix)


def exactly(q: Tensor, k: Tensor, v: Tensor, patches: Tensor, prefix: int) -> Tensor:
    """Softmax attention of the prefix tokens to all tokens, before the outcome of the `patches`."""
    if prefix == 0:
        return patches
    logits = times(factor(q[:, :, :prefix], v), factor(k, v).transpose(-2, -1)) * q.shape[-1] ** -0.5
    return torch.cat([times(factor(logits.softmax(-1), v), factor(v, v)).to(v.dtype), patches], -2)


def near(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    other: Tensor,
    logit_BHN1: Tensor,
    size: int,
    grid: tuple[int, int],
    known: Tensor | None = None,
    bias_BHN1: Tensor | None = None,
    block: tuple[int, int] = (1, 1),
) -> Tensor:
    """Softmax attention of patches to those around them, and to one key more of their own.

    Args:
        q, k, v: of patches alone, [B, H, rows * columns, K].
        other: the value of each query's own key, like `v`.
        logit_BHN1: and its logit.
        size: of the window, odd.
        known, bias_BHN1: keys, like `k`, by which `other` holds each patch already: exp(q known^T / sqrt(K) + bias) is
            taken from the weight of a near one.
        block: rows and columns of the blocks of patches, from the first on, all over which `known` is the same.

    Returns:
        Like `v`. Logits and weights are at least fp32.
    """
    if not torch.jit.is_scripting():
        if (counted(v) or preferred(v) == "triton") and neighborhood.serves(q, k, v, other):
            return neighborhood.attend(q, k, v, other, logit_BHN1, size, grid, known, bias_BHN1, block)
    rows, columns = grid
    queries = tiles(factor(q, v), columns)
    values = strips(factor(v, v), size, grid)
    hidden = F.pad(outside(size, grid, q.device), [1, 0])
    logits = torch.cat([tiles(wide(logit_BHN1), columns), to_near(queries, k, v, size, grid)], -1)
    logits = logits.masked_fill(hidden, -math.inf)
    if known is None or bias_BHN1 is None:
        weights = logits.softmax(-1)
    else:
        bias = strips(wide(bias_BHN1), size, grid)
        biases = torch.cat([bias[:, :, a : a + rows] for a in range(size)], -2).transpose(-2, -1)
        most = logits.amax(-1, keepdim=True).detach()
        less = (to_near(queries, known, v, size, grid) + biases - most).masked_fill(hidden[..., 1:], -math.inf)
        weights = (logits - most).exp() - F.pad(less.exp(), [1, 0])
        weights = weights / weights.sum(-1, keepdim=True)
    width = values.shape[-2]
    mean = weights[..., :1] * tiles(other, columns)
    for a in range(size):
        mean = mean + times(factor(weights[..., 1 + a * width : 1 + (a + 1) * width], v), values[:, :, a : a + rows])
    return untiled(mean, columns).to(v.dtype)


def to_near(queries: Tensor, k: Tensor, v: Tensor, size: int, grid: tuple[int, int]) -> Tensor:
    """q k^T / sqrt(K) of `tiles` of queries with all keys of their `strips`, [..., TILE, size * strip]."""
    keys, rows = strips(factor(k, v), size, grid), grid[0]
    products = [times(queries, keys[:, :, a : a + rows].transpose(-2, -1)) for a in range(size)]
    return torch.cat(products, -1) * k.shape[-1] ** -0.5


def factor(x: Tensor, v: Tensor) -> Tensor:
    """`x` as a factor of products: rounded where `rounds` says so of the values `v`, else in at least fp32."""
    if not torch.jit.is_scripting():
        if rounds(v):
            return x.to(v.dtype)
    return wide(x)


def times(x: Tensor, y: Tensor) -> Tensor:
    """`product` of factors, which TorchScript, where they are wide, has not."""
    if not torch.jit.is_scripting():
        return product(x, y)
    return x @ y


def tiles(x_BHNK: Tensor, columns: int, tile: int = TILE) -> Tensor:
    """Patches [B, H, rows * columns, K] -> [B, H, rows, tiles of a row, TILE, K]; zeros fill up the last tile."""
    B, H, N, K = x_BHNK.shape
    x = F.pad(x_BHNK.reshape(B, H, N // columns, columns, K), [0, 0, 0, -columns % tile])
    return x.reshape(B, H, N // columns, -1, tile, K)


def untiled(x: Tensor, columns: int) -> Tensor:
    """The inverse of `tiles`."""
    B, H, rows, K = x.shape[0], x.shape[1], x.shape[2], x.shape[-1]
    return x.reshape(B, H, rows, -1, K)[:, :, :, :columns].reshape(B, H, rows * columns, K)


def strips(x_BHNK: Tensor, size: int, grid: tuple[int, int], tile: int = TILE) -> Tensor:
    """What each tile's windows see of each row: [B, H, rows + size - 1, tiles, TILE + size - 1, K], zeros outside."""
    rows, columns = grid
    B, H, _, K = x_BHNK.shape
    reach = size // 2
    x = x_BHNK.reshape(B, H, rows, columns, K)
    x = F.pad(x, [0, 0, reach, reach + -columns % tile, reach, reach])
    return x.unfold(3, tile + 2 * reach, tile).transpose(-2, -1)


def outside(size: int, grid: tuple[int, int], device: torch.device, tile: int = TILE) -> Tensor:
    """Which keys of `strips` are not in a query's window or not in the image: [rows, tiles, TILE, size * strip]."""
    rows, columns = grid
    reach = size // 2
    row = torch.arange(rows, device=device)[:, None] + torch.arange(-reach, reach + 1, device=device)
    start = torch.arange(0, columns, tile, device=device)[:, None, None]
    query = start + torch.arange(tile, device=device)[:, None]
    key = start + torch.arange(-reach, tile + reach, device=device)
    column_out = (key < 0) | (key >= columns) | ((key - query).abs() > reach)
    row_out = (row < 0) | (row >= rows)
    return (row_out[:, None, None, :, None] | column_out[None, :, :, None, :]).flatten(-2)
