"""Operators between the weighted mean of the values and their plain mean, by how large the normaliser is."""

import torch
from torch import Tensor

from .core import Operator, wide
from .feature_maps import alike, elu1, elu1_vjp

torch.fx.wrap("wide")  # a leaf of a graph, because it looks at a dtype


class Magnitude(Operator):
    """`quotient` of elu(x) + 1, and what of phi(q) the quotient cancels: z = phi(q) mean_n phi(k_n) / sqrt(K)."""

    @staticmethod
    def features(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return elu1(q), elu1(k)

    features_vjp = staticmethod(alike(elu1_vjp))

    def parts(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted mean [B, H, N, K], plain mean [B, H, 1, K] and z [B, H, N, 1], in at least fp32."""
        v = wide(v)  # what the two means differ by is smaller than they are
        out, norm = self.quotient(q, k, v)
        return out, v.mean(-2, keepdim=True), norm * (q.shape[-1] ** -0.5 / k.shape[-2])


class MALA(Magnitude):
    """Magnitude-aware linear attention, arXiv 2507.00698: weights beta phi(q) phi(k_n)^T - gamma, F = K.

    beta = 1 + 1 / z and gamma = z / N with the scale of the authors' code, so weights sum to 1 and a larger query
    sharpens them; they may be negative. With y the weighted mean of the values: y + z (y - mean v). The authors' gate
    and convolution are the additions `gate` and `local_conv5`.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: tuple[int, int]) -> Tensor:
        weighted, mean, z = self.parts(q, k, v)
        return (weighted + z * (weighted - mean)).to(v.dtype)


class InLine(Magnitude):
    """Injective linear attention, arXiv 2412.06590, equation 5: weights phi(q) phi(k_n)^T - (z - 1) / N, F = K.

    Subtraction in place of division, with the scale of the authors' code, so weights sum to 1 and no two queries share
    theirs; they may be negative. With y the weighted mean of the values: mean v + z (y - mean v). The paper's local
    residual is the addition `local_dynamic`.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: tuple[int, int]) -> Tensor:
        weighted, mean, z = self.parts(q, k, v)
        return (mean + z * (weighted - mean)).to(v.dtype)
