"""Train MT-PKDOT: teachers see two views of every clip, a student learns to do with one.

    python train.py                                     all three stages on small synthetic data
    python train.py --dataset affwild2 --stage all      on Aff-Wild2, laid out as README says

Read from top to bottom:
    options     what can be set, stage by stage
    files       one a network: what is there is loaded, what is not is made
    fit         the one training loop, which every network goes through
    teachers    stage 1: a backbone for each view, the joint teacher, T-Net
    align       stage 2: adapters and heads learn with the joint teacher
    student     stage 3: a student of mtpkdot.METHODS
    evaluate    a saved student on new data, from its visual view alone
    report      results.json, history.csv, the table, pictures

Views, labels and embeddings of all clips stay on the host. Networks and the batch in hand are on
the device: `forward` takes a batch there, `predict` brings the outputs back.
"""

import argparse
import csv
import io
import json
import math
import os
import signal
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import distributed, nn
from tqdm import tqdm

import data as datasets
import models
import mtpkdot
from mtpkdot import METHODS, TEACHERS

VIEWS = ("visual", "privileged")
STAGES = ("teachers", "align", "student")
# Under torchrun each process computes its part of a batch, then the loss of all; the first saves.
PROCESSES, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))

# ---- options ----
# Of each section: (name, default, meaning). A tuple is all that can be chosen, the default first.
OPTIONS = {
    "run": [
        ("preset", ("none", "released"), "defaults of the authors' code"),
        ("data", "", "file or folder; else data/DATASET"),
        ("stage", ("all", *STAGES, "eval"), "the last stage to make, or eval: to score"),
        ("method", "mtpkdot,task,visual", "students of METHODS, with commas, or all"),
        ("out", "", "folder of the run; else runs/DATASET"),
        ("fold", -1, "the only fold to train, from 0; -1 is all"),
        ("seeds", 1, "how many seeds, from --seed on"),
        ("student", "", "eval: file of the student"),
        ("predictions", "", "eval: .csv file to write"),
        ("device", ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",), "where it runs"),
        ("workers", min(8, os.cpu_count() or 1), "processes that read raw data"),
    ],
    "data": [
        ("dataset", ("synthetic", "features", "affwild2", "biovid"), "data, with its own defaults"),
        ("seed", 0, "of folds, initial weights and batches"),
        ("folds", 0, "number of folds; 0 is the data's own split, or 5"),
        ("select", ("train", "val"), "who chooses epochs: a fifth of the training people, or val"),
        ("train-rows", 0, "rows of a fold to train on and choose by; 0 is all"),
        ("clip-stride", 1, "affwild2: a clip for every N-th frame"),
        ("batch-size", 128, "clips of a batch, at most"),
        ("epochs", 0, "of every network, in place of --updates and --epochs-..."),
        ("updates", 200, "of every network, at the least"),
        ("dim", models.DIM, "size of an embedding, even"),
        ("width", 64, "of the first stage of 18-layer networks"),
    ],
    "teachers": [
        ("visual-weights", "", "file of published r3d_18 weights"),
        ("privileged-weights", "", "file of published resnet18 weights"),
        ("epochs-backbone", 30, "at the least; see --updates"),
        ("epochs-joint", 30, "of the joint teacher and of T-Net"),
        ("lr-backbone", 1e-3, "learning rate"),
        ("lr-joint", 5e-4, "learning rate"),
        ("lr-tnet", 5e-4, "learning rate"),
        ("dropout", 0.25, "of the vector encoder's hidden units; of a whole view at fusion"),
    ],
    "align": [
        ("epochs-align", 40, "at the least"),
        ("lr-adapter", 2e-4, "learning rate, of the heads too"),
    ],
    "student": [
        ("student-backbone", ("finetune", "frozen"), "the visual backbone in stage 3"),
        ("epochs-student", 10, "at the least"),
        ("lr-student", 1e-3, "learning rate"),
        ("dropout-student", 0.25, "as --dropout, of every student"),
        ("k", 30, "anchors of a clip"),
        ("anchors", ("most", "least"), "the k most or least similar clips"),
        ("shift", ("none", "min"), "min: similarities less their minimum before OT"),
        ("eps", 0.01, "entropy of OT, in units of its cost"),
        ("ot", ("debiased", "entropic"), "form of OT"),
        ("w-ot", 0.2, "weight of OT in mtpkdot's loss"),
        ("w-centroid", 0.02, "weight of the centroid in it"),
    ],
}
# Least values. Otherwise 0 for floats; for integers 1, or the default if lower.
LEAST = {"batch_size": 4 * PROCESSES, "updates": 0, "workers": 0, "eps": 1e-9}
DEFAULTS = {  # of a --dataset or --preset, where they differ
    "synthetic": {"dim": 128, "width": 4, "updates": 100},
    "features": {"dim": 128, "epochs_backbone": 100},
    "released": {  # Source: released code; lr_joint is ours
        "dim": models.DIM, "updates": 0, "select": "val", "lr_joint": 1e-4, "lr_tnet": 5e-5,
        "dropout": 0.0, "lr_adapter": 5e-3, "epochs_align": 10, "student_backbone": "frozen",
        "lr_student": 5e-4, "dropout_student": 0.0, "anchors": "least", "shift": "min",
        "w_centroid": 0.2,
    },
}


def refuse(message):
    """End with one line for the user, and exit code 2."""
    raise datasets.DataError(message)


def options(argv=None):
    """The arguments, checked and completed."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = refuse
    for title, settings in OPTIONS.items():
        section = parser.add_argument_group(title)
        for name, default, meaning in settings:
            how = {"default": default, "type": type(default)}
            if isinstance(default, tuple):
                how = {"default": default[0], "choices": default}
            section.add_argument(f"--{name}", help=meaning, **how)
    first = parser.parse_args(argv)
    for chosen in (first.dataset, first.preset):
        parser.set_defaults(**DEFAULTS.get(chosen, {}))
    if first.student:  # its data is read as it was in training
        made = read(first.student, lambda saved: saved["origin"])
        parser.set_defaults(dataset=made["dataset"], clip_stride=made["clip_stride"])
    args = parser.parse_args(argv)

    for name, value in vars(args).items():
        least = LEAST.get(name, min(1, parser.get_default(name)) if isinstance(value, int) else 0)
        if isinstance(value, (int, float)) and not least <= value < 2**63:
            refuse(f"argument --{name.replace('_', '-')}: {value} is not a number from {least} on")
    if bool(args.student) != (args.stage == "eval") or args.predictions and not args.student:
        refuse("arguments: --stage eval goes with a --student, --predictions with both")
    args.method = list(METHODS) if args.method == "all" else args.method.split(",")
    if not set(args.method) <= set(METHODS):
        refuse(f"argument --method: all, or some of {', '.join(METHODS)}, with commas")
    if args.dim % 2 or max(args.dropout, args.dropout_student) >= 1:
        refuse("arguments: --dim must be even, --dropout and --dropout-student below 1")
    return args


# ---- files ----
# A fold's folder holds STAGE_NAME.pt (or align.pt) of each network, saved after every epoch. The
# same command given again loads what is there and makes the rest. A `run` is the arguments and what
# a seed and a fold add: data, fold number, folder, rows to train on, to choose by, val to score.


def origin(run, name):
    """What a file is made from: the data, and the arguments of its stage and of earlier ones."""
    sections = ["data", *STAGES[: STAGES.index(name.partition("_")[0]) + 1]]
    keys = [key.replace("-", "_") for section in sections for key, *_ in OPTIONS[section]]
    return {"data": run.content, **{key: getattr(run, key) for key in keys}}


def save(run, name, saved):
    """Save a dict with its origin, by way of a temporary file: no kill leaves half a file."""
    if RANK == 0:
        path, file = run.folder / f"{name}.pt", io.BytesIO()
        torch.save({**saved, "origin": origin(run, name)}, file)
        path.with_suffix(".tmp").write_bytes(file.getbuffer())
        path.with_suffix(".tmp").replace(path)
    if PROCESSES > 1:
        distributed.barrier()


def read(path, use=dict):
    """use(what is in a file of torch.save), on the host. A damaged or foreign file is refused."""
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise ValueError("wrong checksum")
        return use(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}, {error}".split())[:200]
        refuse(f"{path}: missing, damaged or another file ({reason})")


def load(run, name):
    """What the file holds, or, if there is none, {origin} alone. Another origin is refused."""
    path, mine = run.folder / f"{name}.pt", origin(run, name)
    saved = read(path) if path.exists() else {"origin": mine}
    theirs = saved.get("origin", {})
    differ = [key for key in mine if theirs.get(key) != mine[key]]
    if differ:
        pairs = [f"--{k.replace('_', '-')} ({theirs.get(k)}, now {mine[k]})" for k in differ]
        refuse(f"{path} is of a run with other {', '.join(pairs)}; use another --out")
    return saved


def seed_everything(run, part):
    """What is random depends on seed, fold and part of the run, not on what ran before."""
    torch.manual_seed(zlib.crc32(repr((run.seed, run.number, part)).encode()))


def task_score(data, prediction, rows):
    """Accuracy in 0..1, or {column: CCC, ..., "mean": their mean}."""
    label = data.label[rows]
    if data.task == "classification":
        return (prediction.argmax(1) == label).double().mean().item()
    columns = mtpkdot.ccc(prediction.double(), label.double()).tolist()
    return {**dict(zip(data.names, columns)), "mean": float(np.mean(columns))}


def headline(score):
    return score["mean"] if isinstance(score, dict) else score


def forward(run, network, view, batches):
    """Yield each batch of rows, and the network's outputs: embeddings, predictions (B, ...)."""
    parts = [rows.tensor_split(PROCESSES)[RANK] for rows in batches]
    for rows, x in zip(batches, datasets.batches(view, parts, run.workers, run.device == "cuda")):
        outputs = network(x.to(run.device, non_blocking=True))
        outputs = [models.gathered(part, len(rows)) for part in outputs]
        if not all((t.abs() < 1e15).all() for t in outputs):  # so that squares are finite
            refuse("outputs are NaN or too large: lower an --lr-..., with another --out")
        yield rows, outputs


@torch.no_grad()
def predict(run, network, view, rows):
    """The network's outputs for these rows, on the host: tensors (len(rows), ...)."""
    network.eval()
    batches = rows.tensor_split(math.ceil(len(rows) / run.batch_size))
    outputs = [said for _, said in forward(run, network, view, batches)]
    return [torch.cat([t.cpu() for t in kind]) for kind in zip(*outputs)]


def fit(run, name, network, rate, epochs, view, loss_of, full=None, score=task_score, names=None):
    """Train with Adam, at rates that fall to 0, and leave the kept epoch in the file `name`.

    loss_of  (rows, label, outputs...) -> dict of scalars, of which "loss" is minimised
    full     what is saved, where `network` is a part of it
    score    (data, predictions for rows, rows) -> a model's score
    names    names of the models, where the network holds several
    """
    saved = {"history": [], "best": -math.inf, **load(run, name)}
    if "scores" in saved:
        return

    # Batches of nearly equal size, two clips at least: similarities in a runt mean nothing.
    steps = math.ceil(len(run.train) / run.batch_size)
    epochs = run.epochs or max(epochs, math.ceil(run.updates / steps))
    rates = rate if isinstance(rate, dict) else {network: rate}
    groups = [{"params": part.parameters(), "lr": rates[part]} for part in rates]
    optimizer = torch.optim.Adam(groups, fused=True)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, epochs * steps)
    stage, _, model = name.partition("_")
    full, names = full or network, names or [model]
    parallel = nn.parallel.DistributedDataParallel(network) if PROCESSES > 1 else network

    def scored(rows):
        z, said = (t.view(len(rows), len(names), -1) for t in predict(run, parallel, view, rows))
        return z, {model: score(run.data, said[:, i], rows) for i, model in enumerate(names)}

    # Go on where the same command stopped.
    parts = {"network": network, "optimizer": optimizer, "decay": decay}
    if saved["history"]:
        for key, part in parts.items():
            part.load_state_dict(saved[key])
    for epoch in range(len(saved["history"]) + 1, epochs + 1):
        # Train on every row once, in the order that every network gets.
        seed_everything(run, epoch)
        parallel.train()
        order = run.train[torch.randperm(len(run.train))].tensor_split(steps)
        clips = view.sampled(torch.randint(2**31, ()).item()) if hasattr(view, "sampled") else view
        if RANK:
            seed_everything(run, (epoch, RANK))  # dropout of its own
        batches, means = forward(run, parallel, clips, order), {}
        for rows, outputs in tqdm(batches, name, steps, leave=False, disable=RANK or None):
            terms = loss_of(rows, run.data.label[rows].to(run.device), *outputs)
            optimizer.zero_grad()
            terms["loss"].backward()
            optimizer.step()
            decay.step()
            for term, value in terms.items():
                means[term] = means.get(term, 0) + value.detach() * (len(rows) / len(run.train))

        # Score it on the rows to choose by. Keep the best epoch, of align's three models the last.
        now = float(np.mean([headline(value) for value in scored(run.choose)[1].values()]))
        if now > saved["best"] or name == "align":
            weights = {key: t.cpu().clone() for key, t in full.state_dict().items()}
            saved.update(best=now, weights=weights)

        # Save all that is needed to go on.
        row = {"seed": run.seed, "fold": run.number, "model": name, "epoch": epoch, "score": now}
        row.update({term: value.item() for term, value in means.items()})
        saved.update({key: part.state_dict() for key, part in parts.items()})
        saved["history"] = [*saved["history"], row]
        save(run, name, saved)
        place = f"seed {run.seed}  fold {run.number}  {name:<26}  epoch {epoch:>3}/{epochs}"
        if RANK == 0:
            print(f"{place}  loss {row['loss']:.4f}  score {now:.4f}", flush=True)

    # Score the kept epoch on the validation rows. Save what is needed to use and show it.
    full.load_state_dict(saved["weights"])
    z, scores = scored(run.val)
    shown = {f"{stage} {n}": mtpkdot.similarity(z[run.shown, i]) for i, n in enumerate(names)}
    final = {"weights": saved["weights"], "history": saved["history"], **run.about}
    save(run, name, {**final, "shown": shown, "scores": scores})


