"""What `pooled` makes of the cells of a patch grid, and softmax attention to few keys, as Triton kernels.

A program of `pool` has a few cells of a head and takes their patches a block after the other, in fp32. Each patch lies
in one cell, so nothing is added up between programs. In backward, with s_n = m k_n^T / sqrt(K) and the derivatives by
the four outputs k_c, v_c, the shift l and log a_n:

    g = dk_c - dl m / sqrt(K),  u_n = k_n g^T + v_n dv_c^T,  dk_n = a_n g + ds_n m / sqrt(K),  dv_n = a_n dv_c,
    ds_n = a_n (u_n - k_c g^T - v_c dv_c^T - sum dlog a + dl) + dlog a_n,  dm = (sum ds_n k_n - dl k_c) / sqrt(K).

A program of `far` has a head of an image, or a share of its queries where heads alone would leave multiprocessors idle.
It keeps the keys of one block, and where they are more takes their blocks one after the other. Factors of products are
rounded to the dtype of q, sums are fp32. Derivatives are made from the logarithm of the normaliser, as in flash
attention, arXiv 2205.14135. Sums over queries are those of a share; torch adds up the shares.
"""

import triton
import triton.language as tl

from .triton_attention import _columns, _dot, _load, _range, _store

GRID = ["rows", "columns"]  # one kernel for all grids
NUMBERS = ["N", "L", "SHARES"]  # and for all numbers of tokens
LOW = tl.constexpr(-1e38)  # in place of -inf, which has no difference to itself
NOTHING = tl.constexpr(-1e30)  # what is added to the logit of a cell without patches
TINY = tl.constexpr(1e-30)


@triton.jit
def _cells(CELLS: tl.constexpr, BC: tl.constexpr):
    """Cells [BC] of a program, and which of them there are."""
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    return c, c < CELLS * CELLS


