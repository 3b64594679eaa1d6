"""Train MT-PKDOT: teachers, alignment, student. `python train.py --help` lists the options.

Reading order:
    options             what can be set; the defaults are the method's
    files and scores    small helpers
    backbones           what embeds a view, in one process or in several
    fit                 the one training loop: every network below goes through it
    teachers            stage 1: both backbones, the joint teacher, T-Net
    align               stage 2: adapters and heads, self-distilled with the joint teacher
    student             stage 3: one student a method, and what it is compared with
    evaluate            a saved student on visual input alone
    collect, show       from the saved stages to results.json, history.csv and the printed table
    main

Each stage saves a file a fold to --out, with weights, scores and history, and starts from the files of the
stages before it. results.json and history.csv are only ever computed from these files. Every file carries a
key of what it was made from, so that a student is never reported beside teachers it did not have.
"""

import argparse
import contextlib
import copy
import csv
import gc
import io
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import mtpkdot
from data import BIOVID_LEVELS, BIOVID_SIGNALS, DataError, augment, digest, folds, load, stamp, stream
from models import (
    DIM,
    R3D18,
    Encoder,
    Fusion,
    Head,
    ResNet18,
    Student,
    Teachers,
    TNet,
    load_published,
    synchronise_batch_norm,
)

VIEWS = ("visual", "privileged")
# What stage 3 trains: the method; what it is without one of its parts; other distillations; and two without any.
VARIANTS = (
    "mtpkdot-unaligned",  # the teachers as stage 1 left them
    "mtpkdot-no-centroid",
    "mtpkdot-joint",  # that teacher only, as in the two below
    "mtpkdot-visual",
    "mtpkdot-privileged",
)
REFERENCES = ("task", "visual")  # what the others have to beat
METHODS = ("mtpkdot", *VARIANTS, "pkdot", "mse", "cosine", "rkd", *REFERENCES)
CHUNK = 4096  # rows of a forward pass where nothing is trained

# Defaults of the options --epochs-NAME, --lr-NAME and --w-NAME: those of the study in README, or the released code's.
# None: 30 epochs for the backbones of raw data and 100 for those of vectors; pkdot's as the student's.
EPOCHS = {"backbone": None, "joint": 20, "tnet": 30, "align": 10, "student": 10, "pkdot": None}
RATES = {"backbone": 1e-3, "joint": 5e-4, "tnet": 5e-4, "adapter": 5e-4, "fusion": 1e-4, "student": 1e-3, "pkdot": None}
WEIGHTS = {"align": 0.5, "head": 0.5, "task": 0.8, "ot": 1.0, "centroid": 0.02, "pkdot-ot": 1.25, "feature": 1.0}
UPDATES = 200
# --preset released. Source: released code, but for backbone, joint and the epochs of T-Net, which it leaves open.
RELEASED = {
    "folds_by": "clip", "dim": DIM, "updates": 0, "epochs_pkdot": 20, "lr_decay": "none",
    "lr_joint": 1e-4, "lr_tnet": 5e-5, "lr_adapter": 5e-3, "lr_student": 5e-4, "lr_pkdot": 1e-4,
    "student_backbone": "frozen", "anchors": "least", "shift": "min", "w_ot": 0.2, "w_centroid": 0.2, "w_pkdot_ot": 0.6,
}  # fmt: skip
LABELS = {
    "visual": "visual only, stage 1",
    "privileged": "privileged only",
    "joint": "joint teacher",
    "joint_aligned": "joint teacher, aligned",
    "adapted_visual": "adapted visual teacher",
    "adapted_privileged": "adapted privileged teacher",
}


# ---- options ----------------------------------------------------------------------------------------


