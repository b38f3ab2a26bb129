"""Each operator and addition by its formula: N x N weights and loops, written apart from the models.

`OPERATORS[name](op, q, k, v, x, grid)` gives what the operator `op` should; the parameters are read from `op`.
"""

import itertools
import math

import torch
from torch.nn import functional as F


def elu1(x):
    return torch.where(x > 0, x + 1, torch.exp(torch.minimum(x, torch.zeros_like(x))))


def mean_of(weights, v):
    """Weights [B, H, N, N], normalised."""
    return (weights / weights.sum(-1, keepdim=True)) @ v


def by_map(phi):
    """phi(op, x, "q" or "k")."""
    return lambda op, q, k, v, x, grid: mean_of(phi(op, q, "q") @ phi(op, k, "k").mT, v)


def focused(power):
    def phi(op, x, _):
        x, p = elu1(x), power(op)
        return x**p * x.square().sum(-1, keepdim=True).sqrt() / (x**p).square().sum(-1, keepdim=True).sqrt()

    return by_map(phi)


def hedgehog(op, x, side):
    x = torch.einsum("bhnk,hkf->bhnf", x, op.q_map if side == "q" else op.k_map)
    return torch.cat([torch.softmax(x, -1), torch.softmax(-x, -1)], -1)


def scores(q, k):
    """phi(q) phi(k)^T / (N sqrt(K)), and its sums over keys."""
    s = elu1(q) @ elu1(k).mT / (k.shape[2] * k.shape[3] ** 0.5)
    return s, s.sum(-1, keepdim=True)


def mala(op, q, k, v, x, grid):
    s, z = scores(q, k)
    return ((1 + 1 / z) * s - z / k.shape[2]) @ v


def inline(op, q, k, v, x, grid):
    s, z = scores(q, k)
    return (s - (z - 1) / k.shape[2]) @ v


