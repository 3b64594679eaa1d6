"""Train MT-PKDOT: teachers, alignment, student. `python train.py --help` lists the options.

Reading order:
    options and small helpers
    fit                 the one training loop: every network below goes through it
    teachers            stage 1: both backbones, the joint teacher, T-Net
    align               stage 2: adapters and heads, self-distilled with the joint teacher
    student             stage 3: one student a method, on frozen embeddings
    evaluate            a saved student on visual input alone
    collect, table      from the saved stages to results.json, history.csv and the printed table
    main

Each stage saves one file a fold to --out, holding weights, scores and history, and starts from the files of
the stages before it. results.json and history.csv are only ever computed from these files. Every file
carries a key of what it was made from, so that a student is never reported beside teachers it did not have.
"""

import argparse
import copy
import csv
import io
import json
import math
import os
import statistics
import sys
import warnings
import zlib
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import mtpkdot
from data import digest, folds, load
from models import DIM, Adapter, Encoder, Fusion, Head, Student, TNet

METHODS = ("mtpkdot", "pkdot", "mse", "cosine", "task")
STAGES = ("teachers", "align", "student")
CHUNK = 4096  # rows a forward pass takes where nothing is trained


# ---- options and small helpers ----------------------------------------------------------------------


def fail(message):
    print(f"train.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def number(kind, least, inclusive=True):
    """An argparse type: a finite number, at least (or above) `least`."""

    def parse(text):
        value = kind(text)
        if not math.isfinite(value) or value < least or (value == least and not inclusive):
            raise argparse.ArgumentTypeError(f"{text} is not {'at least' if inclusive else 'above'} {least}")
        return value

    parse.__name__ = kind.__name__
    return parse


def options(argv=None):
    parser = argparse.ArgumentParser(description="MT-PKDOT in three stages.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = fail
    count, weight, rate = number(int, 1), number(float, 0), number(float, 0, inclusive=False)
    add = parser.add_argument
    add("--dataset", default="synthetic", choices=["synthetic", "features", "affwild2", "biovid"])
    add("--data", help="path of the data set")
    add("--stage", default="all", choices=["all", *STAGES, "eval"])
    add("--method", default="mtpkdot", choices=[*METHODS, "all"], help="which student")
    add("--out", help="folder of the run (default: runs/DATASET)")
    add("--folds", type=number(int, 2), help="number of folds (default: the data's own split, else 5)")
    add("--fold", type=number(int, 0), help="run this fold only, counted from 0")
    add("--seed", type=number(int, 0), default=0)
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add("--batch-size", type=count, default=128)
    add("--epochs", type=count, help="epochs of everything trained (default: the --epochs-... options)")

    sizes = parser.add_argument_group("epochs (default: released code where it says, else ours)")
    for name, epochs in [("backbone", 30), ("joint", 20), ("tnet", 30), ("align", 10), ("student", 10), ("pkdot", 20)]:
        sizes.add_argument(f"--epochs-{name}", type=count, default=epochs)
    rates = parser.add_argument_group("Adam's learning rates (released code; backbone and joint ours)")
    for name, value in [("backbone", 1e-3), ("joint", 1e-4), ("tnet", 5e-5), ("adapter", 5e-3), ("fusion", 1e-4), ("student", 5e-4), ("pkdot", 1e-4)]:
        rates.add_argument(f"--lr-{name}", type=rate, default=value)
    loss = parser.add_argument_group("losses (released code; w-feature, anchors and tnet-loss ours)")
    for name, value in [("align", 0.5), ("head", 0.5), ("task", 0.8), ("ot", 0.2), ("centroid", 0.2), ("pkdot-ot", 0.6), ("feature", 1.0)]:
        loss.add_argument(f"--w-{name}", type=weight, default=value)
    loss.add_argument("--k", type=count, default=30, help="anchors a row")
    loss.add_argument("--anchors", choices=["most", "least"], default="most", help="anchors are the k most or least similar clips")
    loss.add_argument("--eps", type=rate, default=0.01, help="entropy of the transport, in the units of its cost")
    loss.add_argument("--ot", choices=["debiased", "entropic"], default="debiased")
    loss.add_argument("--tnet-loss", choices=["mse", "mmd"], default="mse")
    parser.add_argument_group("sizes").add_argument("--dim", type=number(int, 2), default=DIM, help="embedding size, even")

    args = parser.parse_args(argv)
    if args.dim % 2:
        fail(f"argument --dim: {args.dim} is odd; two attention heads share it")
    if args.w_align > 1:
        fail(f"argument --w-align: {args.w_align} is above 1")
    args.out = Path(args.out or f"runs/{args.dataset}")
    if args.epochs:
        for name in ("backbone", "joint", "tnet", "align", "student", "pkdot"):
            setattr(args, f"epochs_{name}", args.epochs)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("argument --device: this machine has no CUDA device; use --device cpu")
    return args


def seed_everything(args, *where):
    """The randomness of a part of the run depends on --seed and on where it is, not on what ran before."""
    torch.manual_seed(zlib.crc32(repr((args.seed, *where)).encode()))


def save(path, **payload):
    """Write beside the target, then rename: a killed run leaves no half file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(payload, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
    except (OSError, RuntimeError) as error:
        fail(f"{path}: cannot be written ({error})")


def write_text(path, text):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").write_text(text)
        os.replace(path.with_suffix(".tmp"), path)
    except OSError as error:
        fail(f"{path}: cannot be written ({error})")


def stage_file(args, fold, name):
    return args.out / f"fold{fold}" / f"{name}.pt"


def read(path, device="cpu"):
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # whatever a damaged file raises, the reader needs its name
        fail(f"{path}: cannot be read, train that stage again ({type(error).__name__})")


def earlier(args, fold, name, stage, key):
    """The saved file of an earlier stage, refused if it is missing or was made from something else."""
    path = stage_file(args, fold, name)
    if not path.exists():
        fail(f"{path} is missing: run --stage {stage} first (same --dataset, --data, --folds, --seed and --out)")
    saved = read(path, args.device)
    if saved["key"] != key:
        fail(f"{path} was made from other data, folds, seed or earlier stage: run --stage {stage} again")
    return saved


def score(data, prediction, rows):
    """Accuracy in 0..1, or the CCC of each column and their mean."""
    label = data.label[rows]
    if data.task == "classification":
        return (prediction.argmax(1) == label).double().mean().item()
    columns = mtpkdot.ccc(prediction.double(), label.double()).tolist()
    return {**dict(zip(data.names, columns)), "mean": statistics.fmean(columns)}


def headline(value):
    return value["mean"] if isinstance(value, dict) else value


@torch.no_grad()
def over(rows, function):
    """function(rows) a chunk at a time, put together."""
    return torch.cat([function(part) for part in rows.split(CHUNK)])


# ---- the one training loop --------------------------------------------------------------------------


def fit(args, where, network, optimizer, loss_of, score_of, rows, epochs):
    """Train `network`, keep its best epoch, return {"best", "last", "history"}.

    where      (fold, stage, model), for the log
    loss_of    rows of a batch -> dict of scalar tensors, of which "loss" is minimised
    score_of   () -> score on the validation rows
    """
    batches, best, history = math.ceil(len(rows) / args.batch_size), None, []
    for epoch in range(1, epochs + 1):
        network.train()
        sums = {}
        # Batches of nearly equal size: similarities within a runt of two clips would mean nothing.
        order = rows[torch.randperm(len(rows)).to(rows.device)]
        for batch in tqdm(order.tensor_split(batches), desc=f"{where[2]} {epoch}/{epochs}", leave=False, disable=None):
            terms = loss_of(batch)
            optimizer.zero_grad(set_to_none=True)
            terms["loss"].backward()
            optimizer.step()
            for name, value in terms.items():
                sums[name] = sums.get(name, 0) + value.detach() * len(batch) / len(rows)
        network.eval()
        value = score_of()
        if best is None or headline(value) > headline(best):
            best, weights = value, copy.deepcopy(network.state_dict())
        terms = {name: total.item() for name, total in sums.items()}
        history.append(dict(zip(("fold", "stage", "model"), where), epoch=epoch, **terms, score=headline(value)))
        print(f"fold {where[0]}  {where[2]:<18} epoch {epoch:>3}/{epochs}  loss {terms['loss']:.4f}  validation {headline(value):.4f}", flush=True)
    network.load_state_dict(weights)
    return {"best": best, "last": value, "history": history}


def adam(*groups):
    return torch.optim.Adam([{"params": list(module.parameters()), "lr": rate} for module, rate in groups])


# ---- stage 1: teachers ------------------------------------------------------------------------------


def teachers(args, data, fold, train, val, key):
    """Train both backbones with a head each, then the joint teacher and T-Net on their frozen embeddings."""
    outputs, z, nets, fits, scores = len(data.names), {}, {}, [], {}
    for view in ("visual", "privileged"):
        seed_everything(args, fold, "teachers", view)
        x = getattr(data, view)
        net = nn.ModuleDict({"encoder": Encoder(x[0].numel(), args.dim), "head": Head(args.dim, outputs)}).to(args.device)
        net["encoder"].fit_standardisation(x[train])

        def predict(rows):
            return net["head"](net["encoder"](x[rows]))

        def loss_of(rows):
            return {"loss": mtpkdot.task_loss(predict(rows), data.label[rows])}

        fits.append(
            fit(args, (fold, "teachers", view), net, adam((net, args.lr_backbone)), loss_of,
                lambda: score(data, over(val, predict), val), train, args.epochs_backbone)
        )  # fmt: skip
        scores[view] = fits[-1]["best"]
        nets[view] = net
        z[view] = over(torch.arange(len(x), device=x.device), lambda rows: net["encoder"](x[rows]))

    seed_everything(args, fold, "teachers", "joint")
    fusion = Fusion(args.dim, outputs).to(args.device)

    def joint(rows):
        return fusion(z["visual"][rows].unsqueeze(1), z["privileged"][rows].unsqueeze(1))[1]

    fits.append(
        fit(args, (fold, "teachers", "joint"), fusion, adam((fusion, args.lr_joint)),
            lambda rows: {"loss": mtpkdot.task_loss(joint(rows), data.label[rows])},
            lambda: score(data, over(val, joint), val), train, args.epochs_joint)
    )  # fmt: skip
    scores["joint"] = fits[-1]["best"]

    seed_everything(args, fold, "teachers", "tnet")
    tnet = TNet(args.dim).to(args.device)
    fits.append(
        fit(args, (fold, "teachers", "tnet"), tnet, adam((tnet, args.lr_tnet)),
            lambda rows: {"loss": mtpkdot.tnet_loss(tnet(z["visual"][rows]), z["privileged"][rows], args.tnet_loss)},
            # Scored as one minus the error, as a fraction of the variance that it leaves.
            lambda: explained(over(val, lambda rows: tnet(z["visual"][rows])), z["privileged"][val]), train, args.epochs_tnet)
    )  # fmt: skip

    weights = {**{view: net.state_dict() for view, net in nets.items()}, "joint": fusion.state_dict(), "tnet": tnet.state_dict()}
    save(stage_file(args, fold, "teachers"), key=key, id=digest(*(t for w in weights.values() for t in w.values())),
         weights=weights, scores=scores, history=[row for f in fits for row in f["history"]])  # fmt: skip


def explained(prediction, target):
    return 1 - ((prediction - target) ** 2).sum().item() / ((target - target.mean(0)) ** 2).sum().item()


def embeddings(args, data, saved):
    """z_v and z_p (N, D) of all clips by the frozen backbones of a saved stage 1."""
    for view in ("visual", "privileged"):
        x = getattr(data, view)
        encoder = Encoder(x[0].numel(), args.dim).to(args.device).eval()
        encoder.load_state_dict({k.removeprefix("encoder."): t for k, t in saved["weights"][view].items() if k.startswith("encoder.")})
        yield over(torch.arange(len(x), device=x.device), lambda rows: encoder(x[rows]))


# ---- stage 2: alignment -----------------------------------------------------------------------------


class Aligned(nn.ModuleDict):
    """Adapters, heads and joint teacher. z_v, z_p (B, D) -> {teacher: (embedding (B, D), prediction (B, K))}."""

    def __init__(self, dim, outputs):
        super().__init__(
            {
                "adapters": nn.ModuleDict({view: Adapter(dim) for view in ("visual", "privileged")}),
                "heads": nn.ModuleDict({view: Head(dim, outputs) for view in ("visual", "privileged")}),
                "joint": Fusion(dim, outputs),
            }
        )

    def forward(self, z_v, z_p):
        a_v, a_p = self["adapters"]["visual"](z_v), self["adapters"]["privileged"](z_p)
        return {
            "joint": self["joint"](z_v.unsqueeze(1), z_p.unsqueeze(1)),
            "adapted_visual": (a_v, self["heads"]["visual"](a_v)),
            "adapted_privileged": (a_p, self["heads"]["privileged"](a_p)),
        }


def align(args, data, fold, train, val, key):
    """Pull both single-modality embeddings and the joint one together; keep the best joint epoch."""
    before = earlier(args, fold, "teachers", "teachers", key)
    z_v, z_p = embeddings(args, data, before)
    seed_everything(args, fold, "align")
    net = Aligned(args.dim, len(data.names)).to(args.device)
    net["joint"].load_state_dict(before["weights"]["joint"])

    def loss_of(rows):
        out = net(z_v[rows], z_p[rows])
        distance = mtpkdot.alignment_loss(out["adapted_visual"][0], out["adapted_privileged"][0], out["joint"][0])
        task = {name: mtpkdot.task_loss(prediction, data.label[rows]) for name, (_, prediction) in out.items()}
        loss = mtpkdot.align_stage_loss(distance, task["joint"], task["adapted_visual"], task["adapted_privileged"], args.w_align, args.w_head)
        return {"loss": loss, "task": task["joint"], "align": distance}

    def score_of(name):
        return score(data, over(val, lambda rows: net(z_v[rows], z_p[rows])[name][1]), val)

    optimizer = adam((net["adapters"], args.lr_adapter), (net["heads"], args.lr_adapter), (net["joint"], args.lr_fusion))
    fitted = fit(args, (fold, "align", "align"), net, optimizer, loss_of, lambda: score_of("joint"), train, args.epochs_align)
    scores = {"joint_aligned": fitted["best"], **{name: score_of(name) for name in mtpkdot.TEACHERS[1:]}}
    save(stage_file(args, fold, "align"), key=before["id"], id=digest(*net.state_dict().values()),
         weights=net.state_dict(), scores=scores, history=fitted["history"])  # fmt: skip


# ---- stage 3: students ------------------------------------------------------------------------------


def student(args, data, fold, train, val, key, method):
    """Train one student's fusion on (z_v, T-Net(z_v)); backbone, T-Net and teachers are frozen.

    mtpkdot follows the teacher that does best on the batch, after alignment; pkdot, mse and cosine follow the
    joint teacher of stage 1; task follows nobody. All start from the same weights and see the same batches.
    """
    before = earlier(args, fold, "teachers", "teachers", key)
    z_v, z_p = embeddings(args, data, before)
    tnet = TNet(args.dim).to(args.device).eval().requires_grad_(False)
    tnet.load_state_dict(before["weights"]["tnet"])
    everyone = torch.arange(len(z_v), device=z_v.device)
    z_hat = over(everyone, lambda rows: tnet(z_v[rows]))

    if method == "mtpkdot":
        aligned = earlier(args, fold, "align", "align", before["id"])
        made_from = aligned["id"]
        net = Aligned(args.dim, len(data.names)).to(args.device).eval()
        net.load_state_dict(aligned["weights"])
        with torch.no_grad():
            parts = [net(z_v[rows], z_p[rows]) for rows in everyone.split(CHUNK)]
        z_teachers, predictions = ([torch.cat([p[name][i] for p in parts]) for name in mtpkdot.TEACHERS] for i in (0, 1))
    else:
        made_from = before["id"]
        joint = Fusion(args.dim, len(data.names)).to(args.device).eval()
        joint.load_state_dict(before["weights"]["joint"])
        z_j = over(everyone, lambda rows: joint(z_v[rows].unsqueeze(1), z_p[rows].unsqueeze(1))[0])

    seed_everything(args, fold, "student")
    fusion = Fusion(args.dim, len(data.names)).to(args.device)
    picks = torch.zeros(len(mtpkdot.TEACHERS), dtype=torch.long, device=args.device)
    transport = dict(k=args.k, which=args.anchors, eps=args.eps, debias=args.ot == "debiased")

    def forward(rows):
        return fusion(z_v[rows].unsqueeze(1), z_hat[rows].unsqueeze(1))

    def loss_of(rows):
        (z_s, prediction), label = forward(rows), data.label[rows]
        if method == "mtpkdot":
            chosen = mtpkdot.choose_teacher(torch.stack([mtpkdot.task_loss(p[rows], label) for p in predictions]))
            picks[chosen.view(1)] += 1
            z_t = torch.stack([z[rows] for z in z_teachers]).index_select(0, chosen.view(1))[0]
            return mtpkdot.student_loss(prediction, label, z_s, z_t, args.w_task, args.w_ot, args.w_centroid, **transport)
        if method == "pkdot":
            return mtpkdot.pkdot_loss(prediction, label, z_s, z_j[rows], args.w_pkdot_ot, **transport)
        if method == "task":
            return {"loss": mtpkdot.task_loss(prediction, label)}
        return mtpkdot.feature_loss(prediction, label, z_s, z_j[rows], method, args.w_feature)

    rate, epochs = (args.lr_pkdot, args.epochs_pkdot) if method == "pkdot" else (args.lr_student, args.epochs_student)
    fitted = fit(args, (fold, "student", method), fusion, adam((fusion, rate)), loss_of,
                 lambda: score(data, over(val, lambda rows: forward(rows)[1]), val), train, epochs)  # fmt: skip

    encoder = {k: t for k, t in before["weights"]["visual"].items() if k.startswith("encoder.")}
    weights = {**encoder, **{f"tnet.{k}": t for k, t in tnet.state_dict().items()}, **{f"fusion.{k}": t for k, t in fusion.state_dict().items()}}
    save(stage_file(args, fold, f"student_{method}"), key=made_from, weights=weights,
         scores={"best": fitted["best"], "last": fitted["last"]}, history=fitted["history"],
         picks=dict(zip(mtpkdot.TEACHERS, picks.tolist())) if method == "mtpkdot" else None,
         dim=args.dim, inputs=list(data.visual.shape[1:]), task=data.task, names=data.names,
         trained_on=digest(data.visual, data.label))  # fmt: skip


# ---- evaluation: the student alone ------------------------------------------------------------------


def evaluate(args, data, fold, val, method):
    """Score a saved student on visual input: on its fold's validation rows of the data it was trained with,
    or on every row of other data."""
    path = stage_file(args, fold, f"student_{method}")
    if not path.exists():
        fail(f"{path} is missing: run --stage student --method {method} first")
    saved = read(path, args.device)
    if list(data.visual.shape[1:]) != saved["inputs"] or data.task != saved["task"]:
        fail(f"{path} takes visual input of shape {tuple(saved['inputs'])} for {saved['task']}; "
             f"this data has shape {tuple(data.visual.shape[1:])} for {data.task}")  # fmt: skip
    if data.task == "classification":
        unknown = sorted(set(data.names) - set(saved["names"]))
        if unknown:
            fail(f"{path} knows the classes {saved['names']}; this data has also {unknown}")
        index = torch.tensor([saved["names"].index(name) for name in data.names], device=data.label.device)
        relabelled = data._replace(label=index[data.label], names=saved["names"])
    elif data.names != saved["names"]:
        fail(f"{path} predicts {saved['names']}; this data has {data.names}")
    else:
        relabelled = data
    same = digest(data.visual, data.label) == saved["trained_on"]
    rows = val if same else torch.arange(len(data.label), device=val.device)
    inputs = math.prod(saved["inputs"])
    net = Student(Encoder(inputs, saved["dim"]), TNet(saved["dim"]), Fusion(saved["dim"], len(saved["names"])))
    net.load_state_dict(saved["weights"])
    net.to(args.device).eval()
    print(f"fold {fold}  {method:<18} {len(rows)} rows, {'validation rows of the training data' if same else 'all rows of other data'}")
    return score(relabelled, over(rows, lambda part: net(data.visual[part])[1]), rows)


# ---- reporting --------------------------------------------------------------------------------------


def collect(args, data, parts):
    """results.json and history.csv from whatever the run's folder holds for this data and seed."""
    reports, history = [], []
    for fold, (train, _) in enumerate(parts):
        path, key = stage_file(args, fold, "teachers"), key_of(args, data, train)
        if not path.exists() or (teachers := read(path))["key"] != key:
            continue
        saved = {"teachers": teachers}
        if (path := stage_file(args, fold, "align")).exists() and (file := read(path))["key"] == teachers["id"]:
            saved["align"] = file
        for method in METHODS:
            parent = saved.get("align" if method == "mtpkdot" else "teachers")
            if parent and (path := stage_file(args, fold, f"student_{method}")).exists() and (file := read(path))["key"] == parent["id"]:
                saved[method] = file
        students = {method: saved[method]["scores"] for method in METHODS if method in saved}
        report = {"fold": fold, **teachers["scores"], **saved.get("align", {"scores": {}})["scores"]}
        report.update(students=students, teacher_picks=saved.get("mtpkdot", {"picks": {}})["picks"])
        reports.append(report)
        history += [row for file in saved.values() for row in file["history"]]
    arguments = {name: value for name, value in vars(args).items() if name != "out"}
    results = {
        "dataset": args.dataset,
        "task": data.task,
        "metric": "accuracy" if data.task == "classification" else "ccc",
        "seed": args.seed,
        "arguments": arguments,
        "folds": reports,
        "mean": over_folds(reports, statistics.fmean),
        "stderr": over_folds(reports, lambda v: statistics.stdev(v) / math.sqrt(len(v)) if len(v) > 1 else None),
    }
    write_text(args.out / "results.json", json.dumps(results, indent=2) + "\n")
    columns = list(dict.fromkeys(name for row in history for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_text(args.out / "history.csv", text.getvalue())
    return results


def over_folds(reports, statistic):
    """The same nested dicts with each number replaced by a statistic of it over the folds that have it."""
    merged = {}
    for name in dict.fromkeys(key for report in reports for key in report if key != "fold"):
        values = [report[name] for report in reports if name in report]
        merged[name] = over_folds(values, statistic) if isinstance(values[0], dict) else statistic(values)
    return merged


def cell(value):
    """A score as text: percent for an accuracy, the columns' CCC for a regression."""
    if value is None:
        return "-"
    if isinstance(value, dict):
        return "/".join("-" if v is None else f"{v:.3f}" for k, v in value.items() if k != "mean")
    return f"{100 * value:.1f}"


def print_table(rows, reports, mean, stderr, footer):
    """One line for each (label, path of keys) in rows that some report has, a column a fold."""

    def at(tree, path):
        for key in path:
            tree = tree.get(key) if tree else None
        return tree

    lines = [["", *(f"fold {r['fold']}" for r in reports), "mean", "s.e."]]
    for label, path in rows:
        if at(mean, path) is not None:
            lines.append([label, *(cell(at(r, path)) for r in reports), cell(at(mean, path)), cell(at(stderr, path))])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    print()
    for line in lines:
        print("  ".join([line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:]))]))
    print(footer)


def unit(data):
    return "accuracy in %" if data.task == "classification" else f"CCC of {'/'.join(data.names)}"


def print_results(data, results):
    rows = [
        ("visual only", ["visual"]),
        ("privileged only", ["privileged"]),
        ("joint teacher", ["joint"]),
        ("joint teacher, aligned", ["joint_aligned"]),
        ("adapted visual teacher", ["adapted_visual"]),
        ("adapted privileged teacher", ["adapted_privileged"]),
    ]
    for method in METHODS:
        rows += [(f"student {method}", ["students", method, "best"]), ("    its last epoch", ["students", method, "last"])]
    footer = f"Scores: {unit(data)} on validation rows. The best epoch is chosen on those same rows, as the paper does."
    print_table(rows, results["folds"], results["mean"], results["stderr"], footer)
    picks = results["mean"].get("teacher_picks")
    if picks:
        shares = ", ".join(f"{name.replace('_', ' ')} {100 * n / sum(picks.values()):.0f} %" for name, n in picks.items())
        print(f"Teacher picked for a batch of mtpkdot: {shares}.")


# ---- main -------------------------------------------------------------------------------------------


def key_of(args, data, train):
    """What stage 1 depends on besides its weights: data, training rows, seed and embedding size."""
    return f"{digest(data.visual, data.privileged, data.label, train.cpu())}-{args.seed}-{args.dim}"


def main(argv=None):
    args = options(argv)
    warnings.filterwarnings("once", category=RuntimeWarning)  # Sinkhorn says so when it has not converged
    try:
        data = load(args.dataset, args.data, args.seed, need_privileged=args.stage != "eval")
        parts = folds(data, args.folds, args.seed)
    except ValueError as error:
        fail(error)
    if args.fold is not None and args.fold >= len(parts):
        fail(f"argument --fold: there are {len(parts)} folds, 0 to {len(parts) - 1}")
    data = data._replace(**{name: getattr(data, name).to(args.device) for name in ("visual", "privileged", "label") if getattr(data, name) is not None})
    parts = [tuple(torch.from_numpy(rows).to(args.device) for rows in part) for part in parts]
    selected = [args.fold] if args.fold is not None else range(len(parts))
    methods = METHODS if args.method == "all" else (args.method,)

    if args.stage == "eval":
        reports = [{"fold": fold, "students": {m: evaluate(args, data, fold, parts[fold][1], m) for m in methods}} for fold in selected]
        mean, stderr = (over_folds(reports, s) for s in (statistics.fmean, lambda v: statistics.stdev(v) / math.sqrt(len(v)) if len(v) > 1 else None))
        write_text(args.out / "eval.json", json.dumps({"folds": reports, "mean": mean, "stderr": stderr}, indent=2) + "\n")
        print_table([(f"student {m}", ["students", m]) for m in methods], reports, mean, stderr, f"Scores: {unit(data)}, from visual input alone.")
        return

    for fold in selected:
        train, val = parts[fold]
        key = key_of(args, data, train)
        if args.stage in ("all", "teachers"):
            teachers(args, data, fold, train, val, key)
        if args.stage in ("all", "align"):
            align(args, data, fold, train, val, key)
        if args.stage in ("all", "student"):
            for method in methods:
                student(args, data, fold, train, val, key, method)
    print_results(data, collect(args, data, parts))
    print(f"Saved in {args.out}: results.json, history.csv and a file a stage in each fold.")


if __name__ == "__main__":
    main()
