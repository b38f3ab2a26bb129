"""Fused linear attention as custom operators of torch: opaque to compilers, counted as FLOPs, differentiable once.

Triton itself is imported at the first launch, so that importing the package needs no Triton.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# Operator's class -> map of the kernels. What else a map takes is said by `split`.
MAPS = {"Elu1": "ELU1", "Magnitude": "ELU1", "MALA": "ELU1", "InLine": "ELU1", "ReLU": "RELU", "Focused": "FOCUSED",
        "FocusedLearned": "FOCUSED", "Exp": "EXP", "Hedgehog": "HEDGEHOG"}  # fmt: skip
MAX_HEAD_DIM = 128
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PROGRAMS = 512  # at least, where tokens suffice: about four for each multiprocessor of an H100


def serves(name: str, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels compute what operator `name` asks, for tensors like these."""
    return (
        name in MAPS and q.shape[-1] <= MAX_HEAD_DIM and q.shape == k.shape == v.shape
        and all(x.dtype in DTYPES for x in (q, k, v))
    )  # fmt: skip


def attend(
    name: str, q: Tensor, k: Tensor, v: Tensor, weights: list[Tensor], numbers: list[float]
) -> tuple[Tensor, Tensor]:
    """See `models.operators.core.attend`. `serves` must hold."""
    kind = MAPS[name]
    power = shift = q_map = k_map = None
    if kind == "FOCUSED":
        power = weights[0].flatten().float() if weights else q.new_full((q.shape[1],), numbers[0], dtype=torch.float32)
    elif kind == "EXP":
        shift = k.detach().amax(-2).float() * k.shape[-1] ** -0.25
    elif kind == "HEDGEHOG":
        q_map, k_map = (x.float() for x in weights)
    out, norm, _, _ = torch.ops.unsoftmax.linear_attention(q, k, v, kind, power, shift, q_map, k_map)
    return out, norm.unsqueeze(-1)


