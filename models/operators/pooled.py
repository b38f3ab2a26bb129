"""Softmax over few keys: near ones as they are, and one for each cell of the patch grid."""

import torch
from torch import Tensor

from .core import Operator, Shape, wide, without_autocast
from .feature_maps import check_number
from .mhla import by_cell
from .neighborhood import exactly, factor, near, times

NOTHING = -1e30  # logit of what is not there


class Pooled(Operator):
    """Softmax over prefix tokens, the window x window patches around a query, and cells x cells pooled keys.

    Fine near, coarse far, as in focal attention, arXiv 2107.00641, but the grid is cut into cells x cells whatever its
    size, so it costs O(N (cells^2 + window^2)). A query q gives cell c the logit that is the first-order expansion of
    log sum_n exp(q k_n^T / sqrt(K)) about the mean query m of the patches, n over the cell's patches:

        a_n = softmax_n(m k_n^T / sqrt(K)),  k_c = sum_n a_n k_n,  v_c = sum_n a_n v_n,
        logit = log sum_n exp(m k_n^T / sqrt(K)) + (q - m) k_c^T / sqrt(K).

    So a query m has softmax attention's own outcome of each cell. Near patches are in their cells too. Prefix tokens
    attend to all tokens exactly, in O(N) each. It has no parameters.
    """

    needs_grid = True

    def __init__(self, shape: Shape, cells: int = 8, window: int = 3) -> None:
        """Raises ValueError unless `cells` and `window` are whole numbers from 1 to 32 and 15, and `window` is odd."""
        super().__init__(shape)
        check_number("cells", cells, 1, 32, whole=True)
        check_number("window", window, 1, 15, whole=True)
        if window % 2 == 0:
            raise ValueError(f"window {window!r}: not an odd number")
        self.cells, self.window, self.prefix = int(cells), int(window), shape.num_prefix_tokens

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if torch.jit.is_scripting():
            return _pooled(q, k, v, self.prefix, grid, self.cells, self.window)
        return pooled_attention(q, k, v, self.prefix, grid, self.cells, self.window)


@torch.fx.wrap
def pooled_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix: int, grid: tuple[int, int], cells: int, window: int
) -> Tensor:
    """See `Pooled`; [B, H, N, K] each. Logits and weights are at least fp32."""
    with without_autocast(v):
        return _pooled(q, k, v, prefix, grid, cells, window)


def _pooled(
    q: Tensor, k: Tensor, v: Tensor, prefix: int, grid: tuple[int, int], cells: int, window: int
) -> Tensor:
    scale = q.shape[-1] ** -0.5
    queries = factor(q, v)[:, :, prefix:]
    keys, values, shifts = by_cells(wide(q), wide(k), wide(v), prefix, grid, cells)
    logits = times(queries, factor(torch.cat([wide(k)[:, :, :prefix], keys], 2), v).transpose(-2, -1)) * scale
    logits = logits + torch.cat([torch.zeros_like(wide(k)[:, :, :prefix, 0]), shifts], -1).unsqueeze(-2)
    out = times(factor(logits.softmax(-1), v), factor(torch.cat([wide(v)[:, :, :prefix], values], 2), v)).to(v.dtype)
    total = logits.logsumexp(-1, keepdim=True)
    out = near(q[:, :, prefix:], k[:, :, prefix:], v[:, :, prefix:], out, total, window, grid)
    return exactly(q, k, v, out, prefix)


def by_cells(
    q: Tensor, k: Tensor, v: Tensor, prefix: int, grid: tuple[int, int], cells: int, nothing: float = NOTHING
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of the cells [B, H, cells * cells, K], and what is added to the products of these keys."""
    scale = q.shape[-1] ** -0.5
    mean = q[:, :, prefix:].mean(2, keepdim=True)
    keys, values = by_cell(k[:, :, prefix:], grid, cells), by_cell(v[:, :, prefix:], grid, cells)
    there = by_cell(torch.ones_like(k[:1, :1, prefix:, :1]), grid, cells).squeeze(-1)
    logits = ((keys * mean.unsqueeze(2)).sum(-1) * scale).masked_fill(there == 0, nothing)
    weights = logits.softmax(-1).unsqueeze(-1)
    keys, values = (weights * keys).sum(-2), (weights * values).sum(-2)
    return keys, values, logits.logsumexp(-1) - (keys * mean).sum(-1) * scale
