"""What is stopped, killed or damaged: a run goes on to the very results that it would have had, or says why not.

KILLS=200 python -m pytest test_resume.py kills more often. Run as a script by its own tests and by test_fuzz.py, it is
a process that has imported train.py once and forks for every run that they ask for.
"""

import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from models import load_student
from test_train import run, two_view

HERE = Path(__file__).resolve()
KILLS = int(os.environ.get("KILLS", 20))


class Forks:
    """train.main(argv) in a process of its own, quickly: {"code", "err", "seconds", "peak" (MiB)}."""

    def __init__(self):
        self.server = subprocess.Popen([sys.executable, HERE], stdin=-1, stdout=-1, text=True, cwd=HERE.parent)

    def __call__(self, *argv, cwd=".", **how):
        """how: send, a signal, after so many seconds; limit, the largest file that can be written, in bytes."""
        print(json.dumps({"argv": [str(a) for a in argv], "cwd": str(cwd), **how}), file=self.server.stdin, flush=True)
        return json.loads(self.server.stdout.readline())

    def close(self):
        self.server.stdin.close()
        self.server.wait()


def serve():
    sys.modules["matplotlib"] = None  # for time
    train.SAVE_EVERY = 0.1  # not ten minutes
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # the first one imports a second's worth
    for line in sys.stdin:
        job = json.loads(line)
        start, (errors, err) = time.monotonic(), os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.dup2(err, 2)
                os.chdir(job["cwd"])
                if "limit" in job:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"],) * 2)
                torch.set_num_threads(1)
                train.main(job["argv"])
                code = 0
            except SystemExit as stop:
                code = stop.code
            except BaseException:
                sys.excepthook(*sys.exc_info())
                code = 1
            sys.stderr.flush()
            os._exit(code)
        os.close(err)
        if "send" in job:
            time.sleep(job["after"])
            os.kill(child, job["send"])
        guard = threading.Timer(60, os.kill, (child, signal.SIGKILL))
        guard.start()
        _, status, usage = os.wait4(child, 0)
        guard.cancel()
        seconds = time.monotonic() - start
        with open(errors, errors="replace") as said:
            text = said.read(100_000)
        answer = {"code": os.waitstatus_to_exitcode(status), "err": text, "seconds": seconds}
        print(json.dumps({**answer, "peak": usage.ru_maxrss / 1024}), flush=True)


@pytest.fixture(scope="module")
def forks():
    both = [Forks(), Forks()]
    yield both
    for one in both:
        one.close()


def one_line(answer, code=2):
    assert answer["code"] == code and answer["err"].startswith("train.py: ") and answer["err"].count("\n") == 1, answer
    return answer["err"]


@pytest.fixture(scope="module")
def small(tmp_path_factory, forks):
    """(arguments of a small run of all stages, its folder when nothing stopped it, the seconds it took)."""
    folder = tmp_path_factory.mktemp("small")
    data = two_view(folder / "data.npz", n=60)
    argv = ["--dataset", "features", "--data", data, "--folds", 2, "--method", "mtpkdot,pkdot", "--epochs", 4]
    argv += ["--batch-size", 8, "--dim", 8, "--device", "cpu"]
    answer = forks[0](*argv, "--out", folder / "whole")
    assert answer["code"] == 0, answer
    return argv, folder / "whole", answer["seconds"]