def single(run, view, trained=False, dropout=0.0):
    """The network of one view, a backbone with a head: of stage 1, or as it starts."""
    source, published = getattr(run.data, view), getattr(run, f"{view}_weights")
    encoder = models.backbone(source.shape[1:], run.dim, run.width, dropout)
    network = models.Single(encoder, nn.Linear(run.dim, len(run.data.names)))
    if trained:
        network.load_state_dict(load(run, f"teachers_{view}")["weights"])
    elif published:
        read(published, lambda weights: models.load_published(encoder, weights))
    elif isinstance(encoder, models.Encoder):
        encoder.fit_standardisation(source[run.train])
    return network.to(run.device)


def teachers(run):
    """Stage 1. Each backbone learns the task alone; then the joint teacher and T-Net learn from z,
    the embeddings of all clips (N, 2, D), which it returns."""

    def task_of(rows, label, z, prediction):
        return {"loss": mtpkdot.task_loss(prediction, label)}

    # A backbone with a head for each view. The visual one is the visual-only baseline.
    for view in VIEWS:
        seed_everything(run, view)
        network, source = single(run, view, dropout=run.dropout), getattr(run.data, view)
        fit(run, f"teachers_{view}", network, run.lr_backbone, run.epochs_backbone, source, task_of)

    # Their embeddings of all clips, loaded or made.
    z = load(run, "teachers_embeddings").get("z")
    if z is None:
        pairs = [(single(run, view, trained=True), getattr(run.data, view)) for view in VIEWS]
        z = torch.stack([predict(run, n, x, torch.arange(len(x)))[0] for n, x in pairs], dim=1)
        save(run, "teachers_embeddings", {"z": z})

    # The joint teacher: the fusion of both embeddings, which stay as they are.
    seed_everything(run, "joint")
    joint = models.Fusion(run.dim, len(run.data.names), run.dropout).to(run.device)
    fit(run, "teachers_joint", joint, run.lr_joint, run.epochs_joint, z, task_of)

    # T-Net: the privileged embedding, hallucinated from the visual one.
    seed_everything(run, "tnet")
    tnet = models.TNet(run.dim).to(run.device)

    def loss_of(rows, label, hallucinated, _):
        return {"loss": mtpkdot.tnet_loss(hallucinated, z[rows, 1].to(run.device))}

    def score(data, hallucinated, rows):
        return -mtpkdot.tnet_loss(hallucinated, z[rows, 1]).item()

    fit(run, "teachers_tnet", tnet, run.lr_tnet, run.epochs_joint, z[:, 0], loss_of, score=score)
    return z


