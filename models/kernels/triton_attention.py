"""Non-causal linear attention as fused Triton kernels: one pass over K and V, one over Q, and the same backward.

    S = sum_n phi(k_n) v_n^T,  z = sum_n phi(k_n),  d = phi(q) z,  y = phi(q) S / d        arXiv 2006.16236, equation 5

A program has a head of an image, or a share of its tokens where heads alone would leave multiprocessors idle; shares
are added in the same order each time, so results are the same to the bit. Features never reach memory. They are
rounded to the dtype of v for the products, which accumulate in fp32, as S, z and d do. Backward reads q, k, v, dy
and the fp32 state, makes the features again, and needs dS and dz between its two passes; with u = dy / d:

    df = u S^T + e z,  e = -(phi(q) u S^T) / d,  dS = phi(q)^T u,  dz = phi(q)^T e,  dg = v dS^T + dz,  dv = phi(k) dS

Feature maps, by their number `MAP`: see `MAPS`. Rows are tokens, columns features; columns above K are padding.
"""

import triton
import triton.language as tl

ELU1, RELU, FOCUSED, EXP, HEDGEHOG = (tl.constexpr(i) for i in range(5))
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
def _focus(e, power, columns):
    """e^P of rows divided by their maximum, its logarithm before the power, and both norms."""
    log = tl.log(tl.maximum(e / tl.maximum(tl.max(e, 1), TINY)[:, None], TINY))
    sharp = tl.where(columns[None, :], tl.exp(power * log), 0.0)
    return sharp, log, tl.sqrt(tl.sum(e * e, 1)), tl.maximum(tl.sqrt(tl.sum(sharp * sharp, 1)), TINY)


@triton.jit
def _softmax(x, columns):
    x = tl.where(columns[None, :], x, float("-inf"))
    e = tl.exp(x - tl.max(x, 1)[:, None])
    return e / tl.sum(e, 1)[:, None]


@triton.jit
def _phi(x, power, shift, scale, columns, rows, MAP: tl.constexpr, QUERY: tl.constexpr):
    """Features [BN, BK] in fp32, of every map but Hedgehog's: 0 in padding."""
    if MAP == ELU1:
        f = _elu1(x)
    elif MAP == RELU:
        f = tl.maximum(x, 0.0)
    elif MAP == FOCUSED:
        e = tl.where(columns[None, :], _elu1(x), 0.0)
        sharp, _, norm, sharp_norm = _focus(e, power, columns)
        f = sharp * (norm / sharp_norm)[:, None]
    elif QUERY:
        t = tl.where(columns[None, :], x * scale + shift[None, :], float("-inf"))
        f = tl.exp(t - tl.max(t, 1)[:, None])
    else:
        f = tl.exp(x * scale - shift[None, :])
    return tl.where(rows[:, None] & columns[None, :], f, 0.0)


@triton.jit
def _dphi(x, df, power, shift, scale, columns, rows, MAP: tl.constexpr, QUERY: tl.constexpr):
    """dx [BN, BK] from df, and the derivative by the power for each row."""
    if MAP == ELU1:
        dx = df * tl.where(x > 0, 1.0, tl.exp(tl.minimum(x, 0.0)))
        dpower = tl.zeros([x.shape[0]], tl.float32)
    elif MAP == RELU:
        dx = tl.where(x > 0, df, 0.0)
        dpower = tl.zeros([x.shape[0]], tl.float32)
    elif MAP == FOCUSED:
        slope = tl.where(x > 0, 1.0, tl.exp(tl.minimum(x, 0.0)))
        e = tl.where(columns[None, :], _elu1(x), 0.0)
        sharp, log, norm, sharp_norm = _focus(e, power, columns)
        ratio, along = norm / sharp_norm, tl.sum(df * sharp, 1)
        # Of the rescaling: d sharp, and what comes by the norm of e.
        dsharp = df * ratio[:, None] - sharp * (along * norm / (sharp_norm * sharp_norm * sharp_norm))[:, None]
        dlog = dsharp * sharp
        de = dlog * power / tl.maximum(e, TINY)
        de += e * (along / (sharp_norm * tl.maximum(norm, TINY)))[:, None]
        dx = tl.where(columns[None, :], de * slope, 0.0)
        dpower = tl.where(rows, tl.sum(dlog * log, 1), 0.0)
    else:
        dx = df * scale * _phi(x, power, shift, scale, columns, rows, MAP, QUERY)
        dpower = tl.zeros([x.shape[0]], tl.float32)
    return dx, dpower


