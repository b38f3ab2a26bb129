"""A depthwise convolution over the patches among tokens as Triton kernels: tokens are read once and written once.

    out[y, x] = base[y, x] + sum_ij taps[i, j] v[y + i - P, x + j - P],  P = SIZE // 2        per channel, zeros outside

A program has a block of channels and ROWS rows of the grid, and walks along the columns. A value that it loads is used
by all the outputs around it, which lie in registers until their last column has come; all sums are fp32. Prefix tokens
are those of base. Channels are counted over all heads, c = h K + k; the taps are [SIZE SIZE, H K].
"""

import triton
import triton.language as tl

SIZES = ["rows", "columns", "prefix", "strips", "units", "per"]  # one kernel for all grids
NOTHING, VALUES, OTHER = (tl.constexpr(i) for i in range(3))  # what the convolution is added to


@triton.jit
def _channels(program, D: tl.constexpr, BC: tl.constexpr):
    """Those of a program, [BC], which of them there are, and the rest of the program's number."""
    blocks: tl.constexpr = (D + BC - 1) // BC
    c = program % blocks * BC + tl.arange(0, BC)
    there = tl.full([BC], True, tl.int1)
    if D % BC:
        there = there & (c < D)
    return c, there, program // blocks


@triton.jit
def _column(at, y, x, rows, columns, stride, there, COUNT: tl.constexpr):
    """Patches [y, x] to [y + COUNT - 1, x] in fp32, as a tuple; zeros where the grid has no such row."""
    values = ()
    for i in tl.static_range(COUNT):
        inside = there & (y + i >= 0) & (y + i < rows)
        values += (tl.load(at + ((y + i) * columns + x) * stride, mask=inside, other=0.0),)
    return values


@triton.jit
def _wide(values, COUNT: tl.constexpr):
    wide = ()
    for i in tl.static_range(COUNT):
        wide += (values[i].to(tl.float32),)
    return wide


@triton.jit
def _zeros(COUNT: tl.constexpr, BC: tl.constexpr):
    values = ()
    for _ in tl.static_range(COUNT):
        values += (tl.zeros([BC], tl.float32),)
    return values


