"""The training script end to end, small: what it saves, what its scores are of, eval, mistakes."""

import csv
import json
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import signal
import sys
import tempfile
import threading
import time
from argparse import Namespace
from multiprocessing import connection

import numpy as np
import pytest
import torch
from scipy import stats

import models
import train

sys.modules["matplotlib"] = None  # for time: one test draws
SMALL = ["--dim", 8, "--epochs", 2, "--batch-size", 32, "--device", "cpu"]
RAW = ["--epochs", 1, "--dim", 16, "--width", 2, "--clip-stride", 12, "--batch-size", 16]
TEACHERS = ["visual", "privileged", "joint", "joint_aligned", "adapted_visual", "adapted_privileged"]
METHODS = ["unaligned", "no-centroid", "joint", "visual", "privileged"]
METHODS = ["mtpkdot", *(f"mtpkdot-{name}" for name in METHODS)]
METHODS += ["pkdot", "mse", "cosine", "rkd", "task", "visual"]


def run(capsys, *argv):
    """What train.py prints, run within this process; for a mistake, its one line on stderr."""
    capsys.readouterr()
    try:
        train.main([str(a) for a in (*SMALL, *argv)])
    except SystemExit as stop:
        return one_line(Namespace(code=stop.code, said=capsys.readouterr().err))
    return capsys.readouterr().out


def one_line(done, code=2):
    assert done.code == code and re.fullmatch("train.py: .*\n", done.said), done
    return done.said


def as_script(argv, folder, limit, said, stdout):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for stream in (1, 2) if stdout else (2,):
        os.dup2(os.open(said, os.O_WRONLY | os.O_APPEND), stream)
    os.chdir(folder)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # as it is in a process from a shell
    sys.argv = ["train.py", *argv]
    try:
        runpy.run_path(train.__file__, run_name="__main__")
    finally:
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 2 * 2**20:
            print("more than 2 GiB", file=sys.stderr)


CONTEXT, LOCK = multiprocessing.get_context("forkserver"), threading.Lock()
CONTEXT.set_forkserver_preload(["torch._dynamo", __name__])


def go(*argv, folder=".", send=signal.SIGKILL, after=60, limit=None, stdout=False):
    """train.py as a script in a process of its own, a fork of one that has imported torch. It gets
    the signal `send` after so many seconds, and can write no file of more than `limit` bytes.
    -> exit code; what it said on stderr, with stdout=True on stdout too; seconds."""
    with tempfile.NamedTemporaryFile() as said:
        job = ([str(a) for a in argv], str(folder), limit, said.name, stdout)
        process, start = CONTEXT.Process(target=as_script, args=job), time.monotonic()
        with LOCK:
            process.start()
        if not connection.wait([process.sentinel], after):
            os.kill(process.pid, send)
        connection.wait([process.sentinel])
        with LOCK:
            process.join()
        text, seconds = said.read().decode(errors="replace"), time.monotonic() - start
    return Namespace(code=process.exitcode, said=text, seconds=seconds)


