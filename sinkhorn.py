"""Entropic optimal transport in PyTorch: log-domain Sinkhorn, its plan, its value and its gradient.

This file stands alone. It imports torch only: copy it (with test_sinkhorn.py) into your project.

The problem. Given a cost C (n, m) and weights a (n,), b (m,) of equal total mass,

    OT(C, a, b)  =  min over P >= 0 with P 1 = a, P^T 1 = b  of   <C, P> + eps * KL(P | a b^T)
    KL(P | Q)    =  sum_ij P_ij log(P_ij / Q_ij)

has the solution P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps), whose potentials f (n,) and g (m,)
maximise the dual. Sinkhorn's algorithm alternates the two exact half steps

    f_i = -eps log sum_j b_j exp((g_j - C_ij) / eps)        (makes the row sums of P equal a)
    g_j = -eps log sum_i a_i exp((f_i - C_ij) / eps)        (makes the column sums of P equal b)

and at the optimum OT = <a, f> + <b, g>.

Reading order:
    sinkhorn_potentials   the iteration: f, g, and how far they are from the constraints
    sinkhorn_plan         P
    entropic_ot           the value, differentiable in C, a and b
    sinkhorn_divergence   the same between two point clouds, debiased
    below them            the argument checks
"""

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

CHECK_EVERY = 10  # sweeps between two looks at the error: each look makes the host wait for the device
MAX_RELAXATION = 1.95  # 2 would never converge


class Potentials(NamedTuple):
    """What `sinkhorn_potentials` returns. `...` are the leading (batch) dimensions of the cost."""

    f: Tensor  # (..., n)
    g: Tensor  # (..., m)
    n_iter: int  # sweeps done, a sweep being one half step on each side
    error: Tensor  # (...), |P 1 - a|_1 + |P^T 1 - b|_1 of the plan of these very potentials
    converged: Tensor  # (...) bool, error <= tol * total mass


def sinkhorn_potentials(C, a=None, b=None, eps=0.01, tol=1e-4, max_iter=1000):
    """Dual potentials of entropic optimal transport, by over-relaxed log-domain Sinkhorn.

    C         (..., n, m) finite cost, any sign; leading dimensions are independent problems
    a, b      (..., n) and (..., m) weights >= 0 of equal total; None is uniform with total 1
    eps       > 0, the strength of the entropy, in the units of C
    tol       the iteration ends once the L1 marginal error, as a part of the total mass, is no larger
    max_iter  most sweeps; ending above tol gives one RuntimeWarning with the error reached. The smaller eps
              is beside the spread of C, the more sweeps are needed: at a hundredth or less, often thousands

    Returns Potentials. f and g are unique up to f + c, g - c; the c returned makes <a, f> = <b, g>.
    A point of zero weight gets the potential it would have at vanishing weight. float16 and bfloat16
    are computed, and returned, in float32. Nothing here is differentiated: see `entropic_ot`.
    Raises ValueError, naming the argument, on bad input.

    Source: Sinkhorn's half steps are textbook. Over-relaxation is that of Thibault et al. (2017,
    "Overrelaxed Sinkhorn-Knopp algorithm for regularized optimal transport"): both half steps
    overshoot by a factor omega, but only where the dual still ascends, so convergence is kept.
    omega is tuned to the observed rate by Young's formula for successive over-relaxation.
    """
    C, a, b, dtype = _checked(C, a, b, eps, tol, max_iter)
    potentials = _solve(C, a, b, eps, tol, max_iter)
    _warn_unless_converged([potentials], tol, max_iter)
    return potentials._replace(**{name: getattr(potentials, name).to(dtype) for name in ("f", "g", "error")})


def sinkhorn_plan(C, a=None, b=None, eps=0.01, tol=1e-4, max_iter=1000):
    """The entropic transport plan P (..., n, m), not differentiable. Arguments as sinkhorn_potentials."""
    C, a, b, dtype = _checked(C, a, b, eps, tol, max_iter)
    potentials = _solve(C, a, b, eps, tol, max_iter)
    _warn_unless_converged([potentials], tol, max_iter)
    return _plan(C, a, b, potentials.f, potentials.g, eps).to(dtype)