@triton.jit
def _patches(c, start, rows, columns, CELLS: tl.constexpr, BM: tl.constexpr):
    """Tokens [BC, BM] of cells from their patch `start` on, and which of them there are."""
    height, width = tl.cdiv(rows, CELLS), tl.cdiv(columns, CELLS)
    m = start + tl.arange(0, BM)
    y = (c // CELLS)[:, None] * height + (m // width)[None, :]
    x = (c % CELLS)[:, None] * width + (m % width)[None, :]
    there = (m < height * width)[None, :] & (c < CELLS * CELLS)[:, None] & (y < rows) & (x < columns)
    return y * columns + x, there


@triton.jit
def _load_patches(at, stride, n, columns, there):
    """Rows `n` of a head in fp32, [BC, BM, BK]; zeros where there are none."""
    i = tl.arange(0, columns.shape[0])
    return tl.load(at + n[:, :, None] * stride + i[None, None, :],
                   mask=there[:, :, None] & columns[None, None, :], other=0.0).to(tl.float32)  # fmt: skip


@triton.jit
def _store_patches(at, stride, n, columns, there, x):
    i = tl.arange(0, columns.shape[0])
    tl.store(at + n[:, :, None] * stride + i[None, None, :], x.to(at.dtype.element_ty),
             mask=there[:, :, None] & columns[None, None, :])  # fmt: skip


@triton.jit(do_not_specialize=GRID)
def pool_kernel(
    k, v, about, pooled, values, shifts, parts, rows, columns, H, scale,
    kB, kH, kN, vB, vH, vN, aB, aH, aN,
    K: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr, CELLS: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """pooled, values [B, H, cells, K], shifts [B, H, cells] and parts [B, H, N] of a program's cells.

    ONE: a block holds all patches of a cell.
    """
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    c, mine = _cells(CELLS, BC)
    real = _columns(K, BK)
    size = tl.cdiv(rows, CELLS) * tl.cdiv(columns, CELLS)
    end = BM if ONE else size
    k += b * kB + h * kH
    v += b * vB + h * vH
    parts += bh * rows * columns
    m = _load(about + b * aB + h * aH, aN, c, real, mine) * scale
    most = tl.full([BC], LOW, tl.float32)
    norm = tl.zeros([BC], tl.float32)
    keys = tl.zeros([BC, BK], tl.float32)
    sums = keys
    for start in range(0, end, BM):
        n, there = _patches(c, start, rows, columns, CELLS, BM)
        x = _load_patches(k, kN, n, real, there)
        s = tl.where(there, tl.sum(x * m[:, None, :], 2), float("-inf"))
        larger = tl.maximum(most, tl.max(s, 1))
        fade, weight = tl.exp(most - larger), tl.exp(s - larger[:, None])
        norm = norm * fade + tl.sum(weight, 1)
        keys = keys * fade[:, None] + tl.sum(weight[:, :, None] * x, 1)
        y = _load_patches(v, vN, n, real, there)
        sums = sums * fade[:, None] + tl.sum(weight[:, :, None] * y, 1)
        most = larger
    total = tl.where(norm > 0, most + tl.log(tl.maximum(norm, TINY)), NOTHING)
    for start in range(0, end, BM):
        n, there = _patches(c, start, rows, columns, CELLS, BM)
        s = tl.sum(_load_patches(k, kN, n, real, there) * m[:, None, :], 2)
        tl.store(parts + n, s - total[:, None], mask=there)
    inverse = 1 / tl.maximum(norm, TINY)
    keys *= inverse[:, None]
    at = bh * CELLS * CELLS
    _store(pooled + at * K, K, c, real, mine, keys)
    tl.store(shifts + at + c, total - tl.sum(keys * m, 1), mask=mine)
    _store(values + at * K, K, c, real, mine, sums * inverse[:, None])


@triton.jit(do_not_specialize=GRID)
def pool_backward_kernel(
    dpooled, dvalues, dshifts, dparts, k, v, about, pooled, values, parts, dk, dv, dabout, rows, columns, H, scale,
    dpB, dpH, dpN, doB, doH, doN, kB, kH, kN, vB, vH, vN, aB, aH, aN, dkB, dkH, dkN, dvB, dvH, dvN,
    K: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr, CELLS: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """dk, dv of the patches of a program's cells, and dabout [B, H, cells, K]."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    c, mine = _cells(CELLS, BC)
    real = _columns(K, BK)
    size = tl.cdiv(rows, CELLS) * tl.cdiv(columns, CELLS)
    end = BM if ONE else size
    k += b * kB + h * kH
    v += b * vB + h * vH
    dk += b * dkB + h * dkH
    dv += b * dvB + h * dvH
    parts += bh * rows * columns
    dparts += bh * rows * columns
    at = bh * CELLS * CELLS
    m = _load(about + b * aB + h * aH, aN, c, real, mine) * scale
    by_shift = tl.load(dshifts + at + c, mask=mine, other=0.0)
    keys = _load(pooled + at * K, K, c, real, mine)
    by_key = _load(dpooled + b * dpB + h * dpH, dpN, c, real, mine) - by_shift[:, None] * m
    along = tl.sum(keys * by_key, 1) - by_shift
    by_value = _load(dvalues + b * doB + h * doH, doN, c, real, mine)
    along += tl.sum(_load(values + at * K, K, c, real, mine) * by_value, 1)
    for start in range(0, end, BM):
        n, there = _patches(c, start, rows, columns, CELLS, BM)
        along += tl.sum(tl.load(dparts + n, mask=there, other=0.0), 1)
    sums = -by_shift[:, None] * keys
    for start in range(0, end, BM):
        n, there = _patches(c, start, rows, columns, CELLS, BM)
        x = _load_patches(k, kN, n, real, there)
        weight = tl.exp(tl.load(parts + n, mask=there, other=float("-inf")))
        y = _load_patches(v, vN, n, real, there)
        u = tl.sum(x * by_key[:, None, :], 2) + tl.sum(y * by_value[:, None, :], 2)
        _store_patches(dv, dvN, n, real, there, weight[:, :, None] * by_value[:, None, :])
        ds = weight * (u - along[:, None]) + tl.load(dparts + n, mask=there, other=0.0)
        sums += tl.sum(ds[:, :, None] * x, 1)
        x = weight[:, :, None] * by_key[:, None, :] + ds[:, :, None] * m[:, None, :]
        _store_patches(dk, dkN, n, real, there, x)
    _store(dabout + at * K, K, c, real, mine, sums * scale)


@triton.jit
def _block(keys, values, shifts, start, L, kN, vN, columns, dtype: tl.constexpr, BL: tl.constexpr):
    """A block of keys and values, rounded to `dtype`, and what is added to their logits."""
    n = start + tl.arange(0, BL)
    rows = n < L
    x = _load(keys, kN, n, columns, rows).to(dtype)
    y = _load(values, vN, n, columns, rows).to(dtype)
    return x, y, tl.load(shifts + n, mask=rows, other=float("-inf"))


@triton.jit
def _attended(x, k, v, shift, scale, most, norm, sums):
    """The largest logit of queries x, their normaliser and weighted sum, with a block of keys more."""
    s = _dot(x, tl.trans(k)) * scale + shift[None, :]
    larger = tl.maximum(most, tl.max(s, 1))
    fade, weight = tl.exp(most - larger), tl.exp(s - larger[:, None])
    sums = _dot(weight.to(v.dtype), v, sums * fade[:, None])
    return larger, norm * fade + tl.sum(weight, 1), sums


@triton.jit(do_not_specialize=NUMBERS)
def far_kernel(
    q, keys, values, shifts, out, total, H, N, L, scale, qB, qH, qN, kB, kH, kN, vB, vH, vN, oB, oH, oN, SHARES,
    K: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """out [B, H, N, K] and total [B, H, N], the logarithm of the normaliser. ONE: a block holds all keys."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    columns = _columns(K, BK)
    dtype: tl.constexpr = q.dtype.element_ty
    q += b * qB + h * qH
    keys += b * kB + h * kH
    values += b * vB + h * vH
    shifts += bh * L
    first, last = _range(N, SHARES, BN)
    if ONE:
        k, v, shift = _block(keys, values, shifts, 0, L, kN, vN, columns, dtype, BL)
    for start in range(first, last, BN):
        n = start + tl.arange(0, BN)
        rows = n < last
        x = _load(q, qN, n, columns, rows)
        most = tl.full([BN], LOW, tl.float32)
        norm = tl.zeros([BN], tl.float32)
        sums = tl.zeros([BN, BK], tl.float32)
        if ONE:
            most, norm, sums = _attended(x, k, v, shift, scale, most, norm, sums)
        else:
            for at in range(0, L, BL):
                k, v, shift = _block(keys, values, shifts, at, L, kN, vN, columns, dtype, BL)
                most, norm, sums = _attended(x, k, v, shift, scale, most, norm, sums)
        _store(out + b * oB + h * oH, oN, n, columns, rows, sums * (1 / norm)[:, None])
        tl.store(total + bh * N + n, most + tl.log(norm), mask=rows)


@triton.jit
def _by_logits(x, d, along, norm, k, v, shift, scale):
    """Weights [BN, BL] that queries x give a block of keys, and the derivatives by their logits."""
    weight = tl.exp(_dot(x, tl.trans(k)) * scale + shift[None, :] - norm[:, None])
    return weight, weight * (_dot(d, tl.trans(v)) - along[:, None])


@triton.jit(do_not_specialize=NUMBERS)
def far_backward_kernel(
    dy, dtotal, q, keys, values, shifts, out, total, dq, dkeys, dvalues, dshifts, H, N, L, scale,
    yB, yH, yN, qB, qH, qN, kB, kH, kN, vB, vH, vN, oB, oH, oN, dqB, dqH, dqN, SHARES,
    K: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """QUERIES: dq. KEYS: dkeys, dvalues [B, H, SHARES, L, K], dshifts [B, H, SHARES, L], sums over a share's queries.

    Both where a block holds all keys; else KEYS alone has a block of keys for each program.
    """
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    columns = _columns(K, BK)
    dtype: tl.constexpr = q.dtype.element_ty
    dy += b * yB + h * yH
    q += b * qB + h * qH
    keys += b * kB + h * kH
    values += b * vB + h * vH
    shifts += bh * L
    first, last = _range(N, SHARES, BN)
    if KEYS:
        block = tl.program_id(2) * BL
        k, v, shift = _block(keys, values, shifts, block, L, kN, vN, columns, dtype, BL)
        by_keys = tl.zeros([BL, BK], tl.float32)
        by_values = tl.zeros([BL, BK], tl.float32)
        by_shifts = tl.zeros([BL], tl.float32)
    for start in range(first, last, BN):
        n = start + tl.arange(0, BN)
        rows = n < last
        x = _load(q, qN, n, columns, rows)
        d = _load(dy, yN, n, columns, rows)
        y = _load(out + b * oB + h * oH, oN, n, columns, rows)
        along = tl.sum(d.to(tl.float32) * y.to(tl.float32), 1) - tl.load(dtotal + bh * N + n, mask=rows, other=0.0)
        norm = tl.load(total + bh * N + n, mask=rows, other=float("inf"))
        if KEYS:
            weight, ds = _by_logits(x, d, along, norm, k, v, shift, scale)
            by_shifts += tl.sum(ds, 0)
            ds = ds.to(dtype)
            by_values = _dot(tl.trans(weight.to(dtype)), d, by_values)
            by_keys = _dot(tl.trans(ds), x, by_keys)
            if QUERIES:
                _store(dq + b * dqB + h * dqH, dqN, n, columns, rows, _dot(ds, k) * scale)
        else:
            sums = tl.zeros([BN, BK], tl.float32)
            for at in range(0, L, BL):
                k, v, shift = _block(keys, values, shifts, at, L, kN, vN, columns, dtype, BL)
                _, ds = _by_logits(x, d, along, norm, k, v, shift, scale)
                sums = _dot(ds.to(dtype), k, sums)
            _store(dq + b * dqB + h * dqH, dqN, n, columns, rows, sums * scale)
    if KEYS:
        n = block + tl.arange(0, BL)
        rows = n < L
        place = (bh * SHARES + tl.program_id(1)) * L
        _store(dkeys + place * K, K, n, columns, rows, by_keys * scale)
        _store(dvalues + place * K, K, n, columns, rows, by_values)
        tl.store(dshifts + place + n, by_shifts, mask=rows)
