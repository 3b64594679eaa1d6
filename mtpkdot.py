"""The method: what MT-PKDOT compares, which teacher it follows, and what it minimises.

Plain functions of tensors, in the order in which the three stages need them. B clips in a batch,
D numbers in an embedding, K outputs. z_j is the joint teacher's embedding, z_t that of the teacher
chosen for the batch, z_s the student's; S(z) holds the cosine similarities of the rows of z, B x B.

    stage 1, teachers   task_loss (ccc, cross-entropy)   tnet_loss
    stage 2, align      align_loss
    stage 3, student    choose_teacher  similarity  anchors  ot_loss  centroid_loss
                        METHODS, the table of all students   student_loss
    baselines           relational  logit_distillation

Docstrings name the source: the paper's abstract, the authors' released code, or our choice.
"""

import torch
import torch.nn.functional as F

from sinkhorn import sinkhorn_divergence

TEACHERS = ("joint", "adapted_visual", "adapted_privileged")  # in the order of models.Teachers


# ---- stage 1: the task, and T-Net ----


def ccc(prediction, label):
    """Lin's concordance correlation coefficient by column, (N, K) and (N, K) -> (K,) in [-1, 1].

    2 cov / (var + var + (difference of means)^2), with population moments; 0 where both columns are
    constant, as there is nothing to agree about. Source: the field's metric of valence and arousal.
    """
    p, y = prediction - prediction.mean(0), label - label.mean(0)
    gap = prediction.mean(0) - label.mean(0)
    spread = (p**2).mean(0) + (y**2).mean(0) + gap**2
    return 2 * (p * y).mean(0) / spread.clamp_min(torch.finfo(spread.dtype).tiny)


def task_loss(prediction, label):
    """Loss of the task itself, a scalar. Source: released code.

    Integer labels (B,): cross-entropy of logits (B, K). Float labels (B, K): 1 - CCC, mean over K.
    """
    if label.dtype.is_floating_point:
        return 1 - ccc(prediction, label).mean()
    return F.cross_entropy(prediction, label)


def tnet_loss(hallucinated, z_p):
    """Mean squared error, (B, D) and (B, D) -> scalar. Source: released code, which also has the
    maximum mean discrepancy (MMD) of the two clouds; that forgets which row belongs to which."""
    return F.mse_loss(hallucinated, z_p)


# ---- stage 2: alignment ----


def cosine_distance(x, y):
    """1 - cosine of each pair of rows, averaged; (B, D) and (B, D) -> scalar in [0, 2]."""
    return (1 - F.cosine_similarity(x, y, dim=-1)).mean()


def align_loss(label, embeddings, predictions):
    """0.5 align + 0.5 (task_loss of the joint teacher + mean of both adapted ones').

    align: cosine distance of both adapted embeddings to z_j, which gradients reach too. Embeddings
    (B, 3, D) and predictions (B, 3, K) in the order of TEACHERS. Source: released code.
    """
    z_j, a_v, a_p = embeddings.unbind(1)
    align = cosine_distance(a_v, z_j) + cosine_distance(a_p, z_j)
    joint, visual, privileged = (task_loss(said, label) for said in predictions.unbind(1))
    return {"loss": 0.5 * align + 0.5 * (joint + 0.5 * (visual + privileged)), "align": align}


# ---- stage 3: the student ----


def choose_teacher(label, predictions):
    """Index, a tensor, of the candidate of predictions (B, n, K) with the least task loss.

    The joint teacher is fallen back on where neither single one does better: it is the first of
    equals. Source: abstract, to avoid negative transfer; per batch, as in the released code.
    """
    return torch.stack([task_loss(said, label) for said in predictions.unbind(1)]).argmin()


def similarity(z):
    """S(z): cosine similarity of every pair of rows, (B, D) -> (B, B). A row of zeros gives 0."""
    z = F.normalize(z, dim=-1)
    return z @ z.T


def anchors(S_t, k=30, which="most"):
    """For every row the columns of its k "most" or "least" similar clips, as the teacher sees them.

    (B, B) -> (B, k), in order of similarity, the clip itself included; all if k is above B. Source:
    PKDOT's abstract speaks of top-k anchors that capture local structure, which reads as "most";
    the released code takes "least". Raises ValueError on any other word.
    """
    if which not in ("most", "least"):
        raise ValueError(f'which must be "most" or "least", not {which!r}')
    return S_t.topk(min(k, S_t.shape[1]), dim=1, largest=which == "most").indices


def ot_loss(S_t, S_s, k=30, which="most", shift=False, eps=0.01, debias=True, tol=1e-2):
    """Entropic optimal transport between the rows of the teacher's and the student's similarities.

    The teacher's anchors are gathered from both matrices (B, B), which gives (B, k) each: number j
    of a row is the similarity to the clip's own j-th anchor. OT of the rows, with uniform weights
    and cost |x - y|^2 / 2, is a scalar. `debias` subtracts half of each self-transport. `shift`
    first subtracts from each matrix its own minimum. Source: the paper states entropic OT;
    the released code shifts and debiases. No shift is ours: the minima differ, and that would count
    as a difference of structure. tol is enough for a training step (ours).
    """
    columns = anchors(S_t, k, which)
    if shift:
        S_t, S_s = S_t - S_t.min(), S_s - S_s.min()
    rows_t, rows_s = S_t.gather(1, columns), S_s.gather(1, columns)
    return sinkhorn_divergence(rows_t, rows_s, eps=eps, debias=debias, tol=tol)


