"""Entropic optimal transport in PyTorch: log-domain Sinkhorn, its plan, its value and its gradient.

This file needs torch alone: copy it, with test_sinkhorn.py. For a cost C (n, m) and weights a (n,),
b (m,) of total 1, OT is the least <C, P> + eps * KL(P | a b^T) over P >= 0 with row sums a and
column sums b, where KL(P | Q) = sum_ij P_ij log(P_ij / Q_ij). Of weights of another, equal total,
OT and P are that many times as large. The solution is

    P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps)    and    OT = <a, f> + <b, g>.

Sinkhorn finds the potentials f (n,) and g (m,) by two half steps in turn, together a sweep:

    f_i = -eps log sum_j b_j exp((g_j - C_ij) / eps)        (makes the row sums of P equal a)
    g_j = -eps log sum_i a_i exp((f_i - C_ij) / eps)        (makes the column sums of P equal b)

With the kernel K_ij = b_j exp((f_i + g_j - C_ij) / eps) of some f and g, the P of f + eps log u and
g + eps log v is a_i u_i K_ij v_j, and the half steps are u = 1 / (K v) and v = b / (K^T (a u)).
"""

import math
import warnings
from functools import reduce
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch.linalg import vector_norm

BLOCK = 2**18  # numbers of a matrix that are made at a time, to stay in the processor's cache
LARGEST = 2**27  # numbers of a cost between clouds that is kept; larger ones are made when needed


class Potentials(NamedTuple):
    """What `sinkhorn_potentials` returns. `...` are the leading (batch) dimensions of the cost."""

    f: torch.Tensor  # (..., n)
    g: torch.Tensor  # (..., m)
    n_iter: int  # sweeps done at eps
    error: torch.Tensor  # (...), |P 1 - a|_1 + |P^T 1 - b|_1 of the plan of these very potentials
    converged: torch.Tensor  # (...) bool, error <= tol * total mass


def sinkhorn_potentials(C, a=None, b=None, eps=0.01, tol=1e-4, max_iter=1000):
    """Dual potentials of entropic optimal transport. Bad input raises a ValueError that names it.

    C         (..., n, m) finite cost; leading dimensions are independent problems
    a, b      (n,) or (..., n), (m,) or (..., m) weights >= 0 of equal total; None is uniform
    eps       > 0, the strength of the entropy, in the units of C; the smaller, the more sweeps
    tol       the L1 marginal error, as a part of the total, at which the iteration ends
    max_iter  most sweeps; ending above tol gives one RuntimeWarning with the error reached

    f and g are unique up to f + c, g - c: here <a, f> = <b, g>. Zero weights get the potentials of
    vanishing ones. Half types are computed, and returned, in float32. Not differentiable.
    """
    (potentials,), _, _ = _run(_of_cost, C, a, b, eps, tol, max_iter)
    return potentials


def sinkhorn_plan(C, a=None, b=None, eps=0.01, tol=1e-4, max_iter=1000):
    """The transport plan P (..., n, m), not differentiable. Arguments as sinkhorn_potentials."""
    _, _, (_, _, plan) = _run(_of_cost, C, a, b, eps, tol, max_iter)
    return plan


def entropic_ot(C, a=None, b=None, eps=0.01, tol=1e-5, max_iter=1000):
    """Value OT (...,). Arguments as sinkhorn_potentials.

    Differentiable, once, by the envelope theorem: the gradients in C, a and b are P, f and g; no
    iteration is kept. Their error is of first order in tol, the value's of second. Those in a and b
    hold for changes that keep the totals equal (of a softmax, say).
    """
    _, value, gradients = _run(_of_cost, C, a, b, eps, tol, max_iter)
    return _Value.apply(value, gradients, a, b, C)


