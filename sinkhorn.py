"""Entropic optimal transport in PyTorch: log-domain Sinkhorn, its plan, its value and its gradient.

This file needs torch alone: copy it, with test_sinkhorn.py, into your project. Read from the public functions down.
Given a cost C (n, m) and weights a (n,), b (m,) of equal total mass,

    OT(C, a, b)  =  min over P >= 0 with P 1 = a, P^T 1 = b  of   <C, P> + eps * KL(P | a b^T)
    KL(P | Q)    =  sum_ij P_ij log(P_ij / Q_ij)

has the solution P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps), whose potentials f (n,) and g (m,) maximise the dual.
Sinkhorn's algorithm alternates two exact half steps, together a sweep, and at the optimum OT = <a, f> + <b, g>:

    f_i = -eps log sum_j b_j exp((g_j - C_ij) / eps)        (makes the row sums of P equal a)
    g_j = -eps log sum_i a_i exp((f_i - C_ij) / eps)        (makes the column sums of P equal b)
"""

import math
import warnings
from functools import reduce
from typing import NamedTuple

import torch
from torch.linalg import vector_norm

BLOCK = 2**18  # numbers of a matrix that are made at a time, to stay in the processor's cache
LARGEST = 2**27  # numbers of a cost between clouds that is kept; a larger one is made again whenever it is needed


class Potentials(NamedTuple):
    """What `sinkhorn_potentials` returns. `...` are the leading (batch) dimensions of the cost."""

    f: torch.Tensor  # (..., n)
    g: torch.Tensor  # (..., m)
    n_iter: int  # sweeps done at eps
    error: torch.Tensor  # (...), |P 1 - a|_1 + |P^T 1 - b|_1 of the plan of these very potentials
    converged: torch.Tensor  # (...) bool, error <= tol * total mass


def sinkhorn_potentials(C, a=None, b=None, eps=0.01, tol=1e-4, max_iter=1000):
    """Dual potentials of entropic optimal transport.

    C         (..., n, m) finite cost, any sign; leading dimensions are independent problems
    a, b      (n,) or (..., n), (m,) or (..., m) weights >= 0 of equal total; None is uniform with total 1
    eps       > 0, the strength of the entropy, in the units of C; the smaller, the more sweeps are needed
    tol       the iteration ends once the L1 marginal error, as a part of the total mass, is no larger
    max_iter  most sweeps; ending above tol gives one RuntimeWarning with the error reached

    Returns Potentials. f and g are unique up to f + c, g - c; the c returned makes <a, f> = <b, g>. A point of zero
    weight gets the potential it would have at vanishing weight. float16 and bfloat16 are computed, and returned, in
    float32. Not differentiable: see `entropic_ot`. Raises ValueError, naming the argument, on bad input.
    """
    return _run(_of_cost, C, a, b, eps, tol, max_iter)[0][0]


def sinkhorn_plan(C, a=None, b=None, eps=0.01, tol=1e-4, max_iter=1000):
    """The entropic transport plan P (..., n, m), not differentiable. Arguments as sinkhorn_potentials."""
    return _run(_of_cost, C, a, b, eps, tol, max_iter)[2][2]


def entropic_ot(C, a=None, b=None, eps=0.01, tol=1e-5, max_iter=1000):
    """Value of entropic optimal transport (...,): min <C, P> + eps * KL(P | a b^T).

    Arguments as sinkhorn_potentials (tol is finer here: the gradient's error is first order in it, the value's
    second). Differentiable, once, in C, a and b by the envelope theorem: the gradient in C is the plan, in a it is f,
    in b it is g, so no iteration is kept for the backward pass. As the problem exists only for equal totals, the
    gradients in a and b mean something along changes that keep the totals equal (a softmax, say).
    """
    return _Value.apply(*_run(_of_cost, C, a, b, eps, tol, max_iter)[1:], a, b, C)


def sinkhorn_divergence(x, y, a=None, b=None, p=2, eps=0.01, debias=True, tol=1e-5, max_iter=1000):
    """Sinkhorn divergence S(x, y) = OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2 (...,) of weighted point clouds.

    x, y      (..., n, d) and (..., m, d) finite points
    a, b      weights as sinkhorn_potentials
    p         2: cost |x - y|^2 / 2.  1: cost |x - y|
    eps       in the units of the cost: for p = 2 the square of geomloss's `blur`, for p = 1 its blur
    debias    False gives OT(x, y) alone; S is zero for equal clouds and, up to tol, never negative

    Differentiable, once, in x, y, a and b; where two points coincide the gradient of their distance is taken as zero.
    Raises ValueError, naming the argument, on bad input. Source: Feydy et al. (2019), debiased "Sinkhorn divergences".
    """
    return _Value.apply(*_run(_of_clouds, x, y, a, b, p, debias, eps, tol, max_iter)[1:], a, b, x, y)