@triton.jit
def _hedgehog(x, w, columns, rows):
    """softmax(x W) and softmax(-x W), [BN, BK] each in fp32: 0 in padding."""
    t = _dot(x, w)
    inside = rows[:, None] & columns[None, :]
    return tl.where(inside, _softmax(t, columns), 0.0), tl.where(inside, _softmax(-t, columns), 0.0)


@triton.jit
def _dhedgehog(x, w, f, g, df, dg):
    """dx [BN, BK], and x^T d(x W) [BK, BK] of these rows; f and g are the halves of the features."""
    dt = f * (df - tl.sum(df * f, 1)[:, None]) - g * (dg - tl.sum(dg * g, 1)[:, None])
    dt = dt.to(x.dtype)
    return _dot(dt, tl.trans(w)), _dot(tl.trans(x), dt)


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
def _square(at, K, columns):
    """A [K, K] matrix, padded with zeros."""
    i = tl.arange(0, columns.shape[0])
    return tl.load(at + i[:, None] * K + i[None, :], mask=columns[:, None] & columns[None, :], other=0.0)


@triton.jit
def _store_square(at, K, columns, x):
    i = tl.arange(0, columns.shape[0])
    tl.store(at + i[:, None] * K + i[None, :], x, mask=columns[:, None] & columns[None, :])


@triton.jit
def _row(at, columns):
    return tl.load(at + tl.arange(0, columns.shape[0]), mask=columns, other=0.0)


@triton.jit
def _store_row(at, columns, x):
    tl.store(at + tl.arange(0, columns.shape[0]), x, mask=columns)


@triton.jit
def _range(N, SHARES: tl.constexpr, BN: tl.constexpr):
    """First and last token of a share: whole blocks."""
    if SHARES == 1:
        return 0, N
    per = tl.cdiv(tl.cdiv(N, BN), SHARES) * BN
    first = tl.program_id(1) * per
    return first, tl.minimum(first + per, N)