def sinkhorn_divergence(x, y, a=None, b=None, p=2, eps=0.01, debias=True, tol=1e-5, max_iter=1000):
    """OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2 (...,) of point clouds. Source: Feydy et al. (2019).

    x, y      (..., n, d) and (..., m, d) finite points; a, b: weights as sinkhorn_potentials
    p         2: cost |x - y|^2 / 2.  1: cost |x - y|
    eps       in units of the cost: for p = 2 the square of geomloss's `blur`, for p = 1 its blur
    debias    False gives OT(x, y) alone; True gives 0 for equal clouds and, up to tol, never less

    Differentiable, once, in x, y, a and b; a distance of zero has the gradient zero.
    """
    _, value, gradients = _run(_of_clouds, x, y, a, b, p, debias, eps, tol, max_iter)
    return _Value.apply(value, gradients, a, b, x, y)


class _Value(torch.autograd.Function):
    """A value of known gradients, which autograd sums and casts to the shape and type of inputs."""

    @staticmethod
    def forward(ctx, value, gradients, *inputs):
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # only with create_graph=True
            what = "optimal transport cannot be differentiated twice"
            raise RuntimeError(f"{what}: call backward without create_graph")
        scaled = [None, None]
        for g, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[2:]):
            scaled.append(g * grad[(...,) + (None,) * (g.dim() - grad.dim())] if needed else None)
        return tuple(scaled)


def _run(problem, *arguments):
    """[Potentials], value, gradients, without autograd and autocast; warns of errors above tol."""
    cpu, cuda = torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False)
    with torch.no_grad(), cpu, cuda:
        solved, value, gradients = problem(*arguments)
    failed = [s for s in solved if not bool(s.converged.all())]
    if failed:
        error, n_iter = max(float(s.error.max()) for s in failed), max(s.n_iter for s in failed)
        what = f"not converged to tol: L1 marginal error {error:.0e} after {n_iter} sweeps"
        message = f"Sinkhorn has {what}; raise max_iter, tol or eps, or use float64"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    return solved, value, gradients


def _of_cost(C, a, b, *settings):
    low, high = _check("C", C, 2)
    a, b = _weights(a, b, C.shape[:-1], C.shape[:-2] + C.shape[-1:], C)
    solution, value, u, K, v = _solve(C.to(a.dtype).__getitem__, a, b, low, high, *settings)
    plan = K.mul_(u).mul_(v.mT).to(a.dtype)
    return [solution], value.to(a.dtype), (solution.f, solution.g, plan)


def _of_clouds(x, y, a, b, p, debias, *settings):
    _check("x", x, 2)
    _check("y", y, 2, x)
    batch = zip(x.shape[-3::-1], y.shape[-3::-1])
    if x.shape[-1] != y.shape[-1] or any(1 != i != j != 1 for i, j in batch):
        what = f"{[*x.shape]} and {[*y.shape]}"
        raise ValueError(f"x and y must hold points of one dimension and broadcast, not {what}")
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, not {p!r}")
    n, m, leading = x.shape[-2], y.shape[-2], (x[..., 0, 0] + y[..., 0, 0]).shape
    a, b = _weights(a, b, leading + (n,), leading + (m,), x, y)
    z = torch.cat([t.to(a.dtype).expand(*leading, -1, -1) for t in (x, y)], -2)
    z = z - z[..., :n, :].mean(-2, True)  # large coordinates would cancel
    half = z.double().square().sum(-1, True) / 2
    one = torch.ones_like(half)
    left, right = torch.cat([z, half, one], -1), torch.cat([-z, one, half], -1)
    high = (8 * float(half.max())) ** (p / 2) / p  # no two points are farther apart

    def between(one, other):
        """Potentials, value, f, g and gradients in x and y, of two clouds."""
        (a, x, left, _), (b, y, _, right) = one, other
        blocks, same = _blocks(a, b), one is other

        def cost(rows):
            if p == 1:
                return torch.cdist(x[rows], y, compute_mode="donot_use_mm_for_euclid_dist")
            return left[rows] @ right.mT  # |x|^2 / 2 - <x, y> + |y|^2 / 2: float64, as it cancels

        def gradient(x, u, K, v, y):  # of |x - y|^2 / 2 it is x - y
            return u * (K @ v * x - K @ (v * y))

        if a.numel() * b.shape[-1] <= LARGEST:
            cost = torch.cat([cost(rows).to(x.dtype) for rows in blocks], -2).__getitem__
        solution, value, u, K, v = _solve(cost, a, b, 0.0, high, *settings, same)
        for rows in blocks if p == 1 else ():  # of |x - y| it is (x - y) / |x - y|
            K[rows].mul_(cost(rows).reciprocal().nan_to_num(posinf=0))
        of_x = gradient(x, u, K, v, y)
        of_y = of_x if same else gradient(y, v, K.mT, u, x)
        return solution, value, solution.f, solution.g, of_x, of_y

    x, y = zip((a, b), *(t.tensor_split((n,), -2) for t in (z, left, right)))
    solution, value, f, g, of_x, of_y = between(x, y)
    solved = [solution]
    if debias:
        small = n == m and a.numel() * n <= BLOCK
        both = [torch.stack(pair) for pair in zip(x, y)] if small else None
        selves = between(both, both) if small else zip(between(x, x), between(y, y))
        solution, values, potentials, _, gradients, _ = selves
        solved += [solution] if small else solution
        value = value - (values[0] + values[1]) / 2
        f, g = f - potentials[0], g - potentials[1]
        of_x, of_y = of_x - gradients[0], of_y - gradients[1]
    return solved, value.to(a.dtype), (f, g, of_x, of_y)