def all_teachers(run, aligned):
    """The three teachers as stage 2 left them, or, without adapters, stage 1."""
    network = models.Teachers(run.dim, len(run.data.names), run.dropout, aligned)
    if aligned:
        network.load_state_dict(load(run, "align")["weights"])
    else:
        network.joint.load_state_dict(load(run, "teachers_joint")["weights"])
        for view in VIEWS:
            network.heads[view] = single(run, view, trained=True).head
    return network.to(run.device)


def align(run, z):
    """Stage 2. The adapted single embeddings and the joint one are pulled together."""
    # Stage 1's teachers, and adapters that start as projections.
    network = all_teachers(run, aligned=False)
    for i, view in enumerate(VIEWS):
        network.adapters[view] = models.Adapter(run.dim).to(run.device)
        network.adapters[view].start(z[run.train, i])

    def loss_of(rows, label, embeddings, predictions):
        return mtpkdot.align_loss(label, embeddings, predictions)

    # All three start good. Scores would choose an epoch before their embeddings are alike, so the
    # last is kept. The joint teacher's rate is the released code's.
    names = ["joint_aligned", *TEACHERS[1:]]  # "joint" is stage 1's
    rates = {network.joint: 1e-4, network.adapters: run.lr_adapter, network.heads: run.lr_adapter}
    fit(run, "align", network, rates, run.epochs_align, z, loss_of, names=names)


