"""train.py from end to end, small: files, scores, eval, mistakes."""

import csv
import json
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import subprocess
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
from scipy.spatial.distance import cdist

import models
import train

SMALL = ["--dim", 8, "--batch-size", 32, "--updates", 3, "--device", "cpu"]  # two epochs
for name in ("backbone", "joint", "align", "student"):
    SMALL += [f"--epochs-{name}", 1]
RAW = ["--epochs", 1, "--dim", 16, "--width", 2, "--clip-stride", 12]
TEACHERS = "visual privileged joint joint_aligned adapted_visual adapted_privileged".split()
METHODS = """mtpkdot mtpkdot-unaligned mtpkdot-no-centroid mtpkdot-joint mtpkdot-visual
mtpkdot-privileged pkdot mse cosine rkd kd task visual""".split()


def as_script(argv, folder, said, limit):
    for stream in (1, 2):
        os.dup2(os.open(f"{said}/{stream}", os.O_WRONLY | os.O_APPEND), stream)
    os.chdir(folder)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # as it is in a process from a shell
    sys.argv = ["train.py", *argv]
    runpy.run_path(train.__file__, run_name="__main__")


CONTEXT, LOCK = multiprocessing.get_context("forkserver"), threading.Lock()
CONTEXT.set_forkserver_preload(["torch._dynamo", "matplotlib.backends.backend_agg", __name__])


def go(*argv, folder=".", send=9, after=60, limit=None):
    """train.py as a script, in a fork of a process that has imported torch. After so many seconds
    it gets the signal `send`. It can write no file of more than `limit` bytes."""
    with tempfile.TemporaryDirectory() as said:
        for name in "12":  # a process may be killed before it says anything
            Path(said, name).touch()
        job = ([str(a) for a in argv], str(folder), said, limit)
        process, start = CONTEXT.Process(target=as_script, args=job), time.monotonic()
        with LOCK:
            process.start()
        if not connection.wait([process.sentinel], after):
            try:
                os.kill(process.pid, send)
            except ProcessLookupError:  # it has just ended
                pass
        connection.wait([process.sentinel])
        with LOCK:
            process.join()
        seconds = time.monotonic() - start
        out, err = (Path(said, name).read_text(errors="replace") for name in "12")
    return Namespace(code=process.exitcode, out=out, err=err, seconds=seconds)


def one_line(done, code=2):
    assert done.code == code and re.fullmatch("train.py: .*\n", done.err), done
    return done.err


def run(*argv, **how):
    """What train.py prints, or, of a mistake, its one line."""
    done = go(*SMALL, *argv, **how)
    return one_line(done) if done.code else done.out