def _solve(cost, a, b, low, high, eps, tol, max_iter, symmetric=False):
    """Potentials, value in float64, and u, K, v (columns u and v) of the plan u_i K_ij v_j.

    cost(rows) makes these rows of the cost, whose values lie from low to high. symmetric: between a
    cloud and itself. Clouds of 128 points take 3 / 13 / 42 sweeps to tol 1e-2 at eps 0.1 / 0.01 /
    0.001. What they would take without a step is written at the step.
    """
    n, dtype, largest = a.shape[-1], a.dtype, max(abs(low), abs(high), high - low)
    if not (0 < eps < math.inf and tol >= 0 and max_iter >= 1):
        what = f"{eps}, {tol} and {max_iter}"
        raise ValueError(f"eps must be positive, tol >= 0 and max_iter >= 1, not {what}")
    if not largest <= eps * torch.finfo(dtype).max:
        raise ValueError(f"eps = {eps} is too small for costs as large as {largest:g} in {dtype}")
    if eps >= high - low:  # eps multiplies a plan's rounding; and float64 is cheap in two sweeps
        a, b = a.double(), b.double()
    # Some 8 roundings of f, g and C may be as large as tol: then f and g are kept in float64.
    rounded = 8 * torch.finfo(a.dtype).eps * largest > eps * tol
    mass, some = a.sum(-1, True), b > 0
    a, b = a / mass, (b / b.sum(-1, True)).clamp_min(1e-30)  # as nothing, but with a log
    a, b = a.unsqueeze(-2), b.unsqueeze(-2)  # torch is fastest at a row times a matrix
    # Besides: fg, the potentials; K, u, v, made from them, with eps and reach (_make_kernel); rows,
    # the row sums of the plan, error, worst and extent (_look).
    s = SimpleNamespace(cost=cost, a=a, b=b, symmetric=symmetric)
    s.split = lambda t: t.tensor_split((n,), -1)  # fg is f and then g
    s.fg = torch.cat([torch.full_like(a, low), torch.zeros_like(b)], -1)
    s.fg = s.fg.double() if rounded else s.fg
    s.K = a.new_empty((*a.shape[:-2], n, b.shape[-1]))
    # From zeros, one sweep does at a 16th of the spread; a cloud is near itself, so that zeros do.
    _anneal(s, eps, 0 if symmetric else (high - low) / 16)
    n_iter, done = _iterate(s, tol, int(max_iter))

    # surplus is zero at the optimum; with it, rounding in f and g counts in second order only.
    u, v, surplus = s.u, s.v, s.rows.sum((-2, -1)) - 1
    _absorb(s)
    f, g = s.split(s.fg)
    mean_f, mean_g = ((w * t).sum((-2, -1), dtype=torch.float64) for w, t in ((a, f), (b, g)))
    value, gap = mean_f + mean_g - eps * surplus, (mean_g - mean_f)[..., None] / 2
    f, g = (f.squeeze(-2) + gap).to(dtype), (g.squeeze(-2) - gap).to(dtype)
    if rounded or not done:  # measure what is returned
        s.fg = torch.cat([f, g], -1).double().unsqueeze(-2)
        _make_kernel(s, eps)
        _look(s)
        u, v, rows, columns = s.u, s.v, s.rows - a, a @ s.K - b
        s.error = vector_norm(rows, 1, (-2, -1)) + vector_norm(columns, 1, (-2, -1))
    total = mass.squeeze(-1)
    solution = Potentials(f, g, n_iter, (s.error * total).to(dtype), s.error <= tol)
    return solution, value * total, (u * a).mT * mass[..., None], s.K, v.mT * some[..., None]


