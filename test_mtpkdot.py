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
    label, said = normal(4, 8, 2), normal(5, 8, 3, 2).requires_grad_()
    joint, visual, privileged = (1 - lin(one, label).mean() for one in said.unbind(1))

    def align(said, *z):
        return mtpkdot.align_loss(label, torch.stack(z, dim=1), said)

    got = align(said, z_j, a_v, a_p)
    close(got["align"], want)
    close(got["loss"], 0.5 * want + 0.5 * joint + 0.25 * (visual + privileged))
    assert gradcheck(lambda *x: align(*x)["loss"], (said, z_j, a_v, a_p))
    close(mtpkdot.tnet_loss(a_v, a_p), ((a_v - a_p).detach().numpy() ** 2).mean())


def test_choose_teacher_takes_the_least_and_of_equals_the_first_which_is_joint():
    for off, want in (((3, 2, 1), 2), ((3, 1, 2), 1), ((1, 1, 1), 0), ((5, 1, 1), 1)):
        said = normal(1, 9, 1, 2) + torch.tensor(off).view(3, 1)
        assert mtpkdot.choose_teacher(normal(1, 9, 2), said).item() == want


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


EXACT = {"k": 7, "eps": 0.1, "tol": 1e-12}


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


@pytest.mark.parametrize("method", mtpkdot.METHODS)
def test_student_loss_of_every_method_spares_the_teachers(method):
    prediction, label = normal(1, 20, 2).requires_grad_(), normal(2, 20, 2)
    z_s, z_teachers = normal(3, 20, 6).requires_grad_(), normal(4, 20, 3, 6).requires_grad_()
    said = normal(6, 20, 3, 2).requires_grad_()
    _, candidates, weights = mtpkdot.METHODS[method]
    columns = [mtpkdot.TEACHERS.index(teacher) for teacher in candidates]
    chosen = max(columns, key=lambda i: lin(said[:, i], label).mean())
    z_t, said_t = z_teachers[:, chosen], said[:, chosen]
    want = {
        "task": 1 - lin(prediction, label).mean(),
        "ot": ot(z_t, z_s),
        "centroid": np.linalg.norm(cosine(z_t, z_t).mean(0) - cosine(z_s, z_s).mean(0)),
        "mse": cdist(z_s.detach(), z_t.detach(), "sqeuclidean").diagonal().mean() / 6,
        "cosine": np.diag(cosine(z_s, z_t)).mean(),
        "rkd": relational(z_s, z_t),
        "kd": ((prediction - said_t) ** 2).mean().item(),
    }
    given = {"w_ot": 0.2, "w_centroid": 0.3}

    def terms_of(*mine):
        return mtpkdot.student_loss(method, label, *mine, z_teachers, said, given, **EXACT)

    terms, expected = terms_of(z_s, prediction), {name: want[name] for name in weights}
    expected["loss"] = sum(given.get(w, w) * want[name] for name, w in weights.items())
    expected.update({teacher: i == chosen for teacher, i in zip(candidates, columns)})
    assert {name: t.item() for name, t in terms.items()} == pytest.approx(expected, rel=1e-8)
    gradients = grad(terms["loss"], (prediction, z_s, z_teachers, said), allow_unused=True)
    apart = weights.keys() <= {"task", "kd"}
    assert [g is None for g in gradients] == [False, apart, True, True]
    assert gradcheck(lambda *x: terms_of(*x)["loss"], (z_s, prediction), fast_mode=True)


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