def two_view(path, n=96, regression=False, **more):
    """Two noisy views of a class, 4 to 6, or of two values. The visual view says in one column a row
    which row it is: the mean of these columns tells which rows a network has seen."""
    rng = np.random.default_rng(0)
    label = rng.uniform(-1, 1, (n, 2)) if regression else np.arange(n) % 3 + 4
    mean = label @ rng.normal(size=(2, 6)) if regression else 2 * rng.normal(size=(3, 6))[label - 4]
    visual = np.hstack([mean + rng.normal(size=(n, 6)), np.eye(n)])
    views = {"visual": visual, "privileged": mean + 0.3 * rng.normal(size=(n, 6))}
    np.savez(path, **{"label": label, "group": np.arange(n) // 4, **views, **more})
    return path


def results(folder):
    return json.loads((folder / "results.json").read_text())


def table(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def load(path):
    return torch.load(path, weights_only=True)


def seen(saved):
    """The rows that a saved network's standardisation has seen."""
    return np.flatnonzero(saved["weights"]["encoder.mean"][6:] > 0)


def predict(saved, visual):
    return models.load_student(saved)(torch.tensor(visual, dtype=torch.float32))[1]


def accuracy(saved, data, rows):
    chosen = np.array(saved["names"])[predict(saved, data["visual"][rows]).argmax(1)]
    return (chosen == data["label"][rows]).mean()


def assert_gap(gap, a, b):
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    if np.ptp(np.subtract(a, b)) > 1e-9:  # scipy has no interval for equal differences
        assert gap == pytest.approx({"mean": np.mean(a) - np.mean(b), "low": low, "high": high})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of everything on three folds: its data, folder, arguments, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    data = two_view(folder / "data.npz")
    argv = [*SMALL, "--dataset", "features", "--data", data, "--folds", 3]
    done = go(*argv, "--method", "all", "--out", folder / "out", stdout=True)
    assert done.code == 0, done
    return Namespace(data=data, out=folder / "out", printed=done.said, argv=argv)


# ---- what a run leaves --------------------------------------------------------------------------


def test_results_and_their_statistics(finished):
    got = results(finished.out)
    head = ["dataset", "task", "metric", "seed", "arguments"]
    assert list(got) == [*head, "folds", "mean", "stderr", "less_task", "less_visual"]
    assert [got[key] for key in head[:4]] == ["features", "classification", "accuracy", 0]
    for number, report in enumerate(got["folds"]):
        assert set(report) >= {"seed", "fold", *TEACHERS, "students", "teacher_picks"}
        assert (report["seed"], report["fold"]) == (0, number)
        assert sum(report["teacher_picks"].values()) == pytest.approx(1)
    scores = {m: [report["students"][m] for report in got["folds"]] for m in METHODS}
    columns = {name: [report[name] for report in got["folds"]] for name in TEACHERS}
    for want, where in ((columns, lambda part: part), (scores, lambda part: part["students"])):
        for name, values in want.items():
            assert where(got["mean"])[name] == pytest.approx(np.mean(values))
            assert where(got["stderr"])[name] == pytest.approx(np.std(values, ddof=1) / 3**0.5)
    for other in ("task", "visual"):
        assert list(got[f"less_{other}"]) == [m for m in METHODS if m != other]
        for method, gap in got[f"less_{other}"].items():
            assert_gap(gap, scores[method], scores[other])


def test_history_has_a_row_a_network_and_epoch_and_losses_add_up(finished):
    rows = table(finished.out / "history.csv")
    names = [f"teachers_{name}" for name in ("visual", "privileged", "joint", "tnet")] + ["align"]
    names += [f"student_{method}" for method in METHODS]
    want = [(str(f), name, str(epoch)) for f in range(3) for name in names for epoch in (1, 2)]
    assert [(row["fold"], row["model"], row["epoch"]) for row in rows] == want
    weights = {"mtpkdot": {"task": 0.8, "ot": 1, "centroid": 0.02}, "pkdot": {"task": 1, "ot": 1.25}}
    weights.update({name: {"task": 1, name: 1} for name in ("mse", "cosine", "rkd")})
    for row in rows:
        values = [float(v) for k, v in row.items() if v and k not in ("stage", "model")]
        assert row["loss"] and row["score"] and np.isfinite(values).all()
        terms = weights.get(row["model"].removeprefix("student_"), {"loss": 1})
        total = sum(weight * float(row[term]) for term, weight in terms.items())
        assert float(row["loss"]) == pytest.approx(total, abs=1e-5)


def line_of(printed, kind, name):
    return re.search(rf"^{kind}{name}  +(.*)", printed, re.MULTILINE)[1]


def test_the_table_shows_every_model(finished):
    got = results(finished.out)["mean"]
    for name in TEACHERS:
        line = line_of(finished.printed, "(?:teacher:? )?", name.replace("_", " "))
        assert line.startswith(f"{100 * got[name]:.1f} ±")
    for method in METHODS:
        line = line_of(finished.printed, "student:? ", method)
        assert line.startswith(f"{100 * got['students'][method]:.1f} ±")
        assert line.count("[") == 2 - (method in ("task", "visual"))  # intervals


def test_regression_on_one_split_with_and_without_pictures(tmp_path, capsys, monkeypatch):
    split = np.where(np.arange(96) < 64, "train", "val")
    path, out = two_view(tmp_path / "d.npz", regression=True, split=split), tmp_path / "out"
    base = ["--dataset", "features", "--data", path, "--out", out, "--method", "task"]
    printed = run(capsys, *base)  # one fold, one student: no standard error, nothing to compare
    line, got, data = line_of(printed, "student:? ", "task"), results(out), np.load(path)
    assert "±" not in line and "[" not in line and got["stderr"]["joint"]["mean"] is None
    column, saved = got["mean"]["students"]["task"], load(out / "fold0/student_task.pt")
    assert column["mean"] == pytest.approx((column["valence"] + column["arousal"]) / 2)
    x, y = predict(saved, data["visual"][64:]).double().numpy()[:, 0], data["label"][64:, 0]
    ccc = 2 * np.cov(x, y, ddof=0)[0, 1] / (x.var() + y.var() + (x.mean() - y.mean()) ** 2)
    assert got["metric"] == "ccc" and column["valence"] == pytest.approx(ccc, abs=1e-5)
    assert printed.count("No pictures") == 1 and not list(out.glob("*.png"))
    monkeypatch.delitem(sys.modules, "matplotlib")
    pytest.importorskip("matplotlib")
    assert "No pictures" not in run(capsys, *base)
    for name in ("history", "similarity"):
        assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


# ---- what the scores are of ---------------------------------------------------------------------


def test_scores_are_of_rows_that_nothing_was_learnt_from(finished):
    data, scored = np.load(finished.data), []
    for report in results(finished.out)["folds"]:
        saved = load(finished.out / f"fold{report['fold']}/student_mtpkdot.pt")
        val, trained = saved["val"].numpy(), seen(saved)
        chose = np.setdiff1d(np.arange(96), [*val, *trained])
        people = [set(data["group"][rows]) for rows in (val, trained, chose)]
        assert [len(one) for one in people] == [8, 13, 3] and len(set.union(*people)) == 24
        assert accuracy(saved, data, val) == report["students"]["mtpkdot"]
        assert accuracy(saved, data, chose) == max(row["score"] for row in saved["history"])
        scored.extend(val)
    assert sorted(scored) == list(range(96))


def test_rows_that_are_not_trained_on_leave_no_trace_in_the_weights(tmp_path, capsys):
    base = ["--dataset", "features", "--folds", 3, "--fold", 0, "--method", "mtpkdot", "--epochs", 1]
    run(capsys, *base, "--data", two_view(tmp_path / "d.npz"), "--out", tmp_path / "one")
    one, data = load(tmp_path / "one/fold0/student_mtpkdot.pt"), dict(np.load(tmp_path / "d.npz"))
    others = np.setdiff1d(np.arange(96), seen(one))
    for key in ("visual", "privileged", "label"):
        data[key][others] = data[key][others][::-1]
    np.savez(tmp_path / "other.npz", **data)
    run(capsys, *base, "--data", tmp_path / "other.npz", "--out", tmp_path / "two")
    two = load(tmp_path / "two/fold0/student_mtpkdot.pt")
    assert all(torch.equal(one["weights"][key], two["weights"][key]) for key in one["weights"])


def test_stages_one_by_one_give_the_same(finished, tmp_path, capsys):
    base = [*finished.argv, "--out", tmp_path, "--stage"]
    assert "--stage teachers first" in run(capsys, *base, "align")
    assert "--stage teachers first" in run(capsys, *base, "student", "--method", "task")
    run(capsys, *base, "teachers")
    assert "--stage align first" in run(capsys, *base, "student")
    run(capsys, *base, "align")
    for method in ("task", "pkdot", "mtpkdot"):
        for fold in (2, 0, 1):
            run(capsys, *base, "student", "--method", method, "--fold", fold)
    whole, pieces = results(finished.out), results(tmp_path)
    for report in (*whole["folds"], whole["mean"], whole["stderr"]):
        report["students"] = {m: report["students"][m] for m in ("mtpkdot", "pkdot", "task")}
    assert all(whole[part] == pieces[part] for part in ("folds", "mean", "stderr"))


def test_several_seeds(finished, tmp_path, capsys):
    argv = ["--epochs", 1, "--out", tmp_path, "--method", "task,visual", "--seeds", 3]
    run(capsys, *finished.argv, *argv)
    got, alone = results(tmp_path), [results(tmp_path / f"seed{seed}") for seed in range(3)]
    assert [r["seed"] for r in got["folds"]] == [0] * 3 + [1] * 3 + [2] * 3
    assert got["folds"] == sum((one["folds"] for one in alone), [])
    joint = [one["mean"]["joint"] for one in alone]
    assert len(set(joint)) > 1 and got["stderr"]["joint"] == pytest.approx(stats.sem(joint))
    task, visual = ([one["mean"]["students"][m] for one in alone] for m in ("task", "visual"))
    assert_gap(got["less_visual"]["task"], task, visual)


# ---- what the options do ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["frozen", "finetune", "scratch"])
def test_student_backbone(kind, finished, tmp_path, capsys):
    argv = ["--out", tmp_path, "--fold", 0, "--method", "task", "--student-backbone", kind]
    run(capsys, *finished.argv, *argv)
    first, tnet, weights = (
        load(tmp_path / f"fold0/{name}.pt")["weights"]
        for name in ("teachers_visual", "teachers_tnet", "student_task")
    )
    moves = [(weights[name] - first[name]).abs().max().item() for name in first if "layers" in name]
    assert (max(moves) == 0) == (kind == "frozen")
    assert (max(moves) > 5e-3) == (kind == "scratch")  # four updates of a rate of 1e-3 at most
    assert torch.equal(weights["encoder.mean"], first["encoder.mean"])
    network = models.TNet(8)
    network.load_state_dict(tnet)
    torch.testing.assert_close(weights["tnet.weight"], network.composed().weight)


def test_every_network_trains_for_as_many_updates(finished, tmp_path, capsys, monkeypatch):
    steps, step, argv = [], torch.optim.Adam.step, ["--method", "all", "--updates", 3]
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *a: steps.append(1) or step(*a))
    for name in ("backbone", "joint", "tnet", "align", "student", "pkdot"):
        argv += [f"--epochs-{name}", 1]
    monkeypatch.setattr(sys.modules[__name__], "SMALL", [])  # its --epochs
    base = [*finished.argv[:2], *finished.argv[4:], "--fold", 0, "--out", tmp_path]
    run(capsys, *base, *argv)
    epochs = [row["epoch"] for row in table(tmp_path / "history.csv")]
    assert epochs == ["1", "2"] * 17 and len(steps) == 17 * 4  # two batches an epoch


def test_train_rows_and_the_protocol_of_the_paper(finished, tmp_path, capsys):
    argv = ["--out", tmp_path, "--method", "task", "--select", "val", "--train-rows"]
    assert "--train-rows" in run(capsys, *finished.argv, *argv, 65)
    run(capsys, *finished.argv, *argv, 30)
    for report in results(tmp_path)["folds"]:
        saved = load(tmp_path / f"fold{report['fold']}/student_task.pt")
        assert len(seen(saved)) == 30 and not set(seen(saved)) & set(saved["val"].tolist())
        assert report["students"]["task"] == max(row["score"] for row in saved["history"])


def test_preset_is_the_released_code_and_what_is_given_goes_first():
    got = vars(train.options(["--preset", "released", "--device", "cpu", "--w-ot", "3"]))
    want = {"lr_student": 5e-4, "epochs_student": 10, "lr_pkdot": 1e-4, "epochs_pkdot": 20, "k": 30}
    want |= {"lr_adapter": 5e-3, "lr_fusion": 1e-4, "lr_tnet": 5e-5, "epochs_align": 10, "dim": 512}
    want |= {"w_align": 0.5, "w_head": 0.5, "w_task": 0.8, "w_centroid": 0.2, "w_pkdot_ot": 0.6}
    want |= {"anchors": "least", "shift": "min", "student_backbone": "frozen", "eps": 0.01, "w_ot": 3}
    want |= {"folds_by": "clip", "select": "val", "updates": 0, "lr_decay": "none"}
    assert {name: got[name] for name in want} == want


MISTAKES = ["--data nowhere.npz", "--fold 3", "--method mtpkdot,nothing", "--seed 99999999999999999999"]
MISTAKES += ["--dataset imagenet", "--batch-size 1", "--dim 15", "--eps 0", "--w-ot -1", "--bogus x"]
MISTAKES += ["--lr-student nan", "--visual-weights r3d_18.pth", "--out /proc/nowhere", "--folds 25"]
MISTAKES += ["--dataset affwild2", "--stage eval", "--lr-joint 1e30"]
WORDS = {"--data": "nowhere.npz", "--out": "/proc/nowhere", "--folds": "25", "--stage": "--student"}
WORDS["--lr-joint"] = "--lr"


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line(mistake, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    option, value = mistake.split()
    word = WORDS.get(option, option) if value != "affwild2" else str(finished.data)
    assert word in run(capsys, *finished.argv, "--out", "out", option, value)


# ---- a student on new data ----------------------------------------------------------------------


def test_eval(finished, tmp_path, capsys):
    data, new, said = dict(np.load(finished.data)), tmp_path / "new.npz", tmp_path / "p.csv"
    student = finished.out / "fold1/student_mtpkdot.pt"
    base, saved = ["--stage", "eval", "--student", student, "--data"], load(student)
    score = results(finished.out)["folds"][1]["students"]["mtpkdot"]
    assert f"{100 * score:.1f}" in run(capsys, *base, finished.data, "--predictions", said)
    assert [int(row["name"]) for row in table(said)] == saved["val"].tolist()
    rows = np.arange(0, 60, 3)  # of one class only
    visual, label = data["visual"][rows], data["label"][rows]
    np.savez(new, visual=visual, label=label)
    assert f"{100 * accuracy(saved, data, rows):.1f}," in run(capsys, *base, new)
    wrong = {"9": (visual, label + 5), "regression": (visual, np.ones((20, 2)))}
    for word, (x, y) in {**wrong, "shape": (visual[:, :7], label)}.items():
        np.savez(new, visual=x, label=y)
        assert word in run(capsys, *base, new)

    np.savez(new, visual=visual)  # without labels
    assert "label" in run(capsys, *base, new)
    assert "Score" not in run(capsys, *base, new, "--predictions", said)
    got, want = table(said), predict(saved, visual)
    assert [int(row["name"]) for row in got] == list(range(20))
    assert [int(row["prediction"]) - 4 for row in got] == want.argmax(1).tolist()
    chances = np.array([[row[f"p_{name}"] for name in (4, 5, 6)] for row in got], dtype=float)
    np.testing.assert_allclose(chances, want.softmax(1), atol=1e-6)
    os.mkfifo(tmp_path / "pipe")
    piped = []
    reader = threading.Thread(target=lambda: piped.append((tmp_path / "pipe").read_text()))
    reader.start()
    run(capsys, *base, new, "--predictions", tmp_path / "pipe")
    reader.join()
    assert piped == [said.read_text()]
    assert piped[0] in go(*base, new, "--predictions", "/dev/stdout", stdout=True).said


@pytest.mark.filterwarnings("ignore:.*faceless")
@pytest.mark.parametrize("dataset", ["affwild2", "biovid"])
def test_raw_data_from_files_to_predictions(dataset, tmp_path, capsys):
    pytest.importorskip("PIL")
    import test_raw

    tree, student = tmp_path / "tree", tmp_path / "run/fold0/student_mtpkdot.pt"
    if dataset == "affwild2":
        test_raw.affwild2_tree(tree)
        more, gone = ["--workers", 1], ("annotations", "audio", "cropped_aligned/9_right")
    else:
        test_raw.biovid_tree(tree, people=4, clips=1, levels=("BL1", "PA1"))
        more, gone = ["--workers", 0, "--levels", "BL1,PA1", "--folds", 2], ("biosignals_filtered",)
    base = [*RAW, "--data", tree]
    run(capsys, "--dataset", dataset, *base, *more, "--fold", 0, "--out", tmp_path / "run")
    for folder in gone:  # frames of faces are enough; the levels are the student's
        shutil.rmtree(tree / folder)
    said = tmp_path / "p.csv"
    run(capsys, "--stage", "eval", "--student", student, "--predictions", said, *base)
    rows = table(said)
    if dataset == "affwild2":
        assert rows[0]["name"] == "1-30-1280x720/00001" and rows[-1]["name"] == "été.v2/00025"
        assert len(rows) == 5 * 3 and all(abs(float(row["valence"])) < 99 for row in rows)
    else:
        names = [path.name for path in sorted((tree / "frames").glob("*/*"))]
        assert [row["name"] for row in rows] == [names[i] for i in load(student)["val"]]
        assert {row["prediction"] for row in rows} <= {"BL1", "PA1"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_three_stages_on_cuda(finished, tmp_path, capsys):
    run(capsys, *finished.argv, "--device", "cuda", "--method", "all", "--out", tmp_path)
    got, want = results(tmp_path)["mean"], results(finished.out)["mean"]
    assert list(got["students"]) == METHODS and abs(got["joint"] - want["joint"]) < 0.15
