"""Operators that are a feature map alone: softmax(q k^T) is replaced by phi(q) phi(k)^T."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import WHOLE_POWERS
from .core import Operator, Shape, product, rounds, wide

TINY = 1e-30  # in place of zero where one divides or takes the logarithm


def elu1(x: Tensor) -> Tensor:
    """elu(x) + 1. In bf16 the sum would keep two digits of exp(-2) and nothing of exp(-7), so it is taken in fp32."""
    return F.elu(wide(x)).add_(1)


def elu1_vjp(x: Tensor, phi: Callable[[Tensor], Tensor] = elu1) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """`elu1`, computed by `phi`, and its pullback: the derivative is exp(x) = elu1(x) up to 0, and 1 from there."""
    a = phi(x)
    return a, lambda da: (da * a.clamp(max=1)).to(x.dtype)


def alike(vjp: Callable) -> Callable:
    """The `features_vjp` of an operator whose map of q and of k is one; `vjp` is the map's."""

    def both(q: Tensor, k: Tensor, *how: float) -> tuple[tuple[Tensor, Tensor], Callable]:
        (f, back_q), (g, back_k) = vjp(q, *how), vjp(k, *how)
        return (f, g), lambda d: (back_q(d[0]), back_k(d[1]))

    return both


def rounded_elu1(x: Tensor) -> Tensor:
    """`elu1`; where products take it in bf16, rounded once to that, and no tensor of fp32 is made."""
    if not torch.jit.is_scripting():
        if rounds(x):
            return x.clamp(max=0).exp() + x.relu()  # one of them is 1 or 0
    return elu1(x)