def _anneal(s, eps, level):
    """Start from the potentials of larger eps, a sweep each. Source: Schmitzer (2019). Without it:
    6 / 19 / 87 sweeps, and at small eps all of K may vanish, which looks converged."""
    while level > eps:
        _make_kernel(s, level)
        _sweep(s, 1, 1)
        _absorb(s)
        level /= 4
    _make_kernel(s, eps)


def _sweep(s, count, omega):
    """The half steps. Of a cloud to itself f is g, and they are averaged: 3 to 6 sweeps to tol 1e-5
    instead of up to 94. Source: Feydy et al. (2019)."""
    for left in reversed(range(count)):
        s.u = _relax(s.u, (s.v @ s.K.mT).reciprocal(), omega)  # u = 1 / (K v)
        s.v = _relax(s.v, s.b / ((s.a * s.u) @ s.K), omega if left else 1)  # v, exact at last
        if s.symmetric:
            s.u = s.v = (s.u * s.v).sqrt()


def _relax(old, new, omega):
    """Overshoot a half step. Source: Thibault et al. (2017). Without it: 3 / 28 / 311 sweeps."""
    return new if omega == 1 else new * (new / old) ** (omega - 1)


def _tuned(omega, rate):
    """The best omega where sweeps shrink the error by rate, plain ones by rho. Young (1954)."""
    rate = max(rate, omega - 1)
    rho = min(1, (rate + omega - 1) ** 2 / (rate * omega**2))
    return min(1.99, max(omega, 2 / (1 + math.sqrt(1 - rho))))  # 2 never converges


def _look(s):
    """Error of both marginals: after a sweep columns are exact or, where f is g, as bad as rows."""
    s.rows = s.a * s.u * (s.v @ s.K.mT)
    error, logs = vector_norm(s.rows - s.a, 1, (-2, -1)), torch.cat([s.u, s.v], -1).log_().abs_()
    s.error = 2 * error if s.symmetric else error
    s.worst, s.extent = torch.stack([s.error.amax(), logs.amax()]).tolist()