def two_view(path, n=96, regression=False, **more):
    """Two noisy views of a class, 4 to 6, or of two values. The visual view has a column for each
    row, 1 there alone: the means of these columns tell which rows a network has seen."""
    rng = np.random.default_rng(0)
    label = rng.uniform(-1, 1, (n, 2)) if regression else np.arange(n) % 3 + 4
    mean = label @ rng.normal(size=(2, 6)) if regression else 2 * rng.normal(size=(3, 6))[label - 4]
    visual = np.hstack([mean + rng.normal(size=(n, 6)), np.eye(n)])
    views = {"visual": visual, "privileged": mean + 0.3 * rng.normal(size=(n, 6))}
    np.savez(path, label=label, group=np.arange(n) // 4, **views, **more)
    return path


def results(folder):
    return json.loads((folder / "results.json").read_text())


def table(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def load(path):
    return torch.load(path, weights_only=True)


def seen(saved):
    return np.flatnonzero(saved["weights"]["encoder.mean"][6:] > 0)


def predict(saved, visual):
    return models.load_student(saved)(torch.tensor(visual, dtype=torch.float32))[1]


def accuracy(saved, data, rows):
    chosen = predict(saved, data["visual"][rows]).argmax(1).numpy() + 4
    return (chosen == data["label"][rows]).mean()


def scores(report):
    students = {f"student {method}": score for method, score in report["students"].items()}
    return {**{name: report[name] for name in TEACHERS}, **students}


def assert_statistics(got, units):
    """Means, standard errors and paired differences are over these units, folds or seeds."""
    values = {name: [unit[name] for unit in units] for name in units[0]}
    for part, statistic in (("mean", np.mean), ("stderr", stats.sem)):
        want = {name: statistic(column) for name, column in values.items()}
        assert scores(got[part]) == pytest.approx(want)
    for other in ("task", "visual"):
        methods = [m for m in got["mean"]["students"] if m != other]
        assert list(got[f"less_{other}"]) == methods
        for method, gap in got[f"less_{other}"].items():
            a, b = values[f"student {method}"], values[f"student {other}"]
            if np.ptp(np.subtract(a, b)) > 1e-9:  # scipy has no interval for equal differences
                low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
                want = {"mean": np.mean(a) - np.mean(b), "low": low, "high": high}
                assert gap == pytest.approx(want)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """All methods on three folds."""
    folder = tmp_path_factory.mktemp("finished")
    argv = ["--dataset", "features", "--data", two_view(folder / "data.npz"), "--folds", 3]
    printed = run(*argv, "--method", "all", "--out", folder)
    return Namespace(data=folder / "data.npz", out=folder, argv=argv, printed=printed)


def test_results_their_statistics_and_the_table(finished):
    got, head = results(finished.out), ["dataset", "task", "metric", "seed"]
    parts = ["arguments", "folds", "mean", "stderr", "less_task", "less_visual"]
    assert list(got) == head + parts and list(got["mean"]["students"]) == METHODS
    assert [got[key] for key in head] == ["features", "classification", "accuracy", 0]
    assert [(report["seed"], report["fold"]) for report in got["folds"]] == [(0, 0), (0, 1), (0, 2)]
    for report in (*got["folds"], got["mean"]):
        assert sum(report["teacher_picks"].values()) == pytest.approx(1)
    assert_statistics(got, [scores(report) for report in got["folds"]])
    for name, mean in scores(got["mean"]).items():
        line = re.search(rf"^{name.replace('_', ' ')}  +(.*)", finished.printed, re.MULTILINE)[1]
        assert line.startswith(f"{100 * mean:.1f} ±")
        one_less = name in ("student task", "student visual")
        assert line.count("[") == (2 - one_less) * name.startswith("student ")


def test_history_of_each_network_and_losses_that_add_up(finished):
    rows = table(finished.out / "history.csv")
    names = "teachers_visual teachers_privileged teachers_joint teachers_tnet align".split()
    names += [f"student_{method}" for method in METHODS]
    want = [(str(f), name, str(epoch)) for f in range(3) for name in names for epoch in (1, 2)]
    assert [(row["fold"], row["model"], row["epoch"]) for row in rows] == want
    weights = {name: {"task": 1, name: 1} for name in ("mse", "cosine", "rkd", "kd")}
    weights["mtpkdot"] = {"task": 0.8, "ot": 0.2, "centroid": 0.02}
    weights["pkdot"] = {"task": 1, "ot": 0.6}
    for row in rows:
        terms = weights.get(row["model"].removeprefix("student_"), {"loss": 1})
        total = sum(weight * float(row[term]) for term, weight in terms.items())
        assert float(row["loss"]) == pytest.approx(total, abs=1e-5)
        assert np.isfinite(float(row["score"]))


def test_pictures_of_every_network(finished, monkeypatch, capsys):
    data, saved = np.load(finished.data), load(finished.out / "fold0/student_mtpkdot.pt")
    rows = sorted(saved["val"].tolist(), key=lambda row: data["label"][row])
    z = models.load_student(saved)(torch.tensor(data["visual"][rows], dtype=torch.float32))[0]
    shown = saved["shown"]["student mtpkdot"]
    np.testing.assert_allclose(shown, 1 - cdist(z, z, "cosine"), atol=1e-5)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    train.draw("s.png", saved["shown"])
    assert capsys.readouterr().out.startswith("No s.png without matplotlib")
    pytest.importorskip("matplotlib")
    for name, count in (("history", 18), ("similarity", 20)):
        picture = pytest.importorskip("PIL.Image").open(finished.out / f"{name}.png")
        panels = np.asarray(picture).reshape(4, 300, 5, 1200)
        assert (np.ptp(panels, axis=(1, 3)) > 0).sum() == count


def test_regression_on_one_split(tmp_path):
    split = np.where(np.arange(96) < 64, "train", "val")
    path = two_view(tmp_path / "d.npz", regression=True, split=split)
    argv = ["--dataset", "features", "--data", path, "--method", "task", "--out"]
    printed = run(*argv, tmp_path)  # one fold, one student: no standard error, nothing to compare
    line, got = printed.split("\nstudent task")[1], results(tmp_path)
    assert "±" not in line and "[" not in line and got["stderr"]["joint"]["mean"] is None
    column = got["mean"]["students"]["task"]
    assert column["mean"] == pytest.approx((column["valence"] + column["arousal"]) / 2)
    assert got["metric"] == "ccc" and f"{column['valence']:.3f}/{column['arousal']:.3f}" in line


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


def test_stage_2_keeps_its_last_epoch(finished, tmp_path):
    argv = [*finished.argv, "--fold", 2, "--stage", "align", "--select", "val", "--out", tmp_path]
    run(*argv, "--epochs-align", 6, "--lr-adapter", 0.03)
    align = load(tmp_path / "fold2/align.pt")
    history, kept = [row["score"] for row in align["history"]], list(align["scores"].values())
    assert np.mean(kept) == pytest.approx(history[-1]) and history[-1] < max(history)


def test_rows_not_trained_on_leave_no_trace_in_the_weights(finished, tmp_path):
    argv = [*finished.argv, "--fold", 0, "--method", "mtpkdot", "--epochs", 1, "--out"]
    run(*argv, tmp_path / "one")
    one, data = load(tmp_path / "one/fold0/student_mtpkdot.pt"), dict(np.load(finished.data))
    others = np.setdiff1d(np.arange(96), seen(one))
    for key in ("visual", "privileged", "label"):
        data[key][others] = data[key][others][::-1]
    np.savez(tmp_path / "other.npz", **data)
    run(*argv, tmp_path / "two", "--data", tmp_path / "other.npz")
    two = load(tmp_path / "two/fold0/student_mtpkdot.pt")
    assert all(torch.equal(one["weights"][key], two["weights"][key]) for key in one["weights"])


def test_stages_one_by_one_give_the_same(finished, tmp_path):
    argv = [*finished.argv, "--out", tmp_path, "--stage"]
    for stage, files in (("teachers", 5), ("align", 6)):
        run(*argv, stage)
        assert [len(list(tmp_path.glob(f"fold{i}/*"))) for i in range(3)] == 3 * [files]
    for method in ("pkdot", "mtpkdot"):
        for fold in (2, 0, 1):
            run(*argv, "student", "--method", method, "--fold", fold)
    whole, pieces = results(finished.out), results(tmp_path)
    for report in (*whole["folds"], whole["mean"], whole["stderr"]):
        report["students"] = {m: report["students"][m] for m in ("mtpkdot", "pkdot")}
    assert all(whole[part] == pieces[part] for part in ("folds", "mean", "stderr"))


def test_several_seeds(finished, tmp_path):
    run(*finished.argv, "--out", tmp_path, "--method", "task,visual", "--seeds", 3, "--epochs", 1)
    got, files = results(tmp_path), sorted(tmp_path.glob("seed*/fold*/student_task.pt"))
    want = [(seed, fold) for seed in range(3) for fold in range(3)]
    assert [(report["seed"], report["fold"]) for report in got["folds"]] == want
    folds, saved = [scores(report) for report in got["folds"]], [load(file) for file in files]
    assert [fold["student task"] for fold in folds] == [file["scores"]["task"] for file in saved]
    seeds = [
        {name: np.mean([report[name] for report in folds[i : i + 3]]) for name in folds[0]}
        for i in (0, 3, 6)
    ]
    assert len({seed["joint"] for seed in seeds}) > 1
    assert_statistics(got, seeds)


def test_the_teacher_with_the_least_loss_is_picked(finished, tmp_path):
    folder = shutil.copytree(finished.out / "fold0", tmp_path / "fold0")
    trained = seen(load(folder / "student_mtpkdot.pt"))
    for path in folder.glob("student_*"):
        path.unlink()
    # The adapted visual teacher is right about the rows that students train on, and no others.
    right = (np.load(finished.data)["label"] - 4 + ~np.isin(np.arange(96), trained)) % 3
    align, embeddings = (load(folder / f"{name}.pt") for name in ("align", "teachers_embeddings"))
    for layer in ("adapters.visual.0", "adapters.visual.1", "heads.visual"):
        torch.nn.init.eye_(align["weights"][f"{layer}.weight"])
        align["weights"][f"{layer}.bias"].zero_()
    embeddings["z"][:, 0, :3] = 20 * torch.eye(3)[right]
    torch.save(align, folder / "align.pt")
    torch.save(embeddings, folder / "teachers_embeddings.pt")
    run(*finished.argv, "--fold", 0, "--method", "mtpkdot", "--out", tmp_path)
    assert results(tmp_path)["mean"]["teacher_picks"]["adapted_visual"] == pytest.approx(1)


def test_two_processes_of_torchrun_learn_what_one_learns(finished, tmp_path):
    """Without dropout, of which each has its own."""
    argv = [*SMALL, *finished.argv, "--fold", 0, "--dropout", 0, "--dropout-student", 0]
    argv += ["--method", "mtpkdot,visual", "--epochs", 3, "--out"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [str(word) for word in (*torchrun, train.__file__, *argv, tmp_path / "2")]
    two, one = subprocess.run(command, capture_output=True, text=True), go(*argv, tmp_path / "1")
    assert two.returncode == 0 and two.stdout.count("\n") == one.out.count("\n"), two
    one, two = (np.genfromtxt(tmp_path / n / "history.csv", delimiter=",") for n in "12")
    np.testing.assert_allclose(two, one, rtol=1e-3, atol=1e-4)


def test_each_method_and_option_of_its_loss_counts(finished, tmp_path):
    rows = [row for row in table(finished.out / "history.csv") if row["fold"] == "2"]
    losses = [row["loss"] for row in rows if row["epoch"] == "1"]  # several teachers
    for option in ("--k 2", "--k 2 --anchors least", "--shift min", "--eps 1", "--ot entropic"):
        out, without = tmp_path / option, shutil.ignore_patterns("student*")
        shutil.copytree(finished.out / "fold2", out / "fold2", ignore=without)
        run(*finished.argv, "--fold", 2, "--method", "mtpkdot", "--out", out, *option.split())
        losses.append(table(out / "history.csv")[-2]["loss"])
    assert len(set(losses)) == len(losses)


@pytest.mark.parametrize("kind", ["frozen", "finetune"])
def test_student_backbone_train_rows_and_the_papers_protocol(kind, finished, tmp_path):
    argv = [*finished.argv, "--out", tmp_path, "--fold", 0, "--method", "task", "--select", "val"]
    assert "--train-rows" in run(*argv, "--train-rows", 65)
    run(*argv, "--train-rows", 30, "--student-backbone", kind)
    files = [tmp_path / f"fold0/{name}.pt" for name in ("teachers_visual", "student_task")]
    (first, student), saved = (load(file)["weights"] for file in files), load(files[1])
    tnet = load(tmp_path / "fold0/teachers_tnet.pt")["weights"]
    assert all(student[f"tnet.{name}"].equal(t) for name, t in tnet.items())
    moved = max((student[k] - first[k]).abs().max().item() for k in first if "layers" in k)
    assert (moved == 0) == (kind == "frozen")
    assert moved < 5e-3  # four updates of a rate of 1e-3 at most
    assert len(seen(saved)) == 30 and not set(seen(saved)) & set(saved["val"].tolist())
    assert saved["scores"]["task"] == max(row["score"] for row in saved["history"])


def test_preset_is_the_released_code_and_what_is_given_goes_first():
    got = vars(train.options(["--preset", "released", "--w-ot", "3"]))
    want = {"lr_student": 5e-4, "dropout_student": 0, "lr_adapter": 5e-3, "lr_tnet": 5e-5}
    want |= {"epochs_align": 10, "dim": 512, "k": 30, "eps": 0.01, "select": "val", "w_ot": 3}
    want |= {"anchors": "least", "shift": "min", "student_backbone": "frozen", "w_centroid": 0.2}
    assert {name: got[name] for name in want} == want


MISTAKES = """--data nowhere.npz; --dataset imagenet; --fold 3; --folds 25; --method mtpkdot,nothing
--seed 99999999999999999999; --batch-size 1; --dim 15; --eps 0; --w-ot -1; --lr-student nan
--bogus x; --lr-joint 1e30; --lr-tnet 300; --visual-weights r3d_18.pth
--out /proc/nowhere; --stage eval; --predictions p.csv"""


@pytest.mark.parametrize("mistake", re.split("; |\n", MISTAKES))
def test_a_mistake_gets_one_line(mistake, finished, tmp_path):
    option, value = mistake.split()
    said = one_line(go(*SMALL, *finished.argv, option, value, folder=tmp_path))
    assert any(word in said for word in (option, value, "lower an --lr"))


def test_eval(finished, tmp_path):
    data, new, csv_file = np.load(finished.data), tmp_path / "new.npz", tmp_path / "p.csv"
    for method in ("visual", "mtpkdot"):  # on its own data
        student = finished.out / f"fold1/student_{method}.pt"
        score, saved = results(finished.out)["folds"][1]["students"][method], load(student)
        argv = ["--stage", "eval", "--student", student, "--data", finished.data]
        assert f" {100 * score:.1f}," in run(*argv)
        run(*argv, "--predictions", csv_file)
        assert [int(row["name"]) for row in table(csv_file)] == saved["val"].tolist()

    rows = np.arange(20)
    visual, label = data["visual"][rows], data["label"][rows]
    argv = ["--stage", "eval", "--student", student, "--data", new]
    for word, x, y in (
        (f" {100 * accuracy(saved, data, rows):.1f},", visual, label),
        ("9, 10, 11", visual, label + 5),
        ("[102], not [7]", visual[:, :7], label),
    ):
        np.savez(new, visual=x, label=y)
        assert word in run(*argv)

    np.savez(new, visual=visual)  # without labels
    assert "label" in run(*argv)
    assert "Score" not in run(*argv, "--predictions", csv_file)
    assert list(table(csv_file)[0]) == ["name", "4", "5", "6"]
    got = np.loadtxt(csv_file, delimiter=",", skiprows=1)
    assert got[:, 0].tolist() == list(range(20))
    np.testing.assert_allclose(got[:, 1:], predict(saved, visual).softmax(1), atol=1e-6)


@pytest.mark.parametrize("dataset", ["affwild2", "biovid"])
def test_raw_data_from_files_to_predictions(dataset, tmp_path):
    pytest.importorskip("PIL")
    import test_raw

    tree, student = tmp_path / "tree", tmp_path / "fold0/student_mtpkdot.pt"
    if dataset == "affwild2":
        test_raw.affwild2_tree(tree)
        more = ["--workers", 1]
    else:
        test_raw.biovid_tree(tree, people=4, clips=1)
        more = ["--folds", 2, "--fold", 0, "--workers", 0]
    run("--dataset", dataset, *RAW, "--data", tree, *more, "--out", tmp_path)
    for folder in ("annotations", "audio", "biosignals_filtered", "cropped_aligned/9_right"):
        shutil.rmtree(tree / folder, ignore_errors=True)  # frames of faces are enough
    argv = ["--stage", "eval", "--student", student, "--predictions", tmp_path / "p.csv"]
    run(*argv, *RAW, "--data", tree)
    rows = table(tmp_path / "p.csv")
    if dataset == "affwild2":
        assert rows[0]["name"] == "1-30-1280x720/00001" and rows[-1]["name"] == "été.v2/00025"
        assert len(rows) == 5 * 3 and all(abs(float(row["valence"])) < 99 for row in rows)
        broken = tree / "cropped_aligned/3_left/00001.jpg"
        broken.write_bytes(broken.read_bytes()[:300])
        assert f"{broken}: not a JPEG" in run(*argv, *RAW, "--data", tree, "--workers", 1)
    else:
        assert all(float(row["BL1"]) + float(row["PA4"]) == pytest.approx(1) for row in rows)
        assert [row["name"] for row in rows] == sorted(p.name for p in tree.glob("frames/*/*"))


