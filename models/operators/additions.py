"""What is added to an operator, and starts as the identity: a converted model means the same with it as without.

`Neighborhood` alone, which has its own file, starts nearer to softmax than the operator.

An addition stands at a `site` of the attention: `queries_keys` before the operator, `values` before it, `attention`
beside it, or `output` after it. All it does comes through `forward`, so that ZeRO 3 gathers its parameters.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import convolution
from .core import Shape, preferred, wide
from .rala import constant_linear

torch.fx.wrap("wide")  # a leaf of a graph, because it looks at a dtype


class Temperature(nn.Module):
    """A learned temperature for each head: q k^T is multiplied by exp(t), q and k each by exp(t / 2). Starts as 1."""

    site, needs_grid = "queries_keys", False

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(shape.num_heads, 1, 1))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """[B, H, N, K] each -> [B, H, N, K] each."""
        scale = (wide(self.log_scale) / 2).exp()
        return (q * scale).to(q.dtype), (k * scale).to(k.dtype)


class Gate(nn.Module):
    """out * 2 sigmoid(x W + b), as timm's `gated` attention and arXiv 2505.06708. Starts as 1."""

    site, needs_grid = "output", False

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate = constant_linear(shape.width, shape.num_heads * shape.head_dim, 0.0)

    def forward(self, out: Tensor, v: Tensor, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, H, N, K] -> [B, H, N, K]."""
        B, H, N, K = out.shape
        return out * (2 * self.gate(x).sigmoid()).reshape(B, N, H, K).transpose(1, 2)


class Convolution(nn.Module):
    """A depthwise convolution over the patch grid, zero at first; prefix tokens have zero."""

    needs_grid = True

    def __init__(self, shape: Shape, size: int) -> None:
        super().__init__()
        self.prefix = shape.num_prefix_tokens
        self.weight = nn.Parameter(torch.zeros(shape.num_heads * shape.head_dim, 1, size, size))


class ValueConvolution(Convolution):
    """v + conv(v) takes the place of the values, as in JetViT, for the operator to read."""

    site = "values"

    def forward(self, v: Tensor, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, H, N, K] -> [B, H, N, K]."""
        return plus_convolved(None, v, self.weight, self.prefix, grid)


class LocalConvolution(Convolution):
    """out + conv(v), which the operator does not average, as in FLatten, arXiv 2308.00442, equation 8."""

    site = "output"

    def forward(self, out: Tensor, v: Tensor, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, H, N, K] -> [B, H, N, K]."""
        return plus_convolved(out, v, self.weight, self.prefix, grid)


class LocalDynamic(nn.Module):
    """out + conv(v) with 3 x 3 kernels that a small network makes of the mean token: InLine, arXiv 2412.06590, eq. 7.

    Its two layers are linear within each head. The second is zero at first.
    """

    site, needs_grid = "output", True

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        H, K, D = shape.num_heads, shape.head_dim, shape.width
        self.prefix = shape.num_prefix_tokens
        if D % H:
            raise ValueError(f"local_dynamic: {H} heads do not divide the width {D}")
        self.hidden = nn.utils.skip_init(nn.Conv1d, D, H * K, 1, groups=H)
        self.kernels = nn.utils.skip_init(nn.Conv1d, H * K, H * K * 9, 1, groups=H)
        bound = (D // H) ** -0.5
        drawn = torch.rand(self.hidden.weight.shape, generator=torch.Generator().manual_seed(0), device="cpu")
        with torch.no_grad():  # as torch draws it, but from a seed of its own
            self.hidden.weight.copy_((2 * drawn - 1) * bound)
        for zero in (self.hidden.bias, self.kernels.weight, self.kernels.bias):
            nn.init.zeros_(zero)

    def forward(self, out: Tensor, v: Tensor, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, H, N, K] -> [B, H, N, K]."""
        kernels = self.kernels(F.gelu(self.hidden(x.mean(1).unsqueeze(-1))))
        maps = as_maps(v, self.prefix, grid)
        B, C, rows, columns = maps.shape
        one = maps.reshape(1, B * C, rows, columns)  # each image has kernels of its own
        one = F.conv2d(one, kernels.reshape(B * C, 1, 3, 3).to(maps.dtype), padding=1, groups=B * C)
        return out + as_tokens(one.reshape(B, C, rows, columns), v, self.prefix)


@torch.fx.wrap
def plus_convolved(
    base_BHNK: Tensor | None, v_BHNK: Tensor, weight: Tensor, prefix: int, grid: tuple[int, int]
) -> Tensor:
    """base + conv(v), [B, H, N, K]; v + conv(v) without a base. Kernels where `implementation_of` has them."""
    if not torch.jit.is_scripting():
        if preferred(v_BHNK) == "triton" and convolution.serves(v_BHNK, weight, base_BHNK):
            return convolution.convolve(v_BHNK, weight, prefix, grid, base_BHNK)
    maps = as_maps(v_BHNK, prefix, grid)
    maps = F.conv2d(maps, weight.to(maps.dtype), padding=weight.shape[-1] // 2, groups=maps.shape[1])
    return (v_BHNK if base_BHNK is None else base_BHNK) + as_tokens(maps, v_BHNK, prefix)


def as_maps(x_BHNK: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
    """Patches as channels x rows x columns, [B, H K, rows, columns]; prefix tokens stay behind."""
    B, H, _, K = x_BHNK.shape
    patches = x_BHNK[:, :, prefix:].transpose(-2, -1)
    return patches.reshape(B, H * K, grid[0], grid[1])


def as_tokens(maps: Tensor, like_BHNK: Tensor, prefix: int) -> Tensor:
    """[B, H K, rows, columns] -> [B, H, N, K] in the dtype of `like_BHNK`; prefix tokens have zero."""
    B, H, _, K = like_BHNK.shape
    patches = maps.reshape(B, H, K, -1).transpose(-2, -1)
    return F.pad(patches, [0, 0, prefix, 0]).to(like_BHNK.dtype)
