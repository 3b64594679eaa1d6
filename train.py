"""Train MT-PKDOT: teachers, alignment, student. `python train.py --help` lists the options.

Reading order:
    options             what can be set; the defaults are the method's
    files               what is saved and when it may be used again
    signals, scores     small helpers
    backbones           what embeds a view, in one process or in several
    fit                 the one training loop: every network below goes through it
    teachers            stage 1: both backbones, the joint teacher, T-Net
    align               stage 2: adapters and heads, self-distilled with the joint teacher
    student             stage 3: one student a method, and what it is compared with
    evaluate            a saved student on visual input alone
    collect, show, draw from the saved stages to results.json, history.csv, the printed table and the pictures
    main

Each stage saves a file a fold to --out, with weights, scores and history, and starts from the files of the
stages before it. results.json and history.csv are only ever computed from these files. Every file carries a
key of what it was made from, so that a student is never reported beside teachers it did not have. What is
unfinished is saved after each epoch, every ten minutes within it, and where a signal asks the run to stop;
--resume goes on from there.
"""

import argparse
import contextlib
import copy
import csv
import gc
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import shlex
import signal
import statistics
import sys
import tempfile
import threading
import time
import warnings
import zlib
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
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
    Fusion,
    Head,
    Student,
    Teachers,
    TNet,
    backbone,
    load_published,
    load_student,
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
SHOWN = 240  # clips in similarity.png
CHUNK = 4096  # rows of a forward pass where nothing is trained
FORMAT = 1  # of the saved files
SAVE_EVERY = 600  # seconds within an epoch, and at its end
PASSING = ("out", "methods", "resume", "student", "predictions")  # arguments of a command, not of a run
FREE = ("stage", "method", "fold", "seeds", "workers", "data")  # a run's arguments that its later commands may change

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
    add("--dataset", choices=["synthetic", "features", "affwild2", "biovid"], help="default synthetic")
    add("--data", help="path of the data set (default data/affwild2 or data/biovid)")
    add("--stage", default="all", choices=["all", "teachers", "align", "student", "eval"])
    add("--method", default="mtpkdot", metavar="M,M...", help=f"students: all, or of {', '.join(METHODS)}")
    add("--out", type=Path, help="folder of the run (default runs/DATASET)")
    add("--resume", action="store_true", help="go on with the run in that folder where it was stopped")
    add("--student", type=Path, metavar="FILE", help="eval: this saved student, on any data")
    add("--predictions", type=Path, metavar="FILE.csv", help="eval of --student: write what it predicts for each clip")
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
    if (args.student or args.predictions) and (args.stage != "eval" or not args.student):
        fail("arguments --student, --predictions: they are for --stage eval --student FILE")
    saved = read_student(args.student) if args.student else {"dataset": "synthetic"}
    args.dataset = args.dataset or saved["dataset"]
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
    args.levels = saved["names"] if saved["dataset"] == "biovid" else args.levels.split(",")
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


# ---- files -----------------------------------------------------------------------------------------


def write(path, payload):
    """Text, bytes, or a dict for torch.save, by way of a temporary file: a killed run leaves no half file."""
    temporary = path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() or not path.exists():  # not /dev/stdout
            temporary = path.with_name(f"{path.name}.tmp")
        with open(temporary, "wb") as file:
            if isinstance(payload, dict):
                torch.save({**payload, "format": FORMAT, "digest": fingerprint(payload)}, file)
            else:
                file.write(payload.encode(errors="surrogateescape") if isinstance(payload, str) else payload)
        if temporary != path:
            os.replace(temporary, path)
    except (OSError, RuntimeError, ValueError) as error:
        if temporary != path:
            with contextlib.suppress(OSError):
                temporary.unlink()
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        fail(f"{path}: cannot be written ({reason}); what was saved before is whole")