def mhla(op, q, k, v, x, grid):
    (rows, columns), prefix = grid, q.shape[2] - grid[0] * grid[1]
    height, width = (-(-side // op.cells) for side in grid)
    cells = [0] * prefix  # prefix tokens are the first cell
    cells += [(i // height) * op.cells + j // width + (prefix > 0) for i in range(rows) for j in range(columns)]
    return mean_of(elu1(q) @ elu1(k).mT * op.mixture.clamp(min=0)[cells][:, cells], v)


def rala(op, q, k, v, x, grid):
    alike = (elu1(q).mean(2, keepdim=True) @ elu1(k).mT) / k.shape[3] ** 0.5
    out = mean_of(elu1(q) @ elu1(k).mT * torch.softmax(alike, -1), v)
    modulation = x @ op.modulation.weight.T + op.modulation.bias
    return out * modulation.unflatten(-1, (q.shape[1], -1)).transpose(1, 2)


def polaformer(op, q, k, v, x, grid):
    s, p = torch.log(1 + torch.exp(op.scale)), 1 + 4 / (1 + torch.exp(-op.power))

    def power(x):
        return torch.where(x > 0, x, 0) ** p

    q, k, half = q / s, k / s, v.shape[-1] // 2
    same = power(q) @ power(k).mT + power(-q) @ power(-k).mT
    opposite = power(q) @ power(-k).mT + power(-q) @ power(k).mT
    return torch.cat([mean_of(same, v[..., :half]), mean_of(opposite, v[..., half:])], -1)


def pooled(op, q, k, v, x, grid):
    """Weights [N, N]: exact for near patches and for prefix tokens, else a patch's part of its cell's weight."""
    N, K, prefix = q.shape[2], q.shape[3], op.prefix
    scale = 1 / math.sqrt(K)
    near_q, near_k = q[:, :, prefix:], k[:, :, prefix:]
    cells = [cell for cell in parts(grid, op.sides[0]) if cell]
    regions = parts(grid, math.ceil(max(grid) / op.sides[2]))
    landmarks = torch.stack([near_q[:, :, part].mean(2) for part in regions if part], 2)
    exact = torch.exp(scale * q @ k.mT)

    def masses(queries, about):
        """exp(logit) [..., cells], and for each patch of a cell the part of it."""
        found, shares = [], []
        for cell, m in zip(cells, about, strict=True):
            own = torch.exp(scale * (near_k[:, :, cell] * m[:, :, None]).sum(-1))
            share = own / own.sum(-1, keepdim=True)
            key = (share[..., None] * near_k[:, :, cell]).sum(2)
            found.append(
                own.sum(-1, keepdim=True) * torch.exp(scale * ((queries - m[:, :, None]) * key[:, :, None]).sum(-1))
            )
            shares.append(share)
        return torch.stack(found, -1), shares

    means = torch.stack([near_k[:, :, cell].mean(2) for cell in cells], 2)
    seen = torch.exp(scale * landmarks @ means.mT) * torch.tensor([len(cell) for cell in cells])
    total = seen.sum(-1) + torch.exp(scale * landmarks @ k[:, :, :prefix].mT).sum(-1)
    attends = seen / total[..., None]
    about = [(attends[..., c, None] * landmarks).sum(2) / attends[..., c].sum(2)[..., None] for c in range(len(cells))]
    mass, shares = masses(q, about)
    weights = exact.clone()
    for c, cell in enumerate(cells):
        weights[..., [prefix + n for n in cell]] = mass[..., c, None] * shares[c][:, :, None]
    return mean_of(torch.where(windows(N, grid, op.sides[1]), exact, weights), v)


def parts(grid, sides):
    """Patches of the sides x sides parts of a grid, row after row of parts; the last may be smaller, or empty."""
    (rows, columns), height, width = grid, -(-grid[0] // sides), -(-grid[1] // sides)
    places = [(i // height, j // width) for i in range(rows) for j in range(columns)]
    return [[n for n, at in enumerate(places) if at == part] for part in itertools.product(range(sides), repeat=2)]


def windows(N, grid, size):
    """[N, N]: whether a token sees another. Prefix tokens see all, and all see them."""
    (rows, columns), prefix = grid, N - grid[0] * grid[1]
    seen = torch.ones(N, N, dtype=torch.bool)
    for i, j in itertools.product(range(rows * columns), repeat=2):
        rows_apart, columns_apart = abs(i // columns - j // columns), abs(i % columns - j % columns)
        seen[prefix + i, prefix + j] = max(rows_apart, columns_apart) <= size // 2
    return seen


OPERATORS = {
    "elu1": by_map(lambda op, x, _: elu1(x)),
    "relu": by_map(lambda op, x, _: x * (x > 0)),
    "focused": focused(lambda op: op.power),
    "focused_learned": focused(lambda op: op.power),
    "hedgehog": by_map(hedgehog),
    "exp": by_map(lambda op, x, _: torch.exp(x / x.shape[-1] ** 0.25)),
    "mala": mala,
    "inline": inline,
    "mhla": mhla,
    "rala": rala,
    "polaformer": polaformer,
    "pooled": pooled,
}


def convolved(x, kernels, grid):
    """Depthwise, patch by patch; `kernels` [B or 1, H K, size, size]."""
    _, H, N, K = x.shape
    (rows, columns), prefix, size = grid, N - grid[0] * grid[1], kernels.shape[-1]
    kernels = kernels.unflatten(1, (H, K))
    out = [torch.zeros_like(x[:, :, 0])] * prefix
    for i in range(rows):
        for j in range(columns):
            total = torch.zeros_like(x[:, :, 0])
            for a in range(size):
                for b in range(size):
                    row, column = i + a - size // 2, j + b - size // 2
                    if 0 <= row < rows and 0 <= column < columns:
                        total = total + kernels[..., a, b] * x[:, :, prefix + row * columns + column]
            out.append(total)
    return torch.stack(out, 2)


def dynamic(add, v, x):
    B, H, _, K = v.shape
    mean = x.mean(1).unflatten(-1, (H, -1))
    hidden = torch.einsum("bhd,hkd->bhk", mean, add.hidden.weight.squeeze(-1).unflatten(0, (H, K)))
    hidden = F.gelu(hidden + add.hidden.bias.unflatten(0, (H, K)))
    kernels = torch.einsum("bhd,hkd->bhk", hidden, add.kernels.weight.squeeze(-1).unflatten(0, (H, 9 * K)))
    return (kernels + add.kernels.bias.unflatten(0, (H, 9 * K))).reshape(B, H * K, 3, 3)


def value_conv(add, attend, q, k, v, x, grid):
    return attend(q, k, v + convolved(v, add.weight.squeeze(1)[None], grid))


def local_conv(add, attend, q, k, v, x, grid):
    return attend(q, k, v) + convolved(v, add.weight.squeeze(1)[None], grid)


def local_dynamic(add, attend, q, k, v, x, grid):
    return attend(q, k, v) + convolved(v, dynamic(add, v, x), grid)


def neighborhood(add, attend, q, k, v, x, grid):
    """One softmax over N + 1 keys, the last of which is all tokens; of patches all but near keys are masked."""
    N, K, (rows, columns) = q.shape[2], q.shape[3], grid
    prefix = N - rows * columns
    far = math.log(N) + (q * k.mean(2, keepdim=True)).sum(-1) / math.sqrt(K)
    far = far + (x @ add.far.weight.T + add.far.bias).transpose(1, 2)
    logits = torch.cat([q @ k.transpose(2, 3) / math.sqrt(K), far[..., None]], -1)
    seen = torch.cat([windows(N, grid, add.size), torch.arange(N)[:, None] >= prefix], 1)
    weights = logits.masked_fill(~seen, -math.inf).softmax(-1)
    return weights[..., :N] @ v + weights[..., N:] * attend(q, k, v)


def gate(add, attend, q, k, v, x, grid):
    gates = 2 / (1 + torch.exp(-(x @ add.gate.weight.T + add.gate.bias)))
    return attend(q, k, v) * gates.unflatten(-1, (q.shape[1], -1)).transpose(1, 2)


def temperature(add, attend, q, k, v, x, grid):
    return attend(q * torch.exp(add.log_scale / 2), k * torch.exp(add.log_scale / 2), v)


ADDITIONS = {
    "value_conv3": value_conv,
    "value_conv5": value_conv,
    "neighborhood3": neighborhood,
    "neighborhood5": neighborhood,
    "local_conv3": local_conv,
    "local_conv5": local_conv,
    "local_dynamic": local_dynamic,
    "gate": gate,
    "temperature": temperature,
}
