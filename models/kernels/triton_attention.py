"""Non-causal linear attention as fused Triton kernels: one pass over K and V, one over Q, and the same backward.

    S = sum_n phi(k_n) v_n^T,  z = sum_n phi(k_n),  d = phi(q) z,  y = phi(q) S / d        arXiv 2006.16236, equation 5

A program has a head of an image, or a share of its tokens where heads alone would leave multiprocessors idle. In
forward it makes one of the passes; in backward both at once where it has a whole head. Shares are added in the same
order each time, so results are the same to the bit. Features never reach memory. They are rounded to the dtype of v for
the products, which accumulate in fp32, as S, z and d do. Backward reads q, k, v, dy and the fp32 state, makes the
features again, and needs dS and dz between its two passes; with u = dy / d:

    df = u S^T + e z,  e = -(phi(q) u S^T) / d,  dS = phi(q)^T u,  dz = phi(q)^T e,  dg = v dS^T + dz,  dv = phi(k) dS

Feature maps, by their number `MAP`: see `MAPS`. POWER is focused's where it is a small whole number, else 0. Rows are
tokens, columns features; columns above K are padding.
"""

import triton
import triton.language as tl

ELU1, RELU, FOCUSED, EXP, HEDGEHOG = (tl.constexpr(i) for i in range(5))
BOTH, FIRST, SECOND = (tl.constexpr(i) for i in range(3))
TINY = tl.constexpr(1e-30)
EPS = tl.constexpr(1e-6)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _dot(a, b, sum=None):
    """a b + sum, in fp32. The interpreter has no products of bf16, and takes those of the same values in fp32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sum, input_precision="ieee")


@triton.jit
def _elu1(x):
    return tl.where(x > 0, x + 1, tl.exp(tl.minimum(x, 0.0)))


@triton.jit
def _focus(e, power, columns, POWER: tl.constexpr):
    """e^P of rows divided by their maximum, its logarithm before the power, and both norms."""
    ratio = e * (1 / tl.maximum(tl.max(e, 1), TINY))[:, None]
    log = ratio  # not used
    if POWER > 0:
        sharp = ratio
        for _ in tl.static_range(POWER - 1):
            sharp *= ratio
    else:
        log = tl.log(tl.maximum(ratio, TINY))
        sharp = tl.where(columns[None, :], tl.exp(power * log), 0.0)
    return sharp, log, tl.sqrt(tl.sum(e * e, 1)), tl.maximum(tl.sqrt(tl.sum(sharp * sharp, 1)), TINY)


@triton.jit
def _softmax(x, columns):
    x = tl.where(columns[None, :], x, float("-inf"))
    e = tl.exp(x - tl.max(x, 1)[:, None])
    return e * (1 / tl.sum(e, 1))[:, None]


@triton.jit
def _phi(x, w, power, shift, scale, columns, MAP: tl.constexpr, POWER: tl.constexpr, QUERY: tl.constexpr):
    """Features [BN, BK] in fp32, twice: the second are Hedgehog's other half, or not used.

    Those of padding are 0 in columns; rows without a token have some.
    """
    if MAP == HEDGEHOG:
        t = _dot(x, w)
        f = _softmax(t, columns)
        g = _softmax(-t, columns)
    else:
        x = x.to(tl.float32)
        if MAP == ELU1:
            f = _elu1(x)
        elif MAP == RELU:
            f = tl.maximum(x, 0.0)
        elif MAP == FOCUSED:
            sharp, _, norm, sharp_norm = _focus(tl.where(columns[None, :], _elu1(x), 0.0), power, columns, POWER)
            f = sharp * (norm / sharp_norm)[:, None]
        elif QUERY:
            t = tl.where(columns[None, :], x * scale + shift[None, :], float("-inf"))
            f = tl.exp(t - tl.max(t, 1)[:, None])
        else:
            f = tl.exp(x * scale - shift[None, :])
        f = tl.where(columns[None, :], f, 0.0)
        g = f
    return f, g


@triton.jit
def _dphi(x, w, f, g, df, dg, power, scale, columns, rows, MAP: tl.constexpr, POWER: tl.constexpr):
    """dx [BN, BK] from the features f, g and their derivatives; of these rows the derivative by the power, and dW.

    What a map does not have is 0, [1] and [BK, BK].
    """
    dpower = 0.0
    dw = w
    if MAP == HEDGEHOG:
        dt = f * (df - tl.sum(df * f, 1)[:, None]) - g * (dg - tl.sum(dg * g, 1)[:, None])
        dt = dt.to(x.dtype)
        dx = _dot(dt, tl.trans(w))
        dw = _dot(tl.trans(x), dt)
    elif MAP == ELU1:
        dx = df * tl.where(x.to(tl.float32) > 0, 1.0, f)
    elif MAP == RELU:
        dx = tl.where(x.to(tl.float32) > 0, df, 0.0)
    elif MAP == FOCUSED:
        x = x.to(tl.float32)
        e = tl.where(columns[None, :], _elu1(x), 0.0)
        sharp, log, norm, sharp_norm = _focus(e, power, columns, POWER)
        along = tl.sum(df * sharp, 1)
        # Of the rescaling: d sharp, and what comes by the norm of e.
        dsharp = df * (norm / sharp_norm)[:, None]
        dsharp -= sharp * (along * norm / (sharp_norm * sharp_norm * sharp_norm))[:, None]
        dlog = dsharp * sharp
        exponent = power
        if POWER > 0:
            exponent = POWER
        else:
            dpower = tl.sum(tl.where(rows, tl.sum(dlog * log, 1), 0.0), 0)
        de = dlog * exponent / tl.maximum(e, TINY)
        de += e * (along / (sharp_norm * tl.maximum(norm, TINY)))[:, None]
        dx = de * tl.where(x > 0, 1.0, e)
    else:
        dx = df * scale * f
    return dx, dpower, dw


@triton.jit
def _columns(K: tl.constexpr, BK: tl.constexpr):
    """Which columns are no padding; a constant where all are, which costs nothing."""
    if K == BK:
        return tl.full([BK], True, tl.int1)
    return tl.arange(0, BK) < K


@triton.jit
def _load(at, stride, n, columns, rows):
    """Rows `n` of a head, [BN, BK]."""
    return tl.load(at + n[:, None] * stride + tl.arange(0, columns.shape[0])[None, :],
                   mask=rows[:, None] & columns[None, :], other=0.0)  # fmt: skip


@triton.jit
def _store(at, stride, n, columns, rows, x):
    tl.store(at + n[:, None] * stride + tl.arange(0, columns.shape[0])[None, :], x.to(at.dtype.element_ty),
             mask=rows[:, None] & columns[None, :])  # fmt: skip


@triton.jit
def _square(at, K: tl.constexpr, columns):
    """A [K, K] matrix, padded with zeros."""
    i = tl.arange(0, columns.shape[0])
    return tl.load(at + i[:, None] * K + i[None, :], mask=columns[:, None] & columns[None, :], other=0.0)


@triton.jit
def _store_square(at, K: tl.constexpr, columns, x):
    i = tl.arange(0, columns.shape[0])
    tl.store(at + i[:, None] * K + i[None, :], x, mask=columns[:, None] & columns[None, :])


@triton.jit
def _row(at, columns):
    return tl.load(at + tl.arange(0, columns.shape[0]), mask=columns, other=0.0)


@triton.jit
def _store_row(at, columns, x):
    tl.store(at + tl.arange(0, columns.shape[0]), x, mask=columns)


@triton.jit
def _range(N, SHARES, BN: tl.constexpr):
    """First and last token of a share: whole blocks."""
    per = tl.cdiv(tl.cdiv(N, BN), SHARES) * BN
    first = tl.program_id(1) * per
    return first, tl.minimum(first + per, N)


@triton.jit
def _given(power, shift, maps, bh, h, K: tl.constexpr, columns, dtype: tl.constexpr,
           MAP: tl.constexpr, POWER: tl.constexpr):  # fmt: skip
    """What a map takes beside the tokens: its matrix, the power of the head, the largest key of each column."""
    w = tl.zeros([1], tl.float32)
    P = 1.0
    L = tl.zeros([1], tl.float32)
    if MAP == HEDGEHOG:
        w = _square(maps + h * K * K, K, columns).to(dtype)
    if MAP == FOCUSED and POWER == 0:
        P = tl.load(power + h)
    if MAP == EXP:
        L = _row(shift + bh * K, columns)
    return w, P, L


@triton.jit
def _sums_of(sums, bh, PARTS, K: tl.constexpr, columns, dtype: tl.constexpr, MAP: tl.constexpr):
    """State and total of a head, of both halves; the second only where there is one. Added from their `PARTS`."""
    HALVES: tl.constexpr = 2 if MAP == HEDGEHOG else 1
    SIZE: tl.constexpr = (K + 1) * K
    at = sums + bh * PARTS * HALVES * SIZE
    S, z = _square(at, K, columns), _row(at + K * K, columns)
    S1, z1 = S, z
    if MAP == HEDGEHOG:
        S1, z1 = _square(at + SIZE, K, columns), _row(at + SIZE + K * K, columns)
    for _ in range(1, PARTS):
        at += HALVES * SIZE
        S += _square(at, K, columns)
        z += _row(at + K * K, columns)
        if MAP == HEDGEHOG:
            S1 += _square(at + SIZE, K, columns)
            z1 += _row(at + SIZE + K * K, columns)
    return S.to(dtype), z, S1.to(dtype), z1


@triton.jit
def _store_sums(sums, place, K: tl.constexpr, columns, S, z, S1, z1, MAP: tl.constexpr):
    """The state [K, K], and the total as one more row of it."""
    HALVES: tl.constexpr = 2 if MAP == HEDGEHOG else 1
    SIZE: tl.constexpr = (K + 1) * K
    at = sums + place * HALVES * SIZE
    _store_square(at, K, columns, S)
    _store_row(at + K * K, columns, z)
    if MAP == HEDGEHOG:
        _store_square(at + SIZE, K, columns, S1)
        _store_row(at + SIZE + K * K, columns, z1)


@triton.jit
def _split(x, dtype: tl.constexpr):
    """x [rows] in fp32 as the first two columns of [rows, 16], whose sum it is: two roundings keep 16 bits of bf16."""
    i = tl.arange(0, 16)[None, :]
    high = x.to(dtype)
    low = (x - high.to(tl.float32)).to(dtype)
    return tl.where(i == 0, high[:, None], tl.where(i == 1, low[:, None], 0.0)).to(dtype)


@triton.jit
def _column_sums(f, rows, sums):
    """sums [BK, 16] + what the rows of f add up to, in each column: by a product with ones, for which no warp waits.

    Nothing that comes out of a product may be the narrow operand: Triton 3.6 then writes beyond it.
    """
    ones = tl.where(rows[:, None], tl.full([f.shape[0], 16], 1.0, f.dtype), 0.0).to(f.dtype)
    return _dot(tl.trans(f), ones, sums)


@triton.jit
def forward_kernel(
    q, k, v, q_map, k_map, power, shift, sums, out, norm, H, N, scale,
    qB, qH, qN, kB, kH, kN, vB, vH, vN, oB, oH, oN, SHARES, PARTS,
    K: tl.constexpr, MAP: tl.constexpr, POWER: tl.constexpr, PASSES: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out [B, H, N, K] and norm [B, H, N] of a head, or of a share of its tokens.

    PASSES: FIRST writes the sums over a share's keys, [B H, SHARES, halves, K + 1, K]: the state, and the total as its
    last row. SECOND adds them up, where there are PARTS for each head, and writes out and norm.
    """
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    columns = _columns(K, BK)
    dtype: tl.constexpr = v.dtype.element_ty
    first, last = _range(N, SHARES, BN)
    if PASSES == FIRST:
        w, P, L = _given(power, shift, k_map, bh, h, K, columns, dtype, MAP, POWER)
        S = tl.zeros([BK, BK], tl.float32)
        z = tl.zeros([BK, 16], tl.float32)
        S1, z1 = S, z
        for start in range(first, last, BN):
            n = start + tl.arange(0, BN)
            rows = n < last
            x = _load(k + b * kB + h * kH, kN, n, columns, rows)
            y = _load(v + b * vB + h * vH, vN, n, columns, rows)
            f, g = _phi(x.to(dtype) if MAP == HEDGEHOG else x, w, P, L, scale, columns, MAP, POWER, False)
            f = f.to(dtype)
            S = _dot(tl.trans(f), y, S)
            z = _column_sums(f, rows, z)
            if MAP == HEDGEHOG:
                g = g.to(dtype)
                S1 = _dot(tl.trans(g), y, S1)
                z1 = _column_sums(g, rows, z1)
        _store_sums(sums, bh * SHARES + tl.program_id(1), K, columns, S, tl.max(z, 1), S1, tl.max(z1, 1), MAP)
    else:
        w, P, L = _given(power, shift, q_map, bh, h, K, columns, dtype, MAP, POWER)
        S, z, S1, z1 = _sums_of(sums, bh, PARTS, K, columns, dtype, MAP)
        z, z1 = _split(z, dtype), _split(z1, dtype)
        for start in range(first, last, BN):
            n = start + tl.arange(0, BN)
            rows = n < last
            x = _load(q + b * qB + h * qH, qN, n, columns, rows)
            f, g = _phi(x.to(dtype) if MAP == HEDGEHOG else x, w, P, L, scale, columns, MAP, POWER, True)
            f = f.to(dtype)
            y, d = _dot(f, S), _dot(f, z)
            if MAP == HEDGEHOG:
                g = g.to(dtype)
                y, d = _dot(g, S1, y), _dot(g, z1, d)
            d = tl.sum(d, 1)
            _store(out + b * oB + h * oH, oN, n, columns, rows, y * (1 / tl.maximum(d, EPS))[:, None])
            tl.store(norm + bh * N + n, d, mask=rows)


