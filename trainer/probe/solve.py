"""Linear probes for many modules and penalties at once, over features that need not fit in memory.

Features are L2-normalised, then standardised with the statistics of the images that are fitted, as in "Layer by layer,
module by module", arXiv 2603.05280. Shapes: M modules of one width D, N images per block, P penalties, K classes.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# Each call gives the same images: blocks of features [M, N, D] fp32 or fp64, and labels int64 [N].
Blocks = Callable[[], Iterable[tuple[Tensor, Tensor]]]


@dataclass
class Statistics:
    """The result of one pass over the fitted images: enough for ridge, and to precondition logistic regression."""

    count: int
    mean_MD: Tensor  # of the normalised features, fp64
    std_MD: Tensor  # fp64; 1 where a feature does not vary
    gram_MDD: Tensor  # X^T X of the standardised features, fp64
    cross_MKD: Tensor  # Y^T X with one-hot labels, fp64
    share_K: Tensor  # of each class, fp64

    def standardise(self, x_MND: Tensor) -> Tensor:
        """Raw features -> what the probes read, [M, N, D]."""
        mean, std = (t.unsqueeze(1).to(x_MND.dtype) for t in (self.mean_MD, self.std_MD))
        return (F.normalize(x_MND, dim=-1) - mean).div_(std)


@dataclass
class Probes:
    """Fitted probes: the class scores of a standardised x are `weight @ x + bias`."""

    weight_MPKD: Tensor
    bias_MPK: Tensor
    iterations_MP: Tensor  # 0 where the solution is exact
    gap_MP: Tensor  # estimate of the distance to the least objective, nats per image; 0 where exact

    def at(self, penalty_M: Tensor) -> "Probes":
        """One penalty per module, given by its index: P becomes 1."""
        m = torch.arange(len(penalty_M))
        parts = self.weight_MPKD, self.bias_MPK, self.iterations_MP, self.gap_MP
        return Probes(*(part[m.to(part.device), penalty_M.to(part.device)].unsqueeze(1) for part in parts))

    def predict(self, x_MND: Tensor) -> Tensor:
        """Standardised features -> classes int64 [M, P, N]. Among equal scores the first class wins."""
        scores = self.weight_MPKD.to(x_MND) @ x_MND.mT.unsqueeze(1) + self.bias_MPK.to(x_MND).unsqueeze(-1)
        return scores.argmax(2)


def statistics(blocks: Blocks, classes: int) -> Statistics:
    """Mean, deviation, Gram matrix and class sums of the L2-normalised features, in one pass.

    Sums are in fp64, shifted and scaled by the statistics of the first block. In plain sums of squares a feature would
    lose its digits when its mean is much larger than its deviation.
    """
    count, sums = 0, None
    for x, y in blocks():
        x = F.normalize(x, dim=-1)
        if sums is None:
            shift = x.mean(1, keepdim=True, dtype=torch.float64)
            scale = (x - shift).square().mean(1, keepdim=True).sqrt()
            scale = torch.where(scale <= 1e-6 * shift.abs(), 1.0, scale).clamp_min(1e-12)
            first = shift.to(x.dtype), scale.to(x.dtype)
            shift, scale = (t.double().squeeze(1) for t in first)
            sums = [0.0, 0.0, 0.0, 0.0]
        z = (x - first[0]).div_(first[1])
        hot = F.one_hot(y, classes).to(z.dtype)
        parts = z.sum(1, dtype=torch.float64), z.mT @ z, hot.T @ z, hot.sum(0)
        sums = [total + part.double() for total, part in zip(sums, parts, strict=True)]
        count += x.shape[1]
    total, gram, cross, per_class = sums
    mean = total / count
    gram = gram - count * mean.unsqueeze(-1) * mean.unsqueeze(-2)
    cross = cross - per_class.unsqueeze(-1) * mean.unsqueeze(-2)
    std = (gram.diagonal(dim1=-2, dim2=-1) / count).clamp_min(0).sqrt()
    std = torch.where(std * scale <= 1e-6 * (shift + mean * scale).abs(), 1.0 / scale, std)
    gram = gram / std.unsqueeze(-1) / std.unsqueeze(-2)
    return Statistics(count, shift + mean * scale, std * scale, gram, cross / std.unsqueeze(-2), per_class / count)


def ridge(stats: Statistics, penalties: list[float]) -> Probes:
    """Least squares on one-hot labels: minimises 0.5 ||W||^2 + C sum of 0.5 (y - W x - b)^2, b free.

    One eigendecomposition serves all penalties C. scikit-learn's `alpha` is 1 / C.
    """
    values, vectors = torch.linalg.eigh(stats.gram_MDD)
    shrink_P11 = torch.tensor([1 / c for c in penalties], dtype=torch.float64, device=values.device).view(-1, 1, 1)
    rotated = (stats.cross_MKD @ vectors).unsqueeze(1)
    weight = rotated / (values.clamp_min(0)[:, None, None] + shrink_P11) @ vectors.mT.unsqueeze(1)
    M, P = weight.shape[:2]
    none = torch.zeros(M, P)
    return Probes(weight, stats.share_K.expand(M, P, -1), none.long(), none)


def logistic(
    blocks: Blocks, stats: Statistics, penalties: list[float], tolerance: float = 3e-5, max_iterations: int = 5000
) -> Probes:
    """Multinomial logistic regression: minimises 0.5 ||W||^2 + C sum of cross-entropies, b free, as scikit-learn does.

    The solver is L-BFGS (Liu and Nocedal 1989) on the full data, for all modules and penalties side by side. It works
    in coordinates in which the Hessian is at most the identity everywhere. Boehning's bound (Annals of the Institute of
    Statistical Mathematics 44, 1992) says that the cross-entropy's Hessian is at most X^T X / 2 for each class. The
    Gram matrix's eigenvectors make that diagonal. So a step of 1 is safe. Correlations between features, which slow
    plain gradient methods down, are gone.

    Args:
        blocks: standardised features.
        tolerance: a problem is solved when half the squared norm of its gradient is at most this. The norm is in the
            metric of the inverse Hessian, which L-BFGS estimates. So it is the distance to the least objective, divided
            by C and the number of images: in nats, whatever the features' scale. In early iterations the estimate is
            several times too low. scikit-learn's default, a bound on the gradient's entries, leaves 1e-4.
    """
    values, vectors = torch.linalg.eigh(stats.gram_MDD)
    first = next(iter(blocks()))[0]
    dtype, device, n = first.dtype, first.device, stats.count
    C_P1 = torch.tensor(penalties, dtype=torch.float64, device=device).unsqueeze(-1)
    decay_P1 = 1 / (C_P1 * n)
    scale = (values.clamp_min(0).unsqueeze(1) / (2 * n) + decay_P1).rsqrt()  # [M, P, D]
    scale = F.pad(scale, (0, 1), value=2**0.5).unsqueeze(2).to(dtype)  # and the intercept's, [M, P, 1, D + 1]
    vectors, decay_P1 = vectors.to(dtype), decay_P1.to(dtype)
    M, D, P, K = len(values), values.shape[1], len(C_P1), len(stats.share_K)

    def unscale(z_MPKE: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
        u = (z_MPKE * scale[:, live]).flatten(1, 2)
        return u[..., :D] @ vectors.mT, u[..., D:]  # [M, PK, D], [M, PK, 1]

    def objective(z_MPKE: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
        """At z for the penalties `live`: values [M, P] fp64, gradients like z."""
        weight, bias = unscale(z_MPKE, live)
        value = torch.zeros(M, len(live), dtype=torch.float64, device=device)
        slope, slope_b = torch.zeros_like(weight), torch.zeros_like(bias)
        for x, y in blocks():
            # Classes before images: the products and the softmax over so few classes are several times faster so.
            logs = torch.baddbmm(bias, weight, x.mT).unflatten(1, (-1, K)).log_softmax(2)
            at = y.expand(M, len(live), 1, -1)
            value -= logs.gather(2, at).sum((2, 3), dtype=torch.float64)
            residual = logs.exp_().scatter_add_(2, at, logs.new_full((1,), -1.0).expand(at.shape)).flatten(1, 2)
            slope.baddbmm_(residual, x)
            slope_b += residual.sum(2, keepdim=True)
        decay = decay_P1[live].repeat_interleave(K, 0)
        slope = slope.div_(n).addcmul_(weight, decay)
        slope_b /= n
        value = value / n + 0.5 * (weight.square() * decay).unflatten(1, (-1, K)).sum((2, 3), dtype=torch.float64)
        gradient = torch.cat([slope @ vectors, slope_b], -1).unflatten(1, (-1, K)) * scale[:, live]
        return value, gradient

    start = torch.zeros(M, P, K, D + 1, dtype=dtype, device=device)
    z, iterations, gap = minimise(objective, start, tolerance, max_iterations)
    weight, bias = unscale(z, torch.arange(P, device=device))
    return Probes(weight.unflatten(1, (P, K)), bias.unflatten(1, (P, K)).squeeze(-1), iterations, gap)


def minimise(
    objective: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    start: Tensor,
    tolerance: float,
    max_iterations: int,
    memory: int = 10,
) -> tuple[Tensor, Tensor, Tensor]:
    """L-BFGS for M x P convex problems whose Hessians are at most the identity.

    Args:
        objective: z [M, P', K, E], indices of P' penalties -> values [M, P'], gradients like z.
        start: [M, P, K, E].
        tolerance: of the estimated gap between a value and the least one.

    Returns:
        z, iterations taken [M, P], gaps left [M, P]. Once all problems of a penalty are solved, it costs no more.
    """
    M, P = start.shape[:2]
    taken, left = torch.zeros(M, P, dtype=torch.long), torch.zeros(M, P)
    live = torch.arange(P, device=start.device)
    z, result, history = start, start.clone(), []
    unsolved = torch.ones(M, P, dtype=torch.bool, device=start.device)
    value, gradient = objective(z, live)
    for iteration in range(max_iterations + 1):
        direction = direction_of(gradient, history)
        slope = dot(gradient, direction)
        gap = -slope / 2
        left[:, live.cpu()] = torch.where(unsolved.cpu(), gap.float().cpu(), left[:, live.cpu()])
        unsolved = unsolved & (gap > tolerance)  # a solved problem stays as it is
        result[:, live] = z
        stays = unsolved.any(0)
        if not stays.any() or iteration == max_iterations:
            break
        if not stays.all():
            live, value, slope, unsolved = live[stays], value[:, stays], slope[:, stays], unsolved[:, stays]
            z, gradient, direction = z[:, stays], gradient[:, stays], direction[:, stays]
            history = [(s[:, stays], y[:, stays], rho[:, stays]) for s, y, rho in history]
        taken[:, live.cpu()] += unsolved.long().cpu()
        step = unsolved.double()
        for _ in range(20):
            new_z = z + step[:, :, None, None].to(z.dtype) * direction
            new_value, new_gradient = objective(new_z, live)
            # The last term is for rounding: near the solution the gradient is more exact than the value.
            short = new_value > value + 1e-4 * step * slope + 1e-7 * value.abs()
            if not short.any():
                break
            step = torch.where(short, step / 2, step)
        s, y = new_z - z, new_gradient - gradient
        curvature = dot(s, y)
        rho = torch.where(curvature > 1e-10 * dot(y, y), 1 / curvature, 0.0)  # 0: this pair is left out
        rho = rho.to(z.dtype)[..., None, None]
        history = [*history[1 - memory :], (s, y, rho)]
        z, value, gradient = new_z, new_value, new_gradient
    return result, taken, left


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product per problem: [M, P, K, E] twice -> [M, P] fp64."""
    return (a * b).sum((2, 3), dtype=torch.float64)


def direction_of(gradient: Tensor, history: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Minus the estimated inverse Hessian times the gradient (Nocedal and Wright, algorithm 7.4).

    Args:
        history: steps s, changes of the gradient y, both like `gradient`, and 1 / (s y) [M, P, 1, 1].
    """

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return torch.linalg.vecdot(a.flatten(2), b.flatten(2))[..., None, None]

    q, alphas = -gradient, []
    for s, y, rho in reversed(history):
        alphas.append(rho * inner(s, q))
        q = torch.addcmul(q, alphas[-1], y, value=-1)
    if history:
        _, y, rho = history[-1]
        q = q * torch.where(rho > 0, 1 / (rho * inner(y, y)), 1.0)
    for (s, y, rho), alpha in zip(history, reversed(alphas), strict=True):
        q = torch.addcmul(q, alpha - rho * inner(y, q), s)
    return q