def _iterate(s, tol, max_iter):
    """Number of sweeps, and whether they reached tol. Blocks of them grow, as many show the rate;
    by ones, 3 / 17 / 150. A block that doubled the error, as no plain one does, is taken back."""
    n_iter, sweeps, omega, before = 0, 3, 1, math.inf  # 3 sweeps often do
    while n_iter < max_iter:
        old, sweeps = (s.u, s.v), min(sweeps, max_iter - n_iter)
        _sweep(s, sweeps, omega)
        n_iter += sweeps
        _look(s)
        if s.worst <= tol and s.extent <= s.reach:
            return n_iter, True
        far = not s.extent < 3.7 * s.reach  # of 4, where the type's range ends; or NaN
        if sweeps * omega > 1 and (s.worst > 2 * before or far):
            (s.u, s.v), omega, sweeps = old, 1, 2 * (sweeps // 8) or 1
            _look(s)
            continue
        if 0 < s.worst < before < math.inf:
            omega = _tuned(omega, (s.worst / before) ** (1 / sweeps))
        if s.extent > s.reach:
            _absorb(s)
            _make_kernel(s, s.eps)
        before, sweeps = s.worst, min(max(3, n_iter // 2), 2 * sweeps, 100)  # not far past tol
    return n_iter, False


def _absorb(s):
    """Put scalings into the potentials, before they leave the type's range. Schmitzer (2019)."""
    tiny = torch.finfo(s.K.dtype).tiny
    logs = torch.cat([s.u, s.v], -1).clamp_(tiny, 1 / tiny).log_()
    s.fg = torch.add(s.fg, logs, alpha=s.eps)


def _make_kernel(s, eps):
    """K of f and g, from the log domain, where nothing overflows."""
    least = math.log(torch.finfo(s.K.dtype).tiny) + 1  # exp of less is slow
    s.eps, s.reach = eps, -least / 4  # of log u and v: within it, entries so raised count nothing
    f, g = s.split(s.fg / eps)
    f, g = f.mT, g + s.b.log()
    for rows in _blocks(s.a, s.b):
        K = torch.add(f[rows] + g, s.cost(rows), alpha=-1 / eps, out=s.K[rows])
        K.clamp_(least, -least / 2).exp_()  # the half of the range is left to sums
    s.u, s.v = torch.ones_like(s.a), torch.ones_like(s.b)


def _blocks(a, b):
    """Indices of rows of a matrix that hold about BLOCK numbers of all matrices."""
    height = max(1, BLOCK // b.numel())
    return [(..., slice(i, i + height), slice(None)) for i in range(0, a.shape[-1], height)]


def _check(name, t, dims, like=None):
    """Least and largest value of a tensor; or ValueError."""
    tensor = isinstance(t, torch.Tensor)
    if not tensor or not t.is_floating_point() or t.dim() < dims or t.numel() == 0:
        what = f"{t.dtype} of shape {tuple(t.shape)}" if tensor else type(t).__name__
        wanted = f"a non-empty floating point tensor of {dims} dimensions or more"
        raise ValueError(f"{name} must be {wanted}, not {what}")
    if like is not None and t.device != like.device:
        raise ValueError(f"{name} is on {t.device}, the other arguments on {like.device}")
    low, high = torch.stack(t.aminmax()).tolist()
    if not -math.inf < low <= high < math.inf:
        raise ValueError(f"{name} holds NaN or infinite values")
    return low, high


def _weights(a, b, shape_a, shape_b, *others):
    """a and b of these shapes and of equal total, of the common type or float32; or ValueError."""
    types = [t.dtype for t in (a, b, *others) if isinstance(t, torch.Tensor)]
    weights, dtype, slack = [], reduce(torch.promote_types, types, torch.float32), 1e-5
    for name, t, shape in ("a", a, shape_a), ("b", b, shape_b):
        if t is None:
            t = others[0].new_full((), 1 / shape[-1], dtype=dtype)
        else:
            low, _ = _check(name, t, 1, others[0])
            if t.shape not in (shape, shape[-1:]) or low < 0 or bool((t.sum(-1) <= 0).any()):
                what = f"{tuple(shape)}, not from {low:g} and of shape {tuple(t.shape)}"
                raise ValueError(f"{name} must be >= 0, with a positive total and of shape {what}")
            slack = max(slack, 2 * torch.finfo(t.dtype).eps)  # of half types
        weights.append(t.to(dtype).expand(shape))
    if a is not None or b is not None:
        totals = torch.stack([t.sum(-1).flatten() for t in weights])
        one, other = totals[:, (totals[0] / totals[1] - 1).abs().argmax()].tolist()
        if abs(one - other) > slack * one:
            raise ValueError(f"a and b must have equal total mass, not {one:g} and {other:g}")
    return weights