class _Value(torch.autograd.Function):
    """A value of known gradients. Where an input was broadcast or of another type, autograd itself sums and casts."""

    @staticmethod
    def forward(ctx, value, gradients, *inputs):
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # only with create_graph=True
            raise RuntimeError("optimal transport cannot be differentiated twice: call backward without create_graph")
        given = zip(ctx.needs_input_grad[2:], ctx.saved_tensors)
        return None, None, *(g * grad[(...,) + (None,) * (g.dim() - grad.dim())] if need else None for need, g in given)


def _run(problem, *arguments):
    """List of Potentials, value, gradients; without autograd and autocast, whatever surrounds. Warns if above tol."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        solved, value, gradients = problem(*arguments)
    failed = [s for s in solved if not bool(s.converged.all())]
    if failed:
        worst, n_iter = max(float(s.error.max()) for s in failed), max(s.n_iter for s in failed)
        message = f"Sinkhorn has not converged to tol: L1 marginal error {worst:.0e} after {n_iter} sweeps; "
        warnings.warn(message + "raise max_iter, tol or eps, or use float64", RuntimeWarning, stacklevel=3)
    return solved, value, gradients


def _of_cost(C, a, b, *settings):
    low, high = _check("C", C, 2)
    a, b = _weights(a, b, C.shape[:-1], C.shape[:-2] + C.shape[-1:], C)
    potentials, value, K, alpha, beta = _solve(C.to(a.dtype).__getitem__, a, b, low, high, *settings)
    return [potentials], value.to(a.dtype), (potentials.f, potentials.g, K.mul_(alpha).mul_(beta.mT).to(a.dtype))


def _of_clouds(x, y, a, b, p, debias, *settings):
    _check("x", x, 2)
    _check("y", y, 2, x)
    if x.shape[-1] != y.shape[-1] or any(1 != i != j != 1 for i, j in zip(x.shape[-3::-1], y.shape[-3::-1])):
        raise ValueError(f"x and y must hold points of one dimension and broadcast, not {[*x.shape]} and {[*y.shape]}")
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, not {p!r}")
    leading = (x[..., 0, 0] + y[..., 0, 0]).shape  # quicker than torch.broadcast_shapes
    a, b = _weights(a, b, leading + x.shape[-2:-1], leading + y.shape[-2:-1], x, y)
    centre = x.mean(-2, True, dtype=a.dtype)  # large coordinates would cancel
    x, y = ((z.to(a.dtype) - centre).expand(leading + z.shape[-2:]) for z in (x, y))
    high = (2 * max(float(vector_norm(z, dim=-1).max()) for z in (x, y))) ** p / p  # no two points are farther apart

    def cloud(z, weights):
        """Weights; points that end in 1; rows and columns whose products are |x|^2 / 2 + |y|^2 / 2 - <x, y>."""
        one, half = z.new_ones(z.shape[:-1] + (1,)), z.double().square().sum(-1, True) / 2
        return weights, torch.cat([z, one], -1), torch.cat([z, half, one], -1), torch.cat([-z, one, half], -1)

    def between(one, other):
        """Potentials, and (value, f, g, gradients in x and y), of two clouds."""
        (a, x, left, _), (b, y, _, right) = one, other
        blocks = _blocks(a, b)

        def cost(rows):
            if p == 1:
                return torch.cdist(x[rows], y, compute_mode="donot_use_mm_for_euclid_dist")
            return left[rows] @ right.mT  # in float64, as it cancels

        def gradient(x, alpha, K, beta, y):  # of |x - y|^2 / 2 it is x - y
            moved = alpha * (K @ (beta * y))
            return moved[..., -1:] * x[..., :-1] - moved[..., :-1]

        if a.numel() * b.shape[-1] <= LARGEST:
            cost = torch.cat([cost(rows).to(x.dtype) for rows in blocks], -2).__getitem__
        potentials, value, K, alpha, beta = _solve(cost, a, b, 0.0, high, *settings, same=one is other)
        for rows in blocks if p == 1 else ():
            K[rows].mul_(cost(rows).reciprocal().nan_to_num(posinf=0))  # of |x - y| it is (x - y) / |x - y|
        of_x = gradient(x, alpha, K, beta, y)
        of_y = of_x if one is other else gradient(y, beta, K.mT, alpha, x)
        return potentials, (value, potentials.f, potentials.g, of_x, of_y)

    small = debias and x.shape == y.shape and a.numel() * b.shape[-1] <= BLOCK
    if small:  # both clouds to themselves at once
        both = cloud(torch.stack([x, y]), torch.stack([a, b]))
        pairs = [tuple(zip(*both)), (both, both)]
    else:
        one, other = cloud(x, a), cloud(y, b)
        pairs = [(one, other), (one, one), (other, other)] if debias else [(one, other)]
    solved, ((value, f, g, of_x, of_y), *selves) = zip(*(between(*pair) for pair in pairs))
    if debias:  # of a cloud to itself f is g, and the gradients are the same
        (value_x, f_x, _, of_xx, _), (value_y, f_y, _, of_yy, _) = zip(*selves[0]) if small else selves
        value, f, g = value - (value_x + value_y) / 2, f - f_x, g - f_y
        of_x, of_y = of_x - of_xx, of_y - of_yy
    return solved, value.to(a.dtype), (f, g, of_x, of_y)


def _solve(cost, a, b, low, high, eps, tol, max_iter, same=False):
    """Potentials, value (...,) in float64, and K, alpha, beta of the plan alpha_i K_ij beta_j, of checked weights.

    cost(rows) makes these rows of the cost, whose values lie from low to high. same: it is symmetric and a is b, so
    that f is g, and both half steps are averaged. The kernel K_ij = b_j exp((f_i + g_j - C_ij) / eps) is made from
    potentials in the log domain, where nothing overflows. Sweeps scale its rows by p and its columns by q, which is
    matrix products, until the rows sum to 1 and the columns, weighted by a, to b; where p and q grow large they go into
    f and g, and K is made afresh. The first potentials come from larger eps, a sweep each: from zeros all of K might
    vanish. Half steps overshoot by omega, tuned to the observed rate; where the error doubled (that of exact half steps
    never grows) they are taken back. Source: Schmitzer (2019), scaling; Thibault et al. (2017) and Young (1954),
    over-relaxation; Feydy et al. (2019), averaging.
    """
    dtype, n, largest = a.dtype, a.shape[-1], max(abs(low), abs(high), high - low)
    if not (0 < eps < math.inf and tol >= 0 and max_iter >= 1):
        raise ValueError(f"eps must be positive, tol >= 0 and max_iter >= 1, not {eps}, {tol} and {max_iter}")
    if not largest <= eps * torch.finfo(dtype).max:
        raise ValueError(f"eps = {eps} is too small for costs as large as {largest:g} in {dtype}")
    if eps >= high - low:  # the rounding of a plan counts eps times; and two sweeps do here
        a, b = a.double(), b.double()
    tiny, blocks = torch.finfo(a.dtype).tiny, _blocks(a, b)
    rounded = 8 * torch.finfo(a.dtype).eps * largest > eps * tol  # f and g need float64
    a, b = a.unsqueeze(-2), b.unsqueeze(-2)  # vectors are rows in here: torch is fastest at a row times a matrix
    mass = a.sum(-1, True)
    w, v = a / mass, (b / b.sum(-1, True)).clamp_min(1e-30)  # zeros, too, have potentials
    both, log_b, ones = torch.cat([w, v], -1), (v * mass).log(), (torch.ones_like(w), torch.ones_like(v))
    K, least = a.new_empty(a.shape[:-2] + (n, b.shape[-1])), math.log(tiny) + 1  # exp of less is slow
    reach = -least / 4  # of log p and log q: within it, entries of K that were raised to exp(least) count nothing

    def make_kernel(h, eps):
        """K of the potentials f and g, in units of eps and one after the other in h. Returns its row sums."""
        f, g = h[..., :n].mT, h[..., n:] + log_b
        for rows in blocks:
            torch.add(f[rows] + g, cost(rows), alpha=-1 / eps, out=K[rows]).clamp_(least, -least / 2).exp_()
        return K.sum(-1).unsqueeze(-2)

    def swept(p, q, r, sweeps, omega):
        """p and q after so many more sweeps; r is q K^T, and is overwritten."""
        for left in reversed(range(sweeps)):
            r.clamp_(tiny, 1 / tiny)
            p = r.reciprocal() if omega == 1 else p * (p * r) ** -omega
            s = ((w * p) @ K).clamp_(tiny, 1 / tiny)
            q = v / s if omega == 1 or left == 0 else q * (v / (q * s)) ** omega  # the last half step is exact
            if same:
                p = q = (p * q).sqrt()
            r = q @ K.mT if left else r
        return p, q

    def missed(p, q, r):
        """L1 error of both marginals, as a part of the mass; r is q K^T."""
        u = w * p
        return vector_norm(u * r - w, 1, -1, True) + vector_norm(q * (u @ K) - v, 1, -1, True)

    f, level = torch.full_like(w, low, dtype=torch.float64 if rounded else a.dtype), (high - low) / 16
    h = torch.cat([f, torch.zeros_like(v)], -1)
    while level > eps and not same:  # a cloud is near itself: zeros are a good start
        p, q = swept(*ones, make_kernel(h / level, level), 1, 1)
        h, level = h + level * torch.cat([p, q], -1).log(), level / 4
    h, n_iter, omega, old, old_worst = h / eps, min(3, max_iter), 1, ones, math.inf
    (p, q), sweeps = swept(*ones, make_kernel(h, eps), n_iter, omega), n_iter
    while True:
        r, logs = q @ K.mT, torch.cat([p, q], -1).log()
        error = missed(p, q, r)
        worst, extent = torch.stack([error, vector_norm(logs, math.inf, -1, True)]).flatten(1).amax(1).tolist()
        if sweeps * omega > 1 and not (worst <= 2 * old_worst and extent < 3.7 * reach):  # swept clamps at 4
            (p, q), omega, old_worst, sweeps = old, 1, math.inf, sweeps // 8
            continue
        if n_iter >= max_iter or (worst <= tol and extent <= reach):
            break
        if 0 < worst < old_worst < math.inf:
            # Young: the plain iteration's rate is rho, and the best omega 2 / (1 + sqrt(1 - rho)); 2 never converges.
            rate = max((worst / old_worst) ** (1 / sweeps), omega - 1)
            rho = min(1, (rate + omega - 1) ** 2 / (rate * omega**2))
            omega = min(1.99, max(omega, 2 / (1 + math.sqrt(1 - rho))))
        if extent > reach:
            h, (p, q) = h + logs, ones
            r = make_kernel(h, eps)
        sweeps = min(max(3, n_iter // 2), 2 * sweeps or 1, 100, max_iter - n_iter)
        old, old_worst = (p, q), worst
        (p, q), n_iter = swept(p, q, r, sweeps, omega), n_iter + sweeps

    h = (h + logs).double()
    weighted = both * h
    total, mean_f = weighted.sum(-1, True), weighted[..., :n].sum(-1, True)
    # The value's last term is zero at the optimum; with it, rounding in f and g counts in second order only.
    value, shift = eps * mass * (total - ((w * p * r).sum(-1, True) - 1)), total / 2 - mean_f
    f, g = ((h[..., :n] + shift) * eps).to(dtype), ((h[..., n:] - shift) * eps).to(dtype)
    if rounded or extent > reach:  # measure what is returned
        p, q = ones
        error = missed(p, q, make_kernel(torch.cat([f, g], -1).double() / eps, eps))
    error, converged, value = (t[..., 0, 0] for t in ((error * mass).to(dtype), error <= tol, value))
    return Potentials(f.squeeze(-2), g.squeeze(-2), n_iter, error, converged), value, K, (a * p).mT, (q * (b > 0)).mT


def _blocks(a, b):
    """Indices of rows of a matrix that hold about BLOCK numbers of all matrices."""
    height = max(1, BLOCK // b.numel())
    return [(..., slice(i, i + height), slice(None)) for i in range(0, a.shape[-1], height)]


def _check(name, t, dims, like=None):
    """Least and largest value of a tensor; or ValueError."""
    if not isinstance(t, torch.Tensor) or not t.is_floating_point() or t.dim() < dims or t.numel() == 0:
        what = f"{t.dtype} of shape {tuple(t.shape)}" if isinstance(t, torch.Tensor) else type(t).__name__
        raise ValueError(f"{name} must be a non-empty floating point tensor of {dims} dimensions or more, not {what}")
    if like is not None and t.device != like.device:
        raise ValueError(f"{name} is on {t.device}, the other arguments on {like.device}")
    low, high = torch.stack(t.aminmax()).tolist()
    if not -math.inf < low <= high < math.inf:
        raise ValueError(f"{name} holds NaN or infinite values")
    return low, high


def _weights(a, b, shape_a, shape_b, *others):
    """a and b of these shapes and of equal total, of the type common to all and float32 at the least; or ValueError."""
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
