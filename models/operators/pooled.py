"""Softmax over few keys: near patches as they are, and all others by one key for each cell of the patch grid."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels import pooled as kernels
from .core import Operator, Shape, counted, preferred, wide, without_autocast
from .feature_maps import check_number
from .mhla import by_cell, by_token
from .neighborhood import exactly, factor, near, times

NOTHING = -1e30  # logit of what is not there


class Pooled(Operator):
    """Softmax over prefix tokens, the window x window patches around a query, and cells x cells pooled keys.

    Fine near and coarse far, as in focal attention, arXiv 2107.00641, but the grid is cut into cells x cells whatever
    its size, so it costs O(N (cells^2 + window^2)). A query q gives cell c the logit that is the first-order expansion
    of log sum_n exp(q k_n^T / sqrt(K)), n over the cell's patches, about a query m_c:

        a_n = softmax_n(m_c k_n^T / sqrt(K)),  k_c = sum_n a_n k_n,  v_c = sum_n a_n v_n,
        logit = log sum_n exp(m_c k_n^T / sqrt(K)) + (q - m_c) k_c^T / sqrt(K).

    So a query m_c has softmax attention's own outcome of the cell, and no query gives it more weight than softmax does:
    the logarithm is convex. m_c is a mean of landmarks: mean queries of parts of the grid of at most landmark x
    landmark patches (of parts of the sequence in Nystroemformer, arXiv 2102.03902). Each counts as much as it attends
    to the cell if all keys of a cell equal their mean.

    A near patch n takes its part a_n exp(logit) out of its cell, so nothing counts twice. Prefix tokens attend to all
    tokens exactly, in O(N) each. There are no parameters.
    """

    needs_grid = True

    def __init__(self, shape: Shape, cells: int = 8, window: int = 3, landmark: int = 8) -> None:
        """Raises ValueError unless these are whole numbers from 1 on, to 32, 15 and 1024, and `window` is odd."""
        super().__init__(shape)
        check_number("cells", cells, 1, 32, whole=True)
        check_number("window", window, 1, 15, whole=True)
        check_number("landmark", landmark, 1, 1024, whole=True)
        if window % 2 == 0:
            raise ValueError(f"window {window!r}: not an odd number")
        self.sides, self.prefix = (int(cells), int(window), int(landmark)), shape.num_prefix_tokens

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if torch.jit.is_scripting():
            return _pooled(q, k, v, self.prefix, grid, self.sides)
        return pooled_attention(q, k, v, self.prefix, grid, self.sides)


@torch.fx.wrap
def pooled_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix: int, grid: tuple[int, int], sides: tuple[int, int, int]
) -> Tensor:
    """See `Pooled`; [B, H, N, K] each. Logits and weights are at least fp32.

    Args:
        sides: cells, window, landmark.
    """
    with without_autocast(v):
        return _pooled(q, k, v, prefix, grid, sides)


def _pooled(q: Tensor, k: Tensor, v: Tensor, prefix: int, grid: tuple[int, int], sides: tuple[int, int, int]) -> Tensor:
    cells, window, landmark = sides
    near_q, near_k, near_v = q[:, :, prefix:], k[:, :, prefix:], v[:, :, prefix:]
    first_k, first_v = wide(k[:, :, :prefix]), wide(v[:, :, :prefix])
    pooled, values, shifts, parts = cells_of(near_q, near_k, near_v, first_k, grid, cells, -(-max(grid) // landmark))
    block = -(-grid[0] // cells), -(-grid[1] // cells)
    size = block[0] * block[1]
    bias = parts + by_token(shifts[..., None, None].expand(-1, -1, -1, size, -1), grid, cells).squeeze(-1)
    known = by_token(pooled.to(v.dtype).unsqueeze(-2).expand(-1, -1, -1, size, -1), grid, cells)

    pooled, values = torch.cat([first_k, pooled], 2), torch.cat([first_v, values], 2)
    far, logits = attended(near_q, pooled, values, F.pad(shifts, [prefix, 0]), v)
    patches = near(near_q, near_k, near_v, far, logits, window, grid, known, bias.unsqueeze(-1), block)
    return exactly(q, k, v, patches, prefix)


def cells_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    grid: tuple[int, int],
    cells: int,
    landmarks: int,
    nothing: float = NOTHING,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k_c, v_c, what is added to q k_c^T / sqrt(K) for a logit, and log a_n of each patch. See `Pooled`.

    Args:
        q, k, v: of patches, [B, H, rows * columns, K].
        first: keys of the prefix tokens, at least fp32.

    Returns:
        [B, H, cells, K] twice, [B, H, cells], [B, H, rows * columns], at least fp32.
    """
    about, scale = readers(q, k, first, grid, cells, landmarks), q.shape[-1] ** -0.5
    if not torch.jit.is_scripting():
        if kernels_serve(q, k, v):
            return kernels.pool(k, v, about, cells, grid)
    keys, values = by_cell(wide(k), grid, cells), by_cell(wide(v), grid, cells)
    there = by_cell(torch.ones_like(k[:1, :1, :, :1]), grid, cells).squeeze(-1) > 0
    logits = ((keys * about.unsqueeze(-2)).sum(-1) * scale).masked_fill(~there, nothing)
    total = logits.logsumexp(-1, keepdim=True)
    parts = (logits - total).unsqueeze(-1)
    pooled, values = (parts.exp() * keys).sum(-2), (parts.exp() * values).sum(-2)
    shifts = total.squeeze(-1) - (pooled * about).sum(-1) * scale
    return pooled, values, shifts, by_token(parts, grid, cells).squeeze(-1)


