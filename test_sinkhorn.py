"""Tests of sinkhorn.py against things that know nothing of it: exact linear programmes, a textbook
Sinkhorn in float64, finite differences and closed forms. Copied out with sinkhorn.py, they need
torch, numpy, scipy and pytest; POT joins in where it is installed, CUDA where there is a device.
`python test_sinkhorn.py` prints a benchmark beside geomloss and POT.
"""

import functools
import math
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

import sinkhorn
from sinkhorn import entropic_ot, sinkhorn_divergence, sinkhorn_plan, sinkhorn_potentials

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
PROBLEMS = int(os.environ.get("SINKHORN_PROBLEMS", 400))  # random ones
F32, F64 = torch.float32, torch.float64
close = torch.testing.assert_close
both_types = pytest.mark.parametrize("dtype", [F32, F64])
both_costs = pytest.mark.parametrize("p", [1, 2])
every_device = pytest.mark.parametrize("device", DEVICES)


def rng(seed):
    return torch.Generator().manual_seed(seed)


def rand(seed, *shape, dtype=F64):
    return torch.rand(*shape, generator=rng(seed), dtype=F64).to(dtype)


def simplex(seed, *shape, dtype=F64):
    w = rand(seed, *shape) + 0.1
    return (w / w.sum(-1, keepdim=True)).to(dtype)


def problem(n, m, dtype=F64):
    return rand(1, n, m, dtype=dtype), simplex(2, n, dtype=dtype), simplex(3, m, dtype=dtype)