def student(run, method, z):
    """Stage 3. A student on visual input learns the task, and what its loss takes from a teacher.
    All but `visual` start from the same weights, all see the same batches. z: all embeddings."""
    teacher_net = all_teachers(run, aligned=METHODS[method][0]).eval().requires_grad_(False)
    how = {"k": run.k, "which": run.anchors, "shift": run.shift == "min", "eps": run.eps}
    how.update(debias=run.ot == "debiased", given=vars(run))  # of which w_ot, w_centroid

    # The student: the visual backbone of stage 1, T-Net, frozen, and a fusion of its own.
    seed_everything(run, "student")
    baseline = single(run, "visual", trained=True, dropout=run.dropout_student)
    tnet, view = models.TNet(run.dim), run.data.visual
    tnet.requires_grad_(False).load_state_dict(load(run, "teachers_tnet")["weights"])
    fusion = models.Fusion(run.dim, len(run.data.names), run.dropout_student)
    full = network = models.Student(baseline.encoder, tnet, fusion).to(run.device)
    if method == "visual":  # whose z_s is z_v
        full = network = baseline
    if run.student_backbone == "frozen":  # the same network, on embeddings instead of clips
        view, network = z[:, 0], models.on_embeddings(full)

    # Its loss on a batch: the best candidate is picked, then the terms are added up.
    def loss_of(rows, label, z_s, prediction):
        teachers = teacher_net(z[rows].to(run.device))
        return mtpkdot.student_loss(method, label, z_s, prediction, *teachers, **how)

    fit(run, f"student_{method}", network, run.lr_student, run.epochs_student, view, loss_of, full)


