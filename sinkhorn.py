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

import functools
import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

ANNEALING = 4  # eps comes down to its value by this factor a sweep
SWEEPS = 3, 100  # least and most between two looks, which make the kernel afresh and the host wait for the device
MAX_RELAXATION = 1.99  # 2 would never converge
LEAST_WEIGHT = 1e-30  # of a total of 1: lesser weights of b, zeros too, count as this much in the iteration
BLOCK = 2**18  # numbers of the kernel that are made at a time, to stay in the processor's cache
LARGEST = 2**27  # numbers of a cost between clouds that is kept; a larger one is made again whenever it is needed


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
    potentials, _, _ = _solve(*_checked(C, a, b), eps, tol, max_iter)
    _warn([potentials], tol)
    return potentials


def sinkhorn_plan(C, a=None, b=None, eps=0.01, tol=1e-4, max_iter=1000):
    """The entropic transport plan P (..., n, m), not differentiable. Arguments as sinkhorn_potentials."""
    potentials, _, plan = _solve(*_checked(C, a, b), eps, tol, max_iter)
    _warn([potentials], tol)
    return plan()


def entropic_ot(C, a=None, b=None, eps=0.01, tol=1e-5, max_iter=1000):
    """Value of entropic optimal transport (...,): min <C, P> + eps * KL(P | a b^T).

    Arguments as sinkhorn_potentials (tol is finer here: the gradient's error is first order in it, the value's
    second). Differentiable, once, in C, a and b by the envelope theorem: the gradient in C is the plan, in a it is f,
    in b it is g, so no iteration is kept for the backward pass. As the problem exists only for equal totals, the
    gradients in a and b mean something along changes that keep the totals equal (a softmax, say).
    """
    cost, a, b, bounds = _checked(C, a, b)
    potentials, value, plan = _solve(cost, a, b, bounds, eps, tol, max_iter)
    _warn([potentials], tol)
    P = plan() if torch.is_grad_enabled() and C.requires_grad else None
    return _Value.apply(value, (P, potentials.f, potentials.g), C, a, b).to(a.dtype)


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
    _check("x", x, 2)
    _check("y", y, 2, x.device)
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"x and y must hold points of one dimension, not {x.shape[-1]} and {y.shape[-1]}")
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, not {p!r}")
    leading = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    dtype = _dtype(x, y)
    x, y = (points.to(dtype).expand(leading + points.shape[-2:]) for points in (x, y))
    a, b = _weights(a, b, x, leading + (x.shape[-2],), leading + (y.shape[-2],))
    settings, solved = (p, eps, tol, max_iter), []
    value = _between(x, y, a, b, solved, *settings)
    if debias:
        clouds = [(x, a), (y, b)]
        if x.shape == y.shape and a.numel() * b.shape[-1] <= BLOCK:  # small: both at once
            clouds = [(torch.stack([x, y]), torch.stack([a, b]))]
        for z, w in clouds:
            itself = _between(z, z, w, w, solved, *settings, same=True)
            value = value - itself.reshape(-1, *value.shape).sum(0) / 2
    _warn(solved, tol)
    return value.to(dtype)


# ---- the iteration --------------------------------------------------------------------------------


def _plain(function):
    """Without gradients and autocast, whatever surrounds it."""
    for context in (torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False)):
        function = context(function)
    return function


