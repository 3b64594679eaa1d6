"""The method's functions against NumPy and SciPy in float64; gradients by finite differences."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.special import huber, log_softmax, rel_entr, softmax
from torch.autograd import grad, gradcheck

import mtpkdot


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.manual_seed(seed), dtype=torch.float64)


def close(got, want):
    np.testing.assert_allclose(got.detach(), want, rtol=1e-8, atol=1e-12)


def cosine(x, y):
    return cdist(x.detach(), y.detach(), "cosine")


def lin(p, y):
    """Lin's coefficient of each column, from Pearson's."""
    p, y = p.detach().numpy(), y.numpy()
    covariance = [np.corrcoef(*pair)[0, 1] for pair in zip(p.T, y.T)] * p.std(0) * y.std(0)
    return 2 * covariance / (p.var(0) + y.var(0) + (p.mean(0) - y.mean(0)) ** 2)


def test_ccc_is_lins_and_task_loss_cross_entropy():
    p, y = normal(1, 50, 3), normal(2, 50, 3)
    close(mtpkdot.ccc(p, y), lin(p, y))
    for constant in (y[:1], y[:1].expand(4, 3)):  # nothing to agree about
        assert mtpkdot.ccc(constant, constant + 1).tolist() == [0, 0, 0]
        assert mtpkdot.ccc(constant, constant).tolist() == [0, 0, 0]
    rows, label = np.arange(50), torch.arange(50) % 3
    close(mtpkdot.task_loss(p, label), -log_softmax(p.numpy(), axis=1)[rows, label].mean())


def test_alignment_by_scipy_and_its_gradient():
    a_v, a_p, z_j = (normal(seed, 8, 5).requires_grad_() for seed in (1, 2, 3))
    want = np.diag(cosine(a_v, z_j)).mean() + np.diag(cosine(a_p, z_j)).mean()
    close(mtpkdot.alignment_loss(a_v, a_p, z_j), want)
    assert gradcheck(mtpkdot.alignment_loss, (a_v, a_p, z_j))
    assert mtpkdot.align_stage_loss(0.7, 1.1, 1.3, 1.7) == pytest.approx(0.5 * 0.7 + 0.5 * 2.6)
    close(mtpkdot.tnet_loss(a_v, a_p), ((a_v - a_p).detach().numpy() ** 2).mean())


def test_choose_teacher_takes_the_least_and_falls_back_on_joint():
    cases = [(0.3, 0.2, 0.1), (0.3, 0.1, 0.2), (0.1, 0.1, 0.1), (0.5, 0.1, 0.1)]
    assert [mtpkdot.choose_teacher(torch.tensor(losses)).item() for losses in cases] == [2, 1, 0, 1]
    assert mtpkdot.TEACHERS[0] == "joint"


def test_similarity_by_scipy_and_anchors_by_a_sort():
    z = normal(1, 12, 4)
    S, want = mtpkdot.similarity(z), 1 - cosine(z, z)
    close(S, want)
    for k, which in ((5, "most"), (5, "least"), (30, "most"), (30, "least")):
        order = np.argsort(-want if which == "most" else want)
        assert mtpkdot.anchors(S, k, which).tolist() == order[:, :k].tolist()
    with pytest.raises(ValueError, match='"most" or "least"'):
        mtpkdot.anchors(S, 2, "nearest")
    z[4] = 0
    assert not mtpkdot.similarity(z)[4].any()


def transport(x, y, eps=0.1):
    """Entropic OT of two clouds of n points: Sinkhorn's sweeps, and the value of the dual."""
    K, v, n = np.exp(-cdist(x, y, "sqeuclidean") / 2 / eps), np.ones(len(y)), len(x)
    for _ in range(2000):
        v = n / (K.T @ (n / (K @ v)))
    return eps * np.log(n / (K @ v) * v).mean()


def ot(z_t, z_s, which="most", shift=False, debias=True):
    S_t, S_s = 1 - cosine(z_t, z_t), 1 - cosine(z_s, z_s)
    columns = np.argsort(-S_t if which == "most" else S_t)[:, :7]
    if shift:
        S_t, S_s = S_t - S_t.min(), S_s - S_s.min()
    x, y = np.take_along_axis(S_t, columns, 1), np.take_along_axis(S_s, columns, 1)
    return transport(x, y) - debias * (transport(x, x) + transport(y, y)) / 2


