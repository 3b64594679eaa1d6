"""Entropic optimal transport in PyTorch: log-domain Sinkhorn, its plan, its value and its gradient.

This file needs torch alone: copy it with its tests. For a cost C (n, m) and weights a (n,),
b (m,) of total 1, OT is the least <C, P> + eps * KL(P | a b^T) over P >= 0 with row sums a and
column sums b, where KL(P | Q) = sum_ij P_ij log(P_ij / Q_ij). Weights of another, equal total make
OT and P that many times as large. The solution is

    P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps)    and    OT = <a, f> + <b, g>.

Sinkhorn finds the potentials f (n,) and g (m,) by two half steps in turn, together a sweep:

    f_i = -eps log sum_j b_j exp((g_j - C_ij) / eps)        (makes the row sums of P equal a)
    g_j = -eps log sum_i a_i exp((f_i - C_ij) / eps)        (makes the column sums of P equal b)

A sweep is fast if it scales the plan K of some f and g: u_i K_ij v_j is the plan of the potentials
f + eps log u and g + eps log v, and the half steps are u = a / (K v) and v = b / (K^T u).
"""

import math
import warnings
from typing import NamedTuple

import torch


class Potentials(NamedTuple):
    """What `sinkhorn_potentials` returns. `...` are the leading (batch) dimensions of the cost."""

    f: torch.Tensor  # (..., n)
    g: torch.Tensor  # (..., m)
    n_iter: int  # sweeps done at eps
    error: torch.Tensor  # (...), |P 1 - a|_1 + |P^T 1 - b|_1 before f and g are rounded
    converged: torch.Tensor  # (...) bool, error <= tol * total mass


def sinkhorn_potentials(C, a=None, b=None, eps=0.01, tol=1e-4, max_iter=1000):
    """Dual potentials of entropic optimal transport. Bad input raises a ValueError that names it.

    C         (..., n, m) finite cost; leading dimensions are independent problems
    a, b      (n,) or (..., n), (m,) or (..., m) weights >= 0 of equal total; None is uniform
    eps       > 0, the strength of the entropy, in the units of C; the smaller, the more sweeps
    tol       the L1 marginal error, as a part of the total, at which the iteration ends
    max_iter  most sweeps; ending above tol gives one RuntimeWarning with the error reached

    f and g are unique up to f + c, g - c: here <a, f> = <b, g>. Zero weights get the potentials of
    vanishing ones. Results have the type of C, at least float32. Not differentiable.
    """
    t, dtype = _of_cost(C, a, b, eps, tol, max_iter)
    return Potentials(t.f.to(dtype), t.g.to(dtype), t.n_iter, t.error.to(dtype), t.converged)


def sinkhorn_plan(C, a=None, b=None, eps=0.01, tol=1e-4, max_iter=1000):
    """The transport plan P (..., n, m), not differentiable. Arguments as sinkhorn_potentials."""
    t, dtype = _of_cost(C, a, b, eps, tol, max_iter)
    return t.P.to(dtype)


def entropic_ot(C, a=None, b=None, eps=0.01, tol=1e-5, max_iter=1000):
    """Value OT (...,). Arguments as sinkhorn_potentials.

    Differentiable, once, by the envelope theorem: the gradients in C, a and b are P, f and g; no
    iteration is kept. Their error is of first order in tol, the value's of second. Those in a and b
    hold for changes that keep the totals equal (of a softmax, say).
    """
    t, dtype = _of_cost(C, a, b, eps, tol, max_iter)
    return _Value.apply(t.value.to(dtype), (t.P, t.f, t.g), C, a, b)