def entropic_ot(C, a=None, b=None, eps=0.01, tol=1e-5, max_iter=1000):
    """Value of entropic optimal transport (...,): min <C, P> + eps * KL(P | a b^T).

    Arguments as sinkhorn_potentials (tol is finer here: the gradient's error is first order in it,
    the value's second). Differentiable in C, a and b by the envelope theorem: the gradient in C is
    the plan, in a it is f, in b it is g, so no iteration is kept for the backward pass. As the
    problem exists only for equal totals, the gradients in a and b mean something along changes that
    keep the totals equal (a softmax, say). create_graph=True raises RuntimeError.
    """
    C, a, b, dtype = _checked(C, a, b, eps, tol, max_iter)
    value, potentials = _value(C, a, b, eps, tol, max_iter)
    _warn_unless_converged([potentials], tol, max_iter)
    return value.to(dtype)


def sinkhorn_divergence(x, y, a=None, b=None, p=2, eps=0.01, debias=True, tol=1e-5, max_iter=1000):
    """Entropic transport between two weighted point clouds (...,), debiased by default:

        S(x, y) = OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2,

    which is zero for equal clouds and, up to tol, never negative; debias=False gives OT(x, y).

    x, y      (..., n, d) and (..., m, d) finite points
    a, b      weights as sinkhorn_potentials
    p         2: cost |x - y|^2 / 2.  1: cost |x - y|
    eps       in the units of the cost: for p = 2 the square of geomloss's `blur`, for p = 1 its blur

    Differentiable in x, y, a and b; where two points coincide the gradient of their distance is taken
    as zero, so it is finite everywhere. Raises ValueError, naming the argument, on bad input.
    Source: Feydy et al. (2019, "Interpolating between optimal transport and MMD using Sinkhorn
    divergences").
    """
    _check_tensor("x", x, 2)
    _check_tensor("y", y, 2, x.device)
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"x and y must hold points of one dimension, not {x.shape[-1]} and {y.shape[-1]}")
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, not {p!r}")
    x, y = _at_least_float32(x, y)
    pairs = [(x, y, a, b)] + ([(x, x, a, a), (y, y, b, b)] if debias else [])
    values, solved = [], []
    for left, right, left_weight, right_weight in pairs:
        C = _cost(left, right, p)
        if not bool(C.isfinite().all()):
            raise ValueError(f"x and y lie too far apart: their cost overflows {C.dtype}")
        C, left_weight, right_weight, _ = _checked(C, left_weight, right_weight, eps, tol, max_iter)
        value, potentials = _value(C, left_weight, right_weight, eps, tol, max_iter)
        values.append(value)
        solved.append(potentials)
    _warn_unless_converged(solved, tol, max_iter)
    divergence = values[0] - (values[1] + values[2]) / 2 if debias else values[0]
    return divergence.to(x.dtype)


# ---- the iteration --------------------------------------------------------------------------------


@torch.no_grad()
def _solve(C, a, b, eps, tol, max_iter):
    """sinkhorn_potentials on checked arguments. Works on u = f / eps, v = g / eps and K = C / eps."""
    K, log_a, log_b = C / eps, a.log(), b.log()  # log 0 = -inf: such a point drops out of every sum

    def rows(v):
        return -torch.logsumexp((log_b + v).unsqueeze(-2) - K, dim=-1)

    def columns(u):
        return -torch.logsumexp((log_a + u).unsqueeze(-1) - K, dim=-2)

    mass = a.sum(-1, keepdim=True)
    v = torch.zeros_like(b)
    u = rows(v)
    omega = u.new_ones(u.shape[:-1] + (1,))
    looked_at, error_then = 0, None
    for n_iter in range(1, max_iter + 1):
        # A look needs a plain half step: it makes the column sums exact, and the next half step of the
        # rows then tells their error for nothing, as row i of the plan sums to a_i exp(u_i - u_new_i).
        look = n_iter <= 3 or n_iter % CHECK_EVERY == 0 or n_iter == max_iter
        v = columns(u) if look else _relaxed(v, columns(u), b, omega)
        u_new = rows(v)
        if look:
            error = (a * (u - u_new).expm1().abs()).sum(-1, keepdim=True)
            if n_iter == max_iter or bool((error <= tol * mass).all()):
                break
            if error_then is not None:
                rate = (error / error_then) ** (1 / (n_iter - looked_at))
                omega = torch.where((error > tol * mass) & (rate < 1), _tuned(omega, rate), omega)
            looked_at, error_then = n_iter, error
        u = _relaxed(u, u_new, a, omega)

    f, g = eps * u, eps * v
    mean_f, mean_g = ((w * h).sum(-1, keepdim=True) / mass for w, h in ((a, f), (b, g)))
    f, g = f + (mean_g - mean_f) / 2, g + (mean_f - mean_g) / 2
    # The error is measured again, on what is returned: rounding moves the columns too.
    P = _plan(C, a, b, f, g, eps)
    error = (P.sum(-1) - a).abs().sum(-1) + (P.sum(-2) - b).abs().sum(-1)
    return Potentials(f, g, n_iter, error, error <= tol * mass.squeeze(-1))


