"""Train MT-PKDOT: teachers see two views of every clip, a student learns to do with one.

    python train.py                                     all three stages on small synthetic data
    python train.py --dataset affwild2 --stage all      on Aff-Wild2, laid out as README says

Read from top to bottom:
    options         what can be set, stage by stage
    a run on disk   one file a network: what is there is loaded, what is not is made
    processes       what torchrun shares out
    fit             the one training loop, which every network goes through
    teachers        stage 1: a backbone for each view, the joint teacher, T-Net
    align           stage 2: adapters and heads learn with the joint teacher
    student         stage 3: METHODS, the table of all students, and how one is trained
    evaluate        a saved student on new data, from its visual view alone
    report          results.json, history.csv, the table, the pictures
    main

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
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import data as datasets
import models
import mtpkdot

VIEWS = ("visual", "privileged")
STAGES = ("teachers", "align", "student")
DATASETS = {  # and the defaults that depend on the data set
    "synthetic": {"dim": 128, "width": 4, "updates": 100},
    "features": {"dim": 128, "epochs_backbone": 100},
    "affwild2": {"data": "data/affwild2"},
    "biovid": {"data": "data/biovid"},
}
RELEASED = {  # --preset. Source: released code; it leaves the backbones and the joint teacher open
    **{"folds_by": "clip", "dim": models.DIM, "updates": 0, "select": "val", "lr_decay": "none"},
    **{"lr_joint": 1e-4, "lr_tnet": 5e-5, "lr_adapter": 5e-3, "lr_student": 5e-4, "lr_pkdot": 1e-4},
    **{"epochs_pkdot": 20, "student_backbone": "frozen", "anchors": "least", "shift": "min"},
    **{"w_ot": 0.2, "w_centroid": 0.2, "w_pkdot_ot": 0.6},
}


def refuse(message):
    """End with one line for the user, and exit code 2."""
    raise datasets.DataError(message)


# ---- options ------------------------------------------------------------------------------------


def options(argv=None):
    """The arguments, checked and completed. args.groups[stage] names those that a stage adds."""
    how = {"allow_abbrev": False, "formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    parser = argparse.ArgumentParser(**how)
    groups = {stage: [] for stage in ("run", "data", *STAGES)}
    parser.error, limits = refuse, {}

    def add(name, default, text, kind=None, least=None):
        """An option of the section. Of choices the first is the default; a dict is a family. The
        least value is, unless told, 1 of a whole number and 0 of another."""
        if isinstance(default, dict):
            for part, value in default.items():
                add(f"{name}-{part}", value, text)
            return
        kind = kind or type(default)
        settings = {"default": default, "type": kind, "metavar": "X"}
        if isinstance(default, tuple):
            settings = {"default": default[0], "choices": dict.fromkeys(default)}
        option = section.add_argument(f"--{name}", help=text, **settings)
        groups[section.title].append(option.dest)
        limits[option.dest] = int(kind is int) if least is None else least

    section = parser.add_argument_group("run")
    add("preset", (None, "released"), "other defaults: those of the authors' code")
    add("data", None, "file or folder of the data set", str)
    add("stage", ("all", *STAGES, "eval"), "what to make or to score")
    add("method", "mtpkdot,task,visual", f"students: all, or of {','.join(METHODS)}")
    add("out", None, "folder of the run; None is runs/DATASET", Path)
    add("fold", None, "this fold only, counted from 0", int, 0)
    add("seeds", 1, "repeat everything with as many seeds, from --seed on")
    add("epochs", None, "of every network, in the place of --updates and --epochs-...", int)
    add("student", None, "eval: file of the student", Path)
    add("predictions", None, "eval: .csv file for what it predicts for each clip", Path)
    add("device", ("auto", "cpu", "cuda"), "auto is cuda where there is one")
    add("workers", min(8, os.cpu_count() or 1), "processes that read raw data", least=0)
    section = parser.add_argument_group("data")
    add("dataset", (None, *DATASETS), "None is synthetic; eval: the student's")
    add("seed", 0, "of folds, initial weights and batches", least=0)
    add("folds", None, "number of folds; None is the data's own split, or 5", int, 2)
    add("folds-by", ("person", "clip"), "clip: people are in training and validation")
    add("select", ("train", "val"), "who chooses epochs: a fifth of the training rows, or val")
    add("train-rows", None, "train on as many rows of each fold", int, 2)
    add("clip-stride", 1, "affwild2: take every N-th usable frame")
    add("levels", "BL1,PA4", f"biovid: the classes, of {','.join(datasets.BIOVID_LEVELS)}")
    add("signal", ("emg_corrugator", *datasets.BIOVID_SIGNALS), "biovid: the privileged signal")
    add("batch-size", 128, "clips of a batch, at most", least=2)
    add("updates", 200, "a network trains for as many updates at the least", least=0)
    add("lr-decay", ("linear", "none"), "of every rate, to zero")
    add("dim", models.DIM, "size of an embedding, even", least=2)
    add("width", 64, "of the first stage of both 18-layer networks")
    section = parser.add_argument_group("teachers")
    add("visual-weights", None, "raw data: published r3d_18 weights to start from", str)
    add("privileged-weights", None, "raw data: published resnet18 weights to start from", str)
    add("epochs", {"backbone": 30, "joint": 20, "tnet": 30}, "at the least")
    add("lr", {"backbone": 1e-3, "joint": 5e-4, "tnet": 5e-4}, "learning rate")
    add("tnet-loss", ("mse", "mmd"), "T-Net's loss")
    section = parser.add_argument_group("align")
    add("epochs-align", 10, "at the least")
    add("lr", {"adapter": 5e-4, "fusion": 1e-4}, "learning rate")
    add("w", {"align": 0.5, "head": 0.5}, "weight of this loss")
    section = parser.add_argument_group("student")
    add("student-backbone", ("finetune", "frozen", "scratch"), "the visual backbone in stage 3")
    add("epochs", {"student": 10, "pkdot": 10}, "at the least")
    add("lr", {"student": 1e-3, "pkdot": 1e-3}, "learning rate")
    add("k", 30, "anchors of a clip")
    add("anchors", ("most", "least"), "the k most or least similar clips")
    add("shift", ("none", "min"), "min: similarities less their minimum before OT")
    add("eps", 0.01, "entropy of OT, in units of its cost", least=1e-9)
    add("ot", ("debiased", "entropic"), "form of OT")
    add("w", {"task": 0.8, "ot": 1.0, "centroid": 0.02}, "weight of this term of mtpkdot's loss")
    add("w", {"pkdot-ot": 1.25, "feature": 1.0}, "weight beside a task loss of weight 1")

    first = parser.parse_args(argv)
    parser.set_defaults(**DATASETS[first.dataset or "synthetic"])
    parser.set_defaults(**RELEASED if first.preset else {})
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if isinstance(value, (int, float)) and not limits[name] <= value < 2**63:
            least = f"a number of at least {limits[name]}"
            refuse(f"argument --{name.replace('_', '-')}: {value} is not {least}")
    if (args.stage == "eval") != bool(args.student) or (args.predictions and not args.student):
        refuse("arguments --student, --predictions: they are for --stage eval --student FILE")
    args.methods = list(METHODS) if args.method == "all" else args.method.split(",")
    if not set(args.methods) <= set(METHODS):
        refuse(f"argument --method: {args.method} is not all, nor of {', '.join(METHODS)}")
    if args.dim % 2:
        refuse(f"argument --dim: {args.dim} is odd, and two attention heads share it")
    if args.device == "cuda" and not torch.cuda.is_available():
        refuse("argument --device: this machine has no CUDA device; use --device cpu")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.groups, args.levels = groups, args.levels.split(",")
    args.dataset = args.dataset or ("synthetic" if args.stage != "eval" else None)
    args.out = args.out or Path("runs") / str(args.dataset)
    if args.epochs:
        args.updates = 0
        for name in [name for name in vars(args) if name.startswith("epochs_")]:
            setattr(args, name, args.epochs)
    return args


# ---- a run on disk ------------------------------------------------------------------------------
# A fold's folder holds a file STAGE_NAME.pt for each network, saved after every epoch. The same
# command given again loads what is there and makes the rest. From here on `run` is the arguments
# and what a seed and a fold add: data, folder, and rows to train on, to choose by and to score.


def origin(run, name):
    """What a file is made from: the data, and the arguments of its stage and of those before."""
    groups = ["data", *STAGES[: STAGES.index(name.partition("_")[0]) + 1]]
    names = [name for group in groups for name in run.groups[group]]
    return {"data": run.content, **{name: getattr(run, name) for name in names}}


def write(path, content):
    """Write bytes by way of a temporary file, so that no kill leaves half a file."""
    if processes()[0] == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_bytes(content)
        os.replace(temporary, path)


def save(run, name, saved):
    """Save a dict with its origin. All processes meet here: none reads what is being written."""
    file = io.BytesIO()
    torch.save({**saved, "origin": origin(run, name)}, file)
    several = processes()[1] > 1
    distributed.barrier() if several else None
    write(run.folder / f"{name}.pt", file.getbuffer())
    distributed.barrier() if several else None


def read(path, use=dict):
    """use(what is in a file of torch.save), on the host. A damaged or foreign file is refused."""
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise ValueError("a checksum is wrong")
        return use(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # a damaged or foreign file can raise anything
        reason = " ".join(f"{type(error).__name__}, {error}".split())[:200]
        refuse(f"{path}: missing, damaged or not what it should be ({reason})")


def load(run, name, needed=False):
    """What the file of this name holds, or None. Refused are one that is made from other data or
    arguments, and one that is needed and not finished."""
    path, mine = run.folder / f"{name}.pt", origin(run, name)
    saved = read(path) if path.exists() else None
    if needed and (saved is None or "optimizer" in saved):
        stage = name.partition("_")[0]
        refuse(f"{path} is missing or unfinished: run --stage {stage} first, with the same --out")
    theirs = saved.get("origin", {}) if saved else mine
    differ = [key for key in mine if theirs.get(key) != mine[key]]
    if differ:
        flags = [f"--{key.replace('_', '-')}" for key in differ]
        pairs = [f"{flag} ({theirs.get(key)}, now {mine[key]})" for flag, key in zip(flags, differ)]
        refuse(f"{path} is of a run with other {', '.join(pairs)}; use another --out")
    return saved


# ---- processes ----------------------------------------------------------------------------------
# Under torchrun all processes share out what trains or runs on frames and spectrograms. What runs
# on vectors and embeddings, each does alike. The first one writes and prints.


def processes():
    """(number of this process, number of processes): (0, 1), or what torchrun started."""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def is_shared(view):
    return processes()[1] > 1 and len(view.shape) > 3


def share(rows):
    """This process's part of a batch, of the same size for all: the first rows may come twice."""
    rank, count = processes()
    return torch.cat([rows, rows[: -len(rows) % count]])[rank::count]