def sinkhorn_divergence(x, y, a=None, b=None, p=2, eps=0.01, debias=True, tol=1e-5, max_iter=1000):
    """OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2 (...,) of point clouds. Source: Feydy et al. (2019).

    x, y      (..., n, d) and (..., m, d) finite points; a, b: weights as sinkhorn_potentials
    p         2: cost |x - y|^2 / 2.  1: cost |x - y|
    eps       in units of the cost: for p = 2 the square of geomloss's `blur`, for p = 1 its blur
    debias    False gives OT(x, y) alone; True gives 0 for equal clouds and, up to tol, never less
    tol       from 1e-3 on, float32 clouds with p = 2 stay float32 on a CPU

    Differentiable, once, in x, y, a and b; a distance of zero has the gradient zero.
    """
    _check("x", x, 2, x)
    _check("y", y, 2, x)
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, not {p!r}")
    batch = zip(x.shape[-3::-1], y.shape[-3::-1])
    if x.shape[-1] != y.shape[-1] or any(i != j and 1 not in (i, j) for i, j in batch):
        raise ValueError(f"x {[*x.shape]} and y {[*y.shape]} must broadcast, of one dimension")
    inputs, transports = (x, y, a, b), []
    dtype = torch.promote_types(torch.result_type(x, y), torch.float32)
    batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    a, b = _weights("a", a, (*batch, x.shape[-2]), x), _weights("b", b, (*batch, y.shape[-2]), x)
    x, y = (t.detach().double().expand(*batch, -1, -1) for t in (x, y))
    x, y = (t - x.mean(-2, True) for t in (x, y))  # large coordinates would cancel
    exact = p == 1 or tol < 1e-3 or x.device.type != "cpu" or torch.is_autocast_enabled("cpu")
    if not exact and eps / 10 <= x.square().sum(-1).max() + y.square().sum(-1).max() <= 4000 * eps:
        x, y = x.to(dtype), y.to(dtype)  # in float32, as no cost is above that sum

    def between(x, y, a, b, symmetric=False):
        """Value, and its gradients in x, a, y and b."""
        if p == 1:
            C = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
        else:
            C = (x @ -y.mT).add_(x.square().sum(-1, True) / 2).add_(y.square().sum(-1, True).mT / 2)
        t = _Transport(C, a, b, eps, tol, max_iter, symmetric)
        transports.append(t)
        # The gradient of |x - y|^2 / 2 is x - y, that of |x - y| is (x - y) / |x - y|.
        P = t.P if p == 2 else t.P.div_(C).nan_to_num_(0, 0, 0)
        of_x = P.sum(-1, True) * x - P @ y
        of_y = of_x if symmetric else P.sum(-2).unsqueeze(-1) * y - P.mT @ x
        return t.value, of_x, t.f, of_y, t.g

    value, of_x, f, of_y, g = between(x, y, a, b)
    if debias:
        value_x, of_xx, f_x, *_ = between(x, x, a, a, symmetric=True)
        value_y, of_yy, f_y, *_ = between(y, y, b, b, symmetric=True)
        value = value - (value_x + value_y) / 2
        of_x, f, of_y, g = of_x - of_xx, f - f_x, of_y - of_yy, g - f_y
    _warn(transports)
    return _Value.apply(value.to(dtype), (of_x, of_y, f, g), *inputs)


class _Value(torch.autograd.Function):
    """A value of known gradients, which autograd sums and casts to the shape and type of inputs."""

    @staticmethod
    def forward(ctx, value, gradients, *inputs):
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # only with create_graph=True
            raise RuntimeError("optimal transport cannot be differentiated twice")
        known = [g * grad[(...,) + (None,) * (g.dim() - grad.dim())] for g in ctx.saved_tensors]
        return None, None, *(g if use else None for g, use in zip(known, ctx.needs_input_grad[2:]))


def _warn(transports, stacklevel=3):
    """Warn of errors above tol, at the caller's line."""
    if not all(bool(t.converged.all()) for t in transports):
        error, n_iter = max((float(t.error.max()), t.n_iter) for t in transports)
        what = f"L1 marginal error {error:.0e} after {n_iter} sweeps; raise max_iter, tol or eps"
        warnings.warn(f"Sinkhorn has not converged to tol: {what}", RuntimeWarning, stacklevel)