@triton.jit
def _store_column(
    out, base, sums, y, x, first, last, rows, columns, stride, there,
    J: tl.constexpr, D: tl.constexpr, BASE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The sums of column x, which are the J-th, where x is one of a part's own, `first` to before `last`."""
    for r in tl.static_range(ROWS):
        n = (y + r) * columns + x
        mine = there & (x >= first) & (x < last) & (y + r < rows)
        sum = sums[J * ROWS + r]
        if BASE == OTHER:
            sum += tl.load(base + n * stride, mask=mine, other=0.0).to(tl.float32)
        tl.store(out + n * D, sum.to(out.dtype.element_ty), mask=mine)


@triton.jit(do_not_specialize=SIZES)
def convolution_kernel(
    v, base, taps, out, rows, columns, prefix, strips, parts, vB, vH, vN, bB, bH, bN,
    K: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, BASE: tl.constexpr, TURNED: tl.constexpr,
    ROWS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out [B, N, D] of a strip of ROWS rows, or of one of its `parts` along the columns. TURNED: taps from the last."""
    P: tl.constexpr = SIZE // 2
    c, there, place = _channels(tl.program_id(0), D, BC)
    share = place % (strips * parts)
    b = (place // (strips * parts)).to(tl.int64)
    v += b * vB + c // K * vH + c % K
    base += b * bB + c // K * bH + c % K
    out += b * (prefix + rows * columns) * D + c

    for n in range(share, prefix, strips * parts):
        x = tl.zeros([BC], tl.float32)
        if BASE == VALUES:
            x = tl.load(v + n * vN, mask=there, other=0.0)
        if BASE == OTHER:
            x = tl.load(base + n * bN, mask=there, other=0.0)
        tl.store(out + n * D, x.to(out.dtype.element_ty), mask=there)
    v += prefix * vN
    base += prefix * bN
    out += prefix * D

    w = ()
    for i in tl.static_range(SIZE * SIZE):
        tap = tl.load(taps + (SIZE * SIZE - 1 - i if TURNED else i) * D + c, mask=there, other=0.0).to(tl.float32)
        if BASE == VALUES and i == SIZE * SIZE // 2:
            tap += 1.0
        w += (tap,)
    y = share % strips * ROWS
    width = tl.cdiv(columns, parts)
    first = share // strips * width
    last = tl.minimum(first + width, columns)
    end = tl.minimum(last + P, columns)
    sums = _zeros(SIZE * ROWS, BC)
    ahead = _column(v, y - P, tl.maximum(first - P, 0), rows, columns, vN, there, ROWS + 2 * P)
    for x in range(tl.maximum(first - P, 0), end):
        values = _wide(ahead, ROWS + 2 * P)
        ahead = _column(v, y - P, tl.minimum(x + 1, columns - 1), rows, columns, vN, there, ROWS + 2 * P)
        after = ()  # of columns x - P to x + P; those of x - P are complete
        for j in tl.static_range(SIZE):
            for r in tl.static_range(ROWS):
                sum = sums[(j + 1) * ROWS + r] if j < 2 * P else tl.zeros([BC], tl.float32)
                for i in tl.static_range(SIZE):
                    sum = tl.fma(w[i * SIZE + 2 * P - j], values[r + i], sum)
                after += (sum,)
        sums = after
        _store_column(out, base, sums, y, x - P, first, last, rows, columns, bN, there, 0, D, BASE, ROWS)
    for j in tl.static_range(1, P + 1):  # at the end of the grid
        _store_column(out, base, sums, y, end - 1 - P + j, first, last, rows, columns, bN, there, j, D, BASE, ROWS)


@triton.jit(do_not_specialize=SIZES)
def taps_kernel(
    dy, v, dtaps, rows, columns, prefix, strips, units, per, yB, yH, yN, vB, vH, vN,
    K: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dtaps [shares, SIZE SIZE, D] in fp32: sums over `per` of the `units`, which are the strips of all images."""
    P: tl.constexpr = SIZE // 2
    c, there, share = _channels(tl.program_id(0), D, BC)
    dy += c // K * yH + c % K + prefix * yN
    v += c // K * vH + c % K + prefix * vN
    sums = _zeros(SIZE * SIZE, BC)
    for unit in range(share * per, tl.minimum(share * per + per, units)):
        b = (unit // strips).to(tl.int64)
        y = unit % strips * ROWS
        window = ()  # dy of columns x + P - 1 to x - P
        for j in tl.static_range(2 * P):
            if j < P:
                column = _column(dy + b * yB, y, P - 1 - j, rows, columns, yN, there & (P - 1 - j < columns), ROWS)
                window += _wide(column, ROWS)
            else:
                window += _zeros(ROWS, BC)
        entering = _column(dy + b * yB, y, P, rows, columns, yN, there & (columns > P), ROWS)
        ahead = _column(v + b * vB, y - P, 0, rows, columns, vN, there, ROWS + 2 * P)
        for x in range(columns):
            window = _wide(entering, ROWS) + window
            values = _wide(ahead, ROWS + 2 * P)
            entering = _column(dy + b * yB, y, x + 1 + P, rows, columns, yN, there & (x + 1 + P < columns), ROWS)
            ahead = _column(v + b * vB, y - P, tl.minimum(x + 1, columns - 1), rows, columns, vN, there, ROWS + 2 * P)
            after = ()
            for i in tl.static_range(SIZE):
                for j in tl.static_range(SIZE):
                    sum = sums[i * SIZE + j]
                    for r in tl.static_range(ROWS):
                        sum = tl.fma(window[j * ROWS + r], values[r + i], sum)
                    after += (sum,)
            sums = after
            window = window[: 2 * P * ROWS]
    for i in tl.static_range(SIZE * SIZE):
        tl.store(dtaps + (share * SIZE * SIZE + i) * D + c, sums[i], mask=there)
