"""Entropic optimal transport in PyTorch: log-domain Sinkhorn, its plan, its value and its gradient.

This file stands alone. It imports torch only: copy it (with test_sinkhorn.py) into your project.

The problem. Given a cost C (n, m) and weights a (n,), b (m,) of equal total mass,

    OT(C, a, b)  =  min over P >= 0 with P 1 = a, P^T 1 = b  of   <C, P> + eps * KL(P | a b^T)
    KL(P | Q)    =  sum_ij P_ij log(P_ij / Q_ij)

has the solution P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps), whose potentials f (n,) and g (m,)
maximise the dual. Sinkhorn's algorithm alternates the two exact half steps

    f_i = -eps log sum_j b_j exp((g_j - C_ij) / eps)        (makes the row sums of P equal a)
    g_j = -eps log sum_i a_i exp((f_i - C_ij) / eps)        (makes the column sums of P equal b)

and at the optimum OT = <a, f> + <b, g>. Read from the public functions down; _solve is the iteration.
"""

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

ANNEALING = 4  # eps comes down to its value by this factor a sweep
SWEEPS = 5, 100  # least and most between two looks, which make the kernel afresh and the host wait for the device
MAX_RELAXATION = 1.99  # 2 would never converge
LEAST_WEIGHT = 1e-30  # of a total of 1: lesser weights of b, zeros too, count as this much in the iteration
BLOCK = 2**18  # numbers of the kernel that are made at a time, to stay in the processor's cache
LARGEST = 2**27  # numbers of a kernel that is kept in memory; of a larger one only blocks, made again every sweep


class Potentials(NamedTuple):
    """What `sinkhorn_potentials` returns. `...` are the leading (batch) dimensions of the cost."""

    f: Tensor  # (..., n)
    g: Tensor  # (..., m)
    n_iter: int  # sweeps done at eps, a sweep being one half step on each side
    error: Tensor  # (...), |P 1 - a|_1 + |P^T 1 - b|_1 of the plan of these very potentials
    converged: Tensor  # (...) bool, error <= tol * total mass


def sinkhorn_potentials(C, a=None, b=None, eps=0.01, tol=1e-4, max_iter=1000):
    """Dual potentials of entropic optimal transport.

    C         (..., n, m) finite cost, any sign; leading dimensions are independent problems
    a, b      (..., n) and (..., m) weights >= 0 of equal total; None is uniform with total 1
    eps       > 0, the strength of the entropy, in the units of C; the smaller, the more sweeps are needed
    tol       the iteration ends once the L1 marginal error, as a part of the total mass, is no larger
    max_iter  most sweeps; ending above tol gives one RuntimeWarning with the error reached

    Returns Potentials. f and g are unique up to f + c, g - c; the c returned makes <a, f> = <b, g>. A point of zero
    weight gets the potential it would have at vanishing weight. float16 and bfloat16 are computed, and returned, in
    float32. Not differentiable: see `entropic_ot`. Raises ValueError, naming the argument, on bad input.
    """
    C, a, b, settings = _checked(C, a, b, eps, tol, max_iter)
    potentials, _, _ = _solve(_rows(C), a, b, *settings)
    _warn([potentials], tol)
    return potentials


def sinkhorn_plan(C, a=None, b=None, eps=0.01, tol=1e-4, max_iter=1000):
    """The entropic transport plan P (..., n, m), not differentiable. Arguments as sinkhorn_potentials."""
    C, a, b, settings = _checked(C, a, b, eps, tol, max_iter)
    potentials, _, plan = _solve(_rows(C), a, b, *settings)
    _warn([potentials], tol)
    return torch.cat([P for _, P in plan()], dim=-2)


def entropic_ot(C, a=None, b=None, eps=0.01, tol=1e-5, max_iter=1000):
    """Value of entropic optimal transport (...,): min <C, P> + eps * KL(P | a b^T).

    Arguments as sinkhorn_potentials (tol is finer here: the gradient's error is first order in it, the value's
    second). Differentiable, once, in C, a and b by the envelope theorem: the gradient in C is the plan, in a it is f,
    in b it is g, so no iteration is kept for the backward pass. As the problem exists only for equal totals, the
    gradients in a and b mean something along changes that keep the totals equal (a softmax, say).
    """
    C, a, b, settings = _checked(C, a, b, eps, tol, max_iter)
    solved = []
    value = _Value.apply(C, None, None, a, b, None, solved, _rows(C), settings)
    _warn(solved, tol)
    return value.to(C.dtype)


