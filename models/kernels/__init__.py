"""Fused linear attention as custom operators of torch: opaque to compilers, counted as FLOPs, differentiable once.

Triton itself is imported at the first launch, so that importing the package needs no Triton.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# Operator's class -> map of the kernels. What else a map takes is said by `split`.
MAPS = {"Elu1": "ELU1", "Magnitude": "ELU1", "MALA": "ELU1", "InLine": "ELU1", "ReLU": "RELU", "Focused": "FOCUSED",
        "FocusedLearned": "FOCUSED", "Exp": "EXP", "Hedgehog": "HEDGEHOG"}  # fmt: skip
INSTALLED = find_spec("triton") is not None  # torch brings it along where it has kernels for GPUs, but on Windows
MAX_HEAD_DIM = 128
WHOLE_POWERS = range(1, 17)  # of focused: so many products in place of a logarithm and an exponential
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FEW = 8  # shares, which the second pass adds up by itself
PROGRAMS = 512  # at least, where tokens suffice: about four for each multiprocessor of an H100


def serves(name: str, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels compute what operator `name` asks, for tensors like these.

    Not fp16, which has not the range of a state over many tokens.
    """
    return (
        name in MAPS and q.shape[-1] <= _widest(q.device) and q.shape == k.shape == v.shape
        and all(x.dtype in DTYPES and x.dtype != torch.float16 for x in (q, k, v))
    )  # fmt: skip


@torch.compiler.assume_constant_result
def _widest(device: torch.device) -> int:
    """The largest head dimension; before Hopper a warp's registers do not hold backward's operands above 64."""
    return MAX_HEAD_DIM if device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0) else 64


def attend(
    name: str, q: Tensor, k: Tensor, v: Tensor, weights: list[Tensor], numbers: list[float]
) -> tuple[Tensor, Tensor]:
    """See `models.operators.core.attend`. `serves` must hold."""
    kind = MAPS[name]
    power = shift = q_map = k_map = None
    exponent = 0
    if kind == "FOCUSED" and weights:
        power = weights[0].flatten().float()
    elif kind == "FOCUSED":
        exponent = int(numbers[0]) if numbers[0] in WHOLE_POWERS else 0
        power = None if exponent else q.new_full((q.shape[1],), numbers[0], dtype=torch.float32)
    elif kind == "EXP":
        shift = k.detach().amax(-2).float() * k.shape[-1] ** -0.25
    elif kind == "HEDGEHOG":
        q_map, k_map = (x.float() for x in weights)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *weights))
    out, norm, _ = torch.ops.unsoftmax.linear_attention(q, k, v, kind, exponent, keep, power, shift, q_map, k_map)
    return out, norm.unsqueeze(-1)