def evaluate(args):
    """Score a saved student on visual input, or write what it predicts."""
    network, saved = read(args.student, lambda saved: (models.load_student(saved), saved))
    data = datasets.load(args, need_privileged=False, need_label=not args.predictions)
    if list(data.visual.shape[1:]) != saved["input_shape"]:
        refuse(f"{args.student} is for {saved['input_shape']}, not {[*data.visual.shape[1:]]}")
    own = datasets.digest(data.visual) == saved["trained_on"]  # only its validation rows count
    rows = saved["val"] if own else torch.arange(len(data.visual))
    print(f"{args.student}: {len(rows)} {'validation rows' if own else 'rows'}")
    prediction = predict(args, network.to(args.device), data.visual, rows)[1]

    # A line a clip: probabilities of classes, or values.
    if args.predictions:
        name_of = str if torch.is_tensor(data.visual) else data.visual.name
        numbers = prediction.softmax(1) if saved["task"] == "classification" else prediction
        with open(os.devnull if RANK else args.predictions, "w", errors="surrogateescape") as file:
            lines = csv.writer(file, lineterminator="\n")
            lines.writerow(["name", *saved["names"]])
            clips = zip(rows.tolist(), numbers.tolist())
            lines.writerows([name_of(row), *values] for row, values in clips)
    else:
        if (data.task, data.names) != (saved["task"], saved["names"]):
            refuse(f"{args.student} predicts {saved['names']}, not {data.names}")
        print(f"Score: {cell(task_score(data, prediction, rows))}, {data.task} of {data.names}.")


