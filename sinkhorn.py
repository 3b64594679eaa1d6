"""Entropic optimal transport in PyTorch: log-domain Sinkhorn, its plan, its value and its gradient.

This file needs torch alone: copy it, with test_sinkhorn.py, into your project.

The problem. Given a cost C (n, m) and weights a (n,), b (m,) of equal total mass,

    OT(C, a, b)  =  min over P >= 0 with P 1 = a, P^T 1 = b  of   <C, P> + eps * KL(P | a b^T)
    KL(P | Q)    =  sum_ij P_ij log(P_ij / Q_ij)

has the solution P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps), whose potentials f (n,) and g (m,)
maximise the dual. Sinkhorn's algorithm alternates two exact half steps, together a sweep,

    f_i = -eps log sum_j b_j exp((g_j - C_ij) / eps)        (makes the row sums of P equal a)
    g_j = -eps log sum_i a_i exp((f_i - C_ij) / eps)        (makes the column sums of P equal b)

and at the optimum OT = <a, f> + <b, g>. Read from the public functions down; _solve is the iteration.
"""

import math
import warnings
from functools import reduce
from typing import NamedTuple

import torch

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
    potentials, _, _ = _of_cost(C, a, b, eps, tol, max_iter)
    _warn([potentials], tol)
    return potentials


def sinkhorn_plan(C, a=None, b=None, eps=0.01, tol=1e-4, max_iter=1000):
    """The entropic transport plan P (..., n, m), not differentiable. Arguments as sinkhorn_potentials."""
    potentials, _, P = _of_cost(C, a, b, eps, tol, max_iter)
    _warn([potentials], tol)
    return P


def entropic_ot(C, a=None, b=None, eps=0.01, tol=1e-5, max_iter=1000):
    """Value of entropic optimal transport (...,): min <C, P> + eps * KL(P | a b^T).

    Arguments as sinkhorn_potentials (tol is finer here: the gradient's error is first order in it, the value's
    second). Differentiable, once, in C, a and b by the envelope theorem: the gradient in C is the plan, in a it is f,
    in b it is g, so no iteration is kept for the backward pass. As the problem exists only for equal totals, the
    gradients in a and b mean something along changes that keep the totals equal (a softmax, say).
    """
    potentials, value, P = _of_cost(C, a, b, eps, tol, max_iter)
    _warn([potentials], tol)
    return _Value.apply(value.to(potentials.f.dtype), (potentials.f, potentials.g, P), a, b, C)


def sinkhorn_divergence(x, y, a=None, b=None, p=2, eps=0.01, debias=True, tol=1e-5, max_iter=1000):
    """Sinkhorn divergence S(x, y) = OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2 (...,) of weighted point clouds.

    It is zero for equal clouds and, up to tol, never negative. debias=False gives OT(x, y).

    x, y      (..., n, d) and (..., m, d) finite points
    a, b      weights as sinkhorn_potentials
    p         2: cost |x - y|^2 / 2.  1: cost |x - y|
    eps       in the units of the cost: for p = 2 the square of geomloss's `blur`, for p = 1 its blur

    Differentiable, once, in x, y, a and b; where two points coincide the gradient of their distance is taken as zero.
    Raises ValueError, naming the argument, on bad input. Source: Feydy et al. (2019, "Interpolating between optimal
    transport and MMD using Sinkhorn divergences").
    """
    solved, value, gradients = _of_clouds(x, y, a, b, p, debias, eps, tol, max_iter)
    _warn(solved, tol)
    return _Value.apply(value, gradients, a, b, x, y)


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


def _plain(function):
    """Without gradients and autocast, whatever surrounds it."""
    for context in (torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False)):
        function = context(function)
    return function


@_plain
def _of_cost(C, a, b, *settings):
    """Of a cost, what _solve returns."""
    low, high = _check("C", C, 2)
    a, b = _weights(a, b, C.shape[:-1], C.shape[:-2] + C.shape[-1:], C)
    C = C.to(a.dtype)
    return _solve(lambda rows: C[..., rows, :], a, b, low, high, *settings)


