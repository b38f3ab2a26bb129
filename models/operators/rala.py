"""Rank-augmented linear attention, arXiv 2411.07635."""

from torch import Tensor, nn

from .core import Operator, Shape
from .feature_maps import elu1


class RALA(Operator):
    """phi(k_n) a_n with a = N softmax_n(mean phi(q) phi(k_n)^T / sqrt(K)); the output times a linear map of x. F = K.

    phi(x) = elu(x) + 1. The weights a_n raise the rank of the state (equation 6), the modulation that of the output
    (equation 9). The modulation starts as 1. The authors' convolution is the addition `local_conv5`.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.modulation = constant_linear(shape.width, shape.num_heads * shape.head_dim, 1.0)

    @staticmethod
    def features(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = elu1(q), elu1(k)
        alike_BHN1 = k @ q.mean(-2, keepdim=True).transpose(-2, -1) * q.shape[-1] ** -0.5
        return q, k * alike_BHN1.softmax(-2) * k.shape[-2]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: tuple[int, int]) -> Tensor:
        out = self.quotient(q, k, v)[0]
        B, H, N, K = out.shape
        return out * self.modulation(x).reshape(B, N, H, K).transpose(1, 2)


def constant_linear(inputs: int, outputs: int, value: float) -> nn.Linear:
    """A linear map that starts as `value` whatever its input is."""
    linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
    nn.init.zeros_(linear.weight)
    nn.init.constant_(linear.bias, value)
    return linear