class _Transport:
    """A solved problem. Its steps change potentials f and g, or scalings u and v of their plan K.
    Clouds of 128 points take 3 / 13 / 42 sweeps to tol 1e-2 at eps 0.1 / 0.01 / 0.001; a step says
    how many they take without it."""

    def __init__(self, C, a, b, eps, tol, max_iter, symmetric=False):
        if not (0 < eps < math.inf and 0 <= tol < math.inf and max_iter >= 1):
            raise ValueError("eps must be positive, tol >= 0 and max_iter >= 1")
        low, high = torch.stack(C.aminmax()).tolist()
        if not max(-low, high) <= eps * torch.finfo(torch.float32).max:
            raise ValueError(f"costs from {low:g} to {high:g} are too large for eps = {eps}")
        slack = max(1e-5, *(2 * torch.finfo(w.dtype).eps for w in (a, b)))  # half types
        total, other = (w.double().sum(-1, True) for w in (a, b))
        if not float((total / other - 1).abs().max()) <= slack:
            raise ValueError("a and b must have equal total mass")
        least = 1e-30 + 1e-10 * tol  # as 0 has no log
        self.a, self.b = (w.to(C.dtype).clamp_min(least) for w in (a / total, b / other))
        self.C, self.K, self.symmetric = C, torch.empty_like(C), symmetric
        self.reach = 0.85 * math.log(torch.finfo(C.dtype).max)  # of exponents
        self.f, self.g = torch.full_like(self.a, low), torch.zeros_like(self.b)
        self.anneal(eps, 0 if symmetric else (high - low) / 8)
        self.iterate(tol, int(max_iter))
        self.P = self.K.mul_((self.u * (a > 0)).mT).mul_(self.v * (b > 0) * total.to(C.dtype))
        self.absorb()
        mean_f, mean_g = (self.a * self.f).sum(-1, True), (self.b * self.g).sum(-1, True)
        dual = mean_f + mean_g - eps * (self.rows.sum(-1, True) - 1)
        gap = (mean_g - mean_f) / 2  # so that <a, f> = <b, g>
        self.f, self.g = (self.f + gap).squeeze(-2), (self.g - gap).squeeze(-2)
        self.value, self.converged = (dual * total)[..., 0, 0], self.error <= tol
        self.error = self.error * total[..., 0, 0]

    def anneal(self, eps, level):
        """Start from the potentials of larger eps, a sweep each. Source: Schmitzer (2019). Without
        it: 6 / 19 / 63 sweeps. A cloud is near itself: it starts from zeros, at eps."""
        self.make_plan(max(eps, level))
        while self.eps > eps:
            self.sweep(1, 1)
            self.absorb()
            self.make_plan(max(eps, self.eps / 8))

    def make_plan(self, eps):
        """K of f and g, from the log domain."""
        self.eps = eps
        f, g = self.f / eps + self.a.log(), self.g / eps + self.b.log()
        torch.add(f.mT, g, out=self.K).sub_(self.C, alpha=1 / eps)
        self.K.clamp_(-self.reach, self.reach).exp_()
        self.u, self.v = torch.ones_like(f), torch.ones_like(g)

    def absorb(self):
        """Put scalings into the potentials, before exp loses them. Source: Schmitzer (2019)."""
        self.f = self.f + self.eps * self.u.log().clamp(-700, 700)
        self.g = self.g + self.eps * self.v.log().clamp(-700, 700)

    def sweep(self, count, omega):
        """The half steps; the last is exact. From a cloud to itself f is g: their mean takes 3 to 6
        sweeps to tol 1e-5 instead of up to 141. Source: Feydy et al. (2019)."""
        for left in reversed(range(count)):
            self.u = _relax(self.u, self.a / (self.v @ self.K.mT), omega)
            self.v = _relax(self.v, self.b / (self.u @ self.K), omega if left else 1)
            if self.symmetric:
                self.u = self.v = (self.u * self.v).sqrt()

    def look(self):
        """Error of both marginals."""
        if not float(torch.cat([self.u, self.v], -1).log().abs().max()) <= self.reach / 6:
            self.absorb()
            self.make_plan(self.eps)
        self.rows, columns = self.u * (self.v @ self.K.mT), self.v * (self.u @ self.K)
        self.error = torch.cat([self.rows - self.a, columns - self.b], -1).abs().sum((-2, -1))
        return float(self.error.max())

    def iterate(self, tol, max_iter):
        """Sweep in blocks, as several sweeps show the rate: by ones, 3 / 18 / 157. A block that has
        doubled the error, as no plain one does, is taken back: else hard problems take 17% more."""
        self.n_iter, count, omega, error = 0, min(3, max_iter), 1, math.inf
        while self.n_iter < max_iter and not error <= tol:
            old, before = (self.f, self.g, self.u, self.v), error
            self.sweep(count, omega)
            self.n_iter += count
            error = self.look()
            if count * omega > 1 and not error <= 2 * before:  # or NaN
                self.f, self.g, self.u, self.v = old
                self.absorb()
                self.make_plan(self.eps)
                error, omega, count = self.look(), 1, count // 8
            elif 0 < error < before < math.inf:
                omega = _tuned(omega, (error / before) ** (1 / count))
            count = min(max(3, self.n_iter // 2), max(1, 2 * count), 100, max_iter - self.n_iter)


def _relax(old, new, omega):
    """Overshoot a half step. Source: Thibault et al. (2017). Without it: 3 / 42 / 311 sweeps."""
    return new if omega == 1 else old * (new / old) ** omega


def _tuned(omega, rate):
    """The best omega where sweeps shrink the error by rate, plain ones by rho. Young (1954)."""
    rate = max(rate, omega - 1)
    rho = min(1, (rate + omega - 1) ** 2 / (rate * omega**2))
    return min(1.99, max(omega, 2 / (1 + math.sqrt(1 - rho))))  # 2 never converges


def _of_cost(C, a, b, *settings):
    """The transport of checked input, and the type of the results."""
    _check("C", C, 2, C)
    a, b = _weights("a", a, C.shape[:-1], C), _weights("b", b, C[..., 0, :].shape, C)
    transport = _Transport(C.detach().double(), a, b, *settings)
    _warn([transport], stacklevel=4)
    return transport, torch.promote_types(C.dtype, torch.float32)


def _weights(name, w, shape, like):
    """w, or uniform weights, (..., 1, n)."""
    if w is None:
        return like.new_full(shape, 1 / shape[-1], dtype=torch.float64).unsqueeze(-2)
    _check(name, w, 1, like)
    if w.shape not in (shape, shape[-1:]) or w.min() < 0 or (w.sum(-1) <= 0).any():
        raise ValueError(f"{name} must be >= 0, of positive total, of shape {[*shape]}: {w!r:.99}")
    return w.detach().expand(shape).unsqueeze(-2)


def _check(name, t, dims, like):
    good = isinstance(t, torch.Tensor) and t.is_floating_point() and t.numel() > 0
    if not good or t.dim() < dims or t.device != like.device or not t.isfinite().all():
        what = f"of {dims} dimensions or more, on one device, not {t!r:.99}"
        raise ValueError(f"{name} must be a finite, non-empty floating point tensor {what}")