def linear_programme(C, a, b):
    """min <C, P> over P >= 0 with P 1 = a, P^T 1 = b, exactly."""
    n, m = C.shape
    sums = np.vstack([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    right = np.concatenate([a, b])
    result = linprog(C.numpy().ravel(), A_eq=sums, b_eq=right, method="highs")
    assert result.status == 0
    return result.fun


def reference(C, a, b, eps, tol=1e-9):
    """Textbook log-domain Sinkhorn in float64: value and plan at a marginal error of tol."""
    C, log_a, log_b, g = C.double() / eps, a.double().log(), b.double().log(), torch.zeros(len(b))
    for _ in range(200_000):
        f = -torch.logsumexp(g + log_b - C, 1)
        g = -torch.logsumexp((f + log_a)[:, None] - C, 0)
        P = ((f + log_a)[:, None] + (g + log_b) - C).exp()
        if float((P.sum(1) - a).abs().sum()) < tol:
            return eps * (a @ f + b @ g), P
    raise AssertionError("the reference itself did not converge")


def similarity_clouds(n=128, k=30, classes=5):
    """Rows of the k largest similarities of two noisy views of n points: the student's step."""
    g = rng(0)
    centres = torch.randn(classes, 64, generator=g, dtype=F64)
    centre = centres[torch.randint(classes, (n,), generator=g)]
    centre = centre + torch.randn(n, 64, generator=g, dtype=F64)
    views = [centre + scale * torch.randn(n, 64, generator=g, dtype=F64) for scale in (0.5, 1)]
    S, T = (v @ v.T for v in (torch.nn.functional.normalize(view, dim=1) for view in views))
    columns = S.topk(k, dim=1).indices
    return S.gather(1, columns), T.gather(1, columns)


def unit_clouds(seed=1, n=128, d=30):
    """Two clouds in a box of diameter 1."""
    return rand(seed, n, d) / math.sqrt(d), rand(seed + 100, n, d) / math.sqrt(d)


def squared_cost(x, y):
    return ((x[:, None] - y[None]) ** 2).sum(-1) / 2


# ---- values, against the exact and the float64 ---------------------------------------------------


@pytest.mark.parametrize("n, m", [(1, 1), (7, 7), (5, 11), (12, 3)])
def test_goes_to_the_linear_programme_as_eps_goes_to_zero(n, m):
    C, a, b = problem(n, m)
    exact, values = linear_programme(C, a, b), []
    # KL(P | a b^T) is a mutual information: between 0 and the smaller of the two entropies.
    entropy = min(float(-(w * w.log()).sum()) for w in (a, b))
    for eps in (1, 0.1, 0.01, 0.001):
        values.append(float(entropic_ot(C, a, b, eps=eps, tol=1e-7, max_iter=50_000)))
        assert -1e-6 <= values[-1] - exact <= eps * entropy + 1e-6
    assert all(more >= less - 1e-12 for more, less in zip(values, values[1:]))


@functools.cache
def reference_divergence(clouds, eps):
    """Clouds, exact in float32, and value and gradients without and with the self-terms."""
    x, y = (t.float().double() for t in clouds())
    w = torch.full((len(x),), 1 / len(x), dtype=F64)

    def ot(s, t):
        value, P = reference(squared_cost(s, t), w, w, eps)
        return value, P.sum(1)[:, None] * s - P @ t, P.sum(0)[:, None] * t - P.T @ s

    (xy, xy_x, xy_y), (xx, xx_x, xx_y), (yy, yy_x, yy_y) = ot(x, y), ot(x, x), ot(y, y)
    debiased = xy - (xx + yy) / 2, xy_x - (xx_x + xx_y) / 2, xy_y - (yy_x + yy_y) / 2
    return x, y, (xy, xy_x, xy_y), debiased


@every_device
@both_types
@pytest.mark.parametrize("eps", [1, 0.1, 0.01])
@pytest.mark.parametrize("clouds", [similarity_clouds, unit_clouds])
def test_divergence_and_gradient_against_float64_run_to_1e_9(clouds, eps, dtype, device):
    x, y, *wanted = reference_divergence(clouds, eps)
    for debias, (want, *gradients) in enumerate(wanted):
        p, q = (t.to(device, dtype, copy=True).requires_grad_() for t in (x, y))
        value = sinkhorn_divergence(p, q, eps=eps, debias=bool(debias))
        value.backward()
        assert value.dtype == p.grad.dtype == dtype
        assert abs(value.item() - want) <= 1e-5 * abs(want)
        for got, gradient in zip((p.grad, q.grad), gradients):
            assert (got.double().cpu() - gradient).norm() <= 1e-4 * gradient.norm()


@both_types
def test_hard_problem_against_float64(dtype):
    """Small eps: the plain iteration needs thousands of sweeps, and float32 rounds the cost."""
    C = squared_cost(*unit_clouds()) * 30
    w = torch.full((len(C),), 1 / len(C), dtype=F64)
    value, P = reference(C, w, w, eps=0.05, tol=1e-6)
    got = sinkhorn_potentials(C.to(dtype), eps=0.05, tol=1e-5)
    assert bool(got.converged) and got.n_iter <= 300
    plan = sinkhorn_plan(C.to(dtype), eps=0.05, tol=1e-5)
    assert abs(float(entropic_ot(C.to(dtype), eps=0.05)) - value) <= 1e-6 * abs(value)
    assert (plan.double() - P).norm() <= 1e-3 * P.norm()


def test_against_pot():
    ot = pytest.importorskip("ot")
    C, a, b = problem(20, 30)
    settings = dict(stopThr=1e-12, numItermax=20_000)
    P = ot.bregman.sinkhorn_log(a.numpy(), b.numpy(), C.numpy(), 0.05, **settings)
    assert np.abs(sinkhorn_plan(C, a, b, eps=0.05, tol=1e-10).numpy() - P).max() < 1e-9


# ---- closed forms --------------------------------------------------------------------------------


def test_one_point_has_no_choice():
    C, _, b = problem(1, 6)
    for eps in (1e-3, 1, 10):
        close(entropic_ot(C, None, b, eps=eps), (C[0] * b).sum())
        close(sinkhorn_plan(C, None, b, eps=eps), b[None])


def test_two_by_two_closed_form():
    c, eps = 0.7, 0.2
    stay = 0.5 / (1 + math.exp(-c / eps))
    move = 0.5 - stay
    C = torch.tensor([[0, c], [c, 0]], dtype=F64)
    plan = torch.tensor([[stay, move], [move, stay]], dtype=F64)
    close(sinkhorn_plan(C, eps=eps, tol=1e-12), plan)
    value = 2 * move * c + eps * 2 * (stay * math.log(4 * stay) + move * math.log(4 * move))
    assert abs(float(entropic_ot(C, eps=eps, tol=1e-12)) - value) < 1e-12


def test_eps_to_infinity_is_the_independent_coupling():
    C, a, b = problem(6, 9)
    P = a[:, None] * b
    close(sinkhorn_plan(C, a, b, eps=1e6), P, rtol=1e-5, atol=0)
    close(entropic_ot(C, a, b, eps=1e6), (C * P).sum(), rtol=1e-5, atol=0)


@both_costs
def test_on_the_line_small_eps_sorts(p):
    x, y = rand(1, 9, 1), rand(2, 9, 1)
    gap = x.flatten().sort().values - y.flatten().sort().values
    settings = dict(p=p, eps=1e-4, debias=False, tol=1e-4, max_iter=20_000)
    assert abs(float(sinkhorn_divergence(x, y, **settings) - (gap.abs() ** p / p).mean())) < 1e-3


@both_costs
def test_divergence_of_equal_clouds_is_zero_with_zero_gradient(p):
    x = rand(1, 20, 3).requires_grad_()
    for other in (x.detach(), x.detach()[torch.randperm(20, generator=rng(2))]):
        value = sinkhorn_divergence(x, other, p=p, eps=0.05, tol=1e-10, max_iter=10_000)
        (grad,) = torch.autograd.grad(value, x)
        assert abs(value.item()) < 1e-12 and float(grad.abs().max()) < 1e-8


@both_costs
def test_divergence_is_positive_and_symmetric(p):
    x, y, a, b = rand(1, 15, 4), rand(2, 22, 4) + 0.3, simplex(3, 15), simplex(4, 22)
    there = sinkhorn_divergence(x, y, a, b, p=p, eps=0.1, tol=1e-9)
    close(there, sinkhorn_divergence(y, x, b, a, p=p, eps=0.1, tol=1e-9))
    assert float(there) > 0.01


# ---- the laws of the problem ---------------------------------------------------------------------


def plan_of(got, C, a, b, eps):
    """The plan of these potentials, in float64, and its L1 marginal error."""
    f, g, C, a, b = (t.double() for t in (got.f, got.g, C, a, b))
    weights = a.log().unsqueeze(-1) + b.log().unsqueeze(-2)
    P = ((f.unsqueeze(-1) + g.unsqueeze(-2) - C) / eps + weights).exp()
    return P, (P.sum(-1) - a).abs().sum(-1) + (P.sum(-2) - b).abs().sum(-1)


@every_device
@both_types
@pytest.mark.parametrize("eps", [1e-3, 1e-2, 0.1, 1, 10])
def test_marginals_and_reported_error(eps, dtype, device):
    problem = rand(1, 3, 17, 25), simplex(2, 3, 17), simplex(3, 25)
    C, a, b = (t.to(device, dtype) for t in problem)
    got = sinkhorn_potentials(C, a, b, eps=eps, max_iter=20_000)
    assert got.f.shape == (3, 17) and got.g.shape == (3, 25)
    assert got.error.shape == got.converged.shape == (3,)
    assert bool(got.converged.all()) and float(got.error.max()) <= 1e-4
    P, error = plan_of(got, C, a, b.expand(3, 25), eps)
    rounding = 0 if dtype == F64 else 1e-7 / min(eps, 1)
    assert float((error - got.error.double()).abs().max()) <= 1e-9 + rounding
    plan = sinkhorn_plan(C, a, b, eps=eps, max_iter=20_000)
    close(plan, P.to(dtype), rtol=1e-3, atol=1e-7)


def test_value_is_primal_and_dual():
    (C, a, b), eps = problem(8, 12), 0.05
    P = sinkhorn_plan(C, a, b, eps=eps, tol=1e-11)
    f, g, *_ = sinkhorn_potentials(C, a, b, eps=eps, tol=1e-11)
    value = entropic_ot(C, a, b, eps=eps, tol=1e-11)
    close(value, (P * C).sum() + eps * (P * (P / (a[:, None] * b)).log()).sum())
    close(value, (a * f).sum() + (b * g).sum())
    close((a * f).sum(), (b * g).sum())  # the gauge promised


def test_batch_equals_loop_and_any_leading_dimensions():
    C, a, b = rand(1, 2, 3, 6, 9), simplex(2, 2, 3, 6), simplex(3, 9)
    settings = dict(eps=0.1, tol=1e-10)
    together, plans = entropic_ot(C, a, b, **settings), sinkhorn_plan(C, a, b, **settings)
    assert together.shape == (2, 3) and plans.shape == C.shape
    for i, j in np.ndindex(2, 3):
        close(together[i, j], entropic_ot(C[i, j], a[i, j], b, **settings))
        close(plans[i, j], sinkhorn_plan(C[i, j], a[i, j], b, **settings))
    for m in (5, 7):  # one cloud against a batch, of equal size and of another
        x, y = rand(4, 3, 5, 2), rand(5, m, 2)
        x.requires_grad_(), y.requires_grad_()
        many = sinkhorn_divergence(x, y, **settings)
        ones = torch.stack([sinkhorn_divergence(x[i], y, **settings) for i in range(3)])
        close(many, ones)
        for got, want in zip(*(torch.autograd.grad(t.sum(), (x, y)) for t in (many, ones))):
            close(got, want, rtol=1e-5, atol=1e-8)


def test_shift_and_scale_laws():
    (C, a, b), settings = problem(8, 12), dict(eps=0.05, tol=1e-10)
    value, plan = entropic_ot(C, a, b, **settings), sinkhorn_plan(C, a, b, **settings)
    rows, columns = rand(4, 8) * 5, rand(5, 12) * -3
    shifted, shift = C + rows[:, None] + columns, (a * rows).sum() + (b * columns).sum()
    close(entropic_ot(shifted, a, b, **settings), value + shift)
    close(sinkhorn_plan(shifted, a, b, **settings), plan)
    for scale in (1e-4, 30, 1e4):
        close(entropic_ot(scale * C, a, b, eps=scale * 0.05, tol=1e-10), scale * value)
    close(sinkhorn_plan(C, 7 * a, 7 * b, **settings), 7 * plan)
    mirrored = sinkhorn_potentials(C.T, b, a, eps=0.05, tol=1e-11)
    straight = sinkhorn_potentials(C, a, b, eps=0.05, tol=1e-11)
    close(mirrored.g, straight.f, rtol=0, atol=1e-9)


def test_zero_weights_carry_nothing():
    (C, a, b), settings = problem(6, 7), dict(eps=0.02, tol=1e-9)
    a[[0, 3]], b[6] = 0, 0
    a, b = a / a.sum(), b / b.sum()
    some_a, some_b = a > 0, b > 0
    small = entropic_ot(C[some_a][:, some_b], a[some_a], b[some_b], **settings)
    C.requires_grad_()
    value = entropic_ot(C, a, b, **settings)
    value.backward()
    close(value, small)
    got = sinkhorn_potentials(C, a, b, **settings)
    assert bool(got.f.isfinite().all() and got.g.isfinite().all() and got.converged)
    assert float(C.grad[~some_a].abs().max()) == float(C.grad[:, ~some_b].abs().max()) == 0
    close(C.grad, sinkhorn_plan(C, a, b, **settings))


@both_types
@pytest.mark.parametrize("eps", [1e-3, 0.1, 1e3])
def test_padding_with_far_points_of_no_weight_changes_nothing(eps, dtype):
    """What a batch of clouds of unequal size does: zeros on both sides, far from everything."""
    x, y = rand(1, 8, 3, dtype=dtype), rand(2, 6, 3, dtype=dtype)
    a, b = simplex(3, 8, dtype=dtype), simplex(4, 6, dtype=dtype)

    def padded(t):
        more = torch.full((5, *t.shape[1:]), 100.0 if t.dim() > 1 else 0.0, dtype=dtype)
        return torch.cat([t, more])

    settings = {"eps": eps, "tol": 1e-4, "max_iter": 20_000}
    inputs = [padded(t).requires_grad_() for t in (x, y, a)]
    value, small = sinkhorn_divergence(*inputs, padded(b), **settings), x.clone().requires_grad_()
    want = sinkhorn_divergence(small, y, a, b, **settings)
    close(value, want, rtol=1e-3, atol=1e-5 + eps * torch.finfo(dtype).eps)
    grads, (grad,) = torch.autograd.grad(value, inputs), torch.autograd.grad(want, small)
    assert all(bool(g.isfinite().all()) for g in grads) and float(grads[0][8:].abs().max()) == 0
    close(grads[0][:8], grad, rtol=1e-2, atol=1e-4)
    plan = sinkhorn_plan(squared_cost(padded(x), padded(y)), padded(a), padded(b), **settings)
    assert float(plan[8:].max()) == float(plan[:, 6:].max()) == 0


@both_types
@pytest.mark.parametrize("mass", [1e-6, 1e-2, 50, 1e5])
def test_any_total_mass_is_solved_alike(mass, dtype):
    C, a, b = problem(30, 40, dtype)
    one = sinkhorn_potentials(C, a, b, eps=0.05)
    many = sinkhorn_potentials(C, mass * a, mass * b, eps=0.05)
    assert bool(many.converged) and float(many.error) <= 1e-4 * mass
    assert abs(many.n_iter - one.n_iter) <= 10
    plan = sinkhorn_plan(C, mass * a, mass * b, eps=0.05)
    close(plan / mass, sinkhorn_plan(C, a, b, eps=0.05), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("eps", [1, 1e3, 1e6])
def test_large_eps_in_float32_is_exact(eps):
    C, a, b = problem(20, 30, F32)
    want = entropic_ot(C.double(), a.double(), b.double(), eps=eps, tol=1e-12)
    got = entropic_ot(C, a, b, eps=eps)
    assert abs(float(got) - float(want)) <= 1e-6
    types = got.dtype, sinkhorn_plan(C, eps=eps).dtype, sinkhorn_potentials(C, eps=eps).f.dtype
    assert types == (F32, F32, F32)


@both_costs
@pytest.mark.parametrize("debias", [False, True])
def test_coincident_and_single_points(p, debias):
    single, some = (torch.zeros(1, 2), torch.ones(1, 2)), rand(1, 6, 2)
    for x, y in ((torch.ones(5, 3), torch.ones(4, 3)), single, (some, some)):
        x = x.clone().requires_grad_()
        value = sinkhorn_divergence(x, y, p=p, eps=0.1, debias=debias)
        (grad,) = torch.autograd.grad(value, x)
        assert math.isfinite(value.item()) and bool(grad.isfinite().all())
    want = math.sqrt(2) if p == 1 else 1
    assert abs(float(sinkhorn_divergence(*single, p=p, debias=debias)) - want) < 1e-6


# ---- random problems -----------------------------------------------------------------------------


def random_problem(seed):
    """A problem of any size, scale, shape and awkwardness: C, a, b, eps."""
    g = np.random.default_rng(seed)
    n, m, d = g.integers(1, 201), g.integers(1, 201), g.integers(1, 6)
    leading = [(), (), (), (2,), (2, 1)][g.integers(5)]
    x, y = g.normal(size=(*leading, n, d)), g.normal(size=(*leading, m, d)) + g.normal(size=d)
    if g.random() < 0.2:  # repeated points
        x, y = x[..., g.integers(0, n, n), :], x[..., g.integers(0, n, m), :]
    C = ((x[..., :, None, :] - y[..., None, :, :]) ** 2).sum(-1)
    C = C if g.random() < 0.7 else g.random(C.shape)
    scale = 10 ** g.uniform(-6, 6)
    C = C / max(C.max(), 1e-9) * scale + g.choice([0, 0, -scale, scale / 2])

    def weights(k):
        w = g.random((*leading, k)) + 1e-3
        w[..., g.random(k) < g.choice([0, 0, 0.3])] = g.choice([0, 1e-12, 1e-30])
        w[..., 0] += 0.1
        return w / w.sum(-1, keepdims=True)

    dtype = [F32, F64][g.integers(2)]
    C, a, b = (torch.tensor(t, dtype=dtype) for t in (C, weights(n), weights(m)))
    if g.random() < 0.2:
        C = C.mT.contiguous().mT  # the same, laid out by columns
    a, b = (w / w.sum(-1, keepdim=True) for w in (a, b))
    return C, a, b, scale * 10 ** g.uniform(-4, 1), g


def value_or_warning(*problem, **settings):
    """The value, and whether there was a warning that the iteration has not converged."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return entropic_ot(*problem, **settings), len(caught) > 0


@pytest.mark.parametrize("part", range(10))
def test_random_problems(part):
    """Marginals within tol or an honest not-converged, no NaN, symmetry and invariances."""
    unsolved = 0
    for seed in range(part, PROBLEMS, 10):
        C, a, b, eps, g = random_problem(seed)
        spread, settings = float(C.max() - C.min()), {"eps": eps, "tol": 1e-4, "max_iter": 300}
        rows, columns = g.permutation(C.shape[-2]), g.permutation(C.shape[-1])
        permuted = C[..., rows, :][..., columns], a[..., rows], b[..., columns]
        value, _ = value_or_warning(C, a, b, **settings)
        others = [value_or_warning(*other, **settings) for other in ((C.mT, b, a), permuted)]
        raised, warned = value_or_warning(C + spread, a, b, **settings)
        others.append((raised - spread, warned))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            got = sinkhorn_potentials(C, a, b, **settings)
        finite = [got.f, got.g, got.error, value, *(other for other, _ in others)]
        assert all(bool(t.isfinite().all()) for t in finite), seed
        _, error = plan_of(got, C, a, b, eps)
        assert bool((got.converged == (got.error <= 1e-4)).all()), seed
        off = float((error - got.error).abs().max())
        assert off <= 1e-5 + 0.02 * float(error.max()), (seed, error, got.error)
        if not bool(got.converged.all()):
            unsolved += 1
            continue
        # A marginal error of tol moves the value by no more than tol times the potentials' spread.
        slack = 1e-4 * 4 * (spread + eps) + 1e-5 * float(C.abs().max())
        for other, warned in others:
            assert warned or float((other - value).abs().max()) <= slack, seed
            unsolved += warned / 3
        independent = (C.double() * a.double().unsqueeze(-1) * b.double().unsqueeze(-2))
        assert bool((value <= independent.sum((-2, -1)) + slack).all()), seed
        assert bool((value >= C.double().amin((-2, -1)) - slack).all()), seed
    assert unsolved <= 0.2 * PROBLEMS / 10


@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-3])
def test_a_loose_tolerance_is_kept_as_well(tol):
    """In float32, whose exponents potentials leave within a few sweeps where eps is small."""
    for seed in range(PROBLEMS // 2):
        C, a, b, eps, _ = random_problem(seed)
        C, a, b = C.float(), a.float(), b.float()
        if any(bool(((w > 0) & (w < 1e-20)).any()) for w in (a, b)):
            continue  # the plan between two such points is not seen in a float32 sum
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            got = sinkhorn_potentials(C, a, b, eps=eps, tol=tol, max_iter=300)
        _, error = plan_of(got, C, a, b, eps)
        good = (error - got.error).abs() <= 0.06 * (error + tol)
        assert bool(good.all()), (seed, error, got.error)


def test_random_divergences_are_not_negative_and_zero_on_equal_clouds():
    for seed in range(PROBLEMS // 4):
        g = np.random.default_rng(seed)
        n, m, d, dtype = *g.integers(1, 60, 2), g.integers(1, 5), [F32, F64][g.integers(2)]
        x, y = (torch.tensor(g.normal(size=(k, d)), dtype=dtype) for k in (n, m))
        p, eps = int(g.integers(1, 3)), 10 ** g.uniform(-3, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            settings = dict(p=p, eps=eps, tol=1e-5, max_iter=2000)
            value, same = (float(sinkhorn_divergence(x, t, **settings)) for t in (y, x.clone()))
        scale = float(torch.cdist(x, y).max()) ** p + eps
        assert value >= -1e-4 * scale and abs(same) <= 1e-4 * scale, (seed, value, same)


# ---- what users of other libraries ran into ------------------------------------------------------


@both_types
@both_costs
def test_two_close_clouds_have_no_negative_divergence(p, dtype):
    """geomloss issues 24 and 25."""
    x, step = rand(1, 200, 3, dtype=dtype), rand(2, 200, 3, dtype=dtype)
    for distance in (1e-6, 1e-4, 1e-2):
        for eps in (1e-3, 1e-2, 1):
            value = sinkhorn_divergence(x, x + distance * step, p=p, eps=eps, max_iter=5000)
            assert float(value) >= -1e-6 * (1 if dtype == F32 else 0.1)


@pytest.mark.parametrize("eps", [1e-2, 1e-3, 3e-4])
def test_plan_and_dual_value_agree_at_small_eps(eps):
    """geomloss issue 58: <C, P> + eps KL(P | a b^T), of the plan, is the value."""
    C = squared_cost(*unit_clouds(n=60))
    C = C / C.max()
    P = sinkhorn_plan(C, eps=eps, tol=1e-6, max_iter=50_000)
    primal = (P * C).sum() + eps * torch.xlogy(P, P * 60 * 60).sum()
    assert abs(float(primal - entropic_ot(C, eps=eps, tol=1e-6, max_iter=50_000))) <= 1e-6


@both_costs
def test_costs_too_large_to_keep_give_the_same(p, monkeypatch):
    """geomloss issue 68: for 25,000 points and more the cost is made in blocks."""
    x, y, a, b = rand(1, 70, 4), rand(2, 90, 4) + 0.2, simplex(3, 70), simplex(4, 90)
    settings = dict(eps=0.05, tol=1e-9, max_iter=5000)

    def results():
        inputs = [t.clone().requires_grad_() for t in (x, y, a)]
        value = sinkhorn_divergence(*inputs, b, p=p, **settings)
        plan = sinkhorn_plan(torch.cdist(x, y), a, b, **settings)
        return value, *torch.autograd.grad(value, inputs), plan

    kept = results()
    monkeypatch.setattr(sinkhorn, "LARGEST", 100)
    monkeypatch.setattr(sinkhorn, "BLOCK", 500)
    close(kept, results(), rtol=1e-6, atol=1e-7)


MEMORY = """
import torch; from sinkhorn import sinkhorn_divergence
def peak():
    lines = open('/proc/self/status').readlines()
    return int([line.split()[1] for line in lines if line.startswith('VmHWM')][0])
before = peak()
g = torch.Generator().manual_seed(0)
x, y = (torch.rand(20_000, 30, generator=g) / 30**0.5 for _ in range(2))
sinkhorn_divergence(x.requires_grad_(), y, eps=0.1, tol=1e-2, debias=False).backward()
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read there")
def test_twenty_thousand_points_in_two_gigabytes():
    folder, command = Path(sinkhorn.__file__).parent, [sys.executable, "-c", MEMORY]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert int(done.stdout) < 2 * 2**20  # KiB


# ---- gradients -----------------------------------------------------------------------------------


def test_gradcheck_cost_and_weights():
    inputs = [rand(1, 2, 4, 5), rand(2, 2, 4), rand(3, 5)]

    def value(C, s, t):
        weights = s.softmax(-1), t.softmax(-1)
        return entropic_ot(C, *weights, eps=0.1, tol=1e-12, max_iter=100_000)

    assert torch.autograd.gradcheck(value, [t.requires_grad_() for t in inputs])


@both_costs
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("m", [4, 5])
def test_gradcheck_points(m, debias, p):
    inputs = [rand(1, 5, 2), rand(2, m, 2), rand(3, 5)]
    settings = dict(p=p, eps=0.1, debias=debias, tol=1e-12, max_iter=100_000)

    def value(x, y, s):
        return sinkhorn_divergence(x, y, s.softmax(-1), **settings)

    assert torch.autograd.gradcheck(value, [t.requires_grad_() for t in inputs])


def test_second_derivatives_are_refused():
    C = rand(1, 4, 4).requires_grad_()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(entropic_ot(C, eps=0.1), C, create_graph=True)


# ---- kinds of tensors, bad input, no convergence -------------------------------------------------


@every_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(dtype, device):
    x, y = (rand(1, n, 3).to(device, dtype) for n in (10, 12))
    value = sinkhorn_divergence(x.requires_grad_(), y, eps=0.1)
    close(value, sinkhorn_divergence(x.float(), y.float(), eps=0.1))
    value.backward()
    assert x.grad.dtype == dtype and bool(x.grad.isfinite().all())
    weight = simplex(3, 10).to(device, dtype)
    assert sinkhorn_plan(rand(4, 10, 12).to(device, dtype), weight, eps=0.1).dtype == F32


@every_device
def test_strided_input_and_no_grad_and_autocast(device):
    C, x, y = (rand(n, 9, n, dtype=F32).to(device) for n in (6, 3, 3))
    close(sinkhorn_plan(C.T, eps=0.05), sinkhorn_plan(C.T.contiguous(), eps=0.05))
    value = sinkhorn_divergence(x, y + 0.1, eps=0.05)
    autocast = torch.autocast(device, dtype=torch.bfloat16)
    for context in (torch.no_grad(), torch.inference_mode(), autocast):
        with context:
            close(sinkhorn_divergence(x, y + 0.1, eps=0.05), value)


def test_works_inside_torch_compile():
    def loss(x, y):
        return 2 * sinkhorn_divergence(3 * x, y, eps=0.1) + entropic_ot(torch.cdist(x, y), eps=0.1)

    y, gradients = rand(1, 9, 3), []
    for function in (loss, torch.compile(loss, backend="eager")):
        x = rand(2, 7, 3).requires_grad_()
        gradients.append(torch.autograd.grad(function(x, y), x)[0])
    close(*gradients)


def test_not_converging_warns_once_with_the_error_and_without_nan():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = sinkhorn_potentials(rand(1, 2, 30, 30), eps=1e-4, max_iter=5)
    (warning,) = caught
    assert warning.category is RuntimeWarning and warning.filename == __file__
    assert not bool(got.converged.any()) and got.n_iter == 5
    assert f"{float(got.error.max()):.0e}" in str(warning.message)
    assert all(bool(t.isfinite().all()) for t in (got.f, got.g, got.error))
    with pytest.warns(RuntimeWarning) as caught:
        value = sinkhorn_divergence(rand(2, 30, 3), rand(3, 30, 3), eps=1e-5, max_iter=1)
    assert len(caught) == 1 and math.isfinite(float(value))


C34, X32, AWAY = torch.ones(3, 4), torch.ones(3, 2), torch.ones(4, device="meta")
TENSOR = "must be a non-empty floating point tensor of"
WEIGHTS = "must be >= 0, with a positive total"
BAD = [
    (dict(C=torch.ones(3)), f"C {TENSOR} 2 dimensions or more, not torch.float32 of shape"),
    (dict(C=torch.ones(0, 4)), f"C {TENSOR}"),
    (dict(C=np.ones((3, 4))), f"C {TENSOR} 2 dimensions or more, not ndarray"),
    (dict(C=C34.long()), f"C {TENSOR} 2 dimensions or more, not torch.int64"),
    (dict(C=torch.tensor([[1, math.nan]])), "C holds NaN or infinite"),
    (dict(C=torch.tensor([[1, math.inf]])), "C holds NaN or infinite"),
    (dict(C=C34, a=torch.ones(4) / 4), f"a {WEIGHTS} and of shape"),
    (dict(C=C34, a=torch.ones(1)), f"a {WEIGHTS} and of shape"),
    (dict(C=C34, b=torch.ones(2, 4) / 4), f"b {WEIGHTS} and of shape"),
    (dict(C=C34.expand(5, 3, 4), b=torch.ones(2, 4) / 4), f"b {WEIGHTS} and of shape"),
    (dict(C=C34, a=torch.tensor([0.5, 1, -0.5])), "a must be >= 0"),
    (dict(C=C34, b=torch.zeros(4)), f"b {WEIGHTS}"),
    (dict(C=C34, b=torch.tensor([0.5, 0.5, math.nan, 0])), "b holds NaN"),
    (dict(C=C34, b=AWAY), "b is on meta, the other arguments on cpu"),
    (dict(C=C34, a=torch.ones(3)), "equal total mass, not 3 and 1"),
    (dict(C=C34, eps=0), "eps must be positive"),
    (dict(C=C34, eps=-1), "eps must be positive"),
    (dict(C=C34, eps=math.nan), "eps must be positive"),
    (dict(C=C34, eps=1e-42), "eps = 1e-42 is too small"),
    (dict(C=C34, tol=-1), "tol >= 0"),
    (dict(C=C34, max_iter=0), "max_iter >= 1"),
    (dict(x=X32, y=C34), "points of one dimension"),
    (dict(x=X32.expand(5, 3, 2), y=X32.expand(4, 3, 2)), "broadcast, not .5, 3, 2. and .4, 3, 2."),
    (dict(x=X32, y=torch.ones(3)), f"y {TENSOR}"),
    (dict(x=X32, y=X32 * math.inf), "y holds NaN or infinite"),
    (dict(x=X32, y=X32 * 1e30), "too small for costs as large as"),
    (dict(x=X32, y=X32, a=torch.ones(2) / 2), f"a {WEIGHTS} and of shape"),
    (dict(x=X32, y=X32, p=3), "p must be 1 or 2, not 3"),
    (dict(x=X32, y=AWAY.expand(3, 4)), "y is on meta, the other arguments on cpu"),
]


@pytest.mark.parametrize("arguments, message", BAD)
def test_bad_input_is_named(arguments, message):
    of_costs = sinkhorn_potentials, sinkhorn_plan, entropic_ot
    for function in of_costs if "C" in arguments else (sinkhorn_divergence,):
        with pytest.raises(ValueError, match=message):
            function(**arguments)


# ---- python test_sinkhorn.py: ours beside other libraries ----------------------------------------

ROUNDS, PATIENCE = 20, 15  # calls of a contender; at least three, once they took that many seconds
ADEQUATE = 1e-3  # relative error of the value


def benchmark(device):
    """Milliseconds, errors against float64 and peak memory, medians over rounds, in turn."""
    threads = f"torch {torch.__version__}, {torch.get_num_threads()} threads; ours at tol 1e-2"
    print(f"{device_name(device)}, {threads}")
    numbers = f"{'forward':>9}{'and back':>10}{'value off':>11}{'gradient':>10}{'MiB':>7}"
    print(f"{'problem':26}{'eps':>6}  {'':20}{numbers}")
    batch = [torch.stack(side) for side in zip(*(unit_clouds(seed) for seed in range(64)))]
    for name, problem in [
        ("student's step, 128 x 30", similarity_clouds()),
        ("clouds of 1,024 x 30", unit_clouds(2, 1024)),
        ("64 clouds of 128 x 30", batch),
        ("raw cost 1,024 x 1,024", (rand(9, 1024, 1024),)),
        ("clouds of 4,096 x 30", unit_clouds(3, 4096)),
    ]:
        if len(problem) == 2:
            diameter = math.sqrt(float(half_squares(*problem).max()))
            problem = [cloud / diameter for cloud in problem]
        for eps in (0.1, 0.01, 0.001):
            compare(f"{name:26}{eps:6g}", [t.to(device) for t in problem], eps)


def half_squares(x, y):
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist") ** 2 / 2


def compare(name, problem, eps):
    tol = 1e-10 if problem[0].shape[-2] <= 1024 else 1e-6
    want = timed(ours(problem, eps, tol, 100_000), problem)[2:]
    single = [t.float() for t in problem]
    contenders = {"ours": ours(single, eps, 1e-2, 1000), **peers(single, eps, want[0])}
    times, off, memory = {label: [] for label in contenders}, {}, {}
    for label, call in contenders.items():
        got = timed(call, single)[2:]
        off[label] = [float((g.double() - w).norm() / w.norm()) for g, w in zip(got, want)]
        memory[label] = peak_memory(call, single) / 2**20
    for round in range(ROUNDS):
        for label in list(contenders) if round % 2 else reversed(contenders):
            if len(times[label]) < 3 or sum(both for _, both in times[label]) < PATIENCE:
                times[label].append(timed(contenders[label], single)[:2])
    median = {label: np.median(t, axis=0) for label, t in times.items()}
    good = [median[name][1] for name in times if off[name][0] <= ADEQUATE and name != "ours"]
    for label, (forward, both) in median.items():
        note = f"{len(times[label])} rounds" if len(times[label]) < ROUNDS else ""
        if label == "ours":
            note = f"{both / min(good):.2f} of the fastest adequate" if good else "none adequate"
        value, gradient = off[label]
        numbers = f"{1e3 * forward:9.2f}{1e3 * both:10.2f}{value:11.0e}{gradient:10.0e}"
        print(f"{name}  {label:20}{numbers}{memory[label]:7.1f}  {note}", flush=True)


def ours(problem, eps, tol, max_iter):
    settings = dict(eps=eps, tol=tol, max_iter=max_iter)
    if len(problem) == 1:
        return lambda C: entropic_ot(C, **settings)
    return lambda x: sinkhorn_divergence(x, problem[1], **settings).sum()


def peers(problem, eps, value):
    """{name: function of the first tensor}; of POT the loosest tolerance with an adequate value."""
    found = {}
    for name in ("geomloss", "flash_sinkhorn") if len(problem) == 2 else ():
        if name == "geomloss" or problem[0].is_cuda:
            try:
                kind = {"backend": "tensorized"} if name == "geomloss" else {}
                samples = __import__(name).SamplesLoss
                loss = samples("sinkhorn", p=2, blur=math.sqrt(eps), **kind)
                found[name] = lambda x, loss=loss: loss(x, problem[1]).sum()
            except ImportError:
                print(name, "is not installed and left out")
    try:
        import ot
    except ImportError:
        print("POT is not installed and left out")
        return found
    for tol in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
        call = pot(ot, problem, eps, tol)
        _, seconds, got, _ = timed(call, problem)
        if abs(float(got) / float(value) - 1) <= ADEQUATE or seconds > PATIENCE / 3:
            break
    return {**found, f"POT, {tol:g}": call}


def pot(ot, problem, eps, tol):
    settings = dict(reg=eps, max_iter=100_000, tol=tol, grad="envelope")

    def value(C):
        if C.dim() == 3:
            return ot.solve_batch(C, reg_type="kl", **settings).value.sum()
        a, b = (torch.full((n,), 1 / n, device=C.device) for n in C.shape)
        return ot.solve(C, a, b, reg_type="KL", **settings).value

    if len(problem) == 1:
        return value
    y = problem[1]
    with warnings.catch_warnings(action="ignore"):
        itself = value(half_squares(y, y))  # does not change: not counted
    return lambda x: value(half_squares(x, y)) - (value(half_squares(x, x)) + itself) / 2


def timed(call, problem):
    """Seconds of the forward pass alone and with the backward pass, value, gradient."""
    wait = torch.cuda.synchronize if problem[0].is_cuda else lambda: None
    first = problem[0].clone().requires_grad_()
    with warnings.catch_warnings(action="ignore"):
        wait()
        start = time.perf_counter()
        value = call(first)
        wait()
        forward = time.perf_counter() - start
        value.backward()
        wait()
        return forward, time.perf_counter() - start, value.detach(), first.grad


def peak_memory(call, problem):
    """Most bytes that torch held at a time beyond the input, forward and backward."""
    if problem[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        timed(call, problem)
        return torch.cuda.max_memory_allocated() - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        timed(call, problem)
    events = profile.profiler.kineto_results.events()
    held = np.cumsum([event.nbytes() for event in events if event.name() == "[memory]"])
    return held.max()


def device_name(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "CPU")


if __name__ == "__main__":
    for device in DEVICES:
        benchmark(device)