def fail(message):
    """One line, exit code 2."""
    print(f"train.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def number(kind, least, above=False):
    """An argparse type: a finite number of at least (or above) `least`."""

    def parse(text):
        value = kind(text)
        if not least <= value < (2**63 if kind is int else math.inf) or (above and value == least):
            raise argparse.ArgumentTypeError(f"{text} is not {'above' if above else 'at least'} {least}")
        return value

    parse.__name__ = kind.__name__
    return parse


def options(argv=None):
    count, weight, rate = number(int, 1), number(float, 0), number(float, 0, above=True)
    parser = argparse.ArgumentParser(description="Train MT-PKDOT in three stages, or score a trained student.")
    parser.error = fail
    add = parser.add_argument
    add("--dataset", default="synthetic", choices=["synthetic", "features", "affwild2", "biovid"])
    add("--data", help="path of the data set (default data/affwild2 or data/biovid)")
    add("--stage", default="all", choices=["all", "teachers", "align", "student", "eval"])
    add("--method", default="mtpkdot", metavar="M,M...", help=f"students: all, or of {', '.join(METHODS)}")
    add("--out", type=Path, help="folder of the run (default runs/DATASET)")
    add("--folds", type=number(int, 2), metavar="K", help="number of folds (default: the data's own split, else 5)")
    add("--fold", type=number(int, 0), metavar="I", help="run this fold only, counted from 0")
    add("--folds-by", default="person", choices=["person", "clip"], help="clip: the released code's, sharing people")
    add("--seed", type=number(int, 0), default=0)
    add("--seeds", type=count, default=1, metavar="N", help="repeat everything with N seeds, from --seed on")
    add("--train-rows", type=number(int, 2), metavar="N", help="train on N rows of each fold, drawn at random")
    add("--preset", choices=["released"], help="the released code's settings; what is given besides goes first")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add("--batch-size", type=count, default=128, help="default 128")
    add("--updates", type=number(int, 0), default=UPDATES, help=f"least a network trains for (default {UPDATES})")
    add("--epochs", type=count, help="of everything that trains, in the place of --updates and --epochs-... below")
    add("--dim", type=number(int, 2), help=f"embedding size, even (default {DIM}; features and synthetic 128)")
    add("--width", type=count, help="of the first stage of both 18-layer networks (default 64; synthetic 4)")
    add("--visual-weights", type=Path, metavar="FILE", help="published r3d_18 weights to start from")
    add("--privileged-weights", type=Path, metavar="FILE", help="published resnet18 weights to start from")
    add("--clip-stride", type=count, default=1, metavar="N", help="affwild2: take every N-th usable frame")
    add("--levels", default="BL1,PA4", help="biovid: classes, of BL1, PA1 ... PA4 (default BL1,PA4)")
    add("--signal", default="emg_corrugator", choices=BIOVID_SIGNALS, help="biovid: privileged signal")
    add("--skip-bad", action="store_true", help="affwild2, biovid: leave out bad clips, and say how many")
    add("--augment", action="store_true", help="mirror and shift the training clips of raw video")
    add("--amp", default="auto", choices=["auto", "on", "off"], help="bfloat16 in raw data's backbones (auto: on CUDA)")
    add("--workers", type=number(int, 0), default=min(8, os.cpu_count() or 1), help="processes that read raw data")
    add("--k", type=count, default=30, help="anchors a row (default 30)")
    add("--anchors", default="most", choices=["most", "least"], help="k most (default) or least similar clips")
    add("--eps", type=rate, default=0.01, help="entropy of the transport, in units of its cost (default 0.01)")
    add("--shift", default="none", choices=["none", "min"], help="min: similarities less their own minimum before OT")
    add("--ot", default="debiased", choices=["debiased", "entropic"], help="form of the transport (default debiased)")
    add("--tnet-loss", default="mse", choices=["mse", "mmd"], help="default mse")
    backbones = ["finetune", "frozen", "scratch"]
    add(
        "--student-backbone", default="finetune", choices=backbones, help="the visual one in stage 3 (default finetune)"
    )
    add("--lr-decay", default="linear", choices=["linear", "none"], help="of every rate, to zero (default linear)")
    for name, epochs in EPOCHS.items():
        add(f"--epochs-{name}", type=count, default=epochs, metavar="N", help=f"default {epochs or 'depends'}")
    for name, value in RATES.items():
        add(f"--lr-{name}", type=rate, default=value, metavar="X", help=f"default {value or 'as student'}")
    for name, value in WEIGHTS.items():
        add(f"--w-{name}", type=weight, default=value, metavar="X", help=f"weight of a loss term (default {value})")

    if parser.parse_known_args(argv)[0].preset:
        parser.set_defaults(**RELEASED)
    args = parser.parse_args(argv)
    raw = args.dataset in ("affwild2", "biovid")
    args.dim = args.dim or (DIM if raw else 128)
    args.epochs_backbone = args.epochs_backbone or (100 if args.dataset == "features" else 30)
    if args.dim % 2:
        fail(f"argument --dim: {args.dim} is odd, and two attention heads share it")
    if args.w_align > 1:
        fail(f"argument --w-align: {args.w_align} is above 1")
    args.methods = METHODS if args.method == "all" else args.method.split(",")
    if not set(args.methods) <= set(METHODS):
        fail(f"argument --method: {args.method} is not all, nor of {', '.join(METHODS)}")
    args.levels = args.levels.split(",")
    if not set(args.levels) <= set(BIOVID_LEVELS) or len(set(args.levels)) < max(2, len(args.levels)):
        fail(
            f"argument --levels: {','.join(args.levels)} is not two or more different ones of {','.join(BIOVID_LEVELS)}"
        )
    args.out = args.out or Path("runs") / args.dataset
    for name in EPOCHS:
        setattr(args, f"epochs_{name}", args.epochs or getattr(args, f"epochs_{name}"))
    args.updates = 0 if args.epochs else args.updates
    args.epochs_pkdot, args.lr_pkdot = args.epochs_pkdot or args.epochs_student, args.lr_pkdot or args.lr_student
    if args.data and args.dataset == "synthetic":
        fail("argument --data: the synthetic data is made in memory; name the --dataset of this path, features perhaps")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("argument --device: this machine has no CUDA device; use --device cpu")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.amp == "auto":  # bfloat16 is fast from compute capability 8 on
        args.amp = "on" if args.device == "cuda" and torch.cuda.get_device_capability() >= (8, 0) else "off"
    args.width = args.width or (4 if args.dataset == "synthetic" else 64)
    return args


# ---- files and scores -------------------------------------------------------------------------------


def seed_everything(args, *where):
    """The randomness of a part of the run depends on --seed and on which part it is, not on what ran before."""
    torch.manual_seed(zlib.crc32(repr((args.seed, *where)).encode()))


def write(path, payload):
    """Text, or a dict for torch.save, by way of a temporary file: a killed run leaves no half file."""
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(payload, str):
            temporary.write_text(payload)
        else:
            torch.save(payload, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        fail(f"{path}: cannot be written ({error})")


def stage_file(args, fold, name):
    return args.out / f"fold{fold}" / f"{name}.pt"


def read(path):
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {"key": saved["key"], **saved}
    except Exception as error:  # a damaged or foreign file can raise anything; its reader needs the name
        fail(f"{path}: cannot be read, run that stage again ({type(error).__name__})")


def earlier(args, fold, stage, key):
    """The saved file of an earlier stage; refused if it is missing or was made from something else."""
    path = stage_file(args, fold, stage)
    if not path.exists():
        fail(f"{path} is missing: run --stage {stage} first, with the same data, --folds, --seed and --out")
    saved = read(path)
    if saved["key"] != key:
        fail(f"{path} was made from other data, --folds, --seed, --dim or teachers: run --stage {stage} again")
    return saved


def score(data, prediction, rows):
    """Accuracy in 0..1, or {column: CCC, "mean": their mean}."""
    label = data.label[rows]
    if data.task == "classification":
        return (prediction.argmax(1) == label).double().mean().item()
    columns = mtpkdot.ccc(prediction.double(), label.double()).tolist()
    return {**dict(zip(data.names, columns)), "mean": statistics.fmean(columns)}


def headline(value):
    return value["mean"] if isinstance(value, dict) else value


@torch.no_grad()
def over(rows, function):
    """function(rows), a chunk of rows at a time."""
    return torch.cat([function(part) for part in rows.split(CHUNK)])


def every_row(data):
    return torch.arange(len(data.label), device=data.label.device)


# ---- backbones, in one process or in several ---------------------------------------------------------


def processes():
    """(number of this process, number of processes): (0, 1), or what torchrun started."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def share(rows):
    """This process's part of the rows."""
    number, count = processes()
    return rows.tensor_split(count)[number]


class SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes, whose gradient is the sum of the gradients of all."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad):
        return SumOverProcesses.forward(ctx, grad)


def whole(part, total):
    """The parts of all processes put together again, (n, ...) each -> (total, ...).

    As every process goes on to the same loss, and gradients of all come back to each part, a part's gradient is that
    of the sum of as many losses as there are processes; DistributedDataParallel, which averages, makes it right.
    """
    if processes()[1] == 1:
        return part
    padded = part.new_zeros(total, *part.shape[1:])
    padded[share(torch.arange(total, device=part.device))] = part
    return SumOverProcesses.apply(padded)


def is_raw(view):
    """Whether a view holds frames or spectrograms, not vectors."""
    return view[0].dim() > 1


def backbone(view, dim, width):
    """An untrained network that embeds the view's input: vectors, clips of frames, or spectrograms."""
    if not is_raw(view):
        return Encoder(len(view[0]), dim)
    return R3D18(dim, width) if view[0].dim() == 4 else ResNet18(dim, width)


def start_from(network, path):
    try:
        load_published(network, torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        fail(f"{path}: no such file")
    except ValueError as error:
        fail(f"{path}: {error}")
    except Exception as error:  # a damaged or foreign file can raise anything; its reader needs the name
        fail(f"{path}: not a file of published weights ({type(error).__name__})")


def forward(args, network, x):
    """network(x) in float32; raw input goes through it in bfloat16 where --amp says so."""
    with torch.autocast(args.device, torch.bfloat16, enabled=args.amp == "on" and x.dim() > 2):
        return network(x).float()


def inputs(args, view, batches):
    """The view's rows on the device of the run, batch by batch."""
    for x in stream(view, batches, args.workers, pin=args.device == "cuda"):
        yield x.to(args.device, non_blocking=True)


@torch.no_grad()
def embed(args, network, view, rows, shared=False):
    """network(view[rows]), a chunk of rows at a time; shared: all processes are here, and each does its part."""
    part = share(rows) if shared else rows
    chunks = inputs(args, view, part.split(args.batch_size if is_raw(view) else CHUNK))
    z = torch.cat([forward(args, network, x) for x in chunks])
    return whole(z, len(rows)) if shared else z


# ---- the one training loop --------------------------------------------------------------------------


def fit(args, where, network, rates, epochs, rows, loss_of, score_of, view=None, shared=False):
    """Train `network` with Adam and keep its best epoch. Returns {"best", "last", "history"}, the first two scores.

    where      (fold, stage, model), for the log
    rates      list of (module, learning rate)
    epochs     raised to what --updates asks for
    loss_of    rows of a batch (and the view there) -> dict of scalar tensors, of which "loss" is minimised; and the
               embedding on which the gradient of each other term is measured, in the first batch of an epoch, or None
    score_of   () -> score on the validation rows
    shared     all processes are here, and loss_of gets this one's share of the view
    """
    groups = [{"params": list(module.parameters()), "lr": rate} for module, rate in rates]
    optimizer = torch.optim.Adam(groups, fused=True)
    batches = max(1, min(math.ceil(len(rows) / args.batch_size), len(rows) // 2))  # of two clips at the least
    epochs, best, history = max(epochs, math.ceil(args.updates / batches)), None, []
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0 if args.lr_decay == "linear" else 1, epochs * batches)
    for epoch in range(1, epochs + 1):
        network.train()
        sums, pulls = {}, {}
        # Batches of nearly equal size: the similarities within a runt of two clips would mean nothing.
        order = rows[torch.randperm(len(rows)).to(rows.device)].tensor_split(batches)
        parts = [share(batch) for batch in order] if shared else order
        steps = zip(order) if view is None else zip(order, inputs(args, view, parts))
        hidden = processes()[0] > 0 or args.seeds > 1 or None  # None: where stderr is not a terminal
        for batch, *x in tqdm(steps, f"{where[2]} {epoch}/{epochs}", batches, leave=False, disable=hidden):
            try:
                terms, z = loss_of(batch, *x)
            except ValueError as error:  # what Sinkhorn refuses, such as the embeddings of a diverged student
                fail(f"fold {where[0]}, {where[2]}, epoch {epoch}: {error}")
            if z is not None and not pulls:
                for name in [name for name in terms if name != "loss"]:
                    (gradient,) = torch.autograd.grad(terms[name], z, retain_graph=True)
                    pulls[f"{name}_gradient"] = gradient.norm().item()
            optimizer.zero_grad(set_to_none=True)
            terms["loss"].backward()
            optimizer.step()
            decay.step()
            for name, value in terms.items():
                sums[name] = sums.get(name, 0) + value.detach() * (len(batch) / len(rows))
        network.eval()
        terms = {name: total.item() for name, total in sums.items()}
        if not all(map(math.isfinite, terms.values())):
            fail(f"fold {where[0]}, {where[2]}, epoch {epoch}: the loss is not finite ({terms}); try a lower --lr-...")
        value = score_of()
        if best is None or headline(value) > headline(best):
            best, weights = value, copy.deepcopy(network.state_dict())
        when = dict(zip(("fold", "stage", "model"), where), epoch=epoch)
        history.append({**when, **terms, **pulls, "score": headline(value)})
        if args.seeds == 1 or epoch == epochs:
            line = f"loss {terms['loss']:.4f}  validation {headline(value):.4f}"
            print(f"seed {args.seed}  fold {where[0]}  {where[2]:<19}  epoch {epoch:>3}/{epochs}  {line}", flush=True)
    network.load_state_dict(weights)
    return {"best": best, "last": value, "history": history}


# ---- stage 1: teachers ------------------------------------------------------------------------------


def teachers(args, data, fold, train, val, key):
    """Train both backbones with a head each, then the joint teacher and T-Net on their frozen embeddings."""
    outputs, z, weights, fitted = len(data.names), {}, {}, {}
    for view in VIEWS:
        seed_everything(args, fold, view)
        source, published = getattr(data, view), getattr(args, f"{view}_weights")
        encoder, head = backbone(source, args.dim, args.width).to(args.device), Head(args.dim, outputs).to(args.device)
        if published:
            start_from(encoder, published)
        elif not is_raw(source):
            encoder.fit_standardisation(source[train])
        network = trained = nn.Sequential(encoder, head)
        if processes()[1] > 1:
            synchronise_batch_norm(network, lambda row: whole(row, processes()[1]))
            trained = DistributedDataParallel(network)

        def loss_of(rows, x):
            if args.augment and x.dtype == torch.uint8:
                x = augment(x, share(torch.rand(len(rows), 3)))
            prediction = whole(forward(args, trained, x), len(rows))
            return {"loss": mtpkdot.task_loss(prediction, data.label[rows])}, None

        fitted[view] = fit(
            args, (fold, "teachers", view), network, [(network, args.lr_backbone)], args.epochs_backbone, train,
            loss_of, lambda: score(data, embed(args, network, source, val, shared=True), val), source, shared=True,
        )  # fmt: skip
        z[view] = embed(args, encoder, source, every_row(data), shared=True)
        weights[view], weights[f"{view}_head"] = encoder.state_dict(), head.state_dict()
    if processes()[0] > 0:
        return  # what follows runs on embeddings, fast, in the first process

    seed_everything(args, fold, "joint")
    joint = Fusion(args.dim, outputs).to(args.device)
    z_v, z_p = z["visual"], z["privileged"]

    def predict(rows):
        return joint(z_v[rows].unsqueeze(1), z_p[rows].unsqueeze(1))[1]

    fitted["joint"] = fit(
        args, (fold, "teachers", "joint"), joint, [(joint, args.lr_joint)], args.epochs_joint, train,
        lambda rows: ({"loss": mtpkdot.task_loss(predict(rows), data.label[rows])}, None),
        lambda: score(data, over(val, predict), val),
    )  # fmt: skip

    seed_everything(args, fold, "tnet")
    tnet = TNet(args.dim).to(args.device)
    variance = z_p.var(0, correction=0).mean()
    fitted["tnet"] = fit(
        args, (fold, "teachers", "tnet"), tnet, [(tnet, args.lr_tnet)], args.epochs_tnet, train,
        lambda rows: ({"loss": mtpkdot.tnet_loss(tnet(z_v[rows]), z_p[rows], args.tnet_loss)}, None),
        # Scored by the share of the privileged embedding's variance that it explains.
        lambda: (1 - over(val, lambda rows: tnet(z_v[rows]) - z_p[rows]).square().mean() / variance).item(),
    )  # fmt: skip
    weights["joint"], weights["tnet"] = joint.state_dict(), tnet.state_dict()
    saved = {
        "key": key,
        "id": digest(*(t for module in weights.values() for t in module.values())),
        "weights": weights,
        "scores": {name: fitted[name]["best"] for name in (*VIEWS, "joint")},
        "history": [row for f in fitted.values() for row in f["history"]],
    }
    write(stage_file(args, fold, "teachers"), saved)
    embeddings(args, data, fold, saved, z)


def restored(module, weights, args):
    """A module with saved weights, frozen, on the device of the run."""
    module.load_state_dict(weights)
    return module.to(args.device).eval().requires_grad_(False)


def embeddings(args, data, fold, before, z=None):
    """z_v and z_p (N, D) of all clips, by the frozen backbones of stage 1, kept in a file."""
    key = "-".join([before["id"], *(stamp(getattr(data, view)) for view in VIEWS)])
    path = stage_file(args, fold, "embeddings")
    if z is None:
        if path.exists() and (kept := read(path))["key"] == key:
            return [kept[view].to(args.device) for view in VIEWS]
        z = {}
        for view in VIEWS:
            source = getattr(data, view)
            encoder = restored(backbone(source, args.dim, args.width), before["weights"][view], args)
            z[view] = embed(args, encoder, source, every_row(data))
    write(path, {"key": key, **{view: z[view].cpu() for view in VIEWS}})
    return [z[view] for view in VIEWS]


# ---- stage 2: alignment -----------------------------------------------------------------------------


def align(args, data, fold, train, val, key):
    """Pull both single-modality embeddings and the joint one together; keep the epoch of the best joint score."""
    before = earlier(args, fold, "teachers", key)
    z_v, z_p = embeddings(args, data, fold, before)
    seed_everything(args, fold, "align")
    network = Teachers(args.dim, len(data.names)).to(args.device)
    network.joint.load_state_dict(before["weights"]["joint"])

    def loss_of(rows):
        out = network(z_v[rows], z_p[rows])
        distance = mtpkdot.alignment_loss(*(out[name][0] for name in ("adapted_visual", "adapted_privileged", "joint")))
        tasks = [mtpkdot.task_loss(out[name][1], data.label[rows]) for name in mtpkdot.TEACHERS]
        return {"loss": mtpkdot.align_stage_loss(distance, *tasks, args.w_align, args.w_head), "align": distance}, None

    def score_of(name):
        return score(data, over(val, lambda rows: network(z_v[rows], z_p[rows])[name][1]), val)

    rates = [(network.adapters, args.lr_adapter), (network.heads, args.lr_adapter), (network.joint, args.lr_fusion)]
    fitted = fit(
        args, (fold, "align", "align"), network, rates, args.epochs_align, train, loss_of, lambda: score_of("joint")
    )
    write(stage_file(args, fold, "align"), {
        "key": before["id"],
        "id": before["id"] + digest(*network.state_dict().values()),
        "weights": network.state_dict(),
        "scores": {"joint_aligned": fitted["best"], **{name: score_of(name) for name in mtpkdot.TEACHERS[1:]}},
        "history": fitted["history"],
    })  # fmt: skip


# ---- stage 3: students ------------------------------------------------------------------------------


def needs_alignment(method):
    return method.startswith("mtpkdot") and method != "mtpkdot-unaligned"


def teachers_of(args, data, first, aligned, z_v, z_p):
    """Embeddings (3, N, D) and predictions (3, N, K) of the teachers, in the order of mtpkdot.TEACHERS, from the
    weights of stage 2, or, where aligned is None, from those of stage 1, which has no adapters."""
    network = Teachers(args.dim, len(data.names))
    if aligned is None:
        network.adapters = nn.ModuleDict({view: nn.Identity() for view in VIEWS})
        parts = {"joint": first["joint"], **{f"heads.{view}": first[f"{view}_head"] for view in VIEWS}}
        aligned = {f"{part}.{name}": t for part, weights in parts.items() for name, t in weights.items()}
    network = restored(network, aligned, args)
    with torch.no_grad():
        parts = [network(z_v[rows], z_p[rows]) for rows in every_row(data).split(CHUNK)]
    return [torch.stack([torch.cat([part[name][i] for part in parts]) for name in mtpkdot.TEACHERS]) for i in (0, 1)]


def student(args, data, fold, train, val, key, method):
    """Train one student on visual input, or, for method visual, the visual network of stage 1 for as many updates.

    mtpkdot follows, batch by batch, the best of the three aligned teachers; pkdot, mse, cosine and rkd follow the
    joint teacher of stage 1; task follows nobody. All start from the same weights and see the same batches. The
    backbone starts from stage 1 and trains along, stays as it is (frozen), or starts afresh (scratch); T-Net stays.
    """
    before = earlier(args, fold, "teachers", key)
    weights, dim, source = before["weights"], args.dim, data.visual
    frozen, scratch = (args.student_backbone == kind for kind in ("frozen", "scratch"))
    z_v, z_p = embeddings(args, data, fold, before)
    variant = method.removeprefix("mtpkdot-") if method in VARIANTS else None
    aligned = None
    if needs_alignment(method):
        before = earlier(args, fold, "align", before["id"])
        aligned = before["weights"]
    z_teachers, predictions = teachers_of(args, data, weights, aligned, z_v, z_p)
    only = {"joint": 0, "visual": 1, "privileged": 2}.get(variant)

    seed_everything(args, fold, "student")
    network = Student(backbone(source, dim, args.width), TNet(dim), Fusion(dim, len(data.names))).to(args.device)
    head = Head(dim, len(data.names)).to(args.device)
    tnet = restored(network.tnet, weights["tnet"], args)
    network.tnet = tnet.composed()
    if not scratch:
        network.encoder.load_state_dict(weights["visual"])
        head.load_state_dict(weights["visual_head"])
    elif args.visual_weights:
        start_from(network.encoder, args.visual_weights)
    elif not is_raw(source):
        network.encoder.fit_standardisation(source[train])
    if method == "visual":
        frozen, trained = False, nn.ModuleList([network.encoder, head])
    else:
        trained = network.fusion if frozen else network

    def predict(z):
        """Student embedding and prediction."""
        return (z, head(z)) if method == "visual" else network.from_embedding(z)

    def score_of():
        z = z_v[val] if frozen else embed(args, network.encoder, source, val)
        return score(data, over(torch.arange(len(val)), lambda rows: predict(z[rows])[1]), val)

    picks = torch.zeros(len(mtpkdot.TEACHERS), dtype=torch.long, device=args.device)
    transport = {
        "k": args.k, "which": args.anchors, "shift": args.shift == "min", "eps": args.eps,
        "debias": args.ot == "debiased",
    }  # fmt: skip

    def loss_of(rows, x=None):
        if x is not None and args.augment and x.dtype == torch.uint8:
            x = augment(x, torch.rand(len(rows), 3))
        label, z_j = data.label[rows], z_teachers[0][rows]
        z_s, prediction = predict(z_v[rows] if frozen else forward(args, network.encoder, x))
        if method.startswith("mtpkdot"):
            losses = torch.stack([mtpkdot.task_loss(p, label) for p in predictions[:, rows]])
            chosen = mtpkdot.choose_teacher(losses).view(1) if only is None else picks.new_full((1,), only)
            picks.index_add_(0, chosen, torch.ones_like(chosen))
            z_t = z_teachers[:, rows].index_select(0, chosen)[0]
            w = (args.w_task, args.w_ot, 0 if variant == "no-centroid" else args.w_centroid)
            terms = mtpkdot.student_loss(prediction, label, z_s, z_t, *w, **transport)
        elif method == "pkdot":
            terms = mtpkdot.pkdot_loss(prediction, label, z_s, z_j, args.w_pkdot_ot, **transport)
        elif method in ("task", "visual"):
            task = mtpkdot.task_loss(prediction, label)
            terms = {"loss": task, "task": task}
        else:
            terms = mtpkdot.feature_loss(prediction, label, z_s, z_j, method, args.w_feature)
        return terms, z_s

    pace = "pkdot" if method == "pkdot" else "student"
    seed_everything(args, fold, "batches")
    fitted = fit(
        args, (fold, "student", method), trained, [(trained, getattr(args, f"lr_{pace}"))],
        getattr(args, f"epochs_{pace}"), train, loss_of, score_of, None if frozen else source,
    )  # fmt: skip
    network.tnet = tnet
    write(stage_file(args, fold, f"student_{method}"), {
        "key": before["id"],
        "weights": (trained if method == "visual" else network).state_dict(),
        "scores": {"best": fitted["best"], "last": fitted["last"]},
        "history": fitted["history"],
        "picks": dict(zip(mtpkdot.TEACHERS, picks.tolist())),
        "dim": dim,
        "width": args.width,
        "input_shape": list(source[0].shape),
        "task": data.task,
        "names": data.names,
        "trained_on": digest(source, data.label),
        "val": val.cpu(),
    })  # fmt: skip


# ---- evaluation: the student alone ------------------------------------------------------------------


def evaluate(args, data, fold, method):
    """Score a saved student on visual input: on its fold's validation rows where `data` is what it was trained
    with, on every row otherwise."""
    path = stage_file(args, fold, f"student_{method}")
    saved = read(path)
    shape, names = list(data.visual[0].shape), saved["names"]
    if (shape, data.task) != (saved["input_shape"], saved["task"]):
        fail(f"{path} is for {saved['task']} of input shape {saved['input_shape']}; the data is {data.task} of {shape}")
    unknown = [name for name in data.names if name not in names]
    if unknown or (data.task == "regression" and data.names != names):
        fail(f"{path} knows the labels {names}; the data has {unknown or data.names}")
    rows, kind = every_row(data), "all rows of other data"
    if digest(data.visual, data.label) == saved["trained_on"]:
        rows, kind = saved["val"].to(args.device), "validation rows of its own data"
    if data.task == "classification":
        index = torch.tensor([names.index(name) for name in data.names], device=args.device)
        data = data._replace(label=index[data.label])
    dim = saved["dim"]
    network = Student(backbone(data.visual, dim, saved["width"]), TNet(dim), Fusion(dim, len(names)))
    network = restored(network, saved["weights"], args)
    network.tnet = network.tnet.composed()  # as it was trained
    print(f"fold {fold}  {method:<10}  {len(rows)} {kind}")
    z_v = embed(args, network.encoder, data.visual, rows)
    return score(data, over(torch.arange(len(rows)), lambda part: network.from_embedding(z_v[part])[1]), rows)


def evaluate_run(args, data):
    """Score the students that results.json lists, and write eval.json."""
    path = args.out / "results.json"
    if not path.exists():
        fail(f"{path} is missing: run --stage student first, with the same --out")
    try:
        reports = json.loads(path.read_text())["folds"]
        trained = {report["fold"]: list(report["students"]) for report in reports}
    except (ValueError, KeyError, TypeError):
        fail(f"{path} is damaged: run --stage student again")
    if reports and "seed" in reports[0]:
        fail(f"{path} is of several seeds: name the folder of one, --out {args.out}/seed{reports[0]['seed']}")
    reports = []
    for fold in trained if args.fold is None else [args.fold]:
        present = [method for method in args.methods if method in trained.get(fold, ()) and method != "visual"]
        if present:
            reports.append({"fold": fold, "students": {m: evaluate(args, data, fold, m) for m in present}})
    if not reports:
        fail(f"{path} lists no such student: run --stage student --method {args.method} first")
    results = {"folds": reports, **summary(reports, references=())}
    write(args.out / "eval.json", json.dumps(results, indent=2) + "\n")
    show([["student", "score ± s.e."]] + [
        [method, plus_minus(score, results["stderr"]["students"][method])]
        for method, score in results["mean"]["students"].items()
    ])  # fmt: skip
    print(f"Scores: {unit(data)}, from visual input alone. Saved in {args.out}/eval.json.")
    show_skipped(args, data)


# ---- reporting --------------------------------------------------------------------------------------


def collect(args, data, keys):
    """Write results.json and history.csv from what the run's folder holds; return the results.

    keys are those of each fold's stage 1: files made from other data, splits or seeds are left out.
    """
    reports, history = [], []
    for fold, key in enumerate(keys):
        saved = {}

        def find(name, key):
            path = stage_file(args, fold, name)
            if path.exists() and (file := read(path))["key"] == key:
                saved[name] = file
                history.extend(file["history"])
            return saved.get(name, {"id": None, "scores": {}})

        first = find("teachers", key)
        second = find("align", first["id"])
        students = {m: find(f"student_{m}", (second if needs_alignment(m) else first)["id"]) for m in METHODS}
        if saved:
            report = {"fold": fold, **first["scores"], **second["scores"]}
            report["students"] = {method: file["scores"] for method, file in students.items() if file["scores"]}
            report["teacher_picks"] = students["mtpkdot"].get("picks", {})
            reports.append(report)
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(name for row in history for name in row), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write(args.out / "history.csv", text.getvalue())
    return write_results(args, data, reports)


def write_results(args, data, reports):
    results = {
        "dataset": args.dataset,
        "task": data.task,
        "metric": "accuracy" if data.task == "classification" else "ccc",
        "seed": args.seed,
        "arguments": {name: value for name, value in vars(args).items() if name not in ("out", "methods")},
        **({"skipped": len(data.skipped)} if args.skip_bad else {}),
        "folds": reports,
        **summary(reports),
    }
    write(args.out / "results.json", json.dumps(results, indent=2, default=str) + "\n")
    return results


def merged(reports, statistic):
    """The nested dicts of the reports merged into one: of every number, its statistic over the reports that have it."""
    result = {}
    for name in dict.fromkeys(key for report in reports for key in report if key not in ("seed", "fold")):
        values = [report[name] for report in reports if name in report]
        result[name] = merged(values, statistic) if isinstance(values[0], dict) else statistic(values)
    return result


def summary(reports, references=REFERENCES):
    """Mean and standard error over the folds, or, of several seeds, over the seeds' means over their folds; and of
    each student the paired difference to the students task and visual, with its 95 % interval (Student's t)."""
    seeds = {}
    for report in reports:
        seeds.setdefault(report.get("seed"), []).append(report)
    units = [merged(folds, statistics.fmean) for folds in seeds.values()] if len(seeds) > 1 else reports

    def stderr(values):
        return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None

    def paired(method, other):
        """Per epoch kept, the interval of the difference; {} where it has none."""
        pairs = [(u["students"][method], u["students"][other]) for u in units if {method, other} <= set(u["students"])]
        result = {}
        for epoch in ("best", "last") if len(pairs) > 1 else ():
            gaps = [headline(mine[epoch]) - headline(theirs[epoch]) for mine, theirs in pairs]
            mean, margin = statistics.fmean(gaps), stderr(gaps) * float(stats.t.ppf(0.975, len(gaps) - 1))
            result[epoch] = {"mean": mean, "low": mean - margin, "high": mean + margin}
        return result

    students = dict.fromkeys(method for u in units for method in u["students"])
    return {
        "mean": merged(units, statistics.fmean),
        "stderr": merged(units, stderr),
        **{f"less_{other}": {m: paired(m, other) for m in students if m != other} for other in references},
    }


def unit(data):
    return "accuracy in %" if data.task == "classification" else f"CCC of {'/'.join(data.names)}"


def cell(value):
    """A score as text: percent for an accuracy, each column's CCC for a regression."""
    if isinstance(value, dict):
        return "/".join("-" if v is None else f"{round(v, 3) + 0.0:.3f}" for name, v in value.items() if name != "mean")
    return "-" if value is None else f"{100 * value:.1f}"


def plus_minus(mean, stderr):
    error = cell(stderr)
    return cell(mean) if "-" in error else f"{cell(mean)} ± {error}"  # a single fold has none


def show(lines):
    """Print rows of texts in columns."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    print()
    for line in lines:
        print("   ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())


def show_results(args, data, results):
    mean, stderr, repeats = results["mean"], results["stderr"], "seeds" if args.seeds > 1 else "folds"
    rows = [[LABELS[name], plus_minus(mean[name], stderr[name])] for name in LABELS if name in mean]
    show([["teachers, best epoch", "score ± s.e."], *rows])
    scale = 100 if data.task == "classification" else 1

    def interval(gap):
        if gap is None:
            return ""
        mean, low, high = (f"{scale * gap[end]:+.{1 if scale == 100 else 3}f}" for end in ("mean", "low", "high"))
        return f"{mean} [{low}, {high}]{' *' if gap['low'] > 0 or gap['high'] < 0 else ''}"

    for epoch in ("best", "last") if mean["students"] else ():
        lines = [[f"students, {epoch} epoch", "score ± s.e.", *(f"less {other}" for other in REFERENCES)]]
        for method, scores in mean["students"].items():
            gaps = [results[f"less_{other}"].get(method, {}).get(epoch) for other in REFERENCES]
            score = plus_minus(scores[epoch], stderr["students"][method][epoch])
            lines.append([method, score, *map(interval, gaps)])
        show(lines)
    print(f"""
Scores: {unit(data)} on validation rows; s.e.: standard error over the {repeats}. The best epoch is chosen on
the very rows that are scored, the paper's protocol, and optimistic; the last is not. less ...: paired differences
over the {repeats} with their 95 % intervals, * where that excludes zero.""")
    picks = mean.get("teacher_picks")
    if picks:
        shares = ", ".join(f"{name.replace('_', ' ')} {n / sum(picks.values()):.0%}" for name, n in picks.items())
        print(f"Teacher that mtpkdot picked, share of batches: {shares}.")
    show_skipped(args, data)
    print(f"Saved in {args.out}: results.json, history.csv, and a folder a fold with a file a stage.")


def show_skipped(args, data):
    if args.skip_bad:
        print(f"Left out as bad: {len(data.skipped)} clips, {len(data.label)} remain.")


# ---- main -------------------------------------------------------------------------------------------


def run(args):
    data = load(
        args.dataset, args.data, args.seed, need_privileged=args.stage != "eval", stride=args.clip_stride,
        levels=args.levels, signal=args.signal, skip_bad=args.skip_bad, workers=args.workers,
    )  # fmt: skip
    for message in dict.fromkeys(data.skipped if processes()[0] == 0 else ()):
        print(f"train.py: left out, {message}", file=sys.stderr)
    if args.folds_by == "clip" and data.group is not None:
        print("train.py: --folds-by clip puts clips of one person into training and validation", file=sys.stderr)
        data = data._replace(group=None)
    if data.task == "regression" and args.batch_size < 2:
        fail("argument --batch-size: the CCC of a single clip is always 0; use at least 2")
    tensors = {name: t.to(args.device) for name, t in data._asdict().items() if isinstance(t, torch.Tensor)}
    data = data._replace(**tensors)
    if args.stage == "eval":
        return evaluate_run(args, data)

    # What can fail for want of a folder or a file fails here, not after hours of training.
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        fail(f"argument --out: {args.out} cannot be written ({error.strerror})")
    for view in VIEWS:
        if published := getattr(args, f"{view}_weights"):
            if not is_raw(getattr(data, view)):
                fail(f"argument --{view}-weights: they are for raw data, and this data set holds vectors")
            start_from(backbone(getattr(data, view), args.dim, args.width), published)
    seeds = range(args.seed, args.seed + args.seeds)
    folders = [args.out / f"seed{seed}" if args.seeds > 1 else args.out for seed in seeds]
    every = each_seed([argparse.Namespace(**{**vars(args), "seed": s, "out": f}) for s, f in zip(seeds, folders)], data)
    if processes()[0] > 0:
        return
    reports = [{"seed": seed, **report} for seed, one in zip(seeds, every) for report in one["folds"]]
    show_results(args, data, every[0] if args.seeds == 1 else write_results(args, data, reports))


def each_seed(runs, data):
    """run_seed of each, on the CPU as many at a time as there are cores: networks this small need no more than one."""
    jobs = min(len(runs), os.cpu_count() or 1) if runs[0].device == "cpu" and processes()[1] == 1 else 1
    if jobs == 1:
        return [run_seed(one, data) for one in runs]
    settings = {"mp_context": multiprocessing.get_context("spawn"), "initializer": one_of_many}
    with ProcessPoolExecutor(jobs, initargs=((os.cpu_count() or 1) // jobs,), **settings) as pool:
        return list(pool.map(run_seed, runs, itertools.repeat(data)))


def one_of_many(threads):
    torch.set_num_threads(threads)
    plain_warnings()


def run_seed(args, data):
    """All folds with one seed; the results."""
    parts = folds(data, args.folds, args.seed)
    if args.fold is not None and args.fold >= len(parts):
        fail(f"argument --fold: the folds are 0 to {len(parts) - 1}")
    if args.train_rows:
        if args.train_rows > min(len(train) for train, _ in parts):
            fail(f"argument --train-rows: a fold has only {min(len(train) for train, _ in parts)}")
        draw = np.random.default_rng(args.seed).permutation
        parts = [(np.sort(draw(train)[: args.train_rows]), val) for train, val in parts]
    parts = [tuple(torch.from_numpy(rows).to(args.device) for rows in part) for part in parts]
    least = min(max(1, args.batch_size // 2), *(len(rows) for part in parts for rows in part))
    if processes()[1] > least:
        fail(f"{processes()[1]} processes cannot share {least} clips of a batch: start fewer, or raise --batch-size")
    # What each fold's stage 1 is made from, besides its hyper-parameters.
    content = f"{digest(data.visual, data.privileged, data.label)}-{args.seed}-{args.dim}-{args.width}"
    keys, results = [f"{content}-{digest(train)}" for train, _ in parts], None
    for fold in range(len(parts)) if args.fold is None else [args.fold]:
        (train, val), key = parts[fold], keys[fold]
        if args.stage in ("all", "teachers"):
            teachers(args, data, fold, train, val, key)
        if processes()[0] > 0:
            continue
        if args.stage in ("all", "align"):
            align(args, data, fold, train, val, key)
        for method in args.methods if args.stage in ("all", "student") else ():
            student(args, data, fold, train, val, key, method)
        results = collect(args, data, keys)
    return results


def plain_warnings():
    warnings.filterwarnings("once", category=RuntimeWarning)  # Sinkhorn's, when it has not converged
    warnings.formatwarning = lambda message, *_: f"train.py: {message}\n"  # one line, without its source


def main(argv=None):
    args = options(argv)
    plain_warnings()
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1 and args.stage in ("all", "teachers")  # what torchrun sets
    if several:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # The first process trains the students of a fold before all train the teachers of the next.
        distributed.init_process_group("nccl" if args.device == "cuda" else "gloo", timeout=timedelta(days=1))
    first = int(os.environ.get("RANK", 0)) == 0
    try:
        if several or first:
            with contextlib.redirect_stdout(sys.stdout if first else io.StringIO()):
                run(args)
    except DataError as error:
        fail(error)
    if several:
        gc.collect()  # networks that still hold the group would keep its threads alive into the exit, which aborts it
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