@torch.library.custom_op("unsoftmax::linear_attention", mutates_args=())
def _linear_attention(
    q: Tensor, k: Tensor, v: Tensor, kind: str, exponent: int, keep: bool,
    power: Tensor | None, shift: Tensor | None, q_map: Tensor | None, k_map: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """out [B, H, N, K]; in fp32 norm [B, H, N] and sums [B, H, halves, K + 1, K]: state and, last row, total.

    Args:
        q, k, v: [B, H, N, K], any strides.
        kind: of `MAPS`.
        exponent: FOCUSED's power where that is of `WHOLE_POWERS`; else 0.
        keep: whether the sums are asked for; without it they are empty, [0].
        power: [H] in fp32, of FOCUSED without `exponent`.
        shift: the largest scaled key of each column, [B, H, K] in fp32, of EXP.
        q_map, k_map: [H, K, K] in fp32, of HEDGEHOG.
    """
    from . import triton_attention as kernels

    B, H, N, K = q.shape
    q, k, v = map(_rows, (q, k, v))
    how, n = _how(kind, exponent, q, backward=False)
    out, norm, sums = _outputs(q, v, kind, keep=True)

    def launch(passes: str, sums: Tensor, parts: int) -> None:
        kernels.forward_kernel[B * H, n](
            q, k, v, q_map, k_map, power, shift, sums, out, norm, H, N, K**-0.25, *_strides(q, k, v, out), n, parts,
            **how(passes),
        )  # fmt: skip

    _in_two(launch, sums, n, keep)
    return out, norm, sums if keep else sums.new_empty(0)


def _in_two(launch: Callable[[str, Tensor, int], None], sums: Tensor, shares: int, keep: bool) -> None:
    """Both passes one after the other. What the shares add up to is left in `sums` if `keep`."""
    parts = sums if shares == 1 else sums.new_empty(*sums.shape[:2], shares, *sums.shape[2:])
    launch("FIRST", parts, shares)
    if shares > 1 and (keep or shares > FEW):
        torch.sum(parts, 2, out=sums)
        parts, shares = sums, 1
    launch("SECOND", parts, shares)


@_linear_attention.register_fake
def _(q, k, v, kind, exponent, keep, power, shift, q_map, k_map):
    return _outputs(q, v, kind, keep)


@torch.library.custom_op("unsoftmax::linear_attention_backward", mutates_args=())
def _backward(
    dy: Tensor, dnorm: Tensor, q: Tensor, k: Tensor, v: Tensor, norm: Tensor, sums: Tensor, kind: str, exponent: int,
    power: Tensor | None, shift: Tensor | None, q_map: Tensor | None, k_map: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv [B, H, N, K]; derivatives by the power [2, B, H] and by both maps [2, B, H, K, K], or empty."""
    from . import triton_attention as kernels

    B, H, N, K = q.shape
    q, k, v, dy = map(_rows, (q, k, v, dy))
    dnorm = dnorm.contiguous()
    how, n = _how(kind, exponent, q, backward=True)
    dq, dk, dv, dpower, dmap = _derivatives(q, k, v, kind, power, n)

    def launch(passes: str, dsums: Tensor, parts: int) -> None:
        kernels.backward_kernel[B * H, n](
            q, k, v, dy, norm, dnorm, q_map, k_map, power, shift, sums, dsums, dq, dk, dv, dpower, dmap,
            H, N, K**-0.25, *_strides(q, k, v, dy, dq, dk), n, parts, **how(passes),
        )  # fmt: skip

    if n == 1:
        launch("BOTH", sums, 1)  # which has no use for memory of its own
    else:
        _in_two(launch, torch.empty_like(sums), n, keep=False)
    return dq, dk, dv, *(x.sum(3) if x.numel() else x for x in (dpower, dmap))


@_backward.register_fake
def _(dy, dnorm, q, k, v, norm, sums, kind, exponent, power, shift, q_map, k_map):
    dq, dk, dv, dpower, dmap = _derivatives(q, k, v, kind, power, 1)
    return dq, dk, dv, *(x.squeeze(3) if x.numel() else x for x in (dpower, dmap))


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, ctx.kind, ctx.exponent, _, *maps = inputs
    ctx.save_for_backward(q, k, v, *output[1:], *maps)
    ctx.set_materialize_grads(True)
    ctx.mark_non_differentiable(*output[2:])


def _gradients(ctx: Any, dy: Tensor, dnorm: Tensor, _sums: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, norm, sums, power, shift, q_map, k_map = ctx.saved_tensors
    dq, dk, dv, dpower, dmap = torch.ops.unsoftmax.linear_attention_backward(
        dy, dnorm, q, k, v, norm, sums, ctx.kind, ctx.exponent, power, shift, q_map, k_map
    )
    of_power = dpower.sum((0, 1)) if power is not None else None
    of_maps = dmap.sum(1) if q_map is not None else (None, None)
    return dq, dk, dv, None, None, None, of_power, None, *of_maps


_linear_attention.register_autograd(_gradients, setup_context=_setup)


@register_flop_formula(torch.ops.unsoftmax.linear_attention)
def _forward_flops(q_shape: tuple, k_shape: tuple, v_shape: tuple, kind: str, *_: Any, **__: Any) -> int:
    B, H, N, K = q_shape
    halves = 2 if kind == "HEDGEHOG" else 1
    return 2 * B * H * N * K * (halves * (2 * K + 1) + (2 * K if kind == "HEDGEHOG" else 0))


@register_flop_formula(torch.ops.unsoftmax.linear_attention_backward)
def _backward_flops(dy_shape: tuple, dnorm_shape: tuple, q_shape: tuple, *shapes: Any, **__: Any) -> int:
    B, H, N, K = q_shape
    kind = next(x for x in shapes if isinstance(x, str))
    halves = 2 if kind == "HEDGEHOG" else 1
    return 2 * B * H * N * K * (halves * (4 * K + 2) + (6 * K if kind == "HEDGEHOG" else 0))


def moved_bytes(q: Tensor, backward: bool) -> int:
    """The least that attention can move: q, k, v, y once; in backward q, k, v, dy, dq, dk, dv once."""
    return q.numel() * q.element_size() * (4 + 7 * backward)


def _outputs(q: Tensor, v: Tensor, kind: str, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    B, H, N, K = q.shape
    new = {"device": q.device, "dtype": torch.float32}
    sums = torch.empty((B, H, 2 if kind == "HEDGEHOG" else 1, K + 1, K) if keep else (0,), **new)
    return _like(v), torch.empty(B, H, N, **new), sums


def _derivatives(
    q: Tensor, k: Tensor, v: Tensor, kind: str, power: Tensor | None, shares: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, H, _, K = q.shape
    new = {"device": q.device, "dtype": torch.float32}
    dpower = torch.empty((2, B, H, shares) if power is not None else (0,), **new)
    dmap = torch.empty((2, B, H, shares, K, K) if kind == "HEDGEHOG" else (0,), **new)
    return _like(q), _like(k), _like(v), dpower, dmap


def _like(x: Tensor) -> Tensor:
    """[B, H, N, K], in memory as the projection after attention wants it: [B, N, H, K]."""
    B, H, N, K = x.shape
    return x.new_empty(B, N, H, K).transpose(1, 2)


def _rows(x: Tensor) -> Tensor:
    """`x` where the values of a token's head lie side by side; else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _how(kind: str, exponent: int, q: Tensor, backward: bool) -> tuple[Callable[[str], dict[str, Any]], int]:
    """The constants of a launch by its passes, and in how many shares a head is taken."""
    from . import triton_attention as kernels

    B, H, N, K = q.shape

    def how(passes: str) -> dict[str, Any]:
        given = {"K": K, "MAP": getattr(kernels, kind), "POWER": exponent, "PASSES": getattr(kernels, passes)}
        return given | constants(kind, exponent, K, q.dtype, backward, passes)

    return how, _shares(B * H, N)


def constants(kind: str, exponent: int, K: int, dtype: torch.dtype, backward: bool, passes: str) -> dict[str, Any]:
    """Sizes of blocks, warps, stages.

    The best of those measured on an H100 at K = 64. Nothing is tuned while a model runs.
    """
    BK = max(32, 1 << (K - 1).bit_length())
    light = BK <= 64 and dtype != torch.float32
    BN = 64 if light and not backward else 32
    deep = light and (kind != "HEDGEHOG" if backward else kind == "FOCUSED" or (kind, passes) == ("HEDGEHOG", "FIRST"))
    return {"BK": BK, "BN": BN, "num_warps": 4 if light else 8, "num_stages": 3 if deep else 2}


def _shares(heads: int, N: int) -> int:
    """In how many parts a head's tokens are taken: 1 where heads fill a GPU; up to `FEW` of 64 tokens, more of 128."""
    wanted = -(-PROGRAMS // heads)
    return max(1, min(wanted, N // 128, 64), min(wanted, N // 64, FEW))