def read(path):
    """A file of torch.save, as it was written: what is damaged, foreign or changed since is refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a damaged file, torch has more than one thing to say
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        version, digest_then = saved.pop("format"), saved.pop("digest")
        if version == FORMAT and digest_then != fingerprint(saved):
            raise ValueError("changed")
    except (FileNotFoundError, PermissionError) as error:
        fail(f"{path}: {error.strerror.lower()}")
    except Exception as error:  # a damaged or foreign file can raise anything; its reader needs the name
        fail(f"{path}: damaged, or not a file of train.py's ({type(error).__name__}); remove it and make it again")
    if version != FORMAT:
        fail(f"{path}: of format {version}, and this train.py reads {FORMAT}; remove it and make it again")
    return saved


def fingerprint(value, sha=None):
    """A digest of nested dicts and lists of tensors and plain values."""
    sha = sha or hashlib.sha256()
    if isinstance(value, torch.Tensor):
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError("a tensor larger than its file")
        sha.update(digest(value).encode())
    elif isinstance(value, dict):
        for name in value:
            sha.update(repr(name).encode())
            fingerprint(value[name], sha)
    elif isinstance(value, (list, tuple)):
        sha.update(f"{len(value)} of".encode())
        for part in value:
            fingerprint(part, sha)
    else:
        sha.update(repr(value).encode())
    return sha.hexdigest()[:16]


def stage_file(args, fold, name):
    return args.out / f"fold{fold}" / f"{name}.pt"


def earlier(args, fold, stage, key):
    """The saved file of an earlier stage; refused if it is missing or was made from something else."""
    path = stage_file(args, fold, stage)
    if not path.exists():
        fail(f"{path} is missing: run --stage {stage} first, with the same data, --folds, --seed and --out")
    saved = read(path)
    if saved["key"] != key:
        fail(f"{path} was made from other data, --folds, --seed, --dim or teachers: run --stage {stage} again")
    return saved


def kept(args, fold, name, key):
    """What the file of a stage holds; None where there is none, or it was made from something else."""
    path = stage_file(args, fold, name)
    if path.exists() and (saved := read(path))["key"] == key:
        return saved


def finished(args, fold, name, key):
    """Whether a resumed run has the file of this stage already."""
    saved = kept(args, fold, name, key) if args.resume else None
    if saved is None:
        return False
    refuse_others(stage_file(args, fold, name), saved["arguments"], described(args))
    forget(args, fold, name)
    if processes()[0] == 0:
        print(f"seed {args.seed}  fold {fold}  {name:<19}  done before", flush=True)
    return True


def finish(args, fold, name, saved):
    """Write the file of a stage, which makes those of its unfinished parts needless."""
    write(stage_file(args, fold, name), {**saved, "arguments": described(args)})
    forget(args, fold, name)


def forget(args, fold, name):
    for unfinished in (args.out / f"fold{fold}").glob(f"unfinished_{name}[_.]*"):
        unfinished.unlink(missing_ok=True)


def described(args):
    """The arguments of a run as plain values."""
    plain = {name: value for name, value in vars(args).items() if name not in PASSING}
    return {name: str(value) if isinstance(value, Path) else value for name, value in plain.items()}


def refuse_others(path, theirs, mine):
    """End with a line that lists the arguments in which a saved run differs from this one, if any."""
    differ = [name for name in {**theirs, **mine} if name not in FREE and theirs.get(name) != mine.get(name)]
    if differ:
        changes = (f"--{name.replace('_', '-')} ({theirs.get(name)}, now {mine.get(name)})" for name in differ)
        fail(f"{path} is of a run of other arguments: {', '.join(changes)}; name another folder by --out")


def claim(args, content):
    """Refuse a folder that holds files of a run of other arguments or data; else note those of this one in run.json."""
    mine = {**described(args), "data_digest": content}
    path = args.out / "run.json"
    if path.exists() and any(args.out.rglob("*.pt")):
        try:
            theirs = dict(json.loads(path.read_text()))
        except Exception:  # anything that json and the disk may say
            fail(f"{path}: damaged; remove it if the folder holds a run of the same arguments")
        refuse_others(path, theirs, mine)
    write(path, json.dumps(mine, indent=2) + "\n")


# ---- signals ----------------------------------------------------------------------------------------

STOPS = (signal.SIGINT, signal.SIGTERM)
SIGNALS = []  # of those, what has come: the run stops after the step that it is in


def note_signals(at_once=False, insist=False):
    """From here on signals are noted. at_once: they also raise KeyboardInterrupt, where there is nothing to finish.
    insist: one that comes again ends the process, which damages no file."""

    def note(number, frame):
        if insist and number in SIGNALS:
            os._exit(128 + number)
        SIGNALS.append(number)
        if at_once:
            raise KeyboardInterrupt

    for number in STOPS:
        signal.signal(number, note)


def stop_if_asked(args, shared=False):
    """Raise KeyboardInterrupt where a signal has come to this process, or, if shared, to any of all."""
    asked = len(SIGNALS)
    if shared and processes()[1] > 1:
        asked = torch.tensor(asked, device=args.device)
        distributed.all_reduce(asked)
    if asked:
        raise KeyboardInterrupt


# ---- scores -----------------------------------------------------------------------------------------


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
    z = []
    for x in inputs(args, view, part.split(args.batch_size if is_raw(view) else CHUNK)):
        z.append(forward(args, network, x))
        stop_if_asked(args)
    z = torch.cat(z)
    return whole(z, len(rows)) if shared else z


# ---- the one training loop --------------------------------------------------------------------------


def seed_everything(args, *where):
    """The randomness of a part of the run depends on --seed and on which part it is, not on what ran before.

    All training draws from torch's generator on the CPU, in this process: those that read raw data draw nothing.
    """
    torch.manual_seed(zlib.crc32(repr((args.seed, *where)).encode()))


def fit(args, where, key, network, rates, epochs, rows, loss_of, score_of, view=None, shared=False, counts=None):
    """Train `network` with Adam and keep its best epoch. Returns {"best", "last", "history"}, the first two scores.

    where      (fold, stage, model), for the log, and for the file that a resumed run goes on from
    key        what all this is made from
    rates      list of (module, learning rate)
    epochs     raised to what --updates asks for
    loss_of    rows of a batch (and the view there) -> dict of scalar tensors, of which "loss" is minimised; and the
               embedding on which the gradient of each other term is measured, in the first batch of an epoch, or None
    score_of   () -> score on the validation rows
    shared     all processes are here, and loss_of gets this one's share of the view
    counts     a tensor that loss_of adds to, or None
    """
    groups = [{"params": list(module.parameters()), "lr": rate} for module, rate in rates]
    optimizer = torch.optim.Adam(groups, fused=True)
    batches = max(1, min(math.ceil(len(rows) / args.batch_size), len(rows) // 2))  # of two clips at the least
    epochs = max(epochs, math.ceil(args.updates / batches))
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0 if args.lr_decay == "linear" else 1, epochs * batches)
    parts = {"network": network, "optimizer": optimizer, "decay": decay}
    path = stage_file(args, where[0], f"unfinished_{where[1]}_{where[2]}")
    # Of the epoch it is in: the steps done, the order of rows, sums of the terms, gradients. And of those before.
    at = {"epoch": 1, "step": 0, "order": None, "sums": {}, "pulls": {}}
    at.update(history=[], best=None, last=None, weights=None)
    start = f"seed {args.seed}, fold {where[0]}, stage {where[1]}, {where[2]}"
    if path.exists():
        if args.resume:
            at = go_on(args, path, key, at, parts, counts)
        elif processes()[0] == 0:
            print(f"{path} is of a run that was stopped; it starts anew, as --resume was not given", flush=True)

    saved_at = time.monotonic()

    def save():
        nonlocal saved_at
        saved_at = time.monotonic()
        if processes()[0] == 0:
            now = {name: part.state_dict() for name, part in parts.items()}
            now["random"] = torch.get_rng_state()  # the only generator that anything draws from, on CUDA too
            write(path, {"key": key, "arguments": described(args), **at, **now, "counts": counts})

    try:
        while at["epoch"] <= epochs:
            epoch = at["epoch"]
            network.train()
            if at["step"] == 0:
                at.update(order=rows[torch.randperm(len(rows)).to(rows.device)], sums={}, pulls={})
            # Batches of nearly equal size: the similarities within a runt of two clips would mean nothing.
            order = at["order"].to(rows.device).tensor_split(batches)[at["step"] :]
            shares = [share(batch) for batch in order] if shared else order
            steps = zip(order) if view is None else zip(order, inputs(args, view, shares))
            hidden = processes()[0] > 0 or args.seeds > 1 or None  # None: where stderr is not a terminal
            bar = {"total": batches, "initial": at["step"], "leave": False, "disable": hidden}
            for batch, *x in tqdm(steps, f"{where[2]} {epoch}/{epochs}", **bar):
                place = f"{start}, epoch {epoch}, step {at['step'] + 1}"
                try:
                    terms, z = loss_of(batch, *x)
                except ValueError as error:  # what Sinkhorn refuses, such as the embeddings of a diverged student
                    fail(f"{place}: ot: {error}; what was saved stays")
                if z is not None and not at["pulls"]:
                    for name in [name for name in terms if name != "loss"]:
                        (gradient,) = torch.autograd.grad(terms[name], z, retain_graph=True)
                        at["pulls"][f"{name}_gradient"] = gradient.norm().item()
                optimizer.zero_grad(set_to_none=True)
                terms["loss"].backward()
                values = dict(zip(terms, torch.stack([term.detach() for term in terms.values()]).tolist()))
                bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
                if bad:
                    fail(f"{place}: {', '.join(bad)}; what was saved stays; try a lower --lr-... and another --out")
                optimizer.step()
                decay.step()
                for name, value in values.items():
                    at["sums"][name] = at["sums"].get(name, 0) + value * len(batch) / len(rows)
                at["step"] += 1
                stop_if_asked(args, shared)
                if time.monotonic() - saved_at > SAVE_EVERY:
                    save()
            network.eval()
            if shared and processes()[1] > 1:
                save()  # a signal may come to a process that the others wait for
            value = score_of()
            if not math.isfinite(headline(value)):
                fail(f"{start}, epoch {epoch}: its score on validation rows is {headline(value)}; what was saved stays")
            if at["best"] is None or headline(value) > headline(at["best"]):
                at.update(best=value, weights=copy.deepcopy(network.state_dict()))
            when = dict(zip(("fold", "stage", "model"), where), epoch=epoch)
            row = {**when, **at["sums"], **at["pulls"], "score": headline(value)}
            at.update(epoch=epoch + 1, step=0, order=None, history=[*at["history"], row], last=value)
            save()
            if args.seeds == 1 or epoch == epochs:
                line = f"epoch {epoch:>3}/{epochs}  loss {row['loss']:.4f}  validation {row['score']:.4f}"
                print(f"seed {args.seed}  fold {where[0]}  {where[2]:<19}  {line}", flush=True)
    except KeyboardInterrupt:  # raised between steps only, and while validating
        save()
        raise
    network.load_state_dict(at["weights"])
    network.eval()
    return {name: at[name] for name in ("best", "last", "history")}


def go_on(args, path, key, at, parts, counts):
    """Fill the parts of a fit, and the random generator, from its saved file; return where it was."""
    saved = read(path)
    refuse_others(path, saved["arguments"], described(args))
    if saved["key"] != key:
        fail(f"{path} was made from other data, --folds, --seed, --dim or teachers: remove it to start this part anew")
    try:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    except (RuntimeError, ValueError, KeyError):
        fail(f"{path} is of other networks than these: remove it to start this part anew")
    torch.set_rng_state(saved["random"])
    if counts is not None:
        counts.copy_(saved["counts"])
    return {name: saved[name] for name in at}


# ---- stage 1: teachers ------------------------------------------------------------------------------


def teachers(args, data, fold, train, val, key):
    """Train both backbones with a head each, then the joint teacher and T-Net on their frozen embeddings."""
    if finished(args, fold, "teachers", key):
        return
    outputs, z, weights, fitted = len(data.names), {}, {}, {}
    for view in VIEWS:
        seed_everything(args, fold, view)
        source, published = getattr(data, view), getattr(args, f"{view}_weights")
        encoder = backbone(source[0].shape, args.dim, args.width).to(args.device)
        head = Head(args.dim, outputs).to(args.device)
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
            args, (fold, "teachers", view), key, network, [(network, args.lr_backbone)], args.epochs_backbone, train,
            loss_of, lambda: score(data, embed(args, network, source, val, shared=True), val), source, shared=True,
        )  # fmt: skip
        weights[view], weights[f"{view}_head"] = encoder.state_dict(), head.state_dict()
        z[view] = embedding(args, data, fold, view, weights[view], shared=True)
    if processes()[0] > 0:
        return  # what follows runs on embeddings, fast, in the first process

    seed_everything(args, fold, "joint")
    joint = Fusion(args.dim, outputs).to(args.device)
    z_v, z_p = z["visual"], z["privileged"]

    def predict(rows):
        return joint(z_v[rows].unsqueeze(1), z_p[rows].unsqueeze(1))[1]

    fitted["joint"] = fit(
        args, (fold, "teachers", "joint"), key, joint, [(joint, args.lr_joint)], args.epochs_joint, train,
        lambda rows: ({"loss": mtpkdot.task_loss(predict(rows), data.label[rows])}, None),
        lambda: score(data, over(val, predict), val),
    )  # fmt: skip

    seed_everything(args, fold, "tnet")
    tnet = TNet(args.dim).to(args.device)
    variance = z_p.double().var(0, correction=0).mean().clamp_min(torch.finfo().tiny)
    fitted["tnet"] = fit(
        args, (fold, "teachers", "tnet"), key, tnet, [(tnet, args.lr_tnet)], args.epochs_tnet, train,
        lambda rows: ({"loss": mtpkdot.tnet_loss(tnet(z_v[rows]), z_p[rows], args.tnet_loss)}, None),
        # Scored by the share of the privileged embedding's variance that it explains.
        lambda: (1 - over(val, lambda rows: tnet(z_v[rows]) - z_p[rows]).double().square().mean() / variance).item(),
    )  # fmt: skip
    weights["joint"], weights["tnet"] = joint.state_dict(), tnet.state_dict()
    finish(args, fold, "teachers", {
        "key": key,
        "id": digest(*(t for module in weights.values() for t in module.values())),
        "weights": weights,
        "scores": {name: fitted[name]["best"] for name in (*VIEWS, "joint")},
        "history": [row for f in fitted.values() for row in f["history"]],
    })  # fmt: skip


def restored(module, weights, args):
    """A module with saved weights, frozen, on the device of the run."""
    module.load_state_dict(weights)
    return module.to(args.device).eval().requires_grad_(False)


def embedding(args, data, fold, view, weights, shared=False):
    """z (N, D) of all clips by a backbone of stage 1, from the file that keeps it or from the clips."""
    source = getattr(data, view)
    key = f"{digest(*weights.values())}-{stamp(source)}"
    if saved := kept(args, fold, f"embedding_{view}", key):
        return saved["z"].to(args.device)
    encoder = restored(backbone(source[0].shape, args.dim, args.width), weights, args)
    z = embed(args, encoder, source, torch.arange(len(source)), shared)
    if processes()[0] == 0:
        write(stage_file(args, fold, f"embedding_{view}"), {"key": key, "z": z})
    return z


# ---- stage 2: alignment -----------------------------------------------------------------------------


def align(args, data, fold, train, val, key):
    """Pull both single-modality embeddings and the joint one together; keep the epoch of the best joint score."""
    before = earlier(args, fold, "teachers", key)
    if finished(args, fold, "align", before["id"]):
        return
    z_v, z_p = (embedding(args, data, fold, view, before["weights"][view]) for view in VIEWS)
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
        args, (fold, "align", "align"), before["id"], network, rates, args.epochs_align, train,
        loss_of, lambda: score_of("joint"),
    )  # fmt: skip
    finish(args, fold, "align", {
        "key": before["id"],
        "id": before["id"] + digest(*network.state_dict().values()),
        "weights": network.state_dict(),
        "scores": {"joint_aligned": fitted["best"], **{name: score_of(name) for name in mtpkdot.TEACHERS[1:]}},
        "history": fitted["history"],
    })  # fmt: skip


# ---- stage 3: students ------------------------------------------------------------------------------


def needs_alignment(method):
    return method.startswith("mtpkdot") and method != "mtpkdot-unaligned"


def teachers_of(args, outputs, first, aligned, z_v, z_p):
    """Embeddings (3, N, D) and predictions (3, N, K) of the teachers, in the order of mtpkdot.TEACHERS, from the
    weights of stage 2, or, where aligned is None, from those of stage 1, which has no adapters."""
    network = Teachers(args.dim, outputs)
    if aligned is None:
        network.adapters = nn.ModuleDict({view: nn.Identity() for view in VIEWS})
        parts = {"joint": first["joint"], **{f"heads.{view}": first[f"{view}_head"] for view in VIEWS}}
        aligned = {f"{part}.{name}": t for part, weights in parts.items() for name, t in weights.items()}
    network = restored(network, aligned, args)
    with torch.no_grad():
        parts = [network(*z) for z in zip(z_v.split(CHUNK), z_p.split(CHUNK))]
    return [torch.stack([torch.cat([part[name][i] for part in parts]) for name in mtpkdot.TEACHERS]) for i in (0, 1)]


def student(args, data, fold, train, val, key, method):
    """Train one student on visual input, or, for method visual, the visual network of stage 1 for as many updates.

    mtpkdot follows, batch by batch, the best of the three aligned teachers; pkdot, mse, cosine and rkd follow the
    joint teacher of stage 1; task follows nobody. All start from the same weights and see the same batches. The
    backbone starts from stage 1 and trains along, stays as it is (frozen), or starts afresh (scratch); T-Net stays.
    """
    before = earlier(args, fold, "teachers", key)
    weights, dim, outputs, source = before["weights"], args.dim, len(data.names), data.visual
    aligned = None
    if needs_alignment(method):
        before = earlier(args, fold, "align", before["id"])
        aligned = before["weights"]
    if finished(args, fold, f"student_{method}", before["id"]):
        return
    z_v, z_p = (embedding(args, data, fold, view, weights[view]) for view in VIEWS)
    z_teachers, predictions = teachers_of(args, outputs, weights, aligned, z_v, z_p)
    frozen, scratch = (args.student_backbone == kind for kind in ("frozen", "scratch"))
    variant = method.removeprefix("mtpkdot-") if method in VARIANTS else None
    only = {"joint": 0, "visual": 1, "privileged": 2}.get(variant)

    seed_everything(args, fold, "student")
    encoder = backbone(source[0].shape, dim, args.width)
    network = Student(encoder, TNet(dim), Fusion(dim, outputs)).to(args.device)
    head = Head(dim, outputs).to(args.device)
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

    @torch.no_grad()
    def outputs_of(rows):
        """Student embeddings and predictions of rows, nothing trained."""
        z = z_v[rows] if frozen else embed(args, network.encoder, source, rows)
        return [torch.cat(parts) for parts in zip(*map(predict, z.split(CHUNK)))]

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
    shown = val[torch.linspace(0, len(val) - 1, min(len(val), SHOWN)).long()]
    shown = shown[data.label[shown].view(len(shown), -1)[:, 0].argsort(stable=True)]  # by class, or by the first value
    stage_1 = teachers_of(args, outputs, weights, None, z_v[shown], z_p[shown])[0][0]
    trained.eval()
    at_first = outputs_of(shown)[0]
    seed_everything(args, fold, "batches")
    fitted = fit(
        args, (fold, "student", method), before["id"], trained, [(trained, getattr(args, f"lr_{pace}"))],
        getattr(args, f"epochs_{pace}"), train, loss_of, lambda: score(data, outputs_of(val)[1], val),
        None if frozen else source, counts=picks,
    )  # fmt: skip
    z = {"teacher, stage 1": stage_1, "teacher": z_teachers[0, shown], "student, untrained": at_first}
    z["student"] = outputs_of(shown)[0]
    network.tnet = tnet
    finish(args, fold, f"student_{method}", {
        "key": before["id"],
        "weights": (trained if method == "visual" else network).state_dict(),
        "scores": {"best": fitted["best"], "last": fitted["last"]},
        "history": fitted["history"],
        "picks": dict(zip(mtpkdot.TEACHERS, picks.tolist())),
        "similarity": {"label": data.label[shown], **{name: mtpkdot.similarity(rows) for name, rows in z.items()}},
        "method": method,
        "dim": dim,
        "width": args.width,
        "input_shape": list(source[0].shape),
        "dataset": args.dataset,
        "task": data.task,
        "names": data.names,
        "trained_on": digest(source),
        "val": val.cpu(),
    })  # fmt: skip


# ---- evaluation: the student alone ------------------------------------------------------------------


def read_student(path):
    saved = read(path)
    if saved.get("method", "visual") == "visual":
        fail(f"{path} is not a student's file, foldI/student_METHOD.pt of a run; the visual network's is none either")
    return saved


def evaluate(args, data, path):
    """Score a saved student on visual input: on its fold's validation rows where `data` is what it was trained
    with, on every row otherwise. Returns the score (None without labels), what the file holds, rows, predictions."""
    saved = read_student(path)
    shape, names = list(data.visual[0].shape), saved["names"]
    if shape != saved["input_shape"]:
        fail(f"{path} is for input shape {saved['input_shape']}; the data has {shape}")
    rows, kind = torch.arange(len(data.visual)), "rows, all, as they are not the data that it was trained with"
    if digest(data.visual) == saved["trained_on"]:
        rows, kind = saved["val"], "validation rows of its own data"
    if data.label is not None:
        unknown = [name for name in data.names if name not in names]
        if data.task != saved["task"]:
            fail(f"{path} is for {saved['task']}; the data is {data.task}")
        if unknown or (data.task == "regression" and data.names != names):
            fail(f"{path} knows the labels {names}; the data has {unknown or data.names}")
        if data.task == "classification":
            index = torch.tensor([names.index(name) for name in data.names], device=args.device)
            data = data._replace(label=index[data.label])
    network = load_student(saved).to(args.device)
    print(f"{path}: {len(rows)} {kind}")
    z_v = embed(args, network.encoder, data.visual, rows)
    prediction = over(z_v, lambda z: network.from_embedding(z)[1])
    return None if data.label is None else score(data, prediction, rows), saved, rows, prediction


def evaluate_student(args, data):
    """Score the student of a file and write what it predicts."""
    value, saved, rows, prediction = evaluate(args, data, args.student)
    if args.predictions:
        header, table = ["name", *saved["names"]], prediction.tolist()
        if saved["task"] == "classification":
            header = ["name", "prediction", *(f"p_{name}" for name in saved["names"])]
            chosen = prediction.argmax(1).tolist()
            table = [[saved["names"][i], *p] for i, p in zip(chosen, prediction.softmax(1).tolist())]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([header, *([data.clip_name(i), *line] for i, line in zip(rows.tolist(), table))])
        write(args.predictions, text.getvalue())
        print(f"Predictions saved in {args.predictions}.")
    if value is not None:
        print(f"Score: {cell(value)}, {unit(data)}, from visual input alone.")
    show_skipped(args, data)


def evaluate_run(args, data):
    """Score the students that results.json lists, and write eval.json."""
    path = args.out / "results.json"
    if not path.exists():
        fail(f"{path} is missing: run --stage student first, with the same --out; or name one by --student FILE")
    try:
        reports = json.loads(path.read_text())["folds"]
        trained = {report["fold"]: list(report["students"]) for report in reports}
        seeds = [report["seed"] for report in reports if "seed" in report]
    except Exception:  # anything that json and the disk may say
        fail(f"{path} is damaged: run --stage student again")
    if seeds:
        fail(f"{path} is of several seeds: name the folder of one, --out {args.out}/seed{seeds[0]}")
    reports = []
    for fold in trained if args.fold is None else [args.fold]:
        present = [method for method in args.methods if method in trained.get(fold, ()) and method != "visual"]
        if present:
            files = {method: stage_file(args, fold, f"student_{method}") for method in present}
            reports.append({"fold": fold, "students": {m: evaluate(args, data, f)[0] for m, f in files.items()}})
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
            if file := kept(args, fold, name, key):
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
        "arguments": described(args),
        **({"skipped": len(data.skipped)} if args.skip_bad else {}),
        "folds": reports,
        **summary(reports),
    }
    write(args.out / "results.json", json.dumps(results, indent=2) + "\n")
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
        print(f"Left out as bad: {len(data.skipped)} clips, {len(data.visual)} remain.")


def draw(runs, results):
    """history.png, and similarity.png of the first student, of each run, where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        return print("No history.png and similarity.png: they need matplotlib (pip install matplotlib).")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    for args, report in zip(runs, results):
        with open(args.out / "history.csv", newline="") as file:
            pictures = {"history": draw_history(pyplot, csv.DictReader(file))}
        for fold, method in [(fold["fold"], method) for fold in report["folds"] for method in fold["students"]][:1]:
            pictures["similarity"] = draw_similarity(pyplot, read(stage_file(args, fold, f"student_{method}")))
        for name, figure in pictures.items():
            image = io.BytesIO()
            figure.savefig(image, dpi=120)
            pyplot.close(figure)
            write(args.out / f"{name}.png", image.getvalue())