def sinkhorn_divergence(x, y, a=None, b=None, p=2, eps=0.01, debias=True, tol=1e-5, max_iter=1000):
    """Entropic transport between two weighted point clouds (...,), debiased by default:

        S(x, y) = OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2,

    which is zero for equal clouds and, up to tol, never negative; debias=False gives OT(x, y).

    x, y      (..., n, d) and (..., m, d) finite points
    a, b      weights as sinkhorn_potentials
    p         2: cost |x - y|^2 / 2.  1: cost |x - y|
    eps       in the units of the cost: for p = 2 the square of geomloss's `blur`, for p = 1 its blur

    Differentiable, once, in x, y, a and b; where two points coincide the gradient of their distance is taken as zero.
    Raises ValueError, naming the argument, on bad input. Source: Feydy et al. (2019, "Interpolating between optimal
    transport and MMD using Sinkhorn divergences").
    """
    _check_tensor("x", x, 2)
    _check_tensor("y", y, 2, x.device)
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"x and y must hold points of one dimension, not {x.shape[-1]} and {y.shape[-1]}")
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, not {p!r}")
    leading = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    x, y = (points.expand(leading + points.shape[-2:]) for points in _at_least_float32(x, y))
    a, b = _checked_weights(a, b, x, leading + (x.shape[-2],), leading + (y.shape[-2],))
    solved, settings = [], (eps, tol, max_iter)
    value = _between(x, y, a, b, p, solved, *settings)
    if debias and x.shape == y.shape and a.numel() * b.shape[-1] <= BLOCK:  # small: both at once
        z, w = torch.stack([x, y]), torch.stack([a, b])
        value = value - _between(z, z, w, w, p, solved, *settings, same=True).sum(0) / 2
    elif debias:
        value = value - sum(_between(z, z, w, w, p, solved, *settings, same=True) for z, w in ((x, a), (y, b))) / 2
    _warn(solved, tol)
    return value.to(x.dtype)


# ---- the iteration --------------------------------------------------------------------------------


def _plain(function):
    """Without gradients and autocast, whatever surrounds it."""

    @torch.no_grad()
    def plain(*args, **named):
        if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
            return function(*args, **named)  # to enter the two contexts takes time
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **named)

    return plain


