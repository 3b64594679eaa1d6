"""The method's functions against NumPy float64 written out in loops, scipy and exact assignment."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.special import log_softmax

import mtpkdot

F64 = torch.float64


def normal(seed, *shape, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def similarity_by_scipy(z):
    return 1 - cdist(z.numpy(), z.numpy(), "cosine")


# ---- stage 1 ----------------------------------------------------------------------------------------


def test_ccc_is_lins_and_known_values():
    p, y = normal(1, 50, 3), normal(2, 50, 3)
    for k in range(3):
        a, b = p[:, k].numpy(), y[:, k].numpy()
        pearson = np.corrcoef(a, b)[0, 1]
        lin = 2 * pearson * a.std() * b.std() / (a.var() + b.var() + (a.mean() - b.mean()) ** 2)
        assert abs(mtpkdot.ccc(p, y)[k].item() - lin) < 1e-12
    assert torch.allclose(mtpkdot.ccc(y, y), torch.ones(3, dtype=F64))
    assert torch.allclose(mtpkdot.ccc(-(y - y.mean(0)), y - y.mean(0)), -torch.ones(3, dtype=F64))
    # A shift by one standard deviation leaves 2 / (2 + 1).
    assert torch.allclose(mtpkdot.ccc(y + y.std(0, correction=0), y), torch.full((3,), 2 / 3, dtype=F64))


def test_ccc_of_constants_is_zero_with_finite_gradient():
    p = torch.ones(4, 2, requires_grad=True)
    value = mtpkdot.ccc(p, torch.ones(4, 2))
    value.sum().backward()
    assert value.tolist() == [0, 0] and bool(p.grad.isfinite().all())
    p = torch.full((1, 2), 0.3, requires_grad=True)  # a batch of one clip has no variance
    mtpkdot.task_loss(p, torch.zeros(1, 2)).backward()
    assert bool(p.grad.isfinite().all())


def test_task_loss_follows_the_label():
    logits, label = normal(1, 6, 4), torch.tensor([0, 3, 2, 1, 1, 0])
    want = -np.mean([log_softmax(row)[c] for row, c in zip(logits.numpy(), label)])
    assert abs(mtpkdot.task_loss(logits, label).item() - want) < 1e-12
    p, y = normal(2, 6, 2), normal(3, 6, 2)
    assert abs(mtpkdot.task_loss(p, y).item() - (1 - mtpkdot.ccc(p, y).mean().item())) < 1e-12


def test_mmd_by_loops():
    x, y = normal(1, 5, 3), normal(2, 7, 3) + 1
    z = torch.cat([x, y]).numpy()
    squared = cdist(z, z, "sqeuclidean")
    base = squared[~np.eye(12, dtype=bool)].mean()
    kernel = sum(np.exp(-squared / (base * factor)) for factor in (0.25, 0.5, 1, 2, 4))
    want = kernel[:5, :5].mean() + kernel[5:, 5:].mean() - 2 * kernel[:5, 5:].mean()
    assert abs(mtpkdot.mmd(x, y).item() - want) < 1e-12 and want > 0
    assert abs(mtpkdot.mmd(x, x[torch.tensor([3, 0, 4, 1, 2])]).item()) < 1e-12
    assert mtpkdot.mmd(torch.ones(2, 3), torch.ones(2, 3)).item() == 0
    assert abs(mtpkdot.tnet_loss(x, y[:5]).item() - ((x - y[:5]).numpy() ** 2).mean()) < 1e-12
    assert mtpkdot.tnet_loss(x, y, "mmd").item() == mtpkdot.mmd(x, y).item()


# ---- stage 2 ----------------------------------------------------------------------------------------


def test_alignment_by_scipy_and_its_gradient_reaches_all_three():
    a_v, a_p, z_j = (normal(s, 8, 5).requires_grad_() for s in (1, 2, 3))
    loss = mtpkdot.alignment_loss(a_v, a_p, z_j)
    want = sum(np.diag(cdist(a.detach().numpy(), z_j.detach().numpy(), "cosine")).mean() for a in (a_v, a_p))
    assert abs(loss.item() - want) < 1e-12
    loss.backward()
    assert all(float(t.grad.abs().sum()) > 0 for t in (a_v, a_p, z_j))
    assert abs(mtpkdot.alignment_loss(2 * z_j, 3 * z_j, z_j).item()) < 1e-12


def test_align_stage_loss_at_the_released_weights():
    assert abs(mtpkdot.align_stage_loss(0.7, 1.1, 1.3, 1.7) - (0.5 * 0.7 + 0.5 * (1.1 + 0.5 * 1.3 + 0.5 * 1.7))) < 1e-12


# ---- stage 3 ----------------------------------------------------------------------------------------


def test_choose_teacher_takes_the_least_and_falls_back_on_joint():
    assert mtpkdot.TEACHERS[0] == "joint"
    for losses, index in (([0.3, 0.2, 0.1], 2), ([0.3, 0.1, 0.2], 1), ([0.1, 0.1, 0.1], 0), ([0.5, 0.1, 0.1], 1)):
        assert mtpkdot.choose_teacher(torch.tensor(losses)).item() == index


def test_similarity_against_scipy():
    z = normal(1, 9, 6)
    S = mtpkdot.similarity(z)
    assert np.abs(S.numpy() - similarity_by_scipy(z)).max() < 1e-12
    z[4] = 0
    assert float(mtpkdot.similarity(z)[4].abs().max()) == 0
    assert mtpkdot.similarity(z.half()).dtype == torch.float32


@pytest.mark.parametrize("which", ["most", "least"])
def test_anchors_against_a_sort(which):
    S = mtpkdot.similarity(normal(1, 12, 4))
    columns = mtpkdot.anchors(S, 5, which)
    for i in range(12):
        order = np.argsort(S[i].numpy())
        assert columns[i].tolist() == (order[::-1] if which == "most" else order)[:5].tolist()
    if which == "most":
        assert columns[:, 0].tolist() == list(range(12))  # a clip is most similar to itself
    assert mtpkdot.anchors(S, 30, which).shape == (12, 12)


def test_anchors_refuses_other_names():
    with pytest.raises(ValueError, match='"most" or "least"'):
        mtpkdot.anchors(torch.eye(3), 2, "nearest")


@pytest.mark.parametrize("which", ["most", "least"])
def test_ot_loss_at_small_eps_is_an_assignment(which):
    """Uniform weights on both sides: without entropy, transport is an assignment, which scipy solves exactly."""
    z_t, z_s = normal(1, 20, 6), normal(2, 20, 6)
    S_t, S_s = similarity_by_scipy(z_t), similarity_by_scipy(z_s)
    rows_t, rows_s = np.zeros((20, 7)), np.zeros((20, 7))
    for i in range(20):
        order = np.argsort(S_t[i])
        for j, column in enumerate((order[::-1] if which == "most" else order)[:7]):
            rows_t[i, j], rows_s[i, j] = S_t[i, column] - S_t.min(), S_s[i, column] - S_s.min()
    cost = cdist(rows_t, rows_s, "sqeuclidean") / 2
    exact = cost[linear_sum_assignment(cost)].mean()
    settings = {"k": 7, "which": which, "shift": True, "eps": 1e-3, "tol": 1e-5, "max_iter": 10_000}
    S = mtpkdot.similarity(z_t), mtpkdot.similarity(z_s)
    entropic = mtpkdot.ot_loss(*S, **settings, debias=False).item()
    assert -1e-6 <= entropic - exact <= 1e-3 * math.log(20) + 1e-6  # KL is at most the marginals' entropy
    debiased = mtpkdot.ot_loss(*S, **settings).item()
    assert -1e-6 <= entropic - debiased <= 1e-3 * math.log(20) + 1e-6  # a cloud goes to itself for the entropy alone
    assert abs(mtpkdot.ot_loss(S[0], S[0], k=7, which=which, tol=1e-9).item()) < 1e-9


def test_ot_loss_ignores_a_constant_in_either_matrix_when_it_shifts_and_only_then():
    S_t, S_s = mtpkdot.similarity(normal(1, 20, 6)), mtpkdot.similarity(normal(2, 20, 6))
    for shift in (True, False):
        moved, plain = (mtpkdot.ot_loss(S_t - c, S_s + c, k=7, shift=shift).item() for c in (0.2, 0))
        assert (abs(moved - plain) < 1e-9) == shift


def test_centroid_by_numpy_and_finite_gradient_at_zero():
    z_t, z_s = normal(1, 10, 4), normal(2, 10, 4).requires_grad_()
    S_s = mtpkdot.similarity(z_s)
    want = np.linalg.norm(similarity_by_scipy(z_t).mean(0) - similarity_by_scipy(z_s.detach()).mean(0))
    assert abs(mtpkdot.centroid_loss(mtpkdot.similarity(z_t), S_s).item() - want) < 1e-12
    mtpkdot.centroid_loss(S_s.detach(), S_s).backward()
    assert bool(z_s.grad.isfinite().all())


def test_student_loss_is_the_weighted_sum_and_spares_the_teacher():
    label, prediction = torch.randint(4, (40,), generator=torch.Generator().manual_seed(1)), normal(1, 40, 4)
    z_s, z_t = normal(2, 40, 8).requires_grad_(), normal(3, 40, 8).requires_grad_()
    terms = mtpkdot.student_loss(prediction, label, z_s, z_t, 0.8, 0.2, 0.3, k=9)
    S_t, S_s = mtpkdot.similarity(z_t), mtpkdot.similarity(z_s)
    want = 0.8 * mtpkdot.task_loss(prediction, label) + 0.2 * mtpkdot.ot_loss(S_t, S_s, k=9)
    want = want + 0.3 * mtpkdot.centroid_loss(S_t, S_s)
    assert abs(terms["loss"].item() - want.item()) < 1e-9 and set(terms) == {"loss", "task", "ot", "centroid"}
    terms["loss"].backward()
    assert z_t.grad is None and float(z_s.grad.abs().sum()) > 0


def test_student_loss_gradient_by_finite_differences():
    label, prediction = normal(1, 12, 2), normal(2, 12, 2).requires_grad_()
    z_t, z_s = normal(3, 12, 5), normal(4, 12, 5).requires_grad_()

    def loss(prediction, z_s):
        return mtpkdot.student_loss(prediction, label, z_s, z_t, k=4, eps=0.1, tol=1e-12, max_iter=20_000)["loss"]

    assert torch.autograd.gradcheck(loss, (prediction, z_s))


def relational(z_s, z_t):
    """Park et al. (2019) by loops over pairs and triples."""

    def huber(gap):
        return np.where(np.abs(gap) < 1, gap**2 / 2, np.abs(gap) - 0.5)

    pairs, triples = [], []
    for z in (z_s.detach().numpy(), z_t.detach().numpy()):
        n, d = len(z), cdist(z, z)
        pairs.append(d / d[~np.eye(n, dtype=bool)].mean())
        e = np.array([[(z[j] - z[i]) / d[i, j] if i != j else 0 * z[i] for j in range(n)] for i in range(n)])
        triples.append(np.array([[[e[i, j] @ e[i, k] for k in range(n)] for j in range(n)] for i in range(n)]))
    return huber(pairs[0] - pairs[1]).mean() + 2 * huber(triples[0] - triples[1]).mean()


def test_relational_gradient_is_finite_where_clips_coincide():
    z = normal(1, 6, 3)[[0, 0, 1, 2, 3, 4]].requires_grad_()
    mtpkdot.relational(z, normal(2, 6, 3)).backward()
    assert bool(z.grad.isfinite().all()) and float(z.grad.abs().max()) < 1e3


def test_baselines_are_their_formulas():
    label, prediction, z_s, z_j = normal(1, 16, 2), normal(2, 16, 2), normal(3, 16, 5), normal(4, 16, 5)
    task = mtpkdot.task_loss(prediction, label).item()
    transport = mtpkdot.ot_loss(mtpkdot.similarity(z_j), mtpkdot.similarity(z_s), k=4).item()
    mse = ((z_s - z_j).numpy() ** 2).mean()
    cosine = np.diag(cdist(z_s.numpy(), z_j.numpy(), "cosine")).mean()
    losses = [
        (mtpkdot.pkdot_loss(prediction, label, z_s, z_j, 0.6, k=4), task + 0.6 * transport),
        (mtpkdot.feature_loss(prediction, label, z_s, z_j, "mse", 0.7), task + 0.7 * mse),
        (mtpkdot.feature_loss(prediction, label, z_s, z_j, "cosine", 0.7), task + 0.7 * cosine),
        (mtpkdot.feature_loss(prediction, label, z_s, z_j, "rkd", 0.7), task + 0.7 * relational(z_s, z_j)),
    ]
    for terms, want in losses:
        assert abs(terms["loss"].item() - want) < 1e-9


def test_a_step_of_distillation_brings_the_student_closer():
    """The gradients point the right way: descent on either structural term reduces it."""
    z_t, z_s = normal(1, 64, 16), normal(2, 64, 16).requires_grad_()
    S_t = mtpkdot.similarity(z_t)
    for loss in (lambda S: mtpkdot.ot_loss(S_t, S, k=10, eps=0.05), lambda S: mtpkdot.centroid_loss(S_t, S)):
        before = loss(mtpkdot.similarity(z_s))
        (grad,) = torch.autograd.grad(before, z_s)
        after = loss(mtpkdot.similarity(z_s.detach() - 1e-2 * grad / grad.norm()))
        assert after.item() < before.item()
