"""Token-level multi-head linear attention, MHLA, arXiv 2601.07832."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .core import EPS, Operator, Shape, wide, without_autocast
from .feature_maps import check_number, elu1


class MHLA(Operator):
    """Each cell of the patch grid has a state of its own, and its queries read a learned mixture of all states. F = K.

    For a query in cell i, with S_j = sum of phi(k_n)^T v_n and z_j = sum of phi(k_n) over the tokens n of cell j:
    phi(q) sum_j m_ij S_j / phi(q) sum_j m_ij z_j, phi(x) = elu(x) + 1. The mixture m is not negative and starts
    local, falling linearly with the distance of the cells, as in the authors' code. The grid is cut into cells x cells
    whatever its size; prefix tokens are a cell more, which starts with the weight that it has without cells.
    """

    needs_grid = True

    def __init__(self, shape: Shape, cells: int = 4) -> None:
        """Raises ValueError unless `cells` is a whole number from 1 to 32."""
        super().__init__(shape)
        check_number("cells", cells, 1, 32, whole=True)
        self.cells, self.prefix = int(cells), shape.num_prefix_tokens
        self.mixture = nn.Parameter(local_mixture(self.cells, self.prefix > 0))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if torch.jit.is_scripting():
            return _mixed(q, k, v, self.mixture, self.prefix, grid, self.cells)
        return mixed_attention(q, k, v, self.mixture, self.prefix, grid, self.cells)


def local_mixture(cells: int, prefix: bool) -> Tensor:
    """Rows of 1 - distance / largest distance with a mean of 1; the prefix cell, first where there is one, has 1."""
    side = torch.arange(cells, dtype=torch.float32)
    places = torch.cartesian_prod(side, side)
    distance = torch.linalg.vector_norm(places[:, None] - places, dim=-1)
    mixture = 1 - distance / distance.max().clamp_min(1)
    mixture = mixture / mixture.mean(-1, keepdim=True)
    return F.pad(mixture, (1, 0, 1, 0), value=1.0) if prefix else mixture


@torch.fx.wrap
def mixed_attention(
    q: Tensor, k: Tensor, v: Tensor, mixture: Tensor, prefix: int, grid: tuple[int, int], cells: int
) -> Tensor:
    """See `MHLA`; accumulates in at least fp32."""
    with without_autocast(v):
        return _mixed(q, k, v, mixture, prefix, grid, cells)


def _mixed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixture: Tensor,
    prefix: int,
    grid: tuple[int, int],
    cells: int,
    eps: float = EPS,
) -> Tensor:
    f, g = elu1(q), elu1(k)
    ones = torch.ones_like(g[..., :1])
    v1 = torch.cat([wide(v), ones], -1)  # the last column of a state is then its normaliser
    f_cells, g_cells, v_cells = (
        by_cell(f[:, :, prefix:], grid, cells),
        by_cell(g[:, :, prefix:], grid, cells),
        by_cell(v1[:, :, prefix:], grid, cells),
    )
    states = g_cells.transpose(-2, -1) @ v_cells  # [B, H, cells, F, K + 1]
    if prefix > 0:
        first = g[:, :, :prefix].transpose(-2, -1) @ v1[:, :, :prefix]
        states = torch.cat([first.unsqueeze(2), states], 2)
    B, H, M, F, K1 = states.shape
    states = (wide(mixture).clamp_min(0) @ states.flatten(-2)).reshape(B, H, M, F, K1)
    parts = [by_token(f_cells @ states[:, :, M - cells * cells :], grid, cells)]
    if prefix > 0:
        parts.insert(0, f[:, :, :prefix] @ states[:, :, 0])
    out = torch.cat(parts, 2)
    return (out[..., :-1] / out[..., -1:].clamp_min(eps)).to(v.dtype)


def by_cell(x_BHNK: Tensor, grid: tuple[int, int], cells: int) -> Tensor:
    """Patches [B, H, rows * columns, K] -> [B, H, cells * cells, patches of a cell, K]; zeros fill up the last ones."""
    B, H, _, K = x_BHNK.shape
    rows, columns = -(-grid[0] // cells), -(-grid[1] // cells)
    x = x_BHNK.reshape(B, H, grid[0], grid[1], K)
    x = F.pad(x, [0, 0, 0, columns * cells - grid[1], 0, rows * cells - grid[0]])
    x = x.reshape(B, H, cells, rows, cells, columns, K).transpose(3, 4)
    return x.reshape(B, H, cells * cells, rows * columns, K)


def by_token(x: Tensor, grid: tuple[int, int], cells: int) -> Tensor:
    """The inverse of `by_cell`."""
    B, H, _, _, K = x.shape
    rows, columns = -(-grid[0] // cells), -(-grid[1] // cells)
    x = x.reshape(B, H, cells, cells, rows, columns, K).transpose(3, 4)
    x = x.reshape(B, H, cells * rows, cells * columns, K)[:, :, : grid[0], : grid[1]]
    return x.reshape(B, H, grid[0] * grid[1], K)
