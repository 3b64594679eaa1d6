"""The training script end to end, at a small size: files, schema, stages one by one, honesty of the scores."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import train
from models import Encoder, Fusion, ResNet18, Student, TNet

sys.modules["matplotlib"] = None  # for time: one test, in test_resume.py, draws
SMALL = ["--dim", "16", "--epochs", "2", "--device", "cpu"]
VARIANTS = ["mtpkdot-unaligned", "mtpkdot-no-centroid", "mtpkdot-joint", "mtpkdot-visual", "mtpkdot-privileged"]
METHODS = ["mtpkdot", *VARIANTS, "pkdot", "mse", "cosine", "rkd", "task", "visual"]


def run(capsys, *argv):
    """Output of `train.py argv`; for a mistake, its one line on stderr."""
    capsys.readouterr()
    try:
        train.main([str(a) for a in (*argv, *SMALL)])
    except SystemExit as stop:
        error = capsys.readouterr().err
        assert stop.code == 2 and error.startswith("train.py: ") and error.count("\n") == 1, error
        return error
    return capsys.readouterr().out


def two_view(path, n=120, regression=False, **more):
    """Two noisy views of a class (or of two values)."""
    rng = np.random.default_rng(0)
    label = rng.uniform(-1, 1, (n, 2)) if regression else np.arange(n) % 3 + 4
    mean = label @ rng.normal(size=(2, 6)) if regression else rng.normal(size=(3, 6))[label - 4]
    views = {"visual": mean + rng.normal(size=(n, 6)), "privileged": mean + 0.3 * rng.normal(size=(n, 6))}
    np.savez(path, label=label, **{k: v for k, v in {**views, **more}.items() if v is not None})
    return path


@pytest.fixture(scope="module")
def digits_like(tmp_path_factory):
    """A finished run of everything on three folds: (data file, run folder)."""
    folder = tmp_path_factory.mktemp("run")
    data = two_view(folder / "data.npz")
    train.main([str(a) for a in (*arguments((data,), folder / "out"), "--method", "all", *SMALL)])
    return data, folder / "out"


def arguments(digits_like, out):
    return ["--dataset", "features", "--data", digits_like[0], "--folds", 3, "--out", out]


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_results_have_the_promised_schema(digits_like):
    got = results(digits_like[1])
    keys = ["dataset", "task", "metric", "seed", "arguments", "folds", "mean", "stderr", "less_task", "less_visual"]
    assert list(got) == keys
    assert (got["dataset"], got["task"], got["metric"], got["seed"]) == ("features", "classification", "accuracy", 0)
    teachers = ["visual", "privileged", "joint", "joint_aligned", "adapted_visual", "adapted_privileged"]
    assert [report["fold"] for report in got["folds"]] == [0, 1, 2]
    for report in got["folds"]:
        assert list(report) == ["fold", *teachers, "students", "teacher_picks"]
        assert list(report["students"]) == METHODS
        assert all(0 <= s["last"] <= s["best"] <= 1 for s in report["students"].values())
        assert sum(report["teacher_picks"].values()) == 2  # one batch an epoch, two epochs
    for name in teachers:
        values = [report[name] for report in got["folds"]]
        assert abs(got["mean"][name] - np.mean(values)) < 1e-12
        assert abs(got["stderr"][name] - np.std(values, ddof=1) / np.sqrt(3)) < 1e-12
    assert set(got["mean"]["students"]["pkdot"]) == {"best", "last"}


def test_history_has_a_row_a_stage_and_epoch(digits_like):
    rows = list(csv.DictReader((digits_like[1] / "history.csv").open()))
    models = [("teachers", m) for m in ("visual", "privileged", "joint", "tnet")] + [("align", "align")]
    models += [("student", m) for m in METHODS]
    want = [(str(f), s, m, str(e)) for f in range(3) for s, m in models for e in (1, 2)]
    assert [(r["fold"], r["stage"], r["model"], r["epoch"]) for r in rows] == want
    assert all(np.isfinite(float(r["loss"])) and np.isfinite(float(r["score"])) for r in rows)
    mtpkdot = [r for r in rows if r["model"] == "mtpkdot"]
    for r in mtpkdot:
        w = train.WEIGHTS
        total = sum(w[name] * float(r[name]) for name in ("task", "ot", "centroid"))
        assert abs(float(r["loss"]) - total) < 1e-5
        assert all(float(r[f"{name}_gradient"]) > 0 for name in ("task", "ot", "centroid"))


def test_scores_are_those_of_the_saved_students(digits_like):
    """Accuracy recomputed from the file of weights, by hand, on rows that were not trained on."""
    data = np.load(digits_like[0])
    held_out = []
    for report in results(digits_like[1])["folds"]:
        saved = torch.load(digits_like[1] / f"fold{report['fold']}/student_mtpkdot.pt", weights_only=True)
        net = Student(Encoder(6, 16), TNet(16), Fusion(16, 3)).eval()
        net.load_state_dict(saved["weights"])
        rows = saved["val"].numpy()
        held_out.extend(rows)
        trained_on = np.delete(data["visual"], rows, axis=0)  # the standardisation has not seen these rows either
        assert np.allclose(net.encoder.mean, trained_on.mean(0), atol=1e-5)
        assert np.allclose(net.encoder.std, trained_on.std(0), rtol=1e-5)
        prediction = net(torch.tensor(data["visual"][rows], dtype=torch.float32))[1].argmax(1).numpy() + 4
        assert (prediction == data["label"][rows]).mean() == report["students"]["mtpkdot"]["best"]
    assert sorted(held_out) == list(range(len(data["label"])))


def test_table_shows_every_row(digits_like, capsys):
    out = run(capsys, *arguments(digits_like, digits_like[1]), "--stage", "student", "--method", "task")
    assert all(label in out for label in train.LABELS.values())
    assert all(out.count(f"\n{m}  ") == 2 for m in METHODS) and "Teacher that mtpkdot picked" in out
    assert f"{100 * results(digits_like[1])['mean']['joint']:.1f}" in out


def test_same_seed_same_results_and_stages_one_by_one(digits_like, tmp_path, capsys):
    base = arguments(digits_like, tmp_path)
    for stage in ("teachers", "align"):
        run(capsys, *base, "--stage", stage)
    for method in reversed(METHODS):
        for fold in (2, 0, 1):
            run(capsys, *base, "--stage", "student", "--method", method, "--fold", fold)
    whole, pieces = results(digits_like[1]), results(tmp_path)
    for part in ("folds", "mean", "stderr"):
        assert whole[part] == pieces[part]
    assert (tmp_path / "history.csv").read_text() == (digits_like[1] / "history.csv").read_text()
    run(capsys, *arguments(digits_like, tmp_path / "again"), "--method", "all")
    again = (tmp_path / "again" / "results.json").read_text()
    run(capsys, *arguments(digits_like, tmp_path / "twice"), "--method", "all")
    assert again == (tmp_path / "twice" / "results.json").read_text()
    run(capsys, *arguments(digits_like, tmp_path / "other"), "--seed", 1)
    assert results(tmp_path / "other")["folds"] != whole["folds"]


def test_eval_needs_the_visual_view_only(digits_like, tmp_path, capsys):
    data = dict(np.load(digits_like[0]))
    np.savez(tmp_path / "faces.npz", visual=data["visual"], label=data["label"])
    before = (digits_like[1] / "results.json").read_bytes()
    out = run(capsys, "--stage", "eval", "--dataset", "features", "--data", tmp_path / "faces.npz",
              "--out", digits_like[1], "--method", "all")  # fmt: skip
    assert "validation rows of its own data" in out and (digits_like[1] / "results.json").read_bytes() == before
    scored = json.loads((digits_like[1] / "eval.json").read_text())
    for mine, theirs in zip(scored["folds"], results(digits_like[1])["folds"]):
        assert mine["students"] == {m: s["best"] for m, s in theirs["students"].items() if m != "visual"}


def test_differences_are_paired_by_fold_and_by_seed_over_its_folds(digits_like, tmp_path, capsys):
    def interval(gaps):  # scipy's own
        t = stats.ttest_1samp(gaps, 0).confidence_interval(0.95)
        return {"mean": np.mean(gaps), "low": t.low, "high": t.high}

    whole = results(digits_like[1])
    gaps = [r["students"]["mse"]["last"] - r["students"]["task"]["last"] for r in whole["folds"]]
    assert whole["less_task"]["mse"]["last"] == pytest.approx(interval(gaps))
    base = [*arguments(digits_like, tmp_path), "--method", "task"]
    run(capsys, *base, "--seeds", 3)
    run(capsys, *base[:-1], "visual", "--seeds", 3, "--stage", "student")
    got = results(tmp_path)
    alone = [results(tmp_path / f"seed{seed}") for seed in range(3)]
    assert [(r["seed"], r["fold"]) for r in got["folds"]] == [(s, f) for s in range(3) for f in range(3)]
    assert [{k: v for k, v in r.items() if k != "seed"} for r in got["folds"]] == sum((a["folds"] for a in alone), [])
    means = [a["mean"]["students"] for a in alone]
    assert got["stderr"]["joint"] == pytest.approx(stats.sem([a["mean"]["joint"] for a in alone]))
    gaps = [m["task"]["best"] - m["visual"]["best"] for m in means]
    assert got["less_visual"]["task"]["best"] == pytest.approx(interval(gaps), nan_ok=True)
    assert f"--out {tmp_path}/seed0" in run(capsys, *base, "--stage", "eval")
    assert "validation rows" in run(capsys, *arguments(digits_like, tmp_path / "seed0"), "--stage", "eval", *base[-2:])


@pytest.mark.parametrize("kind", ["frozen", "finetune", "scratch"])
def test_student_backbone(kind, digits_like, tmp_path, capsys):
    base = [*arguments(digits_like, tmp_path), "--fold", 0, "--method"]
    run(capsys, *base, "mtpkdot", "--student-backbone", kind)
    run(capsys, *base, "visual", "--student-backbone", kind, "--stage", "student")
    first, student, visual = (
        torch.load(tmp_path / "fold0" / f"{name}.pt", weights_only=True)["weights"]
        for name in ("teachers", "student_mtpkdot", "student_visual")
    )
    name = "layers.0.weight"
    moved = (student[f"encoder.{name}"] - first["visual"][name]).abs().max().item()
    assert moved == 0 if kind == "frozen" else (0 < moved < 0.02) == (kind == "finetune")
    assert 0 < (visual[f"0.{name}"] - first["visual"][name]).abs().max() and (kind == "scratch") == bool(
        (visual[f"0.{name}"] - first["visual"][name]).abs().max() > 0.02
    )
    assert all(torch.equal(student[f"tnet.{n}"], t) for n, t in first["tnet"].items())
    assert all(torch.equal(student[f"encoder.{n}"], first["visual"][n]) for n in ("mean", "std"))


def test_every_student_and_the_visual_network_get_the_same_updates(digits_like, tmp_path, capsys, monkeypatch):
    steps = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *a: steps.append(1) or step(self, *a))
    counts = []
    base = [*arguments(digits_like, tmp_path), "--fold", 0]
    run(capsys, *base, "--stage", "teachers")
    run(capsys, *base, "--stage", "align")
    (tmp_path / "run.json").unlink()  # to give these teachers students of other settings
    monkeypatch.setattr(sys.modules[__name__], "SMALL", ["--dim", "16", "--device", "cpu", "--updates", "7"])
    for method in METHODS:
        steps.clear()
        run(capsys, *base, "--stage", "student", "--method", method, "--epochs-student", 3)
        counts.append(len(steps))
    assert counts == [7] * len(METHODS)  # an epoch is one batch of 80 rows


def test_train_rows_are_drawn_from_the_training_part(digits_like, tmp_path, capsys):
    base = [*arguments(digits_like, tmp_path), "--method", "task"]
    run(capsys, *base, "--train-rows", 30)
    data = np.load(digits_like[0])
    for fold in range(3):
        saved = torch.load(tmp_path / f"fold{fold}" / "student_task.pt", weights_only=True)
        whole = torch.load(digits_like[1] / f"fold{fold}" / "student_task.pt", weights_only=True)
        assert torch.equal(saved["val"], whole["val"])
        mean = saved["weights"]["encoder.mean"].numpy()
        assert not np.allclose(mean, whole["weights"]["encoder.mean"].numpy(), atol=1e-3)
        # 30 rows that are not validated on have this mean: their sum is within the span of 30 such rows
        outside = np.delete(data["visual"], saved["val"].numpy(), axis=0)
        assert np.all(30 * mean <= np.sort(outside, axis=0)[-30:].sum(0)) and len(outside) == 80
    assert "--train-rows: a fold has only 80" in run(capsys, *base, "--train-rows", 81)


def test_preset_is_the_released_code_and_what_is_given_goes_first():
    args = train.options(["--preset", "released", "--device", "cpu", "--w-ot", "3"])
    got = (args.anchors, args.shift, args.student_backbone, args.w_task, args.w_centroid, args.eps, args.k, args.dim)
    assert got == ("least", "min", "frozen", 0.8, 0.2, 0.01, 30, 512)
    assert (args.lr_student, args.epochs_student, args.lr_pkdot, args.epochs_pkdot) == (5e-4, 10, 1e-4, 20)
    assert (args.lr_adapter, args.lr_fusion, args.lr_tnet, args.epochs_align) == (5e-3, 1e-4, 5e-5, 10)
    assert (args.w_align, args.w_head, args.w_pkdot_ot, args.w_ot, args.updates) == (0.5, 0.5, 0.6, 3, 0)


def test_eval_on_other_data_scores_every_row_with_the_trained_classes(digits_like, tmp_path, capsys):
    data = dict(np.load(digits_like[0]))
    keep = data["label"] == 6  # one class only, which is the third of the student's
    np.savez(tmp_path / "one.npz", visual=data["visual"][keep], label=data["label"][keep])
    base = ["--stage", "eval", "--dataset", "features", "--out", digits_like[1], "--data"]
    assert "40 rows, all, as they are not the data" in run(capsys, *base, tmp_path / "one.npz")
    scored = json.loads((digits_like[1] / "eval.json").read_text())
    saved = torch.load(digits_like[1] / "fold0/student_mtpkdot.pt", weights_only=True)
    net = Student(Encoder(6, 16), TNet(16), Fusion(16, 3)).eval()
    net.load_state_dict(saved["weights"])
    hits = net(torch.tensor(data["visual"][keep], dtype=torch.float32))[1].argmax(1) == 2
    assert scored["folds"][0]["students"]["mtpkdot"] == hits.double().mean().item()
    np.savez(tmp_path / "odd.npz", visual=data["visual"], label=data["label"] + 1)
    assert "knows the labels [4, 5, 6]; the data has [7]" in run(capsys, *base, tmp_path / "odd.npz")
    np.savez(tmp_path / "wide.npz", visual=np.ones((4, 7)), label=np.array([4, 5, 4, 5]))
    assert "input shape [6]" in run(capsys, *base, tmp_path / "wide.npz")
    np.savez(tmp_path / "float.npz", visual=np.ones((4, 6)), label=np.ones((4, 2)))
    assert "the data is regression" in run(capsys, *base, tmp_path / "float.npz")


def test_published_weights_are_for_raw_data(digits_like, tmp_path, capsys):
    base = arguments(digits_like, tmp_path)
    assert "--visual-weights: they are for raw data" in run(capsys, *base, "--visual-weights", "r3d_18.pth")


def test_regression_by_person_scores_ccc(tmp_path, capsys):
    data = two_view(tmp_path / "d.npz", regression=True, group=np.arange(120) // 10)
    out = run(capsys, "--dataset", "features", "--data", data, "--out", tmp_path / "out", "--folds", 2)
    got = results(tmp_path / "out")
    assert (got["task"], got["metric"]) == ("regression", "ccc")
    assert set(got["mean"]["joint"]) == set(got["stderr"]["joint"]) == {"valence", "arousal", "mean"}
    best = got["folds"][0]["students"]["mtpkdot"]["best"]
    assert abs(best["mean"] - (best["valence"] + best["arousal"]) / 2) < 1e-12 and "CCC of valence/arousal" in out


def test_synthetic_is_the_default_and_its_split_gives_no_standard_error(tmp_path, capsys):
    run(capsys, "--out", tmp_path, "--batch-size", 512)
    got = results(tmp_path)
    assert got["dataset"] == "synthetic" and len(got["folds"]) == 1 and got["stderr"]["visual"]["mean"] is None
    run(capsys, "--out", tmp_path, "--stage", "eval")
    scored = json.loads((tmp_path / "eval.json").read_text())
    assert scored["mean"]["students"]["mtpkdot"] == got["mean"]["students"]["mtpkdot"]["best"]


def test_amp_is_bfloat16_for_raw_input_and_float32_for_what_follows(tmp_path, capsys):
    on, off = (train.options(["--device", "cpu", "--amp", amp]) for amp in ("on", "off"))
    assert train.options(["--device", "cpu"]).amp == "off"
    inside = []
    for network, x in [(ResNet18(8, width=2), torch.rand(3, 1, 20, 20)), (Encoder(6, 8), torch.rand(3, 6))]:
        network.eval().requires_grad_(False)
        hook = next(m for m in network.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)))
        hook.register_forward_hook(lambda module, x, out: inside.append(out.dtype))
        half, whole = train.forward(on, network, x), train.forward(off, network, x)
        assert half.dtype == whole.dtype == torch.float32
        torch.testing.assert_close(half, whole, rtol=0.05, atol=0.02)
    assert inside == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
    base = ["--amp", "on", "--out", tmp_path]
    run(capsys, *base)
    run(capsys, *base, "--stage", "eval")
    scored = json.loads((tmp_path / "eval.json").read_text())
    assert scored["mean"]["students"]["mtpkdot"] == results(tmp_path)["mean"]["students"]["mtpkdot"]["best"]


def test_missing_or_foreign_stages_are_named(digits_like, tmp_path, capsys):
    base = arguments(digits_like, tmp_path)
    assert "fold0/teachers.pt is missing: run --stage teachers first" in run(capsys, *base, "--stage", "align")
    assert "fold0/teachers.pt is missing" in run(capsys, *base, "--stage", "student", "--method", "task")
    assert "results.json is missing: run --stage student first" in run(capsys, *base, "--stage", "eval")
    assert not (tmp_path / "results.json").exists()
    run(capsys, *base, "--stage", "teachers")
    assert "fold0/align.pt is missing: run --stage align first" in run(capsys, *base, "--stage", "student")
    assert "run --stage student --method mtpkdot first" in run(capsys, *base, "--stage", "eval")
    run(capsys, *base, "--stage", "student", "--method", "task")  # needs no alignment
    note = tmp_path / "run.json"
    note.unlink()
    assert "was made from other data" in run(capsys, *base, "--stage", "align", "--seed", 1)
    note.unlink()
    run(capsys, *base, "--stage", "align")
    note.unlink()
    run(capsys, *base, "--stage", "teachers", "--lr-backbone", 0.1)
    note.unlink()
    assert "align.pt was made from other" in run(capsys, *base, "--stage", "student")
    assert results(tmp_path)["folds"][0]["students"] == {}  # the old one did not have these teachers
    run(capsys, *base)
    assert results(tmp_path)["folds"][0]["students"]
    note.unlink()
    for stage in ("teachers", "align"):  # other T-Net, same aligned teachers
        run(capsys, *base, "--stage", stage, "--tnet-loss", "mmd")
    assert results(tmp_path)["folds"][0]["students"] == {}
    note.unlink()
    (tmp_path / "fold0" / "teachers.pt").write_bytes(b"not a checkpoint")
    assert "fold0/teachers.pt: damaged, or not a file of" in run(capsys, *base, "--stage", "align")
    torch.save({"somebody": "else's"}, tmp_path / "fold0" / "teachers.pt")
    assert "fold0/teachers.pt: damaged, or not a file of" in run(capsys, *base, "--stage", "align")
    (tmp_path / "results.json").write_text("{")
    assert "results.json is damaged" in run(capsys, *base, "--stage", "eval")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--dataset", "imagenet"], "--dataset: invalid choice"),
        (["--dataset", "features"], "needs --data FILE.npz"),
        (["--dataset", "features", "--data", "nowhere.npz"], "nowhere.npz: no such file"),
        (["--dataset", "affwild2"], "data/affwild2"),
        (["--dataset", "biovid"], "data/biovid"),
        (["--fold", "1"], "--fold: the folds are 0 to 0"),
        (["--data", "faces.npz"], "--data: the synthetic data is made in memory"),
        (["--seed", "9" * 30], "--seed: 9999"),
        (["--visual-weights", "r3d_18.pth"], "r3d_18.pth: no such file"),
        (["--levels", "BL1"], "--levels: BL1 is not two or more"),
        (["--batch-size", "1"], "--batch-size: the CCC of a single clip"),
        (["--lr-student", "1e30"], "seed 0, fold 0, stage student, mtpkdot, epoch 1, step "),
        (["--eps", "1e-40"], "mtpkdot, epoch 1, step 1: ot: eps = 1e-40 is too small"),
        (["--folds", "61"], "60 people, too few for 61 folds"),
        (["--folds", "1"], "--folds: 1 is not at least 2"),
        (["--batch-size", "0"], "--batch-size: 0 is not at least 1"),
        (["--batch-size", "many"], "--batch-size: invalid int value"),
        (["--eps", "0"], "--eps: 0 is not above 0"),
        (["--lr-student", "nan"], "--lr-student: nan is not above 0"),
        (["--w-ot", "-1"], "--w-ot: -1 is not at least 0"),
        (["--w-align", "2"], "--w-align: 2.0 is above 1"),
        (["--bogus"], "unrecognized arguments: --bogus"),
        (
            ["--lr-backbone", "1e30"],
            "seed 0, fold 0, stage teachers, visual, epoch 1, step 2: loss is nan; what was saved stays",
        ),
        (["--out", "/proc/nowhere"], "cannot be written"),
    ],
)
def test_mistakes_get_one_line(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert message in run(capsys, *argv)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(["--device", "cuda", "--out", str(tmp_path)])
    assert "no CUDA device" in capsys.readouterr().err


def test_as_a_script_it_is_quiet_off_a_terminal_and_exits_2(tmp_path):
    script, env = Path(train.__file__), {**os.environ, "PYTHONWARNINGS": "error::DeprecationWarning"}
    done = subprocess.run([sys.executable, script, "--out", "o", "--batch-size", "512", *SMALL],
                          cwd=tmp_path, env=env, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0 and "it/s" not in done.stderr, done.stderr
    assert done.stdout.count("  epoch ") == 6 * 2 and "joint teacher" in done.stdout
    done = subprocess.run([sys.executable, script, "--dim", "15"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_three_stages_on_cuda(digits_like, tmp_path, capsys):
    base = arguments(digits_like, tmp_path)
    train.main([str(a) for a in (*base, "--method", "all", *SMALL[:-1], "cuda")])
    mean, cpu = results(tmp_path)["mean"], results(digits_like[1])["mean"]
    assert abs(mean["joint"] - cpu["joint"]) < 0.15
    run(capsys, *base, "--stage", "eval", "--method", "all")  # a student trained on CUDA serves on the CPU