def readers(
    q: Tensor,
    k: Tensor,
    first: Tensor,
    grid: tuple[int, int],
    cells: int,
    landmarks: int,
    nothing: float = NOTHING,
) -> Tensor:
    """m_c: the mean landmark that attends to each cell, [B, H, cells, K]. See `cells_of` for the arguments."""
    scale, prefix = q.shape[-1] ** -0.5, first.shape[2]
    marks, queries = means(q, grid, landmarks, first.dtype)
    keys, patches = means(k, grid, cells, first.dtype)
    shifts = patches.clamp_min(1).log().masked_fill(patches == 0, nothing).transpose(-2, -1)
    logits = marks @ torch.cat([first, keys], 2).transpose(-2, -1) * scale + F.pad(shifts, [prefix, 0])
    logits = (logits - logits.logsumexp(-1, keepdim=True))[..., prefix:].masked_fill(queries == 0, nothing)
    return logits.softmax(-2).transpose(-2, -1) @ marks


def means(x: Tensor, grid: tuple[int, int], sides: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Means of the patches of sides x sides parts of the grid [B, H, parts, K], how many they are [1, 1, parts, 1]."""
    size = by_cell(torch.ones_like(x[:1, :1, :, :1]), grid, sides).sum(-2, dtype=dtype)
    return by_cell(x, grid, sides).sum(-2, dtype=dtype) / size.clamp_min(1), size


def attended(q: Tensor, keys: Tensor, values: Tensor, shifts: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention to `keys`, like v, and the logarithm of its normaliser, [B, H, rows * columns, 1]."""
    if not torch.jit.is_scripting():
        if kernels_serve(q, v, v):
            out, total = kernels.far(q, keys, values, shifts)
            return out, total.unsqueeze(-1)
    logits = times(factor(q, v), factor(keys, v).transpose(-2, -1)) * q.shape[-1] ** -0.5 + shifts.unsqueeze(-2)
    return times(factor(logits.softmax(-1), v), factor(values, v)).to(v.dtype), logits.logsumexp(-1, keepdim=True)


def kernels_serve(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether kernels take the place of torch's products: on a GPU, and where what they cost is counted."""
    return (counted(v) or preferred(v) == "triton") and kernels.serves(q, k, v)