@_plain
def _solve(cost, a, b, eps, tol, max_iter, low, high, same=False):
    """(Potentials, value (...,) in float64, plan) on checked arguments; plan() yields (rows, P[..., rows, :]) by parts.

    cost(rows) gives rows of C, whose values lie from low to high. same: C is symmetric and a is b, so that f is g.

    The iteration works on the kernel Q_ij = b_j exp((f_i + g_j - C_ij) / eps), made from potentials in the log domain,
    where nothing overflows: rows sum to r (1 at the optimum), columns weighted by a to s (b at the optimum). Some
    sweeps scale Q by p and q, which are matrix products; then p and q go into f and g, and Q is made afresh. The
    first potentials come from larger eps, a sweep each. Half steps overshoot by omega, tuned to the observed rate by
    Young's formula for over-relaxation; where the dual fell they are taken back. Source: stabilised scaling, Schmitzer
    (2019); overrelaxation, Thibault et al. (2017), Young (1954); half steps averaged for symmetry, Feydy et al. (2019).
    """
    dtype, exact, positive = a.dtype, torch.finfo(a.dtype).eps, b.unsqueeze(-2) > 0
    if eps >= high - low:  # the rounding of a plan counts eps times; and two sweeps do here
        a, b = a.double(), b.double()
    a, b = a.unsqueeze(-2), b.unsqueeze(-2)  # vectors are rows in here: torch is fastest at a row times a matrix
    mass, tiny = a.sum(-1, keepdim=True), torch.finfo(a.dtype).tiny
    w, v = a / mass, (b / b.sum(-1, keepdim=True)).clamp_min(LEAST_WEIGHT)
    parts, size = _blocks(a, b), a.numel() * b.shape[-1]
    kept = a.new_empty(a.shape[:-2] + (a.shape[-1], b.shape[-1])) if size <= LARGEST else None
    log_v, least = v.log(), math.log(tiny) + 1  # exp of less is slow

    def kernel(f, g, eps, kept=None):
        h, f = torch.add(log_v, g, alpha=1 / eps), f.mT
        for rows in parts:
            out = None if kept is None else kept[..., rows, :]
            Q = torch.add(h, cost(rows), alpha=-1 / eps, out=out).add_(f[..., rows, :], alpha=1 / eps)
            yield rows, Q.clamp_(least, -least / 2).exp_()

    def relaxed(old, new, omega):
        return new if omega is None else old * (new / old) ** omega

    def sweep(f, g, eps, omega, kept=kept):
        """r and s of the kernel, and the factors p and q of a sweep from there."""
        r, p, sums = [], [], 0
        for rows, Q in kernel(f, g, eps, kept):
            r.append(Q.sum(-1).unsqueeze(-2))
            p.append(relaxed(1, r[-1].reciprocal(), omega))
            weights = torch.cat([w[..., rows], w[..., rows] * p[-1]], dim=-2)
            sums = sums + weights.to(Q.dtype) @ Q
        s, s_next = sums.split(1, dim=-2)
        q = relaxed(1, v / s_next.clamp(tiny, 1 / tiny), omega)
        return torch.cat(r, dim=-1), s, torch.cat(p, dim=-1), q

    def dot(x, y):
        return (x * y).sum(-1, keepdim=True)

    def off(r, s):
        return dot(w, (r - 1).abs()) + (s - v).abs().sum(-1, keepdim=True)

    f, g, level = torch.full_like(w, 0 if same else low), torch.zeros_like(v), (high - low) / ANNEALING
    while level > eps and not same:  # a cloud is near itself: zeros are a good start
        _, _, p, q = sweep(f, g, level, None)
        f, g, level = f + level * p.log(), g + level * q.log(), level / ANNEALING
    omega, n_iter, before, longest = None, 0, None, 1 if kept is None else SWEEPS[1]
    most = longest
    while True:
        r, s, p, q = sweep(f, g, eps, omega)
        total, error = dot(w, r), off(r, s)
        if before is not None:
            old_f, old_g, old_total, old_error, sweeps, rise = before
            # In units of eps and mass. Where the kernel grew out of its bounds the gain is not to be trusted.
            rose = (rise - total + old_total >= -32 * exact) & (total < 1e6 + old_total)
            if not bool(rose.all()):
                f, g, omega = f.where(rose, old_f), g.where(rose, old_g), None
                most, before = max(1, sweeps // 4), None
                continue
        if n_iter >= max_iter or bool((error <= tol).all()):
            break
        if before is not None and not same:  # Young: the plain rate is rho; the best omega 2 / (1 + sqrt(1 - rho))
            omega = torch.ones_like(mass) if omega is None else omega
            rate = torch.maximum((error / old_error) ** (1 / sweeps), omega - 1).clamp_min(1e-9)
            rho = ((rate + omega - 1) ** 2 / (rate * omega**2)).clamp(max=1)
            tuned = torch.maximum(omega, 2 / (1 + (1 - rho).sqrt())).clamp(max=MAX_RELAXATION)
            omega = tuned.where((error > tol) & (rate < 1), omega)
        sweeps, most = min(max(SWEEPS[0], n_iter // 2), most, max_iter - n_iter), min(2 * most, longest)
        for n in range(sweeps):
            if n > 0:
                p = relaxed(p, (q @ kept.mT).reciprocal(), omega)
                last = n == sweeps - 1  # the columns' sums are then exact, and the look measures the rows' alone
                q = relaxed(q, v / ((w * p) @ kept), None if last else omega)
            if same:
                p = q = (p * q).sqrt()
        log_p, log_q = p.log(), q.log()
        before = f, g, total, error, sweeps, dot(w, log_p) + dot(v, log_q)
        f, g, n_iter = f + eps * log_p, g + eps * log_q, n_iter + sweeps

    def plan():
        weight = a.mT
        for rows, Q in kernel(f, g, eps) if kept is None else ((rows, kept[..., rows, :]) for rows in parts):
            yield rows, (Q * weight[..., rows, :] * positive).to(dtype)

    # The value's term in total is zero at the optimum. With it, rounding in f and g moves the value in second order
    # only, which matters where a divergence is a small difference of large values.
    mass, total = mass.double(), total.double()
    mean_f, mean_g, log_mass = dot(w.double(), f), dot(v.double(), g), eps * mass.log()
    value = mass * (mean_f + mean_g - eps * (total - 1) - log_mass)
    shift = (mean_g - mean_f) / 2
    f_out, g_out = ((h - log_mass / 2).to(dtype) for h in (f + shift, g - shift))
    if 8 * exact * max(abs(low), abs(high), high - low) > eps * tol:  # rounding matters: measure what is returned
        error = off(*sweep(f_out + log_mass / 2, g_out + log_mass / 2, eps, None, kept=None)[:2])
    converged, error, value = (t[..., 0, 0] for t in (error <= tol, (error * mass).to(dtype), value))
    return Potentials(f_out.squeeze(-2), g_out.squeeze(-2), n_iter, error, converged), value, plan


class _Value(torch.autograd.Function):
    """Value (...,) in float64 of the cost C, or of clouds x and y at power p; and its gradients, made on the way."""

    @staticmethod
    def forward(ctx, C, x, y, a, b, p, solved, cost, settings):
        potentials, value, plan = _solve(cost, a, b, *settings)
        solved.append(potentials)
        of_C, of_x, of_y = ctx.needs_input_grad[:3]
        grad_C = torch.cat([P for _, P in plan()], dim=-2) if of_C else None
        grad_x, grad_y = _gradients(x, y, p, cost, plan, of_y) if of_x or of_y else (None, None)
        ctx.save_for_backward(grad_C, grad_x, grad_y, potentials.f, potentials.g)
        return value

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # only with create_graph=True
            raise RuntimeError("optimal transport cannot be differentiated twice: call backward without create_graph")
        pairs = zip(ctx.saved_tensors, ctx.needs_input_grad)
        shaped = (
            grad.to(t.dtype).view(grad.shape + (1,) * (t.dim() - grad.dim())) * t if n else None for t, n in pairs
        )
        return *shaped, None, None, None, None


@_plain
def _gradients(x, y, p, cost, plan, of_y):
    """Gradients of <P, C> in x and, if asked for, y; around a common centre, as large coordinates would cancel."""
    centre = x.mean(-2, keepdim=True)
    x, y, grad_x, to_y, weight = x - centre, y - centre, [], 0, 0
    for rows, P in plan():
        if p == 1:
            distance = cost(rows)
            P = torch.where(distance > 0, P / distance, 0)
        grad_x.append(P.sum(-1, keepdim=True) * x[..., rows, :] - P @ y)
        if of_y:
            to_y, weight = to_y + P.mT @ x[..., rows, :], weight + P.sum(-2).unsqueeze(-1)
    return torch.cat(grad_x, dim=-2), weight * y - to_y if of_y else None


def _between(x, y, a, b, p, solved, eps, tol, max_iter, same=False):
    """Value (...,) between two clouds; same as in _solve."""
    with torch.no_grad():
        cost = _cost(x, y, p)
        if a.numel() * b.shape[-1] > LARGEST:  # no cost is larger than from end to end
            low, high = 0.0, (2 * max(float((z - x[..., :1, :]).norm(dim=-1).max()) for z in (x, y))) ** p / p
        else:
            C = torch.cat([cost(rows) for rows in _blocks(a, b)], dim=-2)
            low, high, cost = *map(float, C.aminmax()), _rows(C)
    if not math.isfinite(high):
        raise ValueError(f"x and y lie too far apart: their cost overflows {x.dtype}")
    settings = _checked_settings(eps, tol, max_iter, low, high, x.dtype)
    if not same:
        return _Value.apply(None, x, y, a, b, p, solved, cost, (*settings, False))
    value = _Value.apply(None, x, x.detach(), a, a.detach(), p, solved, cost, (*settings, True))
    return 2 * value - value.detach()  # both sides have the same gradient


@_plain
def _cost(x, y, p):
    """rows -> cost (..., rows, m). Squared distances by one matrix product, in float64, as float32 would cancel."""
    if p == 1:
        return lambda rows: torch.cdist(x[..., rows, :], y, compute_mode="donot_use_mm_for_euclid_dist")
    x64, y64 = ((z - x.mean(-2, keepdim=True)).double() for z in (x, y))
    x_half, y_half = (z.square().sum(-1, keepdim=True) / 2 for z in (x64, y64))
    left = torch.cat([x64, x_half, torch.ones_like(x_half)], dim=-1)
    right = torch.cat([-y64, torch.ones_like(y_half), y_half], dim=-1).mT
    return lambda rows: (left[..., rows, :] @ right).clamp_min_(0).to(x.dtype)


def _rows(C):
    return lambda rows: C[..., rows, :]


def _blocks(a, b):
    """Slices of the rows that make blocks of about BLOCK numbers."""
    height = max(1, BLOCK // b.numel())
    return [slice(start, start + height) for start in range(0, a.shape[-1], height)]


def _warn(solved, tol):
    failed = [s for s in solved if not bool(s.converged.all())]
    if failed:
        worst, n_iter = max(float(s.error.max()) for s in failed), max(s.n_iter for s in failed)
        message = f"Sinkhorn has not converged: L1 marginal error {worst:.0e} at tol {tol:g} after {n_iter} sweeps; "
        warnings.warn(message + "raise max_iter, tol or eps, or use float64", RuntimeWarning, stacklevel=3)


# ---- the argument checks --------------------------------------------------------------------------


def _at_least_float32(*tensors):
    """The tensors in their common floating type, half types raised to float32."""
    dtype = torch.float32
    for t in tensors:
        dtype = torch.promote_types(dtype, t.dtype)
    return [t.to(dtype) for t in tensors]


def _check_tensor(name, t, least_dim, device=None):
    """Least and largest value of a tensor, or ValueError."""
    if not isinstance(t, Tensor) or not t.dtype.is_floating_point:
        raise ValueError(f"{name} must be a floating point torch tensor, not {getattr(t, 'dtype', type(t).__name__)}")
    if t.dim() < least_dim or t.numel() == 0:
        raise ValueError(f"{name} must be non-empty, in {least_dim} dimensions or more, not of shape {tuple(t.shape)}")
    if device is not None and t.device != device:
        raise ValueError(f"{name} is on {t.device}, the other arguments on {device}")
    low, high = map(float, t.detach().aminmax())  # NaN, where there is one
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{name} holds NaN or infinite values")
    return low, high


def _checked(C, a, b, eps, tol, max_iter):
    """C, a (..., n), b (..., m) in the type to compute in, and the settings of _solve; or ValueError."""
    low, high = _check_tensor("C", C, 2)
    a, b = _checked_weights(a, b, C, C.shape[:-1], C.shape[:-2] + C.shape[-1:])
    C, a, b = _at_least_float32(C, a, b)
    return C, a, b, _checked_settings(eps, tol, max_iter, low, high, C.dtype)


def _checked_settings(eps, tol, max_iter, low, high, dtype):
    if not (eps > 0 and math.isfinite(eps)):
        raise ValueError(f"eps must be positive and finite, not {eps}")
    if not (tol >= 0 and max_iter >= 1):
        raise ValueError(f"tol must be >= 0 and max_iter >= 1, not {tol} and {max_iter}")
    if max(abs(low), abs(high)) > eps * torch.finfo(dtype).max:
        raise ValueError(f"eps = {eps} is too small for costs as large as {max(abs(low), abs(high)):g} in {dtype}")
    return eps, tol, max_iter, low, high


def _checked_weights(a, b, like, shape_a, shape_b):
    """a and b of these shapes and of equal total, in the type and on the device of `like`; or ValueError."""
    checked, slack, dtype = [], 1e-5, torch.promote_types(like.dtype, torch.float32)
    for name, weight, shape in (("a", a, shape_a), ("b", b, shape_b)):
        if weight is None:
            weight = like.new_full((), 1 / shape[-1], dtype=dtype).expand(shape)
        low, _ = _check_tensor(name, weight, 1, like.device)
        fits = [have in (1, need) for have, need in zip(weight.shape[-2::-1], shape[-2::-1])]
        if weight.shape[-1] != shape[-1] or weight.dim() > len(shape) or not all(fits):
            raise ValueError(f"{name} has shape {tuple(weight.shape)}; it must be {tuple(shape)}")
        if low < 0 or bool((weight.sum(-1) <= 0).any()):
            raise ValueError(f"{name} must be >= 0 with a positive total; its least weight is {low:g}")
        slack = max(slack, 2 * torch.finfo(weight.dtype).eps)  # of half types
        checked.append(weight.to(torch.promote_types(weight.dtype, dtype)).expand(shape))
    total_a, total_b = (weight.sum(-1) for weight in checked)
    if bool(((total_a - total_b).abs() > slack * total_a).any()):
        worst = (total_a - total_b).abs().argmax()
        pair = f"{total_a.flatten()[worst].item():g} and {total_b.flatten()[worst].item():g}"
        raise ValueError(f"a and b must have equal total mass, not {pair}")
    return checked