def _relaxed(old, new, weight, omega):
    """old + omega * (new - old) where that raises the dual, else new; shapes (..., n) and (..., 1).

    With r_i = exp(old_i - new_i), the ratio of marginal i to its target, the dual gains
    eps * sum_i weight_i (r_i - r_i^(1 - omega) - omega log r_i); at omega = 1 that is never negative.
    """
    log_r = old - new
    gain = log_r.expm1() - ((1 - omega) * log_r).expm1() - omega * log_r  # expm1: log_r goes to 0
    gain = torch.where(weight > 0, weight * gain, 0).sum(-1, keepdim=True)
    return old + torch.where(gain >= 0, omega, 1) * (new - old)


def _tuned(omega, rate):
    """Best over-relaxation, given the factor the error shrank by in a sweep done with omega.

    Young (1954): the plain iteration's rate is rho = (rate + omega - 1)^2 / (rate omega^2), and the
    best omega is 2 / (1 + sqrt(1 - rho)). No sweep shrinks the error by less than omega - 1 for long.
    """
    rate = torch.maximum(rate, omega - 1).clamp_min(1e-9)
    rho = ((rate + omega - 1) ** 2 / (rate * omega**2)).clamp(max=1)
    return torch.maximum(omega, 2 / (1 + (1 - rho).sqrt())).clamp(max=MAX_RELAXATION)


def _plan(C, a, b, f, g, eps):
    # The weights go inside the exponential: between two points of weight zero it may overflow without them.
    log_density = (f.unsqueeze(-1) - C + g.unsqueeze(-2)) / eps
    return (log_density + a.log().unsqueeze(-1) + b.log().unsqueeze(-2)).exp()


class _EnvelopeValue(torch.autograd.Function):
    """The dual objective <a, f> + <b, g> - eps (sum P - sum a), in float64; its gradients are P, f and g.

    The last term is zero at the optimum. With it, rounding in f and g moves the value in second order
    only, which matters where a divergence is a small difference of large values.
    """

    @staticmethod
    def forward(ctx, C, a, b, f, g, eps):
        ctx.save_for_backward(C, a, b, f, g)
        ctx.eps = eps
        P, a, b = _plan(C, a, b, f, g, eps), a.double(), b.double()
        return (a * f).sum(-1) + (b * g).sum(-1) - eps * (P.sum((-2, -1), dtype=torch.float64) - a.sum(-1))

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # only with create_graph=True
            raise RuntimeError("entropic_ot cannot be differentiated twice: call backward without create_graph")
        C, a, b, f, g = ctx.saved_tensors
        grad = grad.to(C.dtype).unsqueeze(-1)
        grad_C = grad.unsqueeze(-1) * _plan(C, a, b, f, g, ctx.eps) if ctx.needs_input_grad[0] else None
        return grad_C, grad * f, grad * g, None, None, None


def _value(C, a, b, eps, tol, max_iter):
    """The value (...,) in float64, and the potentials it came from."""
    potentials = _solve(C, a, b, eps, tol, max_iter)
    return _EnvelopeValue.apply(C, a, b, potentials.f, potentials.g, eps), potentials


def _cost(x, y, p):
    # The matrix-product form of cdist is faster but cancels: close points would get a wrong distance.
    distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return distance**2 / 2 if p == 2 else distance