class Gather(torch.autograd.Function):
    """The outputs (n, ...) of all processes for their shares, put together in order of the rows.

    Each process then has the loss of the whole batch. DistributedDataParallel takes the mean of
    their gradients where the sum is due, hence the factor on the way back.
    """

    @staticmethod
    def forward(ctx, part):
        parts = [torch.empty_like(part) for _ in range(processes()[1])]
        distributed.all_gather(parts, part.contiguous())
        return torch.stack(parts, dim=1).flatten(0, 1)

    @staticmethod
    def backward(ctx, grad):
        rank, count = processes()
        return grad[rank::count] * count


# ---- the one training loop ----------------------------------------------------------------------


def seed_everything(run, part):
    """What is random depends on seed, fold and part of the run, not on what ran before."""
    torch.manual_seed(zlib.crc32(repr((run.seed, run.number, part)).encode()))


def score(data, prediction, rows):
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
    parts = [(share(rows) if shared else rows).tolist() for rows in batches]
    how = {"num_workers": run.workers if raw else 0, "pin_memory": raw and run.device == "cuda"}
    how["generator"] = torch.Generator()  # so that reading draws nothing from the run's
    for rows, x in zip(batches, DataLoader(view, batch_size=None, sampler=parts, **how)):
        outputs = network(x.to(run.device, non_blocking=True))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if not all(bool(t.isfinite().all()) for t in outputs):
            refuse(f"{run.place}: its outputs are not finite; what was saved stays; lower its --lr")
        if shared:
            outputs = tuple(Gather.apply(t)[: len(rows)] for t in outputs)
        yield rows, outputs


