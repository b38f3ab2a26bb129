"""What every operator is made of: phi(q) (phi(k)^T v) / (phi(q) sum_n phi(k_n)), arXiv 2006.16236, equation 5.

Shapes: B images, N tokens, H heads, K head dimension, F feature dimension.

`attend` is the one place where q, k and v meet, so an implementation for a device goes there. It knows a feature map
by name, because torch.fx takes names into a graph and no functions.
"""

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .. import kernels

EPS = 1e-6  # floor of the normaliser; reached where a token has no feature, as with relu, or all features are tiny
NARROW = (torch.bfloat16, torch.float16)  # what `wide` makes fp32
BLOCK = 1 << 20  # bytes of fp32 features for each thread of a CPU: more leaves its cache, and the heap


@dataclass(frozen=True)
class Shape:
    """What an operator or an addition is built for."""

    width: int  # D
    num_heads: int  # H
    head_dim: int  # K
    num_prefix_tokens: int = 0  # which stand before the patches and have no place in their grid


def wide(x: Tensor) -> Tensor:
    """`x` in at least fp32."""
    if x.dtype == torch.bfloat16 or x.dtype == torch.float16:
        return x.float()
    return x


def linear_attention(q_BHNF: Tensor, k_BHNF: Tensor, v_BHNK: Tensor) -> Tensor:
    """Non-causal linear attention in O(N F K): phi(q) (phi(k)^T v) / (phi(q) sum_n phi(k_n)).

    The F x K state and the normaliser accumulate in at least fp32; no N x N tensor is made.

    Args:
        q_BHNF: phi(q), non-negative, [B, H, N, F].
        k_BHNF: phi(k), non-negative, [B, H, N, F].
        v_BHNK: values, [B, H, N, K].

    Returns:
        [B, H, N, K] in the dtype of `v_BHNK`. Equation 5 of arXiv 2006.16236.
    """
    with without_autocast(v_BHNK):
        return _quotient(q_BHNF, k_BHNF, v_BHNK)[0]


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Autocast would take matrix products back to bf16. The meta device, where FLOPs are counted, has none."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def rounds(v: Tensor) -> bool:
    """Whether features are rounded to the dtype of the values `v` for the products, as kernels do: bf16 on a GPU.

    A CPU's product of bf16 gives bf16, and without instructions for it takes many times as long as one of fp32. fp16
    has not the range of a state over many tokens.
    """
    return v.is_cuda and v.dtype == torch.bfloat16


class _Product(torch.autograd.Function):
    """x @ y of bf16, summed in fp32 and returned so. torch has it for GPUs, without a derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        if x.device.type == "cpu":
            return x.float() @ y.float()
        out = torch.bmm(x.flatten(0, -3), y.flatten(0, -3), out_dtype=torch.float32)
        return out.reshape(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, d: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        d = d.to(x.dtype)
        return product(d, y.transpose(-2, -1)).to(x.dtype), product(x.transpose(-2, -1), d).to(y.dtype)


def product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y in at least fp32, of factors that are both bf16 or both wider."""
    return _Product.apply(x, y) if x.dtype == torch.bfloat16 else x @ y