EXACT = {"k": 7, "eps": 0.1, "tol": 1e-12, "max_iter": 5000}


@pytest.mark.parametrize("options", [{}, {"which": "least"}, {"shift": True}, {"debias": False}])
def test_ot_loss_against_sinkhorn_in_numpy(options):
    z_t, z_s = normal(1, 20, 6), normal(2, 20, 6)
    S = mtpkdot.similarity(z_t), mtpkdot.similarity(z_s)
    close(mtpkdot.ot_loss(*S, **EXACT, **options), ot(z_t, z_s, **options))


def relational(z_s, z_t):
    """Park et al. (2019): all pairs, and the triples with one of the first 16 at the vertex."""
    pairs, angles = [], []
    for z in (z_s.detach().numpy(), z_t.detach().numpy()):
        d, same = cdist(z, z), np.eye(len(z))
        pairs.append(d / d[same == 0].mean())
        unit = (z[None] - z[:, None]) / (d + same)[:, :, None]
        angles.append([unit[i] @ unit[i].T for i in range(16)])
    return huber(1, np.subtract(*pairs)).mean() + 2 * huber(1, np.subtract(*angles)).mean()


def test_student_loss_of_every_method_and_its_gradients_which_spare_the_teacher():
    prediction, label = normal(1, 20, 2).requires_grad_(), normal(2, 20, 2)
    z_s, z_t = normal(3, 20, 6).requires_grad_(), normal(4, 20, 6).requires_grad_()
    said = normal(5, 20, 2).requires_grad_()
    want = {
        "task": 1 - lin(prediction, label).mean(),
        "ot": ot(z_t, z_s),
        "centroid": np.linalg.norm(cosine(z_t, z_t).mean(0) - cosine(z_s, z_s).mean(0)),
        "mse": cdist(z_s.detach(), z_t.detach(), "sqeuclidean").diagonal().mean() / 6,
        "cosine": np.diag(cosine(z_s, z_t)).mean(),
        "rkd": relational(z_s, z_t),
        "kd": ((prediction - said) ** 2).mean().item(),
    }

    def terms_of(prediction, z_s):
        return mtpkdot.student_loss(weights, prediction, label, z_s, z_t, said, **EXACT)

    methods = [{"task": 1}, {"task": 1, "ot": 0.6}, {"task": 0.8, "ot": 0.2, "centroid": 0.3}]
    for weights in methods + [{"task": 1, name: 0.7} for name in ("mse", "cosine", "rkd", "kd")]:
        terms = terms_of(prediction, z_s)
        expected = {name: want[name] for name in weights}
        expected["loss"] = sum(weight * want[name] for name, weight in weights.items())
        assert {name: t.item() for name, t in terms.items()} == pytest.approx(expected, rel=1e-8)
        gradients = grad(terms["loss"], (prediction, z_s, z_t, said), allow_unused=True)
        apart = weights.keys() <= {"task", "kd"}
        assert [g is None for g in gradients] == [False, apart, True, True]
        assert gradcheck(lambda *x: terms_of(*x)["loss"], (prediction, z_s), fast_mode=True)


def test_distillation_of_classes_is_the_divergence_of_softened_ones():
    p, q, label = normal(1, 9, 4), normal(2, 9, 4), torch.arange(9) % 4
    soft_p, soft_q = softmax(p.numpy() / 4, 1), softmax(q.numpy() / 4, 1)
    want = 16 * rel_entr(soft_q, soft_p).sum(1).mean()
    close(mtpkdot.logit_distillation(p, q, label), want)


def test_gradients_are_finite_where_clips_coincide():
    z = normal(1, 6, 3)[[0, 0, 1, 2, 3, 4]].requires_grad_()
    S = mtpkdot.similarity(z)
    losses = [mtpkdot.relational(t, normal(2, 6, 3)) for t in (z, 0 * z)]
    losses += [mtpkdot.centroid_loss(S.detach(), S)]
    for rows, gap in ((2, 0), (2, 1), (1, 1)):  # a constant column, or a single clip
        losses.append(mtpkdot.task_loss(z[:rows], z[:rows].detach() + gap))
    for loss in losses:
        (gradient,) = grad(loss, z, retain_graph=True)
        assert bool(gradient.isfinite().all()) and float(gradient.abs().max()) < 1e3
