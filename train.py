"""Train MT-PKDOT: teachers see two views of every clip, a student learns to do with one.

    python train.py                                     all three stages on small synthetic data
    python train.py --dataset affwild2 --stage all      on Aff-Wild2, laid out as README says

Read from top to bottom:
    options     what can be set, stage by stage
    files       one a network: what is there is loaded, what is not is made
    processes   what torchrun shares out
    fit         the one training loop, which every network goes through
    teachers    stage 1: a backbone for each view, the joint teacher, T-Net
    align       stage 2: adapters and heads learn with the joint teacher
    student     stage 3: METHODS, the table of all students, and how one is trained
    evaluate    a saved student on new data, from its visual view alone
    report      results.json, history.csv, the table, the pictures
    main

Views, labels and embeddings of all clips stay on the host. Networks and the batch in hand are on
the device: `forward` takes a batch there, `predict` brings the outputs back.
"""

import csv
import io
import json
import math
import os
import signal
import sys
import warnings
import zlib
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import distributed, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import data as datasets
import models
import mtpkdot

VIEWS = ("visual", "privileged")
STAGES = ("teachers", "align", "student")
DEVICES = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
# The number of this process, and that of all processes: torchrun tells.
RANK, COUNT = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def refuse(message):
    """End with one line for the user, and exit code 2."""
    raise datasets.DataError(message)


# ---- options ------------------------------------------------------------------------------------


def listed(text):
    return text.split(",")


# Of each section: (name, default, meaning), and a type where the default has none. A tuple is all
# values that can be chosen, the default first.
OPTIONS = {
    "run": [
        ("preset", (None, "released"), "other defaults: those of the authors' code"),
        ("data", None, "file or folder of the data set", str),
        ("stage", ("all", *STAGES, "eval"), "what to make, or eval: to score"),
        ("method", "mtpkdot,task,visual", "students of METHODS, with commas, or all", listed),
        ("out", None, "folder of the run; None is runs/DATASET", Path),
        ("fold", None, "train this fold only, counted from 0", int),
        ("seeds", 1, "repeat everything with as many seeds, from --seed on"),
        ("epochs", None, "of every network, in the place of --updates and --epochs-...", int),
        ("student", None, "eval: file of the student", Path),
        ("predictions", None, "eval: .csv file for what it predicts for each clip", Path),
        ("device", DEVICES, "where networks are; cuda, if the machine has it"),
        ("workers", min(8, os.cpu_count() or 1), "processes that read raw data"),
    ],
    "data": [
        ("dataset", ("synthetic", "features", "affwild2", "biovid"), "which data, see README"),
        ("seed", 0, "of folds, initial weights and batches"),
        ("folds", None, "number of folds; None is the data's own split, or 5", int),
        ("folds-by", ("person", "clip"), "clip: people are in training and validation"),
        ("select", ("train", "val"), "who chooses epochs: a fifth of the training people, or val"),
        ("train-rows", None, "train on as many rows of each fold", int),
        ("clip-stride", 1, "affwild2: every N-th usable frame; eval: as it was"),
        ("levels", "BL1,PA4", f"biovid: classes, of {','.join(datasets.BIOVID_LEVELS)}", listed),
        ("signal", ("emg_corrugator", *datasets.BIOVID_SIGNALS), "biovid: the privileged signal"),
        ("batch-size", 128, "clips of a batch, at most"),
        ("updates", 200, "a network trains for as many updates at the least"),
        ("lr-decay", ("linear", "none"), "of every rate, to zero"),
        ("dim", models.DIM, "size of an embedding, even"),
        ("width", 64, "of the first stage of both 18-layer networks"),
    ],
    "teachers": [
        ("visual-weights", None, "raw data: published r3d_18 weights to start from", str),
        ("privileged-weights", None, "raw data: published resnet18 weights to start from", str),
        ("epochs-backbone", 30, "at the least, as of the other networks"),
        ("epochs-joint", 30, "of the joint teacher and of T-Net"),
        ("lr-backbone", 1e-3, "learning rate"),
        ("lr-joint", 5e-4, "learning rate"),
        ("lr-tnet", 5e-4, "learning rate"),
        ("tnet-loss", ("mse", "mmd"), "T-Net's loss"),
        ("amp", ("auto", "on", "off"), "bfloat16 in 18-layer networks; auto: on GPUs that have it"),
        ("dropout", 0.25, "of hidden units of vectors, and of embeddings that enter the fusion"),
    ],
    "align": [
        ("epochs-align", 40, "at the least"),
        ("lr-adapter", 2e-3, "learning rate, of the heads too"),
        ("lr-fusion", 1e-4, "learning rate"),
    ],
    "student": [
        ("student-backbone", ("finetune", "frozen", "scratch"), "the visual backbone in stage 3"),
        ("epochs-student", 10, "at the least"),
        ("lr-student", 1e-3, "learning rate"),
        ("dropout-student", 0.25, "as --dropout, of every student"),
        ("teacher-choice", ("loss", "corrected"), "corrected: by what teachers lose on new rows"),
        ("k", 30, "anchors of a clip"),
        ("anchors", ("most", "least"), "the k most or least similar clips"),
        ("shift", ("none", "min"), "min: similarities less their minimum before OT"),
        ("eps", 0.01, "entropy of OT, in units of its cost"),
        ("ot", ("debiased", "entropic"), "form of OT"),
        ("w-task", 0.8, "weight of the task in mtpkdot's loss"),
        ("w-ot", 0.2, "weight of OT in it"),
        ("w-centroid", 0.02, "weight of the centroid in it"),
        ("w-pkdot-ot", 0.6, "pkdot: weight of OT beside a task of weight 1"),
        ("w-feature", 1.0, "mse, cosine, rkd, kd: weight beside a task of weight 1"),
    ],
}
LEAST = {"fold": 0, "workers": 0, "seed": 0, "updates": 0, "folds": 2, "train_rows": 2, "dim": 2}
LEAST |= {"batch_size": 2, "eps": 1e-9}  # of any other number: 1 if it is whole, else 0
DEFAULTS = {  # of a --dataset or a --preset, where they differ from those above
    "synthetic": {"dim": 128, "width": 4, "updates": 100},
    "features": {"dim": 128, "epochs_backbone": 100},
    "released": {  # Source: released code; it leaves stage 1 open: lr_joint is ours
        "folds_by": "clip", "dim": models.DIM, "updates": 0, "select": "val",
        "lr_decay": "none", "lr_joint": 1e-4, "lr_tnet": 5e-5, "lr_adapter": 5e-3,
        "lr_student": 5e-4, "shift": "min", "student_backbone": "frozen", "w_centroid": 0.2,
        "anchors": "least", "epochs_align": 10, "dropout": 0.0, "dropout_student": 0.0,
    },
}


