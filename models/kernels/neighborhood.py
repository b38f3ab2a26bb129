"""Fused softmax attention of patches to those around them, as custom operators of torch; differentiable once."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import DTYPES, MAX_HEAD_DIM, _like, _rows, _strides

PATCHES = 16  # of a program


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels compute `attend` of tensors like these."""
    return all(x.dtype in DTYPES and x.shape[-1] <= MAX_HEAD_DIM and x.shape == tensors[0].shape for x in tensors)


def attend(
    q: Tensor, k: Tensor, v: Tensor, other: Tensor, logit_BHN1: Tensor, size: int, grid: tuple[int, int],
    known: Tensor | None = None, bias_BHN1: Tensor | None = None, block: tuple[int, int] = (1, 1),
) -> Tensor:  # fmt: skip
    """See `models.operators.neighborhood.near`. `serves` must hold of the first four, and of `known`."""
    bias = None if bias_BHN1 is None else bias_BHN1.squeeze(-1).float()
    logit = logit_BHN1.squeeze(-1).float()
    return torch.ops.unsoftmax.neighborhood(q, k, v, other, logit, known, bias, size, *grid, *block)[0]


@torch.library.custom_op("unsoftmax::neighborhood", mutates_args=())
def _neighborhood(
    q: Tensor, k: Tensor, v: Tensor, other: Tensor, logit: Tensor, known: Tensor | None, bias: Tensor | None, size: int,
    rows: int, columns: int, height: int, width: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output like v [B, H, N, K], N = rows x columns, and in fp32 the logarithm of the normaliser [B, H, N]."""
    from . import triton_neighborhood as kernels

    q, k, v, other, less = map(_rows, (q, k, v, other, k if known is None else known))
    out, total = _outputs(v)
    kernels.forward_kernel[_launch(q, rows, columns)](
        q, k, v, other, logit.contiguous(), less, _bias(logit, bias), out, total, rows, columns, height, width,
        q.shape[1], q.shape[-1] ** -0.5, *_strides(q, k, v, other, less, out),
        **constants(q.shape[-1], size, _span(size, height, width, known)),
    )  # fmt: skip
    return out, total


@_neighborhood.register_fake
def _(q, k, v, other, logit, known, bias, size, rows, columns, height, width):
    return _outputs(v)


@torch.library.custom_op("unsoftmax::neighborhood_backward", mutates_args=())
def _backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, other: Tensor, logit: Tensor, known: Tensor | None,
    bias: Tensor | None, out: Tensor, total: Tensor, size: int, rows: int, columns: int, height: int, width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Derivatives by q, k, v, other [B, H, N, K], logit [B, H, N], known and bias; empty ones where these are not."""
    from . import triton_neighborhood as kernels

    dy, q, k, v, other, out, less = map(_rows, (dy, q, k, v, other, out, k if known is None else known))
    dq, dk, dv, dother, dlogit, dknown, dbias = _derivatives(q, k, v, other, known)
    along, bias = torch.empty_like(dlogit), _bias(logit, bias)
    programs, how = _launch(q, rows, columns), constants(q.shape[-1], size, _span(size, height, width, known))
    place = (rows, columns, height, width, q.shape[1], q.shape[-1] ** -0.5)
    kernels.by_queries_kernel[programs](
        dy, q, k, v, other, logit.contiguous(), less, bias, out, total, dq, dother, dlogit, along, *place,
        *_strides(dy, q, k, v, other, less, out, dq, dother), **how,
    )  # fmt: skip
    dless = dk if known is None else dknown
    kernels.by_keys_kernel[programs](
        dy, q, k, v, less, bias, total, along, dk, dv, dless, dbias, *place,
        *_strides(dy, q, k, v, less, dk, dv, dless), **how,
    )  # fmt: skip
    return dq, dk, dv, dother, dlogit, dknown, dbias


@_backward.register_fake
def _(dy, q, k, v, other, logit, known, bias, out, total, size, rows, columns, height, width):
    return _derivatives(q, k, v, other, known)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    tensors, ctx.place = inputs[:7], inputs[7:]
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, dy: Tensor, _total: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # a checkpointed block gives them once
    *found, dknown, dbias = torch.ops.unsoftmax.neighborhood_backward(dy, *saved, *ctx.place)
    less = (None, None) if saved[5] is None else (dknown, dbias)
    return *found, *less, *[None] * len(ctx.place)


_neighborhood.register_autograd(_gradients, setup_context=_setup)


@register_flop_formula(torch.ops.unsoftmax.neighborhood)
def _forward_flops(
    q_shape: tuple, k: tuple, v: tuple, other: tuple, logit: tuple, known: tuple | None, bias: tuple | None, size: int,
    rows: int, columns: int, height: int, width: int, **_: Any,
) -> int:  # fmt: skip
    B, H, N, K = q_shape
    return 2 * B * H * N * K * (2 * size**2 + _span(size, height, width, known) ** 2 + 1)


@register_flop_formula(torch.ops.unsoftmax.neighborhood_backward)
def _backward_flops(dy_shape: tuple, *given: Any, **__: Any) -> int:
    (size, _, _, height, width), known = [x for x in given if isinstance(x, int)], given[5]
    B, H, N, K = dy_shape
    less = 0 if known is None else size**2 + _span(size, height, width, known) ** 2
    return 2 * B * H * N * K * (4 * size**2 + less + 3)


def moved_bytes(q: Tensor, backward: bool, less: bool = False) -> int:
    """The least that it can move: q, k, v, other, out once; in backward these, dy, and four derivatives once.

    With `less` the known keys too, and their derivative.
    """
    return q.numel() * q.element_size() * (5 + less + (10 + 2 * less) * backward)


def constants(K: int, size: int, span: int = 0) -> dict[str, int]:
    """Sizes of blocks, warps, with `span` as of `_span`. Not tuned on a GPU yet."""
    BK, BS = max(16, 1 << (K - 1).bit_length()), 1 << (max(span, 1) ** 2 - 1).bit_length()
    how = {"K": K, "BK": BK, "BC": PATCHES, "SIZE": size, "SPAN": span, "BS": BS}
    return how | {"num_warps": 4 if BK <= 64 and not span else 8}  # by queries, with known keys, 4 spill


def _launch(q: Tensor, rows: int, columns: int) -> tuple[int, int]:
    B, H, N, _ = q.shape
    assert rows * columns == N, (q.shape, rows, columns)
    return rows * -(-columns // PATCHES), B * H


def _span(size: int, height: int, width: int, known: Any) -> int:
    """How many blocks of height x width patches a window meets at most, per side; 0 without known keys."""
    return 0 if known is None else 1 - (1 - size) // min(height, width)


def _bias(logit: Tensor, bias: Tensor | None) -> Tensor:
    return (logit if bias is None else bias).contiguous()


def _outputs(v: Tensor) -> tuple[Tensor, Tensor]:
    return _like(v), v.new_empty(v.shape[:3], dtype=torch.float32)


def _derivatives(q: Tensor, k: Tensor, v: Tensor, other: Tensor, known: Tensor | None) -> tuple[Tensor, ...]:
    one = q.new_empty(q.shape[:3], dtype=torch.float32)
    less = (q.new_empty(0), q.new_empty(0)) if known is None else (_like(known), torch.empty_like(one))
    return _like(q), _like(k), _like(v), _like(other), one, *less