@torch.no_grad()
def predict(run, network, view, rows):
    """The network's outputs for these rows, on the host: tensors (len(rows), ...)."""
    network.eval()
    size = 4096 if torch.is_tensor(view) else run.batch_size
    batches = rows.tensor_split(math.ceil(len(rows) / size))
    outputs = [out for _, out in forward(run, network, view, batches)]
    return [torch.cat([t.cpu() for t in parts]) for parts in zip(*outputs)]


def fit(run, name, network, rates, epochs, view, loss_of, scored, full=None, **about):
    """Train `network` with Adam, keep its best epoch, and leave it in the file `name`.

    rates    [(module, learning rate)]; epochs: at the least, as --updates may ask for more
    view     what the network takes: a view of the data set, or embeddings
    loss_of  (rows, outputs...) -> dict of scalars, of which "loss" is minimised
    scored   names of the models in it; the mean of their scores chooses the epoch, or, where there
             is none, the loss
    full     the network whose weights are saved, where `network` is only a part of it
    about    what is saved besides
    """

    def scores_of(rows):
        outputs = predict(run, trained, view, rows)
        if not scored:
            return {"tnet": -loss_of(rows, *(t.to(run.device) for t in outputs))["loss"].item()}
        predictions = outputs[1].unbind(1) if len(scored) > 1 else outputs[1:]
        return {model: score(run.data, said, rows) for model, said in zip(scored, predictions)}

    full, trained, train = full or network, network, run.train
    if is_shared(view):
        if run.device == "cuda":  # on the CPU batch norms are each process's own
            nn.SyncBatchNorm.convert_sync_batchnorm(network)
        trained = DistributedDataParallel(network)
    # Batches of nearly equal size: the similarities within a runt of two clips would mean nothing.
    steps = max(1, min(math.ceil(len(train) / run.batch_size), len(train) // 2))
    epochs = max(epochs, math.ceil(run.updates / steps))
    groups = [{"params": list(module.parameters()), "lr": rate} for module, rate in rates]
    optimizer = torch.optim.Adam(groups, fused=True)
    end = 0 if run.lr_decay == "linear" else 1
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1, end, epochs * steps)
    parts = {"network": network, "optimizer": optimizer, "decay": decay}

    # Go on where the same command stopped before.
    saved = load(run, name) or {"history": [], "best": -math.inf}
    if "optimizer" in saved:
        torch.set_rng_state(saved["random"])
        for key, part in parts.items():
            part.load_state_dict(saved[key])
    finished = "scores" in saved
    for epoch in range(len(saved["history"]) + 1, epochs + 1) if not finished else ():
        # Train on every row once.
        run.place = f"seed {run.seed}  fold {run.number}  {name:<26}  epoch {epoch:>3}/{epochs}"
        trained.train()
        order = train[torch.randperm(len(train))].tensor_split(steps)
        drawn = view.drawn(torch.randint(2**31, ()).item()) if hasattr(view, "drawn") else view
        means, hidden = {}, processes()[0] > 0 or None  # None: unless it is a terminal
        batches = forward(run, trained, drawn, order)
        for rows, outputs in tqdm(batches, name, steps, leave=False, disable=hidden):
            terms = loss_of(rows, *outputs)
            optimizer.zero_grad()
            terms["loss"].backward()
            optimizer.step()
            decay.step()
            for term, value in terms.items():
                means[term] = means.get(term, 0) + value.detach() * (len(rows) / len(train))

        # Score it on the rows that choose the epoch, and keep the best.
        now = float(np.mean([headline(value) for value in scores_of(run.choose).values()]))
        if now > saved["best"]:
            weights = {key: t.cpu().clone() for key, t in full.state_dict().items()}
            saved.update(best=now, weights=weights)

        # Save all that is needed to go on.
        row = {"fold": run.number, "stage": name.partition("_")[0], "model": name, "epoch": epoch}
        row.update({term: value.item() for term, value in means.items()}, score=now)
        saved.update({key: part.state_dict() for key, part in parts.items()})
        saved.update(history=[*saved["history"], row], random=torch.get_rng_state())
        save(run, name, saved)
        print(f"{run.place}  loss {row['loss']:.4f}  score {now:.4f}", flush=True)

    # Score the best epoch on the validation rows, and save all that is needed to use it.
    full.load_state_dict(saved["weights"])
    if not finished:
        kept = {key: saved[key] for key in ("weights", "history")}
        save(run, name, {**kept, "scores": scores_of(run.val), **about})


# ---- stage 1: teachers --------------------------------------------------------------------------


def single(run, view, name=None):
    """The network of one view, a backbone with a head: of the file `name`, or as it starts."""
    source, published = getattr(run.data, view), getattr(run, f"{view}_weights")
    fast = run.device == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    encoder = models.backbone(source.shape[1:], run.dim, run.width, bfloat16=fast)
    network = models.Single(encoder, nn.Linear(run.dim, len(run.data.names)))
    vectors = isinstance(encoder, models.Encoder)
    if published and vectors:
        refuse(f"argument --{view}-weights: it is for raw data, and this data set holds vectors")
    if name:
        network.load_state_dict(load(run, name, needed=True)["weights"])
    elif vectors:
        encoder.fit_standardisation(source[run.train])
    elif published:
        read(Path(published), lambda weights: models.load_published(encoder, weights))
    return network.to(run.device)


def embeddings(run):
    """z_v and z_p of all clips by the backbones of stage 1, (N, 2, D), from files or made."""
    both = []
    for view in VIEWS:
        source, name = getattr(run.data, view), f"teachers_{view}_embedding"
        saved = load(run, name)
        if saved is None:
            encoder, rows = single(run, view, f"teachers_{view}").encoder, torch.arange(len(source))
            saved = {"z": predict(run, encoder, source, rows)[0]}
            save(run, name, saved)
        both.append(saved["z"])
    return torch.stack(both, dim=1)


def teachers(run):
    """Stage 1. Each backbone learns the task alone; then the joint teacher and T-Net learn."""

    def loss_of(rows, z, prediction):
        return {"loss": mtpkdot.task_loss(prediction, run.label(rows))}

    # A backbone with a head for each view. The visual one is the visual-only baseline.
    for view in VIEWS:
        seed_everything(run, view)
        network, source = single(run, view), getattr(run.data, view)
        how = ([(network, run.lr_backbone)], run.epochs_backbone, source, loss_of)
        fit(run, f"teachers_{view}", network, *how, [view])

    # The joint teacher: the fusion of both embeddings, which stay as they are.
    z = embeddings(run)
    seed_everything(run, "joint")
    joint = models.Fusion(run.dim, len(run.data.names)).to(run.device)
    how = ([(joint, run.lr_joint)], run.epochs_joint, z, loss_of)
    fit(run, "teachers_joint", joint, *how, ["joint"])

    # T-Net: the privileged embedding, hallucinated from the visual one.
    seed_everything(run, "tnet")
    tnet = models.TNet(run.dim).to(run.device)

    def tnet_loss(rows, hallucinated):
        z_p = z[rows, 1].to(hallucinated.device)
        return {"loss": mtpkdot.tnet_loss(hallucinated, z_p, run.tnet_loss)}

    fit(run, "teachers_tnet", tnet, [(tnet, run.lr_tnet)], run.epochs_tnet, z[:, 0], tnet_loss, [])


# ---- stage 2: align -----------------------------------------------------------------------------


def align(run):
    """Stage 2. Adapters pull both single embeddings to the joint one, and the joint one to them."""
    seed_everything(run, "align")
    network = models.Teachers(run.dim, len(run.data.names)).to(run.device)
    network.joint.load_state_dict(load(run, "teachers_joint", needed=True)["weights"])

    # The distance of the embeddings, and the task of all three teachers.
    def loss_of(rows, z, predictions):
        z_j, a_v, a_p = z.unbind(1)
        distance = mtpkdot.alignment_loss(a_v, a_p, z_j)
        tasks = [mtpkdot.task_loss(said, run.label(rows)) for said in predictions.unbind(1)]
        loss = mtpkdot.align_stage_loss(distance, *tasks, run.w_align, run.w_head)
        return {"loss": loss, "align": distance}

    # An epoch is best where all three are good. The released code asks the joint one alone, which,
    # trained in stage 1, is at its best before the adapters have learned.
    names = ["joint_aligned", *mtpkdot.TEACHERS[1:]]
    rates = [(network.joint, run.lr_fusion)]
    rates += [(part, run.lr_adapter) for part in (network.adapters, network.heads)]
    fit(run, "align", network, rates, run.epochs_align, embeddings(run), loss_of, names)


# ---- stage 3: student ---------------------------------------------------------------------------

STRUCTURE = {"task": "w_task", "ot": "w_ot", "centroid": "w_centroid"}
METHODS = {
    # student: (stage of its teachers, whom it follows, {term of its loss: weight, or its option})
    "mtpkdot": ("align", "least loss", STRUCTURE),
    "mtpkdot-unaligned": ("teachers", "least loss", STRUCTURE),
    "mtpkdot-no-centroid": ("align", "least loss", {"task": "w_task", "ot": "w_ot"}),
    "mtpkdot-joint": ("align", "joint", STRUCTURE),
    "mtpkdot-visual": ("align", "adapted_visual", STRUCTURE),
    "mtpkdot-privileged": ("align", "adapted_privileged", STRUCTURE),
    "pkdot": ("teachers", "joint", {"task": 1, "ot": "w_pkdot_ot"}),
    "mse": ("teachers", "joint", {"task": 1, "mse": "w_feature"}),
    "cosine": ("teachers", "joint", {"task": 1, "cosine": "w_feature"}),
    "rkd": ("teachers", "joint", {"task": 1, "rkd": "w_feature"}),
    "task": ("teachers", "joint", {"task": 1}),  # the student without distillation
    "visual": ("teachers", "joint", {"task": 1}),  # the visual network of stage 1, trained on
}


def what_teachers_say(run, stage, z):
    """Of z_v and z_p (N, 2, D): embeddings (N, 3, D) and predictions (N, 3, K) of the teachers, of
    those of stage 2 or of those that stage 1 left, without adapters."""
    network = models.Teachers(run.dim, len(run.data.names), adapters=stage == "align")
    if stage == "align":
        network.load_state_dict(load(run, "align", needed=True)["weights"])
    else:
        network.joint.load_state_dict(load(run, "teachers_joint", needed=True)["weights"])
        for view in VIEWS:
            network.heads[view] = single(run, view, f"teachers_{view}").head
    return predict(run, network.to(run.device), z, torch.arange(len(z)))


def student(run, method):
    """Stage 3. A student on visual input learns the task, and what its loss takes from a teacher.

    All students start from the same weights and see the same batches.
    """
    stage, teacher, terms = METHODS[method]
    weights = {term: getattr(run, w) if isinstance(w, str) else w for term, w in terms.items()}
    transport = {"k": run.k, "which": run.anchors, "shift": run.shift == "min", "eps": run.eps}
    transport["debias"] = run.ot == "debiased"
    z = embeddings(run)
    z_teachers, predictions = what_teachers_say(run, stage, z)

    # The student: the visual backbone of stage 1, or afresh; T-Net; a fusion of its own.
    seed_everything(run, "student")
    scratch = run.student_backbone == "scratch"
    baseline = single(run, "visual", None if scratch else "teachers_visual")
    tnet, view = models.TNet(run.dim), run.data.visual
    tnet.load_state_dict(load(run, "teachers_tnet", needed=True)["weights"])
    fusion = models.Fusion(run.dim, len(run.data.names))
    full = network = models.Student(baseline.encoder, tnet.composed(), fusion).to(run.device)
    if method == "visual":
        full = network = baseline
    elif run.student_backbone == "frozen":  # the same network, on embeddings instead of clips
        network, view = models.Student(nn.Identity(), full.tnet, fusion), z[:, 0]

    # Its loss on a batch: pick the teacher, then add up the terms.
    def loss_of(rows, z_s, prediction):
        label = run.label(rows)
        if teacher == "least loss":
            theirs = predictions[rows].to(run.device).unbind(1)
            losses = torch.stack([mtpkdot.task_loss(said, label) for said in theirs])
            chosen = mtpkdot.choose_teacher(losses)
        else:
            chosen = torch.tensor(mtpkdot.TEACHERS.index(teacher), device=run.device)
        z_t = z_teachers[rows].to(run.device).index_select(1, chosen.view(1)).squeeze(1)
        terms = mtpkdot.student_loss(weights, prediction, label, z_s, z_t, **transport)
        return {**terms, **{name: chosen == i for i, name in enumerate(mtpkdot.TEACHERS)}}

    # Train it. Its file holds all that inference needs.
    seed_everything(run, "batches")
    pace = "pkdot" if method == "pkdot" else "student"
    how = ([(network, getattr(run, f"lr_{pace}"))], getattr(run, f"epochs_{pace}"), view, loss_of)
    about = {"method": method, "task": run.data.task, "names": run.data.names, "val": run.val}
    about.update(dim=run.dim, width=run.width, input_shape=list(run.data.visual.shape[1:]))
    about["trained_on"] = datasets.digest(run.data.visual)
    fit(run, f"student_{method}", network, *how, [method], full, **about)


# ---- evaluation: the student alone --------------------------------------------------------------


def evaluate(args):
    """Score a saved student on visual input, and write what it predicts."""

    def opened(saved):
        args.dataset = args.dataset or saved["origin"]["dataset"]
        args.levels, args.place = saved["origin"]["levels"], args.student
        about = (saved[key] for key in ("names", "task", "input_shape", "trained_on"))
        return models.load_student(saved), saved["val"].long(), *about

    network, val, names, task, mine, trained_on = read(args.student, opened)
    data = datasets.load(args, need_privileged=False, need_label=not args.predictions)
    theirs = list(data.visual.shape[1:])
    if theirs != mine:
        refuse(f"{args.student} is for input shape {mine}; the data has {theirs}")

    # On the data that it was trained with, only the validation rows say something.
    own = datasets.digest(data.visual) == trained_on
    rows = val if own else torch.arange(len(data.visual))
    kind = "validation rows of its own data" if own else "rows, all, as they are not its own data"
    print(f"{args.student}: {len(rows)} {kind}")
    prediction = predict(args, network.to(args.device), data.visual, rows)[1]
    if args.predictions and processes()[0] == 0:
        classes = task == "classification"
        columns = prediction.softmax(1) if classes else prediction
        header = ["prediction", *(f"p_{name}" for name in names)] if classes else names
        name_of = str if torch.is_tensor(data.visual) else data.visual.name
        with open(args.predictions, "w", newline="", errors="surrogateescape") as file:
            lines = csv.writer(file, lineterminator="\n")
            lines.writerow(["name", *header])
            for row, values in zip(rows.tolist(), columns.tolist()):
                chosen = [names[int(np.argmax(values))]] if classes else []
                lines.writerow([name_of(row), *chosen, *values])
        print(f"Predictions saved in {args.predictions}.")
    if data.label is not None:
        if data.task != task or not set(data.names) <= set(names):
            theirs = f"{data.task} of {data.names}"
            refuse(f"{args.student} knows {task} of {names}; the data is {theirs}")
        columns = torch.tensor([names.index(name) for name in data.names])
        if data.task == "classification":
            data, columns = data._replace(label=columns[data.label]), slice(None)
        value = cell(score(data, prediction[:, columns], rows))
        print(f"Score: {value}, {data.task} of {data.names}, from visual input alone.")


# ---- report -------------------------------------------------------------------------------------


def collect(run):
    """The scores of a fold, and its history, from what its folder holds."""
    report, history = {"seed": run.seed, "fold": run.number}, []
    report.update(students={}, teacher_picks={})
    names = [f"teachers_{name}" for name in (*VIEWS, "joint", "tnet")] + ["align"]
    for name in [*names, *(f"student_{method}" for method in METHODS)]:
        saved = load(run, name)
        if saved and "scores" in saved:
            history += saved["history"]
            (report["students"] if "method" in saved else report).update(saved["scores"])
    followed = [row for row in history if row["model"] == "student_mtpkdot"]
    for teacher in mtpkdot.TEACHERS if followed else ():
        report["teacher_picks"][teacher] = float(np.mean([row[teacher] for row in followed]))
    return report, history


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
    error = lambda values: stats.sem(values) if len(values) > 1 else None  # noqa: E731
    names = [name for group in ("data", *STAGES) for name in args.groups[group]]
    result["arguments"] = {name: getattr(args, name) for name in names}
    result.update(folds=reports, mean=merged(units, np.mean), stderr=merged(units, error))
    for other in ("task", "visual"):
        less = result[f"less_{other}"] = {}
        for method in result["mean"]["students"]:
            both = [u["students"] for u in units if {method, other} <= set(u["students"])]
            if len(both) > 1 and method != other:
                gaps = [headline(s[method]) - headline(s[other]) for s in both]
                margin, gap = stats.sem(gaps) * stats.t.ppf(0.975, len(gaps) - 1), np.mean(gaps)
                less[method] = {"mean": gap, "low": gap - margin, "high": gap + margin}
    return result


def cell(value, error=None):
    """A score as text: percent for an accuracy, each column's CCC for a regression."""
    text = f"{100 * headline(value):.1f}"
    if isinstance(value, dict):
        text = "/".join("-" if c is None else f"{c:.3f}" for n, c in value.items() if n != "mean")
    return text if headline(error) is None else f"{text} ± {cell(error)}"


def show(args, data, result):
    """Print the scores, and each student's paired differences."""
    means, errors, picks = result["mean"], result["stderr"], result["mean"]["teacher_picks"]
    unit = "accuracy in %" if data.task == "classification" else f"CCC of {'/'.join(data.names)}"
    print(f"\n{unit} ± standard error; paired differences [95 % interval], * where that excludes 0")
    for model in [name for name in means if name not in ("tnet", "students", "teacher_picks")]:
        print(f"{model.replace('_', ' '):<30}{cell(means[model], errors[model])}")
    for method, value in means["students"].items():
        line = f"student {method:<22}{cell(value, errors['students'][method]):<30}"
        for other in ("task", "visual"):
            gap = result[f"less_{other}"].get(method)
            if gap:
                scale, digits = (100, 1) if data.task == "classification" else (1, 3)
                mean, *ends = (f"{scale * end:+.{digits}f}" for end in gap.values())
                sure = "*" if gap["low"] * gap["high"] > 0 else " "
                line += f"less {other} {mean} [{', '.join(ends)}] {sure}  "
        print(line.rstrip())
    if picks:
        shares = (f"{teacher.replace('_', ' ')} {share:.0%}" for teacher, share in picks.items())
        print(f"Teacher that mtpkdot picked, share of training clips: {', '.join(shares)}.")
    print(f"Saved in {args.out}: results.json, history.csv, pictures, and a folder a fold.")


def draw(run, history):
    """history.png: loss above score, a line a fold. similarity.png: of clips in order of label."""
    # The joint teacher's similarities beside those of the first student.
    shown, rows = {}, run.val[torch.linspace(0, len(run.val) - 1, min(len(run.val), 240)).long()]
    rows = rows[run.data.label[rows].view(len(rows), -1)[:, 0].argsort(stable=True)]
    for method in [m for m in run.methods if m != "visual" and load(run, f"student_{m}")][:1]:
        z = what_teachers_say(run, METHODS[method][0], embeddings(run)[rows])[0]
        network = models.load_student(load(run, f"student_{method}")).to(run.device)
        z_s = predict(run, network, run.data.visual, rows)[0]
        shown = {"joint teacher": z[:, 0], f"student {method}": z_s}
    if processes()[0] > 0:
        return
    try:
        import matplotlib
    except ImportError:
        return print("No pictures: they need matplotlib (pip install matplotlib).")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = dict.fromkeys(row["model"] for row in history)
    _, axes = pyplot.subplots(2, len(names), figsize=(2.5 * len(names), 5), squeeze=False)
    for (top, bottom), name in zip(axes.T, names):
        top.set_title(name, fontsize=7)
        for fold in dict.fromkeys(row["fold"] for row in history):
            own = [row for row in history if (row["model"], row["fold"]) == (name, fold)]
            top.plot([row["loss"] for row in own])
            bottom.plot([row["score"] for row in own])
    pyplot.savefig(run.out / "history.png")
    if shown:
        _, axes = pyplot.subplots(1, 2, figsize=(8, 4))
        for axis, (title, z) in zip(axes, shown.items()):
            axis.imshow(mtpkdot.similarity(z).numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
            axis.set_title(f"cosine similarity, {title}")
        pyplot.savefig(run.out / "similarity.png")
    pyplot.close("all")


# ---- main ---------------------------------------------------------------------------------------


def train_all(args):
    """All stages that are asked for, seed by seed and fold by fold, then the report."""
    data, every, todo = datasets.load(args), [], STAGES if args.stage == "all" else [args.stage]
    args.content = datasets.digest(data.visual, data.privileged, data.label, data.group, data.split)
    if args.folds_by == "clip":
        data = data._replace(group=None)
    for seed in range(args.seed, args.seed + args.seeds):
        reports, history = [], []
        folds = datasets.folds(data, args.folds, seed, args.train_rows, args.select == "train")
        if (args.fold or 0) >= len(folds):
            refuse(f"argument --fold: the folds are 0 to {len(folds) - 1}")
        for number, (train, choose, val) in enumerate(folds):
            run = argparse.Namespace(**vars(args))
            vars(run).update(data=data, seed=seed, number=number)
            vars(run).update(train=train, choose=choose, val=val)
            run.out = args.out / f"seed{seed}" if args.seeds > 1 else args.out
            run.folder = run.out / f"fold{number}"
            run.label, run.place = lambda rows: data.label[rows].to(args.device), "a saved network"
            if min(len(train), len(choose), len(val), args.batch_size) < 2 * processes()[1]:
                refuse(f"fold {number} or a batch has too few rows for {processes()[1]} processes")
            # A folder of another run is refused before anything is made.
            files = sorted(run.folder.glob("student*.pt")) + sorted(run.folder.glob("*.pt"))
            for name in [path.stem for path in files if "embedding" not in path.stem]:
                load(run, name)
            if args.fold in (None, number):
                teachers(run) if "teachers" in todo else None
                align(run) if "align" in todo else None
                for method in args.methods if "student" in todo else ():
                    student(run, method)
            report, rows = collect(run)
            if rows:
                last, reports, history = run, [*reports, report], history + rows
        every += reports
        columns, file = dict.fromkeys(key for row in history for key in row), io.StringIO()
        lines = csv.DictWriter(file, columns, lineterminator="\n")
        lines.writeheader()
        lines.writerows(history)
        write(run.out / "history.csv", file.getvalue().encode())
        for folder, scored in {run.out: reports, args.out: every}.items():
            text = json.dumps(result := summary(args, data, scored), indent=2)
            write(folder / "results.json", f"{text}\n".encode())
        draw(last, history)
    show(args, data, result)


def main(argv=None):
    warnings.showwarning = lambda message, *_: print(f"Warning: {message}", flush=True)
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        args = options(argv)
        if count > 1:
            distributed.init_process_group("nccl" if args.device == "cuda" else "gloo")
        if count > 1 and args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if rank > 0:
            sys.stdout = open(os.devnull, "w")
        evaluate(args) if args.stage == "eval" else train_all(args)
    except (datasets.DataError, OSError) as error:
        text = str(error)
        if isinstance(error, OSError):
            text = f"{error.filename or 'output'}: {error.strerror}; what was saved before stays"
        # A reading process's comes with its stack trace, whose last line is the message.
        text = text.rstrip().split("\n")[-1].removeprefix("data.DataError: ")
        print(f"train.py: {text}", file=sys.stderr if rank == 0 else sys.stdout)
        sys.exit(2)
    if count > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    FIRST = os.getpid() if os.environ.get("RANK", "0") == "0" else None

    def stop(number, frame):
        """Ctrl-C and SIGTERM end the process at once: what is on disk is whole at any moment."""
        if os.getpid() == FIRST:  # not in one of torchrun's others, nor in one that reads data
            os.write(2, b"train.py: stopped; the same command goes on from the last epoch\n")
        os._exit(128 + number)

    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, stop)
    main()