def _quotient(
    q_BHNF: Tensor, k_BHNF: Tensor, v_BHNK: Tensor, eps: float = EPS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output [B, H, N, K] in the dtype of v; in fp32 normaliser [B, H, N, 1], state [B, H, F, K], its sum [B, H, F]."""
    if not torch.jit.is_scripting():
        if rounds(v_BHNK) and not torch.is_grad_enabled():  # autograd's dq would be the difference of two rounded parts
            return _rounded_quotient(q_BHNF, k_BHNF, v_BHNK)
    q, k, v = wide(q_BHNF), wide(k_BHNF), wide(v_BHNK)
    state_BHFK = k.transpose(-2, -1) @ v
    total_BHF = k.sum(dim=-2)
    norm_BHN1 = q @ total_BHF.unsqueeze(-1)
    out = ((q @ state_BHFK) / norm_BHN1.clamp_min(eps)).to(v_BHNK.dtype)
    return out, norm_BHN1, state_BHFK, total_BHF


def _rounded_quotient(f: Tensor, g: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `_quotient`; makes no tensor of fp32 as large as v."""
    f, g = f.to(v.dtype), g.to(v.dtype)
    state, total = product(g.transpose(-2, -1), v), g.sum(-2, dtype=torch.float32)
    norm = _norm(f, total)
    out, floor = f @ state.to(v.dtype), norm.clamp_min(EPS)
    return out.div_(floor), norm, state, total


def _norm(f: Tensor, total: Tensor) -> Tensor:
    """f total, [B, H, N, 1]. With f in bf16, of three numbers of bf16 whose sum is total."""
    if f.dtype != torch.bfloat16:
        return _products(f, total.unsqueeze(-2))
    first = total.to(f.dtype)
    second = (total - first).to(f.dtype)
    third = (total - first - second).to(f.dtype)
    return product(f, torch.stack((first, second, third), -1)).sum(-1, keepdim=True)


def _products(x: Tensor, y: Tensor) -> Tensor:
    """Inner products of rows, [..., 1]. A matrix times one column takes a CPU as long as times 64 of them."""
    return (x * y).sum(dim=-1, keepdim=True)


def in_blocks(
    call: Callable, tensors: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """call(tensors, weights), on a CPU a block of heads after the other, so that no tensor of fp32 is large.

    Args:
        call: takes and returns tensors of which each head of an image has its own, [B, H, ...], and of which each head
            has its own, [H, ...].
        tensors, weights: the third of `tensors` is v.

    Returns:
        What `call` does, to the bit: no block is one head of one image, whose products torch takes another way, and
        sums over tokens and images at once, as for weights [H, 1, .], are not made of blocks in fp32.
    """
    v = tensors[2]
    B, H = v.shape[:2]
    exact = v.dtype not in NARROW
    if (
        _counting
        or v.device.type != "cpu"
        or any(w.dim() != 3 or w.shape[0] != H or (exact and w.shape[1] == 1) for w in weights)
    ):
        return call(tensors, weights)
    heads, images = (H, B) if weights else (B * H, 1)  # with weights a block has all images, whose gradients are added
    most = heads if images > 1 else heads // 2
    n = min(most, -(-v.numel() * max(v.element_size(), 4) // (BLOCK * torch.get_num_threads())))
    if n <= 1:
        return call(tensors, weights)
    dim = 1 if weights else 0
    if not weights:
        tensors = [x.flatten(0, 1).unsqueeze(1) for x in tensors]
    blocks = zip(*(x.tensor_split(n, dim) for x in tensors), strict=True)
    parts = zip(*(x.tensor_split(n) for x in weights), strict=True) if weights else [()] * n
    results, of_weights = zip(*itertools.starmap(call, zip(blocks, parts, strict=True)), strict=True)
    whole = [torch.cat(x, dim) for x in zip(*results, strict=True)]
    if not weights:
        whole = [x.reshape(B, H, *x.shape[2:]) for x in whole]
    return whole, [torch.cat(x) for x in zip(*of_weights, strict=True)]


def _forward(
    features: Callable, q: Tensor, k: Tensor, v: Tensor, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_quotient` of the features of q and k."""

    def call(tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple]:
        q, k, v = tensors
        return _quotient(*features(q, k, *weights), v), ()

    with without_autocast(v):
        return tuple(in_blocks(call, (q, k, v), weights)[0])


class _Attend(torch.autograd.Function):
    """`_forward`. Backward keeps q, k, v and the state, and makes the features again.

    With features f = phi(q), g = phi(k), state S = g^T v, sum z = g^T 1, normaliser d = f z, output y = f S / d, and
    the gradient dy, each token's u = dy / d gives

        df = u S^T - (f . u S^T / d) z,  dS = f^T u,  dz = -f^T (f . u S^T / d),  dg = v dS^T + dz,  dv = g dS.

    S, z and d are outputs too, with gradients of their own, which makes second derivatives right.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        features: Callable, vjp: Callable, q: Tensor, k: Tensor, v: Tensor, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        return _forward(features, q, k, v, weights)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        _, ctx.vjp, q, k, v, *weights = inputs
        ctx.save_for_backward(q, k, v, *output[2:], *weights)

    @staticmethod
    def backward(ctx, dy: Tensor, dd: Tensor, dS: Tensor, dz: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, state_BHFK, total_BHF, *weights = ctx.saved_tensors
        with without_autocast(v):
            (dq, dk, dv), d_weights = in_blocks(
                partial(_backward, ctx.vjp), (q, k, v, state_BHFK, total_BHF, dy, dd, dS, dz), weights
            )
        return None, None, dq, dk, dv, *d_weights


def _backward(
    vjp: Callable, tensors: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[tuple[Tensor, Tensor, Tensor], Sequence[Tensor]]:
    """dq, dk, dv; and what the weights get. See `_Attend`."""
    q, k, v, state_BHFK, total_BHF, dy, dd, dS, dz = tensors
    (f, g), pullback = vjp(q, k, *weights)
    kind = v.dtype if rounds(v) else state_BHFK.dtype  # of the factors of products
    total_BH1F = total_BHF.unsqueeze(-2)
    f_rounded, g_rounded = f.to(kind), g.to(kind)
    norm = _norm(f_rounded, total_BHF)
    floor = norm.clamp_min(EPS)
    u = (dy / floor).to(kind)
    df = product(u, state_BHFK.to(kind).transpose(-2, -1))
    dd = dd - _products(f, df) / floor * (norm >= EPS)
    df = torch.addcmul(df, dd, total_BH1F)
    dS = (dS + product(f_rounded.transpose(-2, -1), u)).to(kind)
    dz = dz.unsqueeze(-2) + (f * dd).sum(-2, keepdim=True)
    dg = product(v.to(kind), dS.transpose(-2, -1)) + dz
    dv = (g_rounded @ dS).to(v.dtype)
    dq, dk, *d_weights = pullback((df, dg))
    return (dq, dk, dv), d_weights


@torch.fx.wrap
def attend(
    name: str, q_BHNK: Tensor, k_BHNK: Tensor, v_BHNK: Tensor, weights: list[Tensor], numbers: list[float]
) -> tuple[Tensor, Tensor]:
    """`linear_attention` of the features called `name`, and its normaliser.

    Args:
        name: of the `Operator` whose `features` are meant.
        weights: what `features` takes after q and k.
        numbers: and after these.

    Returns:
        [B, H, N, K] in the dtype of `v_BHNK`, and phi(q) sum_n phi(k_n) [B, H, N, 1] in at least fp32.
    """

    return IMPLEMENTATIONS[implementation_of(name, q_BHNK, k_BHNK, v_BHNK)](
        name, q_BHNK, k_BHNK, v_BHNK, weights, numbers
    )


def _with_torch(
    name: str, q: Tensor, k: Tensor, v: Tensor, weights: list[Tensor], numbers: list[float]
) -> tuple[Tensor, Tensor]:
    def features(q: Tensor, k: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return FEATURES[name](q, k, *weights, *numbers)

    def vjp(q: Tensor, k: Tensor, *weights: Tensor) -> tuple[tuple[Tensor, Tensor], Callable]:
        if own := FEATURES_VJP.get(name):
            return own(q, k, *weights, *numbers)
        return torch.func.vjp(features, q, k, *weights)

    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        if v.device.type == "cpu":  # of strided ones torch 2.15 compiles a backward of `Focused` that spoils memory
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        with without_autocast(v):  # a compiler chooses by itself what it keeps for backward
            return _quotient(*features(q, k, *weights), v)[:2]
    if torch.is_grad_enabled():
        return _Attend.apply(features, vjp, q, k, v, *weights)[:2]
    return _forward(features, q, k, v, weights)[:2]


def _quadratic(
    name: str, q: Tensor, k: Tensor, v: Tensor, weights: list[Tensor], numbers: list[float]
) -> tuple[Tensor, Tensor]:
    """All N x N weights."""
    with without_autocast(v):
        f, g = map(wide, FEATURES[name](q, k, *weights, *numbers))
        products = f @ g.transpose(-2, -1)
        norm = products.sum(-1, keepdim=True)
        return (products @ wide(v) / norm.clamp_min(EPS)).to(v.dtype), norm


# Of `attend`: the formula, torch's matrix products, and fused kernels.
IMPLEMENTATIONS: dict[str, Callable] = {"reference": _quadratic, "torch": _with_torch, "triton": kernels.attend}
_chosen: str | None = None  # by `implementation`


def implementation_of(name: str, q: Tensor, k: Tensor, v: Tensor) -> str:
    """The implementation for tensors like these: kernels on a GPU, else torch; or what `implementation` says.

    Where kernels do not serve an operator, a head dimension or a dtype, torch does.
    """
    chosen = preferred(q)
    return "torch" if chosen == "triton" and not kernels.serves(name, q, k, v) else chosen


def preferred(x: Tensor) -> str:
    """`implementation_of` before it is known what kernels serve."""
    if _chosen is not None:
        return _chosen
    return "triton" if x.is_cuda and kernels.INSTALLED else "torch"


@contextmanager
def implementation(name: str) -> Iterator[None]:
    """Within it this process computes attention, and convolutions, by one of `IMPLEMENTATIONS`.

    Raises ValueError on another name.
    """
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {name!r}: unknown; choose one of {', '.join(IMPLEMENTATIONS)}")
    global _chosen
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


_counting = False


@contextmanager
def counting() -> Iterator[None]:
    """Within it what tensors without values cost is counted: windows as by kernels, and all heads at once."""
    global _counting
    before, _counting = _counting, True
    try:
        yield
    finally:
        _counting = before


def counted(x: Tensor) -> bool:
    """Whether what `x` costs is counted."""
    return _counting or x.is_meta


FEATURES: dict[str, Callable] = {}
FEATURES_VJP: dict[str, Callable] = {}  # where an operator has one of its own


class Operator(nn.Module):
    """What makes of q, k and v [B, H, N, K] an output [B, H, N, K], in O(N). This one is the quotient of `attend`.

    A new operator is a subclass with its own `features`, or its own `forward`, and a line in `OPERATORS`. Everything
    it does comes through `forward`, so that ZeRO 3 gathers its parameters.
    """

    needs_grid = False

    def __init__(self, shape: Shape) -> None:
        super().__init__()

    def __init_subclass__(cls) -> None:
        FEATURES[cls.__name__] = cls.features
        beside = next(vars(base) for base in cls.__mro__ if "features" in vars(base))
        if "features_vjp" in beside:
            FEATURES_VJP[cls.__name__] = cls.features_vjp
        cls.argument_names = tuple(inspect.signature(cls.features).parameters)[2:]

    @staticmethod
    def features(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """phi(q), phi(k) [B, H, N, F], non-negative, without autocast; in at least fp32, or rounded once, to bf16.

        What it takes after q and k are attributes of the operator: parameters, and then floats. Heads of q and k may be
        a block of all, with the same block of the parameters that are [H, ., .].
        """
        raise NotImplementedError

    # A static method `features_vjp` beside `features` takes the same and returns what `torch.func.vjp` does, in fewer
    # passes. It is made of differentiable operations, for second derivatives.

    @torch.jit.ignore
    def alignment_parameters(self) -> Iterator[nn.Parameter]:
        """Those that can be trained toward softmax attention's output, block by block; by default all."""
        return self.parameters()

    def own_features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """`features` with the attributes that it takes; TorchScript wants them written out."""
        return self.features(q, k)

    def quotient(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `attend`."""
        if torch.jit.is_scripting():
            f, g = self.own_features(q, k)
            out, norm, _, _ = _quotient(f, g, v)
            return out, norm
        return attend(type(self).__name__, q, k, v, *self.arguments())

    @torch.jit.ignore
    def arguments(self) -> tuple[list[Tensor], list[float]]:
        """What `features` takes after q and k: weights, numbers."""
        values = [getattr(self, name) for name in self.argument_names]
        return [x for x in values if not isinstance(x, float)], [x for x in values if isinstance(x, float)]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, H, N, K] each -> [B, H, N, K].

        Args:
            x: the tokens that attention reads, [B, N, D].
            grid: rows and columns of patches; (0, 0) where not `needs_grid`.
        """
        return self.quotient(q, k, v)[0]