@torch.library.custom_op("unsoftmax::linear_attention", mutates_args=())
def _linear_attention(
    q: Tensor, k: Tensor, v: Tensor, kind: str,
    power: Tensor | None, shift: Tensor | None, q_map: Tensor | None, k_map: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """out [B, H, N, K], norm [B, H, N], state [B, H, halves, K, K] and total [B, H, halves, K], the last three in fp32.

    Args:
        q, k, v: [B, H, N, K], any strides.
        kind: of `MAPS`.
        power: [H] in fp32, of FOCUSED.
        shift: the largest scaled key of each column, [B, H, K] in fp32, of EXP.
        q_map, k_map: [H, K, K] in fp32, of HEDGEHOG.
    """
    from . import triton_attention as kernels

    B, H, N, K = q.shape
    q, k, v = map(_rows, (q, k, v))
    out, norm, state, total = _outputs(q, v, kind)
    how = _how(kind, q)
    grid, shares = (B * H, how["SHARES"]), (B, H, how["SHARES"], *state.shape[2:])
    # Without shares the sums are the kernel's own outputs.
    sums = (state, total) if how["SHARES"] == 1 else (state.new_empty(shares), total.new_empty(shares[:-1]))
    common = (H, N, K, K**-0.25)
    kernels.state_kernel[grid](k, v, k_map, power, shift, *sums, *common, *_strides(k, v), **how)
    if how["SHARES"] > 1:
        torch.sum(sums[0], 2, out=state)
        torch.sum(sums[1], 2, out=total)
    kernels.output_kernel[grid](
        q, q_map, power, shift, state, total, out, norm, *common, *_strides(q, out), **how
    )  # fmt: skip
    return out, norm, state, total


@_linear_attention.register_fake
def _(q, k, v, kind, power, shift, q_map, k_map):
    return _outputs(q, v, kind)


@torch.library.custom_op("unsoftmax::linear_attention_backward", mutates_args=())
def _backward(
    dy: Tensor, dnorm: Tensor, q: Tensor, k: Tensor, v: Tensor, norm: Tensor, state: Tensor, total: Tensor, kind: str,
    power: Tensor | None, shift: Tensor | None, q_map: Tensor | None, k_map: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv [B, H, N, K]; derivatives by the power [2, B, H] and by both maps [2, B, H, K, K], or empty."""
    from . import triton_attention as kernels

    B, H, N, K = q.shape
    q, k, v, dy = map(_rows, (q, k, v, dy))
    dq, dk, dv = (_like(x) for x in (q, k, v))
    how = _how(kind, q)
    n = how["SHARES"]
    grid, common = (B * H, n), (H, N, K, K**-0.25)
    dstate = state.new_empty(B, H, n, *state.shape[2:])
    dtotal = state.new_empty(B, H, n, *total.shape[2:])
    dpower = state.new_empty((2, B, H, n) if kind == "FOCUSED" else (2, 0))
    dmap = state.new_empty((2, B, H, n, K, K) if kind == "HEDGEHOG" else (2, 0))
    kernels.queries_kernel[grid](
        q, dy, norm, dnorm.contiguous(), q_map, power, shift, state, total, dq, dstate, dtotal, dpower[0], dmap[0],
        *common, *_strides(q, dy, dq), **how,
    )  # fmt: skip
    dstate, dtotal = (x[:, :, 0] if n == 1 else x.sum(2) for x in (dstate, dtotal))
    kernels.keys_kernel[grid](
        k, v, k_map, power, shift, dstate, dtotal, dk, dv, dpower[1], dmap[1],
        *common, *_strides(k, v, dk), **how,
    )  # fmt: skip
    return dq, dk, dv, dpower.sum(3) if dpower.numel() else dpower, dmap.sum(3) if dmap.numel() else dmap


@_backward.register_fake
def _(dy, dnorm, q, k, v, norm, state, total, kind, power, shift, q_map, k_map):
    B, H, _, K = q.shape
    dpower = state.new_empty((2, B, H) if kind == "FOCUSED" else (2, 0))
    dmap = state.new_empty((2, B, H, K, K) if kind == "HEDGEHOG" else (2, 0))
    return *(_like(x) for x in (q, k, v)), dpower, dmap


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, ctx.kind, *maps = inputs
    ctx.save_for_backward(q, k, v, *output[1:], *maps)
    ctx.set_materialize_grads(True)
    ctx.mark_non_differentiable(*output[2:])


def _gradients(ctx: Any, dy: Tensor, dnorm: Tensor, _state: Tensor, _total: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, norm, state, total, power, shift, q_map, k_map = ctx.saved_tensors
    dq, dk, dv, dpower, dmap = torch.ops.unsoftmax.linear_attention_backward(
        dy, dnorm, q, k, v, norm, state, total, ctx.kind, power, shift, q_map, k_map
    )
    of_power = dpower.sum((0, 1)) if ctx.kind == "FOCUSED" else None
    of_maps = dmap.sum(1) if ctx.kind == "HEDGEHOG" else (None, None)
    return dq, dk, dv, None, of_power, None, *of_maps


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


def _outputs(q: Tensor, v: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, H, N, K = q.shape
    halves = 2 if kind == "HEDGEHOG" else 1
    new = {"device": q.device, "dtype": torch.float32}
    state, total = torch.empty(B, H, halves, K, K, **new), torch.empty(B, H, halves, K, **new)
    return _like(v), torch.empty(B, H, N, **new), state, total


def _like(x: Tensor) -> Tensor:
    """[B, H, N, K], in memory as the projection after attention wants it: [B, N, H, K]."""
    B, H, N, K = x.shape
    return x.new_empty(B, N, H, K).transpose(1, 2)


def _rows(x: Tensor) -> Tensor:
    """`x` where the values of a token's head lie side by side; else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _how(kind: str, q: Tensor) -> dict[str, Any]:
    """The constants of a launch, the same in forward and backward."""
    from . import triton_attention as kernels

    B, H, N, K = q.shape
    return constants(kind, K, q.dtype) | {"MAP": getattr(kernels, kind), "SHARES": _shares(B * H, N)}


def constants(kind: str, K: int, dtype: torch.dtype) -> dict[str, int]:
    """Sizes of blocks, and warps. One choice for each head dimension: nothing is tuned while a model runs."""
    BK = max(32, 1 << (K - 1).bit_length())
    heavy = BK == 128 or dtype == torch.float32
    return {"BK": BK, "BN": 32 if heavy else 64, "num_warps": 8, "num_stages": 2}


def _shares(heads: int, N: int) -> int:
    """In how many parts a head's tokens are taken: 1 where heads fill the GPU, and never less than 128 tokens each."""
    wanted = -(-PROGRAMS // heads)
    return max(1, min(wanted, N // 128, 64))
