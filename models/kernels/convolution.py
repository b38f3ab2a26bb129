"""A fused depthwise convolution over the patches among tokens, as custom operators of torch."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import DTYPES, _like, _rows, _strides

ROWS = {3: 4, 5: 4, 7: 2}  # size of the kernel -> rows of a strip, as many as leave registers for other warps
PROGRAMS = 2048  # at least, where patches suffice: about 16 for each multiprocessor of an H100
CHANNELS = 64  # of a program, which is one warp


def serves(v: Tensor, weight: Tensor, base: Tensor | None) -> bool:
    """Whether the kernels compute `convolve` of tensors like these."""
    return (
        v.dtype in DTYPES and weight.dtype in DTYPES and weight.shape[-1] in ROWS
        and (base is None or (base.dtype == v.dtype and base.shape == v.shape))
    )  # fmt: skip


def convolve(v: Tensor, weight: Tensor, prefix: int, grid: tuple[int, int], base: Tensor | None = None) -> Tensor:
    """base + conv(v), depthwise over the patch grid; prefix tokens are those of base. `serves` must hold.

    Args:
        v: [B, H, N, K], N = prefix + rows x columns.
        weight: [H K, 1, size, size].
        grid: rows, columns.
        base: [B, H, N, K]; None: v.

    Returns:
        [B, H, N, K], in memory [B, N, H, K].
    """
    taps = weight.flatten(1).t().contiguous()
    return torch.ops.unsoftmax.convolution(v, base, taps, base is None, False, prefix, *grid)


@torch.library.custom_op("unsoftmax::convolution", mutates_args=())
def _convolution(
    v: Tensor, base: Tensor | None, taps: Tensor, residual: bool, turned: bool, prefix: int, rows: int, columns: int
) -> Tensor:
    """[B, H, N, K]: conv(v), plus base if there is one, or plus v if `residual`.

    Args:
        taps: [size size, H K].
        turned: whether taps are taken from the last to the first, which makes the derivative by v of a convolution.
    """
    from . import triton_convolution as kernels

    (B, H, N, K), D = v.shape, taps.shape[1]
    assert prefix + rows * columns == N and H * K == D, (v.shape, taps.shape, prefix, rows, columns)
    v, taps, out = _rows(v), taps.contiguous(), _like(v)
    other = v if base is None else _rows(base)
    how, blocks, strips = constants(taps.shape[0], D, rows)
    parts = max(1, min(-(-PROGRAMS // (blocks * strips * B)), columns // 4))
    kind = kernels.VALUES if residual else kernels.NOTHING if base is None else kernels.OTHER
    kernels.convolution_kernel[(blocks * strips * parts * B,)](
        v, other, taps, out, rows, columns, prefix, strips, parts, *_strides(v, other), K=K, D=D, BASE=kind,
        TURNED=turned, **how,
    )  # fmt: skip
    return out


@_convolution.register_fake
def _(v, base, taps, residual, turned, prefix, rows, columns):
    return _like(v)


@torch.library.custom_op("unsoftmax::convolution_taps", mutates_args=())
def _taps(dy: Tensor, v: Tensor, size: int, prefix: int, rows: int, columns: int) -> Tensor:
    """The derivative by the taps, [size size, H K] in fp32; added in the same order each time."""
    from . import triton_convolution as kernels

    B, H, N, K = v.shape
    assert dy.shape == v.shape and prefix + rows * columns == N, (dy.shape, v.shape, prefix, rows, columns)
    dy, v = _rows(dy), _rows(v)
    how, blocks, strips = constants(size * size, H * K, rows)
    units = B * strips
    per = -(-units // min(units, -(-PROGRAMS // blocks)))
    shares = -(-units // per)
    dtaps = v.new_empty(shares, size * size, H * K, dtype=torch.float32)
    kernels.taps_kernel[(blocks * shares,)](
        dy, v, dtaps, rows, columns, prefix, strips, units, per, *_strides(dy, v), K=K, D=H * K, **how
    )
    return dtaps.sum(0)


@_taps.register_fake
def _(dy, v, size, prefix, rows, columns):
    return v.new_empty(size * size, v.shape[1] * v.shape[3], dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    v, _, taps, ctx.residual, ctx.turned, *ctx.places = inputs
    ctx.save_for_backward(v, taps)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    v, taps = ctx.saved_tensors
    dv = dtaps = None
    if ctx.needs_input_grad[0]:
        dv = torch.ops.unsoftmax.convolution(dy, None, taps, ctx.residual, not ctx.turned, *ctx.places)
    if ctx.needs_input_grad[2]:
        size = round(taps.shape[0] ** 0.5)
        dtaps = torch.ops.unsoftmax.convolution_taps(dy, v, size, *ctx.places)
        dtaps = (dtaps.flip(0) if ctx.turned else dtaps).to(taps.dtype)
    return dv, dy if ctx.needs_input_grad[1] else None, dtaps, None, None, None, None, None


_convolution.register_autograd(_gradients, setup_context=_setup)


def _setup_taps(ctx: Any, inputs: tuple, output: Tensor) -> None:
    dy, v, _, *ctx.places = inputs
    ctx.save_for_backward(dy, v)


def _gradients_taps(ctx: Any, taps: Tensor) -> tuple[Tensor | None, ...]:
    """Of the derivative: it is linear in dy and in v."""
    dy, v = ctx.saved_tensors
    by_dy = torch.ops.unsoftmax.convolution(v, None, taps, False, False, *ctx.places)
    return by_dy, torch.ops.unsoftmax.convolution(dy, None, taps, False, True, *ctx.places), *[None] * 4


_taps.register_autograd(_gradients_taps, setup_context=_setup_taps)


@register_flop_formula(torch.ops.unsoftmax.convolution)
def _forward_flops(
    v_shape: tuple, base_shape: tuple | None, taps_shape: tuple, residual: bool, turned: bool, prefix: int, rows: int,
    columns: int, **_: Any,
) -> int:  # fmt: skip
    """As torch counts a convolution: all taps at every patch."""
    return 2 * v_shape[0] * rows * columns * taps_shape[0] * taps_shape[1]


@register_flop_formula(torch.ops.unsoftmax.convolution_taps)
def _taps_flops(dy_shape: tuple, v_shape: tuple, size: int, prefix: int, rows: int, columns: int, **_: Any) -> int:
    B, H, _N, K = v_shape
    return 2 * B * rows * columns * size * size * H * K


def moved_bytes(v: Tensor, base: bool, backward: bool) -> int:
    """The least that it can move: v, base and out once; in backward dy, v and dv once."""
    return v.numel() * v.element_size() * (2 + base + 3 * backward)


def constants(taps: int, D: int, rows: int) -> tuple[dict[str, int], int, int]:
    """Sizes of a launch, how many blocks the D channels make, and how many strips the rows."""
    size = round(taps**0.5)
    how = {"SIZE": size, "ROWS": ROWS[size], "BC": CHANNELS, "num_warps": 1, "num_stages": 1}
    return how, -(-D // CHANNELS), -(-rows // ROWS[size])
