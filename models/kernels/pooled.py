"""Fused pooling of the cells of a patch grid, and softmax attention to few keys; custom operators, differentiable once.

See `models.operators.pooled`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import DTYPES, MAX_HEAD_DIM, _like, _rows, _shares, _strides

PATCHES = 32  # of a block
KEYS = 128  # of a block, where it holds all


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels take q, k and v like these."""
    dtype = tensors[0].dtype
    return dtype in DTYPES and all(x.dtype == dtype and x.shape[-1] <= MAX_HEAD_DIM for x in tensors)


def pool(
    k: Tensor, v: Tensor, about: Tensor, cells: int, grid: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cells of patches, each for a query near `about`: see `models.operators.pooled`. `serves` must hold of k and v.

    Args:
        k, v: of patches, [B, H, N, K], N = rows x columns, any strides.
        about: in fp32, [B, H, cells^2, K].

    Returns:
        In fp32, keys and values [B, H, cells^2, K], what is added to logits [B, H, cells^2], and each patch's log a_n
        [B, H, N].
    """
    return torch.ops.unsoftmax.pool(k, v, about, cells, *grid)


def far(q: Tensor, keys: Tensor, values: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention of all queries to few keys.

    Args:
        q: [B, H, N, K], any strides; `serves` must hold of it.
        keys, values: [B, H, L, K], in fp32 or the dtype of q, to which kernels round them.
        shifts: what is added to logits, [B, H, L] in fp32.

    Returns:
        [B, H, N, K] like q, and in fp32 the logarithm of the normaliser [B, H, N]. Both have derivatives.
    """
    return torch.ops.unsoftmax.far(q, keys, values, shifts)


@torch.library.custom_op("unsoftmax::pool", mutates_args=())
def _pool(
    k: Tensor, v: Tensor, about: Tensor, cells: int, rows: int, columns: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `pool`."""
    from . import triton_pooled as kernels

    k, v, about = map(_rows, (k, v, about))
    outputs, (programs, how) = _pool_outputs(k, cells), _cells_launch(k, cells, rows, columns)
    kernels.pool_kernel[programs](
        k, v, about, *outputs, rows, columns, k.shape[1], k.shape[-1] ** -0.5, *_strides(k, v, about), **how
    )
    return outputs


@_pool.register_fake
def _(k, v, about, cells, rows, columns):
    return _pool_outputs(k, cells)


@torch.library.custom_op("unsoftmax::pool_backward", mutates_args=())
def _pool_backward(
    dpooled: Tensor, dvalues: Tensor, dshifts: Tensor, dparts: Tensor, k: Tensor, v: Tensor, about: Tensor,
    pooled: Tensor, values: Tensor, parts: Tensor, cells: int, rows: int, columns: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Derivatives by k and v [B, H, N, K], and by each cell's m_c."""
    from . import triton_pooled as kernels

    dk, dv, dabout = derivatives = _like(k), _like(v), torch.empty_like(pooled)
    k, v, dpooled, dvalues, about = map(_rows, (k, v, dpooled, dvalues, about))
    programs, how = _cells_launch(k, cells, rows, columns)
    kernels.pool_backward_kernel[programs](
        dpooled, dvalues, dshifts.contiguous(), dparts.contiguous(), k, v, about, pooled, values, parts, dk, dv,
        dabout, rows, columns, k.shape[1], k.shape[-1] ** -0.5,
        *_strides(dpooled, dvalues, k, v, about, dk, dv), **how,
    )  # fmt: skip
    return derivatives


@_pool_backward.register_fake
def _(dpooled, dvalues, dshifts, dparts, k, v, about, pooled, values, parts, cells, rows, columns):
    return _like(k), _like(v), torch.empty_like(pooled)


def _pool_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    k, v, about, *ctx.place = inputs
    pooled, values, _, parts = output
    ctx.save_for_backward(k, v, about, pooled, values, parts)
    ctx.set_materialize_grads(True)


def _pool_gradients(ctx: Any, *d: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.unsoftmax.pool_backward(*d, *ctx.saved_tensors, *ctx.place), None, None, None


_pool.register_autograd(_pool_gradients, setup_context=_pool_setup)


@torch.library.custom_op("unsoftmax::far", mutates_args=())
def _far(q: Tensor, keys: Tensor, values: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor]:
    """See `far`."""
    from . import triton_pooled as kernels

    B, H, N, K = q.shape
    q, keys, values = map(_rows, (q, keys, values))
    out, total = _far_outputs(q)
    how, blocks = far_constants(K, keys.shape[2], q.dtype, backward=False)
    shares = _shares(B * H, N)
    kernels.far_kernel[B * H, shares](
        q, keys, values, shifts.contiguous(), out, total, H, N, keys.shape[2], K**-0.5,
        *_strides(q, keys, values, out), shares, K=K, ONE=blocks == 1, **how,
    )  # fmt: skip
    return out, total


@_far.register_fake
def _(q, keys, values, shifts):
    return _far_outputs(q)


@torch.library.custom_op("unsoftmax::far_backward", mutates_args=())
def _far_backward(
    dy: Tensor, dtotal: Tensor, q: Tensor, keys: Tensor, values: Tensor, shifts: Tensor, out: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Derivatives by q, keys, values and shifts."""
    from . import triton_pooled as kernels

    (B, H, N, K), L = q.shape, keys.shape[2]
    dy, q, keys_, values_, out = map(_rows, (dy, q, keys, values, out))
    dtotal, shifts, dq = dtotal.contiguous(), shifts.contiguous(), _like(q)
    how, blocks = far_constants(K, L, q.dtype, backward=True)
    shares = _shares(B * H, N)
    dkeys, dvalues = (q.new_empty(B, H, shares, L, K, dtype=torch.float32) for _ in "kv")
    dshifts = q.new_empty(B, H, shares, L, dtype=torch.float32)
    # A pass over queries and one over keys, or both at once.
    for programs, passes in [((), (True, True))] if blocks == 1 else [((), (True, False)), ((blocks,), (False, True))]:
        kernels.far_backward_kernel[B * H, shares, *programs](
            dy, dtotal, q, keys_, values_, shifts, out, total, dq, dkeys, dvalues, dshifts, H, N, L, K**-0.5,
            *_strides(dy, q, keys_, values_, out, dq), shares, K=K, QUERIES=passes[0], KEYS=passes[1], **how,
        )  # fmt: skip
    dkeys, dvalues, dshifts = (x.squeeze(2) if shares == 1 else x.sum(2) for x in (dkeys, dvalues, dshifts))
    return dq, dkeys.to(keys.dtype), dvalues.to(values.dtype), dshifts


@_far_backward.register_fake
def _(dy, dtotal, q, keys, values, shifts, out, total):
    return _like(q), *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (keys, values, shifts))


def _far_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(True)


def _far_gradients(ctx: Any, dy: Tensor, dtotal: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.unsoftmax.far_backward(dy, dtotal, *ctx.saved_tensors)


_far.register_autograd(_far_gradients, setup_context=_far_setup)


@register_flop_formula(torch.ops.unsoftmax.pool)
def _pool_flops(k_shape: tuple, *_: Any, **__: Any) -> int:
    B, H, N, K = k_shape
    return 2 * B * H * N * K * 3


@register_flop_formula(torch.ops.unsoftmax.pool_backward)
def _pool_backward_flops(
    dpooled: tuple, dvalues: tuple, dshifts: tuple, dparts: tuple, k: tuple, *_: Any, **__: Any
) -> int:
    return 2 * _pool_flops(k)


@register_flop_formula(torch.ops.unsoftmax.far)
def _far_flops(q_shape: tuple, keys_shape: tuple, *_: Any, **__: Any) -> int:
    B, H, N, K = q_shape
    return 2 * B * H * N * K * 2 * keys_shape[2]


@register_flop_formula(torch.ops.unsoftmax.far_backward)
def _far_backward_flops(dy: tuple, dtotal: tuple, q_shape: tuple, keys_shape: tuple, *_: Any, **__: Any) -> int:
    return 2 * _far_flops(q_shape, keys_shape)


def pool_constants(K: int, cells: int, size: int) -> dict[str, int]:
    """Sizes of blocks, warps, for cells of `size` patches. Not tuned on a GPU yet: chosen for registers."""
    BM = min(PATCHES, max(2, 1 << (size - 1).bit_length()))  # with 1 the compiler spills
    BK = max(16, 1 << (K - 1).bit_length())
    BC = max(1, min(1024 // BK // BM, 1 << (cells * cells - 1).bit_length()))
    return {"K": K, "BK": BK, "BC": BC, "BM": BM, "CELLS": cells, "ONE": size <= BM, "num_warps": 4}


def far_constants(K: int, L: int, dtype: torch.dtype, backward: bool) -> tuple[dict[str, int], int]:
    """Sizes of blocks, warps, and how many blocks the keys make. Not tuned on a GPU yet: chosen for registers."""
    BK, exact = max(32, 1 << (K - 1).bit_length()), dtype == torch.float32
    light = BK <= 64 and not exact
    BL = 32 if exact else KEYS if light and 64 < L <= KEYS else 64
    fast = light and not backward
    how = {"BK": BK, "BN": 64 if fast else 32, "BL": BL, "num_warps": 4 if fast else 8, "num_stages": 2 - exact}
    return how, -(-L // BL)


def _cells_launch(k: Tensor, cells: int, rows: int, columns: int) -> tuple[tuple[int, int], dict[str, int]]:
    B, H, N, K = k.shape
    assert rows * columns == N, (k.shape, rows, columns)
    how = pool_constants(K, cells, -(-rows // cells) * -(-columns // cells))
    return (B * H, -(-(cells**2) // how["BC"])), how


def _pool_outputs(k: Tensor, cells: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, H, N, K = k.shape
    shapes = (B, H, cells**2, K), (B, H, cells**2, K), (B, H, cells**2), (B, H, N)
    pooled, values, shifts, parts = (k.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return pooled, values, shifts, parts


def _far_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    return _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
