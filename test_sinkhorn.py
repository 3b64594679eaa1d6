"""Tests of sinkhorn.py against things that know nothing of it: exact linear programmes, a textbook
Sinkhorn in NumPy float64, finite differences and closed forms. Copied out with sinkhorn.py, they need
torch, numpy, scipy and pytest; POT joins in where it is installed. CUDA is tested where there is one.
"""

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
from scipy.special import logsumexp

import sinkhorn
from sinkhorn import entropic_ot, sinkhorn_divergence, sinkhorn_plan, sinkhorn_potentials

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
F64 = torch.float64


def rng(seed):
    return torch.Generator().manual_seed(seed)


def rand(seed, *shape, dtype=F64):
    return torch.rand(*shape, generator=rng(seed), dtype=dtype)


def simplex(seed, *shape):
    w = rand(seed, *shape) + 0.1
    return w / w.sum(-1, keepdim=True)


def linear_programme(C, a, b):
    """min <C, P> over P >= 0 with P 1 = a, P^T 1 = b, exactly."""
    n, m = C.shape
    sums = np.vstack([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    result = linprog(C.numpy().ravel(), A_eq=sums, b_eq=np.concatenate([a, b]), method="highs")
    assert result.status == 0
    return result.fun


def reference(C, a, b, eps, tol=1e-9):
    """Textbook log-domain Sinkhorn in NumPy float64: value and plan at a marginal error of tol."""
    C, a, b = (np.asarray(t, dtype=np.float64) for t in (C, a, b))
    g = np.zeros(len(b))
    for _ in range(200_000):
        f = -eps * logsumexp((g - C) / eps, b=b, axis=1)
        g = -eps * logsumexp((f[:, None] - C) / eps, b=a[:, None], axis=0)
        P = np.exp((f[:, None] + g - C) / eps) * a[:, None] * b
        if np.abs(P.sum(1) - a).sum() < tol:
            return a @ f + b @ g, P
    raise AssertionError("the reference itself did not converge")


def similarity_clouds(seed=0, n=128, k=30, classes=5):
    """Rows of the k largest cosine similarities of two noisy views of n labelled points: the student's step."""
    g = rng(seed)
    centres = torch.randn(classes, 64, generator=g, dtype=F64)
    centre = centres[torch.randint(classes, (n,), generator=g)] + torch.randn(n, 64, generator=g, dtype=F64)
    views = [centre + scale * torch.randn(n, 64, generator=g, dtype=F64) for scale in (0.5, 1)]
    S, T = (torch.nn.functional.normalize(view, dim=1) @ torch.nn.functional.normalize(view, dim=1).T for view in views)
    columns = S.topk(k, dim=1).indices
    return S.gather(1, columns), T.gather(1, columns)


def unit_clouds(seed=1, n=128, d=30):
    """Two clouds in a box of diameter 1."""
    return rand(seed, n, d) / math.sqrt(d), rand(seed + 100, n, d) / math.sqrt(d)


def squared_cost(x, y):
    return ((x[:, None] - y[None]) ** 2).sum(-1) / 2


# ---- values, against the exact and the float64 ------------------------------------------------------


@pytest.mark.parametrize("n, m", [(1, 1), (7, 7), (5, 11), (12, 3)])
def test_goes_to_the_linear_programme_as_eps_goes_to_zero(n, m):
    C, a, b = rand(1, n, m), simplex(2, n), simplex(3, m)
    exact = linear_programme(C, a, b)
    values = [float(entropic_ot(C, a, b, eps=eps, tol=1e-7, max_iter=50_000)) for eps in (1, 0.1, 0.01, 0.001)]
    assert all(more >= less - 1e-12 for more, less in zip(values, values[1:]))
    for eps, value in zip((1, 0.1, 0.01, 0.001), values):
        # KL(P | a b^T) is a mutual information: between 0 and the smaller of the two entropies.
        entropy = min(float(-(w * w.log()).sum()) for w in (a, b))
        assert -1e-6 <= value - exact <= eps * entropy + 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("eps", [1, 0.1, 0.01])
@pytest.mark.parametrize("clouds", [similarity_clouds, unit_clouds])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_divergence_and_gradient_against_float64_run_to_1e_9(clouds, eps, dtype, device):
    x, y = (t.to(dtype) for t in clouds())
    x64, y64, w = x.double().numpy(), y.double().numpy(), np.full(len(x), 1 / len(x))

    def ot(s, t):
        value, P = reference(squared_cost(torch.tensor(s), torch.tensor(t)), w, w, eps)
        return value, P.sum(1)[:, None] * s - P @ t, P.sum(0)[:, None] * t - P.T @ s

    (xy, xy_x, xy_y), (xx, xx_x, xx_y), (yy, yy_x, yy_y) = ot(x64, y64), ot(x64, x64), ot(y64, y64)
    for debias in (False, True):
        want = (xy - (xx + yy) / 2, xy_x - (xx_x + xx_y) / 2, xy_y - (yy_x + yy_y) / 2) if debias else (xy, xy_x, xy_y)
        p, q = x.to(device, copy=True).requires_grad_(), y.to(device, copy=True).requires_grad_()
        value = sinkhorn_divergence(p, q, eps=eps, debias=debias)
        value.backward()
        assert value.dtype == dtype and p.grad.dtype == dtype
        assert abs(value.item() - want[0]) <= 1e-5 * abs(want[0])
        for got, grad in zip((p.grad, q.grad), want[1:]):
            assert np.linalg.norm(got.double().cpu().numpy() - grad) <= 1e-4 * np.linalg.norm(grad)


def test_hard_problem_against_float64():
    """Small eps, where the plain iteration needs thousands of sweeps and float32 rounds the cost."""
    x, y = unit_clouds()
    C = squared_cost(x, y) * 30
    w = np.full(len(x), 1 / len(x))
    value, P = reference(C, w, w, eps=0.05, tol=1e-6)
    for dtype in (torch.float32, F64):
        got = sinkhorn_potentials(C.to(dtype), eps=0.05, tol=1e-5)
        assert bool(got.converged) and got.n_iter <= 300
        plan = sinkhorn_plan(C.to(dtype), eps=0.05, tol=1e-5)
        assert abs(float(entropic_ot(C.to(dtype), eps=0.05)) - value) <= 1e-6 * abs(value)
        assert np.linalg.norm(plan.double().numpy() - P) <= 1e-3 * np.linalg.norm(P)


def test_against_pot():
    ot = pytest.importorskip("ot")
    C, a, b = rand(5, 20, 30), simplex(6, 20), simplex(7, 30)
    P = ot.bregman.sinkhorn_log(a.numpy(), b.numpy(), C.numpy(), 0.05, stopThr=1e-12, numItermax=20_000)
    assert np.abs(sinkhorn_plan(C, a, b, eps=0.05, tol=1e-10).numpy() - P).max() < 1e-9


# ---- closed forms -----------------------------------------------------------------------------------


def test_one_point_has_no_choice():
    C, b = rand(1, 1, 6), simplex(2, 6)
    for eps in (1e-3, 1, 10):
        torch.testing.assert_close(entropic_ot(C, None, b, eps=eps), (C[0] * b).sum())
        torch.testing.assert_close(sinkhorn_plan(C, None, b, eps=eps), b[None])


def test_two_by_two_closed_form():
    c, eps = 0.7, 0.2
    stay = 0.5 / (1 + math.exp(-c / eps))
    move = 0.5 - stay
    C = torch.tensor([[0, c], [c, 0]], dtype=F64)
    plan = sinkhorn_plan(C, eps=eps, tol=1e-12)
    torch.testing.assert_close(plan, torch.tensor([[stay, move], [move, stay]], dtype=F64))
    value = 2 * move * c + eps * 2 * (stay * math.log(4 * stay) + move * math.log(4 * move))
    assert abs(float(entropic_ot(C, eps=eps, tol=1e-12)) - value) < 1e-12


def test_eps_to_infinity_is_the_independent_coupling():
    C, a, b = rand(1, 6, 9), simplex(2, 6), simplex(3, 9)
    torch.testing.assert_close(sinkhorn_plan(C, a, b, eps=1e6), a[:, None] * b, rtol=1e-5, atol=0)
    torch.testing.assert_close(entropic_ot(C, a, b, eps=1e6), (C * a[:, None] * b).sum(), rtol=1e-5, atol=0)


def test_on_the_line_small_eps_sorts():
    x, y = rand(1, 9, 1), rand(2, 9, 1)
    gap = x.flatten().sort().values - y.flatten().sort().values
    got = [sinkhorn_divergence(x, y, p=p, eps=1e-4, debias=False, tol=1e-4, max_iter=20_000) for p in (1, 2)]
    assert abs(float(got[0] - gap.abs().mean())) < 1e-3
    assert abs(float(got[1] - (gap**2).mean() / 2)) < 1e-3


@pytest.mark.parametrize("p", [1, 2])
def test_divergence_of_equal_clouds_is_zero_with_zero_gradient(p):
    x = rand(1, 20, 3).requires_grad_()
    y = x.detach()[torch.randperm(20, generator=rng(2))]
    for other in (x.detach(), y):
        value = sinkhorn_divergence(x, other, p=p, eps=0.05, tol=1e-10, max_iter=10_000)
        (grad,) = torch.autograd.grad(value, x)
        assert abs(value.item()) < 1e-12 and float(grad.abs().max()) < 1e-8


def test_divergence_is_positive_and_symmetric():
    x, y, a, b = rand(1, 15, 4), rand(2, 22, 4) + 0.3, simplex(3, 15), simplex(4, 22)
    for p in (1, 2):
        there = sinkhorn_divergence(x, y, a, b, p=p, eps=0.1, tol=1e-9)
        torch.testing.assert_close(there, sinkhorn_divergence(y, x, b, a, p=p, eps=0.1, tol=1e-9))
        assert float(there) > 0.01


# ---- the laws of the problem ------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("eps", [1e-3, 1e-2, 0.1, 1, 10])
def test_marginals_and_reported_error(eps, dtype, device):
    C = rand(1, 3, 17, 25).to(device, dtype)
    a, b = simplex(2, 3, 17).to(device, dtype), simplex(3, 25).to(device, dtype)
    got = sinkhorn_potentials(C, a, b, eps=eps, max_iter=20_000)
    assert got.f.shape == (3, 17) and got.g.shape == (3, 25) and got.error.shape == got.converged.shape == (3,)
    assert bool(got.converged.all()) and float(got.error.max()) <= 1e-4
    # The error recomputed in float64 from what was returned is the error that was reported.
    f, g, C64, a64, b64 = (t.double() for t in (got.f, got.g, C, a, b.expand(3, 25)))
    P = ((f.unsqueeze(-1) + g.unsqueeze(-2) - C64) / eps).exp() * a64.unsqueeze(-1) * b64.unsqueeze(-2)
    error = (P.sum(-1) - a64).abs().sum(-1) + (P.sum(-2) - b64).abs().sum(-1)
    rounding = 0 if dtype == F64 else 1e-6 / min(eps, 1)
    assert float((error - got.error.double()).abs().max()) <= 1e-9 + rounding * 1e-1
    plan = sinkhorn_plan(C, a, b, eps=eps, max_iter=20_000)
    torch.testing.assert_close(plan, P.to(dtype), rtol=1e-3, atol=1e-7)


def test_value_is_primal_and_dual():
    C, a, b, eps = rand(1, 8, 12), simplex(2, 8), simplex(3, 12), 0.05
    P = sinkhorn_plan(C, a, b, eps=eps, tol=1e-11)
    primal = (P * C).sum() + eps * (P * (P / (a[:, None] * b)).log()).sum()
    potentials = sinkhorn_potentials(C, a, b, eps=eps, tol=1e-11)
    dual = (a * potentials.f).sum() + (b * potentials.g).sum()
    value = entropic_ot(C, a, b, eps=eps, tol=1e-11)
    torch.testing.assert_close(value, primal)
    torch.testing.assert_close(value, dual)
    torch.testing.assert_close((a * potentials.f).sum(), (b * potentials.g).sum())  # the gauge promised


def test_batch_equals_loop_and_any_leading_dimensions():
    C, a, b = rand(1, 2, 3, 6, 9), simplex(2, 2, 3, 6), simplex(3, 9)
    together = entropic_ot(C, a, b, eps=0.1, tol=1e-10)
    plans = sinkhorn_plan(C, a, b, eps=0.1, tol=1e-10)
    assert together.shape == (2, 3) and plans.shape == C.shape
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(together[i, j], entropic_ot(C[i, j], a[i, j], b, eps=0.1, tol=1e-10))
            torch.testing.assert_close(plans[i, j], sinkhorn_plan(C[i, j], a[i, j], b, eps=0.1, tol=1e-10))
    x, y = rand(4, 3, 5, 2), rand(5, 7, 2)  # one cloud against a batch
    many = sinkhorn_divergence(x, y, eps=0.1, tol=1e-10)
    for i in range(3):
        torch.testing.assert_close(many[i], sinkhorn_divergence(x[i], y, eps=0.1, tol=1e-10))


def test_shift_and_scale_laws():
    C, a, b, eps = rand(1, 8, 12), simplex(2, 8), simplex(3, 12), 0.05
    value, plan = entropic_ot(C, a, b, eps=eps, tol=1e-10), sinkhorn_plan(C, a, b, eps=eps, tol=1e-10)
    rows, columns = rand(4, 8) * 5, rand(5, 12) * -3
    shifted = C + rows[:, None] + columns
    torch.testing.assert_close(
        entropic_ot(shifted, a, b, eps=eps, tol=1e-10), value + (a * rows).sum() + (b * columns).sum()
    )
    torch.testing.assert_close(sinkhorn_plan(shifted, a, b, eps=eps, tol=1e-10), plan)
    for scale in (1e-4, 30, 1e4):
        torch.testing.assert_close(entropic_ot(scale * C, a, b, eps=scale * eps, tol=1e-10), scale * value)
    torch.testing.assert_close(sinkhorn_plan(C, 7 * a, 7 * b, eps=eps, tol=1e-10), 7 * plan)
    mirrored = sinkhorn_potentials(C.T, b, a, eps=eps, tol=1e-11)
    torch.testing.assert_close(mirrored.g, sinkhorn_potentials(C, a, b, eps=eps, tol=1e-11).f, rtol=0, atol=1e-9)


def test_zero_weights_carry_nothing():
    C, a, b = rand(1, 6, 7), simplex(2, 6), simplex(3, 7)
    a[[0, 3]], b[6] = 0, 0
    a, b = a / a.sum(), b / b.sum()
    keep_a, keep_b = a > 0, b > 0
    small = entropic_ot(C[keep_a][:, keep_b], a[keep_a], b[keep_b], eps=0.02, tol=1e-9)
    C.requires_grad_()
    value = entropic_ot(C, a, b, eps=0.02, tol=1e-9)
    value.backward()
    torch.testing.assert_close(value, small)
    potentials = sinkhorn_potentials(C, a, b, eps=0.02, tol=1e-9)
    assert bool(potentials.f.isfinite().all() and potentials.g.isfinite().all() and potentials.converged)
    assert float(C.grad[~keep_a].abs().max()) == 0 and float(C.grad[:, ~keep_b].abs().max()) == 0
    torch.testing.assert_close(C.grad, sinkhorn_plan(C, a, b, eps=0.02, tol=1e-9))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_padding_with_far_points_of_no_weight_changes_nothing(dtype):
    """What a batch of clouds of unequal size does: zeros on both sides, far from everything."""
    x, y = rand(1, 8, 3).to(dtype), rand(2, 6, 3).to(dtype)
    a, b = simplex(3, 8).to(dtype), simplex(4, 6).to(dtype)

    def padded(t):
        return torch.cat([t, torch.full((5, *t.shape[1:]), 100.0 if t.dim() > 1 else 0.0, dtype=dtype)])

    for eps in (1e-3, 0.1, 1e3):
        settings = {"eps": eps, "tol": 1e-4, "max_iter": 20_000}
        p, q, w = padded(x).requires_grad_(), padded(y).requires_grad_(), padded(a).requires_grad_()
        value = sinkhorn_divergence(p, q, w, padded(b), **settings)
        small = x.clone().requires_grad_()
        want = sinkhorn_divergence(small, y, a, b, **settings)
        torch.testing.assert_close(value, want, rtol=1e-3, atol=1e-5 + eps * torch.finfo(dtype).eps)
        grads, (grad,) = torch.autograd.grad(value, (p, q, w)), torch.autograd.grad(want, small)
        assert all(bool(g.isfinite().all()) for g in grads) and float(grads[0][8:].abs().max()) == 0
        torch.testing.assert_close(grads[0][:8], grad, rtol=1e-2, atol=1e-4)
        plan = sinkhorn_plan(squared_cost(padded(x), padded(y)), padded(a), padded(b), **settings)
        assert float(plan[8:].max()) == 0 and float(plan[:, 6:].max()) == 0


@pytest.mark.parametrize("mass", [1e-6, 1e-2, 50, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_any_total_mass_is_solved_alike(mass, dtype):
    C, a, b = rand(1, 30, 40).to(dtype), simplex(2, 30).to(dtype), simplex(3, 40).to(dtype)
    one, many = sinkhorn_potentials(C, a, b, eps=0.05), sinkhorn_potentials(C, mass * a, mass * b, eps=0.05)
    assert bool(many.converged) and float(many.error) <= 1e-4 * mass
    assert abs(many.n_iter - one.n_iter) <= 10
    plan = sinkhorn_plan(C, mass * a, mass * b, eps=0.05)
    torch.testing.assert_close(plan / mass, sinkhorn_plan(C, a, b, eps=0.05), rtol=1e-3, atol=1e-6)


def test_large_eps_in_float32_is_exact():
    C, a, b = rand(1, 20, 30).float(), simplex(2, 20).float(), simplex(3, 30).float()
    for eps in (1, 1e3, 1e6):
        want = entropic_ot(C.double(), a.double(), b.double(), eps=eps, tol=1e-12)
        got = entropic_ot(C, a, b, eps=eps)
        assert got.dtype == torch.float32 and abs(float(got) - float(want)) <= 1e-6
        assert sinkhorn_plan(C.float(), eps=eps).dtype == sinkhorn_potentials(C.float(), eps=eps).f.dtype == got.dtype


def test_coincident_and_single_points():
    ones, one, some = (torch.ones(5, 3), torch.ones(4, 3)), (torch.zeros(1, 2), torch.ones(1, 2)), (rand(1, 6, 2),) * 2
    for p in (1, 2):
        for x, y in (ones, one, some):
            x = x.clone().requires_grad_()
            for debias in (False, True):
                value = sinkhorn_divergence(x, y, p=p, eps=0.1, debias=debias)
                (grad,) = torch.autograd.grad(value, x)
                assert math.isfinite(value.item()) and bool(grad.isfinite().all())
    assert abs(float(sinkhorn_divergence(torch.zeros(1, 2), torch.ones(1, 2), p=1)) - math.sqrt(2)) < 1e-6


def random_problem(seed):
    """A problem of any size, scale, shape and awkwardness: C, a, b, eps."""
    g = np.random.default_rng(seed)
    n, m, d = g.integers(1, 201), g.integers(1, 201), g.integers(1, 6)
    leading = [(), (), (), (2,), (2, 1)][g.integers(5)]
    x, y = g.normal(size=(*leading, n, d)), g.normal(size=(*leading, m, d)) + g.normal(size=d)
    if g.random() < 0.2:  # repeated points
        x, y = x[..., g.integers(0, n, n), :], x[..., g.integers(0, n, m), :]
    C = ((x[..., :, None, :] - y[..., None, :, :]) ** 2).sum(-1) if g.random() < 0.7 else g.random((*leading, n, m))
    scale = 10 ** g.uniform(-6, 6)
    C = C / max(C.max(), 1e-9) * scale + g.choice([0, 0, -scale, scale / 2])

    def weights(k):
        w = g.random((*leading, k)) + 1e-3
        w[..., g.random(k) < g.choice([0, 0, 0.3])] = g.choice([0, 1e-12, 1e-30])
        w[..., 0] += 0.1
        return w / w.sum(-1, keepdims=True)

    dtype = [torch.float32, F64][g.integers(2)]
    C, a, b = (torch.tensor(t, dtype=dtype) for t in (C, weights(n), weights(m)))
    if g.random() < 0.2:
        C = C.mT.contiguous().mT  # the same, laid out by columns
    return C, a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True), scale * 10 ** g.uniform(-4, 1), g


def true_error(got, C, a, b, eps):
    """L1 marginal error of the plan of these potentials, in float64."""
    f, g, C, a, b = (t.double() for t in (got.f, got.g, C, a, b))
    P = ((f.unsqueeze(-1) + g.unsqueeze(-2) - C) / eps + a.log().unsqueeze(-1) + b.log().unsqueeze(-2)).exp()
    return (P.sum(-1) - a).abs().sum(-1) + (P.sum(-2) - b).abs().sum(-1)


def value_or_warning(*problem, **settings):
    """The value, and whether there was a warning that the iteration has not converged."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return entropic_ot(*problem, **settings), len(caught) > 0


PROBLEMS = int(os.environ.get("SINKHORN_PROBLEMS", 2000))


@pytest.mark.parametrize("part", range(10))
def test_random_problems(part):
    """Marginals within tol or an honest not-converged, no NaN, symmetry and invariances, on 2,000 random problems."""
    unsolved = 0
    for seed in range(part, PROBLEMS, 10):
        C, a, b, eps, g = random_problem(seed)
        spread, settings = float(C.max() - C.min()), {"eps": eps, "tol": 1e-4, "max_iter": 300}
        rows, columns = g.permutation(C.shape[-2]), g.permutation(C.shape[-1])
        permuted = C[..., rows, :][..., columns], a[..., rows], b[..., columns]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            got, value = sinkhorn_potentials(C, a, b, **settings), entropic_ot(C, a, b, **settings)
        raised, warned = value_or_warning(C + spread, a, b, **settings)
        others = [value_or_warning(*other, **settings) for other in ((C.mT, b, a), permuted)]
        others.append((raised - spread, warned))
        finite = [got.f, got.g, got.error, value, *(other for other, _ in others)]
        assert all(bool(t.isfinite().all()) for t in finite), seed
        C64, a64, b64 = C.double(), a.double(), b.double()
        error = true_error(got, C64, a64, b64, eps)
        assert bool((got.converged == (got.error <= 1e-4)).all()), seed
        assert float((error - got.error).abs().max()) <= 1e-5 + 0.02 * float(error.max()), (seed, error, got.error)
        if not bool(got.converged.all()):
            unsolved += 1
            continue
        # A marginal error of tol moves the value by no more than tol times the spread of the potentials.
        slack = 1e-4 * 4 * (spread + eps) + 1e-5 * float(C.abs().max())
        for other, warned in others:
            assert warned or float((other - value).abs().max()) <= slack, seed
            unsolved += warned / 3
        independent = (C64 * a64.unsqueeze(-1) * b64.unsqueeze(-2)).sum((-2, -1))
        assert bool((value <= independent + slack).all()) and bool((value >= C64.amin((-2, -1)) - slack).all()), seed
    assert unsolved <= 0.2 * PROBLEMS / 10


@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-3])
def test_a_loose_tolerance_is_kept_as_well(tol):
    """In float32, whose exponents potentials leave within a few sweeps where eps is small."""
    for seed in range(PROBLEMS // 8):
        C, a, b, eps, _ = random_problem(seed)
        C, a, b = C.float(), a.float(), b.float()
        if any(bool(((w > 0) & (w < 1e-20)).any()) for w in (a, b)):
            continue  # a plan between two such points may be anything and not be seen in a float32 sum
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            got = sinkhorn_potentials(C, a, b, eps=eps, tol=tol, max_iter=300)
        error = true_error(got, C, a, b, eps)
        assert bool(((error - got.error).abs() <= 0.06 * (error + tol)).all()), (seed, error, got.error)


def test_random_divergences_are_not_negative_and_zero_on_equal_clouds():
    for seed in range(PROBLEMS // 10):
        g = np.random.default_rng(seed)
        n, m, d, dtype = g.integers(1, 60), g.integers(1, 60), g.integers(1, 5), [torch.float32, F64][g.integers(2)]
        x, y = (torch.tensor(g.normal(size=(k, d)), dtype=dtype) for k in (n, m))
        p, eps = int(g.integers(1, 3)), 10 ** g.uniform(-3, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            value = float(sinkhorn_divergence(x, y, p=p, eps=eps, tol=1e-5, max_iter=2000))
            same = float(sinkhorn_divergence(x, x.clone(), p=p, eps=eps, tol=1e-5, max_iter=2000))
        scale = float(torch.cdist(x, y).max()) ** p + eps
        assert value >= -1e-4 * scale and abs(same) <= 1e-4 * scale, (seed, value, same)


# ---- what users of other libraries ran into -----------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("p", [1, 2])
def test_two_close_clouds_have_no_negative_divergence(p, dtype):
    """geomloss issues 24 and 25."""
    x = rand(1, 200, 3).to(dtype)
    for distance in (1e-6, 1e-4, 1e-2):
        for eps in (1e-3, 1e-2, 1):
            value = sinkhorn_divergence(x, x + distance * rand(2, 200, 3).to(dtype), p=p, eps=eps, max_iter=5000)
            assert float(value) >= -1e-6 * (1 if dtype == torch.float32 else 0.1)


def test_plan_and_dual_value_agree_at_small_eps():
    """geomloss issue 58: <C, P> + eps KL(P | a b^T), of the plan, is the value."""
    x, y = unit_clouds(n=60)
    C = squared_cost(x, y)
    C = C / C.max()
    for eps in (1e-2, 1e-3, 3e-4):
        P = sinkhorn_plan(C, eps=eps, tol=1e-6, max_iter=50_000)
        primal = (P * C).sum() + eps * torch.xlogy(P, P * 60 * 60).sum()
        assert abs(float(primal - entropic_ot(C, eps=eps, tol=1e-6, max_iter=50_000))) <= 1e-6


@pytest.mark.parametrize("p", [1, 2])
def test_costs_too_large_to_keep_give_the_same(p, monkeypatch):
    """geomloss issue 68: for 25,000 points and more the cost is made in blocks."""
    x, y, a, b = rand(1, 70, 4), rand(2, 90, 4) + 0.2, simplex(3, 70), simplex(4, 90)

    def results():
        q, r, w = x.clone().requires_grad_(), y.clone().requires_grad_(), a.clone().requires_grad_()
        value = sinkhorn_divergence(q, r, w, b, p=p, eps=0.05, tol=1e-9, max_iter=5000)
        plan = sinkhorn_plan(torch.cdist(x, y), a, b, eps=0.05, tol=1e-9, max_iter=5000)
        return value, *torch.autograd.grad(value, (q, r, w)), plan

    whole = results()
    monkeypatch.setattr(sinkhorn, "LARGEST", 100)
    monkeypatch.setattr(sinkhorn, "BLOCK", 500)
    for kept, made in zip(whole, results()):
        torch.testing.assert_close(kept, made, rtol=1e-6, atol=1e-7)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read there")
def test_twenty_thousand_points_in_two_gigabytes():
    code = (
        "import torch; from sinkhorn import sinkhorn_divergence\n"
        "def peak():\n"
        "    return int([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])\n"
        "before = peak()\n"
        "g = torch.Generator().manual_seed(0)\n"
        "x, y = (torch.rand(20_000, 30, generator=g) / 30**0.5 for _ in range(2))\n"
        "x.requires_grad_()\n"
        "value = sinkhorn_divergence(x, y, eps=0.1, tol=1e-2, debias=False); value.backward()\n"
        "print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(sinkhorn.__file__).parent
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert int(done.stdout) < 2 * 2**20  # KiB


# ---- gradients --------------------------------------------------------------------------------------


def test_gradcheck_cost_and_weights():
    C, s, t = rand(1, 2, 4, 5), rand(2, 2, 4), rand(3, 5)
    for tensor in (C, s, t):
        tensor.requires_grad_()

    def value(C, s, t):
        return entropic_ot(C, s.softmax(-1), t.softmax(-1), eps=0.1, tol=1e-12, max_iter=100_000)

    assert torch.autograd.gradcheck(value, (C, s, t))


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("debias", [True, False])
def test_gradcheck_points(p, debias):
    x, y, s = rand(1, 5, 2).requires_grad_(), rand(2, 4, 2).requires_grad_(), rand(3, 5).requires_grad_()

    def value(x, y, s):
        return sinkhorn_divergence(x, y, s.softmax(-1), p=p, eps=0.1, debias=debias, tol=1e-12, max_iter=100_000)

    assert torch.autograd.gradcheck(value, (x, y, s))


def test_second_derivatives_are_refused():
    C = rand(1, 4, 4).requires_grad_()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(entropic_ot(C, eps=0.1), C, create_graph=True)


# ---- kinds of tensors, bad input, no convergence ----------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(dtype):
    x, y = rand(1, 10, 3).to(dtype), rand(2, 12, 3).to(dtype)
    torch.testing.assert_close(sinkhorn_divergence(x, y, eps=0.1), sinkhorn_divergence(x.float(), y.float(), eps=0.1))
    x.requires_grad_()
    sinkhorn_divergence(x, y, eps=0.1).backward()
    assert x.grad.dtype == dtype and bool(x.grad.isfinite().all())
    weight = simplex(3, 10).to(dtype)
    assert sinkhorn_plan(rand(4, 10, 12).to(dtype), weight, eps=0.1).dtype == torch.float32


def test_strided_input_and_no_grad_and_autocast():
    C = rand(1, 9, 6, dtype=torch.float32)
    want = sinkhorn_plan(C.T.contiguous(), eps=0.05)
    torch.testing.assert_close(sinkhorn_plan(C.T, eps=0.05), want)
    x, y = rand(2, 9, 3, dtype=torch.float32), rand(3, 9, 3, dtype=torch.float32)
    value = sinkhorn_divergence(x, y, eps=0.05)
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with context:
            torch.testing.assert_close(sinkhorn_divergence(x, y, eps=0.05), value)


def test_works_inside_torch_compile():
    def loss(x, y):
        return 2 * sinkhorn_divergence(3 * x, y, eps=0.1) + entropic_ot(torch.cdist(x, y), eps=0.1)

    y, gradients = rand(1, 9, 3), []
    for function in (loss, torch.compile(loss, backend="eager")):
        x = rand(2, 7, 3).requires_grad_()
        gradients.append(torch.autograd.grad(function(x, y), x)[0])
    torch.testing.assert_close(*gradients)


def test_other_devices_are_named():
    C, away = rand(1, 4, 5), torch.ones(5, dtype=F64, device="meta")
    with pytest.raises(ValueError, match="b is on meta, the other arguments on cpu"):
        entropic_ot(C, None, away)
    with pytest.raises(ValueError, match="y is on meta, the other arguments on cpu"):
        sinkhorn_divergence(C, away.expand(4, 5))


def test_not_converging_warns_once_with_the_error_and_without_nan():
    C = rand(1, 2, 30, 30)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = sinkhorn_potentials(C, eps=1e-4, max_iter=5)
    assert len(caught) == 1 and caught[0].category is RuntimeWarning and caught[0].filename == __file__
    assert not bool(got.converged.any()) and got.n_iter == 5
    assert f"{float(got.error.max()):.0e}" in str(caught[0].message)
    assert bool(got.f.isfinite().all() and got.g.isfinite().all() and got.error.isfinite().all())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = sinkhorn_divergence(rand(2, 30, 3), rand(3, 30, 3), eps=1e-5, max_iter=1)
    assert len(caught) == 1 and math.isfinite(float(value))


C34 = torch.ones(3, 4)
BAD = [
    (dict(C=torch.ones(3)), "C must be a non-empty"),
    (dict(C=torch.ones(0, 4)), "C must be a non-empty"),
    (dict(C=np.ones((3, 4))), "C must be a non-empty floating point tensor of 2 dimensions"),
    (dict(C=torch.ones(3, 4, dtype=torch.long)), "C must be a non-empty floating point tensor of 2 dimensions"),
    (dict(C=torch.tensor([[1, math.nan]])), "C holds NaN or infinite"),
    (dict(C=torch.tensor([[1, math.inf]])), "C holds NaN or infinite"),
    (dict(C=C34, a=torch.ones(4) / 4), "a must be >= 0, with a positive total and of shape"),
    (dict(C=C34, a=torch.ones(1)), "a must be >= 0, with a positive total and of shape"),
    (dict(C=C34, b=torch.ones(2, 4) / 4), "b must be >= 0, with a positive total and of shape"),
    (dict(C=C34.expand(5, 3, 4), b=torch.ones(2, 4) / 4), "b must be >= 0, with a positive total and of shape"),
    (dict(C=C34, a=torch.tensor([0.5, 1, -0.5])), "a must be >= 0"),
    (dict(C=C34, b=torch.zeros(4)), "b must be >= 0, with a positive total"),
    (dict(C=C34, b=torch.tensor([0.5, 0.5, math.nan, 0])), "b holds NaN"),
    (dict(C=C34, a=torch.ones(3)), "equal total mass, not 3 and 1"),
    (dict(C=C34, eps=0), "eps must be positive"),
    (dict(C=C34, eps=-1), "eps must be positive"),
    (dict(C=C34, eps=math.nan), "eps must be positive"),
    (dict(C=C34, eps=1e-42), "eps = 1e-42 is too small"),
    (dict(C=C34, tol=-1), "tol >= 0"),
    (dict(C=C34, max_iter=0), "max_iter >= 1"),
]


@pytest.mark.parametrize("arguments, message", BAD)
def test_bad_input_is_named(arguments, message):
    for function in (sinkhorn_potentials, sinkhorn_plan, entropic_ot):
        with pytest.raises(ValueError, match=message):
            function(**arguments)


def test_bad_clouds_are_named():
    x = torch.ones(3, 2)
    for arguments, message in [
        ((x, torch.ones(3, 4)), "points of one dimension"),
        ((x.expand(5, 3, 2), x.expand(4, 3, 2)), "and broadcast, not .5, 3, 2. and .4, 3, 2."),
        ((x, torch.ones(3)), "y must be a non-empty"),
        ((x, x * math.inf), "y holds NaN or infinite"),
        ((x, x * 1e30), "too small for costs as large as"),
        ((x, x, torch.ones(2) / 2), "a must be >= 0, with a positive total and of shape"),
        ((x, x, None, None, 3), "p must be 1 or 2, not 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            sinkhorn_divergence(*arguments)


# ---- python test_sinkhorn.py: ours beside other libraries -----------------------------------------------

ROUNDS, PATIENCE = 20, 15  # calls a contender on a problem; fewer, three at least, once they took that many seconds
ADEQUATE = 1e-3  # relative error of the value


def benchmark(device):
    """Milliseconds, errors against float64 and peak memory, medians over rounds in alternating order."""
    print(f"{device_name(device)}, torch {torch.__version__}, {torch.get_num_threads()} threads; ours at tol 1e-2")
    print(f"{'problem':26}{'eps':>6}  {'':24}{'forward':>9}{'and back':>10}{'value off':>11}{'gradient':>10}{'MiB':>7}")
    x, y = similarity_clouds()
    raw = rand(9, 1024, 1024)
    batch = [torch.stack(side) for side in zip(*(unit_clouds(seed, 128) for seed in range(64)))]
    for name, problem in [
        ("student's step, 128 x 30", (x, y)),
        ("clouds of 1,024 x 30", unit_clouds(2, 1024)),
        ("64 clouds of 128 x 30", batch),
        ("raw cost 1,024 x 1,024", (raw,)),
        ("clouds of 4,096 x 30", unit_clouds(3, 4096)),
    ]:
        if len(problem) == 2:
            diameter = math.sqrt(max(float(squared_distances(*problem).max()), 1e-12) / 2)
            problem = [cloud / diameter for cloud in problem]
        for eps in (0.1, 0.01, 0.001):
            compare(name, [t.to(device) for t in problem], eps)


def squared_distances(x, y):
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist") ** 2


def compare(name, problem, eps):
    tol = 1e-10 if problem[0].shape[-2] <= 1024 else 1e-6
    value, gradient = answer(ours(problem, eps, tol, 100_000), problem)
    single = [t.float() for t in problem]
    measured = {}
    contenders = {"ours": ours(single, eps, 1e-2, 1000), **peers(single, eps, value)}
    for label, call in contenders.items():
        got, grad = answer(call, single)
        off = [float((a.double() - b).norm() / b.norm()) for a, b in ((got, value), (grad, gradient))]
        measured[label] = {"off": off, "memory": peak_memory(call, single), "times": []}
    waiting = dict(contenders)
    for round in range(ROUNDS):
        for label in list(waiting) if round % 2 else reversed(list(waiting)):
            times = measured[label]["times"]
            times.append(timed(waiting[label], single))
            if len(times) >= 3 and sum(t[1] for t in times) > PATIENCE:
                del waiting[label]
    median = {label: [sorted(t[i] for t in m["times"])[len(m["times"]) // 2] for i in (0, 1)]
              for label, m in measured.items()}  # fmt: skip
    rivals = [median[label][1] for label, m in measured.items() if label != "ours" and m["off"][0] <= ADEQUATE]
    for label, m in measured.items():
        note = f"{len(m['times'])} rounds" if len(m["times"]) < ROUNDS else ""
        if label == "ours":
            note = (
                f"{median['ours'][1] / min(rivals):.2f} of the fastest adequate peer" if rivals else "no adequate peer"
            )
        forward, both = (1e3 * t for t in median[label])
        numbers = f"{forward:9.2f}{both:10.2f}{m['off'][0]:11.0e}{m['off'][1]:10.0e}{m['memory'] / 2**20:7.1f}"
        print(f"{name:26}{eps:6g}  {label:24}{numbers}  {note}", flush=True)


def ours(problem, eps, tol, max_iter):
    if len(problem) == 1:
        return lambda C: entropic_ot(C, eps=eps, tol=tol, max_iter=max_iter)
    return lambda x: sinkhorn_divergence(x, problem[1], eps=eps, tol=tol, max_iter=max_iter).sum()


def peers(problem, eps, value):
    """{name: function of the first tensor}; of POT the loosest tolerance that reaches an adequate value."""
    found = {}
    try:
        import geomloss

        if len(problem) == 2:
            loss = geomloss.SamplesLoss("sinkhorn", p=2, blur=math.sqrt(eps), backend="tensorized")
            found[f"geomloss {geomloss.__version__}"] = lambda x: loss(x, problem[1]).sum()
    except ImportError:
        print("geomloss is not installed and left out")
    try:
        import ot

        for tol in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
            call = pot(ot, problem, eps, tol)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                seconds = timed(call, problem)[1]
                off = abs(float(call(problem[0])) / float(value) - 1)
            found[f"POT {ot.__version__}, {tol:g}"] = call
            if off <= ADEQUATE or seconds > PATIENCE / 3:
                break
            del found[f"POT {ot.__version__}, {tol:g}"]
        else:
            found[f"POT {ot.__version__}, {tol:g}"] = call
    except ImportError:
        print("POT is not installed and left out")
    if problem[0].is_cuda and len(problem) == 2:
        try:
            import flash_sinkhorn

            loss = flash_sinkhorn.SamplesLoss("sinkhorn", p=2, blur=math.sqrt(eps))
            found["flash-sinkhorn"] = lambda x: loss(x, problem[1]).sum()
        except ImportError:
            print("flash-sinkhorn is not installed and left out")
    return found


def pot(ot, problem, eps, tol):
    def value(C):
        settings = dict(reg=eps, reg_type="KL", max_iter=100_000, tol=tol, grad="envelope")
        if C.dim() == 3:
            return ot.solve_batch(C, **{**settings, "reg_type": "kl"}).value.sum()
        a, b = (torch.full((n,), 1 / n, device=C.device) for n in C.shape)
        return ot.solve(C, a, b, **settings).value

    if len(problem) == 1:
        return value
    y = problem[1]
    itself = value(squared_distances(y, y) / 2)  # does not change: not counted

    def divergence(x):
        return value(squared_distances(x, y) / 2) - (value(squared_distances(x, x) / 2) + itself) / 2

    return divergence


def answer(call, problem):
    first = problem[0].clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = call(first)
        return value.detach(), torch.autograd.grad(value, first)[0]


def timed(call, problem):
    """Seconds of the forward pass alone, and with the backward pass."""

    def now():
        if first.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    first = problem[0].clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = now()
        value = call(first)
        middle = now()
        value.backward()
        return middle - start, now() - start


def peak_memory(call, problem):
    """Most bytes that torch held at a time beyond the input, forward and backward."""
    if problem[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        timed(call, problem)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        timed(call, problem)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def device_name(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "CPU")


if __name__ == "__main__":
    for device in DEVICES:
        benchmark(device)
