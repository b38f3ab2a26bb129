"""Softmax attention of patches to the SIZE x SIZE patches around them, and to one key more, as Triton kernels.

A program has one head of BC patches that lie side by side in a row of the grid. It takes the keys of its windows one
place of the window after the other, from caches but for the first time; logits, weights and sums are fp32. A window
holds a patch when the patch's own window holds its centre, so backward finds a key's queries as a query finds its keys.
Known keys are the same all over a block of height x width patches, and a window meets at most SPAN x SPAN blocks: 0
where there are none.
Derivatives are made from the logarithm of the normaliser, which forward keeps, as in flash attention, arXiv 2205.14135.
"""

import triton
import triton.language as tl

GRID = ["rows", "columns", "height", "width"]  # one kernel for all grids
LOW = tl.constexpr(-1e38)  # in place of -inf, which has no difference to itself


@triton.jit
def _place(columns, H, BC: tl.constexpr):
    """Rows and columns [BC] of a program's patches, which lie in one row; its image and head."""
    segments = tl.cdiv(columns, BC)
    program = tl.program_id(0)
    image = (tl.program_id(1) // H).to(tl.int64)
    y = program // segments + tl.zeros([BC], tl.int32)
    return y, program % segments * BC + tl.arange(0, BC), image, tl.program_id(1) % H


@triton.jit
def _window(y, x, rows, columns, I: tl.constexpr, SIZE: tl.constexpr):
    """Tokens [BC] at the I-th place of the windows around patches [y, x], and which of them there are."""
    row = y + I // SIZE - SIZE // 2
    column = x + I % SIZE - SIZE // 2
    there = (x < columns) & (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    return row * columns + column, there


@triton.jit
def _load(at, n, stride, there, K: tl.constexpr, BK: tl.constexpr):
    """Rows n of a head's tokens in fp32, [BC, BK]; zeros where there are none."""
    c = tl.arange(0, BK)
    return tl.load(at + n[:, None] * stride + c, mask=there[:, None] & (c < K), other=0.0).to(tl.float32)


@triton.jit
def _store(at, n, stride, there, rows, K: tl.constexpr, BK: tl.constexpr):
    c = tl.arange(0, BK)
    tl.store(at + n[:, None] * stride + c, rows.to(at.dtype.element_ty), mask=there[:, None] & (c < K))


@triton.jit
def _block(y, x, rows, columns, height, width, i, SIZE: tl.constexpr, SPAN: tl.constexpr):
    """A token [BC] of the i-th block of known keys that the windows around patches [y, x] meet, and which there are."""
    top, left = tl.maximum(y - SIZE // 2, 0), tl.maximum(x - SIZE // 2, 0)
    row = tl.maximum((top // height + i // SPAN) * height, top)
    column = tl.maximum((left // width + i % SPAN) * width, left)
    there = (x < columns) & (row < rows) & (row <= y + SIZE // 2) & (column < columns) & (column <= x + SIZE // 2)
    return row * columns + column, there


@triton.jit
def _which(y, x, height, width, I: tl.constexpr, SIZE: tl.constexpr, SPAN: tl.constexpr, BS: tl.constexpr):
    """Which block [BC, BS] of `_block` has the I-th place of the windows around patches [y, x]."""
    top, left = tl.maximum(y - SIZE // 2, 0), tl.maximum(x - SIZE // 2, 0)
    row = (y + (I // SIZE - SIZE // 2)) // height - top // height
    column = (x + (I % SIZE - SIZE // 2)) // width - left // width
    return (row * SPAN + column)[:, None] == tl.arange(0, BS)[None, :]


@triton.jit
def _known(queries, known, stride, y, x, rows, columns, height, width, SIZE: tl.constexpr, SPAN: tl.constexpr,
           BS: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Products [BC, BS] of queries with the known keys of each block that their windows meet."""
    i = tl.arange(0, BS)[None, :]
    products = tl.zeros([queries.shape[0], BS], tl.float32)
    for block in range(SPAN * SPAN):
        m, there = _block(y, x, rows, columns, height, width, block, SIZE, SPAN)
        product = tl.sum(queries * _load(known, m, stride, there, K, BK), 1)
        products = tl.where(i == block, product[:, None], products)
    return products


@triton.jit(do_not_specialize=GRID)
def forward_kernel(
    q, k, v, other, logit, known, bias, out, total, rows, columns, height, width, H, scale,
    qB, qH, qN, kB, kH, kN, vB, vH, vN, otherB, otherH, otherN, lessB, lessH, lessN, outB, outH, outN,
    K: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, SIZE: tl.constexpr, SPAN: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """out [B, H, N, K] and total [B, H, N], the logarithm of the normaliser; `logit` [B, H, N] is that of `other`."""
    y, x, b, h = _place(columns, H, BC)
    mine = x < columns
    n = y * columns + x
    k += b * kB + h * kH
    v += b * vB + h * vH
    known += b * lessB + h * lessH
    one = (b * H + h) * rows * columns
    queries = _load(q + b * qB + h * qH, n, qN, mine, K, BK) * scale
    first = tl.load(logit + one + n, mask=mine, other=0.0)
    most = tl.maximum(first, LOW)
    norm = tl.exp(first - most)
    sums = _load(other + b * otherB + h * otherH, n, otherN, mine, K, BK) * norm[:, None]
    if SPAN:
        products = _known(queries, known, lessN, y, x, rows, columns, height, width, SIZE, SPAN, BS, K, BK)
    for i in tl.static_range(SIZE * SIZE):
        m, there = _window(y, x, rows, columns, i, SIZE)
        s = tl.where(there, tl.sum(queries * _load(k, m, kN, there, K, BK), 1), float("-inf"))
        larger = tl.maximum(most, s)
        fade, weight = tl.exp(most - larger), tl.exp(s - larger)
        if SPAN:  # no more than `first` gives to all of these
            t = tl.sum(tl.where(_which(y, x, height, width, i, SIZE, SPAN, BS), products, 0.0), 1)
            t += tl.load(bias + one + m, mask=there, other=0.0)
            weight -= tl.where(there, tl.exp(t - larger), 0.0)
        norm = norm * fade + weight
        sums = sums * fade[:, None] + weight[:, None] * _load(v, m, vN, there, K, BK)
        most = larger
    _store(out + b * outB + h * outH, n, outN, mine, sums / norm[:, None], K, BK)
    tl.store(total + one + n, most + tl.log(norm), mask=mine)


@triton.jit(do_not_specialize=GRID)
def by_queries_kernel(
    dy, q, k, v, other, logit, known, bias, out, total, dq, dother, dlogit, along,
    rows, columns, height, width, H, scale,
    yB, yH, yN, qB, qH, qN, kB, kH, kN, vB, vH, vN, otherB, otherH, otherN, lessB, lessH, lessN, outB, outH, outN,
    dqB, dqH, dqN, doB, doH, doN,
    K: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, SIZE: tl.constexpr, SPAN: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Derivatives by queries and by their own keys; along [B, H, N] = dy . out, which `by_keys_kernel` needs."""
    y, x, b, h = _place(columns, H, BC)
    mine = x < columns
    n = y * columns + x
    k += b * kB + h * kH
    v += b * vB + h * vH
    known += b * lessB + h * lessH
    one = (b * H + h) * rows * columns
    queries = _load(q + b * qB + h * qH, n, qN, mine, K, BK) * scale
    d = _load(dy + b * yB + h * yH, n, yN, mine, K, BK)
    a = tl.sum(d * _load(out + b * outB + h * outH, n, outN, mine, K, BK), 1)
    tl.store(along + one + n, a, mask=mine)
    norm = tl.load(total + one + n, mask=mine, other=0.0)
    weight = tl.exp(tl.load(logit + one + n, mask=mine, other=0.0) - norm)
    by_value = tl.sum(d * _load(other + b * otherB + h * otherH, n, otherN, mine, K, BK), 1)
    tl.store(dlogit + one + n, weight * (by_value - a), mask=mine)
    _store(dother + b * doB + h * doH, n, doN, mine, weight[:, None] * d, K, BK)
    sums = tl.zeros([BC, BK], tl.float32)
    if SPAN:
        products = _known(queries, known, lessN, y, x, rows, columns, height, width, SIZE, SPAN, BS, K, BK)
        taken = tl.zeros([BC, BS], tl.float32)
    for i in tl.static_range(SIZE * SIZE):
        m, there = _window(y, x, rows, columns, i, SIZE)
        keys = _load(k, m, kN, there, K, BK)
        weight = tl.where(there, tl.exp(tl.sum(queries * keys, 1) - norm), 0.0)
        by_value = tl.sum(d * _load(v, m, vN, there, K, BK), 1)
        sums += (weight * (by_value - a))[:, None] * keys
        if SPAN:
            which = _which(y, x, height, width, i, SIZE, SPAN, BS)
            t = tl.sum(tl.where(which, products, 0.0), 1) + tl.load(bias + one + m, mask=there, other=0.0)
            weight = tl.where(there, tl.exp(t - norm), 0.0)
            taken += tl.where(which, (weight * (by_value - a))[:, None], 0.0)
    if SPAN:
        for block in range(SPAN * SPAN):
            m, there = _block(y, x, rows, columns, height, width, block, SIZE, SPAN)
            weight = tl.sum(tl.where(tl.arange(0, BS)[None, :] == block, taken, 0.0), 1)
            sums -= weight[:, None] * _load(known, m, lessN, there, K, BK)
    _store(dq + b * dqB + h * dqH, n, dqN, mine, sums * scale, K, BK)


@triton.jit(do_not_specialize=GRID)
def by_keys_kernel(
    dy, q, k, v, known, bias, total, along, dk, dv, dknown, dbias, rows, columns, height, width, H, scale,
    yB, yH, yN, qB, qH, qN, kB, kH, kN, vB, vH, vN, lessB, lessH, lessN, dkB, dkH, dkN, dvB, dvH, dvN, dlB, dlH, dlN,
    K: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, SIZE: tl.constexpr, SPAN: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Derivatives by keys and values, and by known keys and their biases."""
    y, x, b, h = _place(columns, H, BC)
    mine = x < columns
    n = y * columns + x
    q += b * qB + h * qH
    dy += b * yB + h * yH
    one = (b * H + h) * rows * columns
    keys = _load(k + b * kB + h * kH, n, kN, mine, K, BK) * scale
    values = _load(v + b * vB + h * vH, n, vN, mine, K, BK)
    by_keys = tl.zeros([BC, BK], tl.float32)
    by_values = tl.zeros([BC, BK], tl.float32)
    if SPAN:
        less = _load(known + b * lessB + h * lessH, n, lessN, mine, K, BK) * scale
        first = tl.load(bias + one + n, mask=mine, other=0.0)
        by_known = tl.zeros([BC, BK], tl.float32)
        by_bias = tl.zeros([BC], tl.float32)
    for i in tl.static_range(SIZE * SIZE):
        m, there = _window(y, x, rows, columns, i, SIZE)
        queries = _load(q, m, qN, there, K, BK)
        d = _load(dy, m, yN, there, K, BK)
        norm = tl.load(total + one + m, mask=there, other=0.0)
        weight = tl.where(there, tl.exp(tl.sum(queries * keys, 1) - norm), 0.0)
        by_value = tl.sum(d * values, 1) - tl.load(along + one + m, mask=there, other=0.0)
        by_keys += (weight * by_value)[:, None] * queries
        if SPAN:
            taken = tl.where(there, tl.exp(tl.sum(queries * less, 1) + first - norm), 0.0)
            weight -= taken
            by_known -= (taken * by_value)[:, None] * queries
            by_bias -= taken * by_value
        by_values += weight[:, None] * d
    _store(dk + b * dkB + h * dkH, n, dkN, mine, by_keys * scale, K, BK)
    _store(dv + b * dvB + h * dvH, n, dvN, mine, by_values, K, BK)
    if SPAN:
        _store(dknown + b * dlB + h * dlH, n, dlN, mine, by_known * scale, K, BK)
        tl.store(dbias + one + n, by_bias, mask=mine)