def centroid_loss(S_t, S_s):
    """|| mean row of S_t - mean row of S_s ||_2, (B, B) each, unshifted. Source: released code."""
    return torch.linalg.vector_norm(S_t.mean(0) - S_s.mean(0))


JOINT = TEACHERS[:1]
STRUCTURE = {"task": 0.8, "ot": "w_ot", "centroid": "w_centroid"}
METHODS = {
    # student: (teachers aligned, those to choose among, {term of its loss: weight, or its option})
    "mtpkdot": (True, TEACHERS, STRUCTURE),
    "mtpkdot-unaligned": (False, TEACHERS, STRUCTURE),  # the single ones as stage 1 left them
    "mtpkdot-no-centroid": (True, TEACHERS, {"task": 0.8, "ot": "w_ot"}),
    "mtpkdot-joint": (True, JOINT, STRUCTURE),
    "mtpkdot-visual": (True, TEACHERS[1:2], STRUCTURE),
    "mtpkdot-privileged": (True, TEACHERS[2:], STRUCTURE),
    "pkdot": (False, JOINT, {"task": 1, "ot": 0.6}),  # Source: released code
    "mse": (False, JOINT, {"task": 1, "mse": 1}),
    "cosine": (False, JOINT, {"task": 1, "cosine": 1}),
    "rkd": (False, JOINT, {"task": 1, "rkd": 1}),
    "kd": (False, JOINT, {"task": 1, "kd": 1}),
    "task": (False, JOINT, {"task": 1}),  # the student without distillation
    "visual": (False, JOINT, {"task": 1}),  # the visual network of stage 1, trained further
}


def student_loss(method, label, z_s, prediction, z_teachers, predictions, given, **transport):
    """The loss of a student of METHODS: the weighted sum of the task's loss and its other terms.

    ot         optimal transport between the anchor similarities of z_t and of z_s
    centroid   distance between the centroids of S(z_t) and of S(z_s)
    mse, cosine, rkd   mean squared error, cosine distance, relational distillation of z_s and z_t
    kd         distillation of the predictions

    z_s (B, D) and prediction (B, K) are the student's; z_teachers (B, 3, D) and predictions
    (B, 3, K) all teachers', which get no gradient. `given` holds the weights that METHODS names;
    `transport` goes to ot_loss. Returns a dict: "loss", each term unweighted, and whether each
    candidate is chosen. Source: released code, 0.8 task + 0.2 ot, and 0.2 centroid commented out.
    """
    # Choose the teacher.
    _, candidates, weights = METHODS[method]
    columns = [TEACHERS.index(teacher) for teacher in candidates]
    chosen = choose_teacher(label, predictions[:, columns])
    z_t, prediction_t = (t[:, columns][:, chosen].detach() for t in (z_teachers, predictions))

    # Add up what the student minimises.
    S_t, S_s = similarity(z_t), similarity(z_s)
    compute = {
        "task": lambda: task_loss(prediction, label),
        "ot": lambda: ot_loss(S_t, S_s, **transport),
        "centroid": lambda: centroid_loss(S_t, S_s),
        "mse": lambda: F.mse_loss(z_s, z_t),
        "cosine": lambda: cosine_distance(z_s, z_t),
        "rkd": lambda: relational(z_s, z_t),
        "kd": lambda: logit_distillation(prediction, prediction_t, label),
    }
    terms = {name: compute[name]() for name in weights}
    loss = sum(given.get(weight, weight) * terms[name] for name, weight in weights.items())
    return {"loss": loss, **terms, **{name: chosen == i for i, name in enumerate(candidates)}}


# ---- distillations it is compared with ----


def relational(z_s, z_t, vertices=16):
    """Relational distillation, (B, D) and (B, D) -> scalar. Source: Park et al. (2019).

    Huber distance between the student's and the teacher's distances of all pairs, each in units of
    their mean, plus twice that between the cosines of the angles of triples. The vertex of a triple
    is one of the first `vertices` clips: a fair sample of a shuffled batch (ours, for time).
    """
    distances, angles = [], []
    for z in (z_s, z_t):
        gaps = z.unsqueeze(0) - z[:vertices].unsqueeze(1)
        d = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")
        distances.append(d * ((d > 0).sum() / d.sum().clamp_min(torch.finfo(d.dtype).tiny)))
        directions = gaps / d[:vertices].where(d[:vertices] > 0, 1).unsqueeze(-1)
        angles.append(directions @ directions.mT)
    return F.smooth_l1_loss(*distances) + 2 * F.smooth_l1_loss(*angles)


def logit_distillation(prediction, prediction_t, label, temperature=4.0):
    """Distance of predictions, (B, K) each -> scalar. Source: Hinton et al. (2015).

    KL(teacher | student) of softened classes, times temperature squared; or mean squared error.
    """
    if label.dtype.is_floating_point:
        return F.mse_loss(prediction, prediction_t)
    student, teacher = (F.log_softmax(p / temperature, -1) for p in (prediction, prediction_t))
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