# ---- report ----
NETWORKS = [f"teachers_{name}" for name in (*VIEWS, "joint", "tnet")]
NETWORKS += ["align", *(f"student_{method}" for method in METHODS)]


def report(args, data, runs):
    """Write, print and draw the results of all that the folder has."""
    reports, history, epochs, shown = [], [], {}, {}
    for run in runs:
        scores = {"seed": run.seed, "fold": run.number, "students": {}, "teacher_picks": {}}
        for name in NETWORKS:
            saved = load(run, name)
            (scores["students"] if "student" in name else scores).update(saved.get("scores", {}))
            history += saved.get("history", [])
            shown.update(saved.get("shown", {}))  # of the last run
            if name == "student_mtpkdot" and "scores" in saved:
                picks = {t: float(np.mean([row[t] for row in saved["history"]])) for t in TEACHERS}
                scores["teacher_picks"] = picks
        if "visual" in scores:
            reports.append(scores)

    result = summary(args, data, reports)
    (args.out / "results.json").write_text(f"{json.dumps(result, indent=2)}\n")
    with open(args.out / "history.csv", "w") as file:
        columns = dict.fromkeys(name for row in history for name in row)
        lines = csv.DictWriter(file, columns, lineterminator="\n")
        lines.writeheader()
        lines.writerows(history)
    show(args, data, result)
    for row in history:
        epochs.setdefault(row["model"], []).append((row["epoch"], row["score"]))
    draw(args.out / "history.png", epochs)
    draw(args.out / "similarity.png", shown)


def draw(path, panels):
    """Draw panels {title: points (epoch, score), or a matrix S(z)}."""
    try:
        from matplotlib.figure import Figure
    except Exception as error:  # import or settings
        return print(f"No {path} without matplotlib: {error}")
    rows = math.ceil(len(panels) / 5)
    figure = Figure((15, 3 * rows), layout="constrained")
    for place, (title, x) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, 5, place, title=title)
        axes.imshow(x, clim=(-1, 1)) if torch.is_tensor(x) else axes.plot(*zip(*x), ".")
    figure.savefig(path)


def merged(reports, statistic):
    """Nested dicts merged into one: the statistic of every number that all of them have."""
    if not isinstance(reports[0], dict):
        return statistic(reports)
    keys = [k for k in reports[0] if k not in ("seed", "fold") and all(k in r for r in reports)]
    return {key: merged([r[key] for r in reports], statistic) for key in keys}


def summary(args, data, reports):
    """What results.json holds: means and standard errors over the folds or, of several seeds, over
    the seeds; each student's paired differences to task and visual, with 95 % intervals."""
    units, seeds = reports, sorted({r["seed"] for r in reports})
    if len(seeds) > 1:
        units = [merged([r for r in reports if r["seed"] == seed], np.mean) for seed in seeds]
    metric = "accuracy" if data.task == "classification" else "ccc"
    result = {"dataset": args.dataset, "task": data.task, "metric": metric, "seed": args.seed}
    result.update(arguments=origin(args, "student"), folds=reports, mean=merged(units, np.mean))
    result["stderr"] = merged(units, lambda v: float(stats.sem(v)) if len(v) > 1 else None)
    students = result["mean"]["students"]
    for other in ("task", "visual"):
        less = result[f"less_{other}"] = {}
        for method in students:
            if len(units) > 1 and other in students and other != method:
                both = [[headline(u["students"][m]) for u in units] for m in (method, other)]
                gaps = np.subtract(*both)
                mean, margin = gaps.mean(), stats.sem(gaps) * stats.t.ppf(0.975, len(gaps) - 1)
                less[method] = {"mean": mean, "low": mean - margin, "high": mean + margin}
    return result