@_plain
def _of_clouds(x, y, a, b, p, debias, *settings):
    """List of Potentials, value (...,), and its gradients in a, b, x and y."""
    _check("x", x, 2)
    _check("y", y, 2, x)
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"x and y must hold points of one dimension, not {x.shape[-1]} and {y.shape[-1]}")
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, not {p!r}")
    leading = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    a, b = _weights(a, b, leading + x.shape[-2:-1], leading + y.shape[-2:-1], x, y)
    x, y = (z.to(a.dtype).expand(leading + z.shape[-2:]) for z in (x, y))
    x, y = (z - x.mean(-2, True) for z in (x, y))  # large coordinates would cancel

    def between(x, y, a, b):
        """Potentials, and (value, f, g, gradients in x and y), of two clouds."""
        x64, y64, blocks, C = x.double(), y.double(), _blocks(a, b), None
        x_half, y_half = (z.square().sum(-1, True) / 2 for z in (x64, y64))

        def cost(rows):
            if C is not None:
                return C[..., rows, :]
            if p == 1:
                return torch.cdist(x[..., rows, :], y, compute_mode="donot_use_mm_for_euclid_dist")
            # In float32 it would cancel.
            return (x_half[..., rows, :] + y_half.mT).sub_(x64[..., rows, :] @ y64.mT).clamp_min_(0)

        if a.numel() * b.shape[-1] <= LARGEST:
            kept = x.new_empty(*x.shape[:-1], y.shape[-2])
            for rows in blocks:
                kept[..., rows, :] = cost(rows)
            C = kept
        high = sum(math.sqrt(2 * float(half.max())) for half in (x_half, y_half)) ** p / p  # from end to end
        potentials, value, P = _solve(cost, a, b, 0.0, high, *settings, same=x is y)
        for rows in blocks if p == 1 else ():
            distance = cost(rows)
            P[..., rows, :].div_(distance.where(distance > 0, math.inf))
        of_x = P.sum(-1, True) * x - P @ y
        of_y = of_x if x is y else P.sum(-2, True).mT * y - P.mT @ x
        return potentials, (value, potentials.f, potentials.g, of_x, of_y)

    pairs, small = [(x, y, a, b)], x.shape == y.shape and a.numel() * b.shape[-1] <= BLOCK
    if debias and small:  # both clouds to themselves at once
        z, w = torch.stack([x, y]), torch.stack([a, b])
        pairs += [(z, z, w, w)]
    elif debias:
        pairs += [(x, x, a, a), (y, y, b, b)]
    solved, ((value, f, g, of_x, of_y), *own) = zip(*(between(*pair) for pair in pairs))
    if debias:  # of a cloud to itself f is g, and the gradients are the same
        (value_x, f_x, _, of_xx, _), (value_y, f_y, _, of_yy, _) = zip(*own[0]) if small else own
        value, f, g = value - (value_x + value_y) / 2, f - f_x, g - f_y
        of_x, of_y = of_x - of_xx, of_y - of_yy
    return solved, value.to(a.dtype), (f, g, of_x, of_y)