def options(argv=None):
    """The arguments, checked and completed."""
    parser = ArgumentParser(allow_abbrev=False, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.error = refuse
    for title, settings in OPTIONS.items():
        section = parser.add_argument_group(title)
        for name, default, meaning, *kind in settings:
            kind = kind[0] if kind else type(default)
            how = {"default": default, "type": kind, "metavar": "X"}
            if kind is tuple:
                how = {"default": default[0], "choices": dict.fromkeys(default)}
            section.add_argument(f"--{name}", help=meaning, **how)
    first = parser.parse_args(argv)
    for chosen in (first.dataset, first.preset):
        parser.set_defaults(**DEFAULTS.get(chosen, {}))
    if first.student:  # its data is read as it was in training
        same = ("dataset", "clip_stride", "levels")
        made = read(first.student, lambda saved: {key: saved["origin"][key] for key in same})
        parser.set_defaults(**made)
    args = parser.parse_args(argv)

    for name, value in vars(args).items():
        least = LEAST.get(name, int(isinstance(value, int)))
        if isinstance(value, (int, float)) and not least <= value < 2**63:
            refuse(f"argument --{name.replace('_', '-')}: {value} is not a number from {least} on")
    if (args.stage == "eval") != bool(args.student) or (args.predictions and not args.student):
        refuse("arguments --student, --predictions: they are for --stage eval --student FILE")
    if args.method == ["all"]:
        args.method = list(METHODS)
    if not set(args.method) <= set(METHODS):
        refuse(f"argument --method: give all, or some of {', '.join(METHODS)}, with commas")
    if args.dim % 2 or max(args.dropout, args.dropout_student) >= 1:
        refuse("arguments --dim, --dropout, --dropout-student: dim must be even, dropout below 1")
    args.out = args.out or Path("runs") / args.dataset
    args.place = args.student or args.out  # for messages
    if args.epochs:
        every = [name for name in vars(args) if name.startswith("epochs_")]
        vars(args).update(dict.fromkeys(every, args.epochs), updates=0)
    return args


# ---- files --------------------------------------------------------------------------------------
# A fold's folder holds a file STAGE_NAME.pt for each network, saved after every epoch. The same
# command given again loads what is there and makes the rest. A `run` is the arguments and what a
# seed and a fold add: data, number, folder, rows to train on, to choose by, to score and to show.


def origin(run, name):
    """What a file is made from: the data, and the arguments of its stage and of those before."""
    sections = ["data", *STAGES[: STAGES.index(name.partition("_")[0]) + 1]]
    names = [name.replace("-", "_") for section in sections for name, *_ in OPTIONS[section]]
    return {"data": run.content, **{name: getattr(run, name) for name in names}}


def save(run, name, saved):
    """Save a dict with its origin, by way of a temporary file, so that no kill leaves half a file.
    No process goes on to read before it is there."""
    path, file = run.folder / f"{name}.pt", io.BytesIO()
    torch.save({**saved, "origin": origin(run, name)}, file)
    wait_for_all()
    if RANK == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(file.getbuffer())
        os.replace(temporary, path)
    wait_for_all()


def read(path, use=dict):
    """use(what is in a file of torch.save), on the host. A damaged or foreign file is refused."""
    try:
        return use(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # a damaged or foreign file can raise anything
        reason = " ".join(f"{type(error).__name__}, {error}".split())[:200]
        refuse(f"{path}: missing, damaged or not what it should be ({reason})")


def load(run, name):
    """What the file of this name holds, at least its origin. One of another origin is refused."""
    path, mine = run.folder / f"{name}.pt", origin(run, name)
    saved = read(path) if path.exists() else {"origin": mine}
    theirs = saved.get("origin", {})
    differ = [key for key in mine if theirs.get(key) != mine[key]]
    if differ:
        pairs = [f"--{k.replace('_', '-')} ({theirs.get(k)}, now {mine[k]})" for k in differ]
        refuse(f"{path} is of a run with other {', '.join(pairs)}; use another --out")
    return saved


def weights_of(run, name):
    """The weights of a network that an earlier step has finished."""
    saved, stage = load(run, name), name.partition("_")[0]
    if "scores" not in saved:
        refuse(f"{run.folder}: no finished {name}.pt; run --stage {stage} first, with this --out")
    return saved["weights"]


# ---- processes ----------------------------------------------------------------------------------
# Under torchrun all processes share out what trains or runs on frames and spectrograms. What runs
# on vectors and embeddings, each does alike. The first one writes and prints.


wait_for_all = distributed.barrier if COUNT > 1 else lambda: None


def is_shared(view):
    return COUNT > 1 and len(view.shape) > 3


def bar(steps, name, count=None):
    """A progress bar around a loop, of the first process and where there is a terminal."""
    return tqdm(steps, name, count, leave=False, disable=RANK > 0 or None)


def gather(part):
    """The outputs (n, ...) of all processes for their shares, put together in order of the rows.

    Each process then has the loss of the whole batch, whose gradient reaches its own share alone.
    """
    parts = [torch.empty_like(part) for _ in range(COUNT)]
    distributed.all_gather(parts, part.detach().contiguous())
    # DistributedDataParallel takes the mean of gradients where the sum is due: count times as much.
    parts[RANK] = part + (COUNT - 1) * (part - part.detach())
    return torch.stack(parts, dim=1).flatten(0, 1)


# ---- fit: the one training loop -----------------------------------------------------------------


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


def headline(value):
    return value["mean"] if isinstance(value, dict) else value


def forward(run, network, view, batches):
    """Yield each batch of rows and the network's outputs for it, a tuple of tensors (B, ...).

    view[rows] is read on the host, raw data by --workers processes. A shared view is computed in
    shares, and all processes get all outputs.
    """
    raw, shared = not torch.is_tensor(view), is_shared(view)
    parts = [rows.tolist() for rows in batches]
    if shared:  # each process's share has the same size: the first rows may come twice
        parts = [(rows + rows[: -len(rows) % COUNT])[RANK::COUNT] for rows in parts]
    how = {"num_workers": run.workers if raw else 0, "pin_memory": raw and run.device == "cuda"}
    how["generator"] = torch.Generator()  # so that reading draws nothing from the run's
    for rows, x in zip(batches, DataLoader(view, batch_size=None, sampler=parts, **how)):
        outputs = network(x.to(run.device, non_blocking=True))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if not all((t.abs() < 1e15).all() for t in outputs):  # squares are finite; NaN is refused
            refuse(f"{run.place}: NaN or too large outputs; what was saved stays; lower its --lr")
        if shared:
            outputs = tuple(gather(t)[: len(rows)] for t in outputs)
        yield rows, outputs


@torch.no_grad()
def predict(run, network, view, rows):
    """The network's outputs for these rows, on the host: tensors (len(rows), ...)."""
    network.eval()
    size = 4096 if torch.is_tensor(view) else run.batch_size
    batches = rows.tensor_split(math.ceil(len(rows) / size))
    outputs = [out for _, out in forward(run, network, view, batches)]
    return [torch.cat([t.cpu() for t in parts]) for parts in zip(*outputs)]


def fit(run, name, network, rate, epochs, view, loss_of, score=task_score, scored=None, full=None):
    """Train `network` with Adam, and leave its best epoch in the file `name`.

    rate     learning rate, or {part of the network: learning rate}
    epochs   at the least, as --updates may ask for more
    view     what the network takes: a view of the data set, or embeddings
    loss_of  (rows, label, outputs...) -> dict of scalars, of which "loss" is minimised
    score    (data, what a model says of rows, rows) -> its score
    scored   names of the models in it, where they are several; the mean of their scores chooses
             the epoch
    full     the network that is saved, where `network` is only a part of it
    """
    saved = {"history": [], "best": -math.inf, **load(run, name)}
    if "scores" in saved:
        return

    # Batches of nearly equal size: the similarities within a runt of two clips would mean nothing.
    steps = max(1, min(math.ceil(len(run.train) / run.batch_size), len(run.train) // 2))
    epochs = max(epochs, math.ceil(run.updates / steps))
    rates = rate if isinstance(rate, dict) else {"": rate}  # of which "" is the whole
    groups = [{"params": network.get_submodule(p).parameters(), "lr": rates[p]} for p in rates]
    optimizer = torch.optim.Adam(groups, fused=True)
    end = 0 if run.lr_decay == "linear" else 1
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1, end, epochs * steps)
    full, trained = full or network, network
    scored = scored or [name.partition("_")[2]]
    if is_shared(view):
        if run.device == "cuda":  # on the CPU batch norms are each process's own
            nn.SyncBatchNorm.convert_sync_batchnorm(network)
        trained = nn.parallel.DistributedDataParallel(network)

    def scores_of(rows, outputs):
        said = outputs[-1].view(len(rows), len(scored), -1)
        return {model: score(run.data, said[:, i], rows) for i, model in enumerate(scored)}

    # Go on where the same command stopped before.
    parts = {"network": network, "optimizer": optimizer, "decay": decay}
    if saved["history"]:
        for key, part in parts.items():
            part.load_state_dict(saved[key])
    for epoch in range(len(saved["history"]) + 1, epochs + 1):
        # Train on every row once, in an order that is that of every other network.
        seed_everything(run, epoch)
        run.place = f"seed {run.seed}  fold {run.number}  {name:<26}  epoch {epoch:>3}/{epochs}"
        trained.train()
        order = run.train[torch.randperm(len(run.train))].tensor_split(steps)
        drawn = view.drawn(torch.randint(2**31, ()).item()) if hasattr(view, "drawn") else view
        means = {}
        for rows, outputs in bar(forward(run, trained, drawn, order), name, steps):
            terms = loss_of(rows, run.data.label[rows].to(run.device), *outputs)
            optimizer.zero_grad()
            terms["loss"].backward()
            optimizer.step()
            decay.step()
            for term, value in terms.items():
                means[term] = means.get(term, 0) + value.detach() * (len(rows) / len(run.train))

        # Score it on the rows that choose the epoch, and keep the best.
        scores = scores_of(run.choose, predict(run, trained, view, run.choose))
        now = float(np.mean([headline(value) for value in scores.values()]))
        if now > saved["best"]:
            weights = {key: t.cpu().clone() for key, t in full.state_dict().items()}
            saved.update(best=now, weights=weights)

        # Save all that is needed to go on.
        row = {"seed": run.seed, "fold": run.number, "model": name, "epoch": epoch, "score": now}
        row.update({term: value.item() for term, value in means.items()})
        saved.update({key: part.state_dict() for key, part in parts.items()})
        saved["history"] = [*saved["history"], row]
        save(run, name, saved)
        print(f"{run.place}  loss {row['loss']:.4f}  score {now:.4f}", flush=True)

    # Score the best epoch on the validation rows. Save all that is needed to use and to draw it.
    full.load_state_dict(saved["weights"])
    final = {"weights": saved["weights"], "history": saved["history"], **run.about}
    outputs = predict(run, trained, view, run.val)
    final["scores"] = scores_of(run.val, outputs)
    final["similarity"] = mtpkdot.similarity(outputs[0][run.shown].flatten(1))
    save(run, name, final)


# ---- stage 1: teachers --------------------------------------------------------------------------


def single(run, view, name=None, dropout=0.0):
    """The network of one view, a backbone with a head: of the file `name`, or as it starts."""
    source, published = getattr(run.data, view), getattr(run, f"{view}_weights")
    has_it = run.device == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    bfloat16 = has_it if run.amp == "auto" else run.amp == "on"
    encoder = models.backbone(source.shape[1:], run.dim, run.width, bfloat16, dropout)
    network = models.Single(encoder, nn.Linear(run.dim, len(run.data.names)))
    if name:
        network.load_state_dict(weights_of(run, name))
    elif published:
        read(published, lambda weights: models.load_published(encoder, weights))
    elif isinstance(encoder, models.Encoder):
        encoder.fit_standardisation(source[run.train])
    return network.to(run.device)


def embeddings(run):
    """z_v and z_p of all clips by the backbones of stage 1, (N, 2, D), from a file or made."""
    saved = load(run, "teachers_embeddings")
    if "z" not in saved:
        rows = torch.arange(len(run.data.label))
        networks = {view: single(run, view, f"teachers_{view}") for view in VIEWS}
        both = [predict(run, networks[v], getattr(run.data, v), rows)[0] for v in VIEWS]
        saved = {"z": torch.stack(both, dim=1)}
        save(run, "teachers_embeddings", saved)
    return saved["z"]


def teachers(run):
    """Stage 1. Each backbone learns the task alone; then the joint teacher and T-Net learn."""

    def task_of(rows, label, z, prediction):
        return {"loss": mtpkdot.task_loss(prediction, label)}

    # A backbone with a head for each view. The visual one is the visual-only baseline.
    for view in VIEWS:
        seed_everything(run, view)
        network, source = single(run, view, dropout=run.dropout), getattr(run.data, view)
        fit(run, f"teachers_{view}", network, run.lr_backbone, run.epochs_backbone, source, task_of)

    # The joint teacher: the fusion of both embeddings, which stay as they are.
    z = embeddings(run)
    seed_everything(run, "joint")
    joint = models.Fusion(run.dim, len(run.data.names), run.dropout).to(run.device)
    fit(run, "teachers_joint", joint, run.lr_joint, run.epochs_joint, z, task_of)

    # T-Net: the privileged embedding, hallucinated from the visual one.
    seed_everything(run, "tnet")
    tnet = models.TNet(run.dim).to(run.device)

    def loss_of(rows, label, hallucinated):
        z_p = z[rows, 1].to(run.device)
        return {"loss": mtpkdot.tnet_loss(hallucinated, z_p, run.tnet_loss)}

    def likeness(data, hallucinated, rows):  # batch by batch, as MMD compares all pairs
        count = math.ceil(len(rows) / run.batch_size)
        total = 0
        for part, out in zip(rows.tensor_split(count), hallucinated.tensor_split(count)):
            total += loss_of(part, None, out.to(run.device))["loss"].item() * len(part) / len(rows)
        return -total

    fit(run, "teachers_tnet", tnet, run.lr_tnet, run.epochs_joint, z[:, 0], loss_of, likeness)


# ---- stage 2: align -----------------------------------------------------------------------------


def align(run):
    """Stage 2. Adapters pull both single embeddings to the joint one, and the joint one to them."""
    seed_everything(run, "align")
    network = models.Teachers(run.dim, len(run.data.names), run.dropout).to(run.device)
    network.joint.load_state_dict(weights_of(run, "teachers_joint"))

    # The distance of the embeddings, and the task of all three teachers.
    def loss_of(rows, label, z, predictions):
        z_j, a_v, a_p = z.unbind(1)
        distance = mtpkdot.alignment_loss(a_v, a_p, z_j)
        tasks = [mtpkdot.task_loss(said, label) for said in predictions.unbind(1)]
        return {"loss": mtpkdot.align_stage_loss(distance, *tasks), "align": distance}

    # An epoch is best where all three are good. The released code asks the joint one alone, which,
    # trained in stage 1, is at its best before the adapters have learned.
    names = ["joint_aligned", *mtpkdot.TEACHERS[1:]]
    rates = {"joint": run.lr_fusion, "adapters": run.lr_adapter, "heads": run.lr_adapter}
    fit(run, "align", network, rates, run.epochs_align, embeddings(run), loss_of, scored=names)


# ---- stage 3: student ---------------------------------------------------------------------------

ALL, JOINT = mtpkdot.TEACHERS, mtpkdot.TEACHERS[:1]
STRUCTURE = {"task": "w_task", "ot": "w_ot", "centroid": "w_centroid"}
METHODS = {
    # student: (stage of its teachers, those to choose among, {term of its loss: weight or option})
    "mtpkdot": ("align", ALL, STRUCTURE),
    "mtpkdot-unaligned": ("teachers", ALL, STRUCTURE),
    "mtpkdot-no-centroid": ("align", ALL, {"task": "w_task", "ot": "w_ot"}),
    "mtpkdot-joint": ("align", JOINT, STRUCTURE),
    "mtpkdot-visual": ("align", ["adapted_visual"], STRUCTURE),
    "mtpkdot-privileged": ("align", ["adapted_privileged"], STRUCTURE),
    "pkdot": ("teachers", JOINT, {"task": 1, "ot": "w_pkdot_ot"}),
    "mse": ("teachers", JOINT, {"task": 1, "mse": "w_feature"}),
    "cosine": ("teachers", JOINT, {"task": 1, "cosine": "w_feature"}),
    "rkd": ("teachers", JOINT, {"task": 1, "rkd": "w_feature"}),
    "kd": ("teachers", JOINT, {"task": 1, "kd": "w_feature"}),
    "task": ("teachers", JOINT, {"task": 1}),  # the student without distillation
    "visual": ("teachers", JOINT, {"task": 1}),  # the visual network alone, as long in training
}
NETWORKS = [f"teachers_{name}" for name in (*VIEWS, "joint", "tnet")]
NETWORKS += ["align", *(f"student_{method}" for method in METHODS)]


def student(run, method, z):
    """Stage 3. A student on visual input learns the task, and what its loss takes from a teacher.

    All students start from the same weights and see the same batches. z are the embeddings of all
    clips, (N, 2, D).
    """
    stage, candidates, terms = METHODS[method]
    weights = {term: getattr(run, w) if isinstance(w, str) else w for term, w in terms.items()}
    transport = {"k": run.k, "which": run.anchors, "shift": run.shift == "min", "eps": run.eps}
    transport["debias"] = run.ot == "debiased"

    # The three teachers: those of stage 2, or those that stage 1 left, without adapters.
    teacher_net = models.Teachers(run.dim, len(run.data.names), adapters=stage == "align")
    if stage == "align":
        teacher_net.load_state_dict(weights_of(run, "align"))
    else:
        teacher_net.joint.load_state_dict(weights_of(run, "teachers_joint"))
        for view in VIEWS:
            teacher_net.heads[view] = single(run, view, f"teachers_{view}").head
    teacher_net.to(run.device).eval()
    columns = [mtpkdot.TEACHERS.index(teacher) for teacher in candidates]

    # The student: the visual backbone of stage 1, or afresh; T-Net; a fusion of its own.
    seed_everything(run, "student")
    start = None if run.student_backbone == "scratch" else "teachers_visual"
    baseline = single(run, "visual", start, run.dropout_student)
    tnet, view = models.TNet(run.dim), run.data.visual
    tnet.load_state_dict(weights_of(run, "teachers_tnet"))
    fusion = models.Fusion(run.dim, len(run.data.names), run.dropout_student)
    full = network = models.Student(baseline.encoder, tnet.composed(), fusion).to(run.device)
    if method == "visual":  # whose z_s is z_v
        full = network = baseline
    elif run.student_backbone == "frozen":  # the same network, on embeddings instead of clips
        network, view = models.Student(nn.Identity(), full.tnet, fusion), z[:, 0]

    def losses_of(said, label):
        return torch.stack([mtpkdot.task_loss(one, label) for one in said.unbind(1)])

    # Teachers know their training rows by heart. What each loses more on the rows that chose its
    # epoch, "corrected" adds to its losses. Source: ours.
    correction = 0
    if run.teacher_choice == "corrected":
        unseen, known = (
            losses_of(predict(run, teacher_net, z, rows)[1][:, columns], run.data.label[rows])
            for rows in (run.choose, run.train)
        )
        correction = (unseen - known).to(run.device)

    # Its loss on a batch: pick the teacher, then add up the terms.
    def loss_of(rows, label, z_s, prediction):
        with torch.no_grad():
            z_teachers, said = (t[:, columns] for t in teacher_net(z[rows].to(run.device)))
        chosen = mtpkdot.choose_teacher(losses_of(said, label) + correction)
        teacher = {"z_t": z_teachers[:, chosen], "prediction_t": said[:, chosen]}
        terms = mtpkdot.student_loss(weights, prediction, label, z_s, **teacher, **transport)
        return {**terms, **{name: chosen == i for i, name in enumerate(candidates)}}

    name, epochs = f"student_{method}", run.epochs_student
    fit(run, name, network, run.lr_student, epochs, view, loss_of, full=full)


# ---- evaluate: the student alone ----------------------------------------------------------------


def evaluate(args):
    """Score a saved student on visual input, and write what it predicts."""

    def opened(saved):
        about = (saved[key] for key in ("names", "task", "input_shape", "trained_on"))
        return models.load_student(saved), saved["val"].long(), *about

    network, rows, names, task, shape, trained_on = read(args.student, opened)
    classes = task == "classification"
    data = datasets.load(args, need_privileged=False, need_label=not args.predictions)
    if list(data.visual.shape[1:]) != shape:
        refuse(f"{args.student} is for input shape {shape}, not {list(data.visual.shape[1:])}")
    own = datasets.digest(data.visual) == trained_on  # of these only the validation rows count
    rows = rows if own else torch.arange(len(data.visual))
    print(f"{args.student}: {len(rows)} {'validation rows of its own data' if own else 'rows'}")
    prediction = predict(args, network.to(args.device), data.visual, rows)[1]

    if args.predictions and RANK == 0:
        name_of = str if torch.is_tensor(data.visual) else data.visual.name
        header, table = names, prediction.tolist()
        if classes:
            header = ["prediction", *(f"p_{name}" for name in names)]
            table = [[names[p.argmax()], *p.tolist()] for p in prediction.softmax(1)]
        with open(args.predictions, "w", newline="", errors="surrogateescape") as file:
            lines = csv.writer(file, lineterminator="\n")
            lines.writerow(["name", *header])
            lines.writerows([name_of(row), *values] for row, values in zip(rows.tolist(), table))
        print(f"Predictions saved in {args.predictions}.")

    if data.label is not None:
        known = set(data.names) <= set(names) if classes else data.names == names
        if data.task != task or not known:
            refuse(f"{args.student} knows {task} of {names}, not {data.task} of {data.names}")
        if classes:  # they may be fewer
            numbers = torch.tensor([names.index(name) for name in data.names])
            data = data._replace(label=numbers[data.label])
        score = cell(task_score(data, prediction, rows))
        print(f"Score: {score}, {task} of {data.names}, from visual input alone.")


# ---- report -------------------------------------------------------------------------------------


def report(args, data, runs):
    """results.json, history.csv, the table and pictures, of all folds that the folder has."""
    reports, curves, similarities = [], [], {}
    for run in runs:
        # The scores of a fold, and the history of each of its networks.
        scores = {"seed": run.seed, "fold": run.number, "students": {}, "teacher_picks": {}}
        for name in NETWORKS:
            saved = load(run, name)
            if "scores" not in saved:
                continue
            (scores["students"] if name.startswith("student") else scores).update(saved["scores"])
            curves.append(saved["history"])
            similarities[name] = saved["similarity"]
            if name == "student_mtpkdot":
                picks = {t: float(np.mean([row[t] for row in curves[-1]])) for t in ALL}
                scores["teacher_picks"] = picks
        if "visual" in scores:
            reports.append(scores)

    result, history = summary(args, data, reports), [row for rows in curves for row in rows]
    (args.out / "results.json").write_text(f"{json.dumps(result, indent=2)}\n")
    with open(args.out / "history.csv", "w") as file:
        columns = dict.fromkeys(name for row in history for name in row)
        lines = csv.DictWriter(file, columns, lineterminator="\n")
        lines.writeheader()
        lines.writerows(history)
    draw(args.out, curves, similarities)
    show(args, data, result)


def merged(reports, statistic):
    """Nested dicts merged into one: of every number its statistic over the reports that have it."""
    result = {}
    for name in dict.fromkeys(key for r in reports for key in r if key not in ("seed", "fold")):
        values = [report[name] for report in reports if name in report]
        nested = isinstance(values[0], dict)
        result[name] = merged(values, statistic) if nested else statistic(values)
    return result


def summary(args, data, reports):
    """What results.json holds: means and standard errors over the folds or, of several seeds, over
    the seeds; each student's paired differences to task and visual, with 95 % intervals."""
    units, seeds = reports, dict.fromkeys(report["seed"] for report in reports)
    if len(seeds) > 1:
        units = [merged([r for r in reports if r["seed"] == seed], np.mean) for seed in seeds]
    metric = "accuracy" if data.task == "classification" else "ccc"
    result = {"dataset": args.dataset, "task": data.task, "metric": metric, "seed": args.seed}
    result["arguments"] = {k: v for k, v in origin(args, "student").items() if k != "data"}
    result.update(folds=reports, mean=merged(units, np.mean))
    result["stderr"] = merged(units, lambda v: float(stats.sem(v)) if len(v) > 1 else None)
    for other in ("task", "visual"):
        less = result[f"less_{other}"] = {}
        for method in result["mean"]["students"]:
            both = [u["students"] for u in units if {method, other} <= set(u["students"])]
            if len(both) > 1 and method != other:
                gaps = [headline(scores[method]) - headline(scores[other]) for scores in both]
                mean, margin = np.mean(gaps), stats.sem(gaps) * stats.t.ppf(0.975, len(gaps) - 1)
                less[method] = {"mean": mean, "low": mean - margin, "high": mean + margin}
    return result


def cell(value, error=None):
    """A score as text: percent for an accuracy, each column's CCC for a regression."""
    text = f"{100 * headline(value):.1f}"
    if isinstance(value, dict):
        text = "/".join(f"{c:.3f}" for name, c in value.items() if name != "mean")
    return text if headline(error) is None else f"{text} ± {cell(error)}"


def show(args, data, result):
    """Print the scores, and each student's paired differences."""
    means, errors, picks = result["mean"], result["stderr"], result["mean"]["teacher_picks"]
    unit = "accuracy in %" if data.task == "classification" else f"CCC of {'/'.join(data.names)}"
    print(f"\n{unit} ± standard error; differences in points [95 % interval], * if it excludes 0")
    for model in [name for name in means if name not in ("tnet", "students", "teacher_picks")]:
        print(f"{model.replace('_', ' '):<30}{cell(means[model], errors[model])}")
    for method, value in means["students"].items():
        line = f"student {method:<22}{cell(value, errors['students'][method]):<30}"
        for other in ("task", "visual"):
            gap = result[f"less_{other}"].get(method)
            if gap:
                mean, low, high = (f"{100 * end:+.1f}" for end in gap.values())
                sure = "*" if gap["low"] * gap["high"] > 0 else " "
                line += f"less {other} {mean} [{low}, {high}] {sure}  "
        print(line.rstrip())
    if picks:
        shares = (f"{teacher.replace('_', ' ')} {share:.0%}" for teacher, share in picks.items())
        print(f"Teacher that mtpkdot picked, share of training clips: {', '.join(shares)}.")
    print(f"Saved in {args.out}: results.json, history.csv, pictures, and a folder a fold.")


def draw(folder, curves, similarities):
    """history.png: loss above score, a line a fold. similarity.png: of clips in order of label, by
    the joint teacher and the first student."""
    try:
        from matplotlib import figure
    except ImportError:
        return print("No pictures: they need matplotlib (pip install matplotlib).")
    names = list(dict.fromkeys(rows[0]["model"] for rows in curves))
    picture = figure.Figure(figsize=(2.5 * len(names), 5))
    columns = dict(zip(names, picture.subplots(2, len(names), squeeze=False).T))
    for rows in curves:
        for axis, value in zip(columns[rows[0]["model"]], ("loss", "score")):
            axis.plot([row[value] for row in rows])
            axis.set_title(f"{rows[0]['model']}, {value}", fontsize=7)
    picture.savefig(folder / "history.png")

    for student in [name for name in names if name.startswith("student")][:1]:
        picture = figure.Figure(figsize=(8, 4))
        for axis, name in zip(picture.subplots(1, 2), ("teachers_joint", student)):
            axis.imshow(similarities[name].numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
            axis.set_title(f"cosine similarity, {name}")
        picture.savefig(folder / "similarity.png")


# ---- main ---------------------------------------------------------------------------------------


def train_all(args):
    """All stages that are asked for, seed by seed and fold by fold, then the report."""
    args.out.mkdir(parents=True, exist_ok=True)
    data, runs = datasets.load(args, progress=lambda files: bar(files, "sound")), []
    about = {"names": data.names, "task": data.task, "input_shape": list(data.visual.shape[1:])}
    about.update(dim=args.dim, width=args.width, trained_on=datasets.digest(data.visual))
    args.content = datasets.digest(about["trained_on"], *data[1:])
    if args.folds_by == "clip":
        data = data._replace(group=None)

    # A run for each seed and fold. A folder of other arguments or data is refused here.
    for seed in range(args.seed, args.seed + args.seeds):
        folds = datasets.folds(data, args.folds, seed, args.train_rows, args.select == "train")
        if (args.fold or 0) >= len(folds):
            refuse(f"argument --fold: the folds are 0 to {len(folds) - 1}")
        for number, (train, choose, val) in enumerate(folds):
            run = Namespace(**vars(args))
            run.seed, run.number, run.data = seed, number, data
            run.train, run.choose, run.val, run.about = train, choose, val, {**about, "val": val}
            label = data.label[val].view(len(val), -1)[:, 0]
            run.shown = label.argsort(stable=True)[:: 1 + len(val) // 240]  # of val, in a picture
            run.folder = args.out / (f"seed{seed}" if args.seeds > 1 else "") / f"fold{number}"
            if min(len(train), len(choose), len(val), args.batch_size) < 2 * COUNT:
                refuse(f"fold {number} or a batch has too few rows for {COUNT} processes")
            for name in reversed(NETWORKS):  # the last stage tells most
                load(run, name)
            runs.append(run)

    for run in runs:
        if args.fold in (None, run.number):
            if args.stage in ("all", "teachers"):
                teachers(run)
            if args.stage in ("all", "align"):
                align(run)
            if args.stage in ("all", "student"):
                z = embeddings(run)  # once, as they are large
                for method in args.method:
                    student(run, method, z)
    if RANK == 0:
        report(args, data, runs)


def main(argv=None):
    warnings.showwarning = lambda message, *_: print(f"Warning: {message}", flush=True)
    try:
        args = options(argv)
        if COUNT > 1:
            distributed.init_process_group("nccl" if args.device == "cuda" else "gloo")
            if args.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")
        evaluate(args) if args.stage == "eval" else train_all(args)
    except (datasets.DataError, OSError, RuntimeError) as error:
        # A reading process's comes with its stack trace, whose last line is the message.
        text = str(error).rstrip().split("\n")[-1].removeprefix("data.DataError: ")
        if isinstance(error, RuntimeError):
            if "memory" not in str(error) and "DataLoader worker (" not in str(error):
                raise
            text = f"{text}; use a smaller --batch-size, --dim or --width, or fewer --workers"
        if isinstance(error, OSError):
            text = f"{error.filename or 'output'}: {error.strerror}; what was saved before stays"
        print(f"train.py: {text}", file=sys.stderr)
        sys.exit(2)
    if COUNT > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    FIRST = os.getpid() if RANK == 0 else None

    def stop(number, frame):
        """Ctrl-C and SIGTERM end the process at once: what is on disk is whole at any moment."""
        if os.getpid() == FIRST:  # not in one of torchrun's others, nor in one that reads data
            os.write(2, b"train.py: stopped; the same command goes on from the last epoch\n")
        os._exit(128 + number)

    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, stop)
    main()