def cell(score, error=None):
    """A score as text: percent for an accuracy, each column's CCC for a regression."""
    text = f"{100 * headline(score):.1f}"
    if isinstance(score, dict):
        text = "/".join(f"{c:.3f}" for name, c in score.items() if name != "mean")
    return text if headline(error) is None else f"{text} ± {cell(error)}"


def show(args, data, result):
    """Print the scores, and each student's paired differences."""
    means, errors, picks = result["mean"], result["stderr"], result["mean"]["teacher_picks"]
    what = f"{result['metric']} of {'/'.join(map(str, data.names))}"
    print(f"\n{args.out}: {what} ± standard error; differences in points [95 % interval]")
    for model in means:
        if model not in ("tnet", "students", "teacher_picks"):
            print(f"{model.replace('_', ' '):<30}{cell(means[model], errors[model])}")
    for method, value in means["students"].items():
        line = f"student {method:<22}{cell(value, errors['students'][method]):<28}"
        for other in ("task", "visual"):
            gap = result[f"less_{other}"].get(method)
            if gap:
                mean, low, high = (100 * end for end in gap.values())
                line += f"  less {other} {mean:+.1f} [{low:+.1f}, {high:+.1f}]"
        print(line.rstrip())
    if picks:
        shares = (f"{teacher.replace('_', ' ')} {share:.0%}" for teacher, share in picks.items())
        print(f"Teachers that mtpkdot picked: {', '.join(shares)}.")


def train_all(args):
    """All stages that are asked for, seed by seed and fold by fold, then the report."""
    args.out = Path(args.out or f"runs/{args.dataset}")
    args.out.mkdir(parents=True, exist_ok=True)
    data = datasets.load(args, progress=lambda files: tqdm(files, "sound", disable=None))
    about = {"names": data.names, "task": data.task, "input_shape": list(data.visual.shape[1:])}
    about["trained_on"] = datasets.digest(data.visual)
    args.content = datasets.digest(about["trained_on"], *data[1:])

    # A run for each seed and fold. A folder of other arguments or data is refused here.
    runs = []
    for seed in range(args.seed, args.seed + args.seeds):
        rows = datasets.folds(data, args.folds, seed, args.train_rows, args.select == "train")
        if args.fold >= len(rows):
            refuse(f"argument --fold: the folds are 0 to {len(rows) - 1}")
        for number, (train, choose, val) in enumerate(rows):
            run = argparse.Namespace(**{**vars(args), "data": data, "seed": seed}, number=number)
            run.train, run.choose, run.val, run.about = train, choose, val, {**about, "val": val}
            shown = range(0, len(val), math.ceil(len(val) / 128))  # in similarity.png, by label
            run.shown = sorted(shown, key=lambda i: data.label[val[i]].tolist())
            run.folder = args.out / (f"seed{seed}" if args.seeds > 1 else "") / f"fold{number}"
            for name in reversed(NETWORKS):  # the last stage tells most
                load(run, name)
            runs.append(run)

    for run in runs:
        if args.fold in (-1, run.number):
            run.folder.mkdir(parents=True, exist_ok=True)
            z = teachers(run)
            if args.stage != "teachers":
                align(run, z)
            for method in args.method if args.stage in ("all", "student") else ():
                student(run, method, z)
    if RANK == 0:
        report(args, data, runs)


def main(argv=None):
    """A mistake ends the program with one line and exit code 2."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        args = options(argv)
        if PROCESSES > 1:
            if args.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            distributed.init_process_group("nccl" if args.device == "cuda" else "gloo")
        evaluate(args) if args.student else train_all(args)
        if PROCESSES > 1:
            sys.stdout.flush()
            os._exit(0)  # gloo's threads can abort an orderly exit
    except KeyboardInterrupt:
        sys.exit("train.py: stopped; the same command goes on from what was saved")
    except (datasets.DataError, OSError) as error:
        # A DataLoader worker's comes with its stack trace, whose last line is the message.
        text = str(error).rstrip().split("\n")[-1].removeprefix("data.DataError: ")
        print(f"train.py: {text}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