def _solve(cost, a, b, low, high, eps, tol, max_iter, same=False):
    """Potentials, value (...,) in float64, and the plan, of checked weights a (..., n) and b (..., m).

    cost(rows) makes these rows, a slice, of the cost, whose values lie from low to high. same: the cost is symmetric
    and a is b, so that f is g.

    The iteration works on the kernel K_ij = b_j exp((f_i + g_j - C_ij) / eps), made from potentials in the log domain,
    where nothing overflows. Sweeps scale its rows by p and its columns by q, which is matrix products, until the rows
    sum to 1 and the columns, weighted by a, to b; where p and q grow large they go into f and g, and K is made afresh.
    The first potentials come from larger eps, a sweep each. Half steps overshoot by omega, tuned to the observed rate
    by Young's formula for over-relaxation; where the dual fell they are taken back. Source: stabilised scaling,
    Schmitzer (2019); overrelaxation, Thibault et al. (2017), Young (1954); averaged half steps, Feydy et al. (2019).
    """
    dtype, largest = a.dtype, max(abs(low), abs(high), high - low)
    if not (0 < eps < math.inf and tol >= 0 and max_iter >= 1):
        raise ValueError(f"eps must be positive, tol >= 0 and max_iter >= 1, not {eps}, {tol} and {max_iter}")
    if not largest <= eps * torch.finfo(dtype).max:
        raise ValueError(f"eps = {eps} is too small for costs as large as {largest:g} in {dtype}")
    if eps >= high - low:  # the rounding of a plan counts eps times; and two sweeps do here
        a, b = a.double(), b.double()
    exact, tiny, blocks = torch.finfo(a.dtype).eps, torch.finfo(a.dtype).tiny, _blocks(a, b)
    rounded = 8 * exact * largest > eps * tol  # f and g need float64
    a, b = a.unsqueeze(-2), b.unsqueeze(-2)  # vectors are rows in here: torch is fastest at a row times a matrix
    mass, least = a.sum(-1, True), math.log(tiny) + 1  # exp of less is slow
    w, v = a / mass, (b / b.sum(-1, True)).clamp_min(1e-30)  # zeros, too, have potentials
    log_v, both, ones = v.log(), torch.cat([w, v], -1), (torch.ones_like(w), torch.ones_like(v))
    K = a.new_empty(a.shape[:-2] + (a.shape[-1], b.shape[-1]))

    def make_kernel(f, g, eps):
        """K of f and g, which are in units of eps."""
        for rows in blocks:
            out = K[..., rows, :]
            torch.add(log_v + g + f.mT[..., rows, :], cost(rows), alpha=-1 / eps, out=out)
            out.clamp_(least, -least / 2).exp_()

    def swept(p, q, r, sweeps, omega):
        """p and q after so many more sweeps; r is q K^T."""
        for left in reversed(range(sweeps)):
            r = r.clamp(tiny, 1 / tiny)
            p = 1 / r if omega == 1 else p * (p * r) ** -omega
            s = ((w * p) @ K).clamp_(tiny, 1 / tiny)
            q = v / s if omega == 1 or left == 0 else q * (v / (q * s)) ** omega  # the last half step is exact
            if same:
                p = q = (p * q).sqrt()
            r = q @ K.mT if left else r
        return p, q

    kind, level = torch.float64 if rounded else a.dtype, (high - low) / 16
    f, g = torch.full_like(w, low, dtype=kind), torch.zeros_like(v, dtype=kind)
    while level > eps and not same:  # a cloud is near itself: zeros are a good start
        make_kernel(f / level, g / level, level)
        p, q = swept(*ones, K.sum(-1).unsqueeze(-2), 1, 1)
        f, g, level = f + level * p.log(), g + level * q.log(), level / 4
    f, g, (p, q) = f / eps, g / eps, ones
    make_kernel(f, g, eps)
    omega, n_iter, sweeps, most, old, old_logs, old_mean, old_worst = 1, 0, 0, 100, ones, 0, 0, 0
    while True:
        r, logs = q @ K.mT, torch.cat([p, q], -1).log()
        rows = w * p * r
        mean, error = rows.sum(-1, True), (rows - w).norm(1, -1, True) * (2 if same else 1)  # else columns are exact
        fall = mean - old_mean - (both * (logs - old_logs)).sum(-1, True)  # of the dual, in units of eps
        worst, fall, extent = torch.stack([error, fall, logs.abs().amax(-1, True)]).flatten(1).amax(1).tolist()
        if sweeps * omega > 1 and not (fall <= 32 * exact and extent < 80):
            (p, q), omega, most, sweeps = old, 1, sweeps // 4 or 1, 0
            continue
        if n_iter >= max_iter or (n_iter > 0 and worst <= tol):
            break
        if sweeps > 0 and 0 < worst < old_worst:
            # Young: the plain iteration's rate is rho, and the best omega 2 / (1 + sqrt(1 - rho)); 2 never converges.
            rate = max((worst / old_worst) ** (1 / sweeps), omega - 1)
            rho = min(1, (rate + omega - 1) ** 2 / (rate * omega**2))
            omega = min(1.99, max(omega, 2 / (1 + math.sqrt(1 - rho))))
        if extent > 20:
            f, g, (p, q), sweeps = f + p.log(), g + q.log(), ones, 0
            make_kernel(f, g, eps)
            continue
        sweeps, most = min(max(3, n_iter // 2), most, max_iter - n_iter), min(2 * most, 100)
        old, old_logs, old_mean, old_worst = (p, q), logs, mean, worst
        (p, q), n_iter = swept(p, q, r, sweeps, omega), n_iter + sweeps

    # The value's term in the mean is zero at the optimum; with it, rounding in f and g counts in second order only.
    f, g, log_mass = (f + p.log()).double(), (g + q.log()).double(), mass.double().log()
    mean_f, mean_g = (w * f).sum(-1, True), (v * g).sum(-1, True)
    value, shift = eps * mass * (mean_f + mean_g - (mean - 1) - log_mass), (mean_g - mean_f) / 2
    f, g = ((eps * (h - log_mass / 2)).to(dtype) for h in (f + shift, g - shift))
    if rounded:  # measure what is returned
        make_kernel(*(h.double() / eps + log_mass / 2 for h in (f, g)), eps)
        p, q = ones
        error = (w * (q @ K.mT) - w).norm(1, -1, True) + (w @ K - v).norm(1, -1, True)
    error, converged, value = (t[..., 0, 0] for t in ((error * mass).to(dtype), error <= tol, value))
    P = K.mul_((a * p).mT).mul_(q * (b > 0)).to(dtype)
    return Potentials(f.squeeze(-2), g.squeeze(-2), n_iter, error, converged), value, P


def _blocks(a, b):
    """Slices of rows that hold about BLOCK numbers of all matrices."""
    height = max(1, BLOCK // b.numel())
    return [slice(i, i + height) for i in range(0, a.shape[-1], height)]


def _warn(solved, tol):
    failed = [s for s in solved if not bool(s.converged.all())]
    if failed:
        worst, n_iter = max(float(s.error.max()) for s in failed), max(s.n_iter for s in failed)
        message = f"Sinkhorn has not converged: L1 marginal error {worst:.0e} at tol {tol:g} after {n_iter} sweeps; "
        warnings.warn(message + "raise max_iter, tol or eps, or use float64", RuntimeWarning, stacklevel=3)


def _check(name, t, dims, like=None):
    """Least and largest value of a tensor; or ValueError."""
    if not isinstance(t, torch.Tensor) or not t.is_floating_point() or t.dim() < dims or t.numel() == 0:
        what = f"{t.dtype} of shape {tuple(t.shape)}" if isinstance(t, torch.Tensor) else type(t).__name__
        raise ValueError(f"{name} must be a non-empty floating point tensor of {dims} dimensions or more, not {what}")
    if like is not None and t.device != like.device:
        raise ValueError(f"{name} is on {t.device}, the other arguments on {like.device}")
    low, high = torch.stack(t.aminmax()).tolist()  # NaN, where there is one
    if not (math.isfinite(low) and math.isfinite(high)):
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
        one, other = totals[:, ((totals[0] - totals[1]).abs() - slack * totals[0]).argmax()].tolist()
        if abs(one - other) > slack * one:
            raise ValueError(f"a and b must have equal total mass, not {one:g} and {other:g}")
    return weights
