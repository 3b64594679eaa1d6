"""The training script end to end, at a small size: what it saves, what its scores are scores of, the
student on new data, and what it says of a mistake.

`run` is train.py within this process, `go` is train.py as a script in a process of its own.
"""

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
from pathlib import Path

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
ABLATIONS = ["unaligned", "no-centroid", "joint", "visual", "privileged"]
OTHERS = ["pkdot", "mse", "cosine", "rkd", "task", "visual"]
METHODS = ["mtpkdot", *(f"mtpkdot-{name}" for name in ABLATIONS), *OTHERS]


# ---- helpers, of the other tests too ------------------------------------------------------------


def run(capsys, *argv):
    """What train.py prints; for a mistake, its one line on stderr."""
    capsys.readouterr()
    try:
        train.main([str(a) for a in (*SMALL, *argv)])
    except SystemExit as stop:
        said = capsys.readouterr().err
        assert stop.code == 2 and said.startswith("train.py: ") and said.count("\n") == 1, said
        return said
    return capsys.readouterr().out


def as_script(argv, folder, limit, said, stdout):
    """What `go` runs. torch is imported already, in the process that this one is a fork of."""
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


def go(*argv, folder=".", send=None, after=60, limit=None, stdout=False):
    """Run train.py. -> exit code, what it said on stderr (stdout=True: or on stdout), seconds.

    send   a signal that it gets after so many seconds
    limit  the size of the largest file that it may write, in bytes
    """
    with tempfile.NamedTemporaryFile() as said:
        job = ([str(a) for a in argv], str(folder), limit, said.name, stdout)
        process, start = CONTEXT.Process(target=as_script, args=job), time.monotonic()
        with LOCK:
            process.start()
        if not connection.wait([process.sentinel], after):
            os.kill(process.pid, send or signal.SIGKILL)
        connection.wait([process.sentinel])
        with LOCK:
            process.join()
        seconds, text = time.monotonic() - start, said.read().decode(errors="replace")
    return Namespace(code=process.exitcode, said=text, seconds=seconds)


def one_line(done, code=2):
    assert done.code == code and done.said.startswith("train.py: "), done
    assert done.said.count("\n") == 1, done
    return done.said