class Elu1(Operator):
    """phi(x) = elu(x) + 1, from "Transformers are RNNs", arXiv 2006.16236, equation 7. F = K, always positive."""

    @staticmethod
    def features(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return rounded_elu1(q), rounded_elu1(k)

    features_vjp = staticmethod(alike(partial(elu1_vjp, phi=rounded_elu1)))


class ReLU(Operator):
    """phi(x) = max(x, 0), as in EfficientViT, arXiv 2205.14756. F = K; a token may have no positive feature at all."""

    @staticmethod
    def features(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return torch.relu(q), torch.relu(k)  # exact in any dtype

    features_vjp = staticmethod(alike(lambda x: (torch.relu(x), lambda da: da.masked_fill(x <= 0, 0).to(x.dtype))))


def unit(x: Tensor, tiny: float = TINY) -> Tensor:
    """Rows divided by their maximum. Only what no factor of a row changes may be made of it: the maximum is held."""
    return x / x.amax(-1, keepdim=True).detach().clamp_min(tiny)


def with_norm_of(x: Tensor, y: Tensor, tiny: float = TINY) -> Tensor:
    """Rows of `x`, each scaled to the Euclidean norm of that of `y`."""
    norms = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    return x * (norms / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(tiny))


def log(x: Tensor, tiny: float = TINY) -> Tensor:
    """Of x >= 0. On a CPU exp(p log x) takes a fraction of the time of x ** p and its derivative."""
    return x.clamp_min(tiny).log()


def raised(x: Tensor, power: float, most: int = WHOLE_POWERS[-1]) -> Tensor:
    """x ** power, x >= 0. For a whole number up to `most` by products, which take a CPU less time than `log`."""
    exponent = int(power)
    if power != exponent or not 1 <= exponent <= most:
        return (power * log(x)).exp()
    bit = 1
    while 2 * bit <= exponent:
        bit = 2 * bit
    out = x
    while bit > 1:
        bit = bit // 2
        out = out * out
        if exponent & bit:
            out = out * x
    return out


def focused(x: Tensor, power: float) -> Tensor:
    """`Focused`'s map."""
    x = elu1(x)
    return with_norm_of(raised(unit(x), power), x)


def focused_vjp(x: Tensor, power: float) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """`focused` and its pullback.

    With a = elu1(x), u = a / max a, w = u^P and s = |u| / |w| it is f = s w max a, and as the maximum cancels

        da = P s u^(P-1) (df - (df . w / |w|^2) w) + (df . w / (|u| |w|)) u.
    """
    a = elu1(x)
    largest = a.amax(-1, keepdim=True).clamp_min(TINY)
    u = a / largest
    slope = raised(u, power - 1) if power > 1 else torch.ones_like(u)
    w = slope * u
    of_u, of_w = (torch.linalg.vector_norm(y, dim=-1, keepdim=True).clamp_min(TINY) for y in (u, w))

    def back(df: Tensor) -> Tensor:
        along = (df * w).sum(-1, keepdim=True) / of_w
        da = torch.addcmul(df, w, -along / of_w) * slope
        da = torch.addcmul(u * (along / of_u), da, power * of_u / of_w)
        return (da * a.clamp(max=1)).to(x.dtype)

    return w * (largest * of_u / of_w), back


class Focused(Operator):
    """phi(x) = x'^P |x'| / |x'^P| with x' = elu(x) + 1: the focusing of FLatten, arXiv 2308.00442, equation 5. F = K.

    It turns vectors toward their largest features, which sharpens attention. The paper's x' is relu(x).
    """

    def __init__(self, shape: Shape, power: float = 6) -> None:
        """Raises ValueError unless `power` is at least 1."""
        super().__init__(shape)
        check_number("power", power, 1, 64)
        self.power = float(power)

    @staticmethod
    def features(q: Tensor, k: Tensor, power: float) -> tuple[Tensor, Tensor]:
        return focused(q, power), focused(k, power)

    features_vjp = staticmethod(alike(focused_vjp))

    def own_features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.features(q, k, self.power)


class FocusedLearned(Operator):
    """`Focused` with a power for each head that is learned, from `power` on."""

    def __init__(self, shape: Shape, power: float = 6) -> None:
        """Raises ValueError unless `power` is at least 1."""
        super().__init__(shape)
        check_number("power", power, 1, 64)
        self.power = nn.Parameter(torch.full((shape.num_heads, 1, 1), float(power)))

    @staticmethod
    def features(q: Tensor, k: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
        q, k, power = elu1(q), elu1(k), wide(power)
        return with_norm_of((power * log(unit(q))).exp(), q), with_norm_of((power * log(unit(k))).exp(), k)

    def own_features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.features(q, k, self.power)


class Hedgehog(Operator):
    """phi(x) = (softmax(x W), softmax(-x W)), arXiv 2402.04347, equation 6, normalised over features. F = 2K.

    Each head learns a K x K map W for queries and one for keys, which start as the identity.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        maps = torch.eye(shape.head_dim).repeat(shape.num_heads, 1, 1)
        self.q_map, self.k_map = nn.Parameter(maps), nn.Parameter(maps.clone())

    @staticmethod
    def features(q: Tensor, k: Tensor, q_map: Tensor, k_map: Tensor) -> tuple[Tensor, Tensor]:
        q, k = turned(q, q_map), turned(k, k_map)
        return torch.cat([q.softmax(-1), (-q).softmax(-1)], -1), torch.cat([k.softmax(-1), (-k).softmax(-1)], -1)

    def own_features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.features(q, k, self.q_map, self.k_map)


def turned(x_BHNK: Tensor, maps_HKK: Tensor) -> Tensor:
    """Each head's matrix times its rows, in at least fp32."""
    if not torch.jit.is_scripting():
        if rounds(x_BHNK):
            return product(x_BHNK, maps_HKK.to(x_BHNK.dtype).expand(x_BHNK.shape[0], -1, -1, -1))
    return wide(x_BHNK) @ wide(maps_HKK)


class Exp(Operator):
    """phi(x) = exp(x / K^(1/4)), one feature for each dimension of softmax's q k^T / sqrt(K). F = K.

    phi(q) phi(k)^T is as it stands, up to a factor for each query, which the quotient cancels: what is taken from a
    feature of all keys is given to the queries, and then each query's largest feature is 1.
    """

    @staticmethod
    def features(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = wide(q) * q.shape[-1] ** -0.25, wide(k) * k.shape[-1] ** -0.25
        largest = k.amax(-2, keepdim=True).detach()
        q = q + largest
        return (q - q.amax(-1, keepdim=True).detach()).exp(), (k - largest).exp()


def check_number(name: str, value: float, low: float, high: float, whole: bool = False) -> None:
    """Raises ValueError unless `value` is a number from `low` to `high`, a whole one if so wanted."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name} {value!r}: not a number from {low} to {high}")
    if whole and int(value) != value:
        raise ValueError(f"{name} {value!r}: not a whole number")