@triton.jit
def state_kernel(
    k, v, k_map, power, shift, state, total, H, N, K, scale,
    kB, kH, kN, vB, vH, vN,
    MAP: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """Sums of a share: state [B H, SHARES, halves, K, K] and total [B H, SHARES, halves, K] in fp32."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    columns = tl.arange(0, BK) < K
    P = tl.load(power + h) if MAP == FOCUSED else 1.0
    L = _row(shift + bh * K, columns) if MAP == EXP else tl.zeros([BK], tl.float32)
    if MAP == HEDGEHOG:
        w = _square(k_map + h * K * K, K, columns).to(v.dtype.element_ty)
        S1 = tl.zeros([BK, BK], tl.float32)
        z1 = tl.zeros([BK], tl.float32)
    S = tl.zeros([BK, BK], tl.float32)
    z = tl.zeros([BK], tl.float32)
    first, last = _range(N, SHARES, BN)
    for start in range(first, last, BN):
        n = start + tl.arange(0, BN)
        rows = n < last
        x = _load(k + b * kB + h * kH, kN, n, columns, rows)
        y = _load(v + b * vB + h * vH, vN, n, columns, rows)
        if MAP == HEDGEHOG:
            f, g = _hedgehog(x.to(y.dtype), w, columns, rows)
            g = g.to(y.dtype)
            S1 = _dot(tl.trans(g), y, S1)
            z1 += tl.sum(g.to(tl.float32), 0)
        else:
            f = _phi(x.to(tl.float32), P, L, scale, columns, rows, MAP, False)
        f = f.to(y.dtype)
        S = _dot(tl.trans(f), y, S)
        z += tl.sum(f.to(tl.float32), 0)
    HALVES: tl.constexpr = 2 if MAP == HEDGEHOG else 1
    place = (bh * SHARES + tl.program_id(1)) * HALVES
    _store_square(state + place * K * K, K, columns, S)
    _store_row(total + place * K, columns, z)
    if MAP == HEDGEHOG:
        _store_square(state + (place + 1) * K * K, K, columns, S1)
        _store_row(total + (place + 1) * K, columns, z1)


@triton.jit
def output_kernel(
    q, q_map, power, shift, state, total, out, norm, H, N, K, scale,
    qB, qH, qN, oB, oH, oN,
    MAP: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """out [B, H, N, K] and norm [B, H, N] of a share of the queries, from the whole state."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    columns = tl.arange(0, BK) < K
    P = tl.load(power + h) if MAP == FOCUSED else 1.0
    L = _row(shift + bh * K, columns) if MAP == EXP else tl.zeros([BK], tl.float32)
    HALVES: tl.constexpr = 2 if MAP == HEDGEHOG else 1
    S = _square(state + bh * HALVES * K * K, K, columns).to(out.dtype.element_ty)
    z = _row(total + bh * HALVES * K, columns)
    if MAP == HEDGEHOG:
        w = _square(q_map + h * K * K, K, columns).to(out.dtype.element_ty)
        S1 = _square(state + (bh * 2 + 1) * K * K, K, columns).to(out.dtype.element_ty)
        z1 = _row(total + (bh * 2 + 1) * K, columns)
    first, last = _range(N, SHARES, BN)
    for start in range(first, last, BN):
        n = start + tl.arange(0, BN)
        rows = n < last
        x = _load(q + b * qB + h * qH, qN, n, columns, rows)
        if MAP == HEDGEHOG:
            f, g = _hedgehog(x.to(S.dtype), w, columns, rows)
            g = g.to(S.dtype)
            f = f.to(S.dtype)
            y = _dot(g, S1, _dot(f, S))
            d = tl.sum(f.to(tl.float32) * z[None, :] + g.to(tl.float32) * z1[None, :], 1)
        else:
            f = _phi(x.to(tl.float32), P, L, scale, columns, rows, MAP, True).to(S.dtype)
            y = _dot(f, S)
            d = tl.sum(f.to(tl.float32) * z[None, :], 1)
        y = y / tl.maximum(d, EPS)[:, None]
        _store(out + b * oB + h * oH, oN, n, columns, rows, y)
        tl.store(norm + bh * N + n, d, mask=rows)


@triton.jit
def queries_kernel(
    q, dy, norm, dnorm, q_map, power, shift, state, total, dq, dstate, dtotal, dpower, dmap, H, N, K, scale,
    qB, qH, qN, yB, yH, yN, dB, dH, dN,
    MAP: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """dq of a share of the queries, and its sums of dS and dz, of the power's and the map's derivatives."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    columns = tl.arange(0, BK) < K
    P = tl.load(power + h) if MAP == FOCUSED else 1.0
    L = _row(shift + bh * K, columns) if MAP == EXP else tl.zeros([BK], tl.float32)
    HALVES: tl.constexpr = 2 if MAP == HEDGEHOG else 1
    z = _row(total + bh * HALVES * K, columns)
    dS = tl.zeros([BK, BK], tl.float32)
    dz = tl.zeros([BK], tl.float32)
    dP = 0.0
    if MAP == HEDGEHOG:
        w = _square(q_map + h * K * K, K, columns).to(dy.dtype.element_ty)
        z1 = _row(total + (bh * 2 + 1) * K, columns)
        dS1 = tl.zeros([BK, BK], tl.float32)
        dz1 = tl.zeros([BK], tl.float32)
        dW = tl.zeros([BK, BK], tl.float32)
    first, last = _range(N, SHARES, BN)
    for start in range(first, last, BN):
        n = start + tl.arange(0, BN)
        rows = n < last
        x = _load(q + b * qB + h * qH, qN, n, columns, rows)
        d = tl.load(norm + bh * N + n, mask=rows, other=1.0)
        e = tl.load(dnorm + bh * N + n, mask=rows, other=0.0)
        floor = tl.maximum(d, EPS)
        u = _load(dy + b * yB + h * yH, yN, n, columns, rows).to(tl.float32) / floor[:, None]
        u = u.to(dy.dtype.element_ty)
        # Read again for each block, from the cache: kept, it would take the registers of the rest.
        S = _square(state + bh * HALVES * K * K, K, columns).to(u.dtype)
        df = _dot(u, tl.trans(S))
        if MAP == HEDGEHOG:
            f, g = _hedgehog(x.to(S.dtype), w, columns, rows)
            S1 = _square(state + (bh * 2 + 1) * K * K, K, columns).to(u.dtype)
            dg = _dot(u, tl.trans(S1))
            e -= tl.where(d >= EPS, tl.sum(f * df + g * dg, 1) / floor, 0.0)
            df += e[:, None] * z[None, :]
            dg += e[:, None] * z1[None, :]
            dx, dw = _dhedgehog(x.to(S.dtype), w, f, g, df, dg)
            dW += dw
            dS1 = _dot(tl.trans(g.to(S.dtype)), u, dS1)
            dz1 += tl.sum(g * e[:, None], 0)
        else:
            f = _phi(x.to(tl.float32), P, L, scale, columns, rows, MAP, True)
            e -= tl.where(d >= EPS, tl.sum(f * df, 1) / floor, 0.0)
            df += e[:, None] * z[None, :]
            dx, dp = _dphi(x.to(tl.float32), df, P, L, scale, columns, rows, MAP, True)
            dP += tl.sum(dp, 0)
        dS = _dot(tl.trans(f.to(S.dtype)), u, dS)
        dz += tl.sum(f * e[:, None], 0)
        _store(dq + b * dB + h * dH, dN, n, columns, rows, dx)
    place = bh * SHARES + tl.program_id(1)
    _store_square(dstate + place * HALVES * K * K, K, columns, dS)
    _store_row(dtotal + place * HALVES * K, columns, dz)
    if MAP == FOCUSED:
        tl.store(dpower + place, dP)
    if MAP == HEDGEHOG:
        _store_square(dstate + (place * 2 + 1) * K * K, K, columns, dS1)
        _store_row(dtotal + (place * 2 + 1) * K, columns, dz1)
        _store_square(dmap + place * K * K, K, columns, dW)


@triton.jit
def keys_kernel(
    k, v, k_map, power, shift, dstate, dtotal, dk, dv, dpower, dmap, H, N, K, scale,
    kB, kH, kN, vB, vH, vN, dB, dH, dN,
    MAP: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """dk and dv of a share of the keys, from the whole dS and dz; dk and dv have the same strides."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    columns = tl.arange(0, BK) < K
    P = tl.load(power + h) if MAP == FOCUSED else 1.0
    L = _row(shift + bh * K, columns) if MAP == EXP else tl.zeros([BK], tl.float32)
    HALVES: tl.constexpr = 2 if MAP == HEDGEHOG else 1
    dS = _square(dstate + bh * HALVES * K * K, K, columns).to(v.dtype.element_ty)
    dz = _row(dtotal + bh * HALVES * K, columns)
    dP = 0.0
    if MAP == HEDGEHOG:
        w = _square(k_map + h * K * K, K, columns).to(v.dtype.element_ty)
        dS1 = _square(dstate + (bh * 2 + 1) * K * K, K, columns).to(v.dtype.element_ty)
        dz1 = _row(dtotal + (bh * 2 + 1) * K, columns)
        dW = tl.zeros([BK, BK], tl.float32)
    first, last = _range(N, SHARES, BN)
    for start in range(first, last, BN):
        n = start + tl.arange(0, BN)
        rows = n < last
        x = _load(k + b * kB + h * kH, kN, n, columns, rows)
        y = _load(v + b * vB + h * vH, vN, n, columns, rows)
        df = _dot(y, tl.trans(dS)) + dz[None, :]
        if MAP == HEDGEHOG:
            f, g = _hedgehog(x.to(y.dtype), w, columns, rows)
            dg = _dot(y, tl.trans(dS1)) + dz1[None, :]
            dx, dw = _dhedgehog(x.to(y.dtype), w, f, g, df, dg)
            dW += dw
            values = _dot(g.to(y.dtype), dS1, _dot(f.to(y.dtype), dS))
        else:
            f = _phi(x.to(tl.float32), P, L, scale, columns, rows, MAP, False)
            dx, dp = _dphi(x.to(tl.float32), df, P, L, scale, columns, rows, MAP, False)
            dP += tl.sum(dp, 0)
            values = _dot(f.to(y.dtype), dS)
        _store(dk + b * dB + h * dH, dN, n, columns, rows, dx)
        _store(dv + b * dB + h * dH, dN, n, columns, rows, values)
    place = bh * SHARES + tl.program_id(1)
    if MAP == FOCUSED:
        tl.store(dpower + place, dP)
    if MAP == HEDGEHOG:
        _store_square(dmap + place * K * K, K, columns, dW)