def two_view(path, n=96, regression=False, **more):
    """Two noisy views of a class, 4 to 6, or of two values. The visual view also says, in one column
    a row, which row it is: the mean of these columns tells which rows a network has seen."""
    rng = np.random.default_rng(0)
    label = rng.uniform(-1, 1, (n, 2)) if regression else np.arange(n) % 3 + 4
    mean = label @ rng.normal(size=(2, 6)) if regression else 2 * rng.normal(size=(3, 6))[label - 4]
    visual = np.hstack([mean + rng.normal(size=(n, 6)), np.eye(n)])
    views = {"visual": visual, "privileged": mean + 0.3 * rng.normal(size=(n, 6))}
    np.savez(path, **{"label": label, "group": np.arange(n) // 4, **views, **more})
    return path


def results(folder):
    return json.loads((folder / "results.json").read_text())


def history(folder):
    with (folder / "history.csv").open() as file:
        return list(csv.DictReader(file))


def load(path):
    return torch.load(path, weights_only=True)


def seen(saved):
    """The rows that a saved network's standardisation has seen."""
    weights = saved["weights"]
    mean = weights["encoder.mean"] if "encoder.mean" in weights else weights["mean"]
    return np.flatnonzero(mean[6:] > 0)


def predict(saved, visual):
    return models.load_student(saved)(torch.tensor(visual, dtype=torch.float32))[1]


def accuracy(saved, data, rows):
    said = np.array(saved["names"])[predict(saved, data["visual"][rows]).argmax(1)]
    return (said == data["label"][rows]).mean()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of everything on three folds: data file, folder, and what was printed."""
    folder = tmp_path_factory.mktemp("finished")
    data = two_view(folder / "data.npz")
    argv = [*SMALL, "--dataset", "features", "--data", data, "--folds", 3, "--method", "all"]
    done = go(*argv, "--out", folder / "out", stdout=True)
    assert done.code == 0, done
    return Namespace(data=data, out=folder / "out", printed=done.said, argv=argv[:-2])


def interval(a, b):
    test = stats.ttest_rel(a, b)
    low, high = test.confidence_interval(0.95)
    return {"mean": np.mean(np.subtract(a, b)), "low": low, "high": high}


# ---- what a run leaves --------------------------------------------------------------------------


def test_results_are_all_there_and_their_statistics_are_right(finished):
    got = results(finished.out)
    head = ["dataset", "task", "metric", "seed", "arguments"]
    assert list(got) == [*head, "folds", "mean", "stderr", "less_task", "less_visual"]
    assert [got[key] for key in head[:4]] == ["features", "classification", "accuracy", 0]
    assert got["arguments"]["epochs_joint"] == 2 and "out" not in got["arguments"]
    for number, report in enumerate(got["folds"]):
        assert set(report) >= {"seed", "fold", *TEACHERS, "students", "teacher_picks"}
        assert (report["seed"], report["fold"]) == (0, number)
        assert list(report["students"]) == METHODS
        assert sum(report["teacher_picks"].values()) == pytest.approx(1)
    students = {m: [report["students"][m] for report in got["folds"]] for m in METHODS}
    columns = {name: [report[name] for report in got["folds"]] for name in TEACHERS}
    for part, statistic in (("mean", np.mean), ("stderr", lambda x: np.std(x, ddof=1) / 3**0.5)):
        for want, have in ((columns, got[part]), (students, got[part]["students"])):
            assert all(have[name] == pytest.approx(statistic(want[name])) for name in want)
    for other in ("task", "visual"):
        assert list(got[f"less_{other}"]) == [m for m in METHODS if m != other]
        for method, gap in got[f"less_{other}"].items():
            want = interval(students[method], students[other])
            assert gap == pytest.approx(want, nan_ok=True) or np.isnan(want["low"])


def test_history_has_a_row_a_network_and_epoch_and_losses_add_up(finished):
    rows = history(finished.out)
    names = [f"teachers_{name}" for name in ("visual", "privileged", "joint", "tnet")] + ["align"]
    names += [f"student_{method}" for method in METHODS]
    want = [(str(f), name, str(epoch)) for f in range(3) for name in names for epoch in (1, 2)]
    assert [(row["fold"], row["model"], row["epoch"]) for row in rows] == want
    known = [float(v) for row in rows for k, v in row.items() if v and k not in ("stage", "model")]
    assert np.isfinite(known).all() and all(row["loss"] and row["score"] for row in rows)
    weights = {"mtpkdot": {"task": 0.8, "ot": 1, "centroid": 0.02}, "pkdot": {"task": 1, "ot": 1.25}}
    weights.update({name: {"task": 1, name: 1} for name in ("mse", "cosine", "rkd")})
    for row in rows:
        terms = weights.get(row["model"].removeprefix("student_"), {})
        total = sum(weight * float(row[term]) for term, weight in terms.items())
        assert not terms or float(row["loss"]) == pytest.approx(total, abs=1e-5)


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
        assert line.count("[") == (1 if method in ("task", "visual") else 2)  # intervals


def test_regression_on_one_split_with_and_without_pictures(tmp_path, capsys, monkeypatch):
    split = np.where(np.arange(96) < 64, "train", "val")
    path, out = two_view(tmp_path / "d.npz", regression=True, split=split), tmp_path / "out"
    base = ["--dataset", "features", "--data", path, "--out", out, "--method", "task"]
    printed = run(capsys, *base)  # one fold, one student: no standard error, nothing to compare
    line, got, data = line_of(printed, "student:? ", "task"), results(out), np.load(path)
    assert "±" not in line and "[" not in line and got["stderr"]["joint"]["mean"] is None
    column = got["mean"]["students"]["task"]
    assert column["mean"] == pytest.approx((column["valence"] + column["arousal"]) / 2)
    x, y = predict(load(out / "fold0/student_task.pt"), data["visual"][64:]), data["label"][64:, 0]
    x = x.double().numpy()[:, 0]
    ccc = 2 * np.cov(x, y, ddof=0)[0, 1] / (x.var() + y.var() + (x.mean() - y.mean()) ** 2)
    assert got["task"] == "regression" and column["valence"] == pytest.approx(ccc, abs=1e-5)

    assert printed.count("No pictures") == 1 and not list(out.glob("*.png"))
    monkeypatch.delitem(sys.modules, "matplotlib")
    pytest.importorskip("matplotlib")
    assert "No pictures" not in run(capsys, *base)
    for name in ("history", "similarity"):
        assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


# ---- what the scores are scores of --------------------------------------------------------------


def test_scores_are_of_rows_that_nothing_was_learnt_from(finished):
    data, scored = np.load(finished.data), []
    for report in results(finished.out)["folds"]:
        fold = finished.out / f"fold{report['fold']}"
        saved, view = load(fold / "student_mtpkdot.pt"), load(fold / "teachers_visual.pt")
        scored.extend(val := saved["val"].numpy())
        trained = seen(saved)
        assert (trained == seen(view)).all()
        chose = np.setdiff1d(np.arange(96), [*val, *trained])
        assert len(chose) == 12  # 3 of 16 people
        people = [set(data["group"][rows]) for rows in (val, trained, chose)]
        assert sum(map(len, people)) == len(set.union(*people)) == 24
        assert accuracy(saved, data, val) == report["students"]["mtpkdot"]
        epochs = [row for row in saved["history"] if row["model"] == "student_mtpkdot"]
        assert accuracy(saved, data, chose) == max(row["score"] for row in epochs)
    assert sorted(scored) == list(range(96))


def test_rows_that_choose_and_rows_that_score_leave_no_trace_in_the_weights(tmp_path, capsys):
    base = ["--dataset", "features", "--folds", 3, "--fold", 0, "--method", "mtpkdot", "--epochs", 1]
    run(capsys, *base, "--data", two_view(tmp_path / "d.npz"), "--out", tmp_path / "one")
    one, data = load(tmp_path / "one/fold0/student_mtpkdot.pt"), dict(np.load(tmp_path / "d.npz"))
    others = np.setdiff1d(np.arange(96), seen(one))
    for key in ("visual", "privileged"):
        data[key][others] = 0.1 + data[key][others][::-1]
    data["label"][others] = data["label"][others][::-1]
    np.savez(tmp_path / "other.npz", **data)
    run(capsys, *base, "--data", tmp_path / "other.npz", "--out", tmp_path / "two")
    two = load(tmp_path / "two/fold0/student_mtpkdot.pt")
    assert all(torch.equal(one["weights"][key], two["weights"][key]) for key in one["weights"])
    assert one["scores"] != two["scores"] or one["history"] != two["history"]


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
    base = [*finished.argv, "--epochs", 1, "--out", tmp_path, "--method", "task,visual", "--seeds", 3]
    run(capsys, *base)
    got, alone = results(tmp_path), [results(tmp_path / f"seed{seed}") for seed in range(3)]
    assert [(r["seed"], r["fold"]) for r in got["folds"]] == [(s, f) for s in range(3) for f in range(3)]
    assert got["folds"] == sum((one["folds"] for one in alone), [])
    joint = [one["mean"]["joint"] for one in alone]
    assert len(set(joint)) > 1 and got["stderr"]["joint"] == pytest.approx(stats.sem(joint))
    task, visual = ([one["mean"]["students"][m] for one in alone] for m in ("task", "visual"))
    assert got["less_visual"]["task"] == pytest.approx(interval(task, visual), nan_ok=True)


# ---- what the options do ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["frozen", "finetune", "scratch"])
def test_student_backbone(kind, finished, tmp_path, capsys):
    base = [*finished.argv, "--out", tmp_path, "--fold", 0, "--method", "task,visual"]
    run(capsys, *base, "--student-backbone", kind)
    first = load(tmp_path / "fold0/teachers_visual.pt")["weights"]
    tnet = models.TNet(8)
    tnet.load_state_dict(load(tmp_path / "fold0/teachers_tnet.pt")["weights"])
    for method in ("task", "visual"):
        weights = load(tmp_path / f"fold0/student_{method}.pt")["weights"]
        moved = max(
            (weights[name] - first[name]).abs().max().item() for name in first if "layers" in name
        )
        if kind == "frozen" and method == "task":
            assert moved == 0
        else:  # four updates of a rate of 1e-3 at most
            assert 0 < moved and (moved < 5e-3) == (kind != "scratch")
        assert torch.equal(weights["encoder.mean"], first["encoder.mean"])
        if method == "task":
            torch.testing.assert_close(weights["tnet.weight"], tnet.composed().weight)


def test_every_network_trains_for_as_many_updates(finished, tmp_path, capsys, monkeypatch):
    steps, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *a: steps.append(1) or step(*a))
    argv = ["--dataset", "features", "--data", finished.data, "--folds", 3, "--fold", 0, "--dim", 8]
    for name in ("backbone", "joint", "tnet", "align", "student", "pkdot"):
        argv += [f"--epochs-{name}", 1]
    monkeypatch.setattr(sys.modules[__name__], "SMALL", [])
    run(capsys, *argv, "--batch-size", 32, "--updates", 3, "--method", "all", "--out", tmp_path)
    epochs = [row["epoch"] for row in history(tmp_path)]
    assert epochs == ["1", "2"] * 17 and len(steps) == 17 * 4  # two batches an epoch


def test_train_rows_and_the_protocol_of_the_paper(finished, tmp_path, capsys):
    base = [*finished.argv, "--out", tmp_path, "--method", "task", "--select", "val", "--train-rows"]
    assert "--train-rows" in run(capsys, *base, 65)
    run(capsys, *base, 30)
    for fold in range(3):
        saved = load(tmp_path / f"fold{fold}/student_task.pt")
        assert len(seen(saved)) == 30 and not set(seen(saved)) & set(saved["val"].tolist())
        best = max(row["score"] for row in saved["history"])
        assert best == results(tmp_path)["folds"][fold]["students"]["task"]


def test_preset_is_the_released_code_and_what_is_given_goes_first():
    got = vars(train.options(["--preset", "released", "--device", "cpu", "--w-ot", "3"]))
    names = ["lr_student", "epochs_student", "lr_pkdot", "epochs_pkdot", "lr_adapter", "lr_fusion"]
    assert [got[name] for name in names] == [5e-4, 10, 1e-4, 20, 5e-3, 1e-4]
    names = ["lr_tnet", "epochs_align", "w_align", "w_head", "w_task", "w_centroid", "w_pkdot_ot"]
    assert [got[name] for name in names] == [5e-5, 10, 0.5, 0.5, 0.8, 0.2, 0.6]
    names = ["anchors", "shift", "student_backbone", "eps", "k", "dim", "folds_by", "select"]
    assert [got[name] for name in names] == ["least", "min", "frozen", 0.01, 30, 512, "clip", "val"]
    assert (got["updates"], got["lr_decay"], got["w_ot"]) == (0, "none", 3)


MISTAKES = [
    ("--dataset imagenet", "--dataset"),
    ("--data .", "."),
    ("--data nowhere.npz", "nowhere.npz"),
    ("--dataset affwild2 --data nowhere", "nowhere"),
    ("--fold 3", "--fold"),
    ("--folds 25", "25"),  # there are 24 people
    ("--method mtpkdot,nothing", "nothing"),
    ("--seed 99999999999999999999", "--seed"),
    ("--batch-size 1", "--batch-size"),
    ("--dim 15", "--dim"),
    ("--eps 0", "--eps"),
    ("--w-ot -1", "--w-ot"),
    ("--lr-student nan", "--lr-student"),
    ("--lr-joint 1e30", "joint"),
    ("--visual-weights r3d_18.pth", "--visual-weights"),
    ("--stage eval", "--student"),
    ("--out /proc/nowhere", "/proc/nowhere"),
    ("--bogus", "--bogus"),
]


@pytest.mark.parametrize("argv, word", MISTAKES)
def test_a_mistake_gets_one_line(argv, word, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = [*finished.argv, "--out", "out", *argv.split()]
    assert word in run(capsys, *base)


# ---- a student on new data ----------------------------------------------------------------------


def test_eval(finished, tmp_path, capsys):
    data, new, csv_file = dict(np.load(finished.data)), tmp_path / "new.npz", tmp_path / "p.csv"
    path = finished.out / "fold1/student_mtpkdot.pt"
    base, saved = ["--stage", "eval", "--student", path, "--data"], load(path)
    score = results(finished.out)["folds"][1]["students"]["mtpkdot"]
    printed = run(capsys, *base, finished.data, "--predictions", csv_file)
    assert "32 validation rows" in printed and f"{100 * score:.1f}" in printed
    assert [int(row["name"]) for row in csv.DictReader(csv_file.open())] == saved["val"].tolist()

    rows = np.arange(0, 60, 3)  # of one class only
    np.savez(new, visual=data["visual"][rows], label=data["label"][rows])
    assert f"{100 * accuracy(saved, data, rows):.1f}," in run(capsys, *base, new)
    np.savez(new, visual=data["visual"][rows], label=data["label"][rows] + 5)
    assert "9" in run(capsys, *base, new).split("[4, 5, 6]")[1]
    np.savez(new, visual=data["visual"][rows], label=np.ones((20, 2)))
    assert "regression" in run(capsys, *base, new)
    np.savez(new, visual=data["visual"][rows, :7], label=data["label"][rows])
    assert "shape" in run(capsys, *base, new)

    np.savez(new, visual=data["visual"][rows])  # without labels
    assert "label" in run(capsys, *base, new)
    assert "Score" not in run(capsys, *base, new, "--predictions", csv_file)
    want = predict(saved, data["visual"][rows])
    header, *lines = list(csv.reader(csv_file.open()))
    assert header == ["name", "prediction", "p_4", "p_5", "p_6"]
    assert [line[0] for line in lines] == [str(i) for i in range(20)]
    assert [int(line[1]) - 4 for line in lines] == want.argmax(1).tolist()
    got = np.array([line[2:] for line in lines], dtype=float)
    np.testing.assert_allclose(got, want.softmax(1), atol=1e-6)
    os.mkfifo(tmp_path / "pipe")
    piped = []
    reader = threading.Thread(target=lambda: piped.append((tmp_path / "pipe").read_text()))
    reader.start()
    run(capsys, *base, new, "--predictions", tmp_path / "pipe")
    reader.join()
    assert piped == [csv_file.read_text()]
    assert csv_file.read_text() in go(*base, new, "--predictions", "/dev/stdout", stdout=True).said


@pytest.mark.filterwarnings("ignore:.*faceless")
def test_raw_data_from_files_to_predictions(tmp_path, capsys):
    pytest.importorskip("PIL")
    from test_raw import affwild2_tree, biovid_tree

    tree = affwild2_tree(tmp_path / "affwild2")
    base = ["--data", tree, *RAW, "--workers", 1]
    printed = run(capsys, "--dataset", "affwild2", *base, "--out", tmp_path / "run")
    assert "CCC of valence/arousal" in printed and len(results(tmp_path / "run")["folds"]) == 1
    for folder in ("annotations", "audio", "cropped_aligned/9_right"):
        shutil.rmtree(tree / folder)
    student = tmp_path / "run/fold0/student_mtpkdot.pt"
    evaluate = ["--stage", "eval", "--predictions", tmp_path / "p.csv", "--student", student]
    run(capsys, *evaluate, *base)
    lines = list(csv.reader((tmp_path / "p.csv").open()))
    assert lines[0] == ["name", "valence", "arousal"]
    assert lines[1][0] == "1-30-1280x720/00001" and lines[-1][0] == "été.v2/00025"
    assert len(lines) == 1 + 5 * 3 and np.isfinite(np.array(lines[1:])[:, 1:].astype(float)).all()

    tree = biovid_tree(tmp_path / "biovid", people=4, clips=1, levels=("BL1", "PA1"))
    base = ["--data", tree, *RAW, "--workers", 0, "--levels", "BL1,PA1"]
    run(capsys, "--dataset", "biovid", *base, "--folds", 2, "--fold", 1, "--out", tmp_path / "pain")
    shutil.rmtree(tree / "biosignals_filtered")
    evaluate[-1] = tmp_path / "pain/fold1/student_mtpkdot.pt"
    run(capsys, *evaluate, *base[:-2])  # the levels are the student's
    lines = list(csv.reader((tmp_path / "p.csv").open()))
    names = [path.name for path in sorted((tree / "frames").glob("*/*"))]
    assert lines[0] == ["name", "prediction", "p_BL1", "p_PA1"]
    assert [line[0] for line in lines[1:]] == [names[i] for i in load(evaluate[-1])["val"]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_three_stages_on_cuda(finished, tmp_path, capsys):
    run(capsys, *finished.argv, "--device", "cuda", "--method", "all", "--out", tmp_path)
    got, want = results(tmp_path)["mean"], results(finished.out)["mean"]
    assert list(got["students"]) == METHODS and abs(got["joint"] - want["joint"]) < 0.15