@triton.jit
def backward_kernel(
    q, k, v, dy, norm, dnorm, q_map, k_map, power, shift, sums, dsums, dq, dk, dv, dpower, dmap,
    H, N, scale, qB, qH, qN, kB, kH, kN, vB, vH, vN, yB, yH, yN, dqB, dqH, dqN, dB, dH, dN, SHARES, PARTS,
    K: tl.constexpr, MAP: tl.constexpr, POWER: tl.constexpr, PASSES: tl.constexpr,
    BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dq, dk, dv of a head, or of a share of its tokens; dk and dv have the same strides.

    PASSES: FIRST writes dq, and the sums over a share's queries, laid out as forward's. SECOND adds them up, where
    there are PARTS for each head, and writes dk and dv. BOTH does it at once, without them in memory. Derivatives by
    the power, [2, B H, SHARES], and by the maps, [2, B H, SHARES, K, K], are of the queries and of the keys.
    """
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    columns = _columns(K, BK)
    dtype: tl.constexpr = v.dtype.element_ty
    place = bh * SHARES + tl.program_id(1)
    sides = tl.num_programs(0).to(tl.int64) * SHARES
    first, last = _range(N, SHARES, BN)
    if PASSES != SECOND:
        w, P, L = _given(power, shift, q_map, bh, h, K, columns, dtype, MAP, POWER)
        S, z, S1, z1 = _sums_of(sums, bh, 1, K, columns, dtype, MAP)
        dS = tl.zeros([BK, BK], tl.float32)
        dz = tl.zeros([BK], tl.float32)
        dS1, dz1, dW, dP = dS, dz, dS, 0.0
        for start in range(first, last, BN):
            n = start + tl.arange(0, BN)
            rows = n < last
            x = _load(q + b * qB + h * qH, qN, n, columns, rows)
            x = x.to(dtype) if MAP == HEDGEHOG else x
            d = tl.load(norm + bh * N + n, mask=rows, other=1.0)
            e = tl.load(dnorm + bh * N + n, mask=rows, other=0.0)
            inverse = 1 / tl.maximum(d, EPS)
            u = _load(dy + b * yB + h * yH, yN, n, columns, rows).to(tl.float32) * inverse[:, None]
            u = u.to(dtype)
            f, g = _phi(x, w, P, L, scale, columns, MAP, POWER, True)
            df = _dot(u, tl.trans(S))
            dg = df
            along = tl.sum(f * df, 1)
            if MAP == HEDGEHOG:
                dg = _dot(u, tl.trans(S1))
                along += tl.sum(g * dg, 1)
            e -= tl.where(d >= EPS, along * inverse, 0.0)
            df += e[:, None] * z[None, :]
            if MAP == HEDGEHOG:
                dg += e[:, None] * z1[None, :]
                dS1 = _dot(tl.trans(g.to(dtype)), u, dS1)
                dz1 += tl.sum(g * e[:, None], 0)
            dx, dp, dw = _dphi(x, w, f, g, df, dg, P, scale, columns, rows, MAP, POWER)
            if MAP == HEDGEHOG:
                dW += dw
            dP += dp
            dS = _dot(tl.trans(f.to(dtype)), u, dS)
            dz += tl.sum(f * e[:, None], 0)
            _store(dq + b * dqB + h * dqH, dqN, n, columns, rows, dx)
        if PASSES == FIRST:
            _store_sums(dsums, place, K, columns, dS, dz, dS1, dz1, MAP)
        if MAP == FOCUSED and POWER == 0:
            tl.store(dpower + place, dP)
        if MAP == HEDGEHOG:
            _store_square(dmap + place * K * K, K, columns, dW)
        R, R1 = dS.to(dtype), dS1.to(dtype)
    else:
        R, dz, R1, dz1 = _sums_of(dsums, bh, PARTS, K, columns, dtype, MAP)
    if PASSES != FIRST:
        w, P, L = _given(power, shift, k_map, bh, h, K, columns, dtype, MAP, POWER)
        dW = tl.zeros([BK, BK], tl.float32)
        dP = 0.0
        for start in range(first, last, BN):
            n = start + tl.arange(0, BN)
            rows = n < last
            x = _load(k + b * kB + h * kH, kN, n, columns, rows)
            x = x.to(dtype) if MAP == HEDGEHOG else x
            y = _load(v + b * vB + h * vH, vN, n, columns, rows)
            f, g = _phi(x, w, P, L, scale, columns, MAP, POWER, False)
            df = _dot(y, tl.trans(R)) + dz[None, :]
            values = _dot(f.to(dtype), R)
            dg = df
            if MAP == HEDGEHOG:
                dg = _dot(y, tl.trans(R1)) + dz1[None, :]
                values = _dot(g.to(dtype), R1, values)
            dx, dp, dw = _dphi(x, w, f, g, df, dg, P, scale, columns, rows, MAP, POWER)
            if MAP == HEDGEHOG:
                dW += dw
            dP += dp
            _store(dk + b * dB + h * dH, dN, n, columns, rows, dx)
            _store(dv + b * dB + h * dH, dN, n, columns, rows, values)
        if MAP == FOCUSED and POWER == 0:
            tl.store(dpower + sides + place, dP)
        if MAP == HEDGEHOG:
            _store_square(dmap + (sides + place) * K * K, K, columns, dW)