def _warn_unless_converged(solved, tol, max_iter):
    failed = [s for s in solved if not bool(s.converged.all())]
    if failed:
        worst, n_iter = max(float(s.error.max()) for s in failed), max(s.n_iter for s in failed)
        rounding = "rounding allows no less, use float64 or a larger eps"
        warnings.warn(
            f"Sinkhorn has not converged: L1 marginal error {worst:.0e} at tol {tol:g} after {n_iter} sweeps; "
            f"{'raise max_iter or eps' if n_iter == max_iter else rounding}",
            RuntimeWarning,
            stacklevel=3,
        )


# ---- the argument checks --------------------------------------------------------------------------


def _at_least_float32(*tensors):
    """The tensors in their common floating type, half types raised to float32."""
    dtype = torch.float32
    for t in tensors:
        dtype = torch.promote_types(dtype, t.dtype)
    return [t.to(dtype) for t in tensors]


def _check_tensor(name, t, least_dim, device=None):
    if not isinstance(t, Tensor) or not t.dtype.is_floating_point:
        raise ValueError(f"{name} must be a floating point torch tensor, not {getattr(t, 'dtype', type(t).__name__)}")
    if t.dim() < least_dim or t.numel() == 0:
        raise ValueError(f"{name} must be non-empty, in {least_dim} dimensions or more, not of shape {tuple(t.shape)}")
    if device is not None and t.device != device:
        raise ValueError(f"{name} is on {t.device}, the other arguments on {device}")
    if not bool(t.isfinite().all()):
        raise ValueError(f"{name} holds NaN or infinite values")


def _checked(C, a, b, eps, tol, max_iter):
    """C, a (..., n), b (..., m) in the floating type to compute in, and the type to return; or ValueError."""
    _check_tensor("C", C, 2)
    if not (eps > 0 and math.isfinite(eps)):
        raise ValueError(f"eps must be positive and finite, not {eps}")
    if not (tol >= 0 and max_iter >= 1):
        raise ValueError(f"tol must be >= 0 and max_iter >= 1, not {tol} and {max_iter}")
    a = _checked_weight("a", a, C, C.shape[-2])
    b = _checked_weight("b", b, C, C.shape[-1])
    slack = 1e-2 if {a.dtype, b.dtype} & {torch.float16, torch.bfloat16} else 1e-5
    C, a, b = _at_least_float32(C, a, b)
    if not bool((C.abs().max() / eps).isfinite()):
        raise ValueError(f"eps = {eps} is too small for costs as large as {C.abs().max().item():g} in {C.dtype}")
    dtype = C.dtype
    if eps >= (C.max() - C.min()).item():  # the rounding of a plan counts eps times; and two sweeps do here
        C, a, b = C.double(), a.double(), b.double()
    total_a, total_b = a.sum(-1, keepdim=True), b.sum(-1, keepdim=True)
    if bool(((total_a - total_b).abs() > slack * total_a).any()):
        worst = (total_a - total_b).abs().argmax()
        pair = f"{total_a.flatten()[worst].item():g} and {total_b.flatten()[worst].item():g}"
        raise ValueError(f"a and b must have equal total mass, not {pair}")
    b = b * (total_a / total_b).detach()  # rounding must not leave a mass that fits nowhere
    return C, a, b, dtype


def _checked_weight(name, weight, C, size):
    shape = C.shape[:-2] + (size,)
    if weight is None:
        return C.new_full((), 1 / size, dtype=torch.promote_types(C.dtype, torch.float32)).expand(shape)
    _check_tensor(name, weight, 1, C.device)
    leading = zip(weight.shape[-2::-1], shape[-2::-1])
    if weight.shape[-1] != size or weight.dim() > len(shape) or any(have not in (1, need) for have, need in leading):
        raise ValueError(f"{name} has shape {tuple(weight.shape)}; the cost {tuple(C.shape)} needs {tuple(shape)}")
    if bool((weight < 0).any()) or bool((weight.sum(-1) <= 0).any()):
        raise ValueError(f"{name} must be >= 0 with a positive total; its least weight is {weight.min().item():g}")
    return weight.expand(shape)