def same(one, other):
    """Byte for byte, and nothing unfinished left."""
    for name in ("results.json", "history.csv", "run.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    files = {str(path.relative_to(one)): path for path in sorted(one.rglob("*.pt"))}
    assert list(files) == [str(path.relative_to(other)) for path in sorted(other.rglob("*.pt"))]
    return all(train.fingerprint(train.read(file)) == train.fingerprint(train.read(other / name))
               for name, file in files.items())  # fmt: skip


# ---- stopped ------------------------------------------------------------------------------------------


def test_killed_at_any_moment_it_resumes_to_the_same_results(small, forks, tmp_path):
    argv, whole, seconds = small
    seed = random.randrange(2**32)
    print("seed", seed)
    idle = list(forks)

    def killed(i):
        """Killed once in the i-th part of the run, and once more, perhaps, while it resumes."""
        server, out, where = idle.pop(), tmp_path / f"{i}", []
        chance, longest = random.Random(seed + i), seconds
        while not where:
            after = (i + chance.random()) / KILLS * longest
            answer = server(*argv, "--out", out, "--resume", send=signal.SIGKILL, after=after)
            if answer["code"] == 0:  # it was faster than it had been
                longest = answer["seconds"]
                shutil.rmtree(out)
            else:
                assert answer["code"] == -signal.SIGKILL, answer
                where = sorted(str(path.relative_to(out)) for path in out.rglob("*.pt"))[-1:] or ["nothing yet"]
        server(*argv, "--out", out, "--resume", send=signal.SIGKILL, after=chance.random() * longest)
        answer = server(*argv, "--out", out, "--resume")
        assert answer["code"] == 0 and answer["err"] == "", answer
        assert same(whole, out)
        shutil.rmtree(out)
        idle.append(server)
        return where[0]

    with ThreadPoolExecutor(len(idle)) as pool:
        places = list(pool.map(killed, range(KILLS)))
    print(places)
    assert len(set(places)) >= 5  # in one stage and another


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_tells_how_to_go_on(number, small, forks, tmp_path):
    argv, whole, seconds = small
    within = 0
    for i in range(6):
        out = tmp_path / f"{i}"
        answer = forks[0](*argv, "--out", out, send=number, after=(i + 0.5) / 6 * seconds)
        if answer["code"] == 0:
            continue
        said = one_line(answer, 128 + number)
        assert said.startswith(
            "train.py: stopped; what was done is saved. To go on: python train.py --dataset features"
        )
        assert said.endswith(f"--out {out} --resume\n")
        within += any(train.read(path)["step"] > 0 for path in out.rglob("unfinished_*.pt"))
        assert forks[0](*argv, "--out", out, "--resume")["code"] == 0 and same(whole, out)
    assert within > 0  # one at the least was within an epoch


@pytest.mark.filterwarnings("ignore:.*faceless")
def test_a_stopped_run_on_raw_data_with_its_readers(forks, tmp_path):
    pytest.importorskip("PIL")
    from test_raw import affwild2_tree

    argv = ["--dataset", "affwild2", "--data", affwild2_tree(tmp_path / "tree"), "--width", 2, "--clip-stride", 6]
    argv += ["--batch-size", 8, "--dim", 8, "--epochs", 1, "--device", "cpu", "--workers", 1, "--augment", "--out"]
    whole = forks[0](*argv, tmp_path / "whole")
    assert whole["code"] == 0, whole
    for i in range(2):
        answer = whole
        while answer["code"] == 0:  # perhaps it was faster than it had been
            shutil.rmtree(tmp_path / f"{i}", ignore_errors=True)
            after = (0.2 + 0.6 * i) * answer["seconds"]
            answer = forks[0](*argv, tmp_path / f"{i}", send=signal.SIGTERM, after=after)
        assert answer["code"] == 128 + signal.SIGTERM and "Traceback" not in answer["err"], answer
        assert forks[0](*argv, tmp_path / f"{i}", "--resume")["code"] == 0
        assert same(tmp_path / "whole", tmp_path / f"{i}")


def test_a_stopped_run_of_several_seeds(small, tmp_path):
    argv = [*map(str, small[0]), "--seeds", "2", "--out"]
    command = [sys.executable, str(HERE.with_name("train.py")), *argv]
    subprocess.run([*command, "whole"], cwd=tmp_path, check=True, capture_output=True)
    stopped = subprocess.Popen([*command, "out"], cwd=tmp_path, stdout=-1, stderr=-1, text=True)
    while not list((tmp_path / "out").rglob("unfinished_*.pt")):
        assert stopped.poll() is None
        time.sleep(0.05)
    stopped.terminate()
    _, err = stopped.communicate()
    one_line({"code": stopped.returncode, "err": err}, 128 + signal.SIGTERM)
    subprocess.run([*command, "out", "--resume"], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "out/results.json").read_bytes() == (tmp_path / "whole/results.json").read_bytes()
    assert not list((tmp_path / "out").rglob("unfinished_*.pt"))


# ---- what went wrong ----------------------------------------------------------------------------------


def test_a_bad_loss_names_its_step_and_term_and_what_was_saved_goes_on(small, tmp_path, capsys, monkeypatch):
    argv, whole, _ = small
    argv = [str(a) for a in (*argv, "--out", tmp_path)]
    ot_loss, calls = train.mtpkdot.ot_loss, []

    def spoilt(*args, **kwargs):
        calls.append(1)
        return ot_loss(*args, **kwargs) * (float("nan") if len(calls) == 11 else 1)  # 4 batches an epoch

    with monkeypatch.context() as patch:
        patch.setattr(train.mtpkdot, "ot_loss", spoilt)
        with pytest.raises(SystemExit) as stop:
            train.main(argv)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert "seed 0, fold 0, stage student, mtpkdot, epoch 3, step 3: loss is nan, ot is nan; what was saved" in said
    train.main([*argv, "--resume"])
    for name in ("results.json", "history.csv"):  # two threads here, one there
        assert (tmp_path / name).stat().st_size == pytest.approx((whole / name).stat().st_size, rel=0.05)


def test_a_score_that_is_not_finite_stops_the_run(tmp_path, capsys):
    rng = np.random.default_rng(0)
    visual, label, split = rng.normal(size=(60, 4)), rng.uniform(-1, 1, (60, 2)), np.repeat(["val", "train"], [20, 40])
    visual[3] = 3e38  # float32 can hold it, but not what follows
    np.savez(tmp_path / "d.npz", visual=visual, privileged=rng.normal(size=(60, 4)), label=label, split=split)
    said = run(capsys, "--dataset", "features", "--data", tmp_path / "d.npz", "--out", tmp_path / "out")
    assert "stage teachers" in said and "epoch 1: its score on validation rows is nan; what was saved stays" in said


def test_a_full_disk_is_one_line_and_leaves_what_was_saved(small, forks, tmp_path):
    argv, whole, _ = small
    largest = max(path.stat().st_size for path in whole.rglob("*.pt"))
    for limit in (0, 200, largest // 20, largest // 2, largest - 1):
        said = one_line(forks[0](*argv, "--out", tmp_path, "--resume", limit=limit))
        assert "cannot be written (File too large)" in said and not list(tmp_path.rglob("*.tmp"))
    assert forks[0](*argv, "--out", tmp_path, "--resume")["code"] == 0 and same(whole, tmp_path)
    (tmp_path / "file").write_text("")
    assert "file cannot be written" in one_line(forks[0](*argv, "--out", tmp_path / "file"))


def test_a_folder_of_other_arguments_is_refused(small, forks, tmp_path):
    argv, whole, _ = small
    out = shutil.copytree(whole, tmp_path / "out")
    for more in (["--resume"], []):
        said = one_line(forks[0](*argv, "--out", out, "--seed", 1, "--w-ot", 2, *more))
        assert f"{out}/run.json is of a run of other arguments: --seed (0, now 1), --w-ot (1.0, now 2.0); name" in said
    two_view(tmp_path / "other.npz", n=62)
    assert "arguments: --data-digest (" in one_line(forks[0](*argv, "--data", tmp_path / "other.npz", "--out", out))
    assert same(whole, out)
    (out / "run.json").unlink()  # nor without it does --resume take what was made otherwise
    said = one_line(forks[0](*argv, "--out", out, "--w-ot", 2, "--resume"))
    assert "fold0/teachers.pt is of a run of other arguments: --w-ot (1.0, now 2.0)" in said
    (out / "run.json").write_text("{")
    assert "run.json: damaged" in one_line(forks[0](*argv, "--out", out))
    moved = shutil.copy(argv[3], tmp_path / "moved.npz")  # the same data elsewhere, one more method, other readers
    shutil.copy(whole / "run.json", out)
    answer = forks[0](*argv, "--data", moved, "--method", "task", "--workers", 1, "--out", out, "--resume")
    assert answer["code"] == 0 and "task" in json.loads((out / "results.json").read_text())["mean"]["students"], answer


class Payload:
    """What would make a folder if it were unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module")
def stopped(small, forks, tmp_path_factory):
    """The folder of a run that is stopped within stage 1."""
    argv, _, seconds = small
    for i in range(50):
        out = tmp_path_factory.mktemp("stopped")
        forks[0](*argv, "--out", out, send=signal.SIGTERM, after=0.02 * (i + 1))
        if list(out.rglob("unfinished_teachers_*.pt")):
            return out
    raise AssertionError("never stopped within stage 1")


def test_a_pickle_that_runs_code_is_refused(small, stopped, forks, tmp_path, capsys):
    argv, whole, _ = small
    harm = tmp_path / "harm"
    pickle.loads(pickle.dumps(Payload(harm)))
    harm.rmdir()  # it would have worked
    for source, name, more in [
        (stopped, next(stopped.rglob("unfinished_*.pt")).name, ["--resume"]),
        (whole, "teachers.pt", ["--stage", "align"]),
        (whole, "embedding_visual.pt", ["--stage", "align"]),
        (whole, "align.pt", ["--resume"]),
        (whole, "student_mtpkdot.pt", ["--stage", "eval"]),
    ]:
        out = shutil.copytree(source, tmp_path / "out", dirs_exist_ok=True)
        torch.save({**train.read(source / "fold0" / name), "format": 1, "digest": Payload(harm)}, out / "fold0" / name)
        assert f"{name}: damaged, or not a file of" in one_line(forks[0](*argv, "--out", out, *more))
        shutil.rmtree(out)
    torch.save({"conv1.weight": Payload(harm)}, tmp_path / "published.pth")
    with pytest.raises(SystemExit):
        train.start_from(torch.nn.Linear(1, 1), tmp_path / "published.pth")
    assert "published.pth: not a file of published weights" in capsys.readouterr().err
    arrays = dict(np.load(argv[3]))
    np.savez(tmp_path / "data.npz", **{**arrays, "label": np.array([Payload(harm)] * 60, dtype=object)})
    said = one_line(forks[0](*argv, "--out", tmp_path / "out", "--data", tmp_path / "data.npz"))
    assert "not a .npz file of plain arrays" in said and not harm.exists()


def test_files_that_are_foreign_truncated_or_of_another_version(small, stopped, forks, tmp_path):
    argv, whole, _ = small
    out = shutil.copytree(stopped, tmp_path / "out")
    file = next(out.rglob("unfinished_*.pt"))
    good = file.read_bytes()
    resume = [*argv, "--out", out, "--resume"]

    def refused(saved, how=resume, at=file):
        train.write(at, saved) if isinstance(saved, dict) else at.write_bytes(saved)
        said = one_line(forks[0](*how))
        assert str(at) in said
        return said

    assert "remove it" in refused(good[: len(good) // 2])
    assert "remove it" in refused(b"")
    saved = train.read(stopped / file.relative_to(out))
    torch.save({**saved, "format": 2, "digest": ""}, file)
    assert "of format 2, and this train.py reads 1" in one_line(forks[0](*resume))
    weight = saved["network"]["0.layers.0.weight"].numpy().tobytes()
    flipped = good.replace(weight, weight[:-1] + bytes([weight[-1] ^ 1]))  # a bit of a number: torch.load takes it
    assert flipped != good and "damaged" in refused(flipped)
    assert "was made from other data" in refused({**saved, "key": "of another width"})
    assert "is of other networks than these" in refused({**saved, "network": {}})
    file.write_bytes(good)
    assert forks[0](*resume)["code"] == 0 and same(whole, out)
    student = out / "fold0/student_mtpkdot.pt"
    alone = ["--stage", "eval", "--data", argv[3], "--device", "cpu", "--student"]
    assert "not a student's file" in refused(train.read(out / "fold0/align.pt"), [*alone, student], student)
    assert "no such file" in one_line(forks[0](*alone, out / "nowhere.pt"))
    assert "--stage eval --student FILE" in one_line(forks[0](*argv, "--predictions", "p.csv"))


# ---- deployed -----------------------------------------------------------------------------------------


def test_a_student_alone_predicts_what_python_predicts(small, tmp_path, capsys, monkeypatch):
    argv, whole, _ = small
    monkeypatch.setattr(sys.modules["test_train"], "SMALL", ["--device", "cpu"])
    file = Path(shutil.copy(whole / "fold0/student_mtpkdot.pt", tmp_path / "student.pt"))
    visual = np.random.default_rng(5).normal(size=(9, 6))
    np.savez(tmp_path / "new.npz", visual=visual)  # no label, no privileged
    base = ["--stage", "eval", "--student", file, "--data"]
    out = run(capsys, *base, tmp_path / "new.npz", "--predictions", tmp_path / "out.csv")
    assert "9 rows, all, as they are not the data that it was trained with" in out and "Score" not in out
    saved = torch.load(file, weights_only=True)
    student = load_student(saved)
    p = student(torch.tensor(visual, dtype=torch.float32))[1].softmax(1)
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert lines[0] == "name,prediction,p_4,p_5,p_6" and len(lines) == 10
    for i, line in enumerate(lines[1:]):
        name, prediction, *chances = line.split(",")
        assert (int(name), int(prediction)) == (i, saved["names"][p[i].argmax()])
        assert np.allclose(np.array(chances, dtype=float), p[i], atol=1e-6)
    assert "no key label" in run(capsys, *base, tmp_path / "new.npz")  # to score them is another matter
    np.savez(tmp_path / "labelled.npz", visual=visual, label=saved["names"][0] + np.arange(9) % 3)
    hits = (p.argmax(1).numpy() == np.arange(9) % 3).mean()
    assert f"Score: {100 * hits:.1f}, accuracy in %" in run(capsys, *base, tmp_path / "labelled.npz")
    assert "no such file" in run(capsys, *base, tmp_path / "nowhere.npz")
    np.savez(tmp_path / "one.npz", visual=visual[:1])
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=-1, text=True)
    run(capsys, *base, tmp_path / "one.npz", "--predictions", tmp_path / "pipe")
    header, line = reader.communicate()[0].splitlines()  # a row alone is not rounded as it is among nine
    assert header == lines[0] and line.split(",")[:2] == lines[1].split(",")[:2] and (tmp_path / "pipe").is_fifo()
    assert np.allclose(np.array(line.split(",")[2:], dtype=float), p[0], atol=1e-6)
    for bad in (".", "/proc/nowhere/p.csv"):
        assert "cannot be written" in run(capsys, *base, tmp_path / "one.npz", "--predictions", bad)
    for option in ("--predictions", "--data"):
        assert "xxx: File name too long" in run(capsys, *base, tmp_path / "one.npz", option, "x" * 300)
    own = run(capsys, *base, argv[3], "--predictions", tmp_path / "out.csv")
    assert "30 validation rows of its own data" in own


@pytest.mark.filterwarnings("ignore:.*faceless")
def test_raw_predictions_are_named_by_clip_and_need_no_annotations(tmp_path, capsys):
    pytest.importorskip("PIL")
    from test_raw import affwild2_tree, biovid_tree

    tree = affwild2_tree(tmp_path / "tree")
    run(capsys, "--dataset", "affwild2", "--data", tree, "--width", 2, "--clip-stride", 6, "--workers", 0,
        "--out", tmp_path / "run")  # fmt: skip
    for folder in ("annotations", "audio", "cropped_aligned/9_right", "cropped_aligned/faceless"):
        shutil.rmtree(tree / folder, ignore_errors=True)
    base = ["--stage", "eval", "--workers", 0, "--predictions", tmp_path / "out.csv", "--student"]
    run(capsys, *base, tmp_path / "run/fold0/student_mtpkdot.pt", "--data", tree, "--clip-stride", 12)
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert lines[0] == "name,valence,arousal" and len(lines) == 1 + 5 * 3
    assert lines[1].startswith("1-30-1280x720/00001,") and lines[-1].startswith("été.v2/00025,")
    saved = torch.load(tmp_path / "run/fold0/student_mtpkdot.pt", weights_only=True)
    clip = train.load("affwild2", tree, need_privileged=False, need_label=False, stride=12).visual[0]
    want = load_student(saved)(clip.unsqueeze(0))[1][0]
    assert np.allclose(np.array(lines[1].split(",")[1:], dtype=float), want, atol=1e-5)

    tree = biovid_tree(tmp_path / "biovid", levels=("BL1", "PA1"))
    run(capsys, "--dataset", "biovid", "--data", tree, "--width", 2, "--folds", 2, "--levels", "BL1,PA1",
        "--workers", 0, "--out", tmp_path / "pain")  # fmt: skip
    shutil.rmtree(tree / "biosignals_filtered")
    out = run(capsys, *base, tmp_path / "pain/fold1/student_mtpkdot.pt", "--data", tree)
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert lines[0] == "name,prediction,p_BL1,p_PA1" and "Score: " not in out
    held_out = torch.load(tmp_path / "pain/fold1/student_mtpkdot.pt", weights_only=True)["val"]
    names = [path.name for path in sorted((tree / "frames").glob("*/*"))]
    assert [line.split(",")[0] for line in lines[1:]] == [names[i] for i in held_out]  # its own data: not the rest


# ---- pictures -----------------------------------------------------------------------------------------


def test_pictures_where_matplotlib_is_installed_and_a_line_where_not(small, tmp_path, capsys, monkeypatch):
    argv = [str(a) for a in (*small[0], "--method", "task", "--out", tmp_path)]
    train.main(argv)
    assert "No history.png and similarity.png: they need matplotlib" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.png"))
    monkeypatch.delitem(sys.modules, "matplotlib")
    pytest.importorskip("matplotlib")
    train.main([*argv, "--resume"])
    assert all((tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG" for name in ("history", "similarity"))
    shown = train.read(tmp_path / "fold0/student_task.pt")["similarity"]
    assert shown["label"].tolist() == sorted(shown["label"].tolist()) and shown["student"].shape == (30, 30)
    assert not torch.equal(shown["student"], shown["student, untrained"])


if __name__ == "__main__":
    serve()