@_plain
def _solve(cost, a, b, bounds, eps, tol, max_iter, same=False):
    """(Potentials, value (...,) in float64, plan) on checked tensors; plan() gives P, once, as it takes K.

    cost() yields blocks of rows of C, as high as _height says, with values within bounds. same: C is symmetric and a
    is b, so that f is g.

    The iteration works on the kernel K_ij = b_j exp((f_i + g_j - C_ij) / eps), made from potentials in the log domain,
    where nothing overflows: rows sum to r (1 at the optimum), columns weighted by a to s (b at the optimum). Some
    sweeps scale K by p and q, which are matrix products; then p and q go into f and g, and K is made afresh. The
    first potentials come from larger eps, a sweep each. Half steps overshoot by omega, tuned to the observed rate by
    Young's formula for over-relaxation; where the dual fell they are taken back. Source: stabilised scaling, Schmitzer
    (2019); overrelaxation, Thibault et al. (2017), Young (1954); half steps averaged for symmetry, Feydy et al. (2019).
    """
    (low, high), dtype, exact, positive = bounds, a.dtype, torch.finfo(a.dtype).eps, b.unsqueeze(-2) > 0
    largest = max(abs(low), abs(high), high - low)
    if not math.isfinite(largest):
        raise ValueError(f"x and y lie too far apart: their cost overflows {dtype}")
    if not (eps > 0 and math.isfinite(eps)):
        raise ValueError(f"eps must be positive and finite, not {eps}")
    if not (tol >= 0 and max_iter >= 1):
        raise ValueError(f"tol must be >= 0 and max_iter >= 1, not {tol} and {max_iter}")
    if largest > eps * torch.finfo(dtype).max:
        raise ValueError(f"eps = {eps} is too small for costs as large as {largest:g} in {dtype}")
    if eps >= high - low:  # the rounding of a plan counts eps times; and two sweeps do here
        a, b = a.double(), b.double()
    a, b = a.unsqueeze(-2), b.unsqueeze(-2)  # vectors are rows in here: torch is fastest at a row times a matrix
    mass, tiny, height = a.sum(-1, keepdim=True), torch.finfo(a.dtype).tiny, _height(a, b)
    w, v = a / mass, (b / b.sum(-1, keepdim=True)).clamp_min(LEAST_WEIGHT)
    log_v, least = v.log(), math.log(tiny) + 1  # exp of less is slow
    K = a.new_empty(a.shape[:-2] + (a.shape[-1], b.shape[-1]))

    def sums(f, g, eps):
        """r and s of the kernel K of f and g, which are in units of eps."""
        for C, rows, f_rows in zip(cost(), K.split(height, -2), f.mT.split(height, -2)):
            torch.add(log_v + g + f_rows, C, alpha=-1 / eps, out=rows).clamp_(least, -least / 2).exp_()
        return K.sum(-1).unsqueeze(-2), w @ K

    def relaxed(old, new, omega):
        return new if omega == 1 else old * (new / old) ** omega

    def swept(r, sweeps, omega):
        """Logarithms of the factors p and q after so many sweeps on K, of row sums r."""
        p = q = 1
        for n in range(sweeps):
            p = relaxed(p, (r if n == 0 else q @ K.mT).reciprocal(), omega)
            last = n == sweeps - 1  # the columns' sums are then exact, and the look measures the rows' alone
            q = relaxed(q, v / ((w * p) @ K).clamp_(tiny, 1 / tiny), 1 if last else omega)
            if same:
                p = q = (p * q).sqrt()
        return p.log(), q.log()

    def total(x):
        return x.sum(-1, keepdim=True)

    def off(r, s):
        return total((w * r - w).abs()) + total((s - v).abs())

    f, g, level = torch.full_like(w, 0 if same else low), torch.zeros_like(v), (high - low) / ANNEALING
    while level > eps and not same:  # a cloud is near itself: zeros are a good start
        log_p, log_q = swept(sums(f / level, g / level, level)[0], 1, 1)
        f, g, level = f + level * log_p, g + level * log_q, level / ANNEALING
    f, g = old_f, old_g = f / eps, g / eps
    omega, n_iter, sweeps, most, old_mean, old_worst, rise = 1, 0, 0, SWEEPS[1], 0, 0, 0
    while True:
        r, s = sums(f, g, eps)
        mean, error = total(w * r), off(r, s)
        grown = mean - old_mean  # the dual, in units of eps, gained rise - grown
        worst, gain, grown = torch.stack([error.max(), (rise - grown).min(), grown.max()]).tolist()
        if max(sweeps, omega) > 1 and not (gain >= -32 * exact and grown < 1e6):  # 1e6: the kernel hit its bounds
            f, g, omega, most, sweeps = old_f, old_g, 1, sweeps // 4 or 1, 0
            continue
        if n_iter >= max_iter or worst <= tol:
            break
        if sweeps > 0 and not same and 0 < worst < old_worst:
            # Young: the plain iteration's rate is rho, and the best omega 2 / (1 + sqrt(1 - rho)).
            rate = max((worst / old_worst) ** (1 / sweeps), omega - 1)
            rho = min(1, (rate + omega - 1) ** 2 / (rate * omega**2))
            omega = min(MAX_RELAXATION, max(omega, 2 / (1 + math.sqrt(1 - rho))))
        sweeps, most = min(max(SWEEPS[0], n_iter // 2), most, max_iter - n_iter), min(2 * most, SWEEPS[1])
        log_p, log_q = swept(r, sweeps, omega)
        old_f, old_g, old_mean, old_worst, rise = f, g, mean, worst, total(w * log_p) + total(v * log_q)
        f, g, n_iter = f + log_p, g + log_q, n_iter + sweeps

    def plan():
        return K.mul_(a.mT).mul_(positive).to(dtype)

    # The value's term in the mean is zero at the optimum. With it, rounding in f and g moves the value in second order
    # only, which matters where a divergence is a small difference of large values.
    f, g, mass, log_mass = f.double(), g.double(), mass.double(), mass.double().log()
    mean_f, mean_g = total(w * f), total(v * g)
    value = eps * mass * (mean_f + mean_g - (mean - 1) - log_mass)
    shift = (mean_g - mean_f) / 2
    f, g = ((eps * (h - log_mass / 2)).to(dtype) for h in (f + shift, g - shift))
    if 8 * exact * largest > eps * tol:  # rounding matters: measure what is returned, in float64
        error = off(*sums(*(h.double() / eps + log_mass / 2 for h in (f, g)), eps))
    error, converged, value = (t[..., 0, 0] for t in ((error * mass).to(dtype), error <= tol, value))
    return Potentials(f.squeeze(-2), g.squeeze(-2), n_iter, error, converged), value, plan


class _Value(torch.autograd.Function):
    """A value (...,) whose gradients are known: _Value.apply(value, (gradient or None, ...), *inputs)."""

    @staticmethod
    def forward(ctx, value, gradients, *inputs):
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # only with create_graph=True
            raise RuntimeError("optimal transport cannot be differentiated twice: call backward without create_graph")

        def of_input(g):
            return None if g is None else g * grad.to(g.dtype)[(...,) + (None,) * (g.dim() - grad.dim())]

        return None, None, *map(of_input, ctx.saved_tensors)


def _between(x, y, a, b, solved, p, eps, tol, max_iter, same=False):
    """Value (...,) in float64 between two clouds, differentiable; same as in _solve, whose potentials join `solved`."""
    of_x, of_y = (torch.is_grad_enabled() and z.requires_grad for z in (x, y))
    potentials, value, grad_x, grad_y = _solve_clouds(x, y, a, b, p, (eps, tol, max_iter), same, of_x, of_y)
    solved.append(potentials)
    if same:  # both sides have the same gradient
        return _Value.apply(value, (None if grad_x is None else 2 * grad_x, 2 * potentials.f), x, a)
    return _Value.apply(value, (grad_x, grad_y, potentials.f, potentials.g), x, y, a, b)


@_plain
def _solve_clouds(x, y, a, b, p, settings, same, of_x, of_y):
    """Potentials, value, and its gradients in x and y, each where asked for, else None."""
    centre, height = x.mean(-2, keepdim=True), _height(a, b)
    x, y = x - centre, y - centre  # large coordinates would cancel
    y64, blocks = y.double(), x.split(height, -2)
    y_half = y64.square().sum(-1).unsqueeze(-2) / 2

    def block(rows):
        """Rows of the cost. The squared distance is one matrix product, in float64 because it cancels."""
        if p == 1:
            return torch.cdist(rows, y, compute_mode="donot_use_mm_for_euclid_dist")
        rows = rows.double()
        C = (rows.square().sum(-1, keepdim=True) / 2 + y_half).sub_(rows @ y64.mT)
        return C.clamp_min_(0).to(y.dtype)

    def cost():
        return map(block, blocks) if C is None else C

    if a.numel() * b.shape[-1] > LARGEST:  # no cost is larger than from end to end
        C, bounds = None, (0.0, (2 * max(float(z.norm(dim=-1).max()) for z in (x, y))) ** p / p)
    else:
        C = list(map(block, blocks))
        bounds = min(float(rows.min()) for rows in C), max(float(rows.max()) for rows in C)
    potentials, value, plan = _solve(cost, a, b, bounds, *settings, same)
    grad_x, grad_y = (torch.zeros_like(z) if of_z else None for z, of_z in ((x, of_x), (y, of_y and not same)))
    outs = grad_x.split(height, -2) if of_x else None  # split once: at 20,000 points there are 1,500 blocks
    for n, P in enumerate(plan().split(height, -2)) if of_x or of_y else ():
        if p == 1:
            distance = block(blocks[n]) if C is None else C[n]
            P = torch.where(distance > 0, P / distance, 0)
        if of_x:
            outs[n].copy_(P.sum(-1, keepdim=True) * blocks[n] - P @ y)
        if grad_y is not None:
            grad_y += P.sum(-2).unsqueeze(-1) * y - P.mT @ blocks[n]
    return potentials, value, grad_x, grad_y


def _height(a, b):
    """Rows that make a block of about BLOCK numbers."""
    return max(1, BLOCK // b.numel())


def _warn(solved, tol):
    failed = [s for s in solved if not bool(s.converged.all())]
    if failed:
        worst, n_iter = max(float(s.error.max()) for s in failed), max(s.n_iter for s in failed)
        message = f"Sinkhorn has not converged: L1 marginal error {worst:.0e} at tol {tol:g} after {n_iter} sweeps; "
        warnings.warn(message + "raise max_iter, tol or eps, or use float64", RuntimeWarning, stacklevel=3)


# ---- the argument checks --------------------------------------------------------------------------


def _dtype(*tensors):
    """Their common floating type, float32 at the least."""
    return functools.reduce(torch.promote_types, [t.dtype for t in tensors], torch.float32)


def _check(name, t, least_dim, device=None):
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


def _checked(C, a, b):
    """What _solve needs of a cost and its weights."""
    bounds = _check("C", C, 2)
    a, b = _weights(a, b, C, C.shape[:-1], C.shape[:-2] + C.shape[-1:])
    dtype = _dtype(C, a, b)
    a, b, blocks = a.to(dtype), b.to(dtype), C.detach().to(dtype).split(_height(a, b), dim=-2)
    return lambda: blocks, a, b, bounds


def _weights(a, b, like, shape_a, shape_b):
    """a and b of these shapes and of equal total, float32 at the least, on the device of `like`; or ValueError."""
    shapes, checked, slack = (shape_a, shape_b), [], 1e-5
    uniform = [like.new_full((), 1 / shape[-1], dtype=_dtype(like)).expand(shape) for shape in shapes]
    if a is None and b is None:
        return uniform
    for name, given, shape, flat in zip("ab", (a, b), shapes, uniform):
        weight = flat if given is None else given
        low, _ = _check(name, weight, 1, like.device)
        fits = [have in (1, need) for have, need in zip(weight.shape[-2::-1], shape[-2::-1])]
        if weight.shape[-1] != shape[-1] or weight.dim() > len(shape) or not all(fits):
            raise ValueError(f"{name} has shape {tuple(weight.shape)}; it must be {tuple(shape)}")
        if low < 0 or bool((weight.sum(-1) <= 0).any()):
            raise ValueError(f"{name} must be >= 0 with a positive total; its least weight is {low:g}")
        checked.append(weight.to(_dtype(weight, like)).expand(shape))
        slack = max(slack, 2 * torch.finfo(weight.dtype).eps)  # of half types
    total_a, total_b = (weight.sum(-1) for weight in checked)
    if bool(((total_a - total_b).abs() > slack * total_a).any()):
        worst = (total_a - total_b).abs().argmax()
        pair = f"{total_a.flatten()[worst].item():g} and {total_b.flatten()[worst].item():g}"
        raise ValueError(f"a and b must have equal total mass, not {pair}")
    return checked