def draw_history(pyplot, history):
    """Loss above score, stage after stage: thin lines are folds, thick ones the means over them."""
    panels = {}
    for row in history:
        models = panels.setdefault("students" if row["stage"] == "student" else row["model"], {})
        curves = models.setdefault(row["model"], {}).setdefault(row["fold"], [])
        curves.append((float(row["loss"]), float(row["score"])))
    figure, axes = pyplot.subplots(2, len(panels), figsize=(2.6 * len(panels), 5), layout="constrained", squeeze=False)
    for column, (title, models) in zip(axes.T, panels.items()):
        column[0].set_title({"tnet": "T-Net (score: explained variance)"}.get(title, title), fontsize=8)
        column[1].set_xlabel("epoch")
        for number, (model, folds_) in enumerate(models.items()):
            epochs = range(1, 1 + min(map(len, folds_.values())))
            curves = np.array([curve[: len(epochs)] for curve in folds_.values()]).transpose(2, 1, 0)
            for axis, values in zip(column, curves):
                if len(models) == 1:
                    axis.plot(epochs, values, color="0.75", linewidth=0.7)
                axis.plot(epochs, values.mean(1), color=f"C{number % 10}", linestyle="-:"[number // 10], label=model)
        if title == "students":
            column[0].legend(frameon=False, fontsize=7)
    axes[0, 0].set_ylabel("loss")
    axes[1, 0].set_ylabel("score, validation rows")
    return figure


def draw_similarity(pyplot, saved):
    """Cosine similarities within some validation clips, sorted by label: the joint teacher's beside the student's."""
    shown, method, classes = saved["similarity"], saved["method"], saved["task"] == "classification"
    titles = {"teacher, stage 1": "joint teacher, before alignment", "student, untrained": f"{method}, before stage 3",
              "teacher": f"joint teacher, as {method} had it", "student": f"{method}, best epoch"}  # fmt: skip
    label = shown["label"]
    figure, axes = pyplot.subplots(2, 2, figsize=(8.4, 7.6), layout="constrained")
    for axis, (name, title) in zip(axes.flat, titles.items()):
        image = axis.imshow(shown[name].numpy(), vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
        if name.startswith("student"):
            title += (
                f"\nmean |S_s - S_t|: {(shown[name] - shown['teacher']).abs().mean():.2f}, S_t as at the lower left"
            )
        axis.set_title(title, fontsize=9)
        middles = [(label == i).nonzero().double().mean().item() for i in label.unique()] if classes else []
        axis.set_xticks(middles, [saved["names"][i] for i in label.unique()] if classes else [])
        axis.set_yticks([])
        axis.tick_params(length=0)
        axis.set_xlabel("clips by class" if classes else f"clips by {saved['names'][0]}, low to high")
    figure.colorbar(image, ax=axes, shrink=0.6, label="cosine similarity")
    return figure


# ---- main -------------------------------------------------------------------------------------------


def run(args):
    data = load(
        args.dataset, args.data, args.seed, need_privileged=args.stage != "eval", need_label=not args.predictions,
        stride=args.clip_stride, levels=args.levels, signal=args.signal, skip_bad=args.skip_bad, workers=args.workers,
    )  # fmt: skip
    for message in dict.fromkeys(data.skipped if processes()[0] == 0 else ()):
        print(f"train.py: left out, {message}", file=sys.stderr)
    tensors = {name: t.to(args.device) for name, t in data._asdict().items() if isinstance(t, torch.Tensor)}
    data = data._replace(**tensors)
    note_signals(insist=True)
    if args.predictions and not args.predictions.exists():
        check_writable(args.predictions.parent, "predictions")
    if args.stage == "eval":
        return evaluate_student(args, data) if args.student else evaluate_run(args, data)

    # What can fail for want of a folder or a file fails here, not after hours of training.
    if args.folds_by == "clip" and data.group is not None:
        print("train.py: --folds-by clip puts clips of one person into training and validation", file=sys.stderr)
        data = data._replace(group=None)
    if data.task == "regression" and args.batch_size < 2:
        fail("argument --batch-size: the CCC of a single clip is always 0; use at least 2")
    check_writable(args.out, "out")
    for view in VIEWS:
        if published := getattr(args, f"{view}_weights"):
            if not is_raw(getattr(data, view)):
                fail(f"argument --{view}-weights: they are for raw data, and this data set holds vectors")
            start_from(backbone(getattr(data, view)[0].shape, args.dim, args.width), published)
    seeds = range(args.seed, args.seed + args.seeds)
    folders = [args.out / f"seed{seed}" if args.seeds > 1 else args.out for seed in seeds]
    runs = [argparse.Namespace(**{**vars(args), "seed": seed, "out": out}) for seed, out in zip(seeds, folders)]
    parts, content = [split(one, data) for one in runs], digest(data.visual, data.privileged, data.label)
    if processes()[0] == 0:
        for one in {one.out: one for one in (args, *runs)}.values():  # a single seed's folder is the run's
            claim(one, content)
    every = each_seed(list(zip(runs, itertools.repeat(data), itertools.repeat(content), parts)))
    if processes()[0] > 0:
        return
    reports = [{"seed": seed, **report} for seed, one in zip(seeds, every) for report in one["folds"]]
    show_results(args, data, every[0] if args.seeds == 1 else write_results(args, data, reports))
    draw(runs, every)


def check_writable(folder, argument):
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        fail(f"argument --{argument}: {folder} cannot be written ({error.strerror})")


def split(args, data):
    """(training rows, validation rows) of each fold of one seed."""
    parts = folds(data, args.folds, args.seed)
    if args.fold is not None and args.fold >= len(parts):
        fail(f"argument --fold: the folds are 0 to {len(parts) - 1}")
    if args.train_rows:
        if args.train_rows > min(len(train) for train, _ in parts):
            fail(f"argument --train-rows: a fold has only {min(len(train) for train, _ in parts)}")
        draw = np.random.default_rng(args.seed).permutation
        parts = [(np.sort(draw(train)[: args.train_rows]), val) for train, val in parts]
    least = min(max(1, args.batch_size // 2), *(len(rows) for part in parts for rows in part))
    if processes()[1] > least:
        fail(f"{processes()[1]} processes cannot share {least} clips of a batch: start fewer, or raise --batch-size")
    return [tuple(torch.from_numpy(rows).to(args.device) for rows in part) for part in parts]


def each_seed(runs):
    """run_seed of each, on the CPU as many at a time as there are cores: networks this small need no more than one."""
    args = runs[0][0]
    jobs = min(len(runs), os.cpu_count() or 1) if args.device == "cpu" and processes()[1] == 1 else 1
    if jobs == 1:
        return [run_seed(*one) for one in runs]
    settings = {"mp_context": multiprocessing.get_context("spawn"), "initializer": one_of_many}
    with ProcessPoolExecutor(jobs, initargs=((os.cpu_count() or 1) // jobs,), **settings) as pool:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # until the new processes, which inherit it, are ready for them
        running = [pool.submit(run_seed, *one) for one in runs]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        try:
            pending = running
            while pending:
                done, pending = wait(pending, timeout=1, return_when=FIRST_EXCEPTION)
                stop_if_asked(args)
                for job in done:
                    job.result()
        except BrokenProcessPool:
            fail("the process of a seed was killed, for want of memory perhaps; --resume goes on from there")
        finally:
            for process in multiprocessing.active_children():
                process.terminate()  # where one has failed or was stopped, the others finish their step, save and go
    return [job.result() for job in running]


def one_of_many(threads):
    torch.set_num_threads(threads)
    plain_warnings()
    note_signals()  # they come from the terminal and from the first process, too
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    # Without the first process there is nobody to work for, and somebody may resume what it did.
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def run_seed(args, data, content, parts):
    """All folds with one seed; the results. content: a digest of the data."""
    stop_if_asked(args)
    # What each fold's stage 1 is made from, besides its hyper-parameters.
    keys = [f"{content}-{args.seed}-{args.dim}-{args.width}-{digest(train)}" for train, _ in parts]
    results = None
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
    before = {number: signal.getsignal(number) for number in STOPS}
    note_signals(at_once=True)
    try:
        if several or first:
            with contextlib.redirect_stdout(sys.stdout if first else io.StringIO()):
                run(args)
    except DataError as error:
        fail(error)
    except OSError as error:  # what may not be read, or a full disk or a closed pipe under the standard output
        if not error.filename:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # where what is still to be printed can go
        fail(f"{error.filename or 'reading or writing'}: {error.strerror or error}")
    except (KeyboardInterrupt, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not (several and SIGNALS):  # others have stopped, which this one awaits
            raise
        if first:
            command = ["torchrun ... train.py"] if several else ["python train.py"]
            command += [shlex.quote(part) for part in argv or sys.argv[1:]]
            again = " ".join(command + ["--resume"] * (not args.resume))
            saved = "" if args.stage == "eval" else f"; what was done is saved. To go on: {again}"
            print(f"train.py: stopped{saved}", file=sys.stderr)
        raise SystemExit(128 + (SIGNALS or STOPS[1:])[0]) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        SIGNALS.clear()
    if several:
        gc.collect()  # networks that still hold the group would keep its threads alive into the exit, which aborts it
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
